"""Efficient Medical Image Segmentation Based on Knowledge Distillation (EMKD): Qin, Bu, Liu, Shen, Zhou and others, TMI 2021."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from medkd_fast import functional
from medkd_fast.losses import common, settings


class EMKDLoss(common.DistillationLoss):
    """0.1 · KL on the logits + 0.9 · difference of importance maps + 0.9 · difference of region affinities.

    * prediction: KL over classes at T = 4 times T², mean over valid pixels.
    * importance: attention maps with p = 4, squared difference summed over pixels, mean over images, summed over the layers.
    * region: the mean feature of every class, the cosine between every two classes, squared difference, mean over the pairs
      whose classes are both in the image, mean over images that have such a pair, summed over the layers.

    Other codes: the authors' code knows two classes, where this equals it for images that have both; one with an absent class it
    counts as 0 in the mean over images (or divides by 0, where it is the first), here it leaves the mean. A student layer of
    another size it interpolates to the teacher's for the importance maps, and takes in no other part; here the larger one is averaged.
    Its maps have norms of at least 1e-12, which those of features below some 5e-4 fall short of; here every map but that of zeros has
    norm 1.

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
        settings.check_whole("num_classes", num_classes, at_least=2)
        settings.check_number(
            prediction_weight=prediction_weight, importance_weight=importance_weight, region_weight=region_weight
        )
        settings.check_temperature(temperature)
        settings.check_power("p", p)
        settings.check_whole("ignore_index", ignore_index)
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
            layers = [self._of_layer(s, t, target) for s, t in zip(student_features, teacher_features, strict=True)]
            importance, affinity = zip(*layers, strict=True)
            if self.importance_weight:
                parts["importance"] = sum(importance[1:], importance[0])
            if self.region_weight:
                parts["region"] = sum(affinity[1:], affinity[0])
        self.parts = {name: part.detach() for name, part in parts.items()}
        return common.weighted_sum(student, {name: (getattr(self, f"{name}_weight"), x) for name, x in parts.items()})

    def _of_layer(
        self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor
    ) -> functional.ImportanceAndAffinity:
        student, teacher = common.to_common_size(student, teacher)
        return functional.importance_and_affinity(
            student,
            teacher,
            common.resized_labels(target, student),
            num_classes=self.num_classes,
            power=self.p,
            ignore_index=self.ignore_index,
        )
