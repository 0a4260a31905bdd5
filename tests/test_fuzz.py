"""Generated calls of every operator against the definition in fp64: value and gradient.

`make test` runs the same 2,000 calls every time, and a tenth of them in the GPU's kernels where they are emulated; `make fuzz` runs
100,000 others (MEDKD_FAST_FUZZ is their number). What a failure prints is a `Call`: `check(Call(...), backend)` repeats it.

Tolerances follow from the arithmetic's unit roundoff ε and from the condition of the call, not from what was observed:

* Logits. u = z / τ is rounded to ε·U, U the largest |u| of the pixel in either network; probabilities move by as much
  relatively, and so does the gradient τ·w·(p_s − p_t): error K·ε·τ·w·(1 + U) a pixel. The value sums probabilities times
  differences of up to 2U: K·ε·τ²·w·(1 + U)². Over the n pixels of a row a logarithm of a probability can be log n larger. Through
  upsampling the gradient's bound goes as the gradient does, by the adjoint of the interpolation, whose positions are
  rounded to ε·size, in the definition too: so the neighbours of a pixel get a share where its weight for them is 0.
* Correlations of probabilities. The error of u moves q = p − 1/C by K·ε·(p + 2U·p·(1 − p) + 1/C), and through q all that is made of
  it (`correlation_moved`). A vector as short as its error has no direction: then little more than no NaN is asked for.
* Standardised features. Sums and coefficients are made in fp64: their roundings count 2^-53, times what a channel's mean square
  is to its variance (`standardised_bounds`).
* Attention maps. An energy is rounded to ε·p of itself, and below the normal numbers to a multiple of the smallest; that moves the
  norm, the map, its product with the gradient that arrives, and in proportion the gradient (`map_moved`). An image with half
  of its norm below that has no direction.
* Relations. Sums round in proportion to what they sum: K·ε times the size that the relation, the loss and a row's gradient
  have where student and teacher disagree (`sizes_of`; 1, 1 and 4 / (rows·n) for the mean of squared differences of cosines of
  rows of norm n), and K·ε times the condition of the call on top, measured: by how much more the definition in fp64 changes
  than the features, when those are moved by 2^-28 of themselves.
* By class. Of up to 32 features in a row the sum may be in fp32: means are wrong by 2·K·ε of the mean magnitude, and so a
  prototype relative to its norm by 2·K·ε·κ, κ the quotient of the two. A cosine is, and the direction of every term of its
  gradient, by K·ε·(1 + 2κ); what comes through the prototype adds up the class's |v|.
* Importance and affinity. Squares of differences d of two maps or two cosines with errors e: they move by 2·|d|·e + e², and the
  gradient that arrives for a map or a cosine by 2·e; a map's e is that of attention maps, a cosine's that of its two means.
* Averages of windows. Up to 64 pixels are added up one after the other: 4·K·ε of their mean magnitude; more of them in fp64.
* max_pool. Its maxima and its gradient are copies of numbers: they are equal.

Where the converged or rotated operating points allow much less, test_numerics.py demands it. The
roundings of an output to its dtype come on top.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from operators import EMULATED, in_one, value_and_gradient

import medkd_fast

EXAMPLES = int(os.environ.get("MEDKD_FAST_FUZZ", "0"))
hypothesis.settings.register_profile("test", max_examples=2000, derandomize=True)
hypothesis.settings.register_profile("fuzz", max_examples=max(EXAMPLES, 1), print_blob=True)
PROFILE = hypothesis.settings.get_profile("fuzz" if EXAMPLES else "test")

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LABELS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
#: K of the tolerances: roundings that one result goes through, with a margin for sums over classes, channels and pixels.
ROUNDINGS = 16


@dataclass(frozen=True)
class Call:
    """A call, small enough to print: tensors are drawn from `seed`."""

    operator: str
    images: int
    channels: int
    size: tuple[int, ...]
    student_dtype: torch.dtype
    teacher_dtype: torch.dtype
    student_layout: str
    teacher_layout: str
    spread: float
    mean: float
    agreement: str  # of student and teacher: "none", "converged", "equal"
    settings: dict[str, Any]
    reduction: str
    upstream: float  # 0 included; for reduction "none" the scale of random ones
    removed: float  # share of pixels that ignore_index or the mask takes out
    poisoned: bool  # what was taken out is no number
    seed: int
    low: tuple[int, ...] | None = None
    label_dtype: torch.dtype = torch.int64
    absent: str = "none"  # whose last class is at -inf: "student", "teacher", "both"
    weighted: str = "no"  # "no", "yes", "zeros", "some zeros"
    zero_rows: bool = False
    teacher_channels: int | None = None  # if not the student's
    coherent: bool = False  # labels in bands


# layouts: each returns equal values in another order of memory
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "reversed": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))),
    "images inside": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "crop": lambda x: F.pad(x, [2, 1] * (x.dim() - 2))[(..., *[slice(2, -1)] * (x.dim() - 2))],
    "every second": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "some channels": lambda x: F.pad(x, [0, 0] * (x.dim() - 2) + [1, 2])[:, 1:-2],
}
#: One image for all of them: stride 0. Only for teachers, whose values it changes.
EXPANDED = "expanded"


class Tensors(NamedTuple):
    student: torch.Tensor  # in its dtype, contiguous; the leaf
    teacher: torch.Tensor
    target: torch.Tensor | None
    weight: torch.Tensor | None
    mask: torch.Tensor | None
    keep: torch.Tensor  # [B, *S]


def tensors(call: Call) -> Tensors:
    generator = torch.Generator().manual_seed(call.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shape = (call.images, call.teacher_channels or call.channels, *call.size)
    teacher = call.spread * (normal(*shape) + call.mean)
    student = call.spread * (normal(call.images, call.channels, *(call.low or call.size)) + call.mean)
    if student.shape == shape and call.agreement != "none":
        student = teacher + (1e-3 * call.spread * normal(*shape) if call.agreement == "converged" else 0)
    if call.zero_rows:
        student[:, :1] = teacher[:, -1:] = 0
        student[..., :1] = teacher[..., -1:] = 0
    student, teacher = student.to(call.student_dtype), teacher.to(call.teacher_dtype)
    if call.absent in ("student", "both"):
        student[:, -1:] = -torch.inf
    if call.absent in ("teacher", "both"):
        teacher[:, -1:] = -torch.inf
    if call.teacher_layout == EXPANDED:
        teacher = teacher[:1].expand_as(teacher)
    else:
        teacher = LAYOUTS[call.teacher_layout](teacher)

    pixels = (call.images, *call.size)
    keep = torch.rand(pixels, generator=generator) >= call.removed
    if call.poisoned and call.low is None and call.teacher_layout != EXPANDED:
        student.masked_fill_(~keep.unsqueeze(1), torch.nan)
        teacher.masked_fill_(~keep.unsqueeze(1), torch.inf)
    if call.operator in (*KINDS, "spatial_kl", "standardised_mse", "attention_map", *POOLS):
        mask = keep if call.removed else None
        return Tensors(student, teacher, None, None, mask, keep)
    target = torch.randint(0, call.settings.get("num_classes", max(call.channels, 1)), pixels, generator=generator)
    if call.coherent:
        target = target.flatten(1).sort(1).values.view_as(target)
    target = target.masked_fill(~keep, 100).to(call.label_dtype)
    weight = None
    if call.weighted != "no":
        share = {"yes": 1.0, "some zeros": 0.5, "zeros": 0.0}[call.weighted]
        weight = 2 * torch.rand(pixels, generator=generator) * (torch.rand(pixels, generator=generator) < share)
    return Tensors(student, teacher, target, weight, None, keep)


def run(call: Call, x: torch.Tensor, drawn: Tensors, teacher: torch.Tensor) -> torch.Tensor:
    if call.operator == "pixel_affinity":
        return medkd_fast.pixel_affinity(x, **call.settings)
    if call.operator == "channel_gram":
        return medkd_fast.channel_gram(x, mask=drawn.mask, **call.settings)
    if call.operator == "standardised_mse":
        return medkd_fast.standardised_mse(x, teacher, mask=drawn.mask)
    if call.operator == "attention_map":
        return medkd_fast.attention_map(x, mask=drawn.mask, **call.settings)
    if call.operator in BY_CLASS:
        return in_one(getattr(medkd_fast, call.operator)(x, drawn.target, ignore_index=100, **call.settings))
    if call.operator == "importance_and_affinity":
        result = medkd_fast.importance_and_affinity(x, teacher, drawn.target, ignore_index=100, **call.settings)
        return torch.stack(result)
    if call.operator in POOLS:
        return getattr(medkd_fast, call.operator)(x, mask=drawn.mask, **call.settings).pooled
    settings = {**call.settings, "reduction": call.reduction}
    if call.operator in (*KINDS, "spatial_kl"):
        return getattr(medkd_fast, call.operator)(x, teacher, mask=drawn.mask, **settings)
    settings |= {"weight": drawn.weight, "ignore_index": 100}
    if call.operator == "class_pearson":
        return medkd_fast.class_pearson(x, teacher, target=drawn.target, ignore_index=100, **call.settings).loss
    if call.operator == "decoupled_kl":
        return medkd_fast.decoupled_kl(x, teacher, drawn.target, **settings).loss
    return medkd_fast.class_kl(x, teacher, target=drawn.target, **settings)


def double(call: Call) -> bool:
    """Whether the arithmetic is in fp64."""
    return torch.float64 in (call.student_dtype, call.teacher_dtype)


class Bounds(NamedTuple):
    """In units of K·ε."""

    value: torch.Tensor
    gradient: torch.Tensor
    undefined: torch.Tensor  # like the student: the loss is infinite there, its gradient anything but NaN


def upsampled(x: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    if x.shape[2:] == size:
        return x
    if not x.numel():
        return x.new_zeros(*x.shape[:2], *size)
    mode = ["linear", "bilinear", "trilinear"][len(size) - 1]
    return F.interpolate(x, size=size, mode=mode, align_corners=False)


def adjoint(x: torch.Tensor, low: tuple[int, ...]) -> torch.Tensor:
    """The adjoint of `upsampled` from the size `low`."""
    leaf = torch.zeros(*x.shape[:2], *low, dtype=x.dtype, requires_grad=True)
    if not x.numel():
        return leaf.detach()
    (upsampled(leaf, x.shape[2:]) * x).sum().backward()
    return leaf.grad


def logit_bounds(call: Call, drawn: Tensors, upstream: torch.Tensor) -> Bounds:
    temperature = call.settings["temperature"]
    largest = torch.zeros(call.images, 1, *call.size, dtype=torch.float64)
    for x in (drawn.student, drawn.teacher):
        finite = x.double().nan_to_num(0, 0, 0)
        largest = largest + upsampled(finite.abs(), call.size).amax(1, keepdim=True) / temperature
    weight = drawn.keep.double() if drawn.weight is None else drawn.weight.double() * drawn.keep
    parts = weight * sum(call.settings.get(f"{part}_weight", 0.5) for part in ("target", "nontarget"))
    parts = parts / weight.sum().clamp(min=1e-30) if call.reduction == "mean" else parts
    value = parts * temperature**2 * (1 + largest.squeeze(1)).square()
    gradient = (parts * upstream.double().abs() * temperature).unsqueeze(1) * (1 + largest)
    each, _ = truth(replace(call, reduction="none"), drawn)
    undefined = each.isinf().double().unsqueeze(1)
    gradient, undefined = (adjoint(x, call.low or call.size) for x in (gradient, undefined))
    if call.low and gradient.numel():
        pool = [F.max_pool1d, F.max_pool2d, F.max_pool3d][len(call.low) - 1]
        # the position's rounding in the definition is one of fp64
        gradient = gradient + (1 if double(call) else 2.0**-24) * pool(gradient, 3, 1, 1)
    return Bounds(value if call.reduction == "none" else value.sum(), gradient, undefined > 0)


def spatial_bounds(call: Call, drawn: Tensors, upstream: torch.Tensor) -> Bounds:
    """As for logits, with a row's pixels as classes; an entry's gradient is wrong in proportion to its probabilities."""
    temperature = call.settings["temperature"]
    counts = drawn.keep.unsqueeze(1)
    largest = torch.zeros(call.images, call.channels, *[1] * len(call.size), dtype=torch.float64)
    probability = torch.zeros(drawn.student.shape, dtype=torch.float64)
    for x in drawn[:2]:
        u = torch.where(counts, x.double(), -torch.inf).flatten(2) / temperature
        if u.numel():
            finite = u.nan_to_num(0, 0, 0).abs().amax(2)
            largest += finite.reshape(largest.shape)
            probability += u.softmax(2).nan_to_num().reshape(probability.shape)
    pixels = drawn.keep.flatten(1).sum(1).double().reshape(-1, *[1] * (largest.dim() - 1))
    valid, largest = (pixels > 0).double(), largest + pixels.clamp(min=1).log()
    share = valid / (valid.sum().clamp(min=1) * call.channels) if call.reduction == "mean" else valid
    value = share * temperature**2 * (1 + largest).square()
    v = upstream.double().abs()
    v = v.reshape(largest.shape) if v.dim() else v
    gradient = v * share * temperature * (1 + largest) * probability.clamp(min=1e-30)  # smaller ones underflow
    undefined = torch.zeros_like(probability, dtype=torch.bool)
    if call.absent == "student":
        undefined[:, -1:] = True
    each = value.flatten(1) if call.reduction == "none" else value.sum()
    return Bounds(each, gradient, undefined)


class Moved(NamedTuple):
    """By how much an error of q moves a correlation, and how large its gradient and that one's error are, entry by entry."""

    value: torch.Tensor
    gradient: torch.Tensor
    error: torch.Tensor


