"""The two passes of channel_relation and channel_gram over the pixels: the products of every two channels, and a small
matrix times the features. What happens between the two is in channel_matrices.py; derivation:
medkd_fast/reference/channel_relation.py.

What is multiplied, Y, is made from the features as they are loaded: "plain"; "centred", minus nearly the channel's mean
(pearson); "exponential", of the channel minus its maximum (softmax). The last two come with the channels' sums, as products
with a row of ones. Masked pixels are 0.

A program multiplies a slot of pixels, and the slots are added in double in their order. Within a slot a tl.dot of at most
128 pixels starts from zero and is added with correct rounding. fp32 is multiplied as three products of TF32 numbers, which
lose at most 2^-21 of |y_i| |y_j|, of either sign: in such sums less than their additions. Halves that are not shifted are
multiplied as they are, without any loss; so is the small matrix with bfloat16, which three bfloat16 numbers make up in half
the time that three products of TF32 take. Doubles are transformed beforehand: Triton 3.6 multiplies none that it finds to
depend on narrower numbers, as a mask.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from medkd_fast.kernels.common import AHEAD, share_of
from medkd_fast.kernels.pixel_images import pixels_of
from medkd_fast.kernels.planes import gradient_like, planes_of

#: What a relation multiplies, where it is not the features themselves.
SHIFTED = {"pearson": "centred", "softmax": "exponential"}
#: Pixels that the mean is first guessed from.
SAMPLES = 256
#: Pixels of a program that looks for maxima or transforms.
PIECE = 4096
TILE = {"BLOCK_C": 16, "BLOCK_P": 128}


@triton.jit
def load_features(
    x, mask, b_shift, stride_c, stride_p, o_c, o_p, C, N, to_base_2, A: tl.constexpr, FEATURES: tl.constexpr,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Y of an image at channels o_c, a column, by pixels o_p, a row; plain features in their own type."""
    m_x = (o_c < C) & (o_p < N)
    if HAS_MASK:
        m_x = m_x & (tl.load(mask + o_p, o_p < N, 0) != 0)
    b_x = tl.load(x + o_c * stride_c + o_p * stride_p, m_x, 0.0)  # [BLOCK_C, BLOCK_P]
    if FEATURES == "centred":
        b_x = tl.where(m_x, b_x.to(A) - b_shift, 0.0)
    if FEATURES == "exponential":
        b_x = tl.where(m_x, tl.exp2((b_x.to(A) - b_shift) * to_base_2), 0.0)
    return b_x


