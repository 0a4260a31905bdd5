"""The numerical contract as a table: every operator at every operating point in every dtype, against fp64.

The truth is the definition in fp64 on the same, already rounded inputs. Beside the error of the fused backend stands that
of the best plain PyTorch in fp32 on the same inputs (bench/baselines.py; the definition in fp32 for what has no line
there). `python tests/numerics.py` writes docs/numerics.md; test_numerics.py asserts the limits.

An error is the root mean square over DRAWS draws, because a single number may come out right by luck.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from operators import in_one, value_and_gradient

import medkd_fast

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import baselines

DRAWS = 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Not a power of two: a division by one is exact and would hide its rounding.
TEMPERATURE = 3.0
DOCUMENT = Path(__file__).parent.parent / "docs" / "numerics.md"

POINTS = {
    "generic": "student and teacher independent",
    "converged": "student = teacher + 1e-3; the value's error is relative to the loss of an independent student",
    "rotated": "what the loss does not see differs, what it sees is about 1e-2 apart: channels (pixel_relation, "
    "importance_and_affinity) or pixels (channel_relation) in another order; a constant, of size 10, added to a pixel's logits",
    "saturated": "logits or features of size 1e4",
    "zero rows": "in either network a channel and some pixels are 0",
}


class Sample(NamedTuple):
    student: torch.Tensor
    teacher: torch.Tensor
    target: torch.Tensor
    special: torch.Tensor  # like the student: entries of zero rows, whose gradient has another size
    unrelated: torch.Tensor  # a student that knows nothing


Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Setting(NamedTuple):
    """An operator with its settings: a part of the table."""

    name: str
    loss: Loss
    plain: Loss  # the best plain PyTorch
    draw: Callable[[str, torch.Generator], Sample]
    by_products: bool = False  # of C×C products, where plain PyTorch takes N×N matrices


def normal(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def draw_logits(low: tuple[int, ...] | None, point: str, generator: torch.Generator) -> Sample:
    shape = (2, 9, 24, 32)
    student_shape = (*shape[:2], *(low or shape[2:]))
    unrelated, teacher = 3 * normal(student_shape, generator), 3 * normal(shape, generator)
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)
    student, special = unrelated, torch.zeros(student_shape, dtype=torch.bool)
    if low and point in ("converged", "rotated"):
        # a teacher that the upsampled student can agree with
        teacher = baselines.upsampled(student, teacher)
    elif point in ("converged", "rotated"):
        student = teacher
    if point == "converged":
        student = student + 1e-3 * normal(student_shape, generator)
    if point == "rotated":
        student = student + 1e-2 * TEMPERATURE * normal(student_shape, generator)
        student = student + 10 * normal((shape[0], 1, *student_shape[2:]), generator)
    if point == "saturated":
        student, teacher = 1e4 / 3 * student, 1e4 / 3 * teacher
    if point == "zero rows":
        student, teacher = student.clone(), teacher.clone()
        student[:, 2] = student[..., 3:5] = 0
        teacher[:, 4] = teacher[..., 2:4] = 0
    if point in ("converged", "rotated"):
        unrelated = 3 * normal(student_shape, generator)
    return Sample(student, teacher, target, special, unrelated)


def in_bands(x: torch.Tensor) -> torch.Tensor:
    """Labels of four classes."""
    return (torch.arange(x.shape[2]) * 4 // x.shape[2]).view(1, -1, 1).expand(x.shape[0], *x.shape[2:])


def draw_features(rows: str, point: str, generator: torch.Generator, by_class: bool = False) -> Sample:
    """`rows` of the relation's matrix: "channels" or "pixels". A mean, as after an activation; `by_class` one of each class."""
    shape = (2, 32, 18, 20)
    unrelated, teacher = normal(shape, generator) + 0.5, normal(shape, generator) + 0.5
    if by_class:
        label = in_bands(teacher)[0, :, 0]
        means = (0.7 * normal((*shape[:2], 4, 1), generator) - 0.5 for _ in range(2))
        unrelated, teacher = (x + mean[:, :, label] for x, mean in zip((unrelated, teacher), means, strict=True))
    student, special = unrelated, torch.zeros(shape, dtype=torch.bool)
    if point == "converged":
        student = teacher + 1e-3 * normal(shape, generator)
    if point == "rotated" and rows == "pixels":
        student = teacher[:, torch.randperm(shape[1], generator=generator)] + 0.05 * normal(shape, generator)
    if point == "rotated" and rows == "channels":
        order = torch.randperm(shape[2] * shape[3], generator=generator)
        student = teacher.flatten(2)[..., order].reshape(shape) + 0.15 * normal(shape, generator)
    if point == "saturated":
        student, teacher = 1e4 * student, 1e4 * teacher
    if point == "zero rows":
        student[:, 2] = student[..., 3:5] = 0
        teacher[:, 4] = teacher[..., 2:4] = 0
        if rows == "channels":
            special[:, 2] = True
        else:
            special[..., 3:5] = True
    return Sample(student, teacher, torch.empty(0), special, unrelated)