def correlation_moved(q: list[torch.Tensor], e: list[torch.Tensor], axis: int, unit: float) -> Moved:
    """Vectors of both networks along `axis`, of lengths a and b, with errors e: s is the student's, t the teacher's.

    The correlation ⟨q_s, q_t⟩ / D, D = ab + 1e-8, moves by δ = (b e_s + a e_t + e_s e_t) / D; its gradient for q_s has entries of
    up to b / D times those of unit vectors, and moves by (e_t + b δ + b² e_s / D) / D.
    """
    (a, b), (e_a, e_b) = ([x.norm(dim=axis, keepdim=True) for x in both] for both in (q, e))
    denominator = (a * b - b * e_a - a * e_b - e_a * e_b).clamp(min=0) + 1e-8
    value = ((b * e_a + a * e_b + e_a * e_b) / denominator + unit).clamp(max=2)
    entries = sum(x.abs() / length.clamp(min=1e-300) for x, length in zip(q, (a, b), strict=True))
    longest = b + e_b
    error = (e[1] + longest * entries * value + longest.square() * e[0] / denominator) / denominator
    return Moved(value, longest * entries / denominator, error)


def pearson_bounds(call: Call, drawn: Tensors, upstream: torch.Tensor) -> Bounds:
    temperature, classes, number = call.settings["temperature"], call.channels, int(drawn.keep.sum())
    gradient = torch.zeros(drawn.student.shape, dtype=torch.float64)
    undefined = torch.zeros_like(gradient, dtype=torch.bool)
    if not number:
        return Bounds(torch.zeros((), dtype=torch.float64), gradient, undefined)
    unit = ROUNDINGS * torch.finfo(torch.float64 if double(call) else torch.float32).eps / 2
    q, e, probability = [], [], []
    for x in drawn[:2]:
        u = x.double().movedim(1, 0)[:, drawn.keep] / temperature  # [C, pixels that count]
        p = u.softmax(0)
        largest = u.nan_to_num(0, 0, 0).abs().amax(0)
        probability.append(p)
        q.append(p - 1 / classes)
        e.append(unit * (p + 2 * largest * p * (1 - p) + 1 / classes))
    inter = correlation_moved(q, e, 0, unit)
    # of a class: from a sum of squares that of the mean is taken, in fp64
    lost = [(2.0**-49 * x.square().mean(1, keepdim=True)).sqrt() for x in q]
    e_centred = [x + x.mean(1, keepdim=True) + y for x, y in zip(e, lost, strict=True)]
    intra = correlation_moved([x - x.mean(1, keepdim=True) for x in q], e_centred, 1, unit)

    p, e_p = probability[0], e[0]
    value = torch.zeros((), dtype=torch.float64)
    total = torch.zeros_like(p)
    for moved, name, share in ((inter, "inter", 1 / number), (intra, "intra", 1 / classes)):
        weight = abs(call.settings[f"{name}_weight"]) * share
        value += temperature**2 * weight * (moved.value.sum() + unit / share)
        size, error = (x + (p * x).sum(0) for x in (moved.gradient, moved.error))  # of g - Σ p g
        total += upstream.abs().double() * temperature * weight * ((e_p + unit * p) * size + p * error)
    gradient.movedim(1, 0)[:, drawn.keep] = total
    return Bounds(value / unit, gradient / unit, undefined)


