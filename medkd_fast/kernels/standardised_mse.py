"""Triton kernels of standardised_mse: sums over all pixels, the terms that they give, and the gradient in one more pass.

Derivation: medkd_fast/reference/standardised_mse.py. A tile is [channels, pixels] of one image: few channels where a channel's pixels
lie side by side, few pixels where channels do. A program adds up a few tiles in fp64, where products are exact, and leaves five
sums of every channel in its slot.
"""

import torch
import triton
import triton.language as tl

from medkd_fast.kernels.common import operator
from medkd_fast.kernels.planes import gradient_like, planes_of
from medkd_fast.reference.common import arithmetic

#: Programs that are enough to fill a GPU; and the most tiles of a program, lest the sums blur a constant channel.
PROGRAMS, MOST_TILES = 4096, 32


@triton.jit
def load_features(x, mask, i_b, o_c, o_n, C, N, stride_b, stride_c, stride_n, A: tl.constexpr, HAS_MASK: tl.constexpr):
    """Channels o_c by pixels o_n in fp64, 0 at those that do not count."""
    there = (o_c < C) & (o_n < N)
    # half precision by way of fp32
    features = tl.load(x + i_b * stride_b + o_c * stride_c + o_n * stride_n, there, 0.0).to(A).to(tl.float64)
    if HAS_MASK:  # selected afterwards, so that the load stays a wide one
        there = there & (tl.load(mask + i_b * N + o_n, o_n < N, 0) != 0)
        features = tl.where(there, features, 0.0)
    return features, there


@triton.jit
def load_coefficients(coefficients, o_c, C, BLOCK_C: tl.constexpr):
    """Of channels o_c, or, where there is one channel, of that: as numbers, which all threads have from one load."""
    if BLOCK_C == 1:
        x = tl.load(coefficients + tl.program_id(1))
    else:
        x = tl.load(coefficients + o_c, o_c < C, 0.0)
    return x


