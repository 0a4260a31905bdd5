"""Pixels as rows: a pixel over its channels, divided by its norm, for the kernels of pixel_relation and pixel_affinity.

Small networks are normalised where they are used (`normalise`). Otherwise one pass over the features prepares them
(`prepare`), and one more takes the gradient of the rows back through the division (`finish`). Memory O(N C) is little
beside what N² products of pixels cost. Derivation: medkd_fast/reference/pixel_relation.py.

What multiplies two rows on tensor cores takes them in one of two forms:

* bfloat16 and float16 for cosine and gram stay as they are: their products are exact in fp32 sums, and each is scaled by
  both pixels' inverse norms afterwards. Rounding normalised rows to a half type would cost eight bits.
* float32, float64, mixed with one of them or not, and pearson, whose rows are what is left of a difference, are
  normalised into memory of their own, [B, N, C], in the type of the arithmetic.

An fp32 product then is three of tf32 ("tf32x3"): with x = x₁ + x₂, x₁ and then x₂ rounded to 11 bits, x₁y₁ + x₁y₂ + x₂y₁ lacks
x₂y₂ and what 22 bits leave of x, each below 2⁻²² of |x||y|, of either sign: the error of an fp32 sum of a few terms. Or it is
three of float16 ("fp16x3"), which has 11 bits too: twice as fast, in half of the shared memory. For that a row's size has to
be known: one of norm 1, times 2¹⁴, is within float16's range, and numbers below 10⁻⁵ of it have fewer digits, the last of
them 2·10⁻¹². gram's rows are of any size.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from medkd_fast.kernels.pixel_images import pixels_of
from medkd_fast.kernels.planes import gradient_like, planes_of

HALF = (torch.bfloat16, torch.float16)


#: A row of norm 1 times this, and what rounding to float16 leaves of it, are within float16's range.
UNIT = tl.constexpr(2.0**14)


@triton.jit
def halves(x):
    """float16 numbers whose sum is x, to 22 bits."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def multiply(a, b, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """a bᵀ"""
    if PRECISION == "fp16x3":
        a_high, a_low = halves(a)
        b_high, b_low = halves(b)
        product = tl.dot(a_low, tl.trans(b_high))
        product = tl.dot(a_high, tl.trans(b_low), product)
        return tl.dot(a_high, tl.trans(b_high), product)
    else:  # known when the kernel is compiled
        return tl.dot(a, tl.trans(b), input_precision=PRECISION, out_dtype=TYPE)


@triton.jit
def inverse_norm(squares):
    """1 / max(norm, 1e-12). 1e12 says that the gradient along the row does not vanish: a constant divides it."""
    return tl.where(squares < 1e-24, 1e12, tl.rsqrt(squares))


@triton.jit
def normalise(x, m_c, C, RELATION: tl.constexpr, AXIS: tl.constexpr, SCALE: tl.constexpr):
    """Rows times SCALE, and their inverse norms, from all the channels of some pixels, along AXIS; zeros beyond m_c."""
    count = tl.full((1,), C, x.dtype)
    if RELATION == "gram":
        inverse = 1.0 / tl.sqrt(count) + tl.zeros_like(tl.sum(x, AXIS))
    else:
        if RELATION == "pearson":
            # less the first channel before: a large mean takes no digits, and equal channels become exact zeros
            first = tl.arange(0, x.shape[AXIS]) == 0
            x -= tl.expand_dims(tl.sum(tl.where(tl.expand_dims(first, 1 - AXIS), x, 0.0), AXIS), AXIS)
            x = tl.where(m_c, x, 0.0)
            x = tl.where(m_c, x - tl.expand_dims(tl.sum(x, AXIS) / count, AXIS), 0.0)
        inverse = inverse_norm(tl.sum(x * x, AXIS))
    # rounded here: fused with a subtraction one of two equal rows would not be
    return tl.fma(x, tl.expand_dims(inverse * SCALE, AXIS), 0.0), inverse


@triton.jit
def prepare_kernel(
    x,
    mask,  # [B, N]
    rows,  # [B, N, C]
    inverses,  # [B, blocks * BLOCK_P], stride_ip apart
    C,
    N,
    blocks,  # of pixels, an image
    stride_xb,
    stride_xc,
    stride_xp,
    stride_ip,
    RELATION: tl.constexpr,
    HAS_MASK: tl.constexpr,
    STORE: tl.constexpr,  # rows too
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_p = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < N
    if HAS_MASK:
        m_p = m_p & (tl.load(mask + i_b * N + o_p, m_p, 0) != 0)
    p_x = x + i_b * stride_xb + o_p[:, None] * stride_xp  # [BLOCK_P, 1]
    TYPE: tl.constexpr = inverses.dtype.element_ty
    first = tl.zeros([BLOCK_P], TYPE)
    mean = tl.zeros([BLOCK_P], TYPE)
    count = tl.full((1,), C, TYPE)
    if RELATION == "pearson":
        first = tl.load(x + i_b * stride_xb + o_p * stride_xp, m_p, 0.0).to(TYPE)
        for c in range(0, C, BLOCK_C):
            o_c = c + tl.arange(0, BLOCK_C)
            m_x = m_p[:, None] & (o_c < C)[None, :]
            b_x = tl.load(p_x + o_c[None, :].to(tl.int64) * stride_xc, m_x, 0.0).to(TYPE)  # [BLOCK_P, BLOCK_C]
            mean += tl.sum(tl.where(m_x, b_x - first[:, None], 0.0), 1)
        mean = mean / count
    if RELATION == "gram":
        inverse = 1.0 / tl.sqrt(count) + mean
    else:
        squares = tl.zeros([BLOCK_P], TYPE)
        for c in range(0, C, BLOCK_C):
            o_c = c + tl.arange(0, BLOCK_C)
            m_x = m_p[:, None] & (o_c < C)[None, :]
            b_x = tl.load(p_x + o_c[None, :].to(tl.int64) * stride_xc, m_x, 0.0).to(TYPE)
            b_x = tl.where(m_x, (b_x - first[:, None]) - mean[:, None], 0.0)
            squares += tl.sum(b_x * b_x, 1)
        inverse = inverse_norm(squares)
    tl.store(inverses + (i_b * blocks * BLOCK_P + o_p) * stride_ip, inverse)
    if STORE:
        for c in range(0, C, BLOCK_C):
            o_c = c + tl.arange(0, BLOCK_C)
            m_x = m_p[:, None] & (o_c < C)[None, :]
            b_x = tl.load(p_x + o_c[None, :].to(tl.int64) * stride_xc, m_x, 0.0).to(TYPE)
            b_x = tl.where(m_x, (b_x - first[:, None]) - mean[:, None], 0.0) * inverse[:, None]
            p_rows = rows + (i_b * N + o_p[:, None]) * C + o_c[None, :]
            tl.store(p_rows, b_x, (o_p < N)[:, None] & (o_c < C)[None, :])


@triton.jit
def finish_kernel(
    gradient,  # for the rows, [B, N, C]
    rows,  # as they were multiplied: `Rows`
    inverses,  # [B, padded], stride_ip apart
    mask,  # [B, N]
    out,  # for the features, laid out as they
    C,
    N,
    padded,
    blocks,
    stride_rb,
    stride_rc,
    stride_rp,
    stride_ob,
    stride_oc,
    stride_op,
    stride_ip,
    RELATION: tl.constexpr,
    RAW: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_p = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < N
    m_valid = m_p
    if HAS_MASK:
        m_valid = m_p & (tl.load(mask + i_b * N + o_p, m_p, 0) != 0)
    p_g = gradient + (i_b * N + o_p[:, None]) * C
    p_s = rows + i_b * stride_rb + o_p[:, None] * stride_rp
    inverse = tl.load(inverses + (i_b * padded + o_p) * stride_ip)
    TYPE: tl.constexpr = inverses.dtype.element_ty
    along = tl.zeros([BLOCK_P], TYPE)
    sum_s = tl.zeros([BLOCK_P], TYPE)
    sum_g = tl.zeros([BLOCK_P], TYPE)
    if RELATION != "gram":
        for c in range(0, C, BLOCK_C):
            o_c = c + tl.arange(0, BLOCK_C)
            m_x = m_valid[:, None] & (o_c < C)[None, :]
            b_g = tl.load(p_g + o_c[None, :], m_x, 0.0)  # [BLOCK_P, BLOCK_C]
            b_s = tl.load(p_s + o_c[None, :].to(tl.int64) * stride_rc, m_x, 0.0).to(TYPE)
            if RAW:
                b_s *= inverse[:, None]
            along += tl.sum(b_s * b_g, 1)
            sum_s += tl.sum(b_s, 1)
            sum_g += tl.sum(b_g, 1)
        along = tl.where(inverse < 1e12, along, 0.0)
    mean = tl.zeros([BLOCK_P], TYPE)
    if RELATION == "pearson":
        mean = (sum_g - sum_s * along) / tl.full((1,), C, TYPE)
    for c in range(0, C, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        m_x = m_valid[:, None] & (o_c < C)[None, :]
        b_g = tl.load(p_g + o_c[None, :], m_x, 0.0)
        b_s = tl.load(p_s + o_c[None, :].to(tl.int64) * stride_rc, m_x, 0.0).to(TYPE)
        if RAW:
            b_s *= inverse[:, None]
        b_g = tl.where(m_x, (b_g - b_s * along[:, None] - mean[:, None]) * inverse[:, None], 0.0)
        p_out = out + i_b * stride_ob + o_p[:, None] * stride_op + o_c[None, :].to(tl.int64) * stride_oc
        tl.store(p_out, b_g.to(out.dtype.element_ty), m_p[:, None] & (o_c < C)[None, :])


def precision_of(type: torch.dtype, relation: str) -> str:
    """How rows are multiplied."""
    if type == torch.float64:
        return "ieee"
    return "tf32x3" if relation == "gram" else "fp16x3"


class Rows(NamedTuple):
    """One network's pixels, ready to be multiplied."""

    x: torch.Tensor
    strides: tuple[int, int, int]  # over images, channels and pixels
    inverse: torch.Tensor  # [B, N rounded up to 64]: whoever takes blocks of pixels need not ask where they end
    raw: bool  # x is the features, still to be multiplied by `inverse`


