"""The definition of spatial_kl.

One row of a map is one channel of one image, over its pixels that count; u = z / τ, p = softmax over the row:

    KL = Σ_n p^t_n (log p^t_n − log p^s_n),  value = τ² KL,  ∂value/∂z^s_n = τ (p^s_n − p^t_n)

The fused kernels go over a row's pixels in pieces and keep of each the maxima m of u, the sums of e^(u − m), and
W = Σ e^(u^t − m^t) ((u^t − m^t) − (u^s − m^s)), in fp64. Two pieces are joined by moving both to the larger maximum: a sum is
multiplied by f = e^(m − m'), and W becomes f^t (W + sum^t ((m^t − m'^t) − (m^s − m'^s))). In the end, as for classes
(decoupled_kl),

    KL = log(sum^s / sum^t) + W / sum^t

A pixel at −inf in both networks is absent; in the student alone it is infinitely far.
"""

from __future__ import annotations

import torch

from medkd_fast.reference.channel_relation import prepare
from medkd_fast.reference.decoupled_kl import INF, categorical_kl, log_probability, logsumexp


def spatial_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    temperature: float,
    reduction: str,
) -> torch.Tensor:
    """Arguments as those of `medkd_fast.spatial_kl`, checked."""
    s, t, valid = prepare(student, teacher, mask)
    if s.shape[2] == 0:
        value = s.sum(2)
    else:
        s, t = s / temperature, t / temperature
        if mask is not None:
            s, t = (x.masked_fill(~mask.flatten(1).unsqueeze(1), -INF) for x in (s, t))
        s, t = s.flatten(0, 1), t.flatten(0, 1)
        value = categorical_kl(log_probability(s, logsumexp(s)), log_probability(t, logsumexp(t)), t != -INF)
        value = temperature**2 * value.unflatten(0, student.shape[:2])
    value = torch.where((valid > 0).unsqueeze(1), value, 0)
    if reduction == "none":
        return value
    if reduction == "sum":
        return value.sum()
    return value.sum() / (valid > 0).sum().clamp(min=1) / student.shape[1]
