"""pixel_relation with divergence "kl": rows of the relation matrix of N×N pixels a block at a time, columns streamed, both
networks' softmax in one pass, as flash attention does. Derivation: medkd_fast/reference/pixel_relation.py.

Forward: a program owns a block of rows, of one image towards itself or another. Logits are in units of log 2, so that an
exponential is one instruction. For unit vectors and τ ≥ 0.05 all maxima are 1/τ and nothing is rescaled; else each row has
a running one. What a tile adds is summed in fp32, tiles in double. It leaves every row's maxima and inverse sums.

Backward: the matrix is symmetric, so both gradients that reach s_i, as a row and as a column, come from the tile (i, j):

    ∂/∂s_i = Σ_j E_ij s_j,  E_ij = e_s (w_i + w_j) − e_t (v_i + v_j),  e = e^{logit − maximum}, w, v = factor / sum

Programs own whole rows: no atomics, no partial gradients, and four exponentials of N² numbers with the forward. What is
equal for student and teacher is computed alike, and without fused multiply-subtract: equal features have gradient 0. The four
numbers of a column lie side by side: read apart, each costs a tile some thirty instructions.
A program's gradient lies in memory while it goes on: two programs then fit a multiprocessor, and one multiplies while the other
takes exponentials.

E_ij s_j on tensor cores. bfloat16 features are exact as they are; E, times their inverse norms, is split in two bfloat16
numbers, which keep 16 of its bits. Rounding E to one would leave 8, and E's sign changes along a row, where what is left of
the sum may be small. float16 features are exact in tf32, with E in three products like all fp32 (E itself has not
float16's range). Tensor cores truncate as they add up: sums are taken to ordinary registers every CHUNK columns.
"""

import math
import struct
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from medkd_fast.kernels.common import AHEAD, operator, roomy
from medkd_fast.kernels.pixel_images import add_values, image_share, image_weight, pixels_of
from medkd_fast.kernels.pixel_rows import UNIT, Rows, finish, multiply, precision_of, prepare
from medkd_fast.reference.common import arithmetic


@triton.jit
def load_panel(x, stride_xc, stride_xp, o_c, o_p, m_p, C, N, RAW: tl.constexpr):
    """Channels o_c by pixels o_p, one of them a column, or turned over; zeros for pixels that do not count."""
    m_x = (o_c < C) & (m_p if RAW else o_p < N)  # prepared rows have their zeros
    return tl.load(x + o_c * stride_xc + o_p * stride_xp, m_x, 0.0)


