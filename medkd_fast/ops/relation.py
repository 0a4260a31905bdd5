"""What the losses on features share: their argument checks."""

from __future__ import annotations

import torch

from medkd_fast.ops import common

DIVERGENCES = ("mse", "kl")


def check_relation(
    student: torch.Tensor,
    teacher: torch.Tensor,
    relation: str,
    relations: tuple[str, ...],
    divergence: str,
    temperature: float,
    reduction: str,
) -> None:
    common.check_pair(student, teacher)
    common.check_choice("relation", relation, relations)
    common.check_choice("divergence", divergence, DIVERGENCES)
    common.check_choice("reduction", reduction, common.REDUCTIONS)
    common.check_temperature(temperature)
    check_sizes(student, teacher)


def check_sizes(student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Equal spatial sizes, and channels."""
    if student.shape[2:] != teacher.shape[2:]:
        raise ValueError(
            f"student and teacher: got spatial sizes {tuple(student.shape[2:])} and {tuple(teacher.shape[2:])}, want equal "
            "ones; average-pool the larger one, for example with torch.nn.functional.adaptive_avg_pool2d, or resize one"
        )
    for which, x in (("student", student), ("teacher", teacher)):
        if x.shape[1] == 0:
            raise ValueError(f"{which}: got shape {tuple(x.shape)}, want at least one channel")


def pixel_mask(mask: torch.Tensor | None, student: torch.Tensor) -> torch.Tensor | None:
    """The mask as contiguous booleans [B, *S]."""
    if mask is None:
        return None
    mask = common.per_pixel("mask", mask, student)
    if mask.dtype == torch.bool:
        return mask
    if mask.dtype not in common.INTEGERS:
        raise TypeError(f"mask: got {mask.dtype}, want booleans, True where a pixel counts; compare, as in mask > 0.5")
    return mask != 0
