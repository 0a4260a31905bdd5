"""What the operators class_kl and decoupled_kl call."""

from __future__ import annotations

from torch import Tensor

from medkd_fast.kernels.equal_size import equal_size
from medkd_fast.kernels.pixel_frame import Call, Settings
from medkd_fast.kernels.upsampled import upsampled


def pixel_loss(
    student: Tensor, teacher: Tensor, target: Tensor | None, weight: Tensor | None, settings: Settings
) -> tuple[Tensor, ...]:
    """Loss, target part, non-target part, scale and gradient, as decoupled_kl returns them."""
    call = Call(student, teacher, target, weight, settings)
    if call.empty:
        return call.outputs
    if student.shape[2:] == teacher.shape[2:]:
        return equal_size(call)
    return upsampled(call, student.shape[2:], teacher.shape[2:])
