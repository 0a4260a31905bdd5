"""The definition of class_pearson.

p = softmax over classes of z / τ; q = p − 1/C, so that a pixel's q sum to 0; Pearson's correlation is a cosine of centred
vectors, with ε = 1e-8 added to the product of their norms. Over the n pixels of the batch that count:

    inter: of a pixel over the classes   r_n = ⟨q^s, q^t⟩ / (ab + ε),  a = |q^s|, b = |q^t|
    intra: of a class over the pixels    R_c = cov_c / (AB + ε),  A² and B² the sums of squares around the means
    loss = τ² (w_inter (1 − Σ r_n / n) + w_intra (1 − Σ R_c / C))

All that passes from pixel to pixel are sums: n, Σ r, and for every class those of q^s, q^t, (q^s)², (q^t)², q^s q^t. They are
made in fp64, where the products are exact, so that means can be taken out of them afterwards. The gradient is another pass:

    ∂r/∂q^s   = q^t / (ab + ε) − ⟨q^s, q^t⟩ b q^s / (a (ab + ε)²)
    ∂R_c/∂q^s = (q^t − mean^t) / (AB + ε) − cov B (q^s − mean^s) / (A (AB + ε)²)
    ∂loss/∂z_c = p_c (g_c − Σ_k p_k g_k) / τ,  g = ∂loss/∂q^s

where the part along a vector of length 0 is 0.
"""

from __future__ import annotations

from typing import Any

import torch

from medkd_fast.processes import all_reduce
from medkd_fast.reference.decoupled_kl import prepare

SMALLEST = 1e-8


def class_pearson(
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor | None,
    inter_weight: float,
    intra_weight: float,
    temperature: float,
    ignore_index: int,
    process_group: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss, inter, intra; arguments as those of `medkd_fast.class_pearson`, checked."""
    s, t, weight = prepare(student, teacher, target, None, temperature, ignore_index)
    counts = (weight != 0).unsqueeze(1)
    q_s, q_t = (
        torch.where(counts, x.softmax(1) - 1 / x.shape[1], 0).double().transpose(0, 1).flatten(1) for x in (s, t)
    )
    within = (q_s * q_t).sum(0) / (q_s.norm(dim=0) * q_t.norm(dim=0) + SMALLEST)
    moments = [x.sum(1) for x in (q_s, q_t, q_s.square(), q_t.square(), q_s * q_t)]
    sums = torch.cat([counts.sum().reshape(1), within.sum().reshape(1), *moments])
    if process_group is not None:
        sums = all_reduce(sums, process_group)
    number, exists = sums[0].clamp(min=1), (sums[0] > 0).double()
    sum_s, sum_t, sum_ss, sum_tt, sum_st = sums[2:].unflatten(0, (5, -1))
    norm_s, norm_t = (_root(squares - x.square() / number) for squares, x in ((sum_ss, sum_s), (sum_tt, sum_t)))
    across = (sum_st - sum_s * sum_t / number) / (norm_s * norm_t + SMALLEST)
    inter, intra = exists - sums[1] / number, exists - across.mean()
    loss = temperature**2 * (inter_weight * inter + intra_weight * intra)
    return loss.to(s.dtype), inter.to(s.dtype), intra.to(s.dtype)


def _root(square: torch.Tensor) -> torch.Tensor:
    """The root of what may have been rounded to just below 0; there its gradient is 0."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1).sqrt(), 0)
