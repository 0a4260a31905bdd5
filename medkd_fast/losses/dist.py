"""Knowledge Distillation from A Stronger Teacher (DIST): Huang, You, Wang, Qian and Xu, NeurIPS 2022."""

from __future__ import annotations

from typing import Any

import torch

from medkd_fast import functional
from medkd_fast.losses import common, settings


class DISTLoss(common.DistillationLoss):
    """beta · (1 − correlation over classes) + gamma · (1 − correlation over pixels), of probabilities, times T².

    * inter: 1 − mean over all pixels of the batch of the Pearson correlation between the networks' class probabilities.
    * intra: 1 − mean over the classes of the Pearson correlation over all pixels of the batch.

    1e-8 is added to the products of norms.

    Other codes: equal to the authors'; their segmentation code has T = 1 and no ignored pixels.

    Weight: 1 with beta = gamma = 1 in their segmentation code.

    Cost: two passes over student and teacher, forward and backward; memory: the gradient.

    Args:
        beta, gamma: weights of the inter-class and the intra-class part.
        temperature: divides both logits.
        ignore_index: with a target, pixels with this label do not count.
        sync: under DDP, correlations over the pixels of all processes (of `process_group`, or all); the default are those of
            the process's own batch.

    A student of another spatial size is brought to the teacher's: linear upsampling, or averaging. A class that is nowhere
    (probability constant) has correlation 0 and stays in the mean.

    >>> import torch
    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]]).reshape(1, 2, 1, 2)
    >>> loss = DISTLoss()
    >>> print(f"{loss(logits, logits).item():.4f}, {loss(logits, -logits).item():.4f}")
    0.0000, 4.0000
    """

    def __init__(
        self,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        ignore_index: int = -100,
        sync: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        settings.check_number(beta=beta, gamma=gamma)
        settings.check_temperature(temperature)
        settings.check_whole("ignore_index", ignore_index)
        settings.check_flag("sync", sync)
        self.beta = beta
        self.gamma = gamma
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.sync = sync
        self.process_group = process_group

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        """student, teacher: logits [B, C, *S]; target: labels [B, *S] or [B, 1, *S]."""
        group = self.process_group
        if self.sync and group is None and torch.distributed.is_initialized():
            group = torch.distributed.group.WORLD
        result = functional.class_pearson(
            common.to_teacher_size(student, teacher),
            teacher,
            inter_weight=self.beta,
            intra_weight=self.gamma,
            temperature=self.temperature,
            target=target,
            ignore_index=self.ignore_index,
            process_group=group if self.sync else None,
        )
        self.parts = {"inter": result.inter, "intra": result.intra}
        return result.loss
