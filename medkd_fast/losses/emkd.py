"""Efficient Medical Image Segmentation Based on Knowledge Distillation (EMKD): Qin, Bu, Liu, Shen, Zhou and others, TMI 2021."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from medkd_fast import functional
from medkd_fast.losses import common
from medkd_fast.ops.common import check_power


class EMKDLoss(common.DistillationLoss):
    """0.1 · KL on the logits + 0.9 · difference of importance maps + 0.9 · difference of region affinities.

    * prediction: KL over classes at T = 4 times T², mean over valid pixels.
    * importance: attention maps with p = 4, squared difference summed over pixels, mean over images, summed over the layers.
    * region: the mean feature of every class, the cosine between every two classes, squared difference, mean over the pairs
      whose classes are both in the image, mean over images that have such a pair, summed over the layers.

    Other codes: the authors' code knows two classes, where this equals it for images that have both; one with an absent class it
    counts as 0 in the mean over images (or divides by 0, where it is the first), here it leaves the mean. A student layer of
    another size it interpolates to the teacher's; here the larger one is averaged.

    Weight: 1, with the weights of the parts that are the defaults (the authors').

    Cost: one pass over the logits and one over each layer (on a GPU two), and their backward; memory: the gradients, maps of one
    channel and classes × C numbers for a layer.

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
        if self.importance_weight or self.region_weight:
            for s, t in zip(student_features, teacher_features, strict=True):
                for name, part in self._of_layer(s, t, target).items():
                    parts[name] = parts[name] + part if name in parts else part
        self.parts = {name: part.detach() for name, part in parts.items()}
        return common.weighted_sum(student, {name: (getattr(self, f"{name}_weight"), x) for name, x in parts.items()})

    def _of_layer(self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        student, teacher = common.to_common_size(student, teacher)
        labels = common.resized_labels(target, student)
        (map_s, means_s, counts), (map_t, means_t, _) = (
            functional.attention_and_means(
                x, labels, num_classes=self.num_classes, power=self.p, ignore_index=self.ignore_index
            )
            for x in (student, teacher)
        )
        parts = {}
        there = counts.count_nonzero(1)
        if self.importance_weight:
            parts["importance"] = common.squared_difference(map_s, map_t) / there.count_nonzero().clamp(min=1)
        if self.region_weight:
            missing = means_t.shape[2] - means_s.shape[2]
            if missing:  # where one network has fewer features, zeros change no cosine
                means_s, means_t = F.pad(means_s, (0, max(missing, 0))), F.pad(means_t, (0, max(-missing, 0)))
            # the classes are the channels of a relation, and those of one that is absent are 0 in both networks
            squared = functional.channel_relation(means_s, means_t, reduction="none")  # the mean over classes x classes
            there = there.to(squared.dtype)
            pairs = there * (there - 1)
            parts["region"] = squared.dot(self.num_classes**2 / (pairs * pairs.count_nonzero()).clamp(min=1))
        return parts
