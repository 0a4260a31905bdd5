"""Intra-class Feature Variation Distillation for Semantic Segmentation: Wang, Zhou, Jiang, Bai and Xu, ECCV 2020."""

from __future__ import annotations

import torch

from medkd_fast import functional
from medkd_fast.losses import common, settings
from medkd_fast.reference.common import which_count


class IFVDLoss(common.DistillationLoss):
    """Mean squared difference of how close each pixel is to its class's mean: cosine of feature and prototype.

    The prototype of a class in an image is the sum of its pixels' features / (their number + 1e-6); labels are taken at the
    feature's size by the nearest pixel.

    Other codes: the authors' has ignored pixels in the denominator, where they add 0 (but where one network's feature is 0); here they
    leave it, so its value is this times the share of valid pixels. At some sizes its nearest label, found in fp32, is the next one.

    Weight: 200 in the authors' code, 20 in CIRKD's tables, on features before the classifier.

    Cost: two passes over student and teacher, two over the student backward; memory: the gradient, two maps of one channel and
    classes × C numbers for each network.

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
        settings.check_whole("num_classes", num_classes, at_least=1)
        settings.check_whole("ignore_index", ignore_index)
        self.num_classes = num_classes
        self.ignore_index = ignore_index

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """student, teacher: features [B, C, *S]; target: labels, of any size."""
        student, teacher = common.to_common_size(student, teacher)
        labels = common.resized_labels(target, student)
        map_s, map_t = (
            functional.class_similarity(x, labels, num_classes=self.num_classes, ignore_index=self.ignore_index)
            for x in (student, teacher)
        )
        loss = common.mean_square(map_s, map_t, which_count(labels, self.ignore_index))
        self.parts = {"variation": loss.detach()}
        return loss
