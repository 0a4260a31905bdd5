"""Intra-class Feature Variation Distillation for Semantic Segmentation: Wang, Zhou, Jiang, Bai and Xu, ECCV 2020."""

from __future__ import annotations

import torch

from medkd_fast.losses import common
from medkd_fast.losses.prototypes import class_labels, class_means, kept


class IFVDLoss(common.DistillationLoss):
    """Mean squared difference of how close each pixel is to its class's mean: cosine of feature and prototype.

    The prototype of a class in an image is the sum of its pixels' features / (their number + 1e-6); labels are taken at the
    feature's size by the nearest pixel.

    Other codes: the authors' has ignored pixels in the denominator, where they add 0; here they leave it, so its value is this
    times the share of valid pixels.

    Weight: 200 in the authors' code, 20 in CIRKD's tables, on features before the classifier.

    Cost: two products of C × V × classes each for student and teacher, and their backward; memory: the gradient, and classes
    × V numbers for each network.

    Args:
        num_classes: number of classes in the labels.
        ignore_index: pixels with this label count neither in prototypes nor in the mean.

    Numbers of channels may differ. Maps of unequal size: the larger one is average-pooled.

    >>> import torch
    >>> student = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).reshape(1, 2, 1, 2)  # one class, two pixels alike
    >>> teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 2, 1, 2)  # two pixels apart
    >>> value = IFVDLoss(num_classes=2)(student, teacher, torch.zeros(1, 1, 2, dtype=torch.long))
    >>> print(f"{value.item():.4f}")  # (1 - 1/√2)²
    0.0858
    """

    def __init__(self, num_classes: int, ignore_index: int = -100) -> None:
        super().__init__()
        common.check_classes(num_classes)
        self.num_classes = num_classes
        self.ignore_index = ignore_index

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """student, teacher: features [B, C, *S]; target: labels, of any size."""
        student, teacher = common.to_common_size(student, teacher)
        target = class_labels(target, student, self.num_classes, self.ignore_index)
        with torch.autocast(student.device.type, enabled=False):
            difference = self._closeness(student, target) - self._closeness(teacher, target)
        loss = common.mean_over(difference.square(), target >= 0)
        self.parts = {"variation": loss.detach()}
        return loss

    def _closeness(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Cosine [B, N] of every pixel with its class's mean, each norm at least 1e-8."""
        x = kept(x, target)
        means, _ = class_means(x, target, self.num_classes, 1e-6)
        own = target.clamp(min=0)
        products = (means.mT @ x).gather(1, own.unsqueeze(1)).squeeze(1)
        return products / (_norm(means).gather(1, own) * _norm(x))


def _norm(x: torch.Tensor) -> torch.Tensor:
    """max(L2 norm over dimension 1, 1e-8), with gradient 0 below that."""
    return x.square().sum(1).clamp_min(1e-16).sqrt()
