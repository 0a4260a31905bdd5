"""Triton kernels of spatial_kl: pieces of every row, the rows joined, the loss; and the gradient in one more pass.

Derivation: medkd_fast/reference/spatial_kl.py. Everything is in powers of 2: u is z · log2(e) / τ, so that an exponential is one
instruction. A piece is what one program finds in its pixels; pieces are joined in fp64, in their order.
"""

import math

import torch
import triton
import triton.language as tl

from medkd_fast.kernels.common import operator, share_of
from medkd_fast.kernels.divergence import scaled
from medkd_fast.kernels.pixel_images import image_weight
from medkd_fast.kernels.planes import gradient_like, planes_of
from medkd_fast.reference.common import arithmetic

LN2 = math.log(2)


@triton.jit
def load_rows(x, mask, before, stride_c, stride_n, o_c, o_n, C, N, to_base_2, A: tl.constexpr, HAS_MASK: tl.constexpr):
    """u of channels o_c by pixels o_n, -inf at those that do not count."""
    m_n = o_n < N
    if HAS_MASK:
        m_n = m_n & (tl.load(mask + before + o_n, m_n, 0) != 0)
    u = tl.load(x + o_c * stride_c + o_n * stride_n, (o_c < C) & m_n, -float("inf"))
    return scaled(u.to(A), to_base_2)  # where it lies above its maximum, the exponential is none


@triton.jit
def moved(x, to):
    """How far maxima move; no distance from -inf to itself."""
    return tl.where(x == to, 0.0, x - to)


@triton.jit
def raised(max_s, sum_s, max_t, sum_t, weighted, to_s, to_t, A: tl.constexpr):
    """Sums relative to the maxima to_s and to_t, which are not smaller. A: the type of the exponentials."""
    by_s, by_t = moved(max_s, to_s), moved(max_t, to_t)
    less_s, less_t = tl.exp2(by_s.to(A)).to(tl.float64), tl.exp2(by_t.to(A)).to(tl.float64)
    # without the teacher there is nothing to weigh; what is infinitely far stays so
    moves = (sum_t > 0) & (weighted != float("inf"))
    weighted = tl.where(moves, less_t * (weighted + sum_t * tl.where(moves, by_t - by_s, 0.0)), weighted)
    return sum_s * less_s, sum_t * less_t, weighted


@triton.jit
def joined(
    max_s, sum_s, max_t, sum_t, weighted, piece_max_s, piece_sum_s, piece_max_t, piece_sum_t, piece_weighted, A: tl.constexpr
):  # fmt: skip
    to_s, to_t = tl.maximum(max_s, piece_max_s), tl.maximum(max_t, piece_max_t)
    sum_s, sum_t, weighted = raised(max_s, sum_s, max_t, sum_t, weighted, to_s, to_t, A)
    more_s, more_t, more = raised(piece_max_s, piece_sum_s, piece_max_t, piece_sum_t, piece_weighted, to_s, to_t, A)
    return to_s, sum_s + more_s, to_t, sum_t + more_t, weighted + more


