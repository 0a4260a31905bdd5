"""Triton kernels of class_similarity: prototypes out of sums by class (class_sums.py) and the cosines; in the backward, weighted
sums, what comes through the prototypes, and the gradient.

Derivation: medkd_fast/reference/class_similarity.py.
"""

import torch
import triton
import triton.language as tl

from medkd_fast.kernels.class_sums import (
    add_numbers,
    add_slots,
    load_features,
    load_labels,
    power_of_2,
    sums_by_class,
    tile_of,
)
from medkd_fast.kernels.common import operator
from medkd_fast.kernels.planes import gradient_like, planes_of
from medkd_fast.reference.common import arithmetic


@triton.jit
def inverse_norm(square):
    """1 / max(norm, 1e-8): exactly 1e8 for shorter ones, whose gradient along themselves vanishes. Of no number, none."""
    short = square <= 1e-16
    return tl.where(short, 1e8, 1.0 / tl.sqrt(tl.where(short, 1.0, square)))


@triton.jit
def prototypes_kernel(slots, of_class, means, counts, inverses, C, K, count, BLOCK_C: tl.constexpr):
    """Prototypes [B, K, C], pixels and inverse norms [B, K]."""
    i_b, i_k = (tl.program_id(0) // K).to(tl.int64), tl.program_id(0) % K
    number, _ = add_numbers(of_class, i_b, i_k, K, count)
    square = tl.full((), 0.0, tl.float64)
    for c in range(0, C, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        mean = (add_slots(slots, i_b, i_k, o_c, C, K, count) / (number + 1e-6)).to(means.dtype.element_ty)
        tl.store(means + (i_b * K + i_k) * C + o_c, mean, o_c < C)
        wide = mean.to(tl.float64)
        square += tl.sum(wide * wide, 0)
    tl.store(inverses + i_b * K + i_k, inverse_norm(square).to(inverses.dtype.element_ty))
    tl.store(counts + i_b * K + i_k, number.to(tl.int64))


@triton.jit
def similarity_kernel(
    x, target, means, inverses, similarity, inverse,  # [B, C, N], [B, N], [B, K, C], [B, K], [B, N] twice
    C, K, N, blocks, ignore_index: tl.int64, stride_b, stride_c, stride_n,
    A: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_n = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    label, outside = load_labels(target, i_b * N + o_n, o_n < N, K, ignore_index)
    product = tl.zeros([BLOCK_N], A)
    square = tl.zeros([BLOCK_N], A)
    for c in range(0, C, BLOCK_C):
        o_c = (c + tl.arange(0, BLOCK_C)).to(tl.int64)[:, None]
        b_x = load_features(
            x + i_b * stride_b, o_c, o_n[None, :], C, label[None, :], outside[None, :], stride_c, stride_n, A
        )
        b_m = tl.load(means + (i_b * K + label)[None, :] * C + o_c, (label >= 0)[None, :] & (o_c < C), 0.0)
        product += tl.sum(b_x * b_m, 0)
        square += tl.sum(b_x * b_x, 0)
    own = inverse_norm(square)
    of_class = tl.load(inverses + i_b * K + label, label >= 0, 0.0)
    tl.store(similarity + i_b * N + o_n, tl.where(label >= 0, product * own * of_class, 0.0), o_n < N)
    tl.store(inverse + i_b * N + o_n, own, o_n < N)


@triton.jit
def weights_kernel(upstream, similarity, inverse, weight, along, size, BLOCK: tl.constexpr):
    """Of all pixels what their features are weighed with in the sums by class, and what is added up beside them."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(upstream + o, o < size, 0.0)
    tl.store(weight + o, v * tl.load(inverse + o, o < size, 0.0), o < size)
    tl.store(along + o, v * tl.load(similarity + o, o < size, 0.0), o < size)


@triton.jit
def rest_kernel(slots, of_class, means, counts, rest, inverses, C, K, count, BLOCK_C: tl.constexpr):
    """What reaches a class's pixels through its prototype [B, K, C], and the inverse of that one's norm [B, K]."""
    i_b, i_k = (tl.program_id(0) // K).to(tl.int64), tl.program_id(0) % K
    _, along = add_numbers(of_class, i_b, i_k, K, count)
    number = tl.load(counts + i_b * K + i_k).to(tl.float64) + 1e-6
    square = tl.full((), 0.0, tl.float64)
    for c in range(0, C, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        mean = tl.load(means + (i_b * K + i_k) * C + o_c, o_c < C, 0.0).to(tl.float64)
        square += tl.sum(mean * mean, 0)
    own = inverse_norm(square)
    along = tl.where(square <= 1e-16, 0.0, own * own * along)
    for c in range(0, C, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        mean = tl.load(means + (i_b * K + i_k) * C + o_c, o_c < C, 0.0).to(tl.float64)
        v = (own * add_slots(slots, i_b, i_k, o_c, C, K, count) - along * mean) / number
        tl.store(rest + (i_b * K + i_k) * C + o_c, v.to(rest.dtype.element_ty), o_c < C)
    tl.store(inverses + i_b * K + i_k, own.to(inverses.dtype.element_ty))


@triton.jit
def gradient_kernel(
    x, target, means, inverses, rest, similarity, inverse, upstream, gradient,
    C, K, N, blocks, ignore_index: tl.int64, stride_b, stride_c, stride_n, stride_gb, stride_gc, stride_gn,
    A: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_n = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)[:, None]
    label, outside = load_labels(target, i_b * N + o_n, o_n < N, K, ignore_index)
    counts = label >= 0
    own = tl.load(inverse + i_b * N + o_n, counts, 0.0)
    along = tl.load(upstream + i_b * N + o_n, counts, 0.0) * own
    of_feature = -along * tl.load(similarity + i_b * N + o_n, counts, 0.0) * own
    of_feature = tl.where(own >= 1e8, 0.0, of_feature)[None, :]
    of_prototype = (along * tl.load(inverses + i_b * K + label, counts, 0.0))[None, :]
    b_x = load_features(
        x + i_b * stride_b, o_c, o_n[None, :], C, label[None, :], outside[None, :], stride_c, stride_n, A
    )
    at = (i_b * K + label)[None, :] * C + o_c
    m = counts[None, :] & (o_c < C)
    v = of_prototype * tl.load(means + at, m, 0.0) + of_feature * b_x + tl.load(rest + at, m, 0.0)
    p_g = gradient + i_b * stride_gb + o_c * stride_gc + o_n[None, :] * stride_gn
    tl.store(p_g, v.to(gradient.dtype.element_ty), (o_c < C) & (o_n < N)[None, :])


@operator()
def class_similarity(
    x: torch.Tensor,  # [B, C, *S]
    target: torch.Tensor,  # [B, *S], contiguous
    num_classes: int,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    B, C = x.shape[:2]
    N = x.shape[2:].numel()
    dtype = arithmetic(x, x)
    similarity, inverse = (x.new_empty(target.shape, dtype=dtype) for _ in range(2))
    means = x.new_empty((B, num_classes, C), dtype=dtype)
    counts = x.new_empty((B, num_classes), dtype=torch.int64)
    if B > 0:
        sums = sums_by_class(x, target, num_classes, ignore_index)
        inverses = x.new_empty((B, num_classes), dtype=dtype)
        prototypes_kernel[(B * num_classes,)](
            sums.slots, sums.of_class, means, counts, inverses, C, num_classes, sums.count,
            BLOCK_C=min(power_of_2(C), 128),
        )  # fmt: skip
    if B * N > 0:
        read, strides = planes_of(x)
        tile = tile_of(C, strides[2] == 1, 2048)
        blocks = -(-N // tile["BLOCK_N"])
        similarity_kernel[(B * blocks,)](
            read, target, means, inverses, similarity, inverse, C, num_classes, N, blocks, ignore_index, *strides,
            A=tl.float64 if dtype == torch.float64 else tl.float32, **tile,
        )  # fmt: skip
    return similarity, means, counts, inverse


@operator()
def class_similarity_backward(
    x: torch.Tensor,  # [B, C, *S]
    target: torch.Tensor,  # [B, *S], contiguous, as are all the others but the last
    similarity: torch.Tensor,  # [B, *S]
    means: torch.Tensor,  # [B, K, C]
    counts: torch.Tensor,  # [B, K]
    inverse: torch.Tensor,  # [B, *S]
    upstream: torch.Tensor,  # [B, *S]
    ignore_index: int,
) -> torch.Tensor:
    B, C = x.shape[:2]
    K, N = counts.shape[1], x.shape[2:].numel()
    gradient, written, strides_g = gradient_like(x)
    if x.numel() > 0:
        upstream = upstream.contiguous()
        weight, along = torch.empty_like(inverse), torch.empty_like(inverse)
        weights_kernel[(-(-B * N // 1024),)](upstream, similarity, inverse, weight, along, B * N, BLOCK=1024)
        sums = sums_by_class(x, target, K, ignore_index, weight, along)
        rest, inverses = torch.empty_like(means), means.new_empty((B, K))
        rest_kernel[(B * K,)](
            sums.slots, sums.of_class, means, counts, rest, inverses, C, K, sums.count, BLOCK_C=min(power_of_2(C), 128)
        )
        read, strides = planes_of(x)
        tile = tile_of(C, strides[2] == 1, 2048)
        blocks = -(-N // tile["BLOCK_N"])
        gradient_kernel[(B * blocks, -(-C // tile["BLOCK_C"]))](
            read, target, means, inverses, rest, similarity, inverse, upstream, written, C, K, N, blocks, ignore_index,
            *strides, *strides_g, A=tl.float64 if means.dtype == torch.float64 else tl.float32, **tile,
        )  # fmt: skip
    if written is not gradient:
        gradient.copy_(written)
    return gradient
