"""The definition of channel_relation.

Features X [C, N] of one image, one row a channel, one column a pixel that counts; s is the student, t the teacher. With
ε = 1e-12, |·| the L2 norm and x̂ = x / max(|x|, ε) row by row, the relation R [C, C] is

    cosine    R = X̂ X̂ᵀ
    pearson   the same of X minus each row's mean
    gram      R = X Xᵀ / N
    row       R = K̂ with K = X Xᵀ
    softmax   R = P Pᵀ with P = softmax(X / τ), each row over its pixels

and the value of an image, with p_c = softmax(R^t_c / τ) and q_c = softmax(R^s_c / τ) over the entries of row c,

    mse       Σ_ck (R^s_ck − R^t_ck)² / C²
    kl        Σ_c KL(p_c ‖ q_c) / C

**One pass over the pixels.** The fused kernels take the products G = Y Yᵀ of rows that need no knowledge of R. Y = X
for cosine, gram and row: their norms are those of G's diagonal and rows. For pearson Y = X − a with any a_c near the
mean of row c (that of 64 pixels), so that a mean of a thousand deviations loses nothing; for softmax
Y = exp((X − max) / τ). These two have a row of ones more, whose products are the sums u_c = Σ_p Y_cp: X minus its mean
has the products G − u uᵀ / N, and P = Y / u. So always

    R_ck = l_c (G_ck − m_c m_k N) r_k,  m = u / N for pearson, else 0

with l = r = 1 / max(norm, ε) for cosine and pearson, l = r = 1 / u for softmax, and r = 1 with l = 1 / N for gram or
l_c = 1 / max(|K_c|, ε) for row.

**Gradient for R.** mse: V = 2 (R^s − R^t) / C². kl: V_ck = (q_ck − p_ck) / (C τ), which is not symmetric. An entry of G
is the product of two rows and gives to both, so let W = V + Vᵀ; for row, V first goes through the division by the norm:
V_c becomes (V_c − R_c ⟨R_c, V_c⟩) l_c.

**Gradient for X** is M Y plus a constant a channel for the shift, with M [C, C]:

    gram      M = W / N
    row       M = W
    cosine    ∂/∂x_c = (g_c − x̂_c ⟨x̂_c, g_c⟩) l_c with g = W X̂, and ⟨x̂_c, g_c⟩ = Σ_k W_ck R_ck:
              M_ck = (W_ck − δ_ck Σ_j W_cj R_cj) l_c l_k
    pearson   the same M, times X minus its mean, which is M Y − M m
    softmax   ∂/∂x_c = P_c ∘ (g_c − ⟨P_c, g_c⟩) / τ with g = W P, and ⟨P_c, g_c⟩ = Σ_k W_ck R_ck again:
              Y_c ∘ (M Y − b)_c with M_ck = W_ck l_c l_k / τ and b_c = Σ_k W_ck R_ck l_c / τ

A row shorter than ε lacks the part with ⟨·, ·⟩: a constant divides it. The constants −M m and −b are M's last column,
which multiplies the row of ones. M is all that the forward leaves behind, and the backward is one product of C×C with
C×N.

**kl near R^s = R^t.** With d = log q − log p, KL = Σ p (e^d − 1 − d), because p and q have the same sum: no term is
negative, none is a difference of large numbers, and q − p = p (e^d − 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from medkd_fast.reference.common import arithmetic


def channel_relation(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    relation: str,
    divergence: str,
    temperature: float,
    reduction: str,
) -> torch.Tensor:
    """Arguments as those of `medkd_fast.channel_relation`, checked."""
    s, t, valid = prepare(student, teacher, mask)
    relation_s, relation_t = (relation_matrix(x, mask, valid, relation, temperature) for x in (s, t))
    if divergence == "mse":
        value = (relation_s - relation_t).square().mean((1, 2))
    else:
        log_s, log_t = ((x / temperature).log_softmax(2) for x in (relation_s, relation_t))
        value = kl_of_rows(log_s, log_t).sum(2).mean(1)
    return reduce_images(value, valid, reduction)


def kl_of_rows(log_s: torch.Tensor, log_t: torch.Tensor) -> torch.Tensor:
    """Terms whose sum over a row is Σ e^{log_t} (log_t − log_s), none of them negative, so that none is lost near 0.

    With d = log_s − log_t they are e^{log_t} (e^d − 1 − d), because both rows' probabilities have the same sum.
    """
    d, p = log_s - log_t, log_t.exp()
    # e^d may overflow where p has underflown
    gained = torch.where(d < 1, p * d.clamp(max=1).expm1(), log_s.exp() - p)
    return gained - p * d


def relation_matrix(
    x: torch.Tensor, mask: torch.Tensor | None, valid: torch.Tensor, relation: str, temperature: float
) -> torch.Tensor:
    """The relation [B, C, C] of features `x` [B, C, N] and `valid` [B] as `prepare` gives them, with its mask."""
    counts = None if mask is None else mask.flatten(1).unsqueeze(1)
    number = valid.clamp(min=1).to(x.dtype).view(-1, 1, 1)
    if relation in ("cosine", "pearson"):
        if relation == "pearson":
            x = centred(x, counts, number)
        x = F.normalize(x, dim=2, eps=1e-12)
        return x @ x.mT
    if relation == "softmax":
        scores = x / temperature
        if counts is not None:
            # an image without a pixel that counts keeps finite scores, whose softmax is then dropped
            scores = scores.masked_fill(~counts & counts.any(2, keepdim=True), -torch.inf)
        p = scores.softmax(2)
        p = p if counts is None else torch.where(counts, p, 0)
        return p @ p.mT
    gram = x @ x.mT
    return gram / number if relation == "gram" else F.normalize(gram, dim=2, eps=1e-12)


def centred(x: torch.Tensor, counts: torch.Tensor | None, number: torch.Tensor) -> torch.Tensor:
    """`x` [B, C, N] minus each row's mean over the `number` [B, 1, 1] pixels that count [B, 1, N]."""
    if x.shape[2] == 0:
        return x
    # first minus a value that it has, so that a constant row becomes 0 and not the rounding of its mean
    if counts is None:
        x = x - x[:, :, :1].detach()
        return x - x.mean(2, keepdim=True)
    first = counts.to(torch.uint8).argmax(2, keepdim=True).expand(-1, x.shape[1], 1)
    x = torch.where(counts, x - x.gather(2, first).detach(), 0)
    return torch.where(counts, x - x.sum(2, keepdim=True) / number, 0)


def prepare(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features [B, C, N] in the arithmetic's type, 0 at pixels that do not count, and the numbers [B] of the others."""
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
