"""class_kl: the KL divergence between the class distributions of teacher and student at every pixel."""

from __future__ import annotations

from typing import Any

import torch

from medkd_fast.backend import choose, shapes_of
from medkd_fast.ops import common
from medkd_fast.ops.decoupled_kl import check_logits, pixel_weight
from medkd_fast.ops.pixel_loss import PixelLoss, call, fake_outputs, holding_sums, upsampled_in_registers
from medkd_fast.reference.class_kl import class_kl as reference


def class_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    temperature: float = 1.0,
    target: torch.Tensor | None = None,
    ignore_index: int = -100,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """KL(softmax(teacher / T) ‖ softmax(student / T)) over the classes of every pixel, times T².

    Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, at every pixel. The mean is over valid
    pixels: `torch.nn.KLDivLoss("mean")` on [B, C, *S] is this divided by C·T², `"batchmean"` this times pixels / T².

    Args:
        student: logits [B, C, *S], or [B, C, *smaller]: upsampled inside the kernel (linear, align_corners=False).
            float32, bfloat16, float16 or float64, in any memory format; gradients flow to it alone.
        teacher: logits [B, C, *S], C >= 2; may have another dtype.
        temperature: divides both logits.
        target: labels [B, *S] or [B, 1, *S]; only says, with `ignore_index`, which pixels to leave out.
        weight: [B, *S], weight of every pixel; weight 0 leaves a pixel out.
        reduction: "mean" over valid pixels (weighted), "sum", or "none": [B, *S].

    Returns:
        The loss, float32 (float64 for float64 inputs). No valid pixel: 0.

    Raises:
        ValueError: shapes or devices that do not fit, C < 2, or a teacher that requires grad.
        TypeError: a dtype that does not fit.

    >>> import torch
    >>> student = torch.zeros(1, 2, 1, 1, requires_grad=True)
    >>> teacher = torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1)
    >>> loss = class_kl(student, teacher)
    >>> loss.backward()
    >>> print(f"{loss.item():.4f}, {student.grad.flatten()[0].item():.4f}")
    0.1109, -0.2311
    """
    common.check_pair(student, teacher)
    common.check_temperature(temperature)
    common.check_choice("reduction", reduction, common.REDUCTIONS)
    check_logits(student, teacher)
    if target is not None:
        target = common.labels(target, teacher)
    weight = pixel_weight(weight, student, teacher)
    settings = (float(temperature), int(ignore_index))
    backend = choose(
        "class_kl", student.device.type, teacher.numel(), cuda_first=upsampled_in_registers(student, teacher)
    )
    if backend == "reference":
        return common.plainly(reference, student, teacher, target, weight, *settings, reduction)
    if common.wants_gradient(student):
        student = holding_sums(student, teacher)
        return common.apply(PixelLoss, student, teacher, target, weight, "class_kl", backend, settings, reduction)[0]
    return call("class_kl", backend, student, teacher, target, weight, *settings, reduction, False)[0]


@shapes_of("class_kl")
def _fake(
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor | None,
    weight: torch.Tensor | None,
    temperature: float,
    ignore_index: int,
    reduction: str,
    need_gradient: bool,
) -> Any:
    return fake_outputs(student, teacher, 1, reduction, need_gradient)
