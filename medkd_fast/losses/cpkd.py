"""Channel-wise and pixel-wise relational distillation: Xiong and Yu, Proc. SPIE 13213, 2024."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from medkd_fast import functional

Pool = Callable[..., torch.Tensor]
ADAPTIVE_POOL: dict[int, Pool] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
POOL: dict[int, Pool] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


class CPKDLoss(nn.Module):
    """channel_weight · channel relation + pixel_weight · pixel relation, on logits or on features.

    The student learns how channels correlate with each other over the image and how pixels correlate with each other over
    the channels. Only the abstract of the paper is public; its "correlation" has three readings:

    * `relation="cosine"`, `divergence="mse"`, the default: affinity matrices of normalised rows, mean squared difference.
      It is what the structured distillation that the paper builds on does (SKD), is bounded whatever the scale of the
      features, and needs no temperature.
    * `relation="pearson"`: rows centred first, as its words inter-class and intra-class correlation suggest (DIST).
    * `divergence="kl"`: rows through a softmax at `temperature`, then KL (CIRKD).

    Args:
        channel_weight, pixel_weight: weights of the parts; 0 leaves a part out.
        relation, divergence, temperature: passed to `functional.channel_relation` and `pixel_relation`; the temperature
            acts with `divergence="kl"`.
        pool: average-pools both sides by this factor before the pixel part (a rest at the border is averaged over what
            is there).
        student_channels, teacher_channels: where the numbers of channels differ, the channel part needs a 1×1 convolution on
            the student, made when the two are given; train its parameters along. The pixel part needs nothing.

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
        pool: int | None = None,
        student_channels: int | None = None,
        teacher_channels: int | None = None,
    ) -> None:
        super().__init__()
        if (student_channels is None) != (teacher_channels is None):
            raise ValueError(
                f"student_channels and teacher_channels: got {student_channels} and {teacher_channels}, want both or neither"
            )
        if pool is not None and pool < 1:
            raise ValueError(f"pool: got {pool}, want a whole number of at least 1, or None")
        self.channel_weight = channel_weight
        self.pixel_weight = pixel_weight
        self.relation = relation
        self.divergence = divergence
        self.temperature = temperature
        self.pool = pool
        self.adapter: nn.Module | None = None
        if student_channels is not None and teacher_channels is not None and student_channels != teacher_channels:
            # over flattened pixels, so that it serves 2-D and 3-D alike
            self.adapter = nn.Conv1d(student_channels, teacher_channels, kernel_size=1, bias=False)
        self.parts: dict[str, torch.Tensor] = {}

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        """student, teacher: maps [B, C, *S]. The target is taken for uniformity: relations need no labels."""
        student, teacher = to_common_size(student, teacher)
        loss = student.new_zeros((), dtype=torch.float64 if student.dtype == torch.float64 else torch.float32)
        parts = {}
        if self.channel_weight:
            parts["channel"] = functional.channel_relation(
                self._adapted(student, teacher),
                teacher,
                relation=self.relation,
                divergence=self.divergence,
                temperature=self.temperature,
            )
            loss = loss + self.channel_weight * parts["channel"]
        if self.pixel_weight:
            if self.pool is not None and self.pool > 1:
                pool = POOL[student.dim() - 2]
                size = self.pool
                student, teacher = (pool(x, size, ceil_mode=True, count_include_pad=False) for x in (student, teacher))
            parts["pixel"] = functional.pixel_relation(
                student,
                teacher,
                relation=self.relation,
                divergence=self.divergence,
                temperature=self.temperature,
            )
            loss = loss + self.pixel_weight * parts["pixel"]
        self.parts = {name: part.detach() for name, part in parts.items()}
        return loss

    def _adapted(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        if self.adapter is not None:
            return self.adapter(student.flatten(2)).unflatten(2, student.shape[2:])
        if student.shape[1] != teacher.shape[1]:
            raise ValueError(
                f"student and teacher: got {student.shape[1]} and {teacher.shape[1]} channels; the channel part needs equal "
                f"numbers or an adapter: CPKDLoss(student_channels={student.shape[1]}, teacher_channels={teacher.shape[1]})"
            )
        return student

    def extra_repr(self) -> str:
        return (
            f"channel_weight={self.channel_weight}, pixel_weight={self.pixel_weight}, relation={self.relation!r}, "
            f"divergence={self.divergence!r}, temperature={self.temperature}, pool={self.pool}"
        )


def to_common_size(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both maps average-pooled to the smaller size along every axis; a map of that size is returned as it is."""
    if student.dim() != teacher.dim() or not 3 <= student.dim() <= 5:
        raise ValueError(
            f"student and teacher: got shapes {tuple(student.shape)} and {tuple(teacher.shape)}, "
            "want [B, C, *S] with the same one, two or three spatial dimensions"
        )
    size = tuple(min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True))
    pool = ADAPTIVE_POOL[student.dim() - 2]
    return (
        student if student.shape[2:] == size else pool(student, size),
        teacher if teacher.shape[2:] == size else pool(teacher, size),
    )