def standardised_bounds(call: Call, drawn: Tensors, upstream: torch.Tensor) -> Bounds:
    """With deviations a, b: an error δ of a channel's sums, relative to its variance, moves the factors 2 / a² and 2 / (ab) by δ of
    themselves; the gradient's terms, of which the means are a part, are rounded one by one."""
    gradient = torch.zeros(drawn.student.shape, dtype=torch.float64)
    undefined = torch.zeros_like(gradient, dtype=torch.bool)
    number = int(drawn.keep.sum())
    if not number:
        return Bounds(torch.zeros((), dtype=torch.float64), gradient, undefined)
    unit = torch.finfo(torch.float64 if double(call) else torch.float32).eps / 2
    s, t = (x.double().movedim(1, 0)[:, drawn.keep] for x in drawn[:2])  # [C, pixels that count]
    deviations, condition = [], torch.zeros(call.channels, 1, dtype=torch.float64)
    size = torch.zeros((), dtype=torch.float64)
    for x in (s, t):
        square, around = (y.square().sum(1, keepdim=True) for y in (x, x - x.mean(1, keepdim=True)))
        varies = around > 1e-14 * square
        condition += torch.where(varies, square / around.clamp(min=1e-300), 1)
        deviations.append(torch.where(varies, around / max(number - 1, 1), 0).sqrt() + 1e-6)
        size = size + torch.where(varies, around, 0) / deviations[-1].square()
    a, b = deviations
    value = (4 * condition * size).mean() / number
    factor = 2 / (number * call.channels * a)
    terms = sum(x.abs() + x.abs().mean(1, keepdim=True) for x in (s, t))
    moved = condition * ((s - s.mean(1, keepdim=True)).abs() / a + (t - t.mean(1, keepdim=True)).abs() / b)
    error = upstream.double().abs() * factor * (moved + terms * (1 / a + 1 / b))
    gradient.movedim(1, 0)[:, drawn.keep] = error
    return Bounds(value * 2.0**-53 / unit, gradient * 2.0**-53 / unit, undefined)


