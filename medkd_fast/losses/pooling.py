"""Pooling by a factor over the pixels that count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from medkd_fast import functional
from medkd_fast.losses import settings


def check_pool(pool: int | Sequence[int] | None) -> None:
    factors: Sequence[Any] = pool if isinstance(pool, Sequence) else [pool]
    if pool is not None and not (factors and all(settings.is_whole(factor) and factor >= 1 for factor in factors)):
        raise ValueError(f"pool: got {pool!r}, want a whole number of at least 1, one for each axis, or None")


def average_pooled(
    x: torch.Tensor, factor: int | Sequence[int] | None, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`x` averaged by `factor` over the pixels that count (a rest at the border over what is there), and where any did."""
    if factor is None or factor == 1:
        return x, mask
    pooled, number = functional.average_pool(x, factor, mask=mask)
    return pooled, None if mask is None else number > 0
