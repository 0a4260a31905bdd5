"""pixel_relation: how the pixels of student and teacher relate to each other, over the channels of an image."""

from __future__ import annotations

from typing import Any

import torch

from medkd_fast.backend import UNAVAILABLE, choose
from medkd_fast.ops import common
from medkd_fast.ops.relation import check_relation, pixel_mask
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
    """Mean squared difference between the N×N cosine similarities of the pixels of student and teacher.

    The pair-wise loss of Liu et al., Structured Knowledge Distillation for Semantic Segmentation, CVPR 2019, and the
    pixel-wise part of Xiong and Yu, Proc. SPIE 13213, 2024 (CPKD), in our reading: only its abstract is public. Every pixel of
    an image is a vector over the channels, divided by max(its norm, 1e-12). The N×N matrices are never held: memory
    does not grow with N², and time grows with N. Liu et al. pool the features first; `CPKDLoss(pool=...)` does.

    Args:
        student: features or logits [B, C, *S]: float32, bfloat16, float16 or float64, in any memory format; gradients flow
            to it alone.
        teacher: [B, any C, *S]; may have another dtype.
        relation: "cosine". Not built yet: "pearson", "gram".
        divergence: "mse". Not built yet: "kl".
        temperature: acts with divergence "kl".
        mask: [B, *S] or [B, 1, *S], booleans or integers: pixels where it is False or 0 are left out, of the mean too.
        across_images: not built yet.
        reduction: "mean" over the images that have a valid pixel, "sum", or "none": one value an image, [B].

    Returns:
        The loss, float32 (float64 for float64 inputs). An image without a valid pixel: 0; all of them: 0 with gradient 0.

    Raises:
        ValueError: shapes or devices that do not fit, or a teacher that requires grad.
        TypeError: a dtype that does not fit.
        NotImplementedError: a relation, divergence or `across_images` that is not built yet.

    >>> import torch
    >>> student = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).reshape(1, 2, 1, 2)  # two pixels alike
    >>> teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 2, 1, 2)  # two pixels apart
    >>> pixel_relation(student, teacher)
    tensor(0.5000)
    """
    check_relation("pixel_relation", student, teacher, relation, RELATIONS, divergence, temperature, reduction)
    if across_images:
        raise NotImplementedError(
            "pixel_relation: across_images=True is not built yet; what there is: across_images=False, each image by itself"
        )
    mask = pixel_mask(mask, student)
    if choose("pixel_relation", student.device.type) == "reference":
        return common.plainly(reference, student, teacher, mask, reduction)
    if common.wants_gradient(student):
        return PixelRelation.apply(student, teacher, mask, reduction)
    return torch.ops.medkd_fast.pixel_relation_cpp(student, teacher, mask, reduction)[0]


class PixelRelation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, reduction: str
    ) -> torch.Tensor:
        loss, matrix = torch.ops.medkd_fast.pixel_relation_cpp(student, teacher, mask, reduction)
        ctx.save_for_backward(student, teacher, mask, matrix)
        return loss

    @staticmethod
    def backward(ctx: Any, v_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        student, teacher, mask, matrix = ctx.saved_tensors
        gradient = torch.ops.medkd_fast.pixel_relation_backward_cpp(student, teacher, mask, matrix, v_loss)
        return common.first_order(student, gradient, "pixel_relation"), None, None, None


if not UNAVAILABLE["cpp"]:

    @torch.library.register_fake("medkd_fast::pixel_relation_cpp")
    def _fake(
        student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, reduction: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        images, channels = student.shape[:2]
        dtype = common.arithmetic(student, teacher)
        loss = student.new_empty((images,) if reduction == "none" else (), dtype=dtype)
        return loss, student.new_empty((images, channels, 2 * max(channels, teacher.shape[1])), dtype=dtype)

    @torch.library.register_fake("medkd_fast::pixel_relation_backward_cpp")
    def _fake_backward(
        student: torch.Tensor,
        teacher: torch.Tensor,
        mask: torch.Tensor | None,
        matrix: torch.Tensor,
        upstream: torch.Tensor,
    ) -> torch.Tensor:
        return torch.empty_like(student)
