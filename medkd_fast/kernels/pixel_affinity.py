"""pixel_affinity: the matrix of relations between pixels, [B, N, N], a tile at a time. Rows: pixel_rows.py.

Forward: tiles on and above the diagonal, each written twice, the second time turned over: half of the products, and a
matrix that is symmetric to the last bit. Backward: programs own whole rows; what arrives for (i, j) and for (j, i) is added,
multiplied with the rows j, and taken through the normalisation. Both are bound by the matrix's memory.

Half inputs take the upstream gradient on tensor cores as fp32 in three products of tf32, in which they are exact.
"""

import torch
import triton
import triton.language as tl

from medkd_fast.kernels.common import AHEAD, operator
from medkd_fast.kernels.pixel_images import pixels_of
from medkd_fast.kernels.pixel_rows import finish, prepare
from medkd_fast.reference.common import arithmetic


@triton.jit
def affinity_kernel(
    x,  # [B, C, N]
    inverse,  # [B, padded]
    affinity,  # [B, N, N]
    C,
    N,
    padded,
    tiles,  # a row
    stride_xb,
    stride_xc,
    stride_xp,
    RAW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_row = (tl.program_id(0) // tiles % tiles).to(tl.int64)
    i_column = (tl.program_id(0) % tiles).to(tl.int64)
    if i_column < i_row:
        return
    i_b = (tl.program_id(0) // (tiles * tiles)).to(tl.int64)
    TYPE: tl.constexpr = affinity.dtype.element_ty
    o_i = (i_row * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    o_j = (i_column * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    x += i_b * stride_xb
    tile = tl.zeros([BLOCK_N, BLOCK_N], TYPE)
    for c in range(0, C, BLOCK_C):
        o_c = (c + tl.arange(0, BLOCK_C)).to(tl.int64)
        b_i = tl.load(x + o_i * stride_xp + o_c[None, :] * stride_xc, (o_i < N) & (o_c < C)[None, :], 0.0)
        b_j = tl.load(x + o_j * stride_xp + o_c[:, None] * stride_xc, (o_j < N) & (o_c < C)[:, None], 0.0)
        tile = tl.dot(b_i, b_j, tile, input_precision=PRECISION, out_dtype=TYPE)
    if RAW:
        tile = tile * tl.load(inverse + i_b * padded + o_i)
        tile = tile * tl.load(inverse + i_b * padded + o_j)
    affinity += i_b * N * N
    m_tile = (o_j >= o_i) & (o_j < N)
    tl.store(affinity + o_i * N + o_j, tile, m_tile)
    tl.store(affinity + tl.trans(o_j) * N + tl.trans(o_i), tl.trans(tile), tl.trans(m_tile))


@triton.jit
def gradient_kernel(
    x,  # [B, C, N]
    inverse,  # [B, padded]
    upstream,  # [B, N, N]
    gradient,  # for the rows, [B, N, C]
    C,
    N,
    padded,
    blocks,
    stride_xb,
    stride_xc,
    stride_xp,
    RAW: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_i = ((tl.program_id(0) % blocks).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I))[:, None]
    o_c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :].to(tl.int64)
    TYPE: tl.constexpr = upstream.dtype.element_ty
    x += i_b * stride_xb
    upstream += i_b * N * N
    b_g = tl.zeros([BLOCK_I, BLOCK_C], TYPE)
    for j in range(0, N, BLOCK_J):
        o_j = (j + tl.arange(0, BLOCK_J)).to(tl.int64)
        m_ij = (o_i < N) & (o_j < N)[None, :]
        there = tl.load(upstream + o_i * N + o_j[None, :], m_ij, 0.0)  # [BLOCK_I, BLOCK_J]
        back = tl.load(upstream + o_j[:, None] * N + tl.trans(o_i), tl.trans(m_ij), 0.0)  # [BLOCK_J, BLOCK_I]
        both = there + tl.trans(back)
        b_j = tl.load(x + o_j[:, None] * stride_xp + o_c * stride_xc, (o_j < N)[:, None] & (o_c < C), 0.0).to(TYPE)
        if RAW:
            both *= tl.load(inverse + i_b * padded + o_j)[None, :]
        b_g += tl.dot(both, b_j, input_precision=PRECISION, out_dtype=TYPE)
    tl.store(gradient + (i_b * N + o_i) * C + o_c, b_g, (o_i < N) & (o_c < C))


@operator()
def pixel_affinity(
    x: torch.Tensor,  # [B, C, *S]
    relation: str,
) -> torch.Tensor:
    B, C, N = x.shape[0], x.shape[1], pixels_of(x)
    type = arithmetic(x, x)
    double, rows = type == torch.float64, prepare(x, None, relation, type)
    affinity = x.new_empty((B, N, N), dtype=type)
    BLOCK_N = 64
    tiles = triton.cdiv(N, BLOCK_N)
    affinity_kernel[(B * tiles * tiles,)](
        rows.x,
        rows.inverse,
        affinity,
        C,
        N,
        rows.inverse.shape[1],
        tiles,
        *rows.strides,
        RAW=rows.raw,
        BLOCK_N=BLOCK_N,
        BLOCK_C=min(max(triton.next_power_of_2(C), 16), 32 if double else 64),
        PRECISION="ieee" if double else "tf32x3",
        num_stages=1 if double else 2,
    )
    return affinity


@operator()
def pixel_affinity_backward(
    x: torch.Tensor,  # [B, C, *S]
    upstream: torch.Tensor,  # [B, N, N], contiguous, in the type of the arithmetic
    relation: str,
) -> torch.Tensor:
    B, C, N = x.shape[0], x.shape[1], pixels_of(x)
    double, rows = upstream.dtype == torch.float64, prepare(x, None, relation, upstream.dtype)
    gradient = x.new_empty((B, N, C), dtype=upstream.dtype)
    BLOCK_C = min(max(triton.next_power_of_2(C), 16), 32 if double else 64)
    BLOCK_I, BLOCK_J = 64, 32
    blocks = triton.cdiv(N, BLOCK_I)
    gradient_kernel[(B * blocks, triton.cdiv(C, BLOCK_C))](
        rows.x,
        rows.inverse,
        upstream,
        gradient,
        C,
        N,
        rows.inverse.shape[1],
        blocks,
        *rows.strides,
        RAW=rows.raw,
        BLOCK_I=BLOCK_I,
        BLOCK_J=BLOCK_J,
        BLOCK_C=BLOCK_C,
        PRECISION="ieee" if double else "tf32x3",
        num_stages=1 if double else AHEAD,
    )
    return finish(gradient, rows, None, relation, x)