@triton.jit
def pieces_kernel(
    student, teacher, mask, pieces,  # [5, B, pieces, C], double
    C, N, piece, count, size: tl.int64, to_base_2: tl.float64,
    stride_sb, stride_sc, stride_sn, stride_tb, stride_tc, stride_tn,
    A: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // count).to(tl.int64)
    first = (tl.program_id(0) % count).to(tl.int64) * piece
    o_c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[:, None].to(tl.int64)
    to_base_2 = tl.full((), to_base_2, A)
    none = tl.full([BLOCK_C, 1], -float("inf"), tl.float64)
    zero = tl.full([BLOCK_C, 1], 0.0, tl.float64)
    max_s, sum_s, max_t, sum_t, weighted = none, zero, none, zero, zero
    for n in range(first, tl.minimum(first + piece, N), BLOCK_N):
        o_n = (n + tl.arange(0, BLOCK_N))[None, :]
        u_s = load_rows(
            student + i_b * stride_sb, mask, i_b * N, stride_sc, stride_sn, o_c, o_n, C, N, to_base_2, A, HAS_MASK
        )
        u_t = load_rows(
            teacher + i_b * stride_tb, mask, i_b * N, stride_tc, stride_tn, o_c, o_n, C, N, to_base_2, A, HAS_MASK
        )
        most_s, most_t = tl.max(u_s, 1, keep_dims=True), tl.max(u_t, 1, keep_dims=True)
        x_s = u_s - tl.where(most_s == -float("inf"), 0.0, most_s)
        x_t = u_t - tl.where(most_t == -float("inf"), 0.0, most_t)
        e_t = tl.exp2(x_t)
        # what the teacher does not have contributes 0; what the student alone rules out is infinitely far
        difference = tl.where(x_t == -float("inf"), 0.0, x_t - x_s)
        term = tl.where(difference == float("inf"), difference, e_t * difference)
        max_s, sum_s, max_t, sum_t, weighted = joined(
            max_s, sum_s, max_t, sum_t, weighted,
            most_s.to(tl.float64), tl.sum(tl.exp2(x_s), 1, keep_dims=True).to(tl.float64),
            most_t.to(tl.float64), tl.sum(e_t, 1, keep_dims=True).to(tl.float64),
            tl.sum(term, 1, keep_dims=True).to(tl.float64), A,
        )  # fmt: skip
    p = pieces + tl.program_id(0).to(tl.int64) * C + o_c
    tl.store(p, max_s, o_c < C)
    tl.store(p + size, sum_s, o_c < C)
    tl.store(p + 2 * size, max_t, o_c < C)
    tl.store(p + 3 * size, sum_t, o_c < C)
    tl.store(p + 4 * size, weighted, o_c < C)


@triton.jit(do_not_specialize=["B", "C", "N", "count", "size"])
def rows_kernel(
    pieces, pixels, rows, values,  # [5, B, pieces, C], [B], [B, C, 4], [B, C]
    B, C, N, count, size: tl.int64, temperature: tl.float64,
    HAS_MASK: tl.constexpr, MEAN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Max_s, ratio, max_t and scale of every row, and its value times its weight in the loss."""
    i_b = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    temperature = tl.full((), temperature, tl.float64)
    none = tl.full([BLOCK_C], -float("inf"), tl.float64)
    zero = tl.full([BLOCK_C], 0.0, tl.float64)
    max_s, sum_s, max_t, sum_t, weighted = none, zero, none, zero, zero
    for k in range(0, count, BLOCK_P):
        o_p = (k + tl.arange(0, BLOCK_P))[:, None]
        m_p = (o_p < count) & m_c[None, :]
        p = pieces + (i_b * count + o_p) * C + o_c[None, :]
        some_s, some_t = tl.load(p, m_p, -float("inf")), tl.load(p + 2 * size, m_p, -float("inf"))
        most_s, most_t = tl.max(some_s, 0), tl.max(some_t, 0)
        s, t, w = raised(
            some_s, tl.load(p + size, m_p, 0.0), some_t, tl.load(p + 3 * size, m_p, 0.0), tl.load(p + 4 * size, m_p, 0.0),
            most_s[None, :], most_t[None, :], tl.float64,
        )  # fmt: skip
        max_s, sum_s, max_t, sum_t, weighted = joined(
            max_s, sum_s, max_t, sum_t, weighted, most_s, tl.sum(s, 0), most_t, tl.sum(t, 0), tl.sum(w, 0), tl.float64
        )
    weight = image_weight(pixels, i_b, B, N, HAS_MASK, MEAN)
    if MEAN:
        weight = weight / C
    has_s, has_t = sum_s != 0, sum_t != 0
    over_s = tl.where(has_s, 1.0 / tl.where(has_s, sum_s, 1.0), 0.0)
    over_t = tl.where(has_t, 1.0 / tl.where(has_t, sum_t, 1.0), 0.0)
    # equal sums have a quotient of 1
    quotient = tl.where(has_t, sum_s / tl.where(has_t, sum_t, 1.0), 1.0)
    value = tl.log(quotient) + 0.6931471805599453 * weighted * over_t
    value = tl.where(weighted == float("inf"), weighted, value)
    value = tl.where(has_t, weight * temperature * temperature * value, 0.0)
    value = tl.where(weight == 0, 0.0, value)
    tl.store(values + i_b * C + o_c, value.to(values.dtype.element_ty), m_c)
    p = rows + (i_b * C + o_c) * 4
    T: tl.constexpr = rows.dtype.element_ty
    tl.store(p, tl.where(has_s, max_s, 0.0).to(T), m_c)
    tl.store(p + 1, (sum_t * over_s).to(T), m_c)
    tl.store(p + 2, tl.where(has_t, max_t, 0.0).to(T), m_c)
    tl.store(p + 3, (weight * temperature * over_t).to(T), m_c)


@triton.jit(do_not_specialize=["count"])
def sum_kernel(values, loss, count, BLOCK: tl.constexpr):
    total = tl.full([BLOCK], 0.0, tl.float64)
    for k in range(0, count, BLOCK):
        o_k = k + tl.arange(0, BLOCK)
        total += tl.load(values + o_k, o_k < count, 0.0)
    tl.store(loss, tl.sum(total).to(loss.dtype.element_ty))


@triton.jit
def gradient_kernel(
    student, teacher, mask, rows, upstream, gradient,
    C, N, piece, count, to_base_2: tl.float64,
    stride_sb, stride_sc, stride_sn, stride_tb, stride_tc, stride_tn, stride_gb, stride_gc, stride_gn,
    stride_ub, stride_uc,
    A: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // count).to(tl.int64)
    first = (tl.program_id(0) % count).to(tl.int64) * piece
    o_c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[:, None].to(tl.int64)
    m_c = o_c < C
    to_base_2 = tl.full((), to_base_2, A)
    p = rows + (i_b * C + o_c) * 4
    max_s, ratio = tl.load(p, m_c, 0.0), tl.load(p + 1, m_c, 0.0)
    max_t, scale = tl.load(p + 2, m_c, 0.0), tl.load(p + 3, m_c, 0.0)
    scale *= tl.load(upstream + i_b * stride_ub + o_c * stride_uc, m_c, 0.0)
    for n in range(first, tl.minimum(first + piece, N), BLOCK_N):
        o_n = (n + tl.arange(0, BLOCK_N))[None, :]
        u_s = load_rows(
            student + i_b * stride_sb, mask, i_b * N, stride_sc, stride_sn, o_c, o_n, C, N, to_base_2, A, HAS_MASK
        )
        u_t = load_rows(
            teacher + i_b * stride_tb, mask, i_b * N, stride_tc, stride_tn, o_c, o_n, C, N, to_base_2, A, HAS_MASK
        )
        # exactly 0 for equal rows, whose ratio is 1
        v_s = scale * (ratio * tl.exp2(u_s - max_s) - tl.exp2(u_t - max_t))
        p_g = gradient + i_b * stride_gb + o_c * stride_gc + o_n * stride_gn
        tl.store(p_g, v_s.to(gradient.dtype.element_ty), m_c & (o_n < N))


def blocks_of(channels: int, planes: bool, double: bool) -> dict[str, int]:
    """Channels and pixels of a tile: where a channel's pixels lie side by side, one channel; else all that fit."""
    size = 1024 if double else 2048
    rows = 1 if planes else min(triton.next_power_of_2(channels), 64)
    return {"BLOCK_C": rows, "BLOCK_N": size // rows}


def piece_of(images: int, channels: int, pixels: int, blocks: dict[str, int]) -> int:
    """Pixels of a piece."""
    return share_of(pixels, images * -(-channels // blocks["BLOCK_C"]), 4 * blocks["BLOCK_N"], 8192)


@operator()
def spatial_kl(
    student: torch.Tensor,  # [B, C, *S]
    teacher: torch.Tensor,  # [B, C, *S]
    mask: torch.Tensor | None,  # [B, *S], boolean, contiguous
    temperature: float,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, C = student.shape[:2]
    N = student.shape[2:].numel()
    dtype = arithmetic(student, teacher)
    each = reduction == "none"
    rows = student.new_empty((B, C, 4), dtype=dtype)
    if B == 0:
        return student.new_zeros((B, C) if each else (), dtype=dtype), rows
    (s, strides_s), (t, strides_t) = planes_of(student), planes_of(teacher)
    double = dtype == torch.float64
    blocks = blocks_of(C, strides_s[2] == 1, double)
    piece = piece_of(B, C, N, blocks)
    count = max(-(-N // piece), 1)
    pieces = student.new_empty((5, B, count, C), dtype=torch.float64)
    values = student.new_empty((B, C), dtype=dtype if each else torch.float64)
    pixels = None if mask is None else mask.flatten(1).sum(1)
    pieces_kernel[(B * count, -(-C // blocks["BLOCK_C"]))](
        s, t, mask, pieces, C, N, piece, count, pieces[0].numel(), math.log2(math.e) / temperature,
        *strides_s, *strides_t,
        A=tl.float64 if double else tl.float32, HAS_MASK=mask is not None, **blocks,
    )  # fmt: skip
    block = min(triton.next_power_of_2(C), 32)
    rows_kernel[(B, -(-C // block))](
        pieces, pixels, rows, values, B, C, N, count, pieces[0].numel(), temperature,
        HAS_MASK=mask is not None, MEAN=reduction == "mean", BLOCK_C=block, BLOCK_P=16,
    )  # fmt: skip
    if each:
        return values, rows
    loss = student.new_empty((), dtype=dtype)
    sum_kernel[(1,)](values, loss, B * C, BLOCK=1024)
    return loss, rows


@operator()
def spatial_kl_backward(
    student: torch.Tensor,  # [B, C, *S]
    teacher: torch.Tensor,  # [B, C, *S]
    mask: torch.Tensor | None,  # [B, *S], boolean, contiguous
    rows: torch.Tensor,  # [B, C, 4]
    upstream: torch.Tensor,  # [] or [B, C]
    temperature: float,
) -> torch.Tensor:
    B, C = student.shape[:2]
    N = student.shape[2:].numel()
    gradient, written, strides_g = gradient_like(student)
    if B * N > 0:
        (s, strides_s), (t, strides_t) = planes_of(student), planes_of(teacher)
        double = rows.dtype == torch.float64
        blocks = blocks_of(C, strides_s[2] == 1, double)
        piece = piece_of(B, C, N, blocks)
        count = -(-N // piece)
        gradient_kernel[(B * count, -(-C // blocks["BLOCK_C"]))](
            s, t, mask, rows, upstream, written, C, N, piece, count,
            math.log2(math.e) / temperature, *strides_s, *strides_t, *strides_g, *(upstream.stride() or (0, 0)),
            A=tl.float64 if double else tl.float32, HAS_MASK=mask is not None, **blocks,
        )  # fmt: skip
    if written is not gradient:
        gradient.copy_(written)
    return gradient
