"""max_pool: the largest value of every window, among the pixels that count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from medkd_fast.backend import choose, kernel, shapes_of
from medkd_fast.ops import common
from medkd_fast.ops.relation import pixel_mask
from medkd_fast.ops.window import window_of, windows_along
from medkd_fast.reference.max_pool import max_pool as reference


class MaxPool(NamedTuple):
    """What `max_pool` returns. `counted` is None without a mask."""

    pooled: torch.Tensor
    counted: torch.Tensor | None


def max_pool(x: torch.Tensor, window: int | Sequence[int], *, mask: torch.Tensor | None = None) -> MaxPool:
    """The largest value of every window; windows lie side by side, and the last of an axis is cut off at the border.

    `torch.nn.functional.max_pool2d(x, window, ceil_mode=True)`, and its kin, with a mask. The gradient goes to the first of
    equal values. A value that is no number is the largest; the last of several has the gradient.

    Args:
        x: features [B, C, *S], one to three spatial dimensions: float32, bfloat16, float16 or float64, in any memory format.
        window: pixels along every axis, or along each; one longer than its axis is cut to it. At most 32767 pixels.
        mask: [B, *S] or [B, 1, *S], booleans or integers: pixels where it is False or 0 are not looked at.

    Returns:
        MaxPool(pooled, counted): pooled [B, C, *P], P = ceil(S / window), in x's dtype, 0 where no pixel of a window counts;
        counted [B, *P], booleans, whether any did, or None without a mask.

    Raises:
        ValueError: shapes or devices that do not fit, or a window that is not there or too large.
        TypeError: a dtype that does not fit.

    >>> import torch
    >>> x = torch.tensor([1.0, 4.0, 2.0, 3.0, 5.0]).reshape(1, 1, 5)
    >>> max_pool(x, 2).pooled
    tensor([[[4., 3., 5.]]])
    >>> max_pool(x, 2, mask=torch.tensor([[1, 0, 1, 1, 0]]))
    MaxPool(pooled=tensor([[[1., 3., 0.]]]), counted=tensor([[ True,  True, False]]))
    """
    steps = window_of_maxima(x, window)
    mask = pixel_mask(mask, x)
    backend = choose("max_pool", x.device.type, x.numel())
    if backend == "reference":
        return MaxPool(*common.plainly(reference, x, mask, steps))
    if common.wants_gradient(x):
        pooled, place = common.apply(MaxPoolFunction, x, mask, backend, steps)
    else:
        pooled, place = kernel("max_pool", backend)(x, mask, steps)
    return MaxPool(pooled, None if mask is None else counted(place))


def window_of_maxima(x: torch.Tensor, window: int | Sequence[int], name: str = "window") -> list[int]:
    """`window_of`, where every place in a window has a number of 16 bits."""
    steps = window_of(x, window, name)
    if torch.Size(steps).numel() > 32767:
        raise ValueError(
            f"{name}: got {window}, {torch.Size(steps).numel()} pixels, want at most 32767; pool in two steps"
        )
    return steps


def counted(place: torch.Tensor) -> torch.Tensor:
    """Of which windows [B, *P] a pixel counts, from the places of their maxima [B, C, *P]."""
    return (place[:, :1] >= 0).any(1)


class MaxPoolFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, mask: torch.Tensor | None, backend: str, window: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pooled, place = kernel("max_pool", backend)(x, mask, window)
        ctx.save_for_backward(x, place)
        ctx.backend, ctx.window = backend, window
        ctx.mark_non_differentiable(place)
        return pooled, place

    @staticmethod
    def backward(ctx: Any, v_pooled: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        x, *state = ctx.saved_tensors  # once: a checkpoint gives them no second time
        gradient = kernel("max_pool_backward", ctx.backend)(x, *state, v_pooled, ctx.window)
        return common.first_order(x, gradient, "max_pool"), None, None, None


@shapes_of("max_pool")
def _fake(x: torch.Tensor, mask: torch.Tensor | None, window: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    pooled = x.new_empty((*x.shape[:2], *windows_along(x, window)))
    return pooled, pooled.new_empty(pooled.shape, dtype=torch.int16)


@shapes_of("max_pool_backward")
def _fake_backward(x: torch.Tensor, place: torch.Tensor, upstream: torch.Tensor, window: list[int]) -> torch.Tensor:
    return torch.empty_like(x)
