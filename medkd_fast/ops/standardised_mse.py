"""standardised_mse: how far features are apart when every channel is taken to mean 0 and variance 1."""

from __future__ import annotations

from typing import Any

import torch

from medkd_fast.backend import choose, kernel, shapes_of
from medkd_fast.ops import common
from medkd_fast.ops.channel_relation import check_channels
from medkd_fast.ops.relation import check_sizes, pixel_mask
from medkd_fast.reference.common import arithmetic
from medkd_fast.reference.standardised_mse import standardised_mse as reference


def standardised_mse(
    student: torch.Tensor, teacher: torch.Tensor, *, mask: torch.Tensor | None = None, process_group: Any = None
) -> torch.Tensor:
    """Mean squared difference of features standardised channel by channel: minus the mean, over (standard deviation + 1e-6).

    Both over all pixels of the batch that count, the deviation with n − 1. (Cao et al., PKD, NeurIPS 2022, equation 3, whose loss
    is half of this.) Up to the 1e-6 it is 2 · (1 − r), r the channels' mean Pearson correlation.

    Args:
        student: features [B, C, *S]: float32, bfloat16, float16 or float64, in any memory format; gradients flow to it
            alone.
        teacher: [B, C, *S]; may have another dtype.
        mask: [B, *S] or [B, 1, *S], booleans or integers: pixels where it is False or 0 are in no statistic and no mean.
        process_group: sums are taken over the batches of this group of processes, for example
            `torch.distributed.group.WORLD`; every process must call. With DistributedDataParallel, which takes the mean of
            gradients, they are then those of one process with all the images. None: over this process's batch alone.

    Returns:
        The loss, float32 (float64 for float64 inputs). A channel whose deviation is below 1e-7 of its size counts as
        constant. No valid pixel: 0.

    Raises:
        ValueError: shapes or devices that do not fit, or a teacher that requires grad.
        TypeError: a dtype that does not fit.

    >>> import torch
    >>> teacher = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 2, 2)
    >>> print(f"{standardised_mse(-teacher, teacher).item():.4f}")  # 4 · (n − 1) / n
    3.0000
    """
    common.check_pair(student, teacher)
    check_sizes(student, teacher)
    check_channels(student, teacher)
    mask = pixel_mask(mask, student)
    backend = choose("standardised_mse", student.device.type, student.numel())
    if backend == "reference":
        return common.plainly(reference, student, teacher, mask, process_group)
    common.check_derivatives(student)
    return common.apply(StandardisedMSE, student, teacher, mask, backend, process_group)


class StandardisedMSE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        mask: torch.Tensor | None,
        backend: str,
        process_group: Any,
    ) -> torch.Tensor:
        sums = kernel("standardised_mse", backend)(student, teacher, mask)
        ctx.processes = 1
        if process_group is not None:
            torch.distributed.all_reduce(sums, group=process_group)
            ctx.processes = torch.distributed.get_world_size(process_group)
        single = arithmetic(student, teacher) == torch.float32
        loss, coefficients = kernel("standardised_mse_terms", backend)(sums, single)
        ctx.save_for_backward(student, teacher, mask, coefficients)
        ctx.backend = backend
        return loss

    @staticmethod
    def backward(ctx: Any, v_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # the loss of every process hangs on this one's pixels
        upstream = v_loss if ctx.processes == 1 else v_loss * ctx.processes
        student, *state = ctx.saved_tensors  # once: a checkpoint gives them no second time
        gradient = kernel("standardised_mse_backward", ctx.backend)(student, *state, upstream)
        return common.first_order(student, gradient, "standardised_mse"), None, None, None, None


@shapes_of("standardised_mse")
def _fake(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return student.new_empty(1 + 5 * student.shape[1], dtype=torch.float64)


@shapes_of("standardised_mse_terms")
def _fake_terms(sums: torch.Tensor, single: bool) -> tuple[torch.Tensor, torch.Tensor]:
    loss = sums.new_empty((), dtype=torch.float32 if single else torch.float64)
    return loss, sums.new_empty((sums.shape[0] - 1) // 5 * 4)


@shapes_of("standardised_mse_backward")
def _fake_backward(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    coefficients: torch.Tensor,
    upstream: torch.Tensor,
) -> torch.Tensor:
    return torch.empty_like(student)
