"""What the Triton kernels of class_means and class_similarity share: features of pixels by class, and their sums.

A label that is none counts as class 0 with a feature that is no number: looking at it would synchronise. Sums by class are fp64,
in slots of stretches of pixels that the shape alone decides, added up in their order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from medkd_fast.kernels.planes import planes_of
from medkd_fast.reference.common import arithmetic

#: Slots of an image, at most; pixels of one, at least; classes that a program adds up at a time.
MOST_SLOTS, STRETCH, MOST_CLASSES = 256, 1024, 16
#: Tiles that are added up element by element before the threads put their sums together, which takes longer than a tile.
TILES: tl.constexpr = tl.constexpr(16)
#: Slots that are read at a time.
BLOCK_SLOTS: tl.constexpr = tl.constexpr(16)


@triton.jit
def load_labels(target, at, m_n, K, ignore_index):
    """Of the pixels `at`, counted over all images: the class, -1 where none counts, and which labels are none."""
    label = tl.load(target + at, m_n, 0).to(tl.int64)
    counts = m_n & (label != ignore_index)
    outside = counts & ((label < 0) | (label >= K))
    return tl.where(counts, tl.where(outside, 0, label), -1), outside


@triton.jit
def load_features(x, o_c, o_n, C, label, outside, stride_c, stride_n, A: tl.constexpr):
    """[BLOCK_C, BLOCK_N] of o_c [BLOCK_C, 1] and the others [1, BLOCK_N], 0 at pixels that do not count."""
    value = tl.load(x + o_c * stride_c + o_n * stride_n, (o_c < C) & (label >= 0), 0.0).to(A)
    return tl.where(outside & (o_c < C), float("nan"), value)


@triton.jit
def sums_kernel(
    x, target, weight, along,  # [B, C, N], [B, N] each
    slots, of_class,  # [B, count, K, C], [B, count, K, 2], double
    C, K, N, count, stretch, ignore_index: tl.int64, stride_b, stride_c, stride_n,
    A: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums of a stretch by class: of x, weighted or not, of 1, and of `along`."""
    i_slot = tl.program_id(0).to(tl.int64)
    i_b = i_slot // count
    first = (i_slot % count) * stretch
    o_c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        total = tl.full([BLOCK_K, BLOCK_C], 0.0, tl.float64)
        number = tl.full([BLOCK_K], 0.0, tl.float64)
        other = tl.full([BLOCK_K], 0.0, tl.float64)
        end = tl.minimum(first + stretch, N)
        for start in range(first, end, TILES * BLOCK_N):
            part = tl.zeros([BLOCK_K, BLOCK_C, BLOCK_N], A)
            part_number = tl.zeros([BLOCK_K, BLOCK_N], tl.int32)
            part_other = tl.zeros([BLOCK_K, BLOCK_N], A)
            for n in range(start, tl.minimum(start + TILES * BLOCK_N, end), BLOCK_N):
                o_n = n + tl.arange(0, BLOCK_N)
                label, outside = load_labels(target, i_b * N + o_n, o_n < N, K, ignore_index)
                b_x = load_features(
                    x + i_b * stride_b,
                    o_c[:, None],
                    o_n[None, :],
                    C,
                    label[None, :],
                    outside[None, :],
                    stride_c,
                    stride_n,
                    A,
                )
                own = o_k[:, None] == label[None, :]  # [BLOCK_K, BLOCK_N]
                part_number += own.to(tl.int32)
                if WEIGHTED:
                    b_x *= tl.load(weight + i_b * N + o_n, label >= 0, 0.0)[None, :]
                    v = tl.load(along + i_b * N + o_n, label >= 0, 0.0)
                    part_other += tl.where(own, v[None, :], 0.0)
                part += tl.where(own[:, None, :], b_x[None, :, :], 0.0)
            total += tl.sum(part, 2).to(tl.float64)
            number += tl.sum(part_number, 1).to(tl.float64)
            if WEIGHTED:
                other += tl.sum(part_other, 1).to(tl.float64)
        at = i_slot * K + o_k
        tl.store(slots + at[:, None] * C + o_c[None, :], total, m_k[:, None] & (o_c < C)[None, :])
        if tl.program_id(1) == 0:
            tl.store(of_class + at * 2, number, m_k)
            tl.store(of_class + at * 2 + 1, other, m_k)


@triton.jit
def add_numbers(of_class, i_b, i_k, K, count):
    """The number of a class's pixels, and its sum of `along`."""
    number = tl.full([BLOCK_SLOTS], 0.0, tl.float64)
    other = tl.full([BLOCK_SLOTS], 0.0, tl.float64)
    for slot in range(0, count, BLOCK_SLOTS):
        o_s = slot + tl.arange(0, BLOCK_SLOTS)
        at = (i_b * count + o_s) * K + i_k
        number += tl.load(of_class + at * 2, o_s < count, 0.0)
        other += tl.load(of_class + at * 2 + 1, o_s < count, 0.0)
    return tl.sum(number, 0), tl.sum(other, 0)


@triton.jit
def add_slots(slots, i_b, i_k, o_c, C, K, count):
    total = tl.full([BLOCK_SLOTS, o_c.shape[0]], 0.0, tl.float64)
    for slot in range(0, count, BLOCK_SLOTS):
        o_s = (slot + tl.arange(0, BLOCK_SLOTS))[:, None]
        at = ((i_b * count + o_s) * K + i_k) * C + o_c[None, :]
        total += tl.load(slots + at, (o_s < count) & (o_c < C)[None, :], 0.0)
    return tl.sum(total, 0)


class Sums(NamedTuple):
    slots: torch.Tensor  # [B, count, K, C]
    of_class: torch.Tensor  # [B, count, K, 2]
    count: int


def power_of_2(x: int) -> int:
    """The smallest that is at least x, and 1."""
    return triton.next_power_of_2(max(x, 1))


def tile_of(channels: int, planes: bool, size: int) -> dict[str, int]:
    """Channels and pixels of a tile of `size`: where a channel's pixels lie side by side, many pixels."""
    rows = min(power_of_2(channels), 16 if planes else 64, size)
    return {"BLOCK_C": rows, "BLOCK_N": size // rows}


def sums_by_class(
    x: torch.Tensor,
    target: torch.Tensor,
    classes: int,
    ignore_index: int,
    weight: torch.Tensor | None = None,
    along: torch.Tensor | None = None,
) -> Sums:
    B, C = x.shape[:2]
    N = x.shape[2:].numel()
    double = arithmetic(x, x) == torch.float64
    of_k = min(power_of_2(classes), MOST_CLASSES)
    # of_tile in registers: 64 a thread
    tile = tile_of(C, planes_of(x)[1][2] == 1, 8192 // of_k // (2 if double else 1))
    stretch = -(-max(STRETCH, 16 * classes, -(-N // MOST_SLOTS)) // tile["BLOCK_N"]) * tile["BLOCK_N"]
    count = -(-N // stretch)
    slots = x.new_empty((B, count, classes, C), dtype=torch.float64)
    of_class = x.new_empty((B, count, classes, 2), dtype=torch.float64)
    if B * N > 0:
        read, strides = planes_of(x)
        sums_kernel[(B * count, -(-max(C, 1) // tile["BLOCK_C"]))](
            read, target, weight, along, slots, of_class, C, classes, N, count, stretch, ignore_index, *strides,
            A=tl.float64 if double else tl.float32, WEIGHTED=weight is not None, BLOCK_K=of_k, **tile,
        )  # fmt: skip
    return Sums(slots, of_class, count)
