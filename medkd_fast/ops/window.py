"""The windows of max_pool and average_pool."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from medkd_fast.ops import common


def window_of(x: torch.Tensor, window: int | Sequence[int], name: str = "window") -> list[int]:
    """Pixels along every axis of `x`, cut to the axis. `name`: the argument's, for who got it wrong."""
    common.check_features("x", x)
    sizes = x.shape[2:]
    if len(sizes) > 3:
        raise ValueError(f"x: got shape {tuple(x.shape)}, want one to three spatial dimensions")
    steps = [window] * len(sizes) if isinstance(window, int) else list(window)
    if len(steps) != len(sizes) or any(step < 1 for step in steps):
        raise ValueError(f"{name}: got {window}, want a whole number of at least 1, or {len(sizes)} of them")
    return [max(min(step, size), 1) for step, size in zip(steps, sizes, strict=True)]


def windows_along(x: torch.Tensor, window: Sequence[int]) -> list[int]:
    """Their number along every axis, the last of which may be cut off."""
    return [-(-size // step) for size, step in zip(x.shape[2:], window, strict=True)]
