"""attention_map: where in the image the energy of a feature lies."""

from __future__ import annotations

from typing import Any

import torch

from medkd_fast.backend import choose, kernel, shapes_of
from medkd_fast.ops import common
from medkd_fast.ops.relation import pixel_mask
from medkd_fast.reference.attention_map import attention_map as reference
from medkd_fast.reference.common import arithmetic


def attention_map(x: torch.Tensor, *, power: float = 2.0, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Sum over channels of |x|^power, divided by its L2 norm over the pixels of the image.

    (Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017, section 3.1. Whether channels are summed or averaged
    does not matter: the norm takes it out.)

    Args:
        x: features [B, C, *S]: float32, bfloat16, float16 or float64, in any memory format.
        power: at least 1.
        mask: [B, *S] or [B, 1, *S], booleans or integers: where it is False or 0 the map is 0, and the norm is of the others.

    Returns:
        The map [B, *S], float32 (float64 for float64 inputs). An image whose features are all 0 has the map 0, and gradient 0.

    Raises:
        ValueError: shapes or devices that do not fit, or a power below 1.
        TypeError: a dtype that does not fit.

    >>> import torch
    >>> attention_map(torch.tensor([3.0, 0.0, 4.0, 0.0]).reshape(1, 2, 1, 2), power=1.0)
    tensor([[[1., 0.]]])
    """
    common.check_features("x", x)
    common.check_power("power", power)
    mask = pixel_mask(mask, x)
    backend = choose("attention_map", x.device.type, x.numel())
    if backend == "reference":
        return common.plainly(reference, x, mask, float(power))
    if common.wants_gradient(x):
        return common.apply(AttentionMap, x, mask, backend, float(power))
    return kernel("attention_map", backend)(x, mask, float(power))[0]


class AttentionMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mask: torch.Tensor | None, backend: str, power: float) -> torch.Tensor:
        result, norms = kernel("attention_map", backend)(x, mask, power)
        ctx.save_for_backward(x, mask, result, norms)
        ctx.backend, ctx.power = backend, power
        return result

    @staticmethod
    def backward(ctx: Any, v_map: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *state = ctx.saved_tensors  # once: a checkpoint gives them no second time
        gradient = kernel("attention_map_backward", ctx.backend)(x, *state, v_map, ctx.power)
        return common.first_order(x, gradient, "attention_map"), None, None, None


@shapes_of("attention_map")
def _fake(x: torch.Tensor, mask: torch.Tensor | None, power: float) -> tuple[torch.Tensor, torch.Tensor]:
    result = x.new_empty((x.shape[0], *x.shape[2:]), dtype=arithmetic(x, x))
    return result, x.new_empty(x.shape[0], dtype=torch.float64)


@shapes_of("attention_map_backward")
def _fake_backward(
    x: torch.Tensor,
    mask: torch.Tensor | None,
    result: torch.Tensor,
    norms: torch.Tensor,
    upstream: torch.Tensor,
    power: float,
) -> torch.Tensor:
    return torch.empty_like(x)
