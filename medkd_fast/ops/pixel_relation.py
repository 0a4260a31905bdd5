"""pixel_relation: how the pixels of student and teacher relate to each other, over the channels of an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from medkd_fast.backend import choose, kernel, shapes_of
from medkd_fast.ops import common
from medkd_fast.ops.max_pool import counted, window_of_maxima
from medkd_fast.ops.relation import check_relation, pixel_mask
from medkd_fast.reference.common import arithmetic
from medkd_fast.reference.max_pool import max_pool as reference_pool
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
    pool: int | Sequence[int] = 1,
    reduction: str = "mean",
) -> torch.Tensor:
    """Difference between the N×N relations of the pixels of student and teacher, which are never held.

    The relation of two pixels is the product of their rows, and a row is a pixel over the channels: divided by
    max(its norm, 1e-12) ("cosine"), centred over the channels first ("pearson"), or over the square root of the network's number
    of channels ("gram"). The difference is

    * `divergence="mse"`: the mean of the squared differences over the N² entries. With "cosine" the pair-wise loss of Liu et
      al., Structured Knowledge Distillation for Semantic Segmentation, CVPR 2019, and the pixel-wise part of Xiong and Yu,
      Proc. SPIE 13213, 2024 (CPKD), in our reading: only its abstract is public. Time grows with N.
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
        pool: max-pools both maps by this window first, as `max_pool` does and Liu et al. do; the mask is that of the pixels before.
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
    window = [] if pool == 1 else window_of_maxima(student, pool, "pool")
    across = bool(across_images)
    B, C, *size = student.shape
    pairs = math.prod(size) * (B if across else 1)  # of a pixel
    backend = choose("pixel_relation", student.device.type, student.numel(), C if divergence == "mse" else pairs)
    if backend == "reference":
        if window:
            student, left = common.plainly(reference_pool, student, mask, window)
            teacher, mask = common.plainly(reference_pool, teacher, mask, window)[0], left
        return common.plainly(reference, student, teacher, mask, relation, divergence, temperature, across, reduction)
    kl = divergence == "kl"
    name = "pixel_relation_kl" if kl else "pixel_relation"
    settings = (relation, temperature, across, reduction) if kl else (relation, across, reduction)
    if common.wants_gradient(student):
        return common.apply(PixelRelation, student, teacher, mask, name, backend, window, settings)
    if window:
        student, teacher, mask, _ = _pooled(student, teacher, mask, backend, window)
    return kernel(name, backend)(student, teacher, mask, *settings)[0]


def _pooled(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, backend: str, window: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Both maps and the mask, pooled, and the places of the student's maxima."""
    pool = kernel("max_pool", backend)
    pooled_s, place = pool(student, mask, window)
    return pooled_s, pool(teacher, mask, window)[0], None if mask is None else counted(place), place


class PixelRelation(torch.autograd.Function):
    """`name`: pixel_relation or pixel_relation_kl, with the settings that it takes; `window`: [] without pooling."""

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        mask: torch.Tensor | None,
        name: str,
        backend: str,
        window: list[int],
        settings: tuple[Any, ...],
    ) -> torch.Tensor:
        before, place = student, None
        if window:
            student, teacher, mask, place = _pooled(student, teacher, mask, backend, window)
        loss, state = kernel(name, backend)(student, teacher, mask, *settings)
        ctx.save_for_backward(before, place, student, teacher, mask, state)
        ctx.name, ctx.backend, ctx.window, ctx.settings = name, backend, window, settings
        return loss

    @staticmethod
    def backward(ctx: Any, v_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        before, place, *saved = ctx.saved_tensors
        gradient = kernel(f"{ctx.name}_backward", ctx.backend)(*saved, v_loss, *ctx.settings)
        if place is not None:
            gradient = kernel("max_pool_backward", ctx.backend)(before, place, gradient, ctx.window)
        return common.first_order(before, gradient, "pixel_relation"), None, None, None, None, None, None


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
