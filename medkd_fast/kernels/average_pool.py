"""Triton kernels of average_pool: the numbers of the windows' pixels, the averages, and the gradient.

A tile is [channels, windows]; a program goes over the pixels of its windows, one of each at a time. Windows of many pixels, of
which there are few, have a kernel of their own: there a tile is [windows, pixels].
"""

import math

import torch
import triton
import triton.language as tl

from medkd_fast.kernels.common import operator
from medkd_fast.kernels.windows import (
    A_OF,
    SIZES,
    over_pixels,
    over_windows,
    pixel_of,
    settings_of,
    sizes_of,
    window_of,
)
from medkd_fast.reference.common import arithmetic


@triton.jit(do_not_specialize=SIZES)
def number_kernel(
    mask, number,  # [B, N], [B, windows]
    N: tl.int64, windows, blocks, size_z, size_y, size_x, pooled_y, pooled_x,
    HAS_MASK: tl.constexpr, INDEX: tl.constexpr, WINDOW_Z: tl.constexpr, WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    PIXELS: tl.constexpr = WINDOW_Z * WINDOW_Y * WINDOW_X
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_w = (tl.program_id(0) % blocks).to(INDEX) * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
    found = tl.zeros([BLOCK_W, 1], tl.int32)
    for first in range(0, PIXELS, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)[None, :]
        _, there = pixel_of(
            k, o_w, mask, i_b * N, windows, size_z, size_y, size_x, pooled_y, pooled_x, HAS_MASK, WINDOW_Z, WINDOW_Y, WINDOW_X
        )  # fmt: skip
        found += tl.sum(there.to(tl.int32), 1, keep_dims=True)
    tl.store(number + i_b * windows + o_w, found, o_w < windows)


@triton.jit(do_not_specialize=SIZES)
def average_kernel(
    x, mask, number, pooled,  # [B, C, N], [B, N], [B, windows], [B, C, windows]
    C, N: tl.int64, windows, blocks, size_z, size_y, size_x, pooled_y, pooled_x, stride_b, stride_c, stride_n,
    HAS_MASK: tl.constexpr, INDEX: tl.constexpr, WINDOW_Z: tl.constexpr, WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr,
    A: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_w = (tl.program_id(0) % blocks).to(INDEX) * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
    o_c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    p_x = x + i_b * stride_b + o_c * stride_c
    inside = (o_c < C) & (o_w < windows)
    total = tl.zeros([BLOCK_C, BLOCK_W], A)
    for k in tl.static_range(WINDOW_Z * WINDOW_Y * WINDOW_X):
        n, there = pixel_of(
            k, o_w, mask, i_b * N, windows, size_z, size_y, size_x, pooled_y, pooled_x, HAS_MASK, WINDOW_Z, WINDOW_Y, WINDOW_X
        )  # fmt: skip
        total += tl.load(p_x + n.to(tl.int64) * stride_n, inside & there, 0.0).to(A)
    count = tl.maximum(tl.load(number + i_b * windows + o_w, o_w < windows, 1), 1).to(A)
    tl.store(pooled + (i_b * C + o_c) * windows + o_w, total / count, inside)


@triton.jit(do_not_specialize=SIZES)
def average_large_kernel(
    x, mask, number, pooled,  # [B, C, N], [B, N], [B, windows], [B, C, windows]
    C, N: tl.int64, windows, blocks, size_z, size_y, size_x, pooled_y, pooled_x, stride_b, stride_c, stride_n,
    HAS_MASK: tl.constexpr, INDEX: tl.constexpr, WINDOW_Z: tl.constexpr, WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr,
    A: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    PIXELS: tl.constexpr = WINDOW_Z * WINDOW_Y * WINDOW_X
    plane = (tl.program_id(0) // blocks).to(tl.int64)
    i_b, i_c = plane // C, plane % C
    o_w = (tl.program_id(0) % blocks).to(INDEX) * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
    p_x = x + i_b * stride_b + i_c * stride_c
    total = tl.zeros([BLOCK_W, 1], tl.float64)
    for first in range(0, PIXELS, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)[None, :]
        n, there = pixel_of(
            k, o_w, mask, i_b * N, windows, size_z, size_y, size_x, pooled_y, pooled_x, HAS_MASK, WINDOW_Z, WINDOW_Y, WINDOW_X
        )  # fmt: skip
        b_x = tl.load(p_x + n.to(tl.int64) * stride_n, there, 0.0).to(A)
        total += tl.sum(b_x, 1, keep_dims=True).to(tl.float64)
    count = tl.maximum(tl.load(number + i_b * windows + o_w, o_w < windows, 1), 1).to(tl.float64)
    tl.store(pooled + plane * windows + o_w, (total / count).to(A), o_w < windows)


@triton.jit(do_not_specialize=SIZES)
def share_kernel(
    mask, number, upstream, gradient,  # [B, N], [B, windows], [B, C, windows], [B, C, N]
    C, N, windows, blocks, size_y, size_x, pooled_y, pooled_x,
    stride_ub, stride_uc, stride_un, stride_b, stride_c, stride_n,
    HAS_MASK: tl.constexpr, INDEX: tl.constexpr, WINDOW_Z: tl.constexpr, WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr,
    A: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_n = (tl.program_id(0) % blocks).to(INDEX) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    o_c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    inside = (o_c < C) & (o_n < N)
    window, _ = window_of(o_n, size_y, size_x, pooled_y, pooled_x, WINDOW_Z, WINDOW_Y, WINDOW_X)
    counts = o_n < N
    if HAS_MASK:
        counts = counts & (tl.load(mask + i_b * N + o_n, counts, 0) != 0)
    count = tl.maximum(tl.load(number + i_b * windows + window, counts, 1), 1).to(A)
    own = inside & counts
    v = tl.load(upstream + i_b * stride_ub + o_c * stride_uc + window.to(tl.int64) * stride_un, own, 0.0).to(A)
    p = gradient + i_b * stride_b + o_c * stride_c + o_n.to(tl.int64) * stride_n
    tl.store(p, (v / count).to(gradient.dtype.element_ty), inside)


@operator()
def average_pool(
    x: torch.Tensor,  # [B, C, *S]
    mask: torch.Tensor | None,  # [B, *S], boolean, contiguous
    window: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    B = x.shape[0]
    size, steps, pooled_size = sizes_of(x, window)
    shape = pooled_size[5 - x.dim() :]
    pooled = x.new_empty((B, x.shape[1], *shape), dtype=arithmetic(x, x))
    number = x.new_empty((B, *shape), dtype=torch.int32)
    if number.numel() > 0:
        windows = math.prod(pooled_size)
        pixels = min(triton.next_power_of_2(math.prod(steps)), 256)
        columns = min(triton.next_power_of_2(windows), 1024 // pixels)
        blocks = -(-windows // columns)
        number_kernel[(B * blocks,)](
            mask, number, math.prod(size), windows, blocks, *size, *pooled_size[1:],
            HAS_MASK=mask is not None, BLOCK_W=columns, BLOCK_K=pixels, **settings_of(size, steps),
        )  # fmt: skip
    if x.numel() > 0:
        over_windows(average_kernel, average_large_kernel, x, mask, [number, pooled], window)
    return pooled, number


@operator()
def average_pool_backward(
    x: torch.Tensor,  # [B, C, *S]
    mask: torch.Tensor | None,  # [B, *S], boolean, contiguous
    number: torch.Tensor,  # [B, *P], int32, contiguous
    upstream: torch.Tensor,  # [B, C, *P], in the type of the arithmetic
    window: list[int],
) -> torch.Tensor:
    settings = {"HAS_MASK": mask is not None, "A": A_OF.get(x.dtype, tl.float32)}
    return over_pixels(share_kernel, [mask, number], upstream, x, window, **settings)
