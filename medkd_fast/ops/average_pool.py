"""average_pool: the mean of every window, over the pixels that count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from medkd_fast.backend import choose, kernel, shapes_of
from medkd_fast.ops import common
from medkd_fast.ops.relation import pixel_mask
from medkd_fast.ops.window import window_of, windows_along
from medkd_fast.reference.average_pool import average_pool as reference
from medkd_fast.reference.common import arithmetic


class AveragePool(NamedTuple):
    """What `average_pool` returns. `number` are whole numbers, without gradient."""

    pooled: torch.Tensor
    number: torch.Tensor


def average_pool(x: torch.Tensor, window: int | Sequence[int], *, mask: torch.Tensor | None = None) -> AveragePool:
    """The mean of every window; windows lie side by side, and the last of an axis is cut off at the border.

    `torch.nn.functional.avg_pool2d(x, window, ceil_mode=True, count_include_pad=False)`, and its kin, with a mask.

    Args:
        x: features [B, C, *S], one to three spatial dimensions: float32, bfloat16, float16 or float64, in any memory format.
        window: pixels along every axis, or along each; one longer than its axis is cut to it.
        mask: [B, *S] or [B, 1, *S], booleans or integers: pixels where it is False or 0 are left out, whatever they hold.

    Returns:
        AveragePool(pooled, number): pooled [B, C, *P], P = ceil(S / window), float32 (float64 for float64 inputs), 0 where no
        pixel of a window counts; number [B, *P], int32, of the pixels that do.

    Raises:
        ValueError: shapes or devices that do not fit, or a window that is not there.
        TypeError: a dtype that does not fit.

    >>> import torch
    >>> x = torch.tensor([1.0, 4.0, 2.0, 3.0, 5.0]).reshape(1, 1, 5)
    >>> average_pool(x, 2).pooled
    tensor([[[2.5000, 2.5000, 5.0000]]])
    >>> average_pool(x, 2, mask=torch.tensor([[1, 0, 1, 1, 0]]))
    AveragePool(pooled=tensor([[[1.0000, 2.5000, 0.0000]]]), number=tensor([[1, 2, 0]], dtype=torch.int32))
    """
    steps = window_of(x, window)
    mask = pixel_mask(mask, x)
    backend = choose("average_pool", x.device.type, x.numel())
    if backend == "reference":
        return AveragePool(*common.plainly(reference, x, mask, steps))
    if common.wants_gradient(x):
        return AveragePool(*common.apply(AveragePoolFunction, x, mask, backend, steps))
    return AveragePool(*kernel("average_pool", backend)(x, mask, steps))


class AveragePoolFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, mask: torch.Tensor | None, backend: str, window: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pooled, number = kernel("average_pool", backend)(x, mask, window)
        ctx.save_for_backward(x, mask, number)
        ctx.backend, ctx.window = backend, window
        ctx.mark_non_differentiable(number)
        return pooled, number

    @staticmethod
    def backward(ctx: Any, v_pooled: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        x, *state = ctx.saved_tensors  # once: a checkpoint gives them no second time
        gradient = kernel("average_pool_backward", ctx.backend)(x, *state, v_pooled, ctx.window)
        return common.first_order(x, gradient, "average_pool"), None, None, None


@shapes_of("average_pool")
def _fake(x: torch.Tensor, mask: torch.Tensor | None, window: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    size = windows_along(x, window)
    number = x.new_empty((x.shape[0], *size), dtype=torch.int32)
    return x.new_empty((*x.shape[:2], *size), dtype=arithmetic(x, x)), number


@shapes_of("average_pool_backward")
def _fake_backward(
    x: torch.Tensor, mask: torch.Tensor | None, number: torch.Tensor, upstream: torch.Tensor, window: list[int]
) -> torch.Tensor:
    return torch.empty_like(x)
