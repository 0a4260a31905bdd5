"""The works that are measured: inputs, the fused call, its baselines, and what the machine must at least do for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import baselines
import machine
import torch

import medkd_fast

Call = Callable[[], torch.Tensor]
BF16 = torch.bfloat16
#: Of the labels that features are taken together by.
CLASSES = 9


@dataclass
class Work:
    """One line of the table. `bytes`, `exps` and `flops` are what any implementation must do, forward and backward."""

    operator: str
    name: str
    student: torch.Tensor
    fused: Call
    variants: dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]] = field(default_factory=dict)
    bytes: float = 0
    exps: float = 0
    flops: float = 0
    gemm: str = "gemm float32"
    clock: str = "gpu" if machine.GPU else "cpu"
    rounds: int = 21
    input_bytes: int = 0
    ordinary: Work | None = None  # the same in fp32 and contiguous, where this is not
    group: str = ""  # the table that it stands in: of the operators, or of the losses
    layers: tuple[torch.Tensor, ...] = ()  # of the student, which want gradients beside it

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        return self.student, *self.layers

    @property
    def student_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.leaves)


def _inputs(shape: tuple[int, ...], low: tuple[int, ...] | None, layout: str, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator("cuda" if machine.GPU else "cpu").manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=generator.device)
    student = draw((*shape[:2], *(low or shape[2:]))).to(dtype)
    teacher = draw(shape).to(dtype)
    if layout == "channels_last":
        student, teacher = (x.to(memory_format=torch.channels_last) for x in (student, teacher))
    size = (shape[0], *shape[2:])
    target = torch.randint(0, shape[1], size, generator=generator, device=generator.device)
    return [student.requires_grad_(), teacher, target]


def _title(operator: str, shape: tuple[int, ...], low: tuple[int, ...] | None, layout: str, dtype: torch.dtype) -> str:
    size = str(list(shape)).replace(" ", "")
    student = f" from {list(low)}".replace(" ", "") if low else ""
    extra = ("" if dtype == torch.float32 else f" {str(dtype)[6:]}") + (f" {layout}" if layout != "contiguous" else "")
    return f"{operator} {size}{student.replace('from', ' from ')}{extra}"


def pixel_loss(
    operator: str,
    shape: tuple[int, ...],
    low: tuple[int, ...] | None = None,
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
) -> Work:
    """decoupled_kl or class_kl. The gradient is written once unscaled and scaled once: 5 passes over the logits."""
    student, teacher, target = _inputs(shape, low, layout, dtype)
    size = student.element_size()
    if operator == "decoupled_kl":
        args: tuple[torch.Tensor, ...] = (student, teacher, target)
        labels = target.numel() * 8

        def fused() -> torch.Tensor:
            return medkd_fast.decoupled_kl(student, teacher, target, temperature=4.0).loss
    else:
        args, labels = (student, teacher), 0

        def fused() -> torch.Tensor:
            return medkd_fast.class_kl(student, teacher, temperature=4.0)

    work = Work(operator, _title(operator, shape, low, layout, dtype), student, fused)
    for kind in ("published", "plain"):
        work.variants[kind] = getattr(baselines, f"{kind}_{operator}"), args
    work.bytes = (4 * student.numel() + teacher.numel()) * size + labels
    work.exps = 2 * teacher.numel()
    work.input_bytes = (student.numel() + teacher.numel()) * size + labels
    if (layout, dtype) != ("contiguous", torch.float32):
        work.ordinary = pixel_loss(operator, shape, low)
    return work


def relation(
    operator: str,
    shape: tuple[int, ...],
    baseline: tuple[str, ...] = ("published", "plain"),
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    divergence: str = "mse",
) -> Work:
    """channel_relation or pixel_relation, cosine. Products with a symmetric result count half."""
    student, teacher, _ = _inputs(shape, None, layout, dtype)
    function = getattr(medkd_fast, operator)
    name, suffix = (operator, "") if divergence == "mse" else (f"{operator} {divergence}", f"_{divergence}")
    call = partial(function, student, teacher, divergence=divergence)
    work = Work(operator, _title(name, shape, None, layout, dtype), student, call)
    for kind in baseline:
        work.variants[kind] = getattr(baselines, f"{kind}_{operator}{suffix}"), (student, teacher)
    images, channels, pixels = shape[0], shape[1], math.prod(shape[2:])
    square = images * pixels * channels * channels
    if operator == "channel_relation":  # two Gram matrices; one product for the gradient
        work.flops = (1 + 1 + 2) * square
        work.bytes = 4 * work.student_bytes  # student twice, teacher, gradient
    elif divergence == "kl":  # two symmetric products, in each of two passes, and a full one; half the exponentials
        work.flops = (1 + 1 + 1 + 1 + 2) * images * pixels**2 * channels
        work.exps = 2 * images * pixels**2
    else:  # two symmetric products and one full one; two for the gradient
        work.flops = (1 + 1 + 2 + 4) * square
        work.bytes = 5 * work.student_bytes  # both twice, gradient
    work.input_bytes = 2 * work.student_bytes
    if machine.GPU and dtype == BF16:  # a CPU's arithmetic is fp32
        work.gemm = "gemm bfloat16"
    elif machine.GPU and operator == "pixel_relation":
        work.gemm = "gemm float32, norm 1"
    if (layout, dtype) != ("contiguous", torch.float32):
        work.ordinary = relation(operator, shape, (), divergence=divergence)
    return work


def standardised(shape: tuple[int, ...], layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> Work:
    """standardised_mse. Statistics over the batch: both networks are read for them, and again for the gradient."""
    student, teacher, _ = _inputs(shape, None, layout, dtype)
    call = partial(medkd_fast.standardised_mse, student, teacher)
    work = Work("standardised_mse", _title("standardised_mse", shape, None, layout, dtype), student, call)
    for kind in ("published", "plain"):
        work.variants[kind] = getattr(baselines, f"{kind}_standardised_mse"), (student, teacher)
    work.bytes = 5 * work.student_bytes
    work.input_bytes = 2 * work.student_bytes
    if (layout, dtype) != ("contiguous", torch.float32):
        work.ordinary = standardised(shape)
    return work


def attention(shape: tuple[int, ...], layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> Work:
    """attention_map, weighed with a gradient that arrives for every pixel."""
    student, teacher, _ = _inputs(shape, None, layout, dtype)
    upstream = teacher[:, 0].float().contiguous()

    def weighed(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (function(x) * v).sum()

    call = partial(weighed, medkd_fast.attention_map, student, upstream)
    work = Work("attention_map", _title("attention_map", shape, None, layout, dtype), student, call)
    for kind in ("published", "plain"):
        work.variants[kind] = partial(weighed, getattr(baselines, f"{kind}_attention_map")), (student, upstream)
    # the student twice, the gradient; energies once, the map written and read twice, what arrives for it twice
    work.bytes = 3 * work.student_bytes + 6 * 4 * upstream.numel()
    work.input_bytes = work.student_bytes + 4 * upstream.numel()
    if (layout, dtype) != ("contiguous", torch.float32):
        work.ordinary = attention(shape)
    return work


def in_bands(target: torch.Tensor) -> None:
    """Labels as coherent as organs are: nine bands of rows."""
    rows = torch.arange(target.shape[1], device=target.device) * CLASSES // target.shape[1]
    target.copy_(rows.view(1, -1, *[1] * (target.dim() - 2)))


def by_class(
    operator: str, shape: tuple[int, ...], layout: str = "contiguous", dtype: torch.dtype = torch.float32
) -> Work:
    """class_means or class_similarity."""
    x, _, target = _inputs(shape, None, layout, dtype)
    in_bands(target)

    def fused_result(x: torch.Tensor, target: torch.Tensor, classes: int) -> torch.Tensor:
        result = getattr(medkd_fast, operator)(x, target, num_classes=classes)
        return result.means if operator == "class_means" else result

    weight = torch.randn_like(fused_result(x.detach(), target, CLASSES))

    def weighted(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args: (function(*args[:-1]) * args[-1]).sum()

    args = (x, target, CLASSES, weight)
    work = Work(operator, _title(operator, shape, None, layout, dtype), x, partial(weighted(fused_result), *args))
    for kind in ("published", "plain"):
        work.variants[kind] = weighted(getattr(baselines, f"{kind}_{operator}")), args
    work.input_bytes = work.student_bytes + 8 * target.numel()
    # read and the gradient written; for similarities read twice, either way
    work.bytes = {"class_means": 2, "class_similarity": 5}[operator] * work.student_bytes
    if (layout, dtype) != ("contiguous", torch.float32):
        work.ordinary = by_class(operator, shape)
    return work


def importance_and_affinity(
    shape: tuple[int, ...], layout: str = "contiguous", dtype: torch.dtype = torch.float32
) -> Work:
    """The sum of both numbers, with maps of fourth powers as EMKD has them."""
    student, teacher, target = _inputs(shape, None, layout, dtype)
    in_bands(target)

    def fused() -> torch.Tensor:
        importance, affinity = medkd_fast.importance_and_affinity(student, teacher, target, num_classes=CLASSES)
        return importance + affinity

    name = "importance_and_affinity"
    work = Work(name, _title(name, shape, None, layout, dtype), student, fused)
    for kind in ("published", "plain"):
        work.variants[kind] = getattr(baselines, f"{kind}_{name}"), (student, teacher, target, CLASSES)
    work.bytes = 4 * work.student_bytes  # the student twice, the teacher, the gradient
    work.input_bytes = 2 * work.student_bytes + 8 * target.numel()
    if (layout, dtype) != ("contiguous", torch.float32):
        work.ordinary = importance_and_affinity(shape)
    return work


def pool(operator: str, shape: tuple[int, ...], layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> Work:
    """max_pool or average_pool. Windows of two along every axis, and the sum of the results, which every variant makes."""
    student, _, _ = _inputs(shape, None, layout, dtype)
    fused = getattr(medkd_fast, operator)
    title = _title(operator, shape, None, layout, dtype)
    work = Work(operator, title, student, lambda: fused(student, 2).pooled.sum())
    for kind in ("published", "plain"):
        baseline = getattr(baselines, f"{kind}_{operator}")
        work.variants[kind] = (lambda x, f=baseline: f(x).sum()), (student,)
    windows = student.numel() // 2 ** (len(shape) - 2)
    # the results, and as much for the gradient that arrives; places written and read
    size = 2 * student.element_size() + 2 * 2 if operator == "max_pool" else 2 * 4
    work.bytes = 2 * work.student_bytes + windows * size
    work.input_bytes = work.student_bytes
    if (layout, dtype) != ("contiguous", torch.float32):
        work.ordinary = pool(operator, shape)
    return work


def host(make: Callable[[], Work]) -> Work:
    work = make()
    work.name += " host"
    work.clock = "host"
    work.ordinary = None
    return work


def few_rounds(work: Work) -> Work:
    """Where a step of the slowest variant takes seconds."""
    work.rounds = 5
    return work


def volume() -> Work:
    """Nothing else can do it."""
    work = few_rounds(relation("pixel_relation", (1, 32, 96, 96, 96), (), dtype=BF16, divergence="kl"))
    work.ordinary = None
    return work


FEATURES: tuple[tuple[str, tuple[int, ...], dict[str, Any]], ...] = (
    ("", (2, 64, 64, 64), {}),
    ("_bf16", (2, 64, 64, 64), {"dtype": BF16}),
    ("_channels_last", (2, 64, 64, 64), {"layout": "channels_last"}),
    ("_3d", (1, 32, 48, 48, 48), {}),
)
SMALL: dict[str, Callable[..., Work]] = {
    "decoupled_kl": partial(pixel_loss, "decoupled_kl"),
    "class_kl": partial(pixel_loss, "class_kl"),
    "channel_relation": partial(relation, "channel_relation"),
    "pixel_relation": partial(relation, "pixel_relation"),
    "pixel_relation_kl": partial(relation, "pixel_relation", divergence="kl"),
    "standardised_mse": standardised,
    "attention_map": attention,
}
CPU_WORKS: dict[str, Callable[[], Work]] = {
    "decoupled_kl": lambda: pixel_loss("decoupled_kl", (4, 9, 224, 224)),
    "decoupled_kl_bf16": lambda: pixel_loss("decoupled_kl", (4, 9, 224, 224), dtype=BF16),
    "decoupled_kl_channels_last": lambda: pixel_loss("decoupled_kl", (4, 9, 224, 224), layout="channels_last"),
    "decoupled_kl_32_classes": lambda: pixel_loss("decoupled_kl", (2, 32, 224, 224)),
    "decoupled_kl_upsampled": lambda: pixel_loss("decoupled_kl", (4, 9, 224, 224), (56, 56)),
    "decoupled_kl_3d": lambda: few_rounds(pixel_loss("decoupled_kl", (2, 14, 96, 96, 96))),
    "class_kl": lambda: pixel_loss("class_kl", (4, 9, 224, 224)),
    "class_kl_3d": lambda: few_rounds(pixel_loss("class_kl", (2, 14, 96, 96, 96))),
    "class_kl_bf16": lambda: pixel_loss("class_kl", (4, 9, 224, 224), dtype=BF16),
    "class_kl_channels_last": lambda: pixel_loss("class_kl", (4, 9, 224, 224), layout="channels_last"),
    "channel_relation": lambda: relation("channel_relation", (4, 64, 112, 112)),
    "channel_relation_3d": lambda: few_rounds(relation("channel_relation", (2, 32, 96, 96, 96))),
    "channel_relation_bf16": lambda: relation("channel_relation", (4, 64, 112, 112), dtype=BF16),
    "channel_relation_channels_last": lambda: relation("channel_relation", (4, 64, 112, 112), layout="channels_last"),
    "pixel_relation": lambda: relation("pixel_relation", (2, 64, 64, 64)),
    "pixel_relation_bf16": lambda: relation("pixel_relation", (2, 64, 64, 64), dtype=BF16),
    "pixel_relation_channels_last": lambda: relation("pixel_relation", (2, 64, 64, 64), layout="channels_last"),
    "pixel_relation_3d": lambda: relation("pixel_relation", (1, 32, 48, 48, 48), ("plain",)),
    "pixel_relation_kl": lambda: relation("pixel_relation", (2, 64, 64, 64), divergence="kl"),
    "pixel_relation_kl_bf16": lambda: relation("pixel_relation", (2, 64, 64, 64), divergence="kl", dtype=BF16),
    "pixel_relation_kl_channels_last": lambda: relation(
        "pixel_relation", (2, 64, 64, 64), divergence="kl", layout="channels_last"
    ),
    "pixel_relation_kl_3d": lambda: few_rounds(relation("pixel_relation", (1, 16, 24, 24, 24), divergence="kl")),
    "standardised_mse": lambda: standardised((2, 64, 64, 64)),
    "standardised_mse_bf16": lambda: standardised((2, 64, 64, 64), dtype=BF16),
    "standardised_mse_channels_last": lambda: standardised((2, 64, 64, 64), layout="channels_last"),
    "standardised_mse_3d": lambda: standardised((1, 32, 48, 48, 48)),
    "attention_map": lambda: attention((2, 64, 64, 64)),
    "attention_map_bf16": lambda: attention((2, 64, 64, 64), dtype=BF16),
    "attention_map_channels_last": lambda: attention((2, 64, 64, 64), layout="channels_last"),
    "attention_map_3d": lambda: attention((1, 32, 48, 48, 48)),
    **{
        f"{name}{suffix}": partial(by_class, name, shape, **settings)
        for name in ("class_means", "class_similarity")
        for suffix, shape, settings in FEATURES
    },
    **{
        f"importance_and_affinity{suffix}": partial(importance_and_affinity, shape, **settings)
        for suffix, shape, settings in FEATURES
    },
    **{
        f"{name}{suffix}": partial(pool, name, shape, **settings)
        for name in ("max_pool", "average_pool")
        for suffix, shape, settings in FEATURES
    },
    **{f"{name}_small": partial(make, (1, 4, 32, 32)) for name, make in SMALL.items()},
    **{f"{name}_64": partial(make, (1, 4, 64, 64)) for name, make in SMALL.items()},
}
GPU_WORKS: dict[str, Callable[[], Work]] = {
    "decoupled_kl": lambda: pixel_loss("decoupled_kl", (4, 14, 96, 96, 96)),
    "decoupled_kl_bf16": lambda: pixel_loss("decoupled_kl", (4, 14, 96, 96, 96), dtype=BF16),
    "decoupled_kl_upsampled": lambda: pixel_loss("decoupled_kl", (32, 9, 224, 224), (56, 56)),
    "class_kl": lambda: pixel_loss("class_kl", (4, 14, 96, 96, 96)),
    "class_kl_bf16": lambda: pixel_loss("class_kl", (4, 14, 96, 96, 96), dtype=BF16),
    "channel_relation": lambda: relation("channel_relation", (16, 64, 224, 224)),
    "channel_relation_bf16": lambda: relation("channel_relation", (16, 64, 224, 224), dtype=BF16),
    "pixel_relation": lambda: relation("pixel_relation", (16, 64, 128, 128)),
    "pixel_relation_bf16": lambda: relation("pixel_relation", (16, 64, 128, 128), dtype=BF16),
    "pixel_relation_kl_bf16": lambda: relation("pixel_relation", (4, 64, 128, 128), divergence="kl", dtype=BF16),
    "pixel_relation_kl_volume": volume,
    **{f"{name}_host": partial(host, partial(make, (1, 4, 64, 64))) for name, make in SMALL.items()},
    "standardised_mse": lambda: standardised((16, 64, 128, 128)),
    "standardised_mse_bf16": lambda: standardised((16, 64, 128, 128), dtype=BF16),
    "attention_map": lambda: attention((16, 64, 128, 128)),
    "attention_map_bf16": lambda: attention((16, 64, 128, 128), dtype=BF16),
    "importance_and_affinity": lambda: importance_and_affinity((16, 64, 128, 128)),
    "importance_and_affinity_bf16": lambda: importance_and_affinity((16, 64, 128, 128), dtype=BF16),
    "class_means": lambda: by_class("class_means", (16, 64, 128, 128)),
    "class_means_bf16": lambda: by_class("class_means", (16, 64, 128, 128), dtype=BF16),
    "class_similarity": lambda: by_class("class_similarity", (16, 64, 128, 128)),
    "class_similarity_bf16": lambda: by_class("class_similarity", (16, 64, 128, 128), dtype=BF16),
    "max_pool": lambda: pool("max_pool", (16, 64, 128, 128)),
    "max_pool_bf16": lambda: pool("max_pool", (16, 64, 128, 128), dtype=BF16),
    "average_pool": lambda: pool("average_pool", (16, 64, 128, 128)),
    "average_pool_bf16": lambda: pool("average_pool", (16, 64, 128, 128), dtype=BF16),
}
WORKS = GPU_WORKS if machine.GPU else CPU_WORKS
