"""class_kl in Triton: the frame is in pixel_frame.py, the mathematics in divergence.py."""

from torch import Tensor

from medkd_fast.kernels.common import operator
from medkd_fast.kernels.pixel_frame import Settings
from medkd_fast.kernels.pixel_loss import pixel_loss


@operator()
def class_kl(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    temperature: float,
    ignore_index: int,
    reduction: str,
    need_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    settings = Settings(False, 0.0, 1.0, temperature, ignore_index, reduction, need_gradient)
    loss, _, _, scale, gradient = pixel_loss(student, teacher, target, weight, settings)
    return loss, scale, gradient