def unit_of(call: Call) -> float:
    """K·ε."""
    return ROUNDINGS * torch.finfo(torch.float64 if double(call) else torch.float32).eps / 2


class Map(NamedTuple):
    """An attention map, and what rounding does to it."""

    q: torch.Tensor
    error: torch.Tensor  # of q
    norm: torch.Tensor  # of the energies
    relative: torch.Tensor  # error of the norm, relative to it
    undefined: torch.Tensor


def map_moved(call: Call, x: torch.Tensor, keep: torch.Tensor) -> Map:
    power = call.settings["power"]
    limits = torch.finfo(torch.float64 if double(call) else torch.float32)
    over = tuple(range(1, keep.dim()))
    energy = torch.where(keep.unsqueeze(1), x.double(), 0).abs().pow(power).sum(1)
    lost = x.shape[1] * limits.smallest_normal * limits.eps * (energy > 0)
    norm = energy.square().sum(over, keepdim=True).sqrt().clamp(min=1e-300)
    share = lost.square().sum(over, keepdim=True).sqrt() / norm  # of the norm, lost below the normal numbers
    undefined = share >= 0.5
    relative = 2 * unit_of(call) * (1 + power) + share / (1 - share.clamp(max=0.5))
    q = energy / norm
    return Map(q, torch.where(undefined, 2, q * relative + 2 * lost / norm), norm, relative, undefined)


def map_gradient_moved(call: Call, drawn: Tensors, moved: Map, v: torch.Tensor, e_v: torch.Tensor) -> torch.Tensor:
    """Where at most v, with an error of e_v, arrives for the student's map: the error of the features' gradient."""
    power, over = call.settings["power"], tuple(range(1, v.dim()))
    q, e_q, norm, relative, _ = moved
    product = (v * q).sum(over, keepdim=True)
    e_product = (v * e_q + e_v * q).sum(over, keepdim=True)
    e_w = e_q * product + q * e_product + unit_of(call) * v + e_v  # of w = v - q <v, q>
    x = torch.where(drawn.keep.unsqueeze(1), drawn.student.double(), 0).abs()
    size = (x > 0) * power * x.pow(power - 1) / norm.unsqueeze(1)
    return size * (e_w + relative * (v + q * product)).unsqueeze(1)


def attention_bounds(call: Call, drawn: Tensors, upstream: torch.Tensor) -> Bounds:
    moved, v = map_moved(call, drawn.student, drawn.keep), upstream.double().abs()
    gradient = map_gradient_moved(call, drawn, moved, v, torch.zeros_like(v))
    return Bounds(moved.error / unit_of(call), gradient / unit_of(call), moved.undefined.unsqueeze(1))


def indicator(call: Call, drawn: Tensors) -> torch.Tensor:
    """[B, N, K]: which pixel is of which class."""
    label = torch.where(drawn.keep, drawn.target.long(), 0).flatten(1)
    return F.one_hot(label, call.settings["num_classes"]).double() * drawn.keep.flatten(1).unsqueeze(2)


def class_bounds(call: Call, drawn: Tensors, upstream: torch.Tensor) -> Bounds:
    undefined = torch.zeros(drawn.student.shape, dtype=torch.bool)
    x = torch.where(drawn.keep.unsqueeze(1), drawn.student.double(), 0).flatten(2)
    own = indicator(call, drawn)
    number = own.sum(1)
    magnitude = (x.abs() @ own) / (number + 1e-6).unsqueeze(1)  # [B, C, K]
    if call.operator != "class_similarity":
        return Bounds(2 * magnitude.mT, torch.zeros_like(x).view(drawn.student.shape), undefined)
    prototype = ((x @ own) / (number + 1e-6).unsqueeze(1)).norm(dim=1).clamp(min=1e-8)  # [B, K]
    condition = 1 + 2 * magnitude.norm(dim=1) / prototype
    v = upstream.double().abs().flatten(1)
    through = (v.unsqueeze(2) * own).sum(1) / (prototype * (number + 1e-6))
    direct = v / x.norm(dim=1).clamp(min=1e-8)
    each = (own @ condition.unsqueeze(2)).squeeze(2)  # [B, N]
    gradient = 2 * each * (direct + (own @ through.unsqueeze(2)).squeeze(2))
    gradient = gradient.view(call.images, 1, *call.size).expand(drawn.student.shape)
    return Bounds(each.view(call.images, *call.size), gradient, undefined)