def logits(operator: str, name: str, low: tuple[int, ...] | None = None) -> Setting:
    labelled = operator == "decoupled_kl"

    def loss(student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        labels = [target] if labelled else []
        value = getattr(medkd_fast, operator)(student, teacher, *labels, temperature=TEMPERATURE)
        return value.loss if labelled else value

    def plain(student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        labels = [target] if labelled else []
        return getattr(baselines, f"plain_{operator}")(student, teacher, *labels, temperature=TEMPERATURE)

    return Setting(name, loss, plain, partial(draw_logits, low))


def relation(operator: str, relation: str, divergence: str) -> Setting:
    def loss(student: torch.Tensor, teacher: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return getattr(medkd_fast, operator)(student, teacher, relation=relation, divergence=divergence)

    best = f"plain_{operator}" if divergence == "mse" else f"plain_{operator}_{divergence}"

    def plain(student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if relation == "cosine" and hasattr(baselines, best):
            return getattr(baselines, best)(student, teacher)
        with medkd_fast.use_backend("reference"):
            return loss(student, teacher, target)

    rows = "channels" if operator == "channel_relation" else "pixels"
    by_products = (operator, divergence) == ("pixel_relation", "mse") and relation != "cosine"
    return Setting(f"{operator} {relation} {divergence}", loss, plain, partial(draw_features, rows), by_products)


def by_definition(loss: Loss) -> Loss:
    """The definition in fp32 for what is plain PyTorch already."""

    def plain(*args: torch.Tensor) -> torch.Tensor:
        with medkd_fast.use_backend("reference"):
            return loss(*args)

    return plain


def matrix(operator: str, relation: str) -> Setting:
    """The operator's matrix through its mean squared difference from the teacher's, which is made in fp64."""

    def loss(student: torch.Tensor, teacher: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        of = partial(getattr(medkd_fast, operator), relation=relation)
        return (of(student).double() - of(teacher.double())).square().mean()

    rows = "channels" if operator == "channel_gram" else "pixels"
    return Setting(f"{operator} {relation}", loss, by_definition(loss), partial(draw_features, rows))


def by_class(operator: str) -> Setting:
    """The operator's result through its mean squared difference from the teacher's, with four bands of labels."""

    def of(x: torch.Tensor) -> torch.Tensor:
        return in_one(getattr(medkd_fast, operator)(x, in_bands(x), num_classes=4)).double()

    def loss(student: torch.Tensor, teacher: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return (of(student) - of(teacher.double())).square().mean()

    return Setting(operator, loss, by_definition(loss), partial(draw_features, "pixels"))


def importance_and_affinity(number: str) -> Setting:
    """One of the operator's numbers, with four bands of labels, of features that differ: else all cosines were near 1."""

    def loss(student: torch.Tensor, teacher: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return getattr(medkd_fast.importance_and_affinity(student, teacher, in_bands(student), num_classes=4), number)

    draw = partial(draw_features, "pixels", by_class=True)
    return Setting(f"importance_and_affinity {number}", loss, by_definition(loss), draw)


def spatial_kl(student: torch.Tensor, teacher: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return medkd_fast.spatial_kl(student, teacher, temperature=TEMPERATURE)


def class_pearson(student: torch.Tensor, teacher: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return medkd_fast.class_pearson(student, teacher, temperature=TEMPERATURE).loss


def standardised_mse(student: torch.Tensor, teacher: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return medkd_fast.standardised_mse(student, teacher)


def plain_standardised_mse(student: torch.Tensor, teacher: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return baselines.plain_standardised_mse(student, teacher)


def attention_map(student: torch.Tensor, teacher: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Through its mean squared difference from the teacher's, which is made in fp64."""
    maps = medkd_fast.attention_map(student).double(), medkd_fast.attention_map(teacher.double())
    return (maps[0] - maps[1]).square().mean()


def average_pool(student: torch.Tensor, teacher: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Through its mean squared difference from the teacher's, which is made in fp64."""
    pooled = medkd_fast.average_pool(student, 3).pooled.double(), medkd_fast.average_pool(teacher.double(), 3).pooled
    return (pooled[0] - pooled[1]).square().mean()


SETTINGS = {
    setting.name: setting
    for setting in (
        logits("decoupled_kl", "decoupled_kl"),
        logits("decoupled_kl", "decoupled_kl upsampled", low=(6, 8)),
        logits("class_kl", "class_kl"),
        logits("class_kl", "class_kl upsampled", low=(6, 8)),
        *(matrix("channel_gram", relation) for relation in ("cosine", "pearson", "gram", "row", "softmax")),
        *(matrix("pixel_affinity", relation) for relation in ("cosine", "pearson", "gram")),
        relation("channel_relation", "cosine", "mse"),
        relation("channel_relation", "cosine", "kl"),
        relation("channel_relation", "pearson", "mse"),
        relation("channel_relation", "pearson", "kl"),
        relation("channel_relation", "gram", "mse"),
        relation("channel_relation", "gram", "kl"),
        relation("channel_relation", "row", "mse"),
        relation("channel_relation", "row", "kl"),
        relation("channel_relation", "softmax", "mse"),
        relation("pixel_relation", "cosine", "mse"),
        relation("pixel_relation", "cosine", "kl"),
        relation("pixel_relation", "pearson", "mse"),
        relation("pixel_relation", "pearson", "kl"),
        relation("pixel_relation", "gram", "mse"),
        relation("pixel_relation", "gram", "kl"),
        Setting("spatial_kl", spatial_kl, by_definition(spatial_kl), partial(draw_features, "channels")),
        Setting("class_pearson", class_pearson, by_definition(class_pearson), partial(draw_logits, None)),
        Setting("standardised_mse", standardised_mse, plain_standardised_mse, partial(draw_features, "channels")),
        Setting("attention_map", attention_map, by_definition(attention_map), partial(draw_features, "pixels")),
        importance_and_affinity("importance"),
        importance_and_affinity("affinity"),
        by_class("class_means"),
        by_class("class_similarity"),
        Setting("average_pool", average_pool, by_definition(average_pool), partial(draw_features, "pixels")),
    )
}


class Errors(NamedTuple):
    value: float
    gradient: float


#: In fp32: value, gradient. What has no line has no number in the contract.
CONTRACT = {"generic": Errors(1e-5, 1e-5), "converged": Errors(1e-6, 2e-3), "rotated": Errors(1e-3, 1e-3)}
FEW_ROUNDINGS = 4 * 2.0**-24
#: Less is 0: softmaxes of saturated features are constants.
TINY = 2.0**-100


class Row(NamedTuple):
    fused: Errors
    plain: Errors
    lowest: float  # the fused value where it is most negative, relative to what its error is relative to; 0 if never


def truth(loss: Loss, sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    with medkd_fast.use_backend("reference"):
        return value_and_gradient(lambda x: loss(x, sample.teacher.double(), sample.target), sample.student.double())


def errors(
    got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...], scale: float, special: torch.Tensor
) -> Errors:
    """Of the value relative to `scale`; of the gradient in relative L2, the larger one of ordinary and special entries."""
    gradient = 0.0
    for some in (special, ~special):
        a, b = got[1].double()[some], want[1][some]
        overflown = ~b.to(got[1].dtype).isfinite()  # a gradient that its dtype cannot hold
        a, b = torch.where(overflown & (a == b.sign() * math.inf), 0, a), torch.where(overflown, 0, b)
        if a.numel() and not torch.equal(a, b):
            error = ((a - b).norm() / b.norm().clamp(min=TINY)).item()
            gradient = error if math.isnan(error) else max(gradient, error)
    return Errors(abs(got[0].item() - want[0].item()) / scale, gradient)


def measure(setting: Setting, point: str, dtype: torch.dtype, backend: str = "cpp") -> Row:
    """Of the backend on the default device; all else on the CPU."""
    device = torch.get_default_device()
    with torch.device("cpu"):
        return measure_on(device, setting, point, dtype, backend)


def measure_on(device: torch.device, setting: Setting, point: str, dtype: torch.dtype, backend: str) -> Row:
    found: dict[str, list[Errors]] = {"fused": [], "plain": []}
    lowest = 0.0
    for draw in range(DRAWS):
        drawn = setting.draw(point, torch.Generator().manual_seed(draw))
        student, teacher, unrelated = (x.to(dtype) for x in (drawn.student, drawn.teacher, drawn.unrelated))
        sample = drawn._replace(student=student, teacher=teacher)
        value, gradient = truth(setting.loss, sample)
        # brings the gradient to the middle of fp16's range, as a gradient scaler does
        size = gradient[~sample.special].square().mean().sqrt().item()
        upstream = torch.tensor(2.0 ** -round(math.log2(max(size, TINY))), dtype=torch.float64)
        want = value, upstream * gradient
        scale = max(value.item(), TINY)
        if point == "converged":
            scale = truth(setting.loss, sample._replace(student=unrelated))[0].item()
        there = Sample(*(x.to(device) for x in sample))
        with medkd_fast.use_backend(backend), torch.device(device):
            fused = value_and_gradient(
                lambda x, s=there: setting.loss(x, s.teacher, s.target), there.student, upstream.to(device)
            )
        fused = tuple(x.cpu() for x in fused)
        plain = value_and_gradient(
            lambda x, s=sample: setting.plain(x, s.teacher.float(), s.target), student.float(), upstream
        )
        lowest = min(lowest, fused[0].item() / scale)
        for name, got in (("fused", fused), ("plain", plain)):
            found[name].append(errors(got, want, scale, sample.special))
    mean = {
        name: Errors(*(math.sqrt(sum(e * e for e in column) / DRAWS) for column in zip(*each, strict=True)))
        for name, each in found.items()
    }
    return Row(mean["fused"], mean["plain"], lowest)


def limits(point: str, dtype: torch.dtype, plain: Errors, by_products: bool = False) -> Errors:
    """The largest errors that the contract allows, and why.

    * Where it gives a number for the point, that number. A gradient is also held to the next item, unless the features
      are rotated and it comes out of C×C products where plain PyTorch subtracts N×N relations (`by_products`).
    * Else twice the error of plain PyTorch. A value gets FEW_ROUNDINGS more, because plain PyTorch's own error in one number
      can be 0 by luck. Where plain PyTorch has no finite result the generic limit holds.
    * A half gradient is rounded on top of that, to half a unit in the last place. (The pixel losses round twice, in what
      the forward leaves and in what the backward makes of it; in L2 that is still 0.6 of the largest single rounding.)
    """
    value, gradient = CONTRACT.get(point, Errors(math.inf, math.inf))
    finite = Errors(*(error if math.isfinite(error) else CONTRACT["generic"].gradient / 2 for error in plain))
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    return Errors(
        value if value < math.inf else 2 * finite.value + FEW_ROUNDINGS,
        (gradient if by_products and point == "rotated" else min(gradient, 2 * finite.gradient)) + rounding,
    )


INTRODUCTION = f"""# The numerical contract, measured

Written by `make numerics` (`tests/numerics.py`); the tests assert the limits. Every number is the error against the
definition in fp64 on the same, already rounded inputs: first of the fused CPU backend, then of the best plain PyTorch in
fp32 (for half inputs: cast up first). Value: relative, of the loss with reduction "mean". Gradient: relative L2. Root mean
square over {DRAWS} draws; maps of 24×32 (logits) and 18×20 (features). `nan`: plain PyTorch has no finite gradient there.
The results of `channel_gram`, `pixel_affinity`, `attention_map`, `class_means`, `class_similarity` and `average_pool` are measured
through their mean squared difference from the teacher's.

Limits, in fp32: generic 1e-5; converged 1e-6 (value) and 2e-3 (gradient); rotated 1e-3; elsewhere, and for every
gradient, twice plain PyTorch. A half gradient is also rounded to its dtype, by at most 2^-8 (bf16) or 2^-11 (fp16) of a
number. One exception: the gradient of `pixel_relation` pearson mse and gram mse at rotated features is held to 1e-3 alone.
Plain PyTorch is there the definition, which subtracts the N×N relations one by one. The C×C products that stand for them
are large where the relations are nearly equal, and their rounding is what the table shows; for cosine mse plain PyTorch takes
the same products.

Operating points:

"""


def document(rows: dict[tuple[str, str, str], Row]) -> str:
    lines = [INTRODUCTION + "\n".join(f"* **{point}**: {text}." for point, text in POINTS.items())]
    for name in SETTINGS:
        lines.append(f"\n## {name}\n")
        lines.append("| point | inputs | value | plain | gradient | plain |\n|---|---|---|---|---|---|")
        for point in POINTS:
            for dtype in DTYPES:
                row = rows[name, point, dtype]
                figures = (row.fused.value, row.plain.value, row.fused.gradient, row.plain.gradient)
                lines.append(f"| {point} | {dtype} | {' | '.join(f'{x:.0e}' for x in figures)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(
        document(
            {
                (name, point, dtype): measure(setting, point, DTYPES[dtype])
                for name, setting in SETTINGS.items()
                for point in POINTS
                for dtype in DTYPES
            }
        )
    )
