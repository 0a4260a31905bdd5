"""decoupled_kl: the KL divergence between class distributions, split into target and non-target classes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from medkd_fast.backend import choose, shapes_of
from medkd_fast.ops import common
from medkd_fast.ops.pixel_loss import PixelLoss, call, fake_outputs, holding_sums, upsampled_in_registers
from medkd_fast.reference.common import arithmetic
from medkd_fast.reference.decoupled_kl import decoupled_kl as reference


class DecoupledKL(NamedTuple):
    """What `decoupled_kl` returns. `target` and `nontarget` are detached, for logs."""

    loss: torch.Tensor
    target: torch.Tensor
    nontarget: torch.Tensor


def decoupled_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor,
    *,
    target_weight: float = 1.0,
    nontarget_weight: float = 1.0,
    temperature: float = 4.0,
    ignore_index: int = -100,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
) -> DecoupledKL:
    """Decoupled KL divergence of every pixel: target_weight * TCKD + nontarget_weight * NCKD, each times temperature².

    TCKD is the divergence between the Bernoulli distributions {label, any other class}; NCKD the divergence between the
    distributions over the other classes. (Zhao et al., Decoupled Knowledge Distillation, CVPR 2022, equations 5 to 7, at
    every pixel. With both weights 1 it is not the ordinary KL divergence: that weighs NCKD with the teacher's 1 − p(label).)
    Differences to the authors' code: log-odds instead of logarithms of masked probabilities, so nothing underflows; a
    pixel's value is not averaged over images but over valid pixels.

    Args:
        student: logits [B, C, *S], or [B, C, *smaller]: upsampled inside the kernel (linear, align_corners=False).
            float32, bfloat16, float16 or float64, in any memory format; gradients flow to it alone.
        teacher: logits [B, C, *S], C >= 2; may have another dtype.
        target: labels [B, *S] or [B, 1, *S], any integer dtype, in [0, C) or `ignore_index`.
        temperature: divides both logits.
        weight: [B, *S], weight of every pixel; weight 0 leaves a pixel out.
        reduction: "mean" over valid pixels (weighted), "sum", or "none": [B, *S].

    Returns:
        DecoupledKL(loss, target, nontarget), float32 (float64 for float64 inputs). The two parts carry temperature² but not
        target_weight and nontarget_weight. No valid pixel: 0.

    Raises:
        ValueError: shapes or devices that do not fit, C < 2, or a teacher that requires grad.
        RuntimeError, or ValueError from plain PyTorch: a label outside. On a GPU, where looking would synchronise, the loss is
            no number instead.
        TypeError: a dtype that does not fit.

    >>> import torch
    >>> student = torch.tensor([[2.0, 0.0, 0.0]]).reshape(1, 3, 1, 1).requires_grad_()
    >>> teacher = torch.tensor([[2.0, 1.0, 0.0]]).reshape(1, 3, 1, 1)
    >>> loss, target, nontarget = decoupled_kl(student, teacher, torch.zeros(1, 1, 1, dtype=torch.long), temperature=1.0)
    >>> loss.backward()
    >>> print(f"{loss.item():.4f} = {target.item():.4f} + {nontarget.item():.4f}")
    0.1505 = 0.0395 + 0.1109
    """
    common.check_pair(student, teacher)
    common.check_temperature(temperature)
    common.check_choice("reduction", reduction, common.REDUCTIONS)
    check_logits(student, teacher)
    target = common.labels(target, teacher)
    weight = pixel_weight(weight, student, teacher)
    settings = (float(target_weight), float(nontarget_weight), float(temperature), int(ignore_index))
    backend = choose(
        "decoupled_kl", student.device.type, teacher.numel(), cuda_first=upsampled_in_registers(student, teacher)
    )
    if backend != "cpp":  # its loops check as they go
        common.check_labels(target, teacher.shape[1], ignore_index)
    if backend == "reference":
        outputs = common.plainly(reference, student, teacher, target, weight, *settings, reduction)
        return DecoupledKL(outputs[0], outputs[1].detach(), outputs[2].detach())
    if common.wants_gradient(student):
        student = holding_sums(student, teacher)
        return DecoupledKL(
            *common.apply(PixelLoss, student, teacher, target, weight, "decoupled_kl", backend, settings, reduction)
        )
    return DecoupledKL(
        *call("decoupled_kl", backend, student, teacher, target, weight, *settings, reduction, False)[:3]
    )


def check_same_classes(student: torch.Tensor, teacher: torch.Tensor) -> None:
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"student and teacher: got {student.shape[1]} and {teacher.shape[1]} classes, want the same classes in the same "
            "order; select the common ones from the teacher's logits"
        )


def check_classes(student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Equal classes, at least two: the softmax of one is constant, without a loss and without a gradient."""
    check_same_classes(student, teacher)
    if student.shape[1] < 2:
        raise ValueError(
            f"student and teacher: got {student.shape[1]} class, want at least 2; a sigmoid head is two classes, [0, logit], "
            'as KDLoss, DKDLoss and CWDLoss make them with activation="sigmoid"'
        )


def check_logits(student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Equal classes, at least two, and a student no larger than the teacher along any axis."""
    check_classes(student, teacher)
    if any(s > t or (s == 0) != (t == 0) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True)):
        raise ValueError(
            f"student: got spatial shape {tuple(student.shape[2:])}, want at most the teacher's, {tuple(teacher.shape[2:])}; "
            "a smaller student is upsampled, for a larger one pool it first"
        )


def pixel_weight(weight: torch.Tensor | None, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor | None:
    """The weight as contiguous [B, *S] in the type of the arithmetic."""
    if weight is None:
        return None
    weight = common.per_pixel("weight", weight, teacher)
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight requires grad, and the loss gives it none; pass weight.detach()")
    return weight.to(arithmetic(student, teacher))


@shapes_of("decoupled_kl")
def _fake(
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    target_weight: float,
    nontarget_weight: float,
    temperature: float,
    ignore_index: int,
    reduction: str,
    need_gradient: bool,
) -> Any:
    return fake_outputs(student, teacher, 3, reduction, need_gradient)