@triton.jit
def sample_mean_kernel(
    x, mask, shift,  # [B, C]
    C, N, stride_b, stride_c, stride_p, HAS_MASK: tl.constexpr, SAMPLES: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The mean of pixels that count among SAMPLES evenly spread ones; if none does, of the first block with one that does.

    It need only be near the mean: what is left of that comes with the sums.
    """
    i_b = tl.program_id(0).to(tl.int64)
    o_c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[:, None].to(tl.int64)
    x += i_b * stride_b
    total = tl.zeros([BLOCK_C, 1], tl.float64)
    count = tl.full((), 0, tl.int32)
    samples = tl.minimum(N, SAMPLES)
    # the samples, then all pixels in their order for as long as none has counted
    first = tl.full((), 0, tl.int64)
    while (first < samples + N) & ((first < samples) | (count == 0)):
        o_k = (first + tl.arange(0, BLOCK_P))[None, :]
        if first < samples:
            o_p = o_k * N // samples
            m_p = o_k < samples
        else:
            o_p = o_k - samples
            m_p = o_p < N
        if HAS_MASK:
            m_p = m_p & (tl.load(mask + i_b * N + o_p, m_p, 0) != 0)
        b_x = tl.load(x + o_c * stride_c + o_p * stride_p, (o_c < C) & m_p, 0.0)
        total += tl.sum(b_x.to(tl.float64), 1, keep_dims=True)
        count += tl.sum(m_p.to(tl.int32))
        first = tl.minimum(first + BLOCK_P, samples) if first < samples else first + BLOCK_P
    mean = total / tl.maximum(count, 1).to(tl.float64)
    tl.store(shift + i_b * C + o_c, mean.to(shift.dtype.element_ty), o_c < C)


@triton.jit
def highest_kernel(
    x, mask, highest,  # [B, count, C]
    C, N, count, stride_b, stride_c, stride_p, HAS_MASK: tl.constexpr, PIECE: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The maxima of a piece of the pixels, -inf where none counts."""
    i_piece = tl.program_id(0).to(tl.int64)
    i_b = i_piece // count
    first = i_piece % count * PIECE
    o_c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[:, None].to(tl.int64)
    A: tl.constexpr = highest.dtype.element_ty
    most = tl.full([BLOCK_C, BLOCK_P], -float("inf"), A)
    for p in range(first, tl.minimum(first + PIECE, N), BLOCK_P):
        o_p = (p + tl.arange(0, BLOCK_P))[None, :]
        m_p = o_p < N
        if HAS_MASK:
            m_p = m_p & (tl.load(mask + i_b * N + o_p, m_p, 0) != 0)
        b_x = tl.load(x + i_b * stride_b + o_c * stride_c + o_p * stride_p, (o_c < C) & m_p, -float("inf"))
        most = tl.maximum(most, b_x.to(A))
    tl.store(highest + i_piece * C + o_c, tl.max(most, 1, keep_dims=True), o_c < C)


@triton.jit
def join_highest_kernel(
    highest,  # [B, count, C]
    shift,  # [B, C]
    C, count, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[:, None]
    most = tl.full([BLOCK_C, BLOCK_P], -float("inf"), shift.dtype.element_ty)
    for k in range(0, count, BLOCK_P):
        o_k = (k + tl.arange(0, BLOCK_P))[None, :]
        m_k = (o_c < C) & (o_k < count)
        most = tl.maximum(most, tl.load(highest + (i_b * count + o_k) * C + o_c, m_k, -float("inf")))
    tl.store(shift + i_b * C + o_c, tl.max(most, 1, keep_dims=True), o_c < C)


@triton.jit
def transform_kernel(
    x, mask, shift,  # [B], C apart by stride_shift
    out,  # [B, C, N]
    C, N, count, stride_b, stride_c, stride_p, stride_shift, to_base_2: tl.float64, FEATURES: tl.constexpr,
    HAS_MASK: tl.constexpr, PIECE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Y in memory."""
    i_b = (tl.program_id(0) // count).to(tl.int64)
    first = (tl.program_id(0) % count).to(tl.int64) * PIECE
    o_c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[:, None].to(tl.int64)
    A: tl.constexpr = out.dtype.element_ty
    to_base_2 = tl.full((), to_base_2, A)
    b_shift = tl.zeros([BLOCK_C, 1], A)
    if FEATURES != "plain":
        b_shift = tl.load(shift + i_b * stride_shift + o_c, o_c < C, 0.0)
    for p in range(first, tl.minimum(first + PIECE, N), BLOCK_P):
        o_p = (p + tl.arange(0, BLOCK_P))[None, :]
        b_y = load_features(
            x + i_b * stride_b, mask + i_b * N if HAS_MASK else mask, b_shift, stride_c, stride_p, o_c, o_p, C, N,
            to_base_2, A, FEATURES, HAS_MASK,
        )  # fmt: skip
        tl.store(out + (i_b * C + o_c) * N + o_p, b_y.to(A), (o_c < C) & (o_p < N))


@triton.jit
def products_kernel(
    x, mask, shift,  # [B, C]
    partial,  # [B, slots, C, W]: upper triangles of Y Yᵀ, and the sums of Y in column C
    C, W, N, share, slots, pairs,  # pixels of a slot; of blocks of channels
    stride_b, stride_c, stride_p, to_base_2: tl.float64, FEATURES: tl.constexpr, SUMS: tl.constexpr,
    HAS_MASK: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # neighbouring programs read the same pixels
    i_slot = (tl.program_id(0) // pairs).to(tl.int64)
    i_b = i_slot // slots
    first = i_slot % slots * share
    # pair 0, 1, 2, ...: blocks of channels (0, 0), (0, 1), (1, 1), (0, 2), ...
    i_row = tl.program_id(0) % pairs
    i_col = 0
    while i_row > i_col:
        i_col += 1
        i_row -= i_col
    x += i_b * stride_b
    if HAS_MASK:
        mask += i_b * N
    o_i = (i_row * BLOCK_C + tl.arange(0, BLOCK_C))[:, None].to(tl.int64)
    o_j = (i_col * BLOCK_C + tl.arange(0, BLOCK_C))[:, None].to(tl.int64)
    A: tl.constexpr = partial.dtype.element_ty
    to_base_2 = tl.full((), to_base_2, A)
    shift_i = tl.zeros([BLOCK_C, 1], A)
    shift_j = shift_i
    if FEATURES != "plain":
        shift_i = tl.load(shift + i_b * C + o_i, o_i < C, 0.0)
        shift_j = tl.load(shift + i_b * C + o_j, o_j < C, 0.0)
    products = tl.zeros([BLOCK_C, BLOCK_C], A)
    if SUMS:
        # a product like the others: as exact, and in an order that does not depend on the layout
        ones = tl.full([BLOCK_P, 16], 1.0, A)
        sums = tl.zeros([BLOCK_C, 16], A)
    for p in range(first, tl.minimum(first + share, N), BLOCK_P):
        o_p = (p + tl.arange(0, BLOCK_P))[None, :]
        y_i = load_features(
            x, mask, shift_i, stride_c, stride_p, o_i, o_p, C, N, to_base_2, A, FEATURES, HAS_MASK
        )  # [BLOCK_C, BLOCK_P]
        if ONE_BLOCK:
            y_j = y_i
        else:
            y_j = load_features(x, mask, shift_j, stride_c, stride_p, o_j, o_p, C, N, to_base_2, A, FEATURES, HAS_MASK)
        # the last argument keeps the addition out of the tensor cores, which would truncate it
        products += tl.dot(y_i, tl.trans(y_j), input_precision=PRECISION, max_num_imprecise_acc=BLOCK_P, out_dtype=A)
        if SUMS:
            sums += tl.dot(y_i, ones, input_precision=PRECISION, max_num_imprecise_acc=BLOCK_P, out_dtype=A)
    partial += i_slot * C * W
    o_k = tl.trans(o_j)
    tl.store(partial + o_i * W + o_k, products, (o_i < C) & (o_k < C))
    if SUMS:
        o_k = tl.arange(0, 16)[None, :]
        tl.store(partial + o_i * W + C + o_k, sums, (o_i < C) & (o_k == 0) & (i_row == i_col))


@triton.jit
def add_slots_kernel(
    partial,  # [sets, slots, C, W], upper triangles
    sums,  # [sets, C, W], double
    C, W, slots, BLOCK_SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_set = tl.program_id(1).to(tl.int64)
    o_k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_i, o_j = o_k // W, o_k % W
    m_k = (o_i < C) & (o_i <= o_j)
    total = tl.zeros([BLOCK], tl.float64)
    for slot in range(0, slots, BLOCK_SLOTS):
        o_slot = (slot + tl.arange(0, BLOCK_SLOTS))[:, None]
        p_k = partial + (i_set * slots + o_slot) * C * W + o_k[None, :]
        total += tl.sum(tl.load(p_k, (o_slot < slots) & m_k[None, :], 0.0).to(tl.float64), 0)
    sums += i_set * C * W
    tl.store(sums + o_k, total, m_k)
    tl.store(sums + o_j * W + o_i, total, m_k & (o_j < C))


@triton.jit
def matrix_times(b_m, b_y, A: tl.constexpr, PRECISION: tl.constexpr):
    """bfloat16 features as they are, by the three bfloat16 numbers that a float is the sum of."""
    if b_y.dtype == tl.bfloat16:
        high = b_m.to(tl.bfloat16)
        rest = b_m - high.to(A)
        middle = rest.to(tl.bfloat16)
        b_g = tl.dot((rest - middle.to(A)).to(tl.bfloat16), b_y, out_dtype=A)
        b_g = tl.dot(middle, b_y, b_g, out_dtype=A)
        b_g = tl.dot(high, b_y, b_g, out_dtype=A)
    else:
        b_g = tl.dot(b_m, b_y.to(A), input_precision=PRECISION, out_dtype=A)
    return b_g


@triton.jit
def gradient_kernel(
    x, mask, matrix,  # [B, W, W]
    upstream,  # [] or [B], or None for 1
    out, C, W, N, parts, blocks,  # of channels
    stride_b, stride_c, stride_p, stride_ob, stride_oc, stride_op, stride_u, to_base_2: tl.float64,
    LOAD: tl.constexpr, FEATURES: tl.constexpr, HAS_MASK: tl.constexpr, LOAD_MASK: tl.constexpr,
    ONE_BLOCK: tl.constexpr, PART: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out = upstream (M Y + m) with m the last column; for exponentials times Y. Y is LOADed so, from memory it is "plain"."""
    i_part = (tl.program_id(0) // blocks).to(tl.int64)
    i_b = i_part // parts
    first = i_part % parts * PART
    x += i_b * stride_b
    out += i_b * stride_ob
    matrix += i_b * W * W
    if HAS_MASK:
        mask += i_b * N
    A: tl.constexpr = matrix.dtype.element_ty
    to_base_2 = tl.full((), to_base_2, A)
    o_out = (tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C))[:, None].to(tl.int64)
    shift_out = tl.zeros([BLOCK_C, 1], A)
    constant = shift_out
    if LOAD != "plain":
        shift_out = tl.load(matrix + C * W + o_out, o_out < C, 0.0)
    if FEATURES != "plain":
        constant = tl.load(matrix + o_out * W + C, o_out < C, 0.0)
    if ONE_BLOCK:
        o_k = tl.trans(o_out)
        b_m = tl.load(matrix + o_out * W + o_k, (o_out < C) & (o_k < C), 0.0)  # [BLOCK_C, BLOCK_C]
    for p in range(first, tl.minimum(first + PART, N), BLOCK_P):
        o_p = (p + tl.arange(0, BLOCK_P))[None, :]
        if ONE_BLOCK:
            b_y = load_features(
                x, mask, shift_out, stride_c, stride_p, o_out, o_p, C, N, to_base_2, A, LOAD, LOAD_MASK
            )  # [BLOCK_C, BLOCK_P]
            b_g = matrix_times(b_m, b_y, A, PRECISION)
        else:
            b_g = tl.zeros([BLOCK_C, BLOCK_P], A)
            for c in range(0, C, BLOCK_C):
                o_c = (c + tl.arange(0, BLOCK_C))[:, None].to(tl.int64)
                shift_c = tl.zeros([BLOCK_C, 1], A)
                if LOAD != "plain":
                    shift_c = tl.load(matrix + C * W + o_c, o_c < C, 0.0)
                b_y = load_features(x, mask, shift_c, stride_c, stride_p, o_c, o_p, C, N, to_base_2, A, LOAD, LOAD_MASK)
                o_k = tl.trans(o_c)
                b_m = tl.load(matrix + o_out * W + o_k, (o_out < C) & (o_k < C), 0.0)
                b_g += matrix_times(b_m, b_y, A, PRECISION)
            if FEATURES == "exponential":
                b_y = load_features(
                    x, mask, shift_out, stride_c, stride_p, o_out, o_p, C, N, to_base_2, A, LOAD, LOAD_MASK
                ).to(A)
        if FEATURES != "plain":
            b_g += constant
            if FEATURES == "exponential":
                b_g *= b_y
            if HAS_MASK:
                b_g = tl.where(tl.load(mask + o_p, o_p < N, 0) != 0, b_g, 0.0)
        if upstream is not None:
            b_g *= tl.load(upstream + i_b * stride_u)
        p_out = out + o_out * stride_oc + o_p * stride_op
        tl.store(p_out, b_g.to(out.dtype.element_ty), (o_out < C) & (o_p < N))


def block_of(channels: int) -> int:
    return min(max(triton.next_power_of_2(channels), 16), 64)


def precision_of(type: torch.dtype) -> str:
    return "ieee" if type == torch.float64 else "tf32x3"


def count_pixels(mask: Tensor | None) -> Tensor | None:
    return mask.flatten(1).sum(1) if mask is not None else None


class Features(NamedTuple):
    """What the kernels load: the features themselves, or for doubles Y."""

    x: Tensor
    strides: tuple[int, int, int]
    load: str  # "plain" if it is Y
    load_mask: bool
    to_base_2: float


def pixels_at_once(features: Features, BLOCK_C: int) -> int:
    """Pixels of a tl.dot: of halves as they are, which need no room for three products, 256 bytes of a channel; 64 in one place are
    slow to read."""
    as_they_are = features.load == "plain" and features.x.element_size() == 2
    return 128 if as_they_are else 2048 // BLOCK_C


def features_of(
    x: Tensor, mask: Tensor | None, shift: Tensor | None, relation: str, temperature: float, type: torch.dtype
) -> Features:
    """`shift` [B, C], its channels next to one another, where the relation shifts them."""
    B, C, N = x.shape[0], x.shape[1], pixels_of(x)
    y, strides = planes_of(x)
    features, to_base_2 = SHIFTED.get(relation, "plain"), math.log2(math.e) / temperature
    if type != torch.float64:
        return Features(y, strides, features, mask is not None, to_base_2)
    out, count = x.new_empty((B, C, N), dtype=type), triton.cdiv(N, PIECE)
    transform_kernel[(B * count, triton.cdiv(C, TILE["BLOCK_C"]))](
        y, mask, shift, out, C, N, count, *strides, shift.stride(0) if shift is not None else 0, to_base_2,
        FEATURES=features, HAS_MASK=mask is not None, PIECE=PIECE, **TILE,
    )  # fmt: skip
    return Features(out, (C * N, N, 1), "plain", False, to_base_2)


def find_shift(x: Tensor, mask: Tensor | None, relation: str, shift: Tensor) -> None:
    """Into `shift` [B, C], contiguous, what the relation shifts the channels by."""
    B, C, N = x.shape[0], x.shape[1], pixels_of(x)
    y, strides = planes_of(x)
    blocks = triton.cdiv(C, TILE["BLOCK_C"])
    if relation == "pearson":
        sample_mean_kernel[(B, blocks)](
            y,
            mask,
            shift,
            C,
            N,
            *strides,
            HAS_MASK=mask is not None,
            SAMPLES=SAMPLES,
            BLOCK_C=TILE["BLOCK_C"],
            BLOCK_P=256,
        )
        return
    count = triton.cdiv(N, PIECE)
    highest = shift.new_empty((B, count, C))
    highest_kernel[(B * count, blocks)](
        y, mask, highest, C, N, count, *strides, HAS_MASK=mask is not None, PIECE=PIECE, **TILE
    )
    join_highest_kernel[(B, blocks)](highest, shift, C, count, BLOCK_C=TILE["BLOCK_C"], BLOCK_P=32)


def products(
    tensors: list[Tensor], mask: Tensor | None, relation: str, temperature: float, type: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The products of every tensor's channels [tensors, B, C, C], or with sums [tensors, B, C, C + 1], in double, and what
    the channels were shifted by [tensors, B, C]."""
    x = tensors[0]
    B, C, N = x.shape[0], x.shape[1], pixels_of(x)
    shifted = relation in SHIFTED
    W, BLOCK_C = C + shifted, block_of(C)
    blocks = triton.cdiv(C, BLOCK_C)
    pairs = blocks * (blocks + 1) // 2
    # so long that writing a slot's products costs little beside reading its pixels
    least = 256 if C <= 64 else 512 if C <= 128 else 1024
    share = share_of(N, B * pairs, least, 4 * least)
    slots = triton.cdiv(N, share)
    shift = x.new_empty((len(tensors), B, C), dtype=type) if shifted else None
    partial = x.new_empty((len(tensors), B, slots, C, W), dtype=type)
    sums = x.new_empty((len(tensors), B, C, W), dtype=torch.float64)
    for i, tensor in enumerate(tensors):
        shift_i = shift[i] if shift is not None else None
        if shift_i is not None:
            find_shift(tensor, mask, relation, shift_i)
        features = features_of(tensor, mask, shift_i, relation, temperature, type)
        products_kernel[(B * slots * pairs,)](
            features.x, mask, shift_i, partial[i], C, W, N, share, slots, pairs, *features.strides, features.to_base_2,
            FEATURES=features.load, SUMS=shifted, HAS_MASK=features.load_mask, ONE_BLOCK=blocks == 1,
            BLOCK_C=BLOCK_C, BLOCK_P=pixels_at_once(features, BLOCK_C), PRECISION=precision_of(type), num_stages=AHEAD,
        )  # fmt: skip
    add_slots_kernel[(triton.cdiv(C * W, 512), len(tensors) * B)](partial, sums, C, W, slots, BLOCK_SLOTS=4, BLOCK=512)
    return sums, shift


def gradient(
    x: Tensor, mask: Tensor | None, matrix: Tensor, upstream: Tensor | None, relation: str, temperature: float
) -> Tensor:
    """upstream [] or [B] times the matrix [B, C, C] times Y, or of [B, C + 1, C + 1] whose last row are the shifts."""
    B, C, N, W = x.shape[0], x.shape[1], pixels_of(x), matrix.shape[1]
    type = matrix.dtype
    shift = matrix[:, C, :C] if W > C else None
    features = features_of(x, mask, shift, relation, temperature, type)
    result, written, strides_out = gradient_like(x)
    BLOCK_C, PART = block_of(C), 512
    parts, blocks = triton.cdiv(N, PART), triton.cdiv(C, BLOCK_C)
    gradient_kernel[(B * parts * blocks,)](
        features.x, mask, matrix, upstream, written, C, W, N, parts, blocks, *features.strides, *strides_out,
        upstream.stride(0) if upstream is not None and upstream.dim() else 0, features.to_base_2,
        LOAD=features.load, FEATURES=SHIFTED.get(relation, "plain"), HAS_MASK=mask is not None,
        LOAD_MASK=features.load_mask, ONE_BLOCK=blocks == 1, PART=PART, BLOCK_C=BLOCK_C,
        BLOCK_P=(2048 if type == torch.float64 else 4096) // BLOCK_C, PRECISION=precision_of(type), num_stages=AHEAD,
    )  # fmt: skip
    return result if written is result else result.copy_(written)