@triton.jit(do_not_specialize=["tiles_of_image", "tiles", "tiles_of_program"])
def slots_kernel(
    student, teacher, mask, slots,  # [5C, slots], double
    C, N, tiles_of_image, tiles, tiles_of_program,
    stride_sb, stride_sc, stride_sn, stride_tb, stride_tc, stride_tn,
    A: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_slot = tl.program_id(0)
    o_c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[:, None].to(tl.int64)
    sum_s = tl.full([BLOCK_C, BLOCK_N], 0.0, tl.float64)
    sum_t, sum_ss, sum_tt, sum_st = sum_s, sum_s, sum_s, sum_s
    for i_tile in range(i_slot * tiles_of_program, tl.minimum((i_slot + 1) * tiles_of_program, tiles)):
        i_b = (i_tile // tiles_of_image).to(tl.int64)
        o_n = (i_tile % tiles_of_image).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        s, _ = load_features(student, mask, i_b, o_c, o_n, C, N, stride_sb, stride_sc, stride_sn, A, HAS_MASK)
        t, _ = load_features(teacher, mask, i_b, o_c, o_n, C, N, stride_tb, stride_tc, stride_tn, A, HAS_MASK)
        sum_s += s
        sum_t += t
        sum_ss += s * s
        sum_tt += t * t
        sum_st += s * t
    slots_all = tl.num_programs(0).to(tl.int64)
    o_c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    p = slots + o_c * slots_all + i_slot
    step = C * slots_all
    tl.store(p, tl.sum(sum_s, 1), o_c < C)
    tl.store(p + step, tl.sum(sum_t, 1), o_c < C)
    tl.store(p + 2 * step, tl.sum(sum_ss, 1), o_c < C)
    tl.store(p + 3 * step, tl.sum(sum_tt, 1), o_c < C)
    tl.store(p + 4 * step, tl.sum(sum_st, 1), o_c < C)


@triton.jit(do_not_specialize=["count", "all_pixels"])
def add_slots_kernel(slots, pixels, sums, count, all_pixels, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    i_sum = tl.program_id(0).to(tl.int64)
    total = tl.full([BLOCK], 0.0, tl.float64)
    for k in range(0, count, BLOCK):
        o_k = k + tl.arange(0, BLOCK)
        total += tl.load(slots + i_sum * count + o_k, o_k < count, 0.0)
    tl.store(sums + 1 + i_sum, tl.sum(total))
    if i_sum == 0:
        if HAS_MASK:
            tl.store(sums, tl.load(pixels).to(tl.float64))
        else:
            tl.store(sums, tl.full((), all_pixels, tl.float64))


@triton.jit
def around_mean(square, total, number):
    """What a sum of squares leaves around the mean, and whether that is rounding. What is no number stays so."""
    around = square - total * total / number
    constant = around <= 1e-14 * square
    return tl.where(constant, 0.0, around), constant


@triton.jit
def terms_kernel(sums, loss, coefficients, C, BLOCK: tl.constexpr):
    number = tl.maximum(tl.load(sums), 1.0)
    degrees = tl.maximum(number - 1.0, 1.0)
    share = 1.0 / (number * C)
    value = tl.full([BLOCK], 0.0, tl.float64)
    for c in range(0, C, BLOCK):
        o_c = c + tl.arange(0, BLOCK)
        m_c = o_c < C
        p = sums + 1 + o_c
        sum_s, sum_t = tl.load(p, m_c, 0.0), tl.load(p + C, m_c, 0.0)
        around_s, constant_s = around_mean(tl.load(p + 2 * C, m_c, 0.0), sum_s, number)
        around_t, constant_t = around_mean(tl.load(p + 3 * C, m_c, 0.0), sum_t, number)
        root_s = tl.sqrt(around_s / degrees)
        a, b = root_s + 1e-6, tl.sqrt(around_t / degrees) + 1e-6
        together = tl.where(constant_s | constant_t, 0.0, tl.load(p + 4 * C, m_c, 0.0) - sum_s * sum_t / number)
        value += around_s / (a * a) + around_t / (b * b) - 2 * together / (a * b)
        through_a = (around_s / a - together / b) / (a * a * degrees * tl.where(constant_s, 1.0, root_s))
        p = coefficients + o_c
        tl.store(p, tl.where(constant_s, 0.0, share * (2 * (1.0 / (a * a) - through_a))), m_c)
        tl.store(p + C, tl.where(constant_t, 0.0, share * (-2.0 / (a * b))), m_c)
        tl.store(p + 2 * C, sum_s / number, m_c)
        tl.store(p + 3 * C, sum_t / number, m_c)
    tl.store(loss, (share * tl.sum(value)).to(loss.dtype.element_ty))


@triton.jit
def gradient_kernel(
    student, teacher, mask, coefficients, upstream, gradient,
    C, N, tiles_of_image,
    stride_sb, stride_sc, stride_sn, stride_tb, stride_tc, stride_tn, stride_gb, stride_gc, stride_gn,
    A: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // tiles_of_image).to(tl.int64)
    o_n = (tl.program_id(0) % tiles_of_image).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    o_c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[:, None].to(tl.int64)
    of_s = load_coefficients(coefficients, o_c, C, BLOCK_C)
    of_t = load_coefficients(coefficients + C, o_c, C, BLOCK_C)
    mean_s = load_coefficients(coefficients + 2 * C, o_c, C, BLOCK_C)
    mean_t = load_coefficients(coefficients + 3 * C, o_c, C, BLOCK_C)
    factor = tl.load(upstream).to(tl.float64)
    # exactly 0 for equal networks
    of_both = of_s + of_t
    constant = -factor * (of_t * (mean_t - mean_s) + of_both * mean_s)
    of_both, of_t = factor * of_both, factor * of_t
    s, there = load_features(student, mask, i_b, o_c, o_n, C, N, stride_sb, stride_sc, stride_sn, A, HAS_MASK)
    t, _ = load_features(teacher, mask, i_b, o_c, o_n, C, N, stride_tb, stride_tc, stride_tn, A, HAS_MASK)
    v_s = tl.where(there, of_t * (t - s) + (of_both * s + constant), 0.0)
    p_g = gradient + i_b * stride_gb + o_c * stride_gc + o_n * stride_gn
    tl.store(p_g, v_s.to(A).to(gradient.dtype.element_ty), (o_c < C) & (o_n < N))


def blocks_of(channels: int, pixels: int, planes: bool) -> dict[str, int]:
    """Channels and pixels of a tile: a thread keeps five sums in fp64 of everything that is its own."""
    size = 1024
    if planes:
        rows = min(size // min(triton.next_power_of_2(pixels), size), triton.next_power_of_2(channels))
    else:
        rows = min(triton.next_power_of_2(channels), 64)
    return {"BLOCK_C": rows, "BLOCK_N": size // rows}


@operator()
def standardised_mse(
    student: torch.Tensor,  # [B, C, *S]
    teacher: torch.Tensor,  # [B, C, *S]
    mask: torch.Tensor | None,  # [B, *S], boolean, contiguous
) -> torch.Tensor:
    B, C = student.shape[:2]
    N = student.shape[2:].numel()
    sums = student.new_empty(1 + 5 * C, dtype=torch.float64)
    if B * N == 0:
        return sums.zero_()
    (s, strides_s), (t, strides_t) = planes_of(student), planes_of(teacher)
    blocks = blocks_of(C, N, strides_s[2] == 1)
    tiles_of_image, groups = -(-N // blocks["BLOCK_N"]), -(-C // blocks["BLOCK_C"])
    tiles = B * tiles_of_image
    tiles_of_program = min(-(-tiles * groups // PROGRAMS), MOST_TILES)
    count = -(-tiles // tiles_of_program)
    slots = student.new_empty((5 * C, count), dtype=torch.float64)
    pixels = None if mask is None else mask.sum()
    double = arithmetic(student, teacher) == torch.float64
    slots_kernel[(count, groups)](
        s, t, mask, slots, C, N, tiles_of_image, tiles, tiles_of_program, *strides_s, *strides_t,
        A=tl.float64 if double else tl.float32, HAS_MASK=mask is not None, **blocks,
    )  # fmt: skip
    add_slots_kernel[(5 * C,)](slots, pixels, sums, count, B * N, HAS_MASK=mask is not None, BLOCK=1024)
    return sums


@operator()
def standardised_mse_terms(sums: torch.Tensor, single: bool) -> tuple[torch.Tensor, torch.Tensor]:
    C = (sums.shape[0] - 1) // 5
    loss = sums.new_empty((), dtype=torch.float32 if single else torch.float64)
    coefficients = sums.new_empty(4 * C)
    terms_kernel[(1,)](sums, loss, coefficients, C, BLOCK=min(triton.next_power_of_2(C), 256))
    return loss, coefficients


@operator()
def standardised_mse_backward(
    student: torch.Tensor,  # [B, C, *S]
    teacher: torch.Tensor,  # [B, C, *S]
    mask: torch.Tensor | None,  # [B, *S], boolean, contiguous
    coefficients: torch.Tensor,  # [4C], double, as standardised_mse_terms gives them
    upstream: torch.Tensor,  # []
) -> torch.Tensor:
    B, C = student.shape[:2]
    N = student.shape[2:].numel()
    gradient, written, strides_g = gradient_like(student)
    if B * N > 0:
        (s, strides_s), (t, strides_t) = planes_of(student), planes_of(teacher)
        blocks = blocks_of(C, N, strides_s[2] == 1)
        tiles_of_image = -(-N // blocks["BLOCK_N"])
        double = arithmetic(student, teacher) == torch.float64
        gradient_kernel[(B * tiles_of_image, -(-C // blocks["BLOCK_C"]))](
            s, t, mask, coefficients, upstream, written, C, N, tiles_of_image, *strides_s, *strides_t, *strides_g,
            A=tl.float64 if double else tl.float32, HAS_MASK=mask is not None, **blocks,
        )  # fmt: skip
    if written is not gradient:
        gradient.copy_(written)
    return gradient
