"""pixel_relation: how the pixels of student and teacher relate to each other, over the channels of an image."""

from __future__ import annotations

import math
from typing import Any

import torch

from medkd_fast.backend import choose, kernel, shapes_of
from medkd_fast.ops import common
from medkd_fast.ops.relation import check_relation, pixel_mask
from medkd_fast.reference.common import arithmetic
from medkd_fast.reference.pixel_relation import pixel_relation as reference

RELATIONS = ("cosine", "pearson", "gram")


def pixel_relation(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    relation: str = "cosine",
    divergence: str = "mse",
    temperature: float = 0.1,
    mask: torch.Tensor | None = None,
    across_images: bool = False,
    reduction: str = "mean",
) -> torch.Tensor:
    """Difference between the N×N relations of the pixels of student and teacher, which are never held.

    The relation of two pixels is the product of their rows, and a row is a pixel over the channels: divided by
    max(its norm, 1e-12) ("cosine"), centred over the channels first ("pearson"), or over the square root of the network's number
    of channels ("gram"). The difference is

    * `divergence="mse"`: the mean of the squared differences over the N² entries. With "cosine" the pair-wise loss of Liu et
      al., Structured Knowledge Distillation for Semantic Segmentation, CVPR 2019, and the pixel-wise part of Xiong and Yu,
      Proc. SPIE 13213, 2024 (CPKD), in our reading: only its abstract is public. Time grows with N. Liu et al. pool the
      features first; `CPKDLoss(pool=...)` does.
    * `divergence="kl"`: KL(softmax(teacher's row / temperature) ‖ softmax(student's row / temperature)), mean over the
      rows, not multiplied by temperature². With "cosine" the loss of Yang et al., Cross-Image Relational Knowledge Distillation
      for Semantic Segmentation, CVPR 2022 (CIRKD), whose mini-batch form is `across_images=True`. Time grows with N²,
      memory with N.

    Args:
        student: features or logits [B, C, *S]: float32, bfloat16, float16 or float64, in any memory format; gradients flow
            to it alone.
        teacher: [B, any C, *S]; may have another dtype.
        relation: "cosine", "pearson" or "gram".
        divergence: "mse" or "kl".
        temperature: acts with divergence "kl".
        mask: [B, *S] or [B, 1, *S], booleans or integers: pixels where it is False or 0 are left out, of the mean too.
        across_images: relate the pixels of every image to those of every image, itself among them: B² ordered pairs, the first
            image's pixels being the rows. Memory grows with B² N for "kl".
        reduction: "mean" over the images that have a valid pixel, "sum", or "none": one value an image, [B]. Across images:
            over the pairs of such images, or one value a pair, [B, B].

    Returns:
        The loss, float32 (float64 for float64 inputs). An image without a valid pixel: 0; all of them: 0 with gradient 0.

    Raises:
        ValueError: shapes or devices that do not fit, or a teacher that requires grad.
        TypeError: a dtype that does not fit.

    >>> import torch
    >>> student = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).reshape(1, 2, 1, 2)  # two pixels alike
    >>> teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 2, 1, 2)  # two pixels apart
    >>> pixel_relation(student, teacher)
    tensor(0.5000)
    """
    check_relation(student, teacher, relation, RELATIONS, divergence, temperature, reduction)
    mask = pixel_mask(mask, student)
    across = bool(across_images)
    backend = choose("pixel_relation", student.device.type)
    if backend == "reference":
        return common.plainly(reference, student, teacher, mask, relation, divergence, temperature, across, reduction)
    kl = divergence == "kl"
    if common.wants_gradient(student):
        if kl:
            return PixelRelationKL.apply(student, teacher, mask, backend, relation, temperature, across, reduction)
        return PixelRelation.apply(student, teacher, mask, backend, relation, across, reduction)
    if kl:
        return kernel("pixel_relation_kl", backend)(student, teacher, mask, relation, temperature, across, reduction)[0]
    return kernel("pixel_relation", backend)(student, teacher, mask, relation, across, reduction)[0]


class PixelRelation(torch.autograd.Function):
    """Divergence "mse"."""

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, backend: str, *settings: Any
    ) -> torch.Tensor:
        loss, matrix = kernel("pixel_relation", backend)(student, teacher, mask, *settings)
        ctx.save_for_backward(student, teacher, mask, matrix)
        ctx.backend, ctx.settings = backend, settings
        return loss

    @staticmethod
    def backward(ctx: Any, v_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient = kernel("pixel_relation_backward", ctx.backend)(*ctx.saved_tensors, v_loss, *ctx.settings)
        student = ctx.saved_tensors[0]
        return common.first_order(student, gradient, "pixel_relation"), None, None, None, None, None, None


class PixelRelationKL(torch.autograd.Function):
    """Divergence "kl"."""

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, backend: str, *settings: Any
    ) -> torch.Tensor:
        loss, rows = kernel("pixel_relation_kl", backend)(student, teacher, mask, *settings)
        ctx.save_for_backward(student, teacher, mask, rows)
        ctx.backend, ctx.settings = backend, settings
        return loss

    @staticmethod
    def backward(ctx: Any, v_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient = kernel("pixel_relation_kl_backward", ctx.backend)(*ctx.saved_tensors, v_loss, *ctx.settings)
        student = ctx.saved_tensors[0]
        return common.first_order(student, gradient, "pixel_relation"), None, None, None, None, None, None, None


def _fake_loss(student: torch.Tensor, teacher: torch.Tensor, across_images: bool, reduction: str) -> torch.Tensor:
    size = student.shape[:1] * (2 if across_images else 1) if reduction == "none" else ()
    return student.new_empty(size, dtype=arithmetic(student, teacher))


@shapes_of("pixel_relation")
def _fake(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    relation: str,
    across_images: bool,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    images, channels = student.shape[:2]
    loss = _fake_loss(student, teacher, across_images, reduction)
    return loss, loss.new_empty((images, channels, 2 * max(channels, teacher.shape[1])))


@shapes_of("pixel_relation_backward")
def _fake_backward(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    matrix: torch.Tensor,
    upstream: torch.Tensor,
    relation: str,
    across_images: bool,
    reduction: str,
) -> torch.Tensor:
    return torch.empty_like(student)


@shapes_of("pixel_relation_kl")
def _fake_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    relation: str,
    temperature: float,
    across_images: bool,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    images, padded = student.shape[0], (math.prod(student.shape[2:]) + 63) // 64 * 64
    loss = _fake_loss(student, teacher, across_images, reduction)
    return loss, loss.new_empty((images, images if across_images else 1, 4, padded))


@shapes_of("pixel_relation_kl_backward")
def _fake_kl_backward(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    rows: torch.Tensor,
    upstream: torch.Tensor,
    relation: str,
    temperature: float,
    across_images: bool,
    reduction: str,
) -> torch.Tensor:
    return torch.empty_like(student)
