"""The frame of class_kl and decoupled_kl: a pass over the pixels that gives values and gradient, and the sum of its slots.

A program takes tiles of neighbouring pixels of one image; every logits tensor is read once. Which layout a tensor has is in its
strides; the one that is 1 is known when the kernel is compiled. Sums are fp64, one slot a program, added up in the order of the
slots. A student of lower resolution: upsampled.py.
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
def labels_and_weights(
    target, weight, pixel, counted, classes, ignore_index, A: tl.constexpr,
    CHECKED: tl.constexpr, HAS_TARGET: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Of the pixels counted over all images: labels, weights (0 where a pixel does not count), and which ones count."""
    w = tl.full(pixel.shape, 1.0, A)
    if HAS_WEIGHT:
        w = tl.load(weight + pixel, mask=counted, other=0.0)
    label = tl.zeros_like(pixel)
    if HAS_TARGET:
        label = tl.load(target + pixel, mask=counted, other=0).to(tl.int64)
        counted = counted & (label != ignore_index)
    counted = counted & (w != 0)
    w = tl.where(counted, w, 0.0)
    if CHECKED:
        w = tl.where(counted & ((label < 0) | (label >= classes)), float("nan"), w)
    return label.to(tl.int32), w, counted


@triton.jit
def labels_again(target, pixel, mask, DECOUPLED: tl.constexpr):
    """The labels, loaded anew: see divergences."""
    label = tl.zeros_like(pixel)
    if DECOUPLED:
        label = tl.load(target + pixel, mask=mask, other=0, volatile=True)
    return label.to(tl.int32)


