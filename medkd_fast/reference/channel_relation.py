"""The definition of channel_relation.

Features X [C, N] of one image, one row a channel, one column a pixel; s is the student, t the teacher. With
n_c = max(|x_c|, ε), ε = 1e-12, and rows x̂_c = x_c / n_c,

    R = X̂ X̂ᵀ,  value = Σ_ck (R^s_ck − R^t_ck)² / C²

The fused kernels take the products G = X Xᵀ of the raw features in one pass; norms are its diagonal, and R = G / (n nᵀ). With
D = R^s − R^t, which is symmetric, ∂value/∂x̂_c = 4/C² · Σ_k D_ck x̂_k. Through the division by the norm,
∂value/∂x_c = (g_c − x̂_c ⟨x̂_c, g_c⟩) / n_c with g_c = ∂value/∂x̂_c, and ⟨x̂_c, g_c⟩ = 4/C² · Σ_k D_ck R^s_ck. So

    ∂value/∂X = M X,  M_ck = 4/C² · (D_ck − δ_ck Σ_j D_cj R^s_cj) / (n_c n_k)

where the δ part is absent for a channel shorter than ε: a constant divides it. M is all that the forward leaves behind, and the
backward is one product of C×C with C×N.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from medkd_fast.ops.common import arithmetic


def channel_relation(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, reduction: str
) -> torch.Tensor:
    """Arguments as those of `medkd_fast.channel_relation`, checked, with its relation "cosine" and divergence "mse"."""
    s, t, valid = prepare(student, teacher, mask)
    s, t = F.normalize(s, dim=2, eps=1e-12), F.normalize(t, dim=2, eps=1e-12)
    value = (s @ s.mT - t @ t.mT).square().mean((1, 2))
    return reduce_images(value, valid, reduction)


def prepare(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features [B, C, N] in the arithmetic's type, 0 at pixels that do not count, and the numbers [B] of those that do."""
    dtype = arithmetic(student, teacher)
    s, t = student.to(dtype).flatten(2), teacher.to(dtype).flatten(2)
    if mask is None:
        return s, t, torch.full((s.shape[0],), s.shape[2], device=s.device)
    counts = mask.flatten(1)
    # selected, not multiplied: what lies outside may be infinite or no number
    return torch.where(counts.unsqueeze(1), s, 0), torch.where(counts.unsqueeze(1), t, 0), counts.sum(1)


def reduce_images(value: torch.Tensor, valid: torch.Tensor, reduction: str) -> torch.Tensor:
    """`value` [B] of images with `valid` [B] pixels; one without any has value 0 and leaves the mean."""
    value = torch.where(valid > 0, value, 0)
    if reduction == "none":
        return value
    if reduction == "sum":
        return value.sum()
    return value.sum() / (valid > 0).sum().clamp(min=1)
