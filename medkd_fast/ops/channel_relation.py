"""channel_relation: how the channels of student and teacher relate to each other, over all pixels of an image."""

from __future__ import annotations

from typing import Any

import torch

from medkd_fast.backend import UNAVAILABLE, choose
from medkd_fast.ops import common
from medkd_fast.ops.relation import check_relation, pixel_mask
from medkd_fast.reference.channel_relation import channel_relation as reference

RELATIONS = ("cosine", "pearson", "gram", "row", "softmax")


def channel_relation(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    relation: str = "cosine",
    divergence: str = "mse",
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """Mean squared difference between the C×C cosine similarities of the channels of student and teacher.

    The channel-wise part of Xiong and Yu, Proc. SPIE 13213, 2024 (CPKD), in our reading: only its abstract is public.
    Every channel of an image is a vector over the pixels, divided by max(its norm, 1e-12); the relation matrix holds
    the products of every two channels. Close relatives: ICKD (Liu et al., ICCV 2021), which normalises the matrix's rows
    instead, and style losses, which normalise nothing.

    Args:
        student: features or logits [B, C, *S]: float32, bfloat16, float16 or float64, in any memory format; gradients flow
            to it alone.
        teacher: [B, C, *S]; may have another dtype.
        relation: "cosine". Not built yet: "pearson", "gram", "row", "softmax".
        divergence: "mse". Not built yet: "kl".
        temperature: acts with divergence "kl" and relation "softmax".
        mask: [B, *S] or [B, 1, *S], booleans or integers: pixels where it is False or 0 are left out.
        reduction: "mean" over the images that have a valid pixel, "sum", or "none": one value an image, [B].

    Returns:
        The loss, float32 (float64 for float64 inputs). An image without a valid pixel: 0; all of them: 0 with gradient 0.

    Raises:
        ValueError: shapes or devices that do not fit, or a teacher that requires grad.
        TypeError: a dtype that does not fit.
        NotImplementedError: a relation or divergence that is not built yet.

    >>> import torch
    >>> student = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).reshape(1, 2, 1, 2)  # two channels alike
    >>> teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 2, 1, 2)  # two channels apart
    >>> channel_relation(student, teacher)
    tensor(0.5000)
    """
    check_relation("channel_relation", student, teacher, relation, RELATIONS, divergence, temperature, reduction)
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"student and teacher: got {student.shape[1]} and {teacher.shape[1]} channels, want equal numbers; put a 1x1 "
            f"adapter on the student, for example torch.nn.Conv2d({student.shape[1]}, {teacher.shape[1]}, kernel_size=1)"
        )
    mask = pixel_mask(mask, student)
    if choose("channel_relation", student.device.type) == "reference":
        return common.plainly(reference, student, teacher, mask, reduction)
    if common.wants_gradient(student):
        return ChannelRelation.apply(student, teacher, mask, reduction)
    return torch.ops.medkd_fast.channel_relation_cpp(student, teacher, mask, reduction)[0]


class ChannelRelation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, reduction: str
    ) -> torch.Tensor:
        loss, matrix = torch.ops.medkd_fast.channel_relation_cpp(student, teacher, mask, reduction)
        ctx.save_for_backward(student, mask, matrix)
        return loss

    @staticmethod
    def backward(ctx: Any, v_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        student, mask, matrix = ctx.saved_tensors
        gradient = torch.ops.medkd_fast.channel_relation_backward_cpp(student, mask, matrix, v_loss)
        return common.first_order(student, gradient, "channel_relation"), None, None, None


if not UNAVAILABLE["cpp"]:

    @torch.library.register_fake("medkd_fast::channel_relation_cpp")
    def _fake(
        student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, reduction: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        images, channels = student.shape[:2]
        dtype = common.arithmetic(student, teacher)
        loss = student.new_empty((images,) if reduction == "none" else (), dtype=dtype)
        return loss, student.new_empty((images, channels, channels), dtype=dtype)

    @torch.library.register_fake("medkd_fast::channel_relation_backward_cpp")
    def _fake_backward(
        student: torch.Tensor, mask: torch.Tensor | None, matrix: torch.Tensor, upstream: torch.Tensor
    ) -> torch.Tensor:
        return torch.empty_like(student)
