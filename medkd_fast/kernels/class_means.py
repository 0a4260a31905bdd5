"""Triton kernels of class_means: sums by class (class_sums.py), the means that they give, and each pixel's gradient.

Derivation: medkd_fast/reference/class_means.py.
"""

import torch
import triton
import triton.language as tl

from medkd_fast.kernels.class_sums import add_numbers, add_slots, load_labels, power_of_2, sums_by_class, tile_of
from medkd_fast.kernels.common import operator
from medkd_fast.kernels.planes import gradient_like
from medkd_fast.reference.common import arithmetic


@triton.jit
def means_kernel(slots, of_class, means, counts, C, K, count, BLOCK_C: tl.constexpr):
    i_b, i_k = (tl.program_id(0) // K).to(tl.int64), tl.program_id(0) % K
    number, _ = add_numbers(of_class, i_b, i_k, K, count)
    for c in range(0, C, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        mean = add_slots(slots, i_b, i_k, o_c, C, K, count) / tl.maximum(number, 1.0)
        tl.store(means + (i_b * K + i_k) * C + o_c, mean.to(means.dtype.element_ty), o_c < C)
    tl.store(counts + i_b * K + i_k, number.to(tl.int64))


@triton.jit
def gradient_kernel(
    target, counts, upstream, gradient,  # [B, N], [B, K], [B, K, C], [B, C, N]
    C, K, N, blocks, ignore_index: tl.int64, stride_ub, stride_uk, stride_uc, stride_gb, stride_gc, stride_gn,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_n = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)[:, None]
    label, outside = load_labels(target, i_b * N + o_n, o_n < N, K, ignore_index)
    number = tl.load(counts + i_b * K + label, label >= 0, 1).to(upstream.dtype.element_ty)
    p_v = upstream + i_b * stride_ub + label[None, :] * stride_uk + o_c * stride_uc
    v = tl.load(p_v, (label >= 0)[None, :] & (o_c < C), 0.0) / number[None, :]
    v = tl.where(outside[None, :], float("nan"), v)
    p_g = gradient + i_b * stride_gb + o_c * stride_gc + o_n[None, :] * stride_gn
    tl.store(p_g, v.to(gradient.dtype.element_ty), (o_c < C) & (o_n < N)[None, :])


@operator()
def class_means(
    x: torch.Tensor,  # [B, C, *S]
    target: torch.Tensor,  # [B, *S], contiguous
    num_classes: int,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, C = x.shape[:2]
    means = x.new_empty((B, num_classes, C), dtype=arithmetic(x, x))
    counts = x.new_empty((B, num_classes), dtype=torch.int64)
    if B > 0:
        sums = sums_by_class(x, target, num_classes, ignore_index)
        means_kernel[(B * num_classes,)](
            sums.slots, sums.of_class, means, counts, C, num_classes, sums.count, BLOCK_C=min(power_of_2(C), 128)
        )
    return means, counts


@operator()
def class_means_backward(
    x: torch.Tensor,  # [B, C, *S]
    target: torch.Tensor,  # [B, *S], contiguous
    counts: torch.Tensor,  # [B, K]
    upstream: torch.Tensor,  # [B, K, C]
    ignore_index: int,
) -> torch.Tensor:
    B, C = x.shape[:2]
    N = x.shape[2:].numel()
    gradient, written, strides_g = gradient_like(x)
    if x.numel() > 0:
        tile = tile_of(C, strides_g[2] == 1, 2048)
        blocks = -(-N // tile["BLOCK_N"])
        gradient_kernel[(B * blocks, -(-C // tile["BLOCK_C"]))](
            target, counts, upstream, written, C, counts.shape[1], N, blocks, ignore_index, *upstream.stride(),
            *strides_g, **tile,
        )  # fmt: skip
    if written is not gradient:
        gradient.copy_(written)
    return gradient
