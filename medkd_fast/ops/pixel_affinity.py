"""pixel_affinity: the matrix of relations between the pixels of an image, held in memory."""

from __future__ import annotations

import math
from typing import Any

import torch

from medkd_fast.backend import choose, kernel, shapes_of
from medkd_fast.ops import common
from medkd_fast.ops.pixel_relation import RELATIONS
from medkd_fast.reference.common import arithmetic
from medkd_fast.reference.pixel_affinity import pixel_affinity as reference


def pixel_affinity(x: torch.Tensor, *, relation: str = "cosine") -> torch.Tensor:
    """The N×N relations between the pixels of every image: for small grids and for pictures.

    Entry (i, j) is the product of the rows of the pixels i and j, as `pixel_relation` compares them between two networks
    without holding the matrix. 64×64 pixels take 64 MB an image, 128×128 take 1 GB.

    Args:
        x: features or logits [B, C, *S]: float32, bfloat16, float16 or float64, in any memory format. Gradients flow to it.
        relation: a pixel's channels divided by max(their norm, 1e-12) ("cosine"), less their mean and then the same
            ("pearson"), or divided by the square root of C ("gram").

    Returns:
        The relation [B, N, N], N the product of *S, pixels in the order of `x.flatten(2)`; float32 (float64 for float64 inputs).

    Raises:
        ValueError: a shape or relation that does not fit.
        TypeError: a dtype that does not fit.

    >>> import torch
    >>> pixels = torch.tensor([[3.0, 1.0], [0.0, 1.0]]).reshape(1, 2, 1, 2)  # 45 degrees apart
    >>> pixel_affinity(pixels)
    tensor([[[1.0000, 0.7071],
             [0.7071, 1.0000]]])
    """
    common.check_features("x", x)
    common.check_choice("relation", relation, RELATIONS)
    if x.shape[1] == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, want at least one channel")
    backend = choose("pixel_affinity", x.device.type, x.numel(), math.prod(x.shape[2:]))
    if backend == "reference":
        return common.plainly(reference, x, relation)
    if common.wants_gradient(x):
        return common.apply(PixelAffinity, x, backend, relation)
    return kernel("pixel_affinity", backend)(x, relation)


class PixelAffinity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, backend: str, relation: str) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.backend, ctx.relation = backend, relation
        return kernel("pixel_affinity", backend)(x, relation)

    @staticmethod
    def backward(ctx: Any, v_affinity: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        gradient = kernel("pixel_affinity_backward", ctx.backend)(x, v_affinity.contiguous(), ctx.relation)
        return common.first_order(x, gradient, "pixel_affinity"), None, None


@shapes_of("pixel_affinity")
def _fake(x: torch.Tensor, relation: str) -> torch.Tensor:
    pixels = math.prod(x.shape[2:])
    return x.new_empty((x.shape[0], pixels, pixels), dtype=arithmetic(x, x))


@shapes_of("pixel_affinity_backward")
def _fake_backward(x: torch.Tensor, upstream: torch.Tensor, relation: str) -> torch.Tensor:
    return torch.empty_like(x)