def prepare(
    x: torch.Tensor,
    mask: torch.Tensor | None,
    relation: str,
    type: torch.dtype,
    always_store: bool = False,
    inverse: torch.Tensor | None = None,  # where the inverse norms go, any distance apart
) -> Rows:
    B, C, N = x.shape[0], x.shape[1], pixels_of(x)
    raw = not always_store and type == torch.float32 and x.dtype in HALF and relation != "pearson"
    x, strides = planes_of(x)
    rows = x if raw else x.new_empty((B, N, C), dtype=type)
    BLOCK_P, BLOCK_C = 64, 32
    blocks = triton.cdiv(N, BLOCK_P)
    if inverse is None:
        inverse = x.new_empty((B, blocks * BLOCK_P), dtype=type)
    prepare_kernel[(B * blocks,)](
        x,
        mask,
        rows,
        inverse,
        C,
        N,
        blocks,
        *strides,
        inverse.stride(1),
        RELATION=relation,
        HAS_MASK=mask is not None,
        STORE=not raw,
        BLOCK_P=BLOCK_P,
        BLOCK_C=BLOCK_C,
    )
    if raw:
        return Rows(x, strides, inverse, raw)
    return Rows(rows, (N * C, 1, C), inverse, raw)


def finish(
    gradient: torch.Tensor, rows: Rows, mask: torch.Tensor | None, relation: str, like: torch.Tensor
) -> torch.Tensor:
    """The gradient for the features from that for the rows, [B, N, C]."""
    B, C, N = like.shape[0], like.shape[1], pixels_of(like)
    result, written, strides = gradient_like(like)
    BLOCK_P, BLOCK_C = 64, 32
    blocks = triton.cdiv(N, BLOCK_P)
    finish_kernel[(B * blocks,)](
        gradient,
        rows.x,
        rows.inverse,
        mask,
        written,
        C,
        N,
        rows.inverse.shape[1],
        blocks,
        *rows.strides,
        *strides,
        rows.inverse.stride(1),
        RELATION=relation,
        RAW=rows.raw,
        HAS_MASK=mask is not None,
        BLOCK_P=BLOCK_P,
        BLOCK_C=BLOCK_C,
    )
    return result if written is result else result.copy_(written)
