"""Paying More Attention to Attention: Zagoruyko and Komodakis, ICLR 2017."""

from __future__ import annotations

import torch

from medkd_fast.losses import common, settings
from medkd_fast.losses.attention import attention_difference


class ATLoss(common.DistillationLoss):
    """Mean squared difference of attention maps: mean over channels of |x|^p, divided by its L2 norm over the pixels.

    Other codes: equal to the authors' with p = 2. `reduction="sum"` sums over the pixels and takes the mean over images, as
    EMKD does: pixels times this. (Where x^p of an odd p would be negative, |x|^p of the paper is taken. Their norm is at least
    1e-12, so the map of very small features is shorter than 1; here only that of zeros is.)

    Weight: 1000 for each of three layers in the authors' code, 10000 in CIRKD's tables.

    Cost: one pass over student and teacher, one over the student backward; memory: the gradient and maps of one channel.

    Args:
        p: the power.
        reduction: "mean" over pixels and images, or "sum" over pixels, mean over images.
        ignore_index: with a target, pixels with this label leave the map, its norm and the mean.

    Numbers of channels may differ. Maps of unequal size: the larger one is average-pooled.

    >>> import torch
    >>> student, teacher = torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2), torch.tensor([0.0, 5.0]).reshape(1, 1, 1, 2)
    >>> ATLoss()(student, teacher), ATLoss(reduction="sum")(student, teacher)
    (tensor(1.), tensor(2.))
    """

    def __init__(self, p: float = 2, reduction: str = "mean", ignore_index: int = -100) -> None:
        super().__init__()
        settings.check_power("p", p)
        settings.check_whole("ignore_index", ignore_index)
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction: got {reduction!r}, want 'mean' or 'sum'")
        self.p = p
        self.reduction = reduction
        self.ignore_index = ignore_index

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        """student, teacher: features [B, C, *S]; target: labels, of any size."""
        student, teacher = common.to_common_size(student, teacher)
        mask = common.counted(target, student, self.ignore_index)
        loss = attention_difference(student, teacher, self.p, self.reduction, mask)
        self.parts = {"attention": loss.detach()}
        return loss
