"""The definition of pixel_relation.

Features X [C, N] of one image, one column a pixel; s is the student, t the teacher. The columns of S and T are the rows of the
relation matrices' left factors, with ε = 1e-12 and C the network's own number of channels:

    cosine    s_p = x_p / n_p,  n_p = max(|x_p|, ε)
    pearson   the same with x_p less its mean over the channels
    gram      s_p = x_p / √C

Through it ∂/∂x_p = (g_p − s_p ⟨s_p, g_p⟩) / n_p with g_p = ∂/∂s_p, and g_p / ε for a pixel shorter than ε; for Pearson less its
mean over the channels; for gram g_p / √C. Across images, a and b run over all ordered pairs, the matrix of a pair has a's
pixels as rows and b's as columns, and the value is the mean over pairs. Otherwise a = b.

**mse.** With N_a and N_b pixels that count,

    D = S_aᵀS_b − T_aᵀT_b,  value = ‖D‖² / (N_a N_b)   (Frobenius norm)

D is N×N, and the fused kernels never make it. With A = S − T and B = S + T, 2D = A_aᵀB_b + B_aᵀA_b, so

    ‖D‖² = ½ (½ ⟨A_aA_aᵀ, B_bB_bᵀ⟩ + ½ ⟨B_aB_aᵀ, A_bA_bᵀ⟩ + tr(A_aB_aᵀ A_bB_bᵀ))

and for one image ½ (⟨AAᵀ, BBᵀ⟩ + tr((BAᵀ)²)), which takes C×C products alone, one pass over the pixels.
(‖SSᵀ‖² + ‖TTᵀ‖² − 2‖STᵀ‖² is the same number; near S = T it subtracts numbers of the size of the relations, where this form
has the small A in every factor.) It is bilinear in the two images' products, so a weighted sum over all pairs is that of the
images' weighted sums. The gradient of one image's value:

    ∂‖D‖²/∂S = 4 S D = 2 ((SAᵀ) B + (SBᵀ) A) = (AAᵀ + BAᵀ) B + (ABᵀ + BBᵀ) A

that is, a matrix [ABᵀ + BBᵀ, AAᵀ + BAᵀ] of C×2C times the stacked [A; B]; across images, for image a, the sum over b of b's
matrices, weighted with the pairs (a, b) and (b, a). Unequal numbers of channels: the narrower network's further channels
are 0, which changes no product of its pixels.

**kl.** Logits s_ij = ⟨s_i, s_j⟩ / τ, and t_ij likewise, i a pixel of a and j one of b. With p = softmax over j and
lse_i = log Σ_j exp,

    KL_i = Σ_j p^t_ij (t_ij − s_ij) − lse^t_i + lse^s_i,  value = Σ_i KL_i / N_a

so a row needs three sums, of e^s, of e^t and of e^t (t − s), each relative to a maximum. A unit vector's logits are at most
1/τ, and where e^(−2/τ) is a normal number that serves as the maximum of every row. Then e^(s_ij − 1/τ) is the same for row i and,
the matrix being symmetric, row j. Otherwise the maxima are found along the way. The gradient, with
D_ij = p^s_ij − p^t_ij,

    ∂(Σ_i KL_i)/∂s_i = Σ_j (D_ij + D_ji) s_j / τ

takes a second pass, in which e^(s_ij − 1/τ) serves D_ij and D_ji.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from medkd_fast.reference.channel_relation import kl_of_rows, prepare, reduce_images


def pixel_relation(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    relation: str,
    divergence: str,
    temperature: float,
    across_images: bool,
    reduction: str,
) -> torch.Tensor:
    """Arguments as those of `medkd_fast.pixel_relation`, checked."""
    s, t, valid = prepare(student, teacher, mask)
    s, t = relations(normalised(s, relation), across_images), relations(normalised(t, relation), across_images)
    counts_a = valid.clamp(min=1).to(s.dtype).unsqueeze(1)  # [B, 1]
    counts_b = counts_a.mT if across_images else counts_a
    if divergence == "mse":
        value = (s - t).square().sum((2, 3)) / (counts_a * counts_b)
    else:
        s, t = s / temperature, t / temperature
        # [B, N]: which pixels count
        rows = valid.new_ones(s.shape[0], s.shape[2], dtype=torch.bool) if mask is None else mask.flatten(1)
        columns = rows[None, :, None] if across_images else rows[:, None, None]
        counted = columns & rows[:, None, :, None]
        log_s, log_t = (F.log_softmax(x.masked_fill(~columns, -torch.inf), 3).masked_fill(~counted, 0) for x in (s, t))
        value = kl_of_rows(log_s, log_t).sum((2, 3)) / counts_a
    related = torch.minimum(valid.unsqueeze(1), valid) if across_images else valid
    return reduce_images(value if across_images else value.squeeze(1), related, reduction)


def normalised(x: torch.Tensor, relation: str) -> torch.Tensor:
    """Features [B, C, N] with every pixel ready for products with others."""
    if relation == "gram":
        return x / math.sqrt(x.shape[1])
    if relation == "pearson":
        x = x - x[:, :1].detach()  # so that equal channels become 0 and not the rounding of their mean
        x = x - x.mean(1, keepdim=True)
    return F.normalize(x, dim=1, eps=1e-12)


def relations(x: torch.Tensor, across_images: bool) -> torch.Tensor:
    """All products of pixels: [B, B, N, N] across images, else [B, 1, N, N]."""
    return x.mT.unsqueeze(1) @ (x if across_images else x.unsqueeze(1))
