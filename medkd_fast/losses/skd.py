"""Structured Knowledge Distillation for Semantic Segmentation: Liu, Chen, Liu, Qin, Luo and Wang, CVPR 2019."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from medkd_fast import functional
from medkd_fast.losses import common, pooling, settings


class SKDLoss(common.DistillationLoss):
    """Mean squared difference between the cosine affinities of all pairs of max-pooled pixels.

    The pair-wise term of the paper. The V×V matrices are never held.

    Other codes: the authors' divides by the detached norm + 1e-8, so no gradient flows through it: `detach_norm=True`. The
    default has the exact gradient, as CIRKD's copy of the loss has.

    Weight: 0.5 in the authors' code, 10 in CIRKD's tables, on the features before the classifier.

    Cost: one pass over the pooled pixels each forward and backward, C² · V operations; memory: the gradient.

    Args:
        pool: max-pools both maps by this factor, or one for each axis (the authors' is half the map's size, rounded down: a grid of
            2×2, of 3×3 where the size is odd).
        detach_norm: the norm as a constant.
        ignore_index: with a target, pixels with this label leave both sides before the pooling.

    Numbers of channels may differ. Maps of unequal size: the larger one is average-pooled first.

    >>> import torch
    >>> student = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).reshape(1, 2, 1, 2)  # two pixels alike
    >>> teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 2, 1, 2)  # two pixels apart
    >>> SKDLoss(pool=1)(student, teacher)
    tensor(0.5000)
    """

    def __init__(self, pool: int | Sequence[int] = 2, detach_norm: bool = False, ignore_index: int = -100) -> None:
        super().__init__()
        pooling.check_pool(pool)
        settings.check_flag("detach_norm", detach_norm)
        settings.check_whole("ignore_index", ignore_index)
        self.pool = pool
        self.detach_norm = detach_norm
        self.ignore_index = ignore_index

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        """student, teacher: features [B, C, *S]; target: labels, of any size."""
        student, teacher = common.to_common_size(student, teacher)
        mask = common.counted(target, student, self.ignore_index)
        if self.detach_norm:
            student, left = functional.max_pool(student, self.pool, mask=mask)
            teacher, _ = functional.max_pool(teacher, self.pool, mask=mask)
            student, teacher = _over_detached_norm(student), _over_detached_norm(teacher)
            loss = functional.pixel_relation(student, teacher, relation="gram", mask=left)
        else:
            loss = functional.pixel_relation(student, teacher, mask=mask, pool=self.pool)
        self.parts = {"affinity": loss.detach()}
        return loss


def _over_detached_norm(x: torch.Tensor) -> torch.Tensor:
    """Pixels over their constant norm, times √C, which the gram relation divides by."""
    x = common.wide(x)
    norm = x.detach().square().sum(1, keepdim=True).sqrt()
    return x * (math.sqrt(x.shape[1]) / (norm + 1e-8))
