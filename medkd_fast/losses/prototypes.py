"""Means of features by class: one product with the labels' indicators, no copy of the features for any class."""

from __future__ import annotations

import torch

from medkd_fast.losses import common
from medkd_fast.ops.common import check_labels


def class_labels(target: torch.Tensor, like: torch.Tensor, num_classes: int, ignore_index: int) -> torch.Tensor:
    """Labels [B, N] at the size of `like`, −1 where a pixel does not count. Other labels outside [0, num_classes) raise."""
    target = common.resized_labels(target, like).flatten(1)
    check_labels(target, num_classes, ignore_index)
    return torch.where(target == ignore_index, -1, target.long())


def kept(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Features [B, C, N] in the type of the arithmetic, 0 where labels are −1, whatever stood there."""
    return torch.where((target >= 0).unsqueeze(1), common.wide(x).flatten(2), 0)


def class_means(
    x: torch.Tensor, target: torch.Tensor, num_classes: int, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means [B, C, K] of `kept` features [B, C, N] by class, Σ / (count + epsilon), and the counts [B, K]; absent: 0."""
    indicator = (target.unsqueeze(2) == torch.arange(num_classes, device=x.device)).to(x.dtype)  # [B, N, K]
    counts = indicator.sum(1)
    absent = counts == 0
    return x @ indicator / (counts + torch.where(absent, 1, epsilon)).unsqueeze(1), counts
