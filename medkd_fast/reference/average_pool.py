"""The definition of average_pool.

Windows lie side by side, the last of an axis is cut off at the border. Of window w, with the pixels n that lie in it and count:

    number(w) = Σ_n 1,   pooled(c, w) = Σ_n x(c, n) / number(w),   0 where none counts.

Every pixel lies in one window w(n), so the gradient is v(c, w(n)) / number(w(n)) where the pixel counts, else 0: nothing is added up
and x is not read.
"""

from __future__ import annotations

import torch

from medkd_fast.reference.common import arithmetic


def average_pool(x: torch.Tensor, mask: torch.Tensor | None, window: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments as those of `medkd_fast.average_pool`, checked. Returns the averages [B, C, *P] and the numbers [B, *P]."""
    if mask is None:
        mask = torch.ones(x.shape[0], *x.shape[2:], dtype=torch.bool, device=x.device)
    # selected, not multiplied: what does not count may be infinite or no number
    total = _sums(torch.where(mask.unsqueeze(1), x.to(arithmetic(x, x)), 0), window)
    number = _sums(mask.unsqueeze(1).to(torch.int32), window)
    return total / number.clamp(min=1), number.squeeze(1)


def _sums(x: torch.Tensor, window: list[int]) -> torch.Tensor:
    """Of every window, axis by axis."""
    for axis, step in enumerate(window, 2):
        missing = -x.shape[axis] % step
        x = torch.cat([x, x.new_zeros((*x.shape[:axis], missing, *x.shape[axis + 1 :]))], axis)
        x = x.unflatten(axis, (x.shape[axis] // step, step)).sum(axis + 1, dtype=x.dtype)
    return x
