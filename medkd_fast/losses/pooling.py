"""Pooling by a factor over the pixels that count."""

from __future__ import annotations

import math
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
    if any(step != 2 or size % 2 for size, step in zip(x.shape[2:], window, strict=True)):
        return MAX_POOL[x.dim() - 2](x, window, ceil_mode=True)
    return MaximaOfPairs.apply(x)


class MaximaOfPairs(torch.autograd.Function):
    """Max-pooling by two of an even size, axis by axis, the last one first: PyTorch's spends most of its time on indices.

    As there, the gradient goes to the first of equal pixels.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        y = x
        #: For every axis that is done, the last one first: whether the maximum is the second of its pair.
        second: list[torch.Tensor] = []
        for axis in range(x.dim() - 1, 1, -1):
            a, b = _pairs(y, axis)
            if ctx.needs_input_grad[0]:
                larger = b > a
                of_winners = [of_a ^ (larger & (of_a ^ of_b)) for of_a, of_b in (_pairs(z, axis) for z in second)]
                second = [*of_winners, larger]
            y = torch.maximum(a, b)
        ctx.save_for_backward(*second)
        ctx.size = x.shape[2:]
        return y

    @staticmethod
    def backward(ctx: Any, v_y: torch.Tensor) -> torch.Tensor:
        place = torch.arange(math.prod(ctx.size), device=v_y.device).view(ctx.size)
        for axis in range(place.dim()):
            place, _ = _pairs(place, axis)
        place, stride = place.flatten(), 1
        for second, size in zip(ctx.saved_tensors, reversed(ctx.size), strict=True):
            place = torch.add(place, second.flatten(2).long(), alpha=stride)
            stride *= size
        v_x = v_y.new_zeros((*v_y.shape[:2], math.prod(ctx.size)))
        return v_x.scatter_(2, place, v_y.flatten(2)).unflatten(2, ctx.size)


def _pairs(x: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the second of every two along an axis."""
    first, second = x.unflatten(axis, (-1, 2)).unbind(axis + 1)
    return first, second
