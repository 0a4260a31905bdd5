"""Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation: Liu, Huang, Lin and others, ICCV 2021."""

from __future__ import annotations

import torch
from torch import nn

from medkd_fast import functional
from medkd_fast.losses import common, settings


class ICKDLoss(common.AdaptedLoss):
    """Squared difference of the channels' products x xᵀ with unit rows, over C, mean over images.

    Every row of the C×C matrix of products of an image is divided by its L2 norm; Σ (difference)² / (C·N).

    Other codes: equal to the authors' classification code. The mean over the C² entries is this / C.

    Weight: 2.5 in the authors' README, 4 in their script.

    Cost: one pass over student and teacher, one over the student backward, C² · V operations; memory: the gradient.

    Args:
        student_channels, teacher_channels: where they are given, the student first goes through the authors' embedding: a 1×1
            convolution without bias and a batch normalisation; train it along. (Its batch statistics are those of the
            process's own batch; `nn.SyncBatchNorm.convert_sync_batchnorm(loss)` reduces them.)
        ignore_index: with a target, pixels with this label do not count.

    Maps of unequal size: the larger one is average-pooled.

    >>> import torch
    >>> student = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).reshape(1, 2, 1, 2)  # two channels alike
    >>> teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 2, 1, 2)  # two channels apart
    >>> print(f"{ICKDLoss()(student, teacher).item():.4f}")
    0.5858
    """

    def __init__(
        self, student_channels: int | None = None, teacher_channels: int | None = None, ignore_index: int = -100
    ) -> None:
        super().__init__()
        settings.check_whole("ignore_index", ignore_index)
        self.ignore_index = ignore_index
        self.adapter = self._adapter(student_channels, teacher_channels)

    def _adapter(self, student_channels: int | None, teacher_channels: int | None) -> nn.Module | None:
        convolution = common.make_adapter(student_channels, teacher_channels, even_if_equal=True)
        return None if convolution is None else nn.Sequential(convolution, nn.BatchNorm1d(convolution.out_channels))

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        """student, teacher: features [B, C, *S]; target: labels, of any size."""
        student, teacher = common.to_common_size(student, teacher)
        student = common.adapted(self.adapter, student, teacher, self)
        mask = common.counted(target, student, self.ignore_index)
        loss = functional.channel_relation(student, teacher, relation="row", mask=mask) * teacher.shape[1]
        self.parts = {"correlation": loss.detach()}
        return loss