class Directions(NamedTuple):
    """Class means m over max(|m|, 1e-12), and what rounding does to them."""

    m: torch.Tensor  # [B, K, C]
    length: torch.Tensor  # [B, K]: 1, or less where |m| is
    error: torch.Tensor  # [B, K], L2
    slope: torch.Tensor  # [B, K]: 1 / max(|m|, 1e-12), of the shortest m within its error
    lost: float  # of a product of two, where it underflows

    def cosines(self, unit: float) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, K, K], and their errors."""
        length = self.length + self.error
        error = self.error.unsqueeze(2) * length.unsqueeze(1)
        error = error + error.mT + unit * self.length.unsqueeze(2) * self.length.unsqueeze(1)
        return self.m @ self.m.mT, error + self.lost * self.slope.unsqueeze(2) * self.slope.unsqueeze(1)


def directions(call: Call, x: torch.Tensor, keep: torch.Tensor, own: torch.Tensor) -> Directions:
    """`own` [B, N, K] as `indicator` gives it."""
    x = torch.where(keep.unsqueeze(1), x.double(), 0).flatten(2)
    number = own.sum(1).clamp(min=1).unsqueeze(2)
    means, magnitude = ((y @ own).mT / number for y in (x, x.abs()))
    norm, error = means.norm(dim=2), 2 * unit_of(call) * magnitude.norm(dim=2)
    slope = 1 / (norm - error).clamp(min=1e-12)
    limits = torch.finfo(torch.float64 if double(call) else torch.float32)
    lost = x.shape[1] * limits.smallest_normal * limits.eps
    # twice: an error across m, and that of its length
    error = 2 * (error * slope).clamp(max=1)
    return Directions(F.normalize(means, dim=2), (norm / 1e-12).clamp(max=1), error, slope, lost)


def importance_and_affinity_bounds(call: Call, drawn: Tensors, upstream: torch.Tensor) -> Bounds:
    unit, own = unit_of(call), indicator(call, drawn)
    classes = own.any(1).sum(1)
    pairs = (classes * (classes - 1)).double()
    v_maps, v_affinity = (v.double().abs() for v in upstream)

    maps = [map_moved(call, x, drawn.keep) for x in drawn[:2]]
    share = 1 / classes.count_nonzero().clamp(min=1)
    d, e = (maps[0].q - maps[1].q).abs(), maps[0].error + maps[1].error
    of_images = (d.square() * unit + 2 * d * e + e.square()).flatten(1).sum(1)
    importance = share * of_images.clamp(max=4).sum()
    gradient = map_gradient_moved(call, drawn, maps[0], 2 * v_maps * share * d, 2 * v_maps * share * (e + unit * d))

    means = [directions(call, x, drawn.keep, own) for x in drawn[:2]]
    (r_s, e_s), (r_t, e_t) = (x.cosines(unit) for x in means)
    share = torch.where(pairs > 0, 1 / (pairs * pairs.count_nonzero()).clamp(min=1), 0).view(-1, 1, 1)
    d, e = (r_s - r_t).abs(), e_s + e_t
    affinity = (share * (d.square() * unit + 2 * d * e + e.square()).clamp(max=4)).sum()
    w, e_w = 4 * v_affinity * share * d, 4 * v_affinity * share * (e + unit * d)  # what arrives for a cosine, both ways
    length, error = means[0].length.unsqueeze(2), means[0].error.unsqueeze(2)
    # of g = W M, M the directions; its part across m is taken, and divided by the norm
    g, e_g = w @ length, w @ error + e_w @ (length + error) + unit * (w @ length)
    of_means = means[0].slope.unsqueeze(2) * (2 * e_g + (3 * error + 2 * unit) * (g + e_g))
    of_pixels = own @ (of_means / own.sum(1).clamp(min=1).unsqueeze(2))
    gradient = gradient + of_pixels.view(call.images, 1, *call.size)
    return Bounds(torch.stack([importance, affinity]) / unit, gradient / unit, maps[0].undefined.unsqueeze(1))


def average_bounds(call: Call, drawn: Tensors, upstream: torch.Tensor) -> Bounds:
    with medkd_fast.use_backend("reference"):
        magnitude = run(call, drawn.student.double().abs(), drawn, drawn.teacher)
    nothing = torch.zeros(drawn.student.shape, dtype=torch.float64)
    return Bounds(4 * magnitude, nothing, nothing > 0)


def rows_of(call: Call, x: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the rows that the relation multiplies, [B, rows]: norms, and by how much a relation changes with a row's entry."""
    relation = call.settings["relation"]
    counts = keep.unsqueeze(1)
    x = torch.where(counts, x.double(), 0).flatten(2)
    counts = counts.flatten(2)
    if call.operator.startswith("pixel"):
        x, counts = x.mT, torch.ones(1, 1, x.shape[1], dtype=torch.bool)
    length = counts.sum(2).clamp(min=1)
    if relation == "pearson":
        x = torch.where(counts, x - x.sum(2, keepdim=True) / length.unsqueeze(2), 0)
    norm = x.norm(dim=2)
    longest = norm.max() if norm.numel() else norm.sum()  # across images, too, rows are multiplied
    if relation == "gram":
        return norm / length.sqrt(), (longest / length).expand_as(norm)
    if relation == "row":  # by entries of its own row of the matrix, and of others
        inverse = 1 / (x @ x.mT).norm(dim=2).clamp(min=1e-12)
        return torch.ones_like(norm), longest * inverse + (norm * inverse).amax(1, keepdim=True)
    if relation == "softmax":
        return torch.ones_like(norm), torch.full_like(norm, 1 / call.settings["temperature"])
    return torch.ones_like(norm), 1 / norm.clamp(min=1e-12)