@triton.jit
def multiply_rows(a, b, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """a bᵀ, with "fp16x3" times UNIT²"""
    if PRECISION == "fp16x3":
        a *= UNIT
        b *= UNIT
    return multiply(a, b, TYPE, PRECISION)


@triton.jit
def scaled(scale, PRECISION: tl.constexpr):
    """What products of rows of norm 1 are multiplied with to be logits."""
    if PRECISION == "fp16x3":
        scale *= 1 / (UNIT * UNIT)
    return scale


@triton.jit
def relation_tile(
    x,
    y,
    panel,
    b_j,  # [BLOCK_C, BLOCK_J]
    stride_xc,
    stride_xp,
    o_i,
    m_i,
    o_j,
    m_j,
    C,
    N,  # for o_i
    left,  # for o_j
    TYPE: tl.constexpr,
    RAW: tl.constexpr,
    ALL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products of pixels o_i, a column, and o_j, a row, of two images, from the first block of channels, and the others.

    As multiply_rows has them. ALL: there are no others. A loop over them, even an empty one, would be the innermost: the only one whose loads Triton makes ahead.
    """
    BLOCK_C: tl.constexpr = b_j.shape[0]
    tile = multiply_rows(panel, tl.trans(b_j), TYPE, PRECISION)
    if not ALL:
        for c in range(BLOCK_C, C, BLOCK_C):
            o_c = (c + tl.arange(0, BLOCK_C)).to(tl.int64)
            b_i = load_panel(x, stride_xc, stride_xp, o_c[None, :], o_i, m_i, C, N, RAW)
            b_k = load_panel(y, stride_xc, stride_xp, o_c[:, None], o_j, m_j, C, left, RAW)
            tile += multiply_rows(b_i, tl.trans(b_k), TYPE, PRECISION)
    return tile


@triton.jit
def inverse_at(inverses, first, o_p, padded, NETWORK: tl.constexpr, RAW: tl.constexpr):
    """Inverse norms, where features come without them."""
    if RAW:
        return tl.load(inverses + 2 * (first + o_p) + NETWORK, o_p < padded, 1.0)
    return tl.full(o_p.shape, 1.0, inverses.dtype.element_ty)


@triton.jit
def pairs(p, PIXELS: tl.constexpr):
    """Two numbers each of some pixels, side by side in memory, as two rows: one load and one address."""
    first, second = tl.split(tl.reshape(tl.load(p + tl.arange(0, 2 * PIXELS)), [PIXELS, 2]))
    return first[None, :], second[None, :]


@triton.jit
def quads(p, PIXELS: tl.constexpr):
    """Four numbers each, as four rows."""
    even, odd = tl.split(tl.reshape(tl.load(p + tl.arange(0, 4 * PIXELS)), [PIXELS, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first[None, :], second[None, :], third[None, :], fourth[None, :]


@triton.jit
def counted(mask, first, o_p, N, HAS_MASK: tl.constexpr, FULL: tl.constexpr = False):
    if FULL:
        m_p = tl.full(o_p.shape, True, tl.int1)
    else:
        m_p = o_p < N
    if HAS_MASK:
        m_p = m_p & (tl.load(mask + first + o_p, m_p, 0) != 0)
    return m_p


@triton.jit
def sums_of_lanes(x):
    """Sums over a row of what a lane of a tensor core's result holds of it, [rows, 4]: no lane waits for another."""
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    return tl.sum(tl.sum(tl.reshape(x, [ROWS, COLUMNS // 8, 4, 2]), 1), 2)


@triton.jit
def raised(maximum, largest):
    """A running maximum, −inf before the first column that counts; as a finite number; what the sums so far are multiplied by."""
    new = tl.maximum(maximum, largest)
    finite = tl.where(new == -float("inf"), 0.0, new)
    return new, finite, tl.exp2(maximum - finite)


@triton.jit
def rows_kernel(
    student,  # [B, C_s, N]
    teacher,  # [B, C_t, N]
    inverses,  # [B, padded, 2], of student and teacher
    mask,  # [B, N]
    kept,  # [B, columns, padded, 4]: for the backward
    values,  # [B * columns, blocks], double
    scale_bits,  # of the double 1 / (temperature log 2)
    C_s,
    C_t,
    N,
    padded,
    columns,  # images that an image's pixels are related to
    blocks,
    stride_sb,
    stride_sc,
    stride_sp,
    stride_tb,
    stride_tc,
    stride_tp,
    ACROSS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    FULL: tl.constexpr,  # all columns of all blocks count
    BOUNDED: tl.constexpr,
    RAW_S: tl.constexpr,
    RAW_T: tl.constexpr,
    ALL_S: tl.constexpr,  # channels are in the first block
    ALL_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION_S: tl.constexpr,
    PRECISION_T: tl.constexpr,
):
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    i_a = pair // columns
    i_b = pair % columns if ACROSS else i_a
    TYPE: tl.constexpr = kept.dtype.element_ty
    scale = scale_bits.to(tl.float64, bitcast=True).to(TYPE)
    o_i = ((tl.program_id(0) % blocks).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I))[:, None]
    m_i = counted(mask, i_a * N, o_i, N, HAS_MASK)
    s_a = student + i_a * stride_sb
    t_a = teacher + i_a * stride_tb
    s_b = student + i_b * stride_sb
    t_b = teacher + i_b * stride_tb
    o_s = tl.arange(0, BLOCK_S).to(tl.int64)
    o_t = tl.arange(0, BLOCK_T).to(tl.int64)
    panel_s = load_panel(s_a, stride_sc, stride_sp, o_s[None, :], o_i, m_i, C_s, N, RAW_S)  # [BLOCK_I, BLOCK_S]
    panel_t = load_panel(t_a, stride_tc, stride_tp, o_t[None, :], o_i, m_i, C_t, N, RAW_T)
    inverse = inverse_at(inverses, i_a * padded, o_i, padded, 0, RAW_S)  # [BLOCK_I, 1]
    row_s = scaled(scale, PRECISION_S) * inverse
    row_t = scaled(scale, PRECISION_T) * inverse_at(inverses, i_a * padded, o_i, padded, 1, RAW_T)
    o_j = tl.arange(0, BLOCK_J)[None, :].to(tl.int64)
    # in 64 bits: offsets of columns are the same in every tile
    step_s = tl.full((), stride_sp, tl.int64)
    step_t = tl.full((), stride_tp, tl.int64)
    sum_s = tl.zeros([BLOCK_I, 4], tl.float64)
    sum_t = tl.zeros([BLOCK_I, 4], tl.float64)
    weighted = tl.zeros([BLOCK_I, 4], tl.float64)
    max_s = tl.full([BLOCK_I], -float("inf"), TYPE)
    max_t = tl.full([BLOCK_I], -float("inf"), TYPE)
    for j in range(0, N, BLOCK_J):
        s_j, t_j = s_b + j * step_s, t_b + j * step_t
        m_j = counted(mask, i_b * N + j, o_j, N - j, HAS_MASK, FULL)
        column_s, column_t = pairs(inverses + 2 * (i_b * padded + j), BLOCK_J)
        b_j = load_panel(s_j, stride_sc, stride_sp, o_s[:, None], o_j, m_j, C_s, N - j, RAW_S)
        b_k = load_panel(t_j, stride_tc, stride_tp, o_t[:, None], o_j, m_j, C_t, N - j, RAW_T)
        b_s = relation_tile(
            s_a, s_j, panel_s, b_j, stride_sc, stride_sp, o_i, m_i, o_j, m_j, C_s, N, N - j, TYPE, RAW_S, ALL_S, PRECISION_S
        )  # fmt: skip
        b_t = relation_tile(
            t_a, t_j, panel_t, b_k, stride_tc, stride_tp, o_i, m_i, o_j, m_j, C_t, N, N - j, TYPE, RAW_T, ALL_T, PRECISION_T
        )  # fmt: skip
        if RAW_S:
            b_s *= column_s
        if RAW_T:
            b_t *= column_t
        if BOUNDED:
            # below every exponential but finite, so that two of them are 0 apart
            shift = tl.where(m_j, -scale, -1e30).to(TYPE)
            b_s = tl.fma(b_s, row_s, shift)
            b_t = tl.fma(b_t, row_t, shift)
            e_s = tl.exp2(b_s)
            e_t = tl.exp2(b_t)
        else:
            absent = tl.where(m_j, 0.0, -float("inf")).to(TYPE)
            b_s *= row_s
            b_t *= row_t
            max_s, finite_s, lower_s = raised(max_s, tl.max(b_s + absent, 1))
            max_t, finite_t, lower_t = raised(max_t, tl.max(b_t + absent, 1))
            sum_s *= lower_s[:, None]
            sum_t *= lower_t[:, None]
            weighted *= lower_t[:, None]
            e_s = tl.exp2(b_s + absent - finite_s[:, None])
            e_t = tl.exp2(b_t + absent - finite_t[:, None])
        sum_s += sums_of_lanes(e_s).to(tl.float64)
        sum_t += sums_of_lanes(e_t).to(tl.float64)
        weighted += sums_of_lanes(e_t * (b_t - b_s)).to(tl.float64)
    sum_s = tl.sum(sum_s, 1)
    sum_t = tl.sum(sum_t, 1)
    weighted = tl.sum(weighted, 1)
    if BOUNDED:
        max_s = tl.zeros([BLOCK_I], TYPE) + scale
        max_t = max_s
    m_row = tl.reshape(m_i, [BLOCK_I]) & (sum_s != 0)  # a sum of nothing: the image has no pixel that counts
    LOG_2: tl.constexpr = 0.6931471805599453
    sum_s = tl.where(m_row, sum_s, 1.0)
    sum_t = tl.where(m_row, sum_t, 1.0)
    raised_by = tl.where(m_row, max_s.to(tl.float64) - max_t.to(tl.float64), 0.0)
    value = (weighted / sum_t + raised_by) * LOG_2 + tl.log(sum_s / sum_t)
    tl.store(values + tl.program_id(0), tl.sum(tl.where(m_row, value, 0.0)))
    o_row = tl.reshape(o_i, [BLOCK_I])
    w_row = tl.where(m_row, 1.0 / sum_s, 0.0).to(TYPE)
    v_row = tl.where(m_row, 1.0 / sum_t, 0.0).to(TYPE)
    # what the backward wants of a column: both networks' inverse norms and 1 / sum times the student's, or if not BOUNDED both
    # maxima and 1 / sum
    if BOUNDED:
        of_s = tl.reshape(inverse, [BLOCK_I])
        of_t = tl.reshape(inverse_at(inverses, i_a * padded, o_i, padded, 1, RAW_T), [BLOCK_I])
        w_row *= of_s
        v_row *= of_s
    else:
        # the infinite maximum makes every exponential of a row that does not count 0
        of_s = tl.where(m_row, max_s, float("inf"))
        of_t = tl.where(m_row, max_t, float("inf"))
    p_kept = kept + (pair * padded + o_row) * 4
    tl.store(p_kept, of_s, o_row < padded)
    tl.store(p_kept + 1, of_t, o_row < padded)
    tl.store(p_kept + 2, w_row, o_row < padded)
    tl.store(p_kept + 3, v_row, o_row < padded)


@triton.jit
def pair_factor(
    upstream, pixels, i_a, i_b, B, N, scale, stride_ua, stride_ub, ACROSS: tl.constexpr, HAS_MASK: tl.constexpr, MEAN: tl.constexpr
):  # fmt: skip
    """What the gradients of image a's rows, related to image b, are multiplied by."""
    factor = tl.load(upstream + i_a * stride_ua + i_b * stride_ub).to(tl.float64)
    factor *= scale * 0.6931471805599453 * image_share(pixels, i_a, B, N, HAS_MASK, MEAN)
    if ACROSS:
        factor *= image_weight(pixels, i_b, B, N, HAS_MASK, MEAN)
    return factor.to(upstream.dtype.element_ty)


@triton.jit
def gradient_kernel(
    student,  # [B, C_s, N]
    teacher,  # [B, C_t, N]
    inverses,  # [B, padded, 2], of student and teacher
    mask,  # [B, N]
    kept,  # [B, columns, padded, 4]
    upstream,  # [], [B] or [B, B]
    pixels,  # [B]
    gradient,  # for the normalised student, [B, N, C_s]
    scale_bits,
    C_s,
    C_t,
    B,
    N,
    padded,
    columns,
    blocks,
    stride_sb,
    stride_sc,
    stride_sp,
    stride_tb,
    stride_tc,
    stride_tp,
    stride_ua,
    stride_ub,
    ACROSS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    FULL: tl.constexpr,  # all columns of all blocks count
    MEAN: tl.constexpr,
    BOUNDED: tl.constexpr,
    RAW_S: tl.constexpr,
    RAW_T: tl.constexpr,
    ALL_S: tl.constexpr,  # channels are in the first block
    ALL_T: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,  # tiles of a turn of the loop, which share its addresses and its waiting
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    PRECISION_S: tl.constexpr,
    PRECISION_T: tl.constexpr,
):
    i_a = (tl.program_id(0) // blocks).to(tl.int64)
    TYPE: tl.constexpr = kept.dtype.element_ty
    EXACT: tl.constexpr = "ieee" if TYPE == tl.float64 else "tf32x3"
    double = scale_bits.to(tl.float64, bitcast=True)
    scale = double.to(TYPE)
    o_i = ((tl.program_id(0) % blocks).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I))[:, None]
    o_out = (tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT))[None, :].to(tl.int64)
    m_i = counted(mask, i_a * N, o_i, N, HAS_MASK)
    s_a = student + i_a * stride_sb
    t_a = teacher + i_a * stride_tb
    o_s = tl.arange(0, BLOCK_S).to(tl.int64)
    o_t = tl.arange(0, BLOCK_T).to(tl.int64)
    panel_s = load_panel(s_a, stride_sc, stride_sp, o_s[None, :], o_i, m_i, C_s, N, RAW_S)  # [BLOCK_I, BLOCK_S]
    panel_t = load_panel(t_a, stride_tc, stride_tp, o_t[None, :], o_i, m_i, C_t, N, RAW_T)
    inverse = inverse_at(inverses, i_a * padded, o_i, padded, 0, RAW_S)  # [BLOCK_I, 1]
    row_s = scaled(scale, PRECISION_S) * inverse
    row_t = scaled(scale, PRECISION_T) * inverse_at(inverses, i_a * padded, o_i, padded, 1, RAW_T)
    o_j = tl.arange(0, BLOCK_J)[None, :].to(tl.int64)
    # in 64 bits: offsets of columns are the same in every tile
    step_s = tl.full((), stride_sp, tl.int64)
    step_t = tl.full((), stride_tp, tl.int64)
    p_gradient = gradient + (i_a * N + o_i) * C_s + o_out
    m_gradient = (o_i < N) & (o_out < C_s)
    for column in range(columns):
        i_b = tl.full((), column, tl.int64) if ACROSS else i_a
        s_b = student + i_b * stride_sb
        t_b = teacher + i_b * stride_tb
        there = pair_factor(upstream, pixels, i_a, i_b, B, N, double, stride_ua, stride_ub, ACROSS, HAS_MASK, MEAN)
        back = pair_factor(upstream, pixels, i_b, i_a, B, N, double, stride_ua, stride_ub, ACROSS, HAS_MASK, MEAN)
        p_i = kept + ((i_a * columns + column) * padded + o_i) * 4
        p_b = kept + ((i_b * columns + i_a) if ACROSS else i_a) * 4 * padded
        w_i = tl.load(p_i + 2, m_i, 0.0)
        v_i = tl.load(p_i + 3, m_i, 0.0)
        if BOUNDED:
            w_i /= inverse
            v_i /= inverse
        if ACROSS or not BOUNDED:
            w_i *= there
            v_i *= there
        max_si = scale
        max_ti = scale
        if not BOUNDED:
            max_si = tl.load(p_i, m_i, float("inf"))
            max_ti = tl.load(p_i + 1, m_i, float("inf"))
        for first in range(0, N, CHUNK):
            b_g = tl.zeros([BLOCK_I, BLOCK_OUT], TYPE)
            for j in tl.range(first, tl.minimum(first + CHUNK, N), BLOCK_J, loop_unroll_factor=UNROLL):
                s_j, t_j = s_b + j * step_s, t_b + j * step_t
                m_j = counted(mask, i_b * N + j, o_j, N - j, HAS_MASK, FULL)
                of_sj, of_tj, w_j, v_j = quads(p_b + 4 * j, BLOCK_J)
                if BOUNDED:
                    column_s, column_t = of_sj, of_tj
                elif RAW_S | RAW_T:
                    column_s, column_t = pairs(inverses + 2 * (i_b * padded + j), BLOCK_J)
                b_j = load_panel(s_j, stride_sc, stride_sp, o_s[:, None], o_j, m_j, C_s, N - j, RAW_S)
                b_k = load_panel(t_j, stride_tc, stride_tp, o_t[:, None], o_j, m_j, C_t, N - j, RAW_T)
                b_s = relation_tile(
                    s_a, s_j, panel_s, b_j, stride_sc, stride_sp, o_i, m_i, o_j, m_j, C_s, N, N - j, TYPE, RAW_S, ALL_S, PRECISION_S
                )  # fmt: skip
                b_t = relation_tile(
                    t_a, t_j, panel_t, b_k, stride_tc, stride_tp, o_i, m_i, o_j, m_j, C_t, N, N - j, TYPE, RAW_T, ALL_T, PRECISION_T
                )  # fmt: skip
                if RAW_S:
                    b_s *= column_s
                if RAW_T:
                    b_t *= column_t
                # columns that do not count are multiplied with zeros in the end
                if BOUNDED:
                    if ACROSS:
                        w_j *= back
                        v_j *= back
                    # with the inverse norms of the second product
                    if RAW_S:
                        w_j = tl.fma(w_i, column_s, w_j)
                        v_j = tl.fma(v_i, column_s, v_j)
                    else:
                        w_j += w_i
                        v_j += v_i
                    b_e = tl.exp2(tl.fma(b_s, row_s, -scale)) * w_j
                    b_e -= tl.exp2(tl.fma(b_t, row_t, -scale)) * v_j
                else:
                    w_j *= back
                    v_j *= back
                    b_s *= row_s
                    b_t *= row_t
                    b_e = tl.exp2(b_s - max_si) * w_i - tl.exp2(b_t - max_ti) * v_i
                    b_e += tl.exp2(b_s - of_sj) * w_j - tl.exp2(b_t - of_tj) * v_j
                    b_e = tl.where(m_j, b_e, 0.0)  # all that counts may lie far below a product with zeros
                    if RAW_S:  # the inverse norms of the second product
                        b_e *= column_s
                if ALL_S:
                    b_j = tl.trans(b_j)  # [BLOCK_J, BLOCK_OUT]
                else:
                    b_j = load_panel(s_j, stride_sc, stride_sp, o_out, tl.trans(o_j), tl.trans(m_j), C_s, N - j, RAW_S)
                if b_j.dtype == tl.bfloat16:
                    # cut off, not rounded: two of a pair's numbers become bfloat16 in one instruction
                    high = (b_e.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
                    b_g = tl.dot(high.to(tl.bfloat16), b_j, b_g)
                    b_g = tl.dot((b_e - high).to(tl.bfloat16), b_j, b_g)
                else:
                    b_g = tl.dot(b_e, b_j.to(TYPE), b_g, input_precision=EXACT, out_dtype=TYPE)
            if BOUNDED and not ACROSS:
                b_g *= there
            b_g += tl.load(p_gradient, m_gradient & (column + first > 0), 0.0)
            tl.store(p_gradient, b_g, m_gradient)
            tl.debug_barrier()


def bits_of(x: float) -> int:
    """Of the double: a float argument of a kernel has 32."""
    return struct.unpack("<q", struct.pack("<d", x))[0]


class Plan(NamedTuple):
    """What forward and backward of a call share."""

    tensors: tuple[torch.Tensor | None, ...]  # the kernels' first arguments
    sizes: tuple[int, ...]  # channels of student and teacher
    strides: tuple[int, ...]
    student: Rows
    type: torch.dtype
    pixels: torch.Tensor | None  # of every image that count
    scale: int
    padded: int
    flags: dict[str, Any]


def plan_of(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    relation: str,
    temperature: float,
    across_images: bool,
) -> Plan:
    type = arithmetic(student, teacher)
    padded = -(-pixels_of(student) // 64) * 64
    inverses = student.new_empty((student.shape[0], padded, 2), dtype=type)
    s = prepare(student, mask, relation, type, inverse=inverses[..., 0])
    t = prepare(teacher, mask, relation, type, inverse=inverses[..., 1])
    double, half = type == torch.float64, s.raw and t.raw
    BLOCK_I, BLOCK_J = (64, 32) if double else (128, 64) if half else (64, 64)
    most = 32 if double else 128 if half and roomy() else 64
    BLOCK_S, BLOCK_T = (min(max(triton.next_power_of_2(x.shape[1]), 16), most) for x in (student, teacher))
    all_s, all_t = student.shape[1] <= BLOCK_S, teacher.shape[1] <= BLOCK_T
    if double or (relation == "gram" and not half):
        stages = 1  # a tile of fp64, or of tf32's numbers, loaded ahead would cost half of the programs at once
    else:
        stages = AHEAD if all_s and all_t and roomy(160 if half else 200) else 2
    flags = {
        "ACROSS": across_images,
        "HAS_MASK": mask is not None,
        "FULL": mask is None and padded == pixels_of(student),
        # e^(-2 / 0.05) is far from the smallest float
        "BOUNDED": relation != "gram" and temperature >= 0.05,
        "RAW_S": s.raw,
        "RAW_T": t.raw,
        "BLOCK_I": BLOCK_I,
        "BLOCK_J": BLOCK_J,
        "ALL_S": all_s,
        "ALL_T": all_t,
        "BLOCK_S": BLOCK_S,
        "BLOCK_T": BLOCK_T,
        # half products are exact
        "PRECISION_S": "tf32x3" if s.raw else precision_of(type, relation),
        "PRECISION_T": "tf32x3" if t.raw else precision_of(type, relation),
        "num_warps": 8 if half else 4,
        # two programs a multiprocessor
        "maxnreg": 128 if half and max(BLOCK_S, BLOCK_T) <= 64 else None,
        "num_stages": stages,
        "enable_fp_fusion": False,
    }
    if double and mask is not None:
        mask = mask.to(torch.int64)  # Triton 3.6 multiplies no doubles that it finds to depend on narrower numbers
    return Plan(
        (s.x, t.x, inverses, mask),
        (student.shape[1], teacher.shape[1]),
        (*s.strides, *t.strides),
        s,
        type,
        mask.flatten(1).sum(1) if mask is not None else None,
        bits_of(1 / (temperature * math.log(2))),
        padded,
        flags,
    )


@operator()
def pixel_relation_kl(
    student: torch.Tensor,  # [B, C, *S]
    teacher: torch.Tensor,  # [B, other C, *S]
    mask: torch.Tensor | None,  # [B, *S], boolean, contiguous
    relation: str,
    temperature: float,
    across_images: bool,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, N = student.shape[0], pixels_of(student)
    plan = plan_of(student, teacher, mask, relation, temperature, across_images)
    columns = B if across_images else 1
    kept = student.new_empty((B, columns, 4, plan.padded), dtype=plan.type)  # the shape that all backends have
    # what is equal for both networks is computed alike with fused operations too, but for logits from running maxima
    flags = {**plan.flags, "enable_fp_fusion": plan.flags["BOUNDED"]}
    blocks = triton.cdiv(N, flags["BLOCK_I"])
    values = student.new_empty((B * columns, blocks), dtype=torch.float64)
    rows_kernel[(B * columns * blocks,)](
        *plan.tensors,
        kept,
        values,
        plan.scale,
        *plan.sizes,
        N,
        plan.padded,
        columns,
        blocks,
        *plan.strides,
        **flags,
    )
    loss = student.new_empty((B,) * (1 + across_images) if reduction == "none" else (), dtype=plan.type)
    add_values(
        values, plan.pixels, loss, B, N, "rows", across_images, HAS_MASK=mask is not None, MEAN=reduction == "mean"
    )
    return loss, kept


@operator()
def pixel_relation_kl_backward(
    student: torch.Tensor,  # [B, C, *S]
    teacher: torch.Tensor,  # [B, other C, *S]
    mask: torch.Tensor | None,  # [B, *S], boolean, contiguous
    rows: torch.Tensor,  # what the forward left, contiguous, in the type of the arithmetic
    upstream: torch.Tensor,  # [], [B] or [B, B], in the type of the arithmetic
    relation: str,
    temperature: float,
    across_images: bool,
    reduction: str,
) -> torch.Tensor:
    B, C, N = student.shape[0], student.shape[1], pixels_of(student)
    plan = plan_of(student, teacher, mask, relation, temperature, across_images)
    # of 64 columns the sums and two relations would not fit the registers
    flags = {**plan.flags, "BLOCK_J": 32, "BLOCK_OUT": plan.flags["BLOCK_S"]}
    if not plan.flags["ALL_S"]:  # the relations are made anew for every block of the gradient's channels
        flags |= (
            {"BLOCK_I": 64, "BLOCK_OUT": 128}
            if flags["RAW_S"] and flags["RAW_T"]
            else {"BLOCK_OUT": min(flags["BLOCK_S"], 64)}
        )
    blocks = triton.cdiv(N, flags["BLOCK_I"])
    gradient = student.new_empty((B, N, C), dtype=plan.type)
    gradient_kernel[(B * blocks, triton.cdiv(C, flags["BLOCK_OUT"]))](
        *plan.tensors,
        rows,
        upstream,
        plan.pixels,
        gradient,
        plan.scale,
        *plan.sizes,
        B,
        N,
        plan.padded,
        B if across_images else 1,
        blocks,
        *plan.strides,
        upstream.stride(0) if upstream.dim() > 0 else 0,
        upstream.stride(1) if upstream.dim() > 1 else 0,
        MEAN=reduction == "mean",
        CHUNK=4096,
        # where shared memory has room for four tiles, and registers for their addresses; with fp32 nothing is gained
        UNROLL=2 if flags["maxnreg"] and flags["FULL"] and roomy(200) else 1,
        **flags,
    )
    return finish(gradient, plan.student, mask, relation, student)
