"""Cross-entropy between distributions over pixels, the teacher's enhanced by the label."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from medkd_fast.losses import common
from medkd_fast.ops.common import check_labels
from medkd_fast.reference.common import which_count

#: The exponent ε of (p + m)^ε − m.
POWER = 1.2


def enhanced_spatial(
    student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor, temperature: float, ignore_index: int
) -> torch.Tensor:
    """−1/(N·C) · Σ ((p_t + m)^ε − m) · log p_s, p = softmax over the pixels at the temperature, m = one-hot(target).

    Where m = 1, (1 + p)^ε − 1 is expm1(ε·log1p(p)); where it is 0, p^ε is exp(ε·log p). A pixel's p is about 1 / V, and what is
    left of it in 1 + p is a few digits. Pixels with ignore_index leave the softmax and the sum.
    """
    student = common.to_teacher_size(student, teacher)
    classes = teacher.shape[1]
    labels = common.resized_labels(target, teacher).flatten(1)
    check_labels(labels, classes, ignore_index)
    counts = which_count(labels, ignore_index).unsqueeze(1)  # [N, 1, V]
    there = counts.any(2, keepdim=True)
    log_s, log_t = (
        F.log_softmax((common.wide(x).flatten(2) / temperature).masked_fill(~counts & there, -torch.inf), 2)
        for x in (student, teacher)
    )
    own = labels.unsqueeze(1) == torch.arange(classes, device=labels.device).view(-1, 1)
    with torch.no_grad():
        weight = torch.where(own, torch.expm1(POWER * torch.log1p(log_t.exp())), torch.exp(POWER * log_t))
    terms = torch.where(counts, weight * log_s, 0)
    return -terms.sum() / (there.sum() * classes).clamp(min=1)
