"""pixel_relation with divergence "mse", by products of C×C: with S and T the normalised features, A = S − T and B = S + T,
the products AAᵀ, BBᵀ and BAᵀ summed over the pixels, and then a small matrix times [A; B]. Derivation:
medkd_fast/reference/pixel_relation.py.

Forward: a program multiplies a slot of pixels in fp32, the slots are added in double in their order, and what is made of
the sums is made in double. Within a slot a tl.dot of 32 pixels starts from zero and at most 64 of them are added up, each
addition correctly rounded, so the slots' errors are those of short sums and have either sign. Up to 64 channels everything
about a pixel is in one program, which normalises what it loads: each tensor is read once a pass. Wider networks are bound
by their products and are normalised beforehand; pairs of blocks of channels then share the work out.

Half inputs are normalised in fp32 like all others, because A is a difference of normalised features.

"fp16x3" (pixel_rows.py) for A and B, whose rows are of norm 2 at most. The matrix comes into range by a power of 2 for each of
its rows.
"""

import torch
import triton
import triton.language as tl

from medkd_fast.kernels.common import AHEAD, operator, roomy, share_of
from medkd_fast.kernels.pixel_images import add_values, image_pixels, image_share, pixels_of
from medkd_fast.kernels.pixel_rows import UNIT, Rows, finish, multiply, normalise, precision_of, prepare
from medkd_fast.kernels.planes import gradient_like, planes_of
from medkd_fast.reference.common import arithmetic


