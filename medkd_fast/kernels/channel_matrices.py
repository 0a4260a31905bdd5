"""channel_relation and channel_gram between their passes over the pixels, C×C and in double: from the channels' products to
the relation and the divergence, and back to the matrix that the features are multiplied with. Derivation:
medkd_fast/reference/channel_relation.py.

A program has whole rows, so that what is made of a row needs no second pass over it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from medkd_fast.kernels.channel_products import SHIFTED
from medkd_fast.kernels.pixel_images import image_pixels, image_weight


@triton.jit
def inverse_norm(square):
    """1 / max(norm, 1e-12). A centred square can round to just below 0."""
    least = tl.full((), 1e-12, square.dtype)  # to tl.maximum a bare number is one of fp32
    return 1.0 / tl.maximum(tl.sqrt(tl.maximum(square, 0.0)), least)


@triton.jit
def turns(inverse):
    """Whether a row has a direction: one that is divided by 1e-12 is divided by a constant."""
    return inverse < 1 / 1e-12


@triton.jit
def factors(sums, o_c, C, W, pixels, RELATION: tl.constexpr):
    """What channels are multiplied by, and what is left of their means; for "row" their rows say the first."""
    square = tl.load(sums + o_c * W + o_c, o_c < C, 0.0)
    mean = tl.zeros_like(square)
    if RELATION == "gram":
        left = mean + 1.0 / pixels
    elif RELATION == "softmax":
        sum = tl.load(sums + o_c * W + C, o_c < C, 0.0)
        left = tl.where(sum == 0, 0.0, 1.0 / tl.where(sum == 0, 1.0, sum))  # 0: no pixel counts
    else:
        if RELATION == "pearson":
            mean = tl.load(sums + o_c * W + C, o_c < C, 0.0) / pixels
        left = inverse_norm(square - pixels * mean * mean)
    return left, mean


@triton.jit
def relation_kernel(
    sums,  # [sets, C, W], double
    pixels,  # [B]
    shift,  # [sets, C]
    relation,  # [sets, C, C]
    state,  # [sets, 3, C], double: what the rows were multiplied by, what was left of the means, the shifts
    B, C, W, N, RELATION: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_I: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    i_set = tl.program_id(0).to(tl.int64)
    o_i = (tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I))[:, None]
    o_k = tl.arange(0, WIDTH)[None, :]
    m_ik = (o_i < C) & (o_k < C)
    sums += i_set * C * W
    count = tl.maximum(image_pixels(pixels, i_set % B, N, HAS_MASK), 1.0)
    b_g = tl.load(sums + o_i * W + o_k, m_ik, 0.0)  # [BLOCK_I, WIDTH]
    left_i, mean_i = factors(sums, o_i, C, W, count, RELATION)
    if RELATION == "row":
        left_i = inverse_norm(tl.sum(b_g * b_g, 1, keep_dims=True))
    if RELATION == "row" or RELATION == "gram":
        b_r = b_g * left_i
    else:
        left_k, mean_k = factors(sums, o_k, C, W, count, RELATION)
        # every product of two factors alone, so that entries (i, k) and (k, i) are the same number
        b_r = (b_g - count * (mean_i * mean_k)) * (left_i * left_k)
    tl.store(relation + (i_set * C + o_i) * C + o_k, b_r.to(relation.dtype.element_ty), m_ik)
    state += i_set * 3 * C
    tl.store(state + o_i, left_i, o_i < C)
    tl.store(state + C + o_i, mean_i, o_i < C)
    by = tl.zeros_like(mean_i)
    if RELATION == "pearson" or RELATION == "softmax":
        by = tl.load(shift + i_set * C + o_i, o_i < C, 0.0).to(tl.float64)
    tl.store(state + 2 * C + o_i, by, o_i < C)


@triton.jit
def softmax_of_rows(x, m_ik, temperature):
    """e^(x / temperature) and its sums over the rows, relative to the rows' maxima."""
    most = tl.max(tl.where(m_ik, x, -float("inf")), 1, keep_dims=True)
    e = tl.where(m_ik, tl.exp(tl.where(m_ik, x - most, 0.0) / temperature), 0.0)
    return most, e, tl.sum(e, 1, keep_dims=True)


@triton.jit
def expm1(x):
    """e^x − 1 to a few roundings of itself."""
    e = tl.exp(x)
    # near 0 the rounding of e is as large as the result, and its logarithm knows that rounding
    near = (tl.abs(x) < 1) & (e != 1)
    log = tl.log(tl.where(near, e, 2.0))
    return tl.where(e == 1, x, tl.where(near, (e - 1.0) * (x / log), e - 1.0))