def sizes_of(call: Call, drawn: Tensors, upstream: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Where student and teacher disagree: of a relation or a loss, and of the gradient of the student's rows [B, rows]."""
    norm, slope = rows_of(call, drawn.student, drawn.keep)
    v = upstream.double().abs()
    if v.dim() == 3:  # for each entry of the relation
        largest = norm.square().max().item() if norm.numel() else 0.0
        return largest, slope * (v + v.mT).sum(2)
    other, _ = rows_of(call, drawn.teacher, drawn.keep)
    largest = max(x.square().max().item() if x.numel() else 0.0 for x in (norm, other))  # of the relations
    # each image takes part in the values of its row and its column
    across = call.settings.get("across_images", False)
    v = (v.expand(call.images, call.images).sum(0) + v.expand(call.images, call.images).sum(1)) if across else v
    v = v.expand(call.images).unsqueeze(1)
    if call.settings["divergence"] == "kl":
        temperature = call.settings["temperature"]
        return 1 + largest / temperature, 4 * v * slope / temperature * (1 + largest / temperature)
    rows = drawn.keep.flatten(1).sum(1, keepdim=True) if call.operator == "pixel_relation" else norm.shape[1]
    return largest**2, 4 * v * slope * largest / torch.as_tensor(rows).clamp(min=1)


def relation_bounds(call: Call, drawn: Tensors, upstream: torch.Tensor) -> Bounds:
    size, rows = sizes_of(call, drawn, upstream)
    if call.operator.startswith("channel"):
        rows = rows.reshape(call.images, call.channels, *[1] * len(call.size))
    else:
        rows = rows.reshape(call.images, 1, *call.size)
    rows = (rows * drawn.keep.unsqueeze(1)).expand_as(drawn.student)

    step = 2.0**-28
    generator = torch.Generator().manual_seed(call.seed + 2)
    value, gradient = truth(call, drawn, upstream)
    change, condition = torch.zeros_like(value), torch.zeros_like(rows)
    for _ in range(4):  # one alone may happen to move nothing
        moved = [x * (1 + step * torch.randn(x.shape, generator=generator, dtype=torch.float64)) for x in drawn[:2]]
        near, near_gradient = truth(call, drawn._replace(student=moved[0], teacher=moved[1]), upstream)
        change = torch.maximum(change, (near - value).abs() / step)
        moved_by = (near_gradient - gradient).abs() / step
        condition = torch.maximum(condition, torch.where(moved_by > 0, moved_by / rows, 0))
    # what one row of an image loses reaches the others
    worst = condition.flatten(1).amax(1) if condition.numel() else condition.new_zeros(call.images)
    rows = rows * (1 + worst.reshape(-1, *[1] * (rows.dim() - 1)))
    values = 1
    if call.reduction == "sum":
        values = call.images ** (2 if call.settings.get("across_images") else 1)
    return Bounds(size * values + change, rows, torch.zeros_like(rows, dtype=torch.bool))


BOUNDS: dict[str, Callable[[Call, Tensors, torch.Tensor], Bounds]] = {
    "decoupled_kl": logit_bounds,
    "class_kl": logit_bounds,
    "spatial_kl": spatial_bounds,
    "class_pearson": pearson_bounds,
    "standardised_mse": standardised_bounds,
    "attention_map": attention_bounds,
    "importance_and_affinity": importance_and_affinity_bounds,
    "class_means": class_bounds,
    "class_similarity": class_bounds,
    "average_pool": average_bounds,
}


def truth(call: Call, drawn: Tensors, upstream: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    teacher = drawn.teacher.double()
    with medkd_fast.use_backend("reference"):
        return value_and_gradient(lambda x: run(call, x, drawn, teacher), drawn.student.double(), upstream)


def computed(call: Call, drawn: Tensors, upstream: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The backend's value and gradient, on the CPU."""
    device = "cuda" if backend != "cpp" and torch.cuda.is_available() else "cpu"
    there = Tensors(*(x if x is None else x.to(device) for x in drawn))
    layout = LAYOUTS[call.student_layout]
    with medkd_fast.use_backend(backend):
        value, gradient = value_and_gradient(
            lambda x: run(call, layout(x), there, there.teacher), there.student, upstream.to(device)
        )
    return value.cpu(), gradient.cpu()


def check_selection(call: Call, backend: str) -> None:
    drawn = tensors(call)
    shape = truth(call, drawn)[0].shape
    generator = torch.Generator().manual_seed(call.seed + 1)
    upstream = (call.upstream * torch.randn(shape, generator=generator)).to(call.student_dtype)
    got = computed(call, drawn, upstream, backend)
    for what, a, b in zip(("value", "gradient"), got, truth(call, drawn, upstream), strict=True):
        assert a.dtype == call.student_dtype
        compare(what, a, b, torch.zeros_like(b))


def check(call: Call, backend: str = "cpp") -> None:
    if call.operator == "max_pool":
        return check_selection(call, backend)
    drawn = tensors(call)
    shape = truth(call, drawn)[0].shape
    generator = torch.Generator().manual_seed(call.seed + 1)
    upstream = call.upstream * (torch.randn(shape, generator=generator) if shape else torch.ones(()))
    want, want_gradient = truth(call, drawn, upstream)
    value, gradient = computed(call, drawn, upstream, backend)

    bounds = BOUNDS.get(call.operator, relation_bounds)(call, drawn, upstream)
    assert value.dtype == (torch.float64 if double(call) else torch.float32)
    assert gradient.dtype == call.student_dtype
    unit = torch.finfo(value.dtype).eps / 2
    underflow = torch.finfo(value.dtype).smallest_normal
    roundings = ROUNDINGS + (max(call.size) if double(call) and call.low else 0)
    compare("value", value, want, unit * (roundings * bounds.value + 4 * want.abs()) + underflow)
    # rounded when it is saved, before the division by the number of pixels, and when it is divided; 1 / pixels is rounded too
    limits = torch.finfo(call.student_dtype)
    size = 1 + (upstream.abs().max() if upstream.numel() else 0)
    if drawn.weight is not None and call.reduction == "mean":  # what is saved is divided by the sum of the weights
        size = size / (drawn.weight * drawn.keep).sum().clamp(1e-30, 1)
    bound = unit * roundings * (bounds.gradient + want_gradient.abs()) + 1.5 * limits.eps * want_gradient.abs()
    bound = bound + limits.smallest_normal * limits.eps * size + underflow
    defined = ~bounds.undefined.expand_as(gradient)
    compare("gradient", torch.where(defined, gradient, 0), torch.where(defined, want_gradient, 0), bound)
    assert not gradient.isnan().any(), "gradient: NaN"


def compare(what: str, got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor) -> None:
    assert got.shape == want.shape
    assert not want.isnan().any(), f"{what}: the definition is NaN"
    got, largest = got.double(), torch.finfo(got.dtype).max
    difference = torch.where(got == want, 0, (got - want).abs())
    # an infinity where the dtype may not hold the number
    difference = torch.where((want.abs() + bound > largest) & got.isinf(), 0, difference)
    excess = difference - bound
    if excess.numel() and not (excess <= 0).all():
        worst = int(excess.nan_to_num(torch.inf).argmax())
        a, b, c = (x.expand_as(got).flatten()[worst].item() for x in (got, want, bound))
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), got.shape)) if got.dim() else ()
        raise AssertionError(f"{what}: got {a} at {where}, want {b} with a bound of {c}")


