"""Triton kernels of max_pool: the maxima with their places, and the gradient.

A tile is [channels, windows]; a program goes over the pixels of its windows, one of each at a time. Windows of many pixels, of
which there are few, have a kernel of their own: there a tile is [windows, pixels].
"""

import torch
import triton
import triton.language as tl

from medkd_fast.kernels.common import operator
from medkd_fast.kernels.windows import SIZES, over_pixels, over_windows, pixel_of, sizes_of, window_of


@triton.jit
def taken(x, value):
    """Whether x, which comes later, takes the place of value."""
    return (x > value) | (x != x)  # noqa: PLR0124


@triton.jit(do_not_specialize=SIZES)
def pool_kernel(
    x, mask, pooled, place,  # [B, C, N], [B, N], [B, C, windows], [B, C, windows]
    C, N: tl.int64, windows, blocks, size_z, size_y, size_x, pooled_y, pooled_x, stride_b, stride_c, stride_n,
    HAS_MASK: tl.constexpr, INDEX: tl.constexpr, WINDOW_Z: tl.constexpr, WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr,
    A: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_w = (tl.program_id(0) % blocks).to(INDEX) * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
    o_c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    p_x = x + i_b * stride_b + o_c * stride_c
    inside = (o_c < C) & (o_w < windows)
    value = tl.full([BLOCK_C, BLOCK_W], 0.0, A)
    at = tl.full([BLOCK_C, BLOCK_W], -1, tl.int32)
    for k in tl.static_range(WINDOW_Z * WINDOW_Y * WINDOW_X):
        n, there = pixel_of(
            k, o_w, mask, i_b * N, windows, size_z, size_y, size_x, pooled_y, pooled_x, HAS_MASK, WINDOW_Z, WINDOW_Y, WINDOW_X
        )  # fmt: skip
        b_x = tl.load(p_x + n.to(tl.int64) * stride_n, inside & there, 0.0).to(A)
        take = there & (taken(b_x, value) | (at < 0))
        value = tl.where(take, b_x, value)
        at = tl.where(take, k, at)
    p = (i_b * C + o_c) * windows + o_w
    tl.store(pooled + p, value.to(pooled.dtype.element_ty), inside)
    tl.store(place + p, at.to(tl.int16), inside)


@triton.jit(do_not_specialize=SIZES)
def pool_large_kernel(
    x, mask, pooled, place,  # [B, C, N], [B, N], [B, C, windows], [B, C, windows]
    C, N: tl.int64, windows, blocks, size_z, size_y, size_x, pooled_y, pooled_x, stride_b, stride_c, stride_n,
    HAS_MASK: tl.constexpr, INDEX: tl.constexpr, WINDOW_Z: tl.constexpr, WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr,
    A: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    PIXELS: tl.constexpr = WINDOW_Z * WINDOW_Y * WINDOW_X
    plane = (tl.program_id(0) // blocks).to(tl.int64)
    i_b, i_c = plane // C, plane % C
    o_w = (tl.program_id(0) % blocks).to(INDEX) * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
    p_x = x + i_b * stride_b + i_c * stride_c
    value = tl.full([BLOCK_W, 1], 0.0, A)
    at = tl.full([BLOCK_W, 1], -1, tl.int32)
    for first in range(0, PIXELS, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)[None, :]
        n, there = pixel_of(
            k, o_w, mask, i_b * N, windows, size_z, size_y, size_x, pooled_y, pooled_x, HAS_MASK, WINDOW_Z, WINDOW_Y, WINDOW_X
        )  # fmt: skip
        b_x = tl.load(p_x + n.to(tl.int64) * stride_n, there, 0.0).to(A)
        # the last that is no number, or else the first of the largest
        ordinary = b_x == b_x  # noqa: PLR0124
        no_number = tl.max(tl.where(there & (ordinary == 0), k, -1), 1, keep_dims=True)
        ordinary = there & ordinary
        most = tl.max(tl.where(ordinary, b_x, -float("inf")), 1, keep_dims=True)
        of_most = tl.min(tl.where(ordinary & (b_x == most), k, PIXELS), 1, keep_dims=True)
        number = tl.where(no_number >= 0, no_number, of_most)
        most = tl.where(no_number >= 0, float("nan"), most)
        take = (number < PIXELS) & (taken(most, value) | (at < 0))
        value = tl.where(take, most, value)
        at = tl.where(take, number, at)
    p = plane * windows + o_w
    tl.store(pooled + p, value.to(pooled.dtype.element_ty), o_w < windows)
    tl.store(place + p, at.to(tl.int16), o_w < windows)


@triton.jit(do_not_specialize=SIZES)
def spread_kernel(
    place, upstream, gradient,  # [B, C, windows], [B, C, windows], [B, C, N]
    C, N, windows, blocks, size_y, size_x, pooled_y, pooled_x,
    stride_ub, stride_uc, stride_un, stride_b, stride_c, stride_n,
    INDEX: tl.constexpr, WINDOW_Z: tl.constexpr, WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_n = (tl.program_id(0) % blocks).to(INDEX) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    o_c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    inside = (o_c < C) & (o_n < N)
    window, k = window_of(o_n, size_y, size_x, pooled_y, pooled_x, WINDOW_Z, WINDOW_Y, WINDOW_X)
    own = tl.load(place + (i_b * C + o_c) * windows + window, inside, -1).to(INDEX) == k
    v = tl.load(upstream + i_b * stride_ub + o_c * stride_uc + window.to(tl.int64) * stride_un, inside & own, 0.0)
    tl.store(gradient + i_b * stride_b + o_c * stride_c + o_n.to(tl.int64) * stride_n, v, inside)


@operator()
def max_pool(
    x: torch.Tensor,  # [B, C, *S]
    mask: torch.Tensor | None,  # [B, *S], boolean, contiguous
    window: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    _, _, number = sizes_of(x, window)
    pooled = x.new_empty((*x.shape[:2], *number[5 - x.dim() :]))
    place = torch.empty_like(pooled, dtype=torch.int16)
    if x.numel() > 0:
        over_windows(pool_kernel, pool_large_kernel, x, mask, [pooled, place], window)
    return pooled, place


@operator()
def max_pool_backward(
    x: torch.Tensor,  # [B, C, *S]
    place: torch.Tensor,  # [B, C, *P], contiguous
    upstream: torch.Tensor,  # [B, C, *P], in x's type
    window: list[int],
) -> torch.Tensor:
    return over_pixels(spread_kernel, [place], upstream, x, window)
