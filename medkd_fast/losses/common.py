"""What the losses share: maps of one size, the pixels that count, adapters, binary heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from medkd_fast import functional
from medkd_fast.ops.common import check_integers, check_map, check_one_label, labels, of_heads
from medkd_fast.ops.decoupled_kl import check_same_classes
from medkd_fast.reference.common import which_count

Pool = Callable[..., torch.Tensor]
ADAPTIVE_POOL: dict[int, Pool] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


class DistillationLoss(nn.Module):
    """A module called as `loss(student, teacher, target)`. `parts` holds the last call's parts, detached and unweighted."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, torch.Tensor] = {}

    def extra_repr(self) -> str:
        settings = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return ", ".join(f"{name}={value!r}" for name, value in settings.items() if name not in ("training", "parts"))


class AdaptedLoss(DistillationLoss):
    """A loss that needs equal numbers of channels, or an adapter on the student."""

    adapter: nn.Module | None

    def adapt(self, student_channels: int, teacher_channels: int) -> None:
        """Makes the adapter, as `student_channels` and `teacher_channels` of the constructor do, unless there is one."""
        if self.adapter is None:
            self.adapter = self._adapter(student_channels, teacher_channels)

    def _adapter(self, student_channels: int | None, teacher_channels: int | None) -> nn.Module | None:
        return make_adapter(student_channels, teacher_channels)


def wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in the type of the arithmetic: float32, or float64 as it came."""
    return x if x.dtype == torch.float64 else x.float()


def check_dims(student: torch.Tensor, teacher: torch.Tensor) -> None:
    check_map("student", student)
    check_map("teacher", teacher)
    if student.dim() != teacher.dim() or student.shape[0] != teacher.shape[0] or not 3 <= student.dim() <= 5:
        raise ValueError(
            f"student and teacher: got shapes {tuple(student.shape)} and {tuple(teacher.shape)}, "
            "want [B, C, *S] with the same B and the same one, two or three spatial dimensions"
        )
    if teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "teacher requires grad, and the loss gives it none; pass teacher.detach(), or run it under no_grad"
        )


def averaged(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """`x` averaged to a `size` that is nowhere larger; regions of unequal size overlap by a pixel."""
    have = x.shape[2:]
    if not any(a % b for a, b in zip(have, size, strict=True)):
        return functional.average_pool(x, [a // b for a, b in zip(have, size, strict=True)]).pooled
    return ADAPTIVE_POOL[x.dim() - 2](wide(x), tuple(size))


def to_size(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """`x` at `size`: averaged along axes where it is larger, linear in between along axes where it is smaller."""
    dims, size = x.dim() - 2, tuple(size)
    smaller = tuple(min(a, b) for a, b in zip(x.shape[2:], size, strict=True))
    if x.shape[2:] != smaller:
        x = averaged(x, smaller)
    if smaller != size:
        x = F.interpolate(wide(x), size=size, mode=LINEAR[dims], align_corners=False)
    return x


def to_teacher_size(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The student at the teacher's size. For losses on logits, whose small structures averaging would take away."""
    check_dims(student, teacher)
    return student if student.shape[2:] == teacher.shape[2:] else to_size(student, teacher.shape[2:])


