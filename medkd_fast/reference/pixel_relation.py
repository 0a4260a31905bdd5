"""The definition of pixel_relation.

Features X [C, N] of one image, one column a pixel; s is the student, t the teacher. With n_p = max(|x_p|, ε), ε = 1e-12,
columns s_p = x^s_p / n^s_p of S and likewise T, and N pixels that count,

    D = SᵀS − TᵀT,  value = ‖D‖² / N²   (Frobenius norm)

D is N×N, and the fused kernels never make it. With A = S − T and B = S + T, 2D = AᵀB + BᵀA, so

    ‖D‖² = ½ (⟨AAᵀ, BBᵀ⟩ + tr((BAᵀ)²))

which takes C×C products alone, one pass over the pixels. (‖SSᵀ‖² + ‖TTᵀ‖² − 2‖STᵀ‖² is the same number; near S = T it
subtracts numbers of the size of the relations, where this form has the small A in every factor.) The gradient:

    ∂‖D‖²/∂S = 4 S D = 2 ((SAᵀ) B + (SBᵀ) A) = (AAᵀ + BAᵀ) B + (ABᵀ + BBᵀ) A

that is, a matrix [ABᵀ + BBᵀ, AAᵀ + BAᵀ] of C×2C times the stacked [A; B]. Through the division by the norm,
∂/∂x_p = (g_p − s_p ⟨s_p, g_p⟩) / n_p with g_p = ∂/∂s_p, and g_p / ε for a pixel shorter than ε. Unequal numbers of channels:
the narrower network's further channels are 0, which changes no product of its pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from medkd_fast.reference.channel_relation import prepare, reduce_images


def pixel_relation(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, reduction: str
) -> torch.Tensor:
    """Arguments as those of `medkd_fast.pixel_relation`, checked, with its relation "cosine" and divergence "mse"."""
    s, t, valid = prepare(student, teacher, mask)
    s, t = F.normalize(s, dim=1, eps=1e-12), F.normalize(t, dim=1, eps=1e-12)
    value = (s.mT @ s - t.mT @ t).square().sum((1, 2)) / valid.clamp(min=1).to(s.dtype).square()
    return reduce_images(value, valid, reduction)
