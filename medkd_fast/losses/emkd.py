"""Efficient Medical Image Segmentation Based on Knowledge Distillation (EMKD): Qin, Bu, Liu, Shen, Zhou and others, TMI 2021."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F

from medkd_fast import functional
from medkd_fast.losses import common
from medkd_fast.losses.attention import attention_difference
from medkd_fast.ops.common import check_power


class EMKDLoss(common.DistillationLoss):
    """0.1 · KL on the logits + 0.9 · difference of importance maps + 0.9 · difference of region affinities.

    * prediction: KL over classes at T = 4 times T², mean over valid pixels.
    * importance: attention maps with p = 4, squared difference summed over pixels, mean over images, summed over the layers.
    * region: the mean feature of every class, the cosine between every two classes, squared difference, mean over the pairs
      whose classes are both in the image, mean over images that have such a pair, summed over the layers.

    Other codes: the authors' code knows two classes, where this equals it for images that have both; one with an absent class it
    counts as 0 in the mean over images (or divides by 0, where it is the first), here it leaves the mean. A student layer of
    another size it interpolates to the teacher's; here the larger one is averaged for the importance maps, and region means are
    taken at each network's own size.

    Weight: 1, with the weights of the parts that are the defaults (the authors').

    Cost: one pass over the logits, two over each layer, and their backward; memory: the gradients, maps of one channel and
    classes × C numbers for a layer.

    Args:
        num_classes: number of classes in the labels.
        prediction_weight, importance_weight, region_weight: weights of the parts; 0 leaves a part out.
        temperature: of the prediction part.
        p: power of the importance maps.
        ignore_index: pixels with this label count nowhere.

    Numbers of channels of a layer may differ.

    >>> import torch
    >>> loss = EMKDLoss(num_classes=3)
    >>> logits, layer = torch.rand(2, 3, 8, 8), torch.rand(2, 6, 4, 4)
    >>> target = torch.arange(128).reshape(2, 8, 8) % 3
    >>> value = loss(logits, logits, target, student_features=[layer], teacher_features=[2 * layer])
    >>> value.abs() < 1e-6, sorted(loss.parts)
    (tensor(True), ['importance', 'prediction', 'region'])
    """

    def __init__(
        self,
        num_classes: int,
        prediction_weight: float = 0.1,
        importance_weight: float = 0.9,
        region_weight: float = 0.9,
        temperature: float = 4.0,
        p: float = 4,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        common.check_classes(num_classes, at_least=2)
        check_power("p", p)
        self.num_classes = num_classes
        self.prediction_weight = prediction_weight
        self.importance_weight = importance_weight
        self.region_weight = region_weight
        self.temperature = temperature
        self.p = p
        self.ignore_index = ignore_index

    def forward(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        target: torch.Tensor,
        student_features: Sequence[torch.Tensor],
        teacher_features: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """student, teacher: logits [B, C, *S]; target: labels [B, *S] or [B, 1, *S]; features: the layers', [B, c, *s]."""
        common.check_layers(student_features, teacher_features, at_least=1)
        parts = {}
        if self.prediction_weight:
            parts["prediction"] = functional.class_kl(
                student, teacher, temperature=self.temperature, target=target, ignore_index=self.ignore_index
            )
        pairs = list(zip(student_features, teacher_features, strict=True))
        if self.importance_weight:
            parts["importance"] = reduce(torch.add, (self._importance(s, t, target) for s, t in pairs))
        if self.region_weight:
            parts["region"] = reduce(torch.add, (self._region(s, t, target) for s, t in pairs))
        self.parts = {name: part.detach() for name, part in parts.items()}
        return common.weighted_sum(student, {name: (getattr(self, f"{name}_weight"), x) for name, x in parts.items()})

    def _importance(self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        student, teacher = common.to_common_size(student, teacher)
        mask = common.counted(target, student, self.ignore_index)
        return attention_difference(student, teacher, self.p, "sum", mask)

    def _region(self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        common.check_dims(student, teacher)
        (means_s, there_s), (means_t, there_t) = self._regions(student, target), self._regions(teacher, target)
        there = there_s & there_t
        if (
            student.shape[2:] != teacher.shape[2:]
        ):  # a class that is absent in one network is 0 in both: no cosine differs
            means_s, means_t = (torch.where(there.unsqueeze(2), means, 0) for means in (means_s, means_t))
        # the classes are the channels of a relation; where one network has fewer features, zeros change no cosine
        features = max(means_s.shape[2], means_t.shape[2])
        means_s, means_t = (F.pad(means, (0, features - means.shape[2])) for means in (means_s, means_t))
        squared = functional.channel_relation(means_s, means_t, reduction="none")  # the mean over classes x classes
        number = there.sum(1)
        pairs = number * (number - 1)
        of_images = (squared / pairs.clamp(min=1)).sum() * self.num_classes**2
        return of_images / (pairs > 0).sum().clamp(min=1)

    def _regions(self, x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean features [B, K, C] of the classes, and which are there."""
        labels = common.resized_labels(target, x)
        means, counts = functional.class_means(x, labels, num_classes=self.num_classes, ignore_index=self.ignore_index)
        return means, counts > 0
