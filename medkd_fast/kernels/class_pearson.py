"""Triton kernels of class_pearson: sums over all pixels, the terms that they give, and the gradient in one more pass.

Derivation: medkd_fast/reference/class_pearson.py. A tile is [classes, pixels], with both networks' q = p − 1/C in registers. The
sums over pixels are made in fp64, where products are exact, one slot a program, and added up in the order of the slots.
"""

import math

import torch
import triton
import triton.language as tl

from medkd_fast.kernels.common import operator
from medkd_fast.kernels.planes import gradient_like, planes_of
from medkd_fast.reference.common import arithmetic

#: Programs of the pass over the pixels, at most: the second stage adds up as many slots.
MOST_SLOTS = 1024


@triton.jit
def centred_probabilities(x, stride_c, stride_n, o_c, o_n, counts, C, to_base_2, A: tl.constexpr):
    """q of both dimensions' classes and pixels, 0 at pixels that do not count."""
    there = (o_c < C) & counts
    u = tl.load(x + o_c * stride_c + o_n * stride_n, there, -float("inf")).to(A)
    e = tl.exp2((u - tl.where(counts, tl.max(u, 0, keep_dims=True), 0.0)) * to_base_2)
    total = tl.sum(e, 0, keep_dims=True)
    p = e * (1.0 / tl.where(counts, total, 1.0))
    return tl.where(there, p - 1.0 / tl.full((1, 1), C, A), 0.0)


@triton.jit
def load_tile(
    student, teacher, target, i_b, o_c, o_n, C, N, to_base_2, ignore_index,
    stride_sb, stride_sc, stride_sn, stride_tb, stride_tc, stride_tn, A: tl.constexpr, HAS_TARGET: tl.constexpr,
):  # fmt: skip
    """q of both networks [classes, pixels] and which pixels count [1, pixels]."""
    counts = o_n < N
    if HAS_TARGET:
        counts = counts & (tl.load(target + i_b * N + o_n, counts, 0).to(tl.int64) != ignore_index)
    q_s = centred_probabilities(student + i_b * stride_sb, stride_sc, stride_sn, o_c, o_n, counts, C, to_base_2, A)
    q_t = centred_probabilities(teacher + i_b * stride_tb, stride_tc, stride_tn, o_c, o_n, counts, C, to_base_2, A)
    return q_s, q_t, counts


@triton.jit
def correlation(product, square_s, square_t):
    """Of centred vectors, and its gradient for the first: of_t times the second plus of_s times itself."""
    norm_s, norm_t = tl.sqrt(square_s), tl.sqrt(square_t)
    of_t = 1.0 / (norm_s * norm_t + 1e-8)
    value = product * of_t
    long = norm_s > 0
    return value, of_t, tl.where(long, -value * of_t * norm_t / tl.where(long, norm_s, 1.0), 0.0)


@triton.jit
def correlation_of_pixels(q_s, q_t):
    return correlation(
        tl.sum(q_s * q_t, 0, keep_dims=True), tl.sum(q_s * q_s, 0, keep_dims=True), tl.sum(q_t * q_t, 0, keep_dims=True)
    )


