"""FitNets, Hints for Thin Deep Nets: Romero, Ballas, Kahou, Chassang, Gatta and Bengio, ICLR 2015."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from medkd_fast.losses import common, settings
from medkd_fast.ops.common import savable


class FitNetLoss(common.AdaptedLoss):
    """Mean squared difference between the teacher's features and the student's through a 1×1 convolution.

    Other codes: the paper halves the sum over a map's entries; CIRKD's copy takes the mean, as this does.

    Weight: 100 in RepDistiller's scripts; it goes with the features' size.

    Cost: one pass over student and teacher and the backward in plain PyTorch; memory: the gradient and one map.

    Args:
        student_channels, teacher_channels: make the convolution, also when they are equal; train it along. Without them
            the features are compared as they are.
        ignore_index: with a target, pixels with this label do not count.

    A student of another spatial size is brought to the teacher's: linear upsampling, or averaging.

    >>> import torch
    >>> FitNetLoss()(torch.zeros(1, 2, 2, 2), 3 * torch.ones(1, 2, 2, 2))
    tensor(9.)
    """

    def __init__(
        self, student_channels: int | None = None, teacher_channels: int | None = None, ignore_index: int = -100
    ) -> None:
        super().__init__()
        settings.check_whole("ignore_index", ignore_index)
        self.ignore_index = ignore_index
        self.adapter = self._adapter(student_channels, teacher_channels)

    def _adapter(self, student_channels: int | None, teacher_channels: int | None) -> nn.Module | None:
        return common.make_adapter(student_channels, teacher_channels, even_if_equal=True)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        """student, teacher: features [B, C, *S]; target: labels, of any size."""
        student = common.adapted(self.adapter, common.to_teacher_size(student, teacher), teacher, self)
        mask = common.counted(target, teacher, self.ignore_index)
        s, t = common.wide(student), common.wide(teacher)
        if mask is None:
            loss = F.mse_loss(s, savable(t))
        else:
            # selected before the square, whose gradient would be no number where the features are none
            kept = torch.where(mask.unsqueeze(1), s - t, 0)
            loss = kept.square().sum() / (mask.sum() * teacher.shape[1]).clamp(min=1)
        self.parts = {"hint": loss.detach()}
        return loss
