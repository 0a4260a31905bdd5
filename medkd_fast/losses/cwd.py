"""Channel-wise Knowledge Distillation for Dense Prediction: Shu, Liu, Gao, Yan and Shen, ICCV 2021."""

from __future__ import annotations

import torch

from medkd_fast import functional
from medkd_fast.losses import common, settings


class CWDLoss(common.AdaptedLoss):
    """KL between the channels' softmaxes over the pixels, times T², mean over images and channels.

    Every channel of an image is a distribution over its pixels: softmax(x / T). T² / (N·C) · Σ KL(teacher ‖ student).

    Other codes: equal to the authors' and to mmrazor's `ChannelWiseDivergence`. `torch.nn.KLDivLoss("mean")` of the same
    distributions is this / (pixels · T²).

    Weight: 3 on logits, 50 on features.

    Cost: two passes over student and teacher, forward and backward; memory: the gradient.

    Args:
        temperature: divides both maps.
        ignore_index: with a target, pixels with this label leave the softmax.
        activation: "sigmoid" for binary and multi-label heads: the Bernoulli distribution of every pixel instead of the
            softmax over them: T² / (N·C) · Σ over pixels of their KL, which grows with the number of pixels. N·C are the
            channels with a valid pixel; with labels [N, C, *S] each channel has its own.
        student_channels, teacher_channels: where they differ, a 1×1 convolution on the student; train it along.

    A student of another spatial size is brought to the teacher's: linear upsampling, or averaging.

    >>> import torch
    >>> student, teacher = torch.zeros(1, 1, 1, 2), torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2)
    >>> print(f"{CWDLoss(temperature=1.0)(student, teacher).item():.4f}")
    0.1109
    """

    def __init__(
        self,
        temperature: float = 4.0,
        ignore_index: int = -100,
        activation: str = "softmax",
        student_channels: int | None = None,
        teacher_channels: int | None = None,
    ) -> None:
        super().__init__()
        settings.check_temperature(temperature)
        settings.check_whole("ignore_index", ignore_index)
        common.check_activation(activation)
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.activation = activation
        self.adapter = self._adapter(student_channels, teacher_channels)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        """student, teacher: logits or features [B, C, *S]; target: labels, of any size, for "sigmoid" also of every channel."""
        student = common.adapted(self.adapter, common.to_teacher_size(student, teacher), teacher, self)
        if self.activation == "softmax":
            mask = common.counted(target, teacher, self.ignore_index)
            loss = functional.spatial_kl(student, teacher, temperature=self.temperature, mask=mask)
        else:
            mask = common.counted_of_heads(target, teacher, self.ignore_index)
            loss = functional.class_kl(
                common.as_two_classes(student),
                common.as_two_classes(teacher),
                temperature=self.temperature,
                weight=None if mask is None else common.wide(mask),
                reduction="sum",
            )
            channels = student.shape[0] * student.shape[1]
            loss = loss / (max(channels, 1) if mask is None else mask.flatten(1).any(1).sum().clamp(min=1))
        self.parts = {"kl": loss.detach()}
        return loss
