"""The definition of standardised_mse.

A channel is a row over the n pixels of the batch that count, in both networks. With A, B the sums of squares around the means μ_s,
μ_t, Γ that of products, roots α = √(A / (n − 1)), β likewise, and deviations a = α + ε, b = β + ε, ε = 1e-6,

    value = mean over channels and pixels of ((s − μ_s) / a − (t − μ_t) / b)² = Σ_c (A / a² + B / b² − 2 Γ / (ab)) / (n C)

All that passes from pixel to pixel are sums: n, and for every channel those of s, t, s², t², st. They are made in fp64, where the
products of fp32 numbers are exact, so that means can be taken out of them afterwards: A comes out within about
1e-15 (1 + μ² / α²) of itself. The gradient is another pass, ∂/∂s = f_s (s − μ_s) + f_t (t − μ_t) with

    f_t = −2 / (n C a b),   f_s = 2 / (n C) · (1 / a² − (A / a − Γ / b) / (a² (n − 1) α))

where the last part is that of a.

**A constant channel.** What is left of A below 1e-14 of the sum of squares may be rounding: the channel is constant, A = Γ = 0, and of
the gradient the part along itself is 0. Where the student's is constant and the teacher's is not, Γ has no value, but a
derivative: f_s = 0, f_t as above with a = ε. Where the teacher's is, Γ has none either: f_t = 0. No pixel: all are 0.

**Near s = t** the gradient is a difference of nearly equal terms: f_s + f_t is of the order of 1 − r, r the correlation. The kernels
take it as f_t (t − s) + ((f_s + f_t) s − (f_t (μ_t − μ_s) + (f_s + f_t) μ_s)), in fp64 from coefficients in fp64, and round
once, in the end. Its error is 1e-16 times the largest of |f_t t|, |f_t s|, |f_s s|, plus what the coefficients have from the sums:
for s = t + 1e-3 of a deviation, and means of a thousand deviations, still below 1e-6 of the gradient. For s = t both f_s + f_t and
all differences are exactly 0, and so is A / a² + B / b² − 2 Γ / (ab), whose terms are then equal.
"""

from __future__ import annotations

from typing import Any

import torch

from medkd_fast.processes import all_reduce
from medkd_fast.reference.channel_relation import prepare

#: Added to a standard deviation; the share of a sum of squares below which what is left around the mean is rounding.
EPSILON, CONSTANT = 1e-6, 1e-14


def standardised_mse(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, process_group: Any
) -> torch.Tensor:
    """Arguments as those of `medkd_fast.standardised_mse`, checked."""
    s, t, valid = prepare(student, teacher, mask)
    rows_s, rows_t = (x.double().transpose(0, 1).flatten(1) for x in (s, t))
    number = valid.sum().double().reshape(1)
    pairs = (rows_s, rows_t, rows_s.square(), rows_t.square(), rows_s * rows_t)
    sums = torch.cat([number, *(x.sum(1) for x in pairs)])
    if process_group is not None:
        sums = all_reduce(sums, process_group)
    number = sums[0].detach().clamp(min=1)
    sum_s, sum_t, square_s, square_t, product = sums[1:].unflatten(0, (5, -1))
    (around_s, varies_s, a), (around_t, varies_t, b) = (
        _around(square, total, number) for square, total in ((square_s, sum_s), (square_t, sum_t))
    )
    together = torch.where(varies_t, product - sum_s * sum_t / number, 0)
    together = torch.where(varies_s, together, together - together.detach())
    value = around_s / a.square() + around_t / b.square() - 2 * together / (a * b)
    return (value.mean() / number).to(s.dtype)


def _around(
    square: torch.Tensor, total: torch.Tensor, number: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum of squares around the mean, where there is one, and the deviation."""
    around = square - total.square() / number
    varies = ~(around <= CONSTANT * square)  # what is no number stays so
    around = torch.where(varies, around, 0)
    root = (torch.where(varies, around, 1) / (number - 1).clamp(min=1)).sqrt()
    return around, varies, torch.where(varies, root, 0) + EPSILON
