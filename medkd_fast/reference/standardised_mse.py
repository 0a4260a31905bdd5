"""The definition of standardised_mse.

A channel is a row over the n pixels of the batch that count, in both networks. With A, B the sums of squares around the means μ_s,
μ_t, Γ that of products, and deviations a = √(A / (n − 1)) + ε, b = √(B / (n − 1)) + ε, ε = 1e-6,

    value = mean over channels and pixels of ((s − μ_s) / a − (t − μ_t) / b)² = Σ_c (A / a² + B / b² − 2 Γ / (ab)) / (n C)

All that passes from pixel to pixel are sums: n, and for every channel those of s, t, s², t², st. They are made in fp64, where the
products of fp32 numbers are exact, so that means can be taken out of them afterwards. What is then left of A below 1e-14 of the
sum of squares is rounding (fp32 numbers that differ at all differ by more): the channel is constant, A = 0. The gradient is
another pass, ∂/∂s = f_s (s − μ_s) + f_t (t − μ_t) with

    f_t = −2 / (n C a b),   f_s = 2 / (n C) · (1 / a² − (A / a³ − Γ / (a² b)) / ((n − 1) √(A / (n − 1))))

and without the last part, which is that of a, for a constant channel.
"""

from __future__ import annotations

from typing import Any

import torch

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
        import torch.distributed.nn.functional as collective

        sums = collective.all_reduce(sums, group=process_group)
    number = sums[0].detach().clamp(min=1)
    sum_s, sum_t, square_s, square_t, product = sums[1:].unflatten(0, (5, -1))
    deviations, squares = [], []
    for total, square in ((sum_s, square_s), (sum_t, square_t)):
        around = square - total.square() / number
        varies = around > CONSTANT * square
        around = torch.where(varies, around, 0)
        root = torch.where(varies, torch.where(varies, around, 1) / (number - 1).clamp(min=1), 0)
        deviations.append(torch.where(varies, torch.where(varies, root, 1).sqrt(), 0) + EPSILON)
        squares.append(around)
    a, b = deviations
    around = product - sum_s * sum_t / number
    # beside a constant channel the sum of products is rounding as well
    around = torch.where((squares[0] > 0) & (squares[1] > 0), around, 0)
    value = squares[0] / a.square() + squares[1] / b.square() - 2 * around / (a * b)
    return (value.mean() / number).to(s.dtype)
