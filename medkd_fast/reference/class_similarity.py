"""The definition of class_similarity.

Of an image with features x [C, N] and labels y [N]: the prototype of a class m_k = Σ_{n: y_n = k} x_n / (n_k + 1e-6), and of every
pixel the cosine between its feature and its class's prototype,

    r_n = ⟨x_n, m_{y_n}⟩ a_n b_{y_n},  a_n = 1 / max(|x_n|, δ),  b_k = 1 / max(|m_k|, δ),  δ = 1e-8

and 0 at ignored pixels. A feature reaches r through itself and through its class's prototype. With v the gradient that arrives
for r,

    w_k     = b_k Σ_{n: y_n = k} v_n a_n x_n − b_k² m_k Σ_{n: y_n = k} v_n r_n        for m_k
    ∂/∂x_n  = v_n a_n b_k m_k − v_n r_n a_n² x_n + w_k / (n_k + 1e-6),  k = y_n

where the parts with a_n² and b_k² are 0 for a vector no longer than δ, which a constant divides. So the backward is a weighted sum
of the features by class, and a combination of the feature and two vectors of its class. Sums by class are made in fp64.
"""

from __future__ import annotations

import torch

from medkd_fast.reference.class_means import prepare

#: Added to the number of a class's pixels, and the square of the shortest norm that is divided by.
EPSILON, SHORTEST = 1e-6, 1e-16


def class_similarity(x: torch.Tensor, target: torch.Tensor, num_classes: int, ignore_index: int) -> torch.Tensor:
    """Arguments as those of `medkd_fast.class_similarity`, checked."""
    kept, indicator, counts = prepare(x, target, num_classes, ignore_index)
    number = indicator.sum(2)
    prototypes = indicator @ kept.mT / (number + EPSILON).unsqueeze(2)  # [B, K, C]
    own = torch.where(counts, target.flatten(1).long(), 0)
    product = (prototypes @ kept).gather(1, own.unsqueeze(1)).squeeze(1)
    similarity = product / (_norm(prototypes, 2).gather(1, own) * _norm(kept, 1))
    return torch.where(counts, similarity, 0).view(target.shape)


def _norm(x: torch.Tensor, dim: int) -> torch.Tensor:
    """max(L2 norm, 1e-8), with gradient 0 below that."""
    return x.square().sum(dim).clamp_min(SHORTEST).sqrt()