@triton.jit
def slots_kernel(
    student, teacher, target, slots,  # [2 + 5C, slots], double
    C, N, tiles_of_image, tiles, tiles_of_program, to_base_2: tl.float64, ignore_index: tl.int64,
    stride_sb, stride_sc, stride_sn, stride_tb, stride_tc, stride_tn,
    A: tl.constexpr, HAS_TARGET: tl.constexpr, R: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    to_base_2 = tl.full((), to_base_2, A)
    i_program = tl.program_id(0)
    o_c = tl.arange(0, R)[:, None].to(tl.int64)
    number = tl.full([1, M], 0.0, tl.float64)
    within = tl.full([1, M], 0.0, tl.float64)
    sum_s = tl.full([R, M], 0.0, tl.float64)
    sum_t, sum_ss, sum_tt, sum_st = sum_s, sum_s, sum_s, sum_s
    for i_tile in range(i_program * tiles_of_program, tl.minimum((i_program + 1) * tiles_of_program, tiles)):
        i_b = (i_tile // tiles_of_image).to(tl.int64)
        o_n = ((i_tile % tiles_of_image) * M + tl.arange(0, M))[None, :].to(tl.int64)
        q_s, q_t, counts = load_tile(
            student, teacher, target, i_b, o_c, o_n, C, N, to_base_2, ignore_index,
            stride_sb, stride_sc, stride_sn, stride_tb, stride_tc, stride_tn, A, HAS_TARGET,
        )  # fmt: skip
        value, _, _ = correlation_of_pixels(q_s, q_t)
        number += counts.to(tl.float64)
        within += value.to(tl.float64)
        q_s, q_t = q_s.to(tl.float64), q_t.to(tl.float64)
        sum_s += q_s
        sum_t += q_t
        sum_ss += q_s * q_s
        sum_tt += q_t * q_t
        sum_st += q_s * q_t
    count = tl.num_programs(0)
    tl.store(slots + i_program, tl.sum(number))
    tl.store(slots + count + i_program, tl.sum(within))
    o_c = tl.arange(0, R)
    p = slots + (2 + o_c) * count + i_program
    step = C * count
    tl.store(p, tl.sum(sum_s, 1), o_c < C)
    tl.store(p + step, tl.sum(sum_t, 1), o_c < C)
    tl.store(p + 2 * step, tl.sum(sum_ss, 1), o_c < C)
    tl.store(p + 3 * step, tl.sum(sum_tt, 1), o_c < C)
    tl.store(p + 4 * step, tl.sum(sum_st, 1), o_c < C)


@triton.jit
def add_slots_kernel(slots, sums, count, SLOTS: tl.constexpr):
    i_sum = tl.program_id(0)
    o = tl.arange(0, SLOTS)
    tl.store(sums + i_sum, tl.sum(tl.load(slots + i_sum * count + o, o < count, 0.0)))


@triton.jit
def terms_kernel(
    sums, loss, inter, intra, coefficients,
    C, inter_weight: tl.float64, intra_weight: tl.float64, temperature: tl.float64, R: tl.constexpr,
):  # fmt: skip
    inter_weight, intra_weight = tl.full((), inter_weight, tl.float64), tl.full((), intra_weight, tl.float64)
    temperature = tl.full((), temperature, tl.float64)
    o_c = tl.arange(0, R)
    m_c = o_c < C
    pixels = tl.load(sums)
    exists = tl.where(pixels > 0, 1.0, 0.0).to(tl.float64)
    number = tl.maximum(pixels, 1.0)
    p = sums + 2 + o_c
    mean_s, mean_t = tl.load(p, m_c, 0.0) / number, tl.load(p + C, m_c, 0.0) / number
    square_s = tl.load(p + 2 * C, m_c, 0.0) - number * mean_s * mean_s
    square_t = tl.load(p + 3 * C, m_c, 0.0) - number * mean_t * mean_t
    product = tl.load(p + 4 * C, m_c, 0.0) - number * mean_s * mean_t
    # a square can be rounded to just below 0
    value, of_t, of_s = correlation(product, tl.maximum(square_s, 0.0), tl.maximum(square_t, 0.0))
    square = temperature * temperature
    inter_value = exists - tl.load(sums + 1) / number
    intra_value = exists - tl.sum(tl.where(m_c, value, 0.0)) / C
    total = square * (inter_weight * inter_value + intra_weight * intra_value)
    tl.store(loss, total.to(loss.dtype.element_ty))
    tl.store(inter, inter_value.to(loss.dtype.element_ty))
    tl.store(intra, intra_value.to(loss.dtype.element_ty))
    tl.store(coefficients, -square * inter_weight * exists / number)
    share = -square * intra_weight / C
    p = coefficients + 1 + o_c
    tl.store(p, share * of_t, m_c)
    tl.store(p + C, share * of_s, m_c)
    tl.store(p + 2 * C, mean_s, m_c)
    tl.store(p + 3 * C, mean_t, m_c)


@triton.jit
def gradient_kernel(
    student, teacher, target, coefficients, upstream, gradient,
    C, N, tiles_of_image, to_base_2: tl.float64, inverse_temperature: tl.float64, ignore_index: tl.int64,
    stride_sb, stride_sc, stride_sn, stride_tb, stride_tc, stride_tn, stride_gb, stride_gc, stride_gn,
    A: tl.constexpr, HAS_TARGET: tl.constexpr, R: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    to_base_2 = tl.full((), to_base_2, A)
    factor = tl.load(upstream) * tl.full((), inverse_temperature, A)
    i_b = (tl.program_id(0) // tiles_of_image).to(tl.int64)
    o_c = tl.arange(0, R)[:, None].to(tl.int64)
    m_c = o_c < C
    o_n = ((tl.program_id(0) % tiles_of_image) * M + tl.arange(0, M))[None, :].to(tl.int64)
    q_s, q_t, counts = load_tile(
        student, teacher, target, i_b, o_c, o_n, C, N, to_base_2, ignore_index,
        stride_sb, stride_sc, stride_sn, stride_tb, stride_tc, stride_tn, A, HAS_TARGET,
    )  # fmt: skip
    _, along_t, along_s = correlation_of_pixels(q_s, q_t)
    first = tl.load(coefficients).to(A)
    p = coefficients + 1 + o_c
    of_t, of_s = tl.load(p, m_c, 0.0).to(A), tl.load(p + C, m_c, 0.0).to(A)
    mean_s, mean_t = tl.load(p + 2 * C, m_c, 0.0).to(A), tl.load(p + 3 * C, m_c, 0.0).to(A)
    v_q = first * (along_t * q_t + along_s * q_s) + (of_t * (q_t - mean_t) + of_s * (q_s - mean_s))
    probability = tl.where(m_c, q_s + 1.0 / tl.full((1, 1), C, A), 0.0)
    v_s = factor * (probability * (v_q - tl.sum(probability * v_q, 0, keep_dims=True)))
    p_g = gradient + i_b * stride_gb + o_c * stride_gc + o_n * stride_gn
    tl.store(p_g, tl.where(counts, v_s, 0.0).to(gradient.dtype.element_ty), m_c & (o_n < N))


def tile_of(classes: int, double: bool) -> dict[str, int]:
    """Classes and pixels of a tile: a thread keeps five sums in fp64 of everything that is its own."""
    rows = triton.next_power_of_2(classes)
    return {"R": rows, "M": max((512 if double else 1024) // rows, 1)}


@operator()
def class_pearson(
    student: torch.Tensor,  # [B, C, *S]
    teacher: torch.Tensor,  # [B, C, *S]
    target: torch.Tensor | None,  # [B, *S], contiguous
    temperature: float,
    ignore_index: int,
) -> torch.Tensor:
    B, C = student.shape[:2]
    N = student.shape[2:].numel()
    double = arithmetic(student, teacher) == torch.float64
    sums = student.new_empty(2 + 5 * C, dtype=torch.float64)
    if B * N == 0:
        return sums.zero_()
    (s, strides_s), (t, strides_t) = planes_of(student), planes_of(teacher)
    tile = tile_of(C, double)
    tiles_of_image = -(-N // tile["M"])
    tiles = B * tiles_of_image
    tiles_of_program = -(-tiles // MOST_SLOTS)
    count = -(-tiles // tiles_of_program)
    slots = student.new_empty((2 + 5 * C, count), dtype=torch.float64)
    slots_kernel[(count,)](
        s, t, target, slots, C, N, tiles_of_image, tiles, tiles_of_program, math.log2(math.e) / temperature, ignore_index,
        *strides_s, *strides_t, A=tl.float64 if double else tl.float32, HAS_TARGET=target is not None, **tile,
    )  # fmt: skip
    add_slots_kernel[(2 + 5 * C,)](slots, sums, count, SLOTS=triton.next_power_of_2(count))
    return sums


@operator()
def class_pearson_terms(
    sums: torch.Tensor, inter_weight: float, intra_weight: float, temperature: float, single: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    C = (sums.shape[0] - 2) // 5
    dtype = torch.float32 if single else torch.float64
    loss, inter, intra = (sums.new_empty((), dtype=dtype) for _ in range(3))
    coefficients = sums.new_empty(1 + 4 * C)
    terms_kernel[(1,)](
        sums, loss, inter, intra, coefficients, C, inter_weight, intra_weight, temperature, R=triton.next_power_of_2(C)
    )
    return loss, inter, intra, coefficients


@operator()
def class_pearson_backward(
    student: torch.Tensor,  # [B, C, *S]
    teacher: torch.Tensor,  # [B, C, *S]
    target: torch.Tensor | None,  # [B, *S], contiguous
    coefficients: torch.Tensor,  # [1 + 4C], double, as class_pearson_terms gives them
    upstream: torch.Tensor,  # []
    temperature: float,
    ignore_index: int,
) -> torch.Tensor:
    B, C = student.shape[:2]
    N = student.shape[2:].numel()
    gradient, written, strides_g = gradient_like(student)
    if B * N > 0:
        (s, strides_s), (t, strides_t) = planes_of(student), planes_of(teacher)
        double = arithmetic(student, teacher) == torch.float64
        tile = tile_of(C, double)
        tiles_of_image = -(-N // tile["M"])
        gradient_kernel[(B * tiles_of_image,)](
            s, t, target, coefficients, upstream, written, C, N, tiles_of_image, math.log2(math.e) / temperature,
            1 / temperature, ignore_index, *strides_s, *strides_t, *strides_g,
            A=tl.float64 if double else tl.float32, HAS_TARGET=target is not None, **tile,
        )  # fmt: skip
    if written is not gradient:
        gradient.copy_(written)
    return gradient
