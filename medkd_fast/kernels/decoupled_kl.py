"""decoupled_kl in Triton: the frame is in pixel_frame.py, the mathematics in divergence.py."""

from torch import Tensor

from medkd_fast.kernels.common import operator
from medkd_fast.kernels.pixel_frame import Settings
from medkd_fast.kernels.pixel_loss import pixel_loss


@operator()
def decoupled_kl(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    weight: Tensor | None,
    target_weight: float,
    nontarget_weight: float,
    temperature: float,
    ignore_index: int,
    reduction: str,
    need_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    settings = Settings(True, target_weight, nontarget_weight, temperature, ignore_index, reduction, need_gradient)
    loss, target_term, nontarget_term, scale, gradient = pixel_loss(student, teacher, target, weight, settings)
    return loss, target_term, nontarget_term, scale, gradient
