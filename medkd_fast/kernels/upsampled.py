"""class_kl and decoupled_kl with a student of lower resolution: linear interpolation and its adjoint inside the pass.

Between two neighbouring low-resolution pixels along an axis lies a cell, with the full-resolution pixels that take their value
from these two; one more cell lies before the first pixel and one after the last. A lane owns a cell of the product of the axes:
it reads the cell's corners, walks through its full-resolution pixels, interpolates the student's logits at each, and sums the
gradient for the corners. So every pixel is computed once, nothing of the full size is written, and no sum needs an atomic.

A low-resolution pixel gets a corner's sum from each cell around it. Those of two cells along the last axis are in neighbouring
lanes of a program (tiles of lanes overlap by one); those along the other axes go to memory as 2 or 4 parts, which the second stage
adds up in a fixed order.

Pixel i of N lies at ((i + 1/2) n / N − 1/2) among n low-resolution ones (align_corners=False): in cell j, at the distance
((2i + 1) n − N − 2 N j) / 2N from its first corner, in integers but for the division.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from medkd_fast.kernels.common import INTERPRETED
from medkd_fast.kernels.pixel_frame import Call, power_of_2, store_sums, tile_of_pixels


@triton.jit
def first_pixel(cell, full, low):
    """The first full-resolution pixel of a cell."""
    twice = tl.maximum((2 * cell + 1) * full - low, 0)
    return tl.minimum((twice + 2 * low - 1) // (2 * low), full)


@triton.jit
def places(cell, first, full, low, A: tl.constexpr):
    """Where between the corners of its cell the first pixel lies, 0 at one and 1 at the other, and the step to the next.

    The outermost cells have one corner alone.
    """
    place = ((2 * first + 1) * low - full - 2 * full * cell).to(A) / tl.full((), 2 * full, A)
    alone = (cell < 0) | (cell == low - 1)
    place = tl.where(alone, tl.where(cell < 0, 1.0, 0.0), place)
    return place, tl.where(alone, 0.0, tl.full((), low, A) / tl.full((), full, A))


@triton.jit
def between(a, b, weight, K: tl.constexpr):
    x = ()
    for k in tl.static_range(K):
        x += (a[k] + weight * (b[k] - a[k]),)
    return x


@triton.jit
def add_weighted(sums, weight, x, K: tl.constexpr):
    total = ()
    for k in tl.static_range(K):
        total += (sums[k] + weight * x[k],)
    return total


@triton.jit
def add_face(sums, weight, x, Y: tl.constexpr, K: tl.constexpr):
    """The same for a face's corners, [y][x]."""
    first = add_weighted(sums[0][0], weight, x[0][0], K), add_weighted(sums[0][1], weight, x[0][1], K)
    second = sums[1]
    if Y:
        second = add_weighted(sums[1][0], weight, x[1][0], K), add_weighted(sums[1][1], weight, x[1][1], K)
    return first, second


@triton.jit
def corner(p_s, pixel, stride_sc, stride_sn, mask, classes, A: tl.constexpr, K: tl.constexpr, R: tl.constexpr):
    """The student's logits at a low-resolution pixel. An absent class is one that no logit reaches: 0 · −inf is no number."""
    x = ()
    rows = tl.arange(0, R)[:, None]
    for k in tl.static_range(K):
        channel = (rows + k * R).to(tl.int64)
        m = mask if R == 1 else mask & (channel < classes)
        b = tl.load(p_s + channel * stride_sc + pixel.to(tl.int64) * stride_sn, mask=m, other=-float("inf")).to(A)
        x += (tl.where(b < -1e30, -1e30, b),)
    return x