@triton.jit
def pixel_loss_kernel(
    student, teacher, target, weight, gradient, loss, target_term, nontarget_term, sums,
    stride_sb, stride_sc, stride_sn, stride_tb, stride_tc, stride_tn, stride_gb, stride_gc, stride_gn,
    pixels: tl.int64, classes, tiles_of_image, tiles, tiles_of_program,
    target_weight: tl.float64, nontarget_weight: tl.float64, temperature: tl.float64, to_base_2: tl.float64,
    ignore_index: tl.int64,
    A: tl.constexpr, DECOUPLED: tl.constexpr, HAS_TARGET: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    WANT_GRADIENT: tl.constexpr, PER_PIXEL: tl.constexpr, K: tl.constexpr, R: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    target_weight, nontarget_weight = tl.full((), target_weight, A), tl.full((), nontarget_weight, A)
    temperature, to_base_2 = tl.full((), temperature, A), tl.full((), to_base_2, A)
    rows = tl.arange(0, R)[:, None]
    o_m = tl.arange(0, M)[None, :]
    sum_target, sum_nontarget, sum_weight = (tl.full((), 0.0, tl.float64),) * 3
    i_slot = tl.program_id(0)
    for i_tile in range(i_slot * tiles_of_program, min((i_slot + 1) * tiles_of_program, tiles)):
        i_b = (i_tile // tiles_of_image).to(tl.int64)
        first = (i_tile % tiles_of_image).to(tl.int64) * M
        m_n = first + o_m < pixels
        p_s = student + i_b * stride_sb + first * stride_sn + o_m * stride_sn
        p_t = teacher + i_b * stride_tb + first * stride_tn + o_m * stride_tn
        s, t = (), ()
        for k in tl.static_range(K):
            channel = (rows + k * R).to(tl.int64)
            m = m_n if R == 1 else m_n & (channel < classes)
            # a class beyond the last is absent
            s += (tl.load(p_s + channel * stride_sc, mask=m, other=-float("inf")).to(A),)
            t += (tl.load(p_t + channel * stride_tc, mask=m, other=-float("inf")).to(A),)
        pixel = i_b * pixels + first + o_m
        label, w, counts = labels_and_weights(
            target, weight, pixel, m_n, classes, ignore_index, A, DECOUPLED, HAS_TARGET, HAS_WEIGHT
        )
        scale = w * temperature
        target_part, nontarget_part, v_student = divergences(
            s, t, label, labels_again(target, pixel, m_n, DECOUPLED and WANT_GRADIENT), scale, to_base_2,
            target_weight, nontarget_weight, DECOUPLED, WANT_GRADIENT, K, R,
        )  # fmt: skip
        scale *= temperature
        target_part = tl.where(counts, scale * target_part, 0.0)
        nontarget_part = tl.where(counts, scale * nontarget_part, 0.0)
        if PER_PIXEL:
            # a part of weight 0 is left out, even an infinite one
            total = tl.where(target_weight == 0, 0.0, target_weight * target_part)
            total += tl.where(nontarget_weight == 0, 0.0, nontarget_weight * nontarget_part)
            tl.store(loss + pixel, total, mask=m_n)
            if DECOUPLED:
                tl.store(target_term + pixel, target_part, mask=m_n)
                tl.store(nontarget_term + pixel, nontarget_part, mask=m_n)
        else:
            sum_target += tl.sum(target_part.to(tl.float64))
            sum_nontarget += tl.sum(nontarget_part.to(tl.float64))
            sum_weight += tl.sum(w.to(tl.float64))
        if WANT_GRADIENT:
            p_g = gradient + i_b * stride_gb + first * stride_gn + o_m * stride_gn
            for k in tl.static_range(K):
                channel = (rows + k * R).to(tl.int64)
                m = m_n if R == 1 else m_n & (channel < classes)
                tl.store(p_g + channel * stride_gc, tl.where(counts, v_student[k], 0.0), mask=m)
    if not PER_PIXEL:
        slots = tl.num_programs(0)
        tl.store(sums + i_slot, sum_target)
        tl.store(sums + slots + i_slot, sum_nontarget)
        tl.store(sums + 2 * slots + i_slot, sum_weight)


@triton.jit
def finish(
    sums, loss, target_term, nontarget_term, scale, slots, target_weight, nontarget_weight,
    MEAN: tl.constexpr, DECOUPLED: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Loss, its parts and 1 / denominator from the slots' sums [3, slots]."""
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


@triton.jit
def finish_kernel(
    sums, loss, target_term, nontarget_term, scale, slots, target_weight: tl.float64, nontarget_weight: tl.float64,
    MEAN: tl.constexpr, DECOUPLED: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    target_weight, nontarget_weight = tl.full((), target_weight, tl.float64), tl.full((), nontarget_weight, tl.float64)
    finish(
        sums, loss, target_term, nontarget_term, scale, slots, target_weight, nontarget_weight, MEAN, DECOUPLED, SLOTS
    )


class Tile(NamedTuple):
    K: int
    R: int
    M: int
    warps: int


def power_of_2(x: int) -> int:
    """The smallest that is at least x."""
    return 1 << max(x - 1, 0).bit_length()


def tile_of(classes: int, planes: bool, double: bool) -> Tile:
    """Classes and pixels of a tile; 16 to 32 numbers of each network in a thread.

    `planes`: the pixels of a class lie side by side, so a thread takes 1 to 4 neighbouring ones and all their classes. More
    classes than a thread can hold, or the classes of a pixel side by side: threads share the classes of a pixel.
    """
    if planes and classes <= 32:
        pixels = 4 if classes <= 8 else 2 if classes <= 16 else 1
        return Tile(classes, 1, 128 * (max(pixels // 2, 1) if double else pixels), 4)
    if planes:
        rows = power_of_2(-(-classes // 8))
        return Tile(-(-classes // rows), rows, max(512 // rows, 8) * (1 if double else 2), 4 if rows <= 64 else 8)
    rows = min(power_of_2(classes), 1024)
    return Tile(-(-classes // rows), rows, max((2048 if double else 4096) // rows, 1), 4)


class Terms(NamedTuple):
    """What an operator returns."""

    loss: Tensor
    target: Tensor
    nontarget: Tensor
    scale: Tensor
    gradient: Tensor


class Settings(NamedTuple):
    """The loss: class_kl is the non-target part alone, with no class as target."""

    decoupled: bool
    target_weight: float
    nontarget_weight: float
    temperature: float
    ignore_index: int
    reduction: str
    need_gradient: bool


def outputs(student: Tensor, teacher: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for loss, its parts and scale. class_kl has no parts, and its loss stands for them."""
    dtype = arithmetic(student, teacher)
    shape = (teacher.shape[0], *teacher.shape[2:]) if settings.reduction == "none" else ()
    # no pixel at all: no kernel writes
    new = student.new_zeros if teacher.numel() == 0 else student.new_empty
    loss = new(shape, dtype=dtype)
    target, nontarget = (new(shape, dtype=dtype) if settings.decoupled else loss for _ in range(2))
    if settings.reduction == "none" or teacher.numel() == 0 and settings.reduction == "sum":
        return loss, target, nontarget, student.new_ones((), dtype=dtype)
    return loss, target, nontarget, new((), dtype=dtype)


def pixel_loss(
    student: Tensor, teacher: Tensor, target: Tensor | None, weight: Tensor | None, settings: Settings
) -> Terms:
    """Runs a loss on logits of equal size."""
    dtype = arithmetic(student, teacher)
    loss, target_term, nontarget_term, scale = outputs(student, teacher, settings)
    result = written = student.new_empty(0)
    if settings.need_gradient:
        result, written, strides_g = gradient_like(student)
    images, classes = teacher.shape[:2]
    pixels = math.prod(teacher.shape[2:])
    if images * pixels == 0:
        return Terms(loss, target_term, nontarget_term, scale, result)
    student, strides_s = planes_of(student)
    teacher, strides_t = planes_of(teacher)
    if not settings.need_gradient:
        strides_g = strides_s

    tile = tile_of(classes, strides_s[2] == 1, dtype == torch.float64)
    tiles_of_image = -(-pixels // tile.M)
    tiles = images * tiles_of_image
    tiles_of_program = -(-tiles // MOST_SLOTS)
    slots = -(-tiles // tiles_of_program)
    per_pixel = settings.reduction == "none"
    sums = loss if per_pixel else student.new_empty(3 * slots, dtype=torch.float64)
    pixel_loss_kernel[(slots,)](
        student, teacher, target, weight, written, loss, target_term, nontarget_term, sums,
        *strides_s, *strides_t, *strides_g, pixels, classes, tiles_of_image, tiles, tiles_of_program,
        settings.target_weight, settings.nontarget_weight, settings.temperature, math.log2(math.e) / settings.temperature,
        settings.ignore_index,
        A=ARITHMETIC[dtype], DECOUPLED=settings.decoupled, HAS_TARGET=target is not None, HAS_WEIGHT=weight is not None,
        WANT_GRADIENT=settings.need_gradient, PER_PIXEL=per_pixel, K=tile.K, R=tile.R, M=tile.M, num_warps=tile.warps,
    )  # fmt: skip
    if not per_pixel:
        size = power_of_2(slots)
        finish_kernel[(1,)](
            sums, loss, target_term, nontarget_term, scale, slots, settings.target_weight, settings.nontarget_weight,
            MEAN=settings.reduction == "mean", DECOUPLED=settings.decoupled, SLOTS=size, num_warps=16 if size > 1024 else 4,
        )  # fmt: skip
    if written is not result:
        result.copy_(written)
    return Terms(loss, target_term, nontarget_term, scale, result)


ARITHMETIC = {torch.float32: tl.float32, torch.float64: tl.float64}
