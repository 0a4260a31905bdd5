"""The definition of class_means.

Of an image with features x [C, N] and labels y [N], for every class k its n_k pixels and their mean feature

    m_k = Σ_{n: y_n = k} x_n / n_k,   ∂/∂x_n = v_{y_n} / n_{y_n}

with v the gradient that arrives for m. A class without a pixel has the mean 0. The sums are made in fp64.
"""

from __future__ import annotations

import torch

from medkd_fast.reference.common import arithmetic, which_count


def class_means(
    x: torch.Tensor, target: torch.Tensor, num_classes: int, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means [B, K, C] and counts [B, K]; arguments as those of `medkd_fast.class_means`, checked."""
    kept, indicator, _ = prepare(x, target, num_classes, ignore_index)
    counts = indicator.sum(2)
    return indicator @ kept.mT / counts.clamp(min=1).unsqueeze(2), counts.long()


def prepare(
    x: torch.Tensor, target: torch.Tensor, num_classes: int, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features [B, C, N], 0 at ignored pixels whatever stood there; which pixel is of which class, [B, K, N] of 0 and 1 in
    the type of the arithmetic; and which pixels count, [B, N]."""
    labels = target.flatten(1).long()
    counts = which_count(labels, ignore_index)
    kept = torch.where(counts.unsqueeze(1), x.to(arithmetic(x, x)).flatten(2), 0)
    classes = torch.arange(num_classes, device=x.device).view(1, -1, 1)
    return kept, ((labels.unsqueeze(1) == classes) & counts.unsqueeze(1)).to(kept.dtype), counts
