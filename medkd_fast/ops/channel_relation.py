"""channel_relation: how the channels of student and teacher relate to each other, over all pixels of an image."""

from __future__ import annotations

from typing import Any

import torch

from medkd_fast.backend import choose, kernel, shapes_of
from medkd_fast.ops import common
from medkd_fast.ops.relation import check_relation, pixel_mask
from medkd_fast.reference.channel_relation import channel_relation as reference
from medkd_fast.reference.common import arithmetic

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
    """How far the C×C relations between the channels of student and teacher are apart.

    The channel-wise part of Xiong and Yu, Proc. SPIE 13213, 2024 (CPKD), in our reading: only its abstract is public. A
    channel of an image is a vector over its pixels, and entry (c, k) of the relation compares two of them.

    Args:
        student: features or logits [B, C, *S]: float32, bfloat16, float16 or float64, in any memory format; gradients
            flow to it alone.
        teacher: [B, C, *S]; may have another dtype.
        relation: "cosine": products of channels divided by max(their L2 norm, 1e-12). "pearson": the same of channels
            minus their mean. "gram": plain products over the number of pixels that count, as in style losses. "row":
            plain products, then every row of the matrix divided by max(its L2 norm, 1e-12), as in ICKD (Liu et al.,
            ICCV 2021). "softmax": products of the channels' softmaxes over the pixels at `temperature`, as in
            double-similarity distillation (Feng et al., TIP 2021).
        divergence: "mse": mean of the squared differences of the C² entries. "kl": KL(softmax(teacher row /
            temperature) ‖ softmax(student row / temperature)), mean over the rows, not multiplied by temperature².
        temperature: acts with divergence "kl" and with relation "softmax".
        mask: [B, *S] or [B, 1, *S], booleans or integers: pixels where it is False or 0 are left out.
        reduction: "mean" over the images that have a valid pixel, "sum", or "none": one value an image, [B].

    Returns:
        The loss, float32 (float64 for float64 inputs). An image without a valid pixel: 0; all of them: 0 with gradient
        0.

    Raises:
        ValueError: shapes or devices that do not fit, relation "softmax" with divergence "kl", or a teacher that
            requires grad.
        TypeError: a dtype that does not fit.

    >>> import torch
    >>> student = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).reshape(1, 2, 1, 2)  # two channels alike
    >>> teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 2, 1, 2)  # two channels apart
    >>> channel_relation(student, teacher)
    tensor(0.5000)
    """
    check_relation(student, teacher, relation, RELATIONS, divergence, temperature, reduction)
    check_channels(student, teacher)
    if relation == "softmax" and divergence == "kl":
        raise ValueError(
            "divergence: got 'kl' with relation='softmax', whose rows are products of probabilities and no scores; "
            "want divergence='mse', or another relation"
        )
    mask = pixel_mask(mask, student)
    settings = (relation, divergence, temperature, reduction)
    backend = choose("channel_relation", student.device.type, student.numel(), student.shape[1])
    if backend == "reference":
        return common.plainly(reference, student, teacher, mask, *settings)
    if common.wants_gradient(student):
        return common.apply(ChannelRelation, student, teacher, mask, backend, *settings)
    return kernel("channel_relation", backend)(student, teacher, mask, *settings)[0]


def check_channels(student: torch.Tensor, teacher: torch.Tensor) -> None:
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"student and teacher: got {student.shape[1]} and {teacher.shape[1]} channels, want equal numbers; put a 1x1 "
            f"adapter on the student, for example torch.nn.Conv2d({student.shape[1]}, {teacher.shape[1]}, kernel_size=1)"
        )


class ChannelRelation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        mask: torch.Tensor | None,
        backend: str,
        relation: str,
        divergence: str,
        temperature: float,
        reduction: str,
    ) -> torch.Tensor:
        loss, matrix = kernel("channel_relation", backend)(
            student, teacher, mask, relation, divergence, temperature, reduction
        )
        ctx.save_for_backward(student, mask, matrix)
        ctx.backend, ctx.settings = backend, (relation, temperature)
        return loss

    @staticmethod
    def backward(ctx: Any, v_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        student, mask, matrix = ctx.saved_tensors
        backward = kernel("channel_relation_backward", ctx.backend)
        gradient = backward(student, mask, matrix, v_loss, *ctx.settings)
        return common.first_order(student, gradient, "channel_relation"), None, None, None, None, None, None, None


@shapes_of("channel_relation")
def _fake(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    relation: str,
    divergence: str,
    temperature: float,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    images, channels = student.shape[:2]
    rows = channels + int(relation in ("pearson", "softmax"))  # a symbolic size takes no bool, before torch 2.13
    dtype = arithmetic(student, teacher)
    loss = student.new_empty((images,) if reduction == "none" else (), dtype=dtype)
    return loss, student.new_empty((images, rows, rows), dtype=dtype)


@shapes_of("channel_relation_backward")
def _fake_backward(
    student: torch.Tensor,
    mask: torch.Tensor | None,
    matrix: torch.Tensor,
    upstream: torch.Tensor,
    relation: str,
    temperature: float,
) -> torch.Tensor:
    return torch.empty_like(student)
