"""PKD, General Distillation Framework for Object Detectors via Pearson Correlation Coefficient: Cao, Zhang, Gao and others, NeurIPS 2022."""

from __future__ import annotations

from typing import Any

import torch

from medkd_fast import functional
from medkd_fast.losses import common, settings


class PKDLoss(common.AdaptedLoss):
    """Half the mean squared difference of features that are standardised channel by channel.

    Every channel minus its mean, over its standard deviation + 1e-6, both over all n pixels of the batch: 1 minus the Pearson
    correlation of the channels, times (n − 1) / n, up to that 1e-6.

    Other codes: equal to the authors' and to mmrazor's `PKDLoss`, the standard deviation with n − 1 as theirs. A student larger than
    the teacher they interpolate, which is the average only at twice the teacher's size.

    Weight: 6 for two-stage detectors, 10 for one-stage ones, on the neck's features.

    Cost: one pass over student and teacher, another backward; memory: the gradient.

    Args:
        student_channels, teacher_channels: where they differ, a 1×1 convolution on the student; train it along.
        ignore_index: with a target, pixels with this label count neither in the statistics nor in the mean.
        sync: under DDP, statistics over the pixels of all processes (of `process_group`, or all); the default are those of
            the process's own batch.

    A student of another spatial size is brought to the teacher's: linear upsampling, or averaging.

    >>> import torch
    >>> teacher = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 2, 2)
    >>> loss = PKDLoss()
    >>> print(f"{loss(5 * teacher + 1, teacher).item():.4f}, {loss(-teacher, teacher).item():.4f}")
    0.0000, 1.5000
    """

    def __init__(
        self,
        student_channels: int | None = None,
        teacher_channels: int | None = None,
        ignore_index: int = -100,
        sync: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        settings.check_whole("ignore_index", ignore_index)
        settings.check_flag("sync", sync)
        self.ignore_index = ignore_index
        self.sync = sync
        self.process_group = process_group
        self.adapter = self._adapter(student_channels, teacher_channels)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        """student, teacher: features [B, C, *S]; target: labels, of any size."""
        student = common.adapted(self.adapter, common.to_teacher_size(student, teacher), teacher, self)
        mask = common.counted(target, teacher, self.ignore_index)
        group = None
        if self.sync and torch.distributed.is_initialized():
            group = self.process_group or torch.distributed.group.WORLD
        loss = 0.5 * functional.standardised_mse(student, teacher, mask=mask, process_group=group)
        self.parts = {"correlation": loss.detach()}
        return loss
