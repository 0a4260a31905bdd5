"""PKD, General Distillation Framework for Object Detectors via Pearson Correlation Coefficient: Cao, Zhang, Gao and others, NeurIPS 2022."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from medkd_fast.losses import common


class PKDLoss(common.AdaptedLoss):
    """Half the mean squared difference of features that are standardised channel by channel.

    Every channel minus its mean, over its standard deviation + 1e-6, both over all pixels of the batch: 1 minus the Pearson
    correlation of the channels, up to that 1e-6.

    Other codes: equal to the authors' and to mmrazor's `PKDLoss`, the standard deviation with n − 1 as theirs.

    Weight: 6 for two-stage detectors, 10 for one-stage ones, on the neck's features.

    Cost: two passes over student and teacher and the backward in plain PyTorch; memory: the gradient and about three maps.

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
        self.ignore_index = ignore_index
        self.sync = sync
        self.process_group = process_group
        self.adapter = self._adapter(student_channels, teacher_channels)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        """student, teacher: features [B, C, *S]; target: labels, of any size."""
        student = common.adapted(self.adapter, common.to_teacher_size(student, teacher), teacher, self)
        mask = common.counted(target, teacher, self.ignore_index)
        s, t = (common.wide(x).flatten(2) for x in (student, teacher))
        if mask is not None:
            mask = mask.flatten(1).unsqueeze(1)
        s, number = self._standardised(s, mask)
        t, _ = self._standardised(t, mask)
        loss = 0.5 * F.mse_loss(s, t, reduction="sum") / (number * s.shape[1]).clamp(min=1)
        self.parts = {"correlation": loss.detach()}
        return loss

    def _standardised(self, x: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """`x` [N, C, V] standardised, 0 where a pixel does not count; the number of pixels of the mean process."""
        if mask is None:
            number = x.new_full((1,), x.shape[0] * x.shape[2])
        else:
            number, x = mask.sum().to(x.dtype).reshape(1), torch.where(mask, x, 0)
        total, processes = self._reduced(torch.cat([x.sum((0, 2)), number]))
        number = total[-1].detach()
        x = x - (total[:-1] / number.clamp(min=1)).unsqueeze(1)
        if mask is not None:
            x = torch.where(mask, x, 0)
        squares, _ = self._reduced(x.square().sum((0, 2)))
        variance = squares / (number - 1).clamp(min=1)
        varies = variance > 0
        deviation = torch.where(varies, torch.where(varies, variance, 1).sqrt(), 0) + 1e-6
        return x * (1 / deviation).unsqueeze(1), number / processes

    def _reduced(self, sums: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Sums over the processes with sync, with gradient, and how many there are."""
        if not self.sync or not torch.distributed.is_initialized():
            return sums, 1
        from torch.distributed.nn.functional import all_reduce

        group = self.process_group or torch.distributed.group.WORLD
        return all_reduce(sums, group=group), torch.distributed.get_world_size(group)
