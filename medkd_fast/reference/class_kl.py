"""The definition of class_kl: τ² Σ_c p^t_c (log p^t_c − log p^s_c), p = softmax(z / τ); its gradient is τ (p_s − p_t).

Absent classes and infinities are treated as in decoupled_kl, with whose non-target part it agrees when no class is left
out. The fused kernels use the shifted form that is derived there.
"""

from __future__ import annotations

import torch

from medkd_fast.reference.decoupled_kl import INF, categorical_kl, log_probability, logsumexp, prepare, reduce


def class_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor | None,
    weight: torch.Tensor | None,
    temperature: float,
    ignore_index: int,
    reduction: str,
) -> torch.Tensor:
    """The loss; arguments as those of `medkd_fast.class_kl`, checked."""
    s, t, weight = prepare(student, teacher, target, weight, temperature, ignore_index)
    value = categorical_kl(log_probability(s, logsumexp(s)), log_probability(t, logsumexp(t)), t != -INF)
    return reduce(temperature**2 * value, weight, reduction)
