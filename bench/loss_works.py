"""The losses that are measured: each module and its published form on logits [B, 9, H, W] or features [B, 64, h, w]."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import machine
import published_losses
import torch
from works import CLASSES, Call, Work, few_rounds, in_bands

from medkd_fast import losses

LOGITS, FEATURES = (4, CLASSES, 224, 224), (2, 64, 64, 64)

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(shape: tuple[int, ...]) -> Inputs:
    """Student, teacher and labels."""
    device = "cuda" if machine.GPU else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    student, teacher = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
    target = torch.empty((shape[0], *shape[2:]), dtype=torch.long, device=device)
    in_bands(target)
    return student.requires_grad_(), teacher, target


def beside(like: torch.Tensor, *channels: int) -> list[torch.Tensor]:
    """What else a network gives: maps of the size of `like`, each a tensor of its own."""
    generator = torch.Generator(like.device).manual_seed(1 + like.requires_grad)

    def draw(number: int) -> torch.Tensor:
        size = (like.shape[0], number, *like.shape[2:])
        x = torch.randn(size, generator=generator, device=like.device, dtype=like.dtype)
        return x.requires_grad_(like.requires_grad)

    return [draw(number) for number in channels]


class Calls(NamedTuple):
    """Of a loss, the module's call with its default settings, its published form and that one's arguments."""

    module: Call
    published: Callable[..., torch.Tensor]
    args: tuple[Any, ...]
    layers: list[torch.Tensor]  # of the student, beside the tensor that was given


def calls(name: str, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> Calls:
    both, extra, settings, layers = (student, teacher), {}, {}, []
    labels, others = target, both
    if name in ("dkd", "boundary_kd"):
        others = (*both, target)
    elif name == "ifvd":
        settings, others = {"num_classes": CLASSES}, (*both, target, CLASSES)
    elif name == "sdd":
        labels = target[:, 0, 0] + torch.arange(len(target), device=target.device) % CLASSES
        others = (*both, labels)
    elif name == "dmd":
        feature = torch.nn.functional.avg_pool2d(teacher, 4)
        settings, extra = (
            {"num_classes": teacher.shape[1], "feature_channels": [feature.shape[1]]},
            {"features": [feature]},
        )
    elif name == "dsd":
        (logits_s, *more_s), (logits_t, *more_t) = (beside(x, CLASSES, *x.shape[1:2] * 2) for x in both)
        layers = [logits_s, *more_s]
        extra = {"student_features": [student, *more_s], "teacher_features": [teacher, *more_t]}
        both = (logits_s, logits_t)
        others = (*both, *extra.values())
    elif name == "emkd":
        (logits_s,), (logits_t,) = (beside(x, CLASSES) for x in both)
        layers = [logits_s]
        settings, extra = {"num_classes": CLASSES}, {"student_features": [student], "teacher_features": [teacher]}
        both = (logits_s, logits_t)
        others = (*both, target, student, teacher)
    torch.manual_seed(0)
    loss = losses.build(name, **settings).to(student)
    if name == "dmd":
        (project,) = loss.projectors
        others = (*both, target, feature, project.weight.detach().flatten(1), project.bias.detach())
    needs_labels = name in ("dkd", "boundary_kd", "ifvd", "sdd", "dmd", "emkd")
    module = partial(loss, *both, labels if needs_labels else None, **extra)
    return Calls(module, getattr(published_losses, name), others, layers)


def work(name: str, shape: tuple[int, ...]) -> Work:
    student, teacher, target = inputs(shape)
    made_of = calls(name, student, teacher, target)
    title = f"{name} {list(shape)}".replace(", ", ",")
    published = {"published": (made_of.published, made_of.args)}
    made = Work("", title, student, made_of.module, published, group="losses", layers=tuple(made_of.layers))
    made.bytes = 3 * made.student_bytes  # both read, the gradient written
    made.input_bytes = 2 * made.student_bytes
    if name == "cirkd":  # two symmetric products in each of two passes, and a full one, of the pixels of all images
        pixels = shape[0] * math.prod(shape[2:])
        made.flops, made.exps = 6 * pixels**2 * shape[1], 2 * pixels**2
        return few_rounds(made)
    return made


ON_LOGITS = ("dmd", "kd", "cwd", "dkd", "dist", "sdd", "boundary_kd")
ON_FEATURES = ("cpkd", "emkd", "dsd", "fitnet", "at", "skd", "sp", "ifvd", "ickd", "cirkd", "pkd")
LOSS_WORKS: dict[str, Callable[[], Work]] = {
    **{f"{name}_loss": partial(work, name, LOGITS) for name in ON_LOGITS},
    **{f"{name}_loss": partial(work, name, FEATURES) for name in ON_FEATURES},
}
