"""Channel-wise and Pixel-wise Relational Distillation (CPKD): Xiong and Yu, Proc. SPIE 13213, 2024."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from medkd_fast import functional
from medkd_fast.losses import common, pooling, settings
from medkd_fast.ops.channel_relation import RELATIONS as CHANNEL_RELATIONS
from medkd_fast.ops.common import check_choice
from medkd_fast.ops.pixel_relation import RELATIONS as PIXEL_RELATIONS
from medkd_fast.ops.relation import DIVERGENCES


class CPKDLoss(common.AdaptedLoss):
    """channel_weight · difference of channel relations + pixel_weight · difference of pixel relations.

    On logits or on features, the student learns how channels correlate with each other over the image and how pixels
    correlate with each other over the channels. Only the abstract of the paper is public; its "correlation" has three readings:

    * `relation="cosine"`, `divergence="mse"`, the default: affinity matrices of normalised rows, mean squared difference.
      It is what the structured distillation that the paper builds on does (SKD), is bounded whatever the scale of the
      features, and needs no temperature.
    * `relation="pearson"`: rows centred first, as its words inter-class and intra-class correlation suggest (DIST).
    * `divergence="kl"`: rows through a softmax at `temperature`, then KL (CIRKD).

    Other codes: none is public.

    Weight: not in the abstract; the demo of this package takes 0.3 on a decoder feature.

    Cost: one pass over student and teacher each for channels and pixels and as much backward, C² · V operations ("kl": two
    passes over all pairs of pixels); memory: the gradient.

    Args:
        channel_weight, pixel_weight: weights of the parts; 0 leaves a part out.
        relation, divergence, temperature: passed to `functional.channel_relation` and `pixel_relation`; the temperature
            acts with `divergence="kl"`.
        pool: average-pools both sides by this factor, or one for each axis, before the pixel part (a rest at the border is averaged
            over what is there).
        student_channels, teacher_channels: where the numbers of channels differ, the channel part needs a 1×1 convolution on
            the student, made when the two are given; train its parameters along. The pixel part needs nothing.
        ignore_index: with a target, pixels with this label (at the maps' size, by the nearest pixel) do not count.

    Maps of unequal size: the larger one is average-pooled to the smaller one's size, axis by axis.

    >>> import torch
    >>> loss = CPKDLoss()
    >>> features = torch.eye(4).reshape(1, 4, 2, 2)
    >>> loss(features, 3 * features).item(), sorted(loss.parts)
    (0.0, ['channel', 'pixel'])
    """

    def __init__(
        self,
        channel_weight: float = 1.0,
        pixel_weight: float = 1.0,
        relation: str = "cosine",
        divergence: str = "mse",
        temperature: float = 0.1,
        pool: int | Sequence[int] | None = None,
        student_channels: int | None = None,
        teacher_channels: int | None = None,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        settings.check_number(channel_weight=channel_weight, pixel_weight=pixel_weight)
        # without the pixel part those of channels alone are there too
        check_choice("relation", relation, PIXEL_RELATIONS if pixel_weight else CHANNEL_RELATIONS)
        check_choice("divergence", divergence, DIVERGENCES)
        if relation == "softmax" and divergence == "kl":
            raise ValueError("divergence: got 'kl' with relation='softmax', want 'mse', or another relation")
        settings.check_temperature(temperature)
        pooling.check_pool(pool)
        settings.check_whole("ignore_index", ignore_index)
        self.channel_weight = channel_weight
        self.pixel_weight = pixel_weight
        self.relation = relation
        self.divergence = divergence
        self.temperature = temperature
        self.pool = pool
        self.ignore_index = ignore_index
        self.adapter = self._adapter(student_channels, teacher_channels)

    def adapt(self, student_channels: int, teacher_channels: int) -> None:
        if self.channel_weight:  # the pixel part needs none, and would leave it without a gradient
            super().adapt(student_channels, teacher_channels)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        """student, teacher: maps [B, C, *S]. target: labels, of any size; relations need them for ignored pixels alone."""
        student, teacher = common.to_common_size(student, teacher)
        mask = common.counted(target, student, self.ignore_index)
        parts = {}
        if self.channel_weight:
            parts["channel"] = functional.channel_relation(
                common.adapted(self.adapter, student, teacher, self, "the channel part"),
                teacher,
                relation=self.relation,
                divergence=self.divergence,
                temperature=self.temperature,
                mask=mask,
            )
        if self.pixel_weight:
            student, left = pooling.average_pooled(student, self.pool, mask)
            teacher, _ = pooling.average_pooled(teacher, self.pool, mask)
            parts["pixel"] = functional.pixel_relation(
                student,
                teacher,
                relation=self.relation,
                divergence=self.divergence,
                temperature=self.temperature,
                mask=left,
            )
        self.parts = {name: part.detach() for name, part in parts.items()}
        return common.weighted_sum(student, {name: (getattr(self, f"{name}_weight"), x) for name, x in parts.items()})