def sizes(most: tuple[int, ...]) -> st.SearchStrategy[tuple[int, ...]]:
    """Spatial sizes in 1-D, 2-D and 3-D: each dimension up to `most`, seldom 0."""
    return st.one_of([st.tuples(*[st.integers(1, most[d])] * (d + 1)) for d in range(3)]) | st.tuples(
        st.integers(0, 2), st.integers(0, 2)
    )


def temperatures() -> st.SearchStrategy[float]:
    return st.sampled_from([1.0, 4.0, 0.05, 3.0, 100.0])


def common(operator: str, most: tuple[int, ...]) -> dict[str, st.SearchStrategy[Any]]:
    return {
        "operator": st.just(operator),
        "images": st.sampled_from([1, 2, 3, 1, 2, 3, 0]),
        "channels": st.sampled_from([2, 3, 5, 9, 17, 37]),
        "size": sizes(most),
        "student_dtype": st.sampled_from(FLOATS),
        "teacher_dtype": st.sampled_from(FLOATS),
        "student_layout": st.sampled_from(sorted(LAYOUTS)),
        "teacher_layout": st.sampled_from([*sorted(LAYOUTS), EXPANDED]),
        "spread": st.sampled_from([1.0, 3.0, 1.0, 3.0, 10.0, 1e4, 1e-3, 1e-6, 1e-20, 0.0]),
        "mean": st.sampled_from([0.0, 0.5]),
        "agreement": st.sampled_from(["none", "none", "converged", "equal"]),
        "reduction": st.sampled_from(["mean", "sum", "none"]),
        "upstream": st.sampled_from([1.0, -3.0, 1.0, -3.0, 1024.0, 1e-3, 0.0]),
        "removed": st.sampled_from([0.0, 0.1, 0.3, 0.0, 0.1, 0.3, 0.9, 1.0]),
        "poisoned": st.booleans(),
        "seed": st.integers(0, 2**16),
    }


@st.composite
def logit_calls(draw: st.DrawFn, operator: str) -> Call:
    drawn = {name: draw(strategy) for name, strategy in common(operator, (700, 32, 11)).items()}
    settings: dict[str, Any] = {"temperature": draw(temperatures())}
    if operator == "decoupled_kl":
        for name in ("target_weight", "nontarget_weight"):
            settings[name] = draw(st.sampled_from([1.0, 0.5, 2.0, 0.0]))
    low = None
    if draw(st.booleans()):
        low = tuple(draw(st.integers(min(1, n), n)) for n in drawn["size"])
    return Call(
        **drawn,
        settings=settings,
        low=None if low == drawn["size"] else low,
        label_dtype=draw(st.sampled_from(LABELS)),
        absent=draw(st.sampled_from(["none", "none", "both", "teacher", "student"])),
        weighted=draw(st.sampled_from(["no", "no", "yes", "yes", "some zeros", "zeros"])),
    )


@st.composite
def spatial_calls(draw: st.DrawFn) -> Call:
    drawn = {name: draw(strategy) for name, strategy in common("spatial_kl", (700, 32, 11)).items()}
    absent = draw(st.sampled_from(["none", "none", "both", "teacher", "student"]))
    return Call(**drawn, settings={"temperature": draw(temperatures())}, absent=absent)


@st.composite
def pearson_calls(draw: st.DrawFn) -> Call:
    drawn = {name: draw(strategy) for name, strategy in common("class_pearson", (700, 32, 11)).items()}
    settings: dict[str, Any] = {"temperature": draw(temperatures())}
    for name in ("inter_weight", "intra_weight"):
        settings[name] = draw(st.sampled_from([1.0, 0.5, 2.0, 0.0]))
    absent = draw(st.sampled_from(["none", "none", "both", "teacher", "student"]))
    drawn |= {"reduction": "mean", "absent": absent, "label_dtype": draw(st.sampled_from(LABELS))}
    return Call(**drawn, settings=settings)


@st.composite
def standardised_calls(draw: st.DrawFn) -> Call:
    drawn = {name: draw(strategy) for name, strategy in common("standardised_mse", (700, 32, 11)).items()}
    if draw(st.integers(0, 9)) == 0:
        drawn["channels"] = 1
    return Call(**drawn | {"reduction": "mean"}, settings={}, zero_rows=draw(st.integers(0, 3)) == 0)


