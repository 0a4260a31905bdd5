"""What the definitions share with the operators."""

from __future__ import annotations

import torch


def arithmetic(student: torch.Tensor, teacher: torch.Tensor) -> torch.dtype:
    """The type that sums are made in: float64 as soon as one input is, else float32."""
    return torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32


def which_count(target: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Where labels of any type are not `ignore_index`; an unsigned type by itself would take -100 for 156."""
    return target.long() != ignore_index
