"""spatial_kl: the KL divergence between two networks' distributions over the pixels, channel by channel."""

from __future__ import annotations

from typing import Any

import torch

from medkd_fast.backend import choose, kernel, shapes_of
from medkd_fast.ops import common
from medkd_fast.ops.channel_relation import check_channels
from medkd_fast.ops.relation import check_sizes, pixel_mask
from medkd_fast.reference.common import arithmetic
from medkd_fast.reference.spatial_kl import spatial_kl as reference


def spatial_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    temperature: float = 4.0,
    mask: torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """KL(softmax(teacher / T) ‖ softmax(student / T)) over the pixels of every channel of every image, times T².

    (Shu et al., Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021, equation 4. The authors' code, too, divides
    by images and channels.) What matters is where in the image a channel is active, not how strongly.

    Args:
        student: logits or features [B, C, *S]: float32, bfloat16, float16 or float64, in any memory format; gradients
            flow to it alone.
        teacher: [B, C, *S]; may have another dtype.
        temperature: divides both.
        mask: [B, *S] or [B, 1, *S], booleans or integers: pixels where it is False or 0 are left out of the softmax.
        reduction: "mean" over the channels of all images that have a valid pixel, "sum", or "none": [B, C].

    Returns:
        The loss, float32 (float64 for float64 inputs). An image without a valid pixel: 0; all of them: 0 with gradient
        0.

    Raises:
        ValueError: shapes or devices that do not fit, or a teacher that requires grad.
        TypeError: a dtype that does not fit.

    >>> import torch
    >>> student, teacher = torch.zeros(1, 1, 1, 2), torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2)
    >>> print(f"{spatial_kl(student, teacher, temperature=1.0).item():.4f}")
    0.1109
    """
    common.check_pair(student, teacher)
    common.check_temperature(temperature)
    common.check_choice("reduction", reduction, common.REDUCTIONS)
    check_sizes(student, teacher)
    check_channels(student, teacher)
    mask = pixel_mask(mask, student)
    settings = (float(temperature), reduction)
    backend = choose("spatial_kl", student.device.type, student.numel())
    if backend == "reference":
        return common.plainly(reference, student, teacher, mask, *settings)
    if common.wants_gradient(student):
        return common.apply(SpatialKL, student, teacher, mask, backend, *settings)
    return kernel("spatial_kl", backend)(student, teacher, mask, *settings)[0]


class SpatialKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        mask: torch.Tensor | None,
        backend: str,
        temperature: float,
        reduction: str,
    ) -> torch.Tensor:
        loss, rows = kernel("spatial_kl", backend)(student, teacher, mask, temperature, reduction)
        ctx.save_for_backward(student, teacher, mask, rows)
        ctx.backend, ctx.temperature = backend, temperature
        return loss

    @staticmethod
    def backward(ctx: Any, v_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        student, *state = ctx.saved_tensors  # once: a checkpoint gives them no second time
        gradient = kernel("spatial_kl_backward", ctx.backend)(student, *state, v_loss, ctx.temperature)
        return common.first_order(student, gradient, "spatial_kl"), None, None, None, None, None


@shapes_of("spatial_kl")
def _fake(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, temperature: float, reduction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    size = student.shape[:2] if reduction == "none" else ()
    loss = student.new_empty(size, dtype=arithmetic(student, teacher))
    return loss, loss.new_empty((*student.shape[:2], 4))


@shapes_of("spatial_kl_backward")
def _fake_backward(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    rows: torch.Tensor,
    upstream: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    return torch.empty_like(student)
