"""The autograd function that decoupled_kl and class_kl share: value and gradient come out of one pass.

The gradient that the forward leaves is that of the sum, not yet divided by the number of pixels (half precision would
underflow). The backward multiplies it in place by upstream / count, so the gradient is the only buffer of the input's
size. A second backward through a retained graph finds it spent and computes it anew.
"""

from __future__ import annotations

from typing import Any

import torch

from medkd_fast.backend import kernel
from medkd_fast.ops.common import first_order
from medkd_fast.reference.common import arithmetic


def call(operator: str, backend: str, *args: Any) -> tuple[torch.Tensor, ...]:
    """Calls a fused operator; a bad label comes out as ValueError with the operator's own words."""
    if torch.compiler.is_compiling():
        return kernel(operator, backend)(*args)
    try:
        return kernel(operator, backend)(*args)
    except RuntimeError as error:
        where = str(error).find("target holds the label")
        if where < 0:
            raise
        raise ValueError(str(error)[where:].splitlines()[0]) from None


def holding_sums(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The student in a type that holds sums of gradients over all of the teacher's pixels that a pixel of its own stands for.

    In float16 they may be infinite before the division by the number of pixels; an upsampled student is small.
    """
    return student.float() if student.dtype == torch.float16 and student.shape != teacher.shape else student


def upsampled_in_registers(student: torch.Tensor, teacher: torch.Tensor) -> bool:
    """Whether CUDA C++ upsamples the student and holds its classes in registers: by what its machine code says twice as fast as
    Triton, whatever the size (bench/README.md)."""
    return student.shape[2:] != teacher.shape[2:] and teacher.shape[1] <= 32


class PixelLoss(torch.autograd.Function):
    """operator(student, teacher, target, weight, *settings, reduction, need_gradient) -> terms, the first is the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        target: torch.Tensor | None,
        weight: torch.Tensor | None,
        operator: str,
        backend: str,
        settings: tuple[float, ...],
        reduction: str,
    ) -> tuple[torch.Tensor, ...]:
        per_pixel = reduction == "none"
        # a pixel's upstream gradient acts as its weight, which only the backward knows
        *terms, scale, gradient = call(
            operator, backend, student, teacher, target, weight, *settings, reduction, not per_pixel
        )
        ctx.mark_non_differentiable(*terms[1:])
        ctx.save_for_backward(student, teacher, target, weight, scale, gradient)
        ctx.operator, ctx.backend, ctx.settings = operator, backend, settings
        ctx.per_pixel, ctx.spent = per_pixel, False
        return tuple(terms)

    @staticmethod
    def backward(ctx: Any, v_loss: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        student, teacher, target, weight, scale, gradient = ctx.saved_tensors
        if ctx.per_pixel:
            weight = (v_loss if weight is None else v_loss * weight).contiguous()
        if ctx.per_pixel or ctx.spent:
            gradient = call(ctx.operator, ctx.backend, student, teacher, target, weight, *ctx.settings, "sum", True)[-1]
        if not ctx.per_pixel:
            if torch.compiler.is_compiling():
                gradient = gradient * (v_loss * scale)
            else:
                kernel("scale_gradient", ctx.backend)(gradient, v_loss, scale)
                ctx.spent = True
                gradient = gradient.data  # who changes it in place does not change what is saved here
        return first_order(student, gradient, ctx.operator, v_loss), *(None,) * 7


def fake_outputs(student: torch.Tensor, teacher: torch.Tensor, terms: int, reduction: str, need_gradient: bool) -> Any:
    """The shapes of a per-pixel loss's outputs, for torch.compile."""
    dtype = arithmetic(student, teacher)
    shape = (teacher.shape[0], *teacher.shape[2:]) if reduction == "none" else ()
    outputs = [student.new_empty(shape, dtype=dtype) for _ in range(terms)]
    gradient = torch.empty_like(student) if need_gradient else student.new_empty(0)
    return (*outputs, student.new_empty((), dtype=dtype), gradient)
