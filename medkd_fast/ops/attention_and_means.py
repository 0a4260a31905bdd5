"""attention_and_means: where the energy of a feature lies, and the mean feature of every class."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from medkd_fast.backend import kernel, shapes_of
from medkd_fast.ops import common
from medkd_fast.ops.class_means import checked
from medkd_fast.reference.attention_and_means import attention_and_means as reference
from medkd_fast.reference.common import arithmetic


class AttentionAndMeans(NamedTuple):
    """What `attention_and_means` returns. `counts` are whole numbers, without gradient."""

    map: torch.Tensor
    means: torch.Tensor
    counts: torch.Tensor


def attention_and_means(
    x: torch.Tensor, target: torch.Tensor, *, num_classes: int, power: float = 2.0, ignore_index: int = -100
) -> AttentionAndMeans:
    """What `attention_map` and `class_means` return for the same features, and one gradient for both.

    (The importance maps and the regions of Qin et al., Efficient Medical Image Segmentation Based on Knowledge Distillation, TMI
    2021, are of the same layers.) The gradient of the features is made in one pass; of two operators each would make one, and
    autograd add them up.

    Args:
        x: features [B, C, *S]: float32, bfloat16, float16 or float64, in any memory format.
        target: labels [B, *S] or [B, 1, *S] of any integer type, from 0 to num_classes - 1.
        num_classes: K.
        power: of the map, at least 1.
        ignore_index: pixels with this label have 0 in the map, and belong to no class, whatever their features are.

    Returns:
        AttentionAndMeans(map, means, counts): map [B, *S] and means [B, K, C], float32 (float64 for float64 inputs); counts
        [B, K], int64.

    Raises:
        ValueError: shapes or devices that do not fit, or a power below 1.
        RuntimeError, or ValueError from plain PyTorch: a label outside. On a GPU, where looking would synchronise, means are
            no numbers instead.
        TypeError: a dtype that does not fit.

    >>> import torch
    >>> x = torch.tensor([3.0, 0.0, 4.0, 0.0]).reshape(1, 2, 1, 2)
    >>> attention_and_means(x, torch.tensor([[[0, 0]]]), num_classes=1, power=1.0)
    AttentionAndMeans(map=tensor([[[1., 0.]]]), means=tensor([[[1.5000, 2.0000]]]), counts=tensor([[2]]))
    """
    common.check_power("power", power)
    target, backend = checked("attention_and_means", x, target, num_classes, ignore_index)
    settings = (int(num_classes), float(power), int(ignore_index))
    if backend == "reference":
        return AttentionAndMeans(*common.plainly(reference, x, target, *settings))
    if common.wants_gradient(x):
        return AttentionAndMeans(*AttentionAndMeansFunction.apply(x, target, backend, *settings))
    result, _, means, counts = kernel("attention_and_means", backend)(x, target, *settings)
    return AttentionAndMeans(result, means, counts)


class AttentionAndMeansFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, target: torch.Tensor, backend: str, num_classes: int, power: float, ignore_index: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        result, norms, means, counts = kernel("attention_and_means", backend)(
            x, target, num_classes, power, ignore_index
        )
        ctx.save_for_backward(x, target, result, norms, counts)
        ctx.backend, ctx.settings = backend, (power, ignore_index)
        ctx.mark_non_differentiable(counts)
        return result, means, counts

    @staticmethod
    def backward(ctx: Any, v_map: torch.Tensor, v_means: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        function = kernel("attention_and_means_backward", ctx.backend)
        gradient = function(*ctx.saved_tensors, v_map, v_means, *ctx.settings)
        x = ctx.saved_tensors[0]
        return common.first_order(x, gradient, "attention_and_means"), None, None, None, None, None


@shapes_of("attention_and_means")
def _fake(
    x: torch.Tensor, target: torch.Tensor, num_classes: int, power: float, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype, counts = arithmetic(x, x), x.new_empty((x.shape[0], num_classes), dtype=torch.int64)
    result = x.new_empty((x.shape[0], *x.shape[2:]), dtype=dtype)
    norms = x.new_empty(x.shape[0], dtype=torch.float64)
    return result, norms, x.new_empty((*counts.shape, x.shape[1]), dtype=dtype), counts


@shapes_of("attention_and_means_backward")
def _fake_backward(
    x: torch.Tensor,
    target: torch.Tensor,
    map: torch.Tensor,
    norms: torch.Tensor,
    counts: torch.Tensor,
    of_map: torch.Tensor,
    of_means: torch.Tensor,
    power: float,
    ignore_index: int,
) -> torch.Tensor:
    return torch.empty_like(x)
