"""Pooling by a factor over the pixels that count."""

from __future__ import annotations

import torch

from medkd_fast.losses.common import AVERAGE_POOL, wide


def check_pool(pool: int | None) -> None:
    if pool is not None and pool < 1:
        raise ValueError(f"pool: got {pool}, want a whole number of at least 1, or None")


def average_pooled(
    x: torch.Tensor, factor: int | None, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`x` averaged by `factor` over the pixels that count (a rest at the border over what is there), and where any did."""
    if factor is None or factor == 1:
        return x, mask
    pool, window = AVERAGE_POOL[x.dim() - 2], _window(x, factor)
    if mask is None:
        return pool(x, window, ceil_mode=True, count_include_pad=False), None
    mask = mask.unsqueeze(1)
    share = pool(wide(mask), window, ceil_mode=True, count_include_pad=False)
    left = share > 0
    # selected, not multiplied: what lies outside may be infinite or no number
    total = pool(torch.where(mask, wide(x), 0), window, ceil_mode=True, count_include_pad=False)
    return total / torch.where(left, share, 1), left.squeeze(1)


def _window(x: torch.Tensor, factor: int) -> tuple[int, ...]:
    return tuple(min(factor, size) for size in x.shape[2:])
