"""The definition of attention_and_means: those of attention_map and of class_means, over the pixels that are not ignored."""

from __future__ import annotations

import torch

from medkd_fast.reference.attention_map import attention_map
from medkd_fast.reference.class_means import class_means


def attention_and_means(
    x: torch.Tensor, target: torch.Tensor, num_classes: int, power: float, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Map [B, *S], means [B, K, C] and counts [B, K]; arguments as those of `medkd_fast.attention_and_means`, checked."""
    return attention_map(x, target != ignore_index, power), *class_means(x, target, num_classes, ignore_index)