@triton.jit
def along_line(
    p_s, x, y_a, y_b, z_a, z_b, at_y, at_z, low_y, low_x, stride_sc, stride_sn, mask, classes,
    A: tl.constexpr, Z: tl.constexpr, Y: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The student's logits on a full-resolution line where it passes the low-resolution pixels at x."""
    s = corner(p_s, (z_a * low_y + y_a) * low_x + x, stride_sc, stride_sn, mask, classes, A, K, R)
    if Y:
        s_y = corner(p_s, (z_a * low_y + y_b) * low_x + x, stride_sc, stride_sn, mask, classes, A, K, R)
        s = between(s, s_y, at_y, K)
    if Z:
        s_z = corner(p_s, (z_b * low_y + y_a) * low_x + x, stride_sc, stride_sn, mask, classes, A, K, R)
        if Y:
            s_y = corner(p_s, (z_b * low_y + y_b) * low_x + x, stride_sc, stride_sn, mask, classes, A, K, R)
            s_z = between(s_z, s_y, at_y, K)
        s = between(s, s_z, at_z, K)
    return s


#: A size more or less is not worth a compilation of seconds; those of axes that may be 1 are.
SIZES = ("full_y", "full_x", "low_y", "low_x", "pixels", "low_pixels", "most_y", "most_x", "images")


@triton.jit(do_not_specialize=[*SIZES, "tiles_of_image", "tiles", "tiles_of_program"])
def upsampled_kernel(
    student, teacher, target, weight, parts, loss, target_term, nontarget_term, sums,
    stride_sb, stride_sc, stride_sn, stride_tb, stride_tc, stride_tn,
    full_z, full_y, full_x, low_z, low_y, low_x, pixels: tl.int64, low_pixels: tl.int64,
    most_z, most_y, most_x, images, classes, tiles_of_image, tiles, tiles_of_program,
    target_weight: tl.float64, nontarget_weight: tl.float64, temperature: tl.float64, to_base_2: tl.float64,
    ignore_index: tl.int64,
    A: tl.constexpr, DECOUPLED: tl.constexpr, HAS_TARGET: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    WANT_GRADIENT: tl.constexpr, PER_PIXEL: tl.constexpr, Z: tl.constexpr, Y: tl.constexpr,
    INDEX: tl.constexpr, K: tl.constexpr, R: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Z and Y: 1 where that axis is interpolated, else 0. most_x: full-resolution pixels of a cell along x, at most."""
    target_weight, nontarget_weight = tl.full((), target_weight, A), tl.full((), nontarget_weight, A)
    temperature, to_base_2 = tl.full((), temperature, A), tl.full((), to_base_2, A)
    rows = tl.arange(0, R)[:, None]
    lane = tl.arange(0, M)[None, :]
    before = tl.broadcast_to(tl.maximum(lane - 1, 0), (R, M))
    sum_target, sum_nontarget, sum_weight = (tl.full((), 0.0, tl.float64),) * 3
    cells_x, cells_y, cells_z = low_x + 1, low_y + Y, low_z + Z
    i_slot = tl.program_id(0)
    for i_tile in range(i_slot * tiles_of_program, min((i_slot + 1) * tiles_of_program, tiles)):
        i_b = (i_tile // tiles_of_image).to(tl.int64)
        cell = (i_tile % tiles_of_image).to(INDEX) * (M - 1) + lane
        m_cell = cell < cells_z * cells_y * cells_x
        # the first lane repeats the last one of the tile before
        m_own = m_cell & ((lane > 0) | (cell == 0))
        x, y, z = cell % cells_x - 1, cell // cells_x % cells_y - Y, cell // cells_x // cells_y - Z
        p_s, p_t = student + i_b * stride_sb, teacher + i_b * stride_tb
        first_x, end_x = first_pixel(x, full_x, low_x), first_pixel(x + 1, full_x, low_x)
        first_y, end_y = first_pixel(y, full_y, low_y), first_pixel(y + 1, full_y, low_y)
        first_z, end_z = first_pixel(z, full_z, low_z), first_pixel(z + 1, full_z, low_z)
        x_a, x_b = tl.maximum(x, 0), tl.minimum(x + 1, low_x - 1)
        y_a, y_b = tl.maximum(y, 0), tl.minimum(y + 1, low_y - 1)
        z_a, z_b = tl.maximum(z, 0), tl.minimum(z + 1, low_z - 1)

        place_x, step_x = places(x, first_x, full_x, low_x, A)
        place_y, step_y = places(y, first_y, full_y, low_y, A)
        place_z, step_z = places(z, first_z, full_z, low_z, A)

        nothing = ()
        for _ in tl.static_range(K):
            nothing += (tl.zeros((R, M), A),)
        v = ((nothing, nothing), (nothing, nothing)), ((nothing, nothing), (nothing, nothing))  # [z][y][x][class]
        cell_target, cell_nontarget, cell_weight = (tl.zeros((1, M), tl.float64),) * 3
        for i_z in range(most_z):
            at_z = place_z + i_z * step_z
            v_z = (nothing, nothing), (nothing, nothing)
            for i_y in range(most_y):
                at_y = place_y + i_y * step_y
                # the corners are loaded for every line anew: there are no registers to keep them in
                s_a = along_line(p_s, x_a, y_a, y_b, z_a, z_b, at_y, at_z, low_y, low_x, stride_sc, stride_sn, m_cell, classes,
                                 A, Z, Y, K, R)  # fmt: skip
                s_b = along_line(p_s, x_b, y_a, y_b, z_a, z_b, at_y, at_z, low_y, low_x, stride_sc, stride_sn, m_cell, classes,
                                 A, Z, Y, K, R)  # fmt: skip
                line = ((first_z + i_z) * full_y + first_y + i_y) * full_x + first_x
                m_line = m_cell & (first_z + i_z < end_z) & (first_y + i_y < end_y)
                v_a, v_b = nothing, nothing
                for i_x in range(most_x):
                    at_x = place_x + i_x * step_x
                    m_n = m_line & (first_x + i_x < end_x)
                    s, t = (), ()
                    for k in tl.static_range(K):
                        b = s_a[k] + at_x * (s_b[k] - s_a[k])
                        s += (tl.where(b < -1e20, -float("inf"), b),)
                        channel = (rows + k * R).to(tl.int64)
                        m = m_n if R == 1 else m_n & (channel < classes)
                        p = p_t + channel * stride_tc + (line + i_x).to(tl.int64) * stride_tn
                        t += (tl.load(p, mask=m, other=-float("inf")).to(A),)
                    target_part, nontarget_part, w, v_x = tile_of_pixels(
                        s, t, target, weight, loss, target_term, nontarget_term, i_b * pixels + line + i_x, m_n, m_n & m_own,
                        classes, target_weight, nontarget_weight, temperature, to_base_2, ignore_index,
                        A, DECOUPLED, HAS_TARGET, HAS_WEIGHT, WANT_GRADIENT, PER_PIXEL, K, R,
                    )  # fmt: skip
                    cell_target += target_part.to(tl.float64)
                    cell_nontarget += nontarget_part.to(tl.float64)
                    cell_weight += w.to(tl.float64)
                    if WANT_GRADIENT:
                        v_a, v_b = add_weighted(v_a, 1.0 - at_x, v_x, K), add_weighted(v_b, at_x, v_x, K)
                if WANT_GRADIENT:
                    if Y:
                        first = add_weighted(v_z[0][0], 1.0 - at_y, v_a, K), add_weighted(v_z[0][1], 1.0 - at_y, v_b, K)
                        v_z = first, (add_weighted(v_z[1][0], at_y, v_a, K), add_weighted(v_z[1][1], at_y, v_b, K))
                    else:
                        v_z = (v_a, v_b), v_z[1]
            if WANT_GRADIENT:
                if Z:
                    v = add_face(v[0], 1.0 - at_z, v_z, Y, K), add_face(v[1], at_z, v_z, Y, K)
                else:
                    v = v_z, v[1]

        if not PER_PIXEL:
            sum_target += tl.sum(tl.where(m_own, cell_target, 0.0))
            sum_nontarget += tl.sum(tl.where(m_own, cell_nontarget, 0.0))
            sum_weight += tl.sum(tl.where(m_own, cell_weight, 0.0))
        if WANT_GRADIENT:
            for c_z in tl.static_range(1 + Z):
                for c_y in tl.static_range(1 + Y):
                    to_z, to_y = z + c_z, y + c_y
                    m_to = m_cell & (lane > 0) & (x >= 0)
                    m_to = m_to & (to_z >= 0) & (to_z < low_z) & (to_y >= 0) & (to_y < low_y)
                    part = (c_z * (1 + Y) + c_y) * images + i_b
                    p_v = parts + part * classes * low_pixels + (to_z * low_y + to_y) * low_x + x
                    for k in tl.static_range(K):
                        channel = (rows + k * R).to(tl.int64)
                        m = m_to if R == 1 else m_to & (channel < classes)
                        of_cell_before = tl.gather(v[c_z][c_y][1][k], before, 1)
                        tl.store(p_v + channel * low_pixels, v[c_z][c_y][0][k] + of_cell_before, mask=m)
    if not PER_PIXEL:
        store_sums(sums, sum_target, sum_nontarget, sum_weight)


@triton.jit
def add_parts_kernel(
    parts, gradient, stride_gb, stride_gc, stride_gn, classes, low_pixels: tl.int64, numbers: tl.int64,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient [B, C, pixels] from the parts [PARTS, B, C, pixels]."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < numbers
    total = tl.load(parts + o, mask=m)
    for i in tl.static_range(1, PARTS):
        total += tl.load(parts + i * numbers + o, mask=m)
    pixel, channel, image = o % low_pixels, o // low_pixels % classes, o // low_pixels // classes
    tl.store(gradient + image * stride_gb + channel * stride_gc + pixel * stride_gn, total, mask=m)


def tile_of_cells(classes: int, axes: int, double: bool) -> tuple[int, int, int]:
    """K, R and M of divergence.py, one warp a program. A lane holds 2 to 8 sums and the two logits of each of its K classes."""
    most = (16 if axes == 1 else 12 if axes == 2 else 8) // (2 if double else 1)
    lanes = 32
    if INTERPRETED:  # an instruction costs the same for any number of lanes
        most, lanes = 2, 4096
    rows = power_of_2(-(-classes // most))
    return -(-classes // rows), rows, max(lanes // rows, 8)


def upsampled(call: Call, low: tuple[int, ...], full: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Runs a loss on a student of size `low` and a teacher of size `full`; what decoupled_kl returns."""
    low, full = (*(1,) * (3 - len(low)), *low), (*(1,) * (3 - len(full)), *full)
    z, y = (int(n != m) for n, m in zip(low[:2], full[:2], strict=True))
    K, R, M = tile_of_cells(call.classes, 1 + z + y, call.double)
    cells = (low[0] + z) * (low[1] + y) * (low[2] + 1)
    tiles_of_image = -(-(cells - 1) // (M - 1))
    tiles = call.images * tiles_of_image
    slots, tiles_of_program, sums = call.slots(tiles)
    low_pixels = low[0] * low[1] * low[2]
    # what kernels compute with on the way to an offset
    largest = max(call.pixels, cells + M, *(4 * (n + 1) * (m + 1) for n, m in zip(full, low, strict=True)))
    numbers, count = call.images * call.classes * low_pixels, (1 + z) * (1 + y)
    parts = call.student.new_empty(count * numbers if call.settings.need_gradient else 0, dtype=call.outputs[3].dtype)
    upsampled_kernel[(slots,)](
        call.student, call.teacher, *call.inputs, parts, *call.values, sums, *call.strides_s, *call.strides_t,
        *full, *low, call.pixels, low_pixels, *(-(-n // m) for n, m in zip(full, low, strict=True)), call.images, call.classes,
        tiles_of_image, tiles, tiles_of_program, *call.numbers,
        **call.flags, Z=z, Y=y, INDEX=tl.int32 if largest < 2**31 else tl.int64, K=K, R=R, M=M, num_warps=1,
    )  # fmt: skip
    if call.settings.need_gradient:
        add_parts_kernel[(-(-numbers // 1024),)](
            parts,
            call.written,
            *call.strides_g,
            call.classes,
            low_pixels,
            numbers,
            PARTS=count,
            BLOCK=1024,
            num_warps=4,
        )
    return call.finish(sums)
