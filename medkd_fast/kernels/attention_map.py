"""Triton kernels of attention_map: energies in one pass over the features, their norm, and the gradient in one more pass.

Derivation: medkd_fast/reference/attention_map.py. A program adds up tiles of channels by pixels and leaves the sum of its energies'
squares, in fp64, in a slot of its own; whoever needs the norm of an image adds up the image's slots, in their order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from medkd_fast.kernels.class_sums import load_labels
from medkd_fast.kernels.common import operator
from medkd_fast.kernels.planes import gradient_like, planes_of
from medkd_fast.reference.common import arithmetic

#: Programs for an image, at most: as many slots are added up by everyone who needs their sum.
MOST_SLOTS = 1024
#: Pixels of a program in the passes over maps.
MAP_BLOCK = 1024


@triton.jit
def raised(x, power):
    """|x|^power by way of fp64, so that float32 loses nothing; for x = 0, too."""
    x = tl.abs(x.to(tl.float64))
    return tl.where(x == 0, 0.0, tl.exp2(power * tl.log2(tl.where(x == 0, 1.0, x))))


@triton.jit
def energy_of(x, power, POWER: tl.constexpr):
    if POWER == 1:
        return tl.abs(x)
    if POWER == 2:
        return x * x
    if POWER == 4:
        return (x * x) * (x * x)
    return raised(x, power).to(x.dtype)


@triton.jit
def slope_of(x, power, POWER: tl.constexpr):
    if POWER == 1:
        return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))
    if POWER == 2:
        return 2.0 * x
    if POWER == 4:
        return 4.0 * x * x * x
    magnitude = (power * raised(x, power - 1.0)).to(x.dtype)
    return tl.where(x > 0, magnitude, tl.where(x < 0, -magnitude, x))


@triton.jit
def energies_kernel(
    x, mask, energies, slots,  # [B, C, N], [B, N], [B, N], [B, slots]
    C, N, tiles, tiles_of_program, count, power: tl.float64, stride_b, stride_c, stride_n,
    POWER: tl.constexpr, HAS_MASK: tl.constexpr, A: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    power = tl.full((), power, tl.float64)
    i_b = (tl.program_id(0) // count).to(tl.int64)
    first = (tl.program_id(0) % count).to(tl.int64) * tiles_of_program
    squares = tl.full([BLOCK_N], 0.0, tl.float64)
    for i_tile in range(first, tl.minimum(first + tiles_of_program, tiles)):
        o_n = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        sums = tl.full([BLOCK_C, BLOCK_N], 0.0, A)
        for c in range(0, C, BLOCK_C):
            o_c = (c + tl.arange(0, BLOCK_C)).to(tl.int64)
            p_x = x + i_b * stride_b + o_c[:, None] * stride_c + o_n[None, :] * stride_n
            sums += energy_of(tl.load(p_x, (o_c < C)[:, None] & m_n[None, :], 0.0).to(A), power, POWER)
        energy = tl.sum(sums, 0)
        if HAS_MASK:
            energy = tl.where(tl.load(mask + i_b * N + o_n, m_n, 0) != 0, energy, 0.0)
        tl.store(energies + i_b * N + o_n, energy, m_n)
        squares += energy.to(tl.float64) * energy.to(tl.float64)
    tl.store(slots + tl.program_id(0), tl.sum(squares))


@triton.jit(do_not_specialize=["count", "blocks"])
def normalise_kernel(x, slots, norms, N, count, blocks, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """The energies become the map, in place."""
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    i_block = (tl.program_id(0) % blocks).to(tl.int64)
    o_slot = tl.arange(0, SLOTS)
    norm = tl.sqrt(tl.sum(tl.load(slots + i_b * count + o_slot, o_slot < count, 0.0)))
    if i_block == 0:
        tl.store(norms + i_b, norm)
    factor = tl.where(norm == 0, 0.0, 1.0 / tl.where(norm == 0, 1.0, norm))
    o_n = i_block * BLOCK + tl.arange(0, BLOCK)
    p_x = x + i_b * N + o_n
    tl.store(p_x, (factor * tl.load(p_x, o_n < N, 0.0).to(tl.float64)).to(x.dtype.element_ty), o_n < N)


@triton.jit
def products_kernel(map, upstream, slots, N, count, blocks, blocks_of_program, BLOCK: tl.constexpr):
    """Every slot a part of <v, q>."""
    i_b = (tl.program_id(0) // count).to(tl.int64)
    first = (tl.program_id(0) % count).to(tl.int64) * blocks_of_program
    total = tl.full([BLOCK], 0.0, tl.float64)
    for i_block in range(first, tl.minimum(first + blocks_of_program, blocks)):
        o_n = i_block * BLOCK + tl.arange(0, BLOCK)
        q = tl.load(map + i_b * N + o_n, o_n < N, 0.0).to(tl.float64)
        total += q * tl.load(upstream + i_b * N + o_n, o_n < N, 0.0).to(tl.float64)
    tl.store(slots + tl.program_id(0), tl.sum(total))


@triton.jit(do_not_specialize=["tiles", "count"])
def gradient_kernel(
    x, mask, map, norms, upstream, slots, gradient,
    target, counts_of, of_means,  # [B, N], [B, K], [B, K, C]: what a pixel gets by its class besides, or None
    C, N, tiles, count, power: tl.float64, stride_b, stride_c, stride_n, stride_gb, stride_gc, stride_gn,
    K, ignore_index: tl.int64,
    POWER: tl.constexpr, HAS_MASK: tl.constexpr, BY_CLASS: tl.constexpr, A: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    power = tl.full((), power, tl.float64)
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    o_n = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_slot = tl.arange(0, SLOTS)
    product = tl.sum(tl.load(slots + i_b * count + o_slot, o_slot < count, 0.0))
    norm = tl.load(norms + i_b)
    # as attention_slope in csrc/math/attention_map.h
    some = tl.where(norm == 0, 1.0, norm)
    exponent = tl.where(power < 2, 0.0, tl.floor(0.5 - tl.log2(some) / power))
    exponent = tl.minimum(tl.maximum(exponent, -126.0), 126.0)
    scale = tl.exp2(exponent).to(A)
    of_norm = tl.where(norm == 0, 0.0, tl.exp2(-exponent * (power - 1.0)) / some)
    q = tl.load(map + i_b * N + o_n, m_n, 0.0).to(tl.float64)
    v = tl.load(upstream + i_b * N + o_n, m_n, 0.0).to(tl.float64)
    factor = (of_norm * (v - q * product)).to(A)[None, :]
    counts = m_n
    if HAS_MASK:
        counts = tl.load(mask + i_b * N + o_n, m_n, 0) != 0
    if BY_CLASS:
        label, outside = load_labels(target, i_b * N + o_n, m_n, K, ignore_index)
        counts = label >= 0
        number = tl.load(counts_of + i_b * K + label, label >= 0, 1).to(A)
    for c in range(0, C, BLOCK_C):
        o_c = (c + tl.arange(0, BLOCK_C)).to(tl.int64)
        m_c = (o_c < C)[:, None]
        p_x = x + i_b * stride_b + o_c[:, None] * stride_c + o_n[None, :] * stride_n
        b_x = tl.load(p_x, m_c & counts[None, :], 0.0).to(A)
        v_x = tl.where(counts[None, :], factor * slope_of(scale * b_x, power, POWER), 0.0)
        if BY_CLASS:
            p_v = of_means + (i_b * K + label[None, :]) * C + o_c[:, None]
            v_x += tl.load(p_v, (label >= 0)[None, :] & m_c, 0.0) / number[None, :]
            v_x = tl.where(outside[None, :], float("nan"), v_x)
        p_g = gradient + i_b * stride_gb + o_c[:, None] * stride_gc + o_n[None, :] * stride_gn
        tl.store(p_g, v_x.to(gradient.dtype.element_ty), m_c & m_n[None, :])


def blocks_of(channels: int, planes: bool, double: bool) -> dict[str, int]:
    """Channels and pixels of a tile: where a channel's pixels lie side by side, some rows; else all channels that fit."""
    size = 1024 if double else 2048
    rows = max(min(triton.next_power_of_2(channels), 8 if planes else 64), 1)
    return {"BLOCK_C": rows, "BLOCK_N": size // rows}


def shared_out(units: int, programs: int) -> tuple[int, int]:
    """Units of a program, and how many programs have some."""
    each = max(-(-units // programs), 1)
    return each, -(-units // each)


@operator()
def attention_map(
    x: torch.Tensor,  # [B, C, *S]
    mask: torch.Tensor | None,  # [B, *S], boolean, contiguous
    power: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, C = x.shape[:2]
    N = x.shape[2:].numel()
    dtype = arithmetic(x, x)
    result = x.new_empty((B, *x.shape[2:]), dtype=dtype)
    norms = x.new_empty(B, dtype=torch.float64)
    if B * N == 0:
        return result, norms.zero_()
    read, strides = planes_of(x)
    double = dtype == torch.float64
    blocks = blocks_of(C, strides[2] == 1, double)
    tiles = -(-N // blocks["BLOCK_N"])
    tiles_of_program, count = shared_out(tiles, MOST_SLOTS)
    slots = x.new_empty((B, count), dtype=torch.float64)
    energies_kernel[(B * count,)](
        read, mask, result, slots, C, N, tiles, tiles_of_program, count, power, *strides,
        POWER=int(power) if power in (1, 2, 4) else 0, HAS_MASK=mask is not None,
        A=tl.float64 if double else tl.float32, **blocks,
    )  # fmt: skip
    map_blocks = -(-N // MAP_BLOCK)
    normalise_kernel[(B * map_blocks,)](
        result, slots, norms, N, count, map_blocks, SLOTS=triton.next_power_of_2(count), BLOCK=MAP_BLOCK
    )
    return result, norms


class ByClass(NamedTuple):
    """What the features get besides, through the means of their classes."""

    target: torch.Tensor  # [B, *S], contiguous
    counts: torch.Tensor  # [B, K]
    of_means: torch.Tensor  # [B, K, C], contiguous
    ignore_index: int


def gradient_of(
    x: torch.Tensor,
    mask: torch.Tensor | None,
    map: torch.Tensor,
    norms: torch.Tensor,
    upstream: torch.Tensor,
    power: float,
    by_class: ByClass | None,
) -> torch.Tensor:
    B, C = x.shape[:2]
    N = x.shape[2:].numel()
    gradient, written, strides_g = gradient_like(x)
    if x.numel() > 0:
        read, strides = planes_of(x)
        upstream = upstream.contiguous()
        map_blocks = -(-N // MAP_BLOCK)
        blocks_of_program, count = shared_out(map_blocks, 64)
        slots = x.new_empty((B, count), dtype=torch.float64)
        products_kernel[(B * count,)](map, upstream, slots, N, count, map_blocks, blocks_of_program, BLOCK=MAP_BLOCK)
        double = map.dtype == torch.float64
        blocks = blocks_of(C, strides[2] == 1, double)
        tiles = -(-N // blocks["BLOCK_N"])
        target, counts, of_means, ignore_index = by_class or (None, None, None, 0)
        gradient_kernel[(B * tiles,)](
            read, mask, map, norms, upstream, slots, written, target, counts, of_means, C, N, tiles, count, power, *strides,
            *strides_g, 0 if counts is None else counts.shape[1], ignore_index,
            POWER=int(power) if power in (1, 2, 4) else 0, HAS_MASK=mask is not None, BY_CLASS=by_class is not None,
            A=tl.float64 if double else tl.float32, SLOTS=triton.next_power_of_2(count), **blocks,
        )  # fmt: skip
    if written is not gradient:
        gradient.copy_(written)
    return gradient


@operator()
def attention_map_backward(
    x: torch.Tensor,  # [B, C, *S]
    mask: torch.Tensor | None,  # [B, *S], boolean, contiguous
    map: torch.Tensor,  # [B, *S]
    norms: torch.Tensor,  # [B], double
    upstream: torch.Tensor,  # [B, *S]
    power: float,
) -> torch.Tensor:
    return gradient_of(x, mask, map, norms, upstream, power, None)