POWERS = [2.0, 1.0, 2.0, 4.0, 3.0, 1.5]


@st.composite
def attention_calls(draw: st.DrawFn) -> Call:
    drawn = {name: draw(strategy) for name, strategy in common("attention_map", (700, 32, 11)).items()}
    drawn |= {"teacher_dtype": drawn["student_dtype"], "agreement": "none", "reduction": "none"}
    if draw(st.integers(0, 9)) == 0:
        drawn["channels"] = 1
    settings = {"power": draw(st.sampled_from(POWERS))}
    return Call(**drawn, settings=settings, zero_rows=draw(st.integers(0, 3)) == 0)


BY_CLASS = ("class_means", "class_similarity")
CLASSES = [1, 2, 5, 19, 40]
POOLS = ("max_pool", "average_pool")


@st.composite
def class_calls(draw: st.DrawFn, operator: str) -> Call:
    drawn = {name: draw(strategy) for name, strategy in common(operator, (700, 32, 11)).items()}
    drawn |= {"teacher_dtype": drawn["student_dtype"], "agreement": "none", "reduction": "none"}
    return Call(
        **drawn,
        settings={"num_classes": draw(st.sampled_from(CLASSES))},
        label_dtype=draw(st.sampled_from(LABELS)),
        coherent=draw(st.booleans()),
    )


@st.composite
def importance_and_affinity_calls(draw: st.DrawFn) -> Call:
    drawn = {name: draw(strategy) for name, strategy in common("importance_and_affinity", (700, 32, 11)).items()}
    drawn |= {"reduction": "mean", "teacher_channels": draw(st.sampled_from([None, None, 1, 4, 23]))}
    if draw(st.integers(0, 9)) == 0:
        drawn["channels"] = 1
    return Call(
        **drawn,
        settings={"num_classes": draw(st.sampled_from(CLASSES)), "power": draw(st.sampled_from(POWERS))},
        label_dtype=draw(st.sampled_from(LABELS)),
        zero_rows=draw(st.integers(0, 3)) == 0,
        coherent=draw(st.booleans()),
    )


#: What the relations are built for, with the divergences of the losses.
KINDS: dict[str, list[tuple[str, str | None]]] = {
    "channel_relation": [(relation, "mse") for relation in ("cosine", "pearson", "gram", "row", "softmax")]
    + [(relation, "kl") for relation in ("cosine", "pearson", "gram", "row")],
    "pixel_relation": [(relation, d) for relation in ("cosine", "pearson", "gram") for d in ("mse", "kl")],
    "channel_gram": [(relation, None) for relation in ("cosine", "pearson", "gram", "row", "softmax")],
    "pixel_affinity": [(relation, None) for relation in ("cosine", "pearson", "gram")],
}


@st.composite
def relation_calls(draw: st.DrawFn, operator: str, relation: str, divergence: str | None) -> Call:
    drawn = {name: draw(strategy) for name, strategy in common(operator, (300, 17, 6)).items()}
    settings: dict[str, Any] = {"relation": relation}
    if divergence or relation == "softmax":
        settings["temperature"] = draw(temperatures())
    if divergence:
        settings["divergence"] = divergence
    else:  # of one network
        drawn |= {"teacher_dtype": drawn["student_dtype"], "agreement": "none", "reduction": "none"}
    if operator == "pixel_affinity":
        drawn["removed"] = 0.0
    if operator == "pixel_relation":
        settings["across_images"] = draw(st.booleans())
        drawn["teacher_channels"] = draw(st.sampled_from([None, None, 1, 4, 23]))
    if draw(st.integers(0, 9)) == 0:
        drawn["channels"] = 1
    return Call(**drawn, settings=settings, zero_rows=draw(st.integers(0, 3)) == 0)


@st.composite
def pool_calls(draw: st.DrawFn, operator: str) -> Call:
    drawn = {name: draw(strategy) for name, strategy in common(operator, (700, 32, 11)).items()}
    drawn |= {"teacher_dtype": drawn["student_dtype"], "agreement": "none", "reduction": "none"}
    window = (
        draw(st.integers(1, 4)) if draw(st.booleans()) else tuple(draw(st.integers(1, n + 1)) for n in drawn["size"])
    )
    return Call(**drawn, settings={"window": window}, zero_rows=draw(st.integers(0, 3)) == 0)


#: Every operator and relation: generated calls, and the share of all examples that they get.
CALLS: dict[str, tuple[st.SearchStrategy[Call], float]] = {
    operator: (logit_calls(operator), 1 / 8) for operator in ("decoupled_kl", "class_kl")
}
CALLS["spatial_kl"] = spatial_calls(), 1 / 8
CALLS["class_pearson"] = pearson_calls(), 1 / 8
CALLS["standardised_mse"] = standardised_calls(), 1 / 8
CALLS["attention_map"] = attention_calls(), 1 / 8
CALLS["importance_and_affinity"] = importance_and_affinity_calls(), 1 / 8
for operator in BY_CLASS:
    CALLS[operator] = class_calls(operator), 1 / 16
for operator in POOLS:
    CALLS[operator] = pool_calls(operator), 1 / 16
for operator, kinds in KINDS.items():
    for kind in kinds:
        name = " ".join(filter(None, (operator, *kind)))
        CALLS[name] = (relation_calls(operator, *kind), 1 / 8 / len(kinds))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Handing small calls to threads takes longer than the calls; that threads change no bit, other tests say."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CALLS)
def test_equals_the_definition(fused: str, one_thread: None, name: str) -> None:
    calls, share = CALLS[name]
    if fused in EMULATED:
        share /= 10
    generated = hypothesis.settings(
        PROFILE,
        max_examples=math.ceil(share * PROFILE.max_examples),
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )(hypothesis.given(calls)(lambda call: check(call, fused)))
    with torch.device("cpu"):  # where tensors are drawn
        generated()
