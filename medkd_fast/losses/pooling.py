"""Pooling by a factor over the pixels that count."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from medkd_fast.losses.common import AVERAGE_POOL, MAX_POOL, wide


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


def max_pooled(
    x: torch.Tensor, factor: int | None, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The largest of `x` by `factor` among the pixels that count, and where any did; 0 elsewhere."""
    if factor is None or factor == 1:
        return x, mask
    if mask is None:
        return _maxima(x, _window(x, factor)), None
    mask = mask.unsqueeze(1)
    left = _maxima(wide(mask), _window(x, factor)) > 0
    return torch.where(left, _maxima(x.masked_fill(~mask, -torch.inf), _window(x, factor)), 0), left.squeeze(1)


def _window(x: torch.Tensor, factor: int) -> tuple[int, ...]:
    return tuple(min(factor, size) for size in x.shape[2:])


def _maxima(x: torch.Tensor, window: tuple[int, ...]) -> torch.Tensor:
    if any(size % step for size, step in zip(x.shape[2:], window, strict=True)):
        return MAX_POOL[x.dim() - 2](x, window, ceil_mode=True)
    largest: torch.Tensor = Maxima.apply(x, window)
    return largest


class Maxima(torch.autograd.Function):
    """Max-pooling of a size that the window divides, axis by axis: without the indices that PyTorch's is slow for.

    As there, the gradient goes to the first of equal pixels.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, window: tuple[int, ...]) -> torch.Tensor:
        y = x
        for axis, step in enumerate(window, start=2):
            first, *others = (_every(y, axis, start, step) for start in range(step))
            for other in others:
                first = torch.maximum(first, other)
            y = first
        ctx.save_for_backward(x, y)
        ctx.window = window
        return y

    @staticmethod
    def backward(ctx: Any, v_y: torch.Tensor) -> tuple[torch.Tensor, None]:
        x, y = ctx.saved_tensors
        v_x, free = torch.empty_like(x), torch.ones_like(y, dtype=torch.bool)
        for place in itertools.product(*(range(step) for step in ctx.window)):
            part, v_part = x, v_x
            for axis, (start, step) in enumerate(zip(place, ctx.window, strict=True), start=2):
                part, v_part = _every(part, axis, start, step), _every(v_part, axis, start, step)
            found = (part == y) & free
            v_part.copy_(torch.where(found, v_y, 0))
            free = free & ~found
        return v_x, None


def _every(x: torch.Tensor, axis: int, start: int, step: int) -> torch.Tensor:
    """x[start::step] along an axis."""
    return x[(slice(None),) * axis + (slice(start, None, step),)]