@triton.jit
def divergence_kernel(
    relation,  # [2, B, C, C], double: student's and teacher's
    pixels,  # [B]
    v,  # [B, C, C], double: the gradient for the student's
    values,  # [B, blocks of rows], double: shares in the loss
    B, C, N, temperature: tl.float64, DIVERGENCE: tl.constexpr, HAS_MASK: tl.constexpr, MEAN: tl.constexpr,
    BLOCK_I: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_i = (tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I))[:, None]
    o_k = tl.arange(0, WIDTH)[None, :]
    m_ik = (o_i < C) & (o_k < C)
    p_ik = (i_b * C + o_i) * C + o_k
    b_s = tl.load(relation + p_ik, m_ik, 0.0)  # [BLOCK_I, WIDTH]
    b_t = tl.load(relation + tl.full((), B, tl.int64) * C * C + p_ik, m_ik, 0.0)
    scale = image_weight(pixels, i_b, B, N, HAS_MASK, MEAN) / tl.full((), C, tl.int32).to(tl.float64)
    if DIVERGENCE != "kl":
        scale = scale / tl.full((), C, tl.int32).to(tl.float64)
        difference = b_s - b_t
        if DIVERGENCE == "mse_of_pairs":  # without what a channel is to itself
            difference = tl.where(o_i == o_k, 0.0, difference)
        terms = difference * difference
        b_v = 2.0 * scale * difference
    else:
        temperature = tl.full((), temperature, tl.float64)
        # rows beyond the last have sums too, so that nothing is divided by 0
        m_k = o_k + tl.zeros_like(o_i) < C
        most_s, e_s, sum_s = softmax_of_rows(b_s, m_k, temperature)
        most_t, e_t, sum_t = softmax_of_rows(b_t, m_k, temperature)
        p = e_t / sum_t
        d = (b_s - b_t) / temperature - ((most_s - most_t) / temperature + tl.log(sum_s / sum_t))
        # e^d may overflow where p has underflown
        gained = tl.where(d < 1, p * expm1(tl.minimum(d, 1.0)), e_s / sum_s - p)
        terms = gained - p * d
        b_v = scale / temperature * gained
    tl.store(v + p_ik, b_v, m_ik)
    value = tl.sum(tl.where(m_ik, terms, 0.0)) * scale
    tl.store(values + i_b * tl.num_programs(1) + tl.program_id(1), value)


