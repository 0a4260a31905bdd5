"""class_similarity: how close every pixel's feature is to the mean feature of its class."""

from __future__ import annotations

from typing import Any

import torch

from medkd_fast.backend import kernel, shapes_of
from medkd_fast.ops import common
from medkd_fast.ops.class_means import checked
from medkd_fast.reference.class_similarity import class_similarity as reference
from medkd_fast.reference.common import arithmetic


def class_similarity(
    x: torch.Tensor, target: torch.Tensor, *, num_classes: int, ignore_index: int = -100
) -> torch.Tensor:
    """Cosine between the feature of every pixel and the prototype of its class in the image.

    The intra-class feature variation map of Wang et al., ECCV 2020. The prototype of a class is the sum of its pixels' features over
    (their number + 1e-6), as in the authors' code; norms are at least 1e-8.

    Args:
        x: features [B, C, *S]: float32, bfloat16, float16 or float64, in any memory format. The gradient goes through the
            prototypes too.
        target: labels [B, *S] or [B, 1, *S] of any integer type, from 0 to num_classes - 1.
        num_classes: K.
        ignore_index: pixels with this label are in no prototype, and 0 in the map.

    Returns:
        The map [B, *S], float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes or devices that do not fit.
        RuntimeError, or ValueError from plain PyTorch: a label outside. On a GPU, where looking would synchronise, the map is
            no number in some places instead.
        TypeError: a dtype that does not fit.

    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0, 5.0], [0.0, 1.0, 5.0]]).reshape(1, 2, 1, 3)
    >>> class_similarity(x, torch.tensor([0, 0, 1]).reshape(1, 1, 3), num_classes=2)
    tensor([[[0.7071, 0.7071, 1.0000]]])
    """
    target, backend = checked("class_similarity", x, target, num_classes, ignore_index)
    settings = (int(num_classes), int(ignore_index))
    if backend == "reference":
        return common.plainly(reference, x, target, *settings)
    if common.wants_gradient(x):
        return common.apply(ClassSimilarity, x, target, backend, *settings)
    return kernel("class_similarity", backend)(x, target, *settings)[0]


class ClassSimilarity(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, target: torch.Tensor, backend: str, num_classes: int, ignore_index: int
    ) -> torch.Tensor:
        similarity, *rest = kernel("class_similarity", backend)(x, target, num_classes, ignore_index)
        ctx.save_for_backward(x, target, similarity, *rest)
        ctx.backend, ctx.ignore_index = backend, ignore_index
        return similarity

    @staticmethod
    def backward(ctx: Any, v_similarity: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call = kernel("class_similarity_backward", ctx.backend)
        x, *state = ctx.saved_tensors  # once: a checkpoint gives them no second time
        gradient = call(x, *state, v_similarity, ctx.ignore_index)
        return common.first_order(x, gradient, "class_similarity"), None, None, None, None


@shapes_of("class_similarity")
def _fake(x: torch.Tensor, target: torch.Tensor, num_classes: int, ignore_index: int) -> tuple[torch.Tensor, ...]:
    similarity = x.new_empty(target.shape, dtype=arithmetic(x, x))
    counts = x.new_empty((x.shape[0], num_classes), dtype=torch.int64)
    means = similarity.new_empty((*counts.shape, x.shape[1]))
    return similarity, means, counts, similarity.new_empty(target.shape)


@shapes_of("class_similarity_backward")
def _fake_backward(
    x: torch.Tensor,
    target: torch.Tensor,
    similarity: torch.Tensor,
    means: torch.Tensor,
    counts: torch.Tensor,
    inverse: torch.Tensor,
    upstream: torch.Tensor,
    ignore_index: int,
) -> torch.Tensor:
    return torch.empty_like(x)
