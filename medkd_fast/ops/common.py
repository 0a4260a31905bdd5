"""What every operator needs: argument checks with messages for people, and the guard against second derivatives."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

Result = TypeVar("Result")
REDUCTIONS = ("mean", "sum", "none")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.uint8, torch.int16, torch.int8)
#: Checks that would synchronise a GPU are made there too.
DEBUG = os.environ.get("MEDKD_FAST_DEBUG") == "1"


def check_map(name: str, x: torch.Tensor) -> None:
    """A tensor."""
    if isinstance(x, torch.Tensor):
        return
    first = next(iter(x), 0) if isinstance(x, Mapping) else 0
    hint = f"; of several outputs (deep supervision) take one, such as {name}[{first!r}]"
    raise TypeError(
        f"{name}: got {type(x).__name__}, want a tensor [B, C, *S]{hint * isinstance(x, list | tuple | Mapping)}"
    )


def check_features(name: str, x: torch.Tensor) -> None:
    """A floating tensor [B, C, *S]."""
    check_map(name, x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: got {x.dtype}, want a tensor of float32, bfloat16, float16 or float64")
    if x.dim() < 3:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, want [B, C, *S] with at least one spatial dimension")


def check_pair(student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Student and teacher are floating [B, C, *S] on one device with equal B; only the student may want a gradient."""
    check_features("student", student)
    check_features("teacher", teacher)
    if student.dim() != teacher.dim() or student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"student and teacher: got shapes {tuple(student.shape)} and {tuple(teacher.shape)}, "
            "want the same number of images and of spatial dimensions"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"teacher: got device {teacher.device}, want the student's, {student.device}; move one with .to()"
        )
    if teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "teacher requires grad, and the loss gives it none; pass teacher.detach(), or run it under no_grad"
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, want one of {', '.join(choices)}")


def check_temperature(temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: got {temperature}, want a number above 0")


def check_power(name: str, power: float) -> None:
    if not 1 <= power < float("inf"):
        raise ValueError(f"{name}: got {power}, want a finite number of at least 1")


def per_pixel(name: str, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`x` of shape [B, *S] or [B, 1, *S] as contiguous [B, *S], for `like` of shape [B, C, *S]."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, want a tensor [B, *S]")
    want = (like.shape[0], *like.shape[2:])
    if x.dim() == like.dim() and x.shape[1] == 1:
        x = x.squeeze(1)
    if x.shape != want:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, want {want} or {(want[0], 1, *want[1:])}")
    if x.device != like.device:
        raise ValueError(
            f"{name}: got device {x.device}, want {like.device}, where the features are; move it with .to()"
        )
    return x.contiguous()


def labels(target: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The target as contiguous integer labels [B, *S]."""
    check_one_label(target, like)
    target = per_pixel("target", target, like)
    check_integers(target)
    return target


def of_heads(target: torch.Tensor, like: torch.Tensor) -> bool:
    """Whether labels are those of several classes that do not exclude each other, [B, C, *S] for `like` of that shape."""
    return isinstance(target, torch.Tensor) and target.dim() == like.dim() and target.shape[1] > 1


def check_one_label(target: torch.Tensor, like: torch.Tensor) -> None:
    if of_heads(target, like):
        raise ValueError(
            f"target: got shape {tuple(target.shape)}, want one label a pixel, [B, *S] or [B, 1, *S], of one-hot labels "
            'target.argmax(1); classes that do not exclude each other, [B, C, *S], go with activation="sigmoid" of '
            "KDLoss, DKDLoss and CWDLoss, and with losses on features that need no classes"
        )


def check_integers(target: torch.Tensor) -> None:
    if target.dtype not in INTEGERS:
        raise TypeError(f"target: got {target.dtype}, want integer labels; convert with target.long()")


def check_labels(target: torch.Tensor, classes: int, ignore_index: int) -> None:
    """For the reference. On a GPU only under MEDKD_FAST_DEBUG=1, because looking at the answer synchronises."""
    if target.device.type != "cpu" and not DEBUG or torch.compiler.is_compiling():
        return
    wide = target.long()  # an unsigned type would take -100 for 156
    bad = ((wide < 0) | (wide >= classes)) & (wide != ignore_index)
    if bad.any():
        raise ValueError(
            f"target holds the label {target[bad][0].item()}, want 0 to {classes - 1} or ignore_index ({ignore_index}); "
            "remap the labels, or pass the value to leave out as ignore_index"
        )


def wants_gradient(student: torch.Tensor) -> bool:
    check_derivatives(student)
    return student.requires_grad and torch.is_grad_enabled()


def check_derivatives(student: torch.Tensor) -> None:
    """Raises where others than those of backward are taken, which the kernels would silently make 0."""
    if torch.compiler.is_compiling():
        from medkd_fast.ops.transforms import differentiated  # with Dynamo, which takes longer to import than torch

        other = differentiated()
    else:
        other = forward_ad.unpack_dual(student).tangent is not None
    if other:
        raise RuntimeError(
            "derivatives of torch.func and of forward mode (grad, jvp, jacfwd) are not there in the fused backends; use backward or "
            "torch.autograd.grad, or run this loss inside `with medkd_fast.use_backend('reference'):`"
        )


def savable(x: Any) -> Any:
    """A tensor from `torch.inference_mode`, which autograd does not save, as one that it does; all else as it is."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return x
    return x.clone() if isinstance(x, torch.Tensor) and x.is_inference() else x


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Calls the autograd function of an operator."""
    return function.apply(*(savable(x) for x in args))


def plainly(function: Callable[..., Result], student: torch.Tensor, *args: Any, **settings: Any) -> Result:
    """Calls a reference outside autocast, which would take its matrix products to half precision."""
    device = student.device.type
    # Dynamo of torch 2.10 does not trace the question
    there = device != "meta" if torch.compiler.is_compiling() else torch.amp.autocast_mode.is_autocast_available(device)
    with torch.autocast(device, enabled=False) if there else nullcontext():
        return function(student, *(savable(x) for x in args), **settings)


class FirstOrderOnly(torch.autograd.Function):
    """Passes a gradient on, and raises when somebody differentiates it.

    A gradient that came out of a fused backward has no graph; without this a gradient penalty would silently lack the
    loss's share.
    """

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, name: str, *depends_on: torch.Tensor) -> torch.Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.name}: second derivatives are not there in the fused backends; "
            "run this loss inside `with medkd_fast.use_backend('reference'):`"
        )


def first_order(student: torch.Tensor, gradient: torch.Tensor, name: str, *upstream: torch.Tensor) -> torch.Tensor:
    """The gradient to return from a backward: guarded when a graph of it is being made. It depends on the student and, where that
    does not show in the tensor itself, on what arrived for the results."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return FirstOrderOnly.apply(gradient, name, student, *upstream)
    return gradient
