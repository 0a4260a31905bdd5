"""The frame of class_kl and decoupled_kl: one pass over the pixels gives values and gradient, a second stage adds up slots.

Sums are fp64, one slot a program, added up in the order of the slots. What a pass looks like: equal_size.py, upsampled.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from medkd_fast.kernels.divergence import divergences
from medkd_fast.kernels.planes import gradient_like, planes_of
from medkd_fast.reference.common import arithmetic

#: The second stage loads all slots at once.
MOST_SLOTS = 8192


@triton.jit
def labels_of(target, pixel, mask, HAS_TARGET: tl.constexpr, AGAIN: tl.constexpr):
    """Labels; volatile, loading them a second time is not optimised to keeping them."""
    label = tl.zeros_like(pixel)
    if HAS_TARGET:
        label = tl.load(target + pixel, mask=mask, other=0, volatile=AGAIN).to(tl.int64)
    return label


@triton.jit
def tile_of_pixels(
    s, t, target, weight, loss, target_term, nontarget_term, pixel, mask, mask_of_stores,
    classes, target_weight, nontarget_weight, temperature, to_base_2, ignore_index,
    A: tl.constexpr, DECOUPLED: tl.constexpr, HAS_TARGET: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    WANT_GRADIENT: tl.constexpr, PER_PIXEL: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """What becomes of a tile of logits: both parts and the weight of every pixel, [1, M], and the gradient for s.

    `pixel` [1, M] counts over all images. All are 0 at pixels that do not count. Values of single pixels are stored.
    """
    w = tl.full(pixel.shape, 1.0, A)
    if HAS_WEIGHT:
        w = tl.load(weight + pixel, mask=mask, other=0.0)
    label = labels_of(target, pixel, mask, HAS_TARGET, False)
    counts = mask & (w != 0)
    if HAS_TARGET:
        counts = counts & (label != ignore_index)
    w = tl.where(counts, w, 0.0)
    if DECOUPLED:
        w = tl.where(counts & ((label < 0) | (label >= classes)), float("nan"), w)
    scale = w * temperature
    label_again = labels_of(target, pixel, mask, DECOUPLED and WANT_GRADIENT, True)
    target_part, nontarget_part, v = divergences(
        s, t, label.to(tl.int32), label_again.to(tl.int32), scale, to_base_2, target_weight, nontarget_weight,
        DECOUPLED, WANT_GRADIENT, K, R,
    )  # fmt: skip
    scale *= temperature
    target_part = tl.where(counts, scale * target_part, 0.0)
    nontarget_part = tl.where(counts, scale * nontarget_part, 0.0)
    v_s = ()
    if WANT_GRADIENT:
        for k in tl.static_range(K):
            v_s += (tl.where(counts, v[k], 0.0),)
    if PER_PIXEL:
        # a part of weight 0 is left out, even an infinite one
        total = tl.where(target_weight == 0, 0.0, target_weight * target_part)
        total += tl.where(nontarget_weight == 0, 0.0, nontarget_weight * nontarget_part)
        tl.store(loss + pixel, total, mask=mask_of_stores)
        if DECOUPLED:
            tl.store(target_term + pixel, target_part, mask=mask_of_stores)
            tl.store(nontarget_term + pixel, nontarget_part, mask=mask_of_stores)
    return target_part, nontarget_part, w, v_s


@triton.jit
def store_sums(sums, target, nontarget, weight):
    """A program's slot of [3, slots]."""
    slots = tl.num_programs(0)
    tl.store(sums + tl.program_id(0), target)
    tl.store(sums + slots + tl.program_id(0), nontarget)
    tl.store(sums + 2 * slots + tl.program_id(0), weight)


