"""class_pearson: how class probabilities correlate, over the classes of a pixel and over the pixels of a class."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from medkd_fast.backend import choose, kernel, shapes_of
from medkd_fast.ops import common
from medkd_fast.ops.decoupled_kl import check_classes
from medkd_fast.reference.class_pearson import class_pearson as reference
from medkd_fast.reference.common import arithmetic


class ClassPearson(NamedTuple):
    """What `class_pearson` returns. `inter` and `intra` are detached, for logs."""

    loss: torch.Tensor
    inter: torch.Tensor
    intra: torch.Tensor


def class_pearson(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    temperature: float = 1.0,
    target: torch.Tensor | None = None,
    ignore_index: int = -100,
    process_group: Any = None,
) -> ClassPearson:
    """inter_weight · inter + intra_weight · intra, times temperature²: one minus Pearson correlations of probabilities.

    inter: over the classes of a pixel, mean over valid pixels. intra: over all valid pixels of the batch, of one class, mean
    over classes. (Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022, equations 8 to 10, with every
    pixel in the place of an image.) Denominators are products of norms plus 1e-8.

    Args:
        student: logits [B, C, *S]: float32, bfloat16, float16 or float64, in any memory format; gradients flow to it
            alone.
        teacher: logits [B, C, *S], C >= 2; may have another dtype.
        temperature: divides both logits.
        target: labels [B, *S] or [B, 1, *S]; pixels with `ignore_index` are left out.
        process_group: sums are taken over the batches of this group of processes, for example
            `torch.distributed.group.WORLD`; every process must call. With DistributedDataParallel, which takes the mean of
            gradients, they are then those of one process with all the images. None: over this process's batch alone.

    Returns:
        ClassPearson(loss, inter, intra), float32 (float64 for float64 inputs). The parts carry neither temperature² nor the
        weights. No valid pixel: 0.

    Raises:
        ValueError: shapes or devices that do not fit, C < 2, or a teacher that requires grad.
        TypeError: a dtype that does not fit.

    >>> import torch
    >>> student = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).T.reshape(1, 3, 1, 2)
    >>> loss, inter, intra = class_pearson(student, 2 * student)
    >>> print(f"{loss.item():.4f} = {inter.item():.4f} + {intra.item():.4f}")
    0.0000 = 0.0000 + 0.0000
    """
    common.check_pair(student, teacher)
    common.check_temperature(temperature)
    check_classes(student, teacher)
    if student.shape[2:] != teacher.shape[2:]:
        raise ValueError(
            f"student and teacher: got spatial shapes {tuple(student.shape[2:])} and {tuple(teacher.shape[2:])}, want equal "
            "ones; resize one, for example with torch.nn.functional.interpolate"
        )
    if target is not None:
        target = common.labels(target, teacher)
    weights = (float(inter_weight), float(intra_weight))
    settings = (float(temperature), int(ignore_index))
    backend = choose("class_pearson", student.device.type, teacher.numel())
    if backend == "reference":
        outputs = common.plainly(reference, student, teacher, target, *weights, *settings, process_group)
        return ClassPearson(outputs[0], outputs[1].detach(), outputs[2].detach())
    common.check_derivatives(student)
    return ClassPearson(
        *common.apply(ClassPearsonLoss, student, teacher, target, backend, weights, settings, process_group)
    )


class ClassPearsonLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        target: torch.Tensor | None,
        backend: str,
        weights: tuple[float, float],
        settings: tuple[float, int],
        process_group: Any,
    ) -> tuple[torch.Tensor, ...]:
        sums = kernel("class_pearson", backend)(student, teacher, target, *settings)
        ctx.processes = 1
        if process_group is not None:
            torch.distributed.all_reduce(sums, group=process_group)
            ctx.processes = torch.distributed.get_world_size(process_group)
        single = arithmetic(student, teacher) == torch.float32
        loss, inter, intra, coefficients = kernel("class_pearson_terms", backend)(sums, *weights, settings[0], single)
        ctx.save_for_backward(student, teacher, target, coefficients)
        ctx.backend, ctx.settings = backend, settings
        ctx.mark_non_differentiable(inter, intra)
        return loss, inter, intra

    @staticmethod
    def backward(ctx: Any, v_loss: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # the loss of every process hangs on this one's pixels
        upstream = v_loss * ctx.processes
        student, *state = ctx.saved_tensors  # once: a checkpoint gives them no second time
        gradient = kernel("class_pearson_backward", ctx.backend)(student, *state, upstream, *ctx.settings)
        return common.first_order(student, gradient, "class_pearson"), None, None, None, None, None, None


@shapes_of("class_pearson")
def _fake(
    student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor | None, temperature: float, ignore_index: int
) -> torch.Tensor:
    return student.new_empty(2 + 5 * student.shape[1], dtype=torch.float64)


@shapes_of("class_pearson_terms")
def _fake_terms(
    sums: torch.Tensor, inter_weight: float, intra_weight: float, temperature: float, single: bool
) -> tuple[torch.Tensor, ...]:
    terms = [sums.new_empty((), dtype=torch.float32 if single else torch.float64) for _ in range(3)]
    return (*terms, sums.new_empty(1 + (sums.shape[0] - 2) // 5 * 4))


@shapes_of("class_pearson_backward")
def _fake_backward(
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor | None,
    coefficients: torch.Tensor,
    upstream: torch.Tensor,
    temperature: float,
    ignore_index: int,
) -> torch.Tensor:
    return torch.empty_like(student)
