"""KL at the label's boundaries: distillation where the Hausdorff distance is decided."""

from __future__ import annotations

import torch

from medkd_fast import functional
from medkd_fast.losses import common, settings
from medkd_fast.reference.common import which_count


class BoundaryKDLoss(common.DistillationLoss):
    """KL over classes, times T², at pixels whose 3×3(×3) neighbourhood has another label, mean over these pixels.

    Other codes: none; `KDLoss` with all other pixels left out. (Weights on boundary pixels are common in losses for HD95; a mean
    over them alone does not fade with the share of pixels that are boundary.)

    Weight: not from a publication; that of `KDLoss` to begin with.

    Cost: one pass over student and teacher gives value and gradient, one over the labels; memory: the gradient.

    Args:
        temperature: divides both logits.
        radius: of the neighbourhood; 1 is 3×3(×3), 2 is 5×5(×5).
        ignore_index: pixels with this label do not count, and are no other class to their neighbours.

    Without a boundary in the batch the loss is 0, and so is its gradient.

    >>> import torch
    >>> student, teacher = torch.zeros(1, 2, 1, 4), torch.tensor([[9.0, 1, 1, 9], [0, 0, 0, 0]]).reshape(1, 2, 1, 4)
    >>> target = torch.tensor([[[0, 0, 1, 1]]])
    >>> print(f"{BoundaryKDLoss(temperature=1.0)(student, teacher, target).item():.4f}")
    0.1109
    """

    def __init__(self, temperature: float = 1.0, radius: int = 1, ignore_index: int = -100) -> None:
        super().__init__()
        settings.check_temperature(temperature)
        settings.check_whole("radius", radius, at_least=1)
        settings.check_whole("ignore_index", ignore_index)
        self.temperature = temperature
        self.radius = radius
        self.ignore_index = ignore_index

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """student, teacher: logits [B, C, *S]; target: labels [B, *S] or [B, 1, *S]."""
        common.check_dims(student, teacher)
        edge = boundary(common.resized_labels(target, teacher), self.ignore_index, self.radius)
        loss = functional.class_kl(student, teacher, temperature=self.temperature, weight=common.wide(edge))
        self.parts = {"kl": loss.detach()}
        return loss


def boundary(target: torch.Tensor, ignore_index: int, radius: int = 1) -> torch.Tensor:
    """Where labels [B, *S] have another label within `radius` pixels along every axis, ignored pixels left aside."""
    ignored, label = ~which_count(target, ignore_index), target.int()
    lowest = torch.iinfo(torch.int32).min
    largest = _largest_within(label.masked_fill(ignored, lowest), radius)
    least_negated = _largest_within((-label).masked_fill_(ignored, lowest), radius)
    return (largest != -least_negated) & ~ignored


def _largest_within(label: torch.Tensor, radius: int) -> torch.Tensor:
    """Of labels [B, *S] the largest within `radius` along every axis: one axis after the other."""
    for axis in range(1, label.dim()):
        size, largest = label.shape[axis], label.clone()
        for step in range(1, min(radius, size - 1) + 1):
            for of, others in ((0, step), (step, 0)):
                some = largest.narrow(axis, of, size - step)
                some.copy_(torch.maximum(some, label.narrow(axis, others, size - step)))
        label = largest
    return label