@triton.jit
def loss_kernel(
    values,  # [programs, count], double
    loss,  # [programs]
    count, BLOCK: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([BLOCK], tl.float64)
    for k in range(0, count, BLOCK):
        o_k = k + tl.arange(0, BLOCK)
        total += tl.load(values + tl.program_id(0).to(tl.int64) * count + o_k, o_k < count, 0.0)
    tl.store(loss + tl.program_id(0), tl.sum(total).to(loss.dtype.element_ty))


@triton.jit
def through_norm_kernel(
    v,  # [B, C, C]
    relation,  # [B, C, C]
    state,  # [B, 3, C], double
    out,  # [B, C, C], double
    C, stride_vb, stride_vi, stride_vk, BLOCK_I: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradient for the products from that for their normalised rows."""
    i_b = tl.program_id(0).to(tl.int64)
    o_i = (tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I))[:, None]
    o_k = tl.arange(0, WIDTH)[None, :]
    m_ik = (o_i < C) & (o_k < C)
    p_ik = (i_b * C + o_i) * C + o_k
    b_v = tl.load(v + i_b * stride_vb + o_i * stride_vi + o_k * stride_vk, m_ik, 0.0).to(tl.float64)
    b_r = tl.load(relation + p_ik, m_ik, 0.0).to(tl.float64)
    left_i = tl.load(state + i_b * 3 * C + o_i, o_i < C, 0.0)
    along = tl.where(turns(left_i), tl.sum(b_v * b_r, 1, keep_dims=True), 0.0)
    tl.store(out + p_ik, (b_v - along * b_r) * left_i, m_ik)


@triton.jit
def matrix_kernel(
    v,  # [B, C, C]
    relation,  # [B, C, C]
    state,  # [B, 3, C], double
    matrix,  # [B, W, W]
    C, W, stride_vb, stride_vi, stride_vk, temperature: tl.float64, RELATION: tl.constexpr, BLOCK_I: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_i = (tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I))[:, None]
    o_k = tl.arange(0, WIDTH)[None, :]
    m_ik = (o_i < C) & (o_k < C)
    v += i_b * stride_vb
    state += i_b * 3 * C
    matrix += i_b * W * W
    TYPE: tl.constexpr = matrix.dtype.element_ty
    # an entry is the product of two channels, each of which gets its share
    b_w = tl.load(v + o_i * stride_vi + o_k * stride_vk, m_ik, 0.0).to(tl.float64)
    b_w += tl.load(v + o_k * stride_vi + o_i * stride_vk, m_ik, 0.0).to(tl.float64)  # [BLOCK_I, WIDTH]
    left_i = tl.load(state + o_i, o_i < C, 0.0)
    left_k = tl.load(state + o_k, o_k < C, 0.0)
    if RELATION == "gram":
        entry = b_w * left_i
    elif RELATION == "row":
        entry = b_w
    else:
        b_r = tl.load(relation + (i_b * C + o_i) * C + o_k, m_ik, 0.0).to(tl.float64)
        along = tl.sum(b_w * b_r, 1, keep_dims=True)
        if RELATION == "softmax":
            own = left_i / tl.full((), temperature, tl.float64)
            entry = b_w * own * left_k
            constant = -along * own
        else:
            along = tl.where(turns(left_i), along, 0.0)
            entry = (b_w - tl.where(o_i == o_k, along, 0.0)) * left_i * left_k
            constant = -tl.sum(entry * tl.load(state + C + o_k, o_k < C, 0.0), 1, keep_dims=True)
        if RELATION != "cosine":
            tl.store(matrix + o_i * W + C, constant.to(TYPE), o_i < C)
            # the last row: the shifts
            shift = tl.load(state + 2 * C + o_k, o_k < C, 0.0)
            tl.store(matrix + C * W + o_k, shift.to(TYPE), (o_k < W) & (tl.program_id(1) == 0))
    tl.store(matrix + o_i * W + o_k, entry.to(TYPE), m_ik)


def rows(channels: int) -> tuple[int, dict[str, int]]:
    """Programs for all rows, and the sizes of their blocks."""
    # one more, where a last row of C + 1 is stored
    WIDTH = triton.next_power_of_2(channels + 1)
    BLOCK_I = max(min(2048 // WIDTH, triton.next_power_of_2(channels)), 1)
    return triton.cdiv(channels, BLOCK_I), {"BLOCK_I": BLOCK_I, "WIDTH": WIDTH}


def relations(
    sums: Tensor, shift: Tensor | None, pixels: Tensor | None, N: int, relation: str, type: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The relations [tensors, B, C, C] in `type`, and their states [tensors, B, 3, C]."""
    sets, B, C, W = sums.shape
    matrix = sums.new_empty((sets, B, C, C), dtype=type)
    state = sums.new_empty((sets, B, 3, C))
    blocks, sizes = rows(C)
    relation_kernel[(sets * B, blocks)](
        sums, pixels, shift, matrix, state, B, C, W, N, RELATION=relation, HAS_MASK=pixels is not None, **sizes
    )
    return matrix, state


def divergence_of(
    matrices: Tensor,
    pixels: Tensor | None,
    N: int,
    divergence: str,
    temperature: float,
    reduction: str,
    type: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The loss [] or [B] in `type`, and its gradient [B, C, C] for the student's relation, the first of both."""
    _, B, C, _ = matrices.shape
    blocks, sizes = rows(C)
    v, values = torch.empty_like(matrices[0]), matrices.new_empty((B, blocks))
    divergence_kernel[(B, blocks)](
        matrices, pixels, v, values, B, C, N, temperature,
        DIVERGENCE=divergence, HAS_MASK=pixels is not None, MEAN=reduction == "mean", **sizes,
    )  # fmt: skip
    each = reduction == "none"
    loss = matrices.new_empty((B,) if each else (), dtype=type)
    loss_kernel[(B if each else 1,)](values, loss, blocks if each else B * blocks, BLOCK=128)
    return loss, v


def gradient_matrix(
    v: Tensor, matrix: Tensor, state: Tensor, relation: str, temperature: float, type: torch.dtype
) -> Tensor:
    """What the features are multiplied with for their gradient, in `type`: [B, C, C], or [B, C + 1, C + 1] with the constants
    in the last column and the shifts in the last row."""
    B, C, _ = matrix.shape
    W = C + (relation in SHIFTED)
    blocks, sizes = rows(C)
    if relation == "row":
        through = state.new_empty((B, C, C))
        through_norm_kernel[(B, blocks)](v, matrix, state, through, C, *v.stride(), **sizes)
        v = through
    out = state.new_empty((B, W, W), dtype=type)
    matrix_kernel[(B, blocks)](v, matrix, state, out, C, W, *v.stride(), temperature, RELATION=relation, **sizes)
    return out
