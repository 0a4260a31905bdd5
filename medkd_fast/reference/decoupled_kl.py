"""The definition of decoupled_kl.

One pixel with label y and logits u = z / τ. With L = logsumexp of u over the classes c ≠ y and d = u_y − L, the
probability of the label is b = σ(d), and the other classes have, among themselves, q_c = exp(u_c − L). Teacher t, student s:

    TCKD = b_t (log σ(d_t) − log σ(d_s)) + (1 − b_t) (log σ(−d_t) − log σ(−d_s))
    NCKD = Σ_{c≠y} q^t_c (log q^t_c − log q^s_c)
    loss = τ² (target_weight · TCKD + nontarget_weight · NCKD)

Gradients, before the 1/τ of the chain rule: ∂TCKD/∂u^s_y = b_s − b_t, ∂TCKD/∂u^s_c = −(b_s − b_t) q^s_c,
∂NCKD/∂u^s_c = q^s_c − q^t_c.

No probability is ever taken the logarithm of, and no class is masked by adding a large negative number, so the values
are finite at any finite logits. A class at −inf in the teacher contributes nothing to NCKD (0 · log 0 = 0), one at −inf in
the student alone makes it +inf.

What the fused kernels do differently, with the same value: logits are shifted by their own maximum over c ≠ y, x = u − m, so
that NCKD = log(Σ e^{x_s} / Σ e^{x_t}) + Σ e^{x_t} (x_t − x_s) / Σ e^{x_t} needs two exponentials a class and one logarithm;
TCKD is taken with both signs flipped where d_t > 0 (it does not change), which keeps its relative accuracy in saturation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from medkd_fast.reference.common import arithmetic, which_count

INF = float("inf")


def decoupled_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    target_weight: float,
    nontarget_weight: float,
    temperature: float,
    ignore_index: int,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, target part, non-target part); arguments as those of `medkd_fast.decoupled_kl`, checked."""
    s, t, weight = prepare(student, teacher, target, weight, temperature, ignore_index)
    classes = torch.arange(s.shape[1], device=s.device).view(-1, *[1] * (s.dim() - 2))
    own = classes == target.unsqueeze(1)  # [B, C, *S]
    inside = own.any(1)  # a label outside [0, C) on a GPU: NaN

    d_s, other_s, log_sum_s = log_odds(s, own)
    d_t, other_t, log_sum_t = log_odds(t, own)
    target_part = bernoulli_kl(d_s, d_t)
    nontarget_part = categorical_kl(
        log_probability(other_s, log_sum_s), log_probability(other_t, log_sum_t), ~own & (other_t != -INF)
    )

    parts = []
    for part in (target_part, nontarget_part):
        part = torch.where(inside | (weight == 0), part, torch.nan)
        parts.append(reduce(temperature**2 * part, weight, reduction))
    # a part of weight 0 is left out, even an infinite one; without any part it is 0, with a gradient of 0
    loss = torch.zeros_like(parts[0]) + student[:0].sum().to(parts[0])
    for factor, part in zip((target_weight, nontarget_weight), parts, strict=True):
        if factor:
            loss = loss + factor * part
    return loss, parts[0], parts[1]


def prepare(
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor | None,
    weight: torch.Tensor | None,
    temperature: float,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits over the temperature at the teacher's size, 0 at pixels that do not count, and the weights [B, *S]."""
    dtype = arithmetic(student, teacher)
    s, t = student.to(dtype), teacher.to(dtype)
    if s.shape[2:] != t.shape[2:] and t.numel() == 0:
        s = s.sum().expand_as(t)
    elif s.shape[2:] != t.shape[2:]:
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[s.dim() - 2]
        # a class at -inf stays there wherever a neighbour has it; in the interpolation 0 · -inf would be NaN
        s = F.interpolate(s.clamp(min=-1e30), size=t.shape[2:], mode=mode, align_corners=False)
        s = torch.where(s < -1e20, -INF, s)
    if weight is None:
        weight = torch.ones(t.shape[0], *t.shape[2:], dtype=dtype, device=t.device)
    if target is not None:
        weight = torch.where(which_count(target, ignore_index), weight, 0)
    counts = (weight != 0).unsqueeze(1)
    return torch.where(counts, s, 0) / temperature, torch.where(counts, t, 0) / temperature, weight


def log_odds(u: torch.Tensor, own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """d = u_y − L [B, *S], the logits with the label's at −inf [B, C, *S], and L [B, 1, *S]."""
    other = u.masked_fill(own, -INF)
    log_sum = logsumexp(other)
    return torch.where(own, u, 0).sum(1) - log_sum.squeeze(1), other, log_sum


def logsumexp(u: torch.Tensor) -> torch.Tensor:
    """Over dimension 1, kept. All at −inf: −inf with gradient 0, where torch.logsumexp has gradient NaN."""
    top = u.detach().amax(1, keepdim=True)
    top = torch.where(top == -INF, 0, top)
    total = (u - top).exp().sum(1, keepdim=True)
    return torch.where(total != 0, top + torch.where(total != 0, total, 1).log(), -INF)


def log_probability(u: torch.Tensor, log_sum: torch.Tensor) -> torch.Tensor:
    """u − log_sum; −inf where every class is at −inf."""
    return u - torch.where(log_sum == -INF, 0, log_sum)


def bernoulli_kl(d_s: torch.Tensor, d_t: torch.Tensor) -> torch.Tensor:
    """KL between Bernoulli distributions with log-odds d_t and d_s; 0 · log 0 = 0 at infinite log-odds."""
    value = torch.zeros_like(d_s)
    for sign in (1, -1):
        b = torch.sigmoid(sign * d_t)
        difference = torch.where(b != 0, F.logsigmoid(sign * d_t), 0) - F.logsigmoid(torch.where(b != 0, sign * d_s, 0))
        # what the student rules out and the teacher does not, also where the teacher's probability underflows
        ruled_out = (sign * d_s == -INF) & (sign * d_t > -INF)
        value = value + torch.where(ruled_out, INF, torch.where(b != 0, b * difference, 0))
    return value


def categorical_kl(log_s: torch.Tensor, log_t: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Σ over dimension 1 of e^{log_t} (log_t − log_s) where the class is present in the teacher."""
    difference = torch.where(present, log_t, 0) - torch.where(present, log_s, 0)
    term = torch.where(present, log_t, 0).exp() * difference
    term = torch.where(difference == INF, difference, term)  # also where the teacher's probability underflows
    return torch.where(present, term, 0).sum(1)


def reduce(value: torch.Tensor, weight: torch.Tensor, reduction: str) -> torch.Tensor:
    """`value` and `weight` [B, *S]; pixels of weight 0 have value 0 whatever they hold."""
    value = torch.where(weight == 0, 0, weight * value)
    if reduction == "none":
        return value
    if reduction == "sum":
        return value.sum()
    total = weight.sum()
    return torch.where(total == 0, 0, value.sum() / torch.where(total == 0, 1, total))
