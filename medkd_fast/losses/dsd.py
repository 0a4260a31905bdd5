"""Double Similarity Distillation for Semantic Image Segmentation: Feng, Sun, Diao, Li and Gao, TIP 2021."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from medkd_fast import functional
from medkd_fast.losses import common, pooling, settings


class DSDLoss(common.DistillationLoss):
    """category_weight · difference of the classes' similarities + pixel_weight · difference of residual attention maps.

    * category: logits average-pooled, softmax over the pixels of every channel at the temperature, products P Pᵀ, mean squared
      difference of the C×C entries.
    * pixel: of every layer the attention map, mean over channels of x², divided by its L2 norm; of every two layers the
      difference of their maps, divided by its norm; mean squared difference, mean over the pairs of layers.

    Other codes: equal to CIRKD's copy of the loss.

    Weight: category 10, pixel 1000 (CIRKD's tables), which the weights take; 1 is their default.

    Cost: one pass over the pooled logits, one over each layer, and their backward; memory: the gradients and maps of one channel.

    Args:
        category_weight, pixel_weight: weights of the parts; 0 leaves a part out.
        temperature: of the category part.
        pool: average-pools the logits of the category part by this factor, or one for each axis.
        ignore_index: with a target, pixels with this label count nowhere.

    Without features there is the category part alone. The layers' numbers of channels may differ, and their sizes: the maps are
    compared at the smallest size among the layers, to which the others are average-pooled.

    >>> import torch
    >>> loss = DSDLoss()
    >>> logits, layers = torch.rand(2, 3, 8, 8), [torch.rand(2, 4, 8, 8), torch.rand(2, 8, 4, 4)]
    >>> value = loss(logits, logits, student_features=layers, teacher_features=[3 * x for x in layers])
    >>> value.abs() < 1e-6, sorted(loss.parts)
    (tensor(True), ['category', 'pixel'])
    """

    def __init__(
        self,
        category_weight: float = 1.0,
        pixel_weight: float = 1.0,
        temperature: float = 4.0,
        pool: int | Sequence[int] | None = 2,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        settings.check_number(category_weight=category_weight, pixel_weight=pixel_weight)
        settings.check_temperature(temperature)
        pooling.check_pool(pool)
        settings.check_whole("ignore_index", ignore_index)
        self.category_weight = category_weight
        self.pixel_weight = pixel_weight
        self.temperature = temperature
        self.pool = pool
        self.ignore_index = ignore_index

    def forward(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        target: torch.Tensor | None = None,
        student_features: Sequence[torch.Tensor] = (),
        teacher_features: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """student, teacher: logits [B, C, *S]; target: labels, of any size; features: the layers', [B, c, *s], at least two."""
        parts = {}
        if self.category_weight:
            parts["category"] = self._category(student, teacher, target)
        if self.pixel_weight and (student_features or teacher_features):
            common.check_layers(student_features, teacher_features, at_least=2)
            parts["pixel"] = self._pixel(student_features, teacher_features, target)
        self.parts = {name: part.detach() for name, part in parts.items()}
        return common.weighted_sum(student, {name: (getattr(self, f"{name}_weight"), x) for name, x in parts.items()})

    def _category(self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
        student, teacher = common.to_common_size(student, teacher)
        mask = common.counted(target, student, self.ignore_index)
        student, left = pooling.average_pooled(student, self.pool, mask)
        teacher, _ = pooling.average_pooled(teacher, self.pool, mask)
        return functional.channel_relation(
            student, teacher, relation="softmax", temperature=self.temperature, mask=left
        )

    def _pixel(
        self, students: Sequence[torch.Tensor], teachers: Sequence[torch.Tensor], target: torch.Tensor | None
    ) -> torch.Tensor:
        for s, t in zip(students, teachers, strict=True):
            common.check_dims(s, t)
        size = tuple(min(sizes) for sizes in zip(*(x.shape[2:] for x in (*students, *teachers)), strict=True))
        students, teachers = ([common.to_size(x, size) for x in layers] for layers in (students, teachers))
        mask = common.counted(target, students[0], self.ignore_index)
        residual_s, residual_t = (self._residuals(layers, mask) for layers in (students, teachers))
        counts = None if mask is None else mask.flatten(1).repeat(math.comb(len(students), 2), 1)
        return common.mean_square(residual_s, residual_t, counts)

    @staticmethod
    def _residuals(layers: Sequence[torch.Tensor], mask: torch.Tensor | None) -> torch.Tensor:
        """Of every two layers the difference of their attention maps, of unit norm: [pairs · B, N]."""
        maps = [functional.attention_map(x, mask=mask).flatten(1) for x in layers]
        residuals = torch.cat([second - first for first, second in itertools.combinations(maps, 2)])
        # as F.normalize, whose backward has a pass of its own for norms of 0
        return residuals / residuals.square().sum(1, keepdim=True).clamp(min=1e-24).sqrt()
