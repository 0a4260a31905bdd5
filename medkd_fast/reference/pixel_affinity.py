"""The definition of pixel_affinity: the relation matrix of reference/pixel_relation.py by itself."""

from __future__ import annotations

import torch

from medkd_fast.reference.common import arithmetic
from medkd_fast.reference.pixel_relation import normalised


def pixel_affinity(x: torch.Tensor, relation: str) -> torch.Tensor:
    """Arguments as those of `medkd_fast.pixel_affinity`, checked."""
    rows = normalised(x.to(arithmetic(x, x)).flatten(2), relation)
    return rows.mT @ rows
