"""class_means: the mean feature of every class, without a copy of the features for any of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from medkd_fast.backend import choose, kernel, shapes_of
from medkd_fast.ops import common
from medkd_fast.reference.class_means import class_means as reference
from medkd_fast.reference.common import arithmetic


class ClassMeans(NamedTuple):
    """What `class_means` returns. `counts` are whole numbers, without gradient."""

    means: torch.Tensor
    counts: torch.Tensor


def class_means(x: torch.Tensor, target: torch.Tensor, *, num_classes: int, ignore_index: int = -100) -> ClassMeans:
    """The mean feature of every class in every image, and the number of its pixels.

    (The prototypes of Wang et al., Intra-class Feature Variation Distillation, ECCV 2020, and the regions of Qin et al., EMKD, TMI
    2021.)

    Args:
        x: features [B, C, *S]: float32, bfloat16, float16 or float64, in any memory format.
        target: labels [B, *S] or [B, 1, *S] of any integer type, from 0 to num_classes - 1.
        num_classes: K.
        ignore_index: pixels with this label belong to no class, whatever their features are.

    Returns:
        ClassMeans(means, counts): means [B, K, C], float32 (float64 for float64 inputs), 0 where a class has no pixel; counts
        [B, K], int64.

    Raises:
        ValueError: shapes or devices that do not fit.
        RuntimeError, or ValueError from plain PyTorch: a label outside. On a GPU, where looking would synchronise, means are
            no numbers instead.
        TypeError: a dtype that does not fit.

    >>> import torch
    >>> x = torch.tensor([[1.0, 3.0, 7.0], [0.0, 2.0, 5.0]]).reshape(1, 2, 1, 3)
    >>> means, counts = class_means(x, torch.tensor([0, 0, -100]).reshape(1, 1, 3), num_classes=2)
    >>> means, counts
    (tensor([[[2., 1.],
             [0., 0.]]]), tensor([[2, 0]]))
    """
    target, backend = checked("class_means", x, target, num_classes, ignore_index)
    settings = (int(num_classes), int(ignore_index))
    if backend == "reference":
        return ClassMeans(*common.plainly(reference, x, target, *settings))
    if common.wants_gradient(x):
        return ClassMeans(*common.apply(ClassMeansFunction, x, target, backend, *settings))
    return ClassMeans(*kernel("class_means", backend)(x, target, *settings))


def checked(
    operator: str, x: torch.Tensor, target: torch.Tensor, num_classes: int, ignore_index: int
) -> tuple[torch.Tensor, str]:
    """The labels as contiguous [B, *S], and the backend. The loops of "cpp" look at the labels as they go."""
    common.check_features("x", x)
    if num_classes < 1:
        raise ValueError(f"num_classes: got {num_classes}, want at least 1")
    target = common.labels(target, x)
    backend = choose(operator, x.device.type, x.numel())
    if backend != "cpp":
        common.check_labels(target, num_classes, ignore_index)
    return target, backend


class ClassMeansFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, target: torch.Tensor, backend: str, num_classes: int, ignore_index: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        means, counts = kernel("class_means", backend)(x, target, num_classes, ignore_index)
        ctx.save_for_backward(x, target, counts)
        ctx.backend, ctx.ignore_index = backend, ignore_index
        ctx.mark_non_differentiable(counts)
        return means, counts

    @staticmethod
    def backward(ctx: Any, v_means: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        x, *state = ctx.saved_tensors  # once: a checkpoint gives them no second time
        gradient = kernel("class_means_backward", ctx.backend)(x, *state, v_means, ctx.ignore_index)
        return common.first_order(x, gradient, "class_means"), None, None, None, None


@shapes_of("class_means")
def _fake(
    x: torch.Tensor, target: torch.Tensor, num_classes: int, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    counts = x.new_empty((x.shape[0], num_classes), dtype=torch.int64)
    return x.new_empty((*counts.shape, x.shape[1]), dtype=arithmetic(x, x)), counts


@shapes_of("class_means_backward")
def _fake_backward(
    x: torch.Tensor, target: torch.Tensor, counts: torch.Tensor, upstream: torch.Tensor, ignore_index: int
) -> torch.Tensor:
    return torch.empty_like(x)