@triton.jit(do_not_specialize=["slots"])
def finish_kernel(
    sums, loss, target_term, nontarget_term, scale, slots, target_weight: tl.float64, nontarget_weight: tl.float64,
    MEAN: tl.constexpr, DECOUPLED: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Loss, its parts and 1 / denominator from the slots' sums [3, slots]."""
    target_weight, nontarget_weight = tl.full((), target_weight, tl.float64), tl.full((), nontarget_weight, tl.float64)
    o = tl.arange(0, SLOTS)
    target_sum = tl.sum(tl.load(sums + o, mask=o < slots, other=0.0))
    nontarget_sum = tl.sum(tl.load(sums + slots + o, mask=o < slots, other=0.0))
    one_over = tl.full((), 1.0, tl.float64)
    if MEAN:
        denominator = tl.sum(tl.load(sums + 2 * slots + o, mask=o < slots, other=0.0))
        one_over = tl.where(denominator == 0, 0.0, one_over / tl.where(denominator == 0, 1.0, denominator))
    target_sum = tl.where(one_over == 0, 0.0, target_sum * one_over)
    nontarget_sum = tl.where(one_over == 0, 0.0, nontarget_sum * one_over)
    total = tl.where(target_weight == 0, 0.0, target_weight * target_sum)
    total += tl.where(nontarget_weight == 0, 0.0, nontarget_weight * nontarget_sum)
    tl.store(loss, total)
    tl.store(scale, one_over)
    if DECOUPLED:
        tl.store(target_term, target_sum)
        tl.store(nontarget_term, nontarget_sum)


def power_of_2(x: int) -> int:
    """The smallest that is at least x."""
    return 1 << max(x - 1, 0).bit_length()


class Settings(NamedTuple):
    """The loss: class_kl is the non-target part alone, with no class as target."""

    decoupled: bool
    target_weight: float
    nontarget_weight: float
    temperature: float
    ignore_index: int
    reduction: str
    need_gradient: bool


class Call:
    """What the kernels of one call read and write; `outputs` is what decoupled_kl returns."""

    def __init__(
        self, student: Tensor, teacher: Tensor, target: Tensor | None, weight: Tensor | None, settings: Settings
    ) -> None:
        dtype = arithmetic(student, teacher)
        self.settings = settings
        self.images, self.classes = teacher.shape[:2]
        self.pixels = math.prod(teacher.shape[2:])
        self.per_pixel = settings.reduction == "none"
        shape = (self.images, *teacher.shape[2:]) if self.per_pixel else ()
        empty = self.images * self.pixels == 0  # then no kernel writes
        new = student.new_zeros if empty else student.new_empty
        loss = new(shape, dtype=dtype)
        # class_kl has no parts: the loss stands for them
        target_term, nontarget_term = (new(shape, dtype=dtype) if settings.decoupled else loss for _ in range(2))
        if self.per_pixel or (empty and settings.reduction == "sum"):
            scale = student.new_ones((), dtype=dtype)
        else:
            scale = new((), dtype=dtype)
        self.gradient = self.written = student.new_empty(0)
        self.strides_g = (0, 0, 0)
        if settings.need_gradient:
            self.gradient, self.written, self.strides_g = gradient_like(student)
        self.outputs = loss, target_term, nontarget_term, scale, self.gradient
        self.empty = empty
        self.student, self.strides_s = planes_of(student)
        self.teacher, self.strides_t = planes_of(teacher)
        self.inputs = target, weight
        self.values = loss, target_term, nontarget_term
        self.numbers = (
            settings.target_weight, settings.nontarget_weight, settings.temperature,
            math.log2(math.e) / settings.temperature, settings.ignore_index,
        )  # fmt: skip
        self.double = dtype == torch.float64
        self.flags = {
            "A": tl.float64 if self.double else tl.float32,
            "DECOUPLED": settings.decoupled,
            "HAS_TARGET": target is not None,
            "HAS_WEIGHT": weight is not None,
            "WANT_GRADIENT": settings.need_gradient,
            "PER_PIXEL": self.per_pixel,
        }

    def slots(self, tiles: int) -> tuple[int, int, Tensor]:
        """Programs, tiles of each, and memory for their sums."""
        tiles_of_program = -(-tiles // MOST_SLOTS)
        slots = -(-tiles // tiles_of_program)
        sums = self.values[0] if self.per_pixel else self.student.new_empty((3, slots), dtype=torch.float64)
        return slots, tiles_of_program, sums

    def finish(self, sums: Tensor) -> tuple[Tensor, ...]:
        """Loss and scale from the sums of all slots, the gradient where the caller wants it."""
        if not self.per_pixel:
            slots = sums.shape[1]
            many = slots > 1024
            finish_kernel[(1,)](
                sums, *self.values, self.outputs[3], slots, self.settings.target_weight, self.settings.nontarget_weight,
                MEAN=self.settings.reduction == "mean", DECOUPLED=self.settings.decoupled,
                SLOTS=MOST_SLOTS if many else 1024, num_warps=16 if many else 4,
            )  # fmt: skip
        if self.written is not self.gradient:
            self.gradient.copy_(self.written)
        return self.outputs
