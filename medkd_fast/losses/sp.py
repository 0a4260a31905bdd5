"""Similarity-Preserving Knowledge Distillation: Tung and Mori, ICCV 2019."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from medkd_fast import functional
from medkd_fast.losses import common, settings
from medkd_fast.processes import all_gather


class SPLoss(common.DistillationLoss):
    """Squared difference of the images' similarities: products of flattened images, unit rows, over N².

    The N×N matrix of products between the images of a batch, each row divided by its L2 norm; Σ (difference)² / N². With one
    image both matrices are 1 and the loss is 0, of which a warning tells once.

    Other codes: equal to the authors'.

    Weight: 3000 (the authors' gamma).

    Cost: one pass over student and teacher, one over the student backward, N² · C · V operations; memory: the gradient.

    Args:
        ignore_index: with a target, pixels with this label are 0 in both networks.
        sync: under DDP, similarities between the images of all processes (of `process_group`, or all), whose features are
            gathered; the default are those of the process's own batch.

    Numbers of channels and spatial sizes may differ: only images are compared.

    >>> import torch
    >>> student, teacher = torch.ones(2, 1, 1, 2), torch.eye(2).reshape(2, 1, 1, 2)
    >>> print(f"{SPLoss()(student, teacher).item():.4f}")
    0.2929
    """

    def __init__(self, ignore_index: int = -100, sync: bool = False, process_group: Any = None) -> None:
        super().__init__()
        settings.check_whole("ignore_index", ignore_index)
        settings.check_flag("sync", sync)
        self.ignore_index = ignore_index
        self.sync = sync
        self.process_group = process_group

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        """student, teacher: features [N, C, *S], N >= 2; target: labels, of any size."""
        common.check_dims(student, teacher)
        s, t = self._as_channels(student, target), self._as_channels(teacher, target)
        if s.shape[1] == 1:
            warnings.warn(
                "SPLoss of one image is 0: it compares the images of a batch; want at least 2, or another loss",
                stacklevel=2,
            )
        if s.shape[1] == 0:
            loss = common.wide(s).sum()  # of nothing
        elif s.shape == t.shape:
            loss = functional.channel_relation(s, t, relation="row")
        else:
            similarity_t = functional.channel_gram(t, relation="row")
            loss = (functional.channel_gram(s, relation="row") - similarity_t).square().mean()
        self.parts = {"similarity": loss.detach()}
        return loss

    def _as_channels(self, x: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
        """[1, N, C·V]: the images in the place of channels."""
        mask = common.counted(target, x, self.ignore_index)
        if mask is not None:
            x = torch.where(mask.unsqueeze(1), x, 0)
        x = x.flatten(1)
        if self.sync and torch.distributed.is_initialized():
            x = all_gather(x, self.process_group)
        return x.unsqueeze(0)
