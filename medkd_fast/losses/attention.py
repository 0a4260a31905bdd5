"""How far two attention maps are apart: a part of several losses."""

from __future__ import annotations

import torch

from medkd_fast import functional
from medkd_fast.losses import common


def attention_difference(
    student: torch.Tensor, teacher: torch.Tensor, p: float, reduction: str, mask: torch.Tensor | None
) -> torch.Tensor:
    """Squared difference of the two attention maps, over pixels and images as `reduction` says."""
    map_s, map_t = (functional.attention_map(x, power=p, mask=mask) for x in (student, teacher))
    if reduction == "mean":
        return common.mean_square(map_s, map_t, mask)
    images = len(map_s) if mask is None else mask.flatten(1).any(1).sum().clamp(min=1)
    return common.squared_difference(map_s, map_t) / images