@triton.jit
def multiply_by_matrix(x, matrix, factor, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """factor x matrixᵀ. A row of the matrix is of any size: a power of 2 brings its largest number between 2¹⁴ and 2¹⁵."""
    if PRECISION == "fp16x3":
        exponents = tl.max(tl.abs(matrix), 1).to(tl.int32, bitcast=True) & 0x7F800000
        exponents = tl.maximum(exponents, 15 << 23)
        up = ((134 << 23) - exponents + (134 << 23)).to(tl.float32, bitcast=True)
        down = (exponents - (14 << 23)).to(tl.float32, bitcast=True) * (factor / UNIT)
        return multiply(x, matrix * up[:, None], TYPE, PRECISION) * down[None, :]
    else:
        return multiply(x, matrix, TYPE, PRECISION) * factor


@triton.jit
def load_rows(
    x, stride_xc, stride_xp, o_c, o_p, m_p, C,
    TYPE: tl.constexpr, RELATION: tl.constexpr, FUSED: tl.constexpr, FULL: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Normalised features times SCALE, and inverse norms, at channels o_c by pixels o_p, one of them a column, or turned over."""
    m_x = m_p if FULL else (o_c < C) & m_p
    b_x = tl.load(x + o_c * stride_xc + o_p * stride_xp, m_x, 0.0).to(TYPE)
    AXIS: tl.constexpr = 0 if o_p.shape[0] == 1 else 1
    if FUSED:
        return normalise(b_x, m_x, C, RELATION, AXIS, SCALE)
    return b_x * SCALE, tl.zeros_like(tl.sum(b_x, AXIS))


@triton.jit
def load_difference_and_sum(
    student, teacher, stride_sc, stride_sp, stride_tc, stride_tp, o_c, o_p, m_p, C_s, C_t,
    TYPE: tl.constexpr, RELATION: tl.constexpr, FUSED: tl.constexpr, FULL: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """A and B, times SCALE."""
    b_s, _ = load_rows(student, stride_sc, stride_sp, o_c, o_p, m_p, C_s, TYPE, RELATION, FUSED, FULL, SCALE)
    b_t, _ = load_rows(teacher, stride_tc, stride_tp, o_c, o_p, m_p, C_t, TYPE, RELATION, FUSED, FULL, SCALE)
    return b_s - b_t, b_s + b_t


@triton.jit
def products_kernel(
    student,
    teacher,
    mask,  # [B, N]
    partial,  # [B, slots, 3, W, W]: AAᵀ, BBᵀ, BAᵀ
    C_s,
    C_t,
    W,  # the larger of them
    N,
    share,  # pixels of a slot
    slots,
    stride_sb,
    stride_sc,
    stride_sp,
    stride_tb,
    stride_tc,
    stride_tp,
    RELATION: tl.constexpr,
    HAS_MASK: tl.constexpr,
    FUSED: tl.constexpr,
    FULL: tl.constexpr,  # blocks of pixels and of channels are, and all pixels count
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_slot = tl.program_id(0).to(tl.int64)
    i_b = i_slot // slots
    first = (i_slot % slots) * share
    # program 0, 1, 2, ... of the second dimension: blocks of channels (0, 0), (0, 1), (1, 1), (0, 2), ...
    i_row = tl.program_id(1)
    i_col = 0
    while i_row > i_col:
        i_col += 1
        i_row -= i_col
    student += i_b * stride_sb
    teacher += i_b * stride_tb
    o_i = (i_row * BLOCK_C + tl.arange(0, BLOCK_C))[:, None].to(tl.int64)
    o_j = (i_col * BLOCK_C + tl.arange(0, BLOCK_C))[:, None].to(tl.int64)
    TYPE: tl.constexpr = partial.dtype.element_ty
    SCALE: tl.constexpr = UNIT if PRECISION == "fp16x3" else 1.0
    aa = tl.zeros([BLOCK_C, BLOCK_C], TYPE)
    bb = tl.zeros([BLOCK_C, BLOCK_C], TYPE)
    ba = tl.zeros([BLOCK_C, BLOCK_C], TYPE)
    ab = tl.zeros([BLOCK_C, BLOCK_C], TYPE)
    for p in range(first, tl.minimum(first + share, N), BLOCK_P):
        o_p = (p + tl.arange(0, BLOCK_P))[None, :]
        m_p = tl.full([1, BLOCK_P], True, tl.int1) if FULL else o_p < N
        if HAS_MASK:
            m_p = m_p & (tl.load(mask + i_b * N + o_p, m_p, 0) != 0)
        a_i, b_i = load_difference_and_sum(
            student, teacher, stride_sc, stride_sp, stride_tc, stride_tp, o_i, o_p, m_p,
            C_s, C_t, TYPE, RELATION, FUSED, FULL, SCALE,
        )  # [BLOCK_C, BLOCK_P]  # fmt: skip
        if FUSED:
            aa += multiply(a_i, a_i, TYPE, PRECISION)
            bb += multiply(b_i, b_i, TYPE, PRECISION)
            ba += multiply(b_i, a_i, TYPE, PRECISION)
        else:
            a_j, b_j = load_difference_and_sum(
                student, teacher, stride_sc, stride_sp, stride_tc, stride_tp, o_j, o_p, m_p,
                C_s, C_t, TYPE, RELATION, FUSED, FULL, SCALE,
            )  # fmt: skip
            aa += multiply(a_i, a_j, TYPE, PRECISION)
            bb += multiply(b_i, b_j, TYPE, PRECISION)
            ba += multiply(b_i, a_j, TYPE, PRECISION)
            ab += multiply(a_i, b_j, TYPE, PRECISION)
    aa *= 1 / (SCALE * SCALE)
    bb *= 1 / (SCALE * SCALE)
    ba *= 1 / (SCALE * SCALE)
    ab *= 1 / (SCALE * SCALE)
    partial += i_slot * 3 * W * W
    o_k = tl.trans(o_j)
    m_ij = (o_i < W) & (o_k < W)
    p_ij = o_i * W + o_k
    tl.store(partial + p_ij, aa, m_ij)
    tl.store(partial + W * W + p_ij, bb, m_ij)
    tl.store(partial + 2 * W * W + p_ij, ba, m_ij)
    if not FUSED:  # noqa: SIM102 (known when the kernel is compiled, and then not)
        if i_row != i_col:  # the other triangle
            p_ji = o_k * W + o_i
            tl.store(partial + p_ji, aa, m_ij)
            tl.store(partial + W * W + p_ji, bb, m_ij)
            tl.store(partial + 2 * W * W + p_ji, ab, m_ij)


@triton.jit
def add_slots_kernel(
    partial,  # [sets, slots, size]
    pixels,  # [slots], if the slots are images, of B
    sums,  # [sets, size], double
    slots,
    size,
    N,
    SHARES: tl.constexpr,  # the slots are images and have their shares in the loss
    HAS_MASK: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_set = tl.program_id(1).to(tl.int64)
    o_k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    if SHARES:
        for slot in range(slots):
            share = image_share(pixels, slot, slots, N, HAS_MASK, MEAN)
            total += share * tl.load(partial + (i_set * slots + slot) * size + o_k, o_k < size, 0.0)
    else:
        for slot in range(0, slots, BLOCK_SLOTS):
            o_slot = slot + tl.arange(0, BLOCK_SLOTS)
            p_k = partial + (i_set * slots + o_slot[:, None]) * size + o_k[None, :]
            m_k = (o_slot < slots)[:, None] & (o_k < size)[None, :]
            total += tl.sum(tl.load(p_k, m_k, 0.0).to(tl.float64), 0)
    tl.store(sums + i_set * size + o_k, total, o_k < size)


@triton.jit
def matrix_kernel(
    sums,  # [B, 3, W, W], double
    pixels,  # [B]
    values,  # [B, blocks of rows], double: shares in the sum of squared differences
    matrix,  # [B, C, 2 W]
    B,
    C,
    W,
    N,
    HAS_MASK: tl.constexpr,
    MEAN: tl.constexpr,
    ACROSS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    o_i = (tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I))[:, None]
    aa = sums + i_b * 3 * W * W
    bb = aa + W * W
    ba = bb + W * W
    scale = image_share(pixels, i_b, B, N, HAS_MASK, MEAN)
    if not ACROSS:
        scale = scale / tl.maximum(image_pixels(pixels, i_b, N, HAS_MASK), 1.0)
    value = tl.full((), 0.0, tl.float64)
    for j in range(0, W, BLOCK_J):
        o_j = (j + tl.arange(0, BLOCK_J))[None, :]
        m_ij = (o_i < W) & (o_j < W)
        b_aa = tl.load(aa + o_i * W + o_j, m_ij, 0.0)
        # BBᵀ turned over, as ABᵀ is: where a channel of S is 0, its products in both are the same but for the sign, sums
        # in one order, and the row of the matrix is 0 as it should. A pixel divided by 1e-12 would show a difference.
        b_bb = tl.load(bb + o_j * W + o_i, m_ij, 0.0)
        b_ba = tl.load(ba + o_i * W + o_j, m_ij, 0.0)
        b_ab = tl.load(ba + o_j * W + o_i, m_ij, 0.0)
        value += tl.sum(b_aa * b_bb + b_ba * b_ab)
        p_matrix = matrix + (i_b * C + o_i) * 2 * W + o_j
        m_matrix = m_ij & (o_i < C)
        tl.store(p_matrix, (scale * (b_ab + b_bb)).to(matrix.dtype.element_ty), m_matrix)
        tl.store(p_matrix + W, (scale * (b_aa + b_ba)).to(matrix.dtype.element_ty), m_matrix)
    if not ACROSS:
        tl.store(values + i_b * tl.num_programs(1) + tl.program_id(1), value / 2)


@triton.jit
def pairs_kernel(
    sums,  # [B, 3, W, W], double
    values,  # [B, B, blocks of rows], double
    B,
    W,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    i_pair = tl.program_id(0).to(tl.int64)
    size = W * W
    a = sums + (i_pair // B) * 3 * size
    b = sums + (i_pair % B) * 3 * size
    o_i = (tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I))[:, None]
    value = tl.full((), 0.0, tl.float64)
    for j in range(0, W, BLOCK_J):
        o_j = (j + tl.arange(0, BLOCK_J))[None, :]
        m_ij = (o_i < W) & (o_j < W)
        p_ij = o_i * W + o_j
        squares = tl.load(a + p_ij, m_ij, 0.0) * tl.load(b + size + p_ij, m_ij, 0.0)
        squares += tl.load(a + size + p_ij, m_ij, 0.0) * tl.load(b + p_ij, m_ij, 0.0)
        crossed = tl.load(a + 2 * size + o_j * W + o_i, m_ij, 0.0) * tl.load(b + 2 * size + p_ij, m_ij, 0.0)
        value += tl.sum(squares / 2 + crossed)
    tl.store(values + i_pair * tl.num_programs(1) + tl.program_id(1), value / 2)


@triton.jit
def mix_kernel(
    matrix,  # [B, size]
    upstream,  # [] or [B, B]
    pixels,  # [B]
    mixed,  # [B, size]: what an image's pixels are multiplied with, the sum over the images that it is related to
    B,
    size,
    N,
    stride_ua,
    stride_ub,
    HAS_MASK: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_a = tl.program_id(1).to(tl.int64)
    o_k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for i_b in range(B):
        there = tl.load(upstream + i_a * stride_ua + i_b * stride_ub).to(tl.float64)
        back = tl.load(upstream + i_b * stride_ua + i_a * stride_ub).to(tl.float64)
        total += (there + back) / 2 * tl.load(matrix + i_b * size + o_k, o_k < size, 0.0)
    total *= image_share(pixels, i_a, B, N, HAS_MASK, MEAN)
    tl.store(mixed + i_a * size + o_k, total.to(mixed.dtype.element_ty), o_k < size)


@triton.jit
def gradient_kernel(
    student,
    teacher,
    mask,  # [B, N]
    matrix,  # [B, C_s, 2 W]
    upstream,  # [] or [B]
    out,
    C_s,
    C_t,
    W,
    N,
    parts,  # of an image's pixels
    stride_sb,
    stride_sc,
    stride_sp,
    stride_tb,
    stride_tc,
    stride_tp,
    stride_ob,
    stride_oc,
    stride_op,
    stride_u,
    RELATION: tl.constexpr,
    HAS_MASK: tl.constexpr,
    FUSED: tl.constexpr,  # with normalisation, and then its derivative; else `out` is for the rows
    FULL: tl.constexpr,
    PART: tl.constexpr,  # pixels
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_b = (tl.program_id(0) // parts).to(tl.int64)
    first = (tl.program_id(0) % parts).to(tl.int64) * PART
    student += i_b * stride_sb
    teacher += i_b * stride_tb
    out += i_b * stride_ob
    matrix += i_b * C_s * 2 * W
    TYPE: tl.constexpr = matrix.dtype.element_ty
    SCALE: tl.constexpr = UNIT if PRECISION == "fp16x3" else 1.0
    factor = tl.load(upstream + i_b * stride_u)
    o_out = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :].to(tl.int64)
    o_row = tl.trans(o_out)
    if FUSED:
        m_matrix = (o_row < C_s) & (o_out < W)
        of_a = tl.load(matrix + o_row * 2 * W + o_out, m_matrix, 0.0)  # [BLOCK_C, BLOCK_C]
        of_b = tl.load(matrix + o_row * 2 * W + W + o_out, m_matrix, 0.0)
    for p in range(first, tl.minimum(first + PART, N), BLOCK_P):
        o_p = (p + tl.arange(0, BLOCK_P))[:, None]
        m_p = tl.full([BLOCK_P, 1], True, tl.int1) if FULL else o_p < N
        m_valid = m_p
        if HAS_MASK:
            m_valid = m_p & (tl.load(mask + i_b * N + o_p, m_p, 0) != 0)
        if FUSED:
            b_s, inverse = load_rows(
                student, stride_sc, stride_sp, o_out, o_p, m_valid, C_s, TYPE, RELATION, FUSED, FULL, SCALE
            )
            b_t, _ = load_rows(
                teacher, stride_tc, stride_tp, o_out, o_p, m_valid, C_t, TYPE, RELATION, FUSED, FULL, SCALE
            )
            b_g = multiply_by_matrix(b_s - b_t, of_a, factor, TYPE, PRECISION)  # [BLOCK_P, BLOCK_C]
            b_g += multiply_by_matrix(b_s + b_t, of_b, factor, TYPE, PRECISION)
            if RELATION != "gram":
                along = tl.where(inverse < 1e12, tl.sum(b_g * b_s, 1) / (SCALE * SCALE), 0.0)
                b_g -= b_s * along[:, None]
                if RELATION == "pearson":
                    mean = tl.sum(b_g, 1) / tl.full((1,), C_s, TYPE)
                    b_g -= mean[:, None]
            b_g = tl.where(m_valid, b_g * inverse[:, None], 0.0)
        else:
            b_g = tl.zeros([BLOCK_P, BLOCK_C], TYPE)
            for c in range(0, W, BLOCK_C):
                o_c = (c + tl.arange(0, BLOCK_C))[None, :].to(tl.int64)
                b_a, b_b = load_difference_and_sum(
                    student, teacher, stride_sc, stride_sp, stride_tc, stride_tp, o_c, o_p, m_valid,
                    C_s, C_t, TYPE, RELATION, FUSED, FULL, SCALE,
                )  # fmt: skip
                m_matrix = (o_row < C_s) & (o_c < W)
                p_matrix = matrix + o_row * 2 * W + o_c
                b_g += multiply_by_matrix(b_a, tl.load(p_matrix, m_matrix, 0.0), factor, TYPE, PRECISION)
                b_g += multiply_by_matrix(b_b, tl.load(p_matrix + W, m_matrix, 0.0), factor, TYPE, PRECISION)
        p_out = out + o_out * stride_oc + o_p * stride_op
        tl.store(p_out, b_g.to(out.dtype.element_ty), m_p if FULL else m_p & (o_out < C_s))


#: Channels that a program normalises by itself.
FUSED_CHANNELS = 64
ROWS = {"BLOCK_I": 8, "BLOCK_J": 64}


def block_of(channels: int) -> int:
    return min(max(triton.next_power_of_2(channels), 16), 64)


def blocks_are_full(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Of pixels, all of which count, and of channels."""
    C = student.shape[1]
    return mask is None and pixels_of(student) % 64 == 0 and block_of(C) == C == teacher.shape[1]


def ready(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, relation: str, type: torch.dtype
) -> tuple[bool, list[torch.Tensor], list[int], Rows | None]:
    """Whether the kernels normalise, what they read of student and teacher, its strides, and the student's rows if not.

    Doubles are normalised beforehand: Triton 3.6 multiplies none that it finds to depend on narrower numbers, as a mask.
    """
    if type == torch.float32 and max(student.shape[1], teacher.shape[1]) <= FUSED_CHANNELS:
        (s, strides_s), (t, strides_t) = planes_of(student), planes_of(teacher)
        return True, [s, t], [*strides_s, *strides_t], None
    rows_s, rows_t = (prepare(x, mask, relation, type, always_store=True) for x in (student, teacher))
    return False, [rows_s.x, rows_t.x], [*rows_s.strides, *rows_t.strides], rows_s


@operator()
def pixel_relation(
    student: torch.Tensor,  # [B, C, *S]
    teacher: torch.Tensor,  # [B, other C, *S]
    mask: torch.Tensor | None,  # [B, *S], boolean, contiguous
    relation: str,
    across_images: bool,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, C_s, C_t, N = student.shape[0], student.shape[1], teacher.shape[1], pixels_of(student)
    W, type = max(C_s, C_t), arithmetic(student, teacher)
    double = type == torch.float64
    fused, features, strides, _ = ready(student, teacher, mask, relation, type)
    full, precision = fused and blocks_are_full(student, teacher, mask), precision_of(type, relation)
    pixels = mask.flatten(1).sum(1) if mask is not None else None
    images = {"HAS_MASK": mask is not None, "MEAN": reduction == "mean"}

    BLOCK_C = block_of(W)
    tiles, size = triton.cdiv(W, BLOCK_C), 3 * W * W
    pairs = tiles * (tiles + 1) // 2
    most = 1024 if fused else 2048
    # so long that writing a slot's three products costs little beside reading its pixels
    share = share_of(N, B * pairs, min(max(8 * triton.next_power_of_2(W), 256), most), most)
    slots = triton.cdiv(N, share)
    partial = student.new_empty((B, slots, size), dtype=type)
    sums = student.new_empty((B, size), dtype=torch.float64)
    products_kernel[(B * slots, pairs)](
        *features,
        mask,
        partial,
        C_s,
        C_t,
        W,
        N,
        share,
        slots,
        *strides,
        RELATION=relation,
        HAS_MASK=fused and mask is not None,
        FUSED=fused,
        FULL=full,
        BLOCK_C=BLOCK_C,
        BLOCK_P=64 if full and precision == "fp16x3" and roomy(200) else 16 if double and not roomy() else 32,
        PRECISION=precision,
        num_stages=AHEAD if fused or (roomy() and not double) else 2,
        enable_fp_fusion=False,  # registers are short
    )
    adding = {"BLOCK_SLOTS": 16, "BLOCK": 128}
    add_slots_kernel[(triton.cdiv(size, 128), B)](
        partial, pixels, sums, slots, size, N, SHARES=False, **adding, **images
    )

    blocks = triton.cdiv(W, ROWS["BLOCK_I"])
    matrix = student.new_empty((B, C_s, 2 * W), dtype=type)
    each = reduction == "none"
    loss = student.new_empty((B,) * (1 + across_images) if each else (), dtype=type)
    values = student.new_empty((B * B if across_images and each else max(B, 1), blocks), dtype=torch.float64)
    matrix_kernel[(B, blocks)](sums, pixels, values, matrix, B, C_s, W, N, ACROSS=across_images, **ROWS, **images)
    weighed = across_images and not each
    if across_images and each:
        pairs_kernel[(B * B, blocks)](sums, values, B, W, **ROWS)
    elif weighed:
        # the value is quadratic in the sums: that of the images' weighted sum is the sum over all pairs
        total = sums.new_empty((1, size))
        add_slots_kernel[(triton.cdiv(size, 128), 1)](sums, pixels, total, B, size, N, SHARES=True, **adding, **images)
        pairs_kernel[(1, blocks)](total, values, 1, W, **ROWS)
    add_values(values, pixels, loss, B, N, "weighed" if weighed else "entries", across_images, **images)
    return loss, matrix


@operator()
def pixel_relation_backward(
    student: torch.Tensor,  # [B, C, *S]
    teacher: torch.Tensor,  # [B, other C, *S]
    mask: torch.Tensor | None,  # [B, *S], boolean, contiguous
    matrix: torch.Tensor,  # [B, C, 2 * the larger C], contiguous, in the type of the arithmetic
    upstream: torch.Tensor,  # [], [B] or [B, B], in the type of the arithmetic
    relation: str,
    across_images: bool,
    reduction: str,
) -> torch.Tensor:
    B, C_s, C_t, N = student.shape[0], student.shape[1], teacher.shape[1], pixels_of(student)
    W, double = max(C_s, C_t), matrix.dtype == torch.float64
    fused, features, strides, rows = ready(student, teacher, mask, relation, matrix.dtype)
    stride_u = upstream.stride(0) if upstream.dim() else 0
    if across_images:
        pixels = mask.flatten(1).sum(1) if mask is not None else None
        mixed, size = torch.empty_like(matrix), C_s * 2 * W
        mix_kernel[(triton.cdiv(size, 256), B)](
            matrix,
            upstream,
            pixels,
            mixed,
            B,
            size,
            N,
            stride_u,
            upstream.stride(1) if upstream.dim() else 0,
            HAS_MASK=mask is not None,
            MEAN=reduction == "mean",
            BLOCK=256,
        )
        matrix, upstream, stride_u = mixed, torch.ones((), dtype=matrix.dtype, device=matrix.device), 0
    if fused:
        result, written, strides_out = gradient_like(student)
    else:
        written, strides_out = student.new_empty((B, N, C_s), dtype=matrix.dtype), (N * C_s, 1, C_s)
    BLOCK_C, PART = block_of(W), 512
    parts = triton.cdiv(N, PART)
    precision = precision_of(matrix.dtype, relation)
    if fused and precision == "tf32x3" and BLOCK_C == 64:  # with more two programs would not fit a multiprocessor
        stages = 1 if any(x.element_size() == 4 for x in features) else 2
    else:
        stages = AHEAD if fused and roomy(200) else 2
    gradient_kernel[(B * parts, triton.cdiv(C_s, BLOCK_C))](
        *features,
        mask,
        matrix,
        upstream,
        written,
        C_s,
        C_t,
        W,
        N,
        parts,
        *strides,
        *strides_out,
        stride_u,
        RELATION=relation,
        HAS_MASK=fused and mask is not None,
        FUSED=fused,
        FULL=fused and blocks_are_full(student, teacher, mask),
        PART=PART,
        BLOCK_C=BLOCK_C,
        BLOCK_P=(32 if double else 64) // (1 if roomy() else 2),
        PRECISION=precision,
        num_stages=stages,
    )
    if rows is not None:
        return finish(written, rows, mask, relation, student)
    return result if written is result else result.copy_(written)
