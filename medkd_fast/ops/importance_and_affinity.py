"""importance_and_affinity: where the energy of two layers lies, and how the mean features of their classes relate."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from medkd_fast.backend import kernel, shapes_of
from medkd_fast.ops import common
from medkd_fast.ops.class_means import checked
from medkd_fast.ops.relation import check_sizes
from medkd_fast.reference.common import arithmetic
from medkd_fast.reference.importance_and_affinity import importance_and_affinity as reference


class ImportanceAndAffinity(NamedTuple):
    """What `importance_and_affinity` returns, a number each."""

    importance: torch.Tensor
    affinity: torch.Tensor


def importance_and_affinity(
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor,
    *,
    num_classes: int,
    power: float = 4.0,
    ignore_index: int = -100,
) -> ImportanceAndAffinity:
    """How far the importance maps and the region affinities of two layers are apart.

    (Qin et al., Efficient Medical Image Segmentation Based on Knowledge Distillation, TMI 2021.) Both are made in one reading of
    either layer, and the gradient of the student's in one pass.

    * importance: the squared difference of what `attention_map` gives for the two, summed over the pixels, mean over the images
      with a pixel that counts.
    * affinity: the squared difference of the cosines between what `class_means` gives for every two classes, mean over the pairs of
      classes that are both in the image, then over the images with such a pair.

    Args:
        student: features [B, C, *S]: float32, bfloat16, float16 or float64, in any memory format; gradients flow to it alone.
        teacher: [B, other C, *S]; may have another dtype.
        target: labels [B, *S] or [B, 1, *S] of any integer type, from 0 to num_classes - 1.
        num_classes: K.
        power: of the maps, at least 1.
        ignore_index: pixels with this label are 0 in the maps, and belong to no class, whatever their features are.

    Returns:
        ImportanceAndAffinity(importance, affinity), [] each, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes or devices that do not fit, a power below 1, or a teacher that requires grad.
        RuntimeError, or ValueError from plain PyTorch: a label outside. On a GPU, where looking would synchronise, the results
            are no numbers instead.
        TypeError: a dtype that does not fit.

    >>> import torch
    >>> student = torch.tensor([[3.0, 3.0], [0.0, 0.0]]).reshape(1, 2, 1, 2)  # two classes alike
    >>> teacher = torch.tensor([[3.0, 0.0], [0.0, 3.0]]).reshape(1, 2, 1, 2)  # two classes apart
    >>> importance_and_affinity(student, teacher, torch.tensor([[[0, 1]]]), num_classes=2)
    ImportanceAndAffinity(importance=tensor(0.), affinity=tensor(1.))
    """
    common.check_power("power", power)
    common.check_pair(student, teacher)
    check_sizes(student, teacher)
    target, backend = checked("importance_and_affinity", student, target, num_classes, ignore_index)
    settings = (int(num_classes), float(power), int(ignore_index))
    if torch.float64 in (student.dtype, teacher.dtype):
        student, teacher = student.double(), teacher.double()
    if backend == "reference":
        return ImportanceAndAffinity(*common.plainly(reference, student, teacher, target, *settings))
    if common.wants_gradient(student):
        return ImportanceAndAffinity(
            *common.apply(ImportanceAndAffinityFunction, student, teacher, target, backend, *settings)
        )
    return ImportanceAndAffinity(*kernel("importance_and_affinity", backend)(student, teacher, target, *settings)[:2])


class ImportanceAndAffinityFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        target: torch.Tensor,
        backend: str,
        num_classes: int,
        power: float,
        ignore_index: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        importance, affinity, *state = kernel("importance_and_affinity", backend)(
            student, teacher, target, num_classes, power, ignore_index
        )
        ctx.save_for_backward(student, target, *state)
        ctx.backend, ctx.settings = backend, (power, ignore_index)
        return importance, affinity

    @staticmethod
    def backward(ctx: Any, v_importance: torch.Tensor, v_affinity: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        student, *state = ctx.saved_tensors
        function = kernel("importance_and_affinity_backward", ctx.backend)
        gradient = function(student, *state, v_importance, v_affinity, *ctx.settings)
        return common.first_order(student, gradient, "importance_and_affinity"), *(None,) * 6


@shapes_of("importance_and_affinity")
def _fake(
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor,
    num_classes: int,
    power: float,
    ignore_index: int,
) -> tuple[torch.Tensor, ...]:
    importance, affinity = (student.new_empty((), dtype=arithmetic(student, teacher)) for _ in range(2))
    map, of_map = (importance.new_empty((student.shape[0], *student.shape[2:])) for _ in range(2))
    norms = student.new_empty(student.shape[0], dtype=torch.float64)
    counts = student.new_empty((student.shape[0], num_classes), dtype=torch.int64)
    return importance, affinity, map, norms, counts, of_map, importance.new_empty((*counts.shape, student.shape[1]))


@shapes_of("importance_and_affinity_backward")
def _fake_backward(
    student: torch.Tensor,
    target: torch.Tensor,
    map: torch.Tensor,
    norms: torch.Tensor,
    counts: torch.Tensor,
    of_map: torch.Tensor,
    of_means: torch.Tensor,
    v_importance: torch.Tensor,
    v_affinity: torch.Tensor,
    power: float,
    ignore_index: int,
) -> torch.Tensor:
    return torch.empty_like(student)
