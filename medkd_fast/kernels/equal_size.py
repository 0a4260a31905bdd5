"""class_kl and decoupled_kl with student and teacher of equal size.

A program takes tiles of neighbouring pixels of one image; every logits tensor is read once. Which layout a tensor has is in its
strides; the one that is 1 is known when the kernel is compiled.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from medkd_fast.kernels.common import INTERPRETED
from medkd_fast.kernels.pixel_frame import Call, power_of_2, store_sums, tile_of_pixels


@triton.jit(do_not_specialize=["tiles_of_image", "tiles", "tiles_of_program"])
def pixel_loss_kernel(
    student, teacher, target, weight, gradient, loss, target_term, nontarget_term, sums,
    stride_sb, stride_sc, stride_sn, stride_tb, stride_tc, stride_tn, stride_gb, stride_gc, stride_gn,
    pixels: tl.int64, classes, tiles_of_image, tiles, tiles_of_program,
    target_weight: tl.float64, nontarget_weight: tl.float64, temperature: tl.float64, to_base_2: tl.float64,
    ignore_index: tl.int64,
    A: tl.constexpr, DECOUPLED: tl.constexpr, HAS_TARGET: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    WANT_GRADIENT: tl.constexpr, PER_PIXEL: tl.constexpr, K: tl.constexpr, R: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    target_weight, nontarget_weight = tl.full((), target_weight, A), tl.full((), nontarget_weight, A)
    temperature, to_base_2 = tl.full((), temperature, A), tl.full((), to_base_2, A)
    rows = tl.arange(0, R)[:, None]
    o_m = tl.arange(0, M)[None, :]
    sum_target, sum_nontarget, sum_weight = (tl.full((), 0.0, tl.float64),) * 3
    i_program = tl.program_id(0)
    for i_tile in range(i_program * tiles_of_program, min((i_program + 1) * tiles_of_program, tiles)):
        i_b = (i_tile // tiles_of_image).to(tl.int64)
        first = (i_tile % tiles_of_image).to(tl.int64) * M
        m_n = first + o_m < pixels
        p_s = student + i_b * stride_sb + first * stride_sn + o_m * stride_sn
        p_t = teacher + i_b * stride_tb + first * stride_tn + o_m * stride_tn
        s, t = (), ()
        for k in tl.static_range(K):
            channel = (rows + k * R).to(tl.int64)
            m = m_n if R == 1 else m_n & (channel < classes)
            # a class beyond the last is absent
            s += (tl.load(p_s + channel * stride_sc, mask=m, other=-float("inf")).to(A),)
            t += (tl.load(p_t + channel * stride_tc, mask=m, other=-float("inf")).to(A),)
        target_part, nontarget_part, w, v_s = tile_of_pixels(
            s, t, target, weight, loss, target_term, nontarget_term, i_b * pixels + first + o_m, m_n, m_n,
            classes, target_weight, nontarget_weight, temperature, to_base_2, ignore_index,
            A, DECOUPLED, HAS_TARGET, HAS_WEIGHT, WANT_GRADIENT, PER_PIXEL, K, R,
        )  # fmt: skip
        if not PER_PIXEL:
            sum_target += tl.sum(target_part.to(tl.float64))
            sum_nontarget += tl.sum(nontarget_part.to(tl.float64))
            sum_weight += tl.sum(w.to(tl.float64))
        if WANT_GRADIENT:
            p_g = gradient + i_b * stride_gb + first * stride_gn + o_m * stride_gn
            for k in tl.static_range(K):
                channel = (rows + k * R).to(tl.int64)
                m = m_n if R == 1 else m_n & (channel < classes)
                tl.store(p_g + channel * stride_gc, v_s[k], mask=m)
    if not PER_PIXEL:
        store_sums(sums, sum_target, sum_nontarget, sum_weight)


class Tile(NamedTuple):
    K: int
    R: int
    M: int
    warps: int

    def registers(self, decoupled: bool, double: bool) -> int | None:
        """The most of a thread, where that is to be said: the compiler takes 150 to 190 for the two parts of large tiles, and with 128,
        of which it puts none or next to none into memory, a multiprocessor has 16 warps instead of 8 or 12. For smaller tiles it takes
        fewer when nothing is said."""
        large = self.R == 1 and self.warps == 4 and (self.M >= 256 or self.K >= 24)
        return 128 if large and decoupled and not double else None


def tile_of(classes: int, planes: bool, double: bool) -> Tile:
    """Classes and pixels of a tile; 16 to 32 numbers of each network in a thread.

    `planes`: the pixels of a class lie side by side, so a thread takes 1 to 4 neighbouring ones and all their classes. More
    classes than a thread can hold, or the classes of a pixel side by side: threads share the classes of a pixel.
    """
    if planes and classes <= 32:
        pixels = 8 if INTERPRETED else 4 if classes <= 8 else 2 if classes <= 16 else 1
        return Tile(classes, 1, 128 * (max(pixels // 2, 1) if double else pixels), 4)
    if planes:
        rows = power_of_2(-(-classes // 8))
        return Tile(-(-classes // rows), rows, max(512 // rows, 8) * (1 if double else 2), 4 if rows <= 64 else 8)
    rows = min(power_of_2(classes), 1024)
    return Tile(-(-classes // rows), rows, max((512 if double else 1024) // rows, 1), 4)


def equal_size(call: Call) -> tuple[Tensor, ...]:
    """Runs a loss on logits of equal size; what decoupled_kl returns."""
    tile = tile_of(call.classes, call.strides_s[2] == 1, call.double)
    tiles_of_image = -(-call.pixels // tile.M)
    tiles = call.images * tiles_of_image
    slots, tiles_of_program, sums = call.slots(tiles)
    pixel_loss_kernel[(slots,)](
        call.student, call.teacher, *call.inputs, call.written, *call.values, sums,
        *call.strides_s, *call.strides_t, *call.strides_g, call.pixels, call.classes,
        tiles_of_image, tiles, tiles_of_program, *call.numbers,
        **call.flags, K=tile.K, R=tile.R, M=tile.M, num_warps=tile.warps,
        maxnreg=tile.registers(call.settings.decoupled, call.double),
    )  # fmt: skip
    return call.finish(sums)