def to_common_size(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both maps average-pooled to the smaller size along every axis; a map of that size is returned as it is."""
    check_dims(student, teacher)
    if student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    size = tuple(min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True))
    return to_size(student, size), to_size(teacher, size)


def check_target(target: torch.Tensor) -> None:
    if not isinstance(target, torch.Tensor):
        raise TypeError(f"target: got {type(target).__name__}, want labels [B, *S]; this loss needs them")


def resized_labels(target: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Labels [B, *S] or [B, 1, *S] at the spatial size of `like`, by the nearest pixel (the lower index of two)."""
    check_target(target)
    check_one_label(target, like)
    if target.dim() == like.dim() and target.shape[1] == 1:
        target = target.squeeze(1)
    if target.dim() != like.dim() - 1:
        raise ValueError(
            f"target: got shape {tuple(target.shape)}, want [B, *S] or [B, 1, *S] with {like.dim() - 2} spatial dimensions"
        )
    for axis, size in enumerate(like.shape[2:], start=1):
        have = target.shape[axis]
        if have != size:
            nearest = torch.arange(size, device=target.device) * have // size
            target = target.index_select(axis, nearest)
    return labels(target, like)


def counted(target: torch.Tensor | None, like: torch.Tensor, ignore_index: int) -> torch.Tensor | None:
    """Which pixels [B, *S] of a map count: all (None) without a target, else those with another label than ignore_index.

    Of labels of sigmoid heads, [B, heads, *S], those that not all heads ignore.
    """
    if target is None:
        return None
    if of_heads(target, like):
        check_integers(target)
        return resized_labels(which_count(target, ignore_index).any(1).byte(), like) != 0
    return which_count(resized_labels(target, like), ignore_index)


def counted_of_heads(target: torch.Tensor | None, like: torch.Tensor, ignore_index: int) -> torch.Tensor | None:
    """`counted` for every head [B·C, *S]: from labels of its own, [B, C, *S], or from those that all heads share."""
    if target is None:
        return None
    if not of_heads(target, like):
        return which_count(resized_labels(target, like), ignore_index).repeat_interleave(like.shape[1], 0)
    if target.shape[1] != like.shape[1]:
        raise ValueError(
            f"target: got shape {tuple(target.shape)}, want {like.shape[1]} channels as the logits have, or one for all heads"
        )
    return which_count(resized_labels(target.flatten(0, 1), like.flatten(0, 1).unsqueeze(1)), ignore_index)


def squared_difference(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The sum of squared differences of maps in a type of the arithmetic, in the wider of the two."""
    return (student - teacher).square().sum()


def mean_square(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean squared difference of two maps [B, *S], both 0 at pixels that do not count, over the others; without any, 0."""
    return squared_difference(student, teacher) / (student.numel() if mask is None else mask.sum().clamp(min=1))


def check_layers(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], at_least: int) -> None:
    """As many features of the student as of the teacher."""
    if len(student) != len(teacher) or len(student) < at_least:
        raise ValueError(
            f"student_features and teacher_features: got {len(student)} and {len(teacher)} layers, want the same number, at "
            f"least {at_least}"
        )


def weighted(part: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
    """weight · part, in memory of its own.

    No product with 1: where the part is also kept, detached, code compiled by torch 2.14 or 2.15 gives that in the product's
    place, and the loss is without a gradient.
    """
    return part.clone() if not isinstance(weight, torch.Tensor) and weight == 1 else part * weight


def weighted_sum(student: torch.Tensor, terms: dict[str, tuple[float, torch.Tensor]]) -> torch.Tensor:
    """Σ weight · part in the type of the arithmetic; 0 without any."""
    loss = None
    for weight, part in terms.values():
        loss = weighted(part, weight) if loss is None else torch.add(loss, part, alpha=weight)
    return loss if loss is not None else wide(student.new_zeros(()))


def check_channels(student_channels: int | None, teacher_channels: int | None) -> None:
    if (student_channels is None) != (teacher_channels is None):
        raise ValueError(
            f"student_channels and teacher_channels: got {student_channels} and {teacher_channels}, want both or neither"
        )


def make_adapter(
    student_channels: int | None, teacher_channels: int | None, even_if_equal: bool = False
) -> PixelwiseConv | None:
    """A 1×1 convolution from the student's channels to the teacher's; over flattened pixels, so for 2-D and 3-D alike."""
    check_channels(student_channels, teacher_channels)
    if student_channels is None or teacher_channels is None:
        return None
    if student_channels == teacher_channels and not even_if_equal:
        return None
    return PixelwiseConv(student_channels, teacher_channels, kernel_size=1, bias=False)


class PixelwiseConv(nn.Conv1d):
    """A convolution of size 1 as a product: of the other's strides torch.compile knows too little where sizes change."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight.squeeze(2) @ x


def adapted(
    adapter: nn.Module | None, student: torch.Tensor, teacher: torch.Tensor, loss: nn.Module, part: str = "it"
) -> torch.Tensor:
    """The student through the adapter of `loss`, or as it is where the channels agree."""
    if adapter is not None:
        x = student.flatten(2).to(next(adapter.parameters()).dtype)
        student = adapter(x).unflatten(2, student.shape[2:])
    if student.shape[1] != teacher.shape[1]:
        name = type(loss).__name__
        raise ValueError(
            f"student and teacher: got {student.shape[1]} and {teacher.shape[1]} channels; {part} needs equal numbers or an "
            f"adapter: {name}(student_channels={student.shape[1]}, teacher_channels={teacher.shape[1]}), which "
            "Distiller(..., example=images) makes by itself"
        )
    return student


def check_activation(activation: str) -> None:
    if activation not in ("softmax", "sigmoid"):
        raise ValueError(
            f"activation: got {activation!r}, want 'softmax', or 'sigmoid' for binary and multi-label heads"
        )


def check_heads(student: torch.Tensor, teacher: torch.Tensor) -> None:
    """For logits of sigmoid heads, before `as_two_classes` gives them shapes that nobody gave."""
    check_dims(student, teacher)
    check_same_classes(student, teacher)


def as_two_classes(x: torch.Tensor) -> torch.Tensor:
    """Logits of sigmoid heads [B, C, *S] as those of two classes, [B·C, 2, *S]: softmax of [0, x] is [1 − σ(x), σ(x)]."""
    return torch.stack([torch.zeros_like(x), x], 2).flatten(0, 1)


def labels_of_heads(target: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Labels of every head [B·C, *S] from [B, C, *S], or from [B, *S] or [B, 1, *S] that all heads share."""
    check_target(target)
    heads = target.unsqueeze(1) if target.dim() == like.dim() - 1 else target
    want = tuple(like.shape)
    if tuple(heads.shape) not in (want, (want[0], 1, *want[2:])):
        raise ValueError(
            f"target: got shape {tuple(target.shape)}, want {want}, or one for all heads: {(want[0], *want[2:])}"
        )
    check_integers(target)
    return heads.expand_as(like).flatten(0, 1)
