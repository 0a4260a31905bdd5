"""What the Triton kernels of max_pool and average_pool share: where windows lie, and how large tiles are."""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from medkd_fast.kernels.planes import gradient_like, planes_of

#: Pixels of the largest window that a program goes over one by one.
FEW = 64
#: Of kernels: what says nothing about where numbers lie, and is not worth a compilation.
SIZES = ("blocks", "size_z", "size_y", "size_x", "pooled_y", "pooled_x")
#: Types that are compared or added up in another than float32.
A_OF = {torch.float64: tl.float64}


@triton.jit
def pixel_of(
    k, o_w, mask, first, windows, size_z, size_y, size_x, pooled_y, pooled_x,
    HAS_MASK: tl.constexpr, WINDOW_Z: tl.constexpr, WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr,
):  # fmt: skip
    """Pixel k of windows o_w, and whether it is there and counts; the image's mask begins at `first`."""
    line = o_w // pooled_x
    z = line // pooled_y * WINDOW_Z + k // (WINDOW_Y * WINDOW_X)
    y = line % pooled_y * WINDOW_Y + k // WINDOW_X % WINDOW_Y
    x = o_w % pooled_x * WINDOW_X + k % WINDOW_X
    n = (z * size_y + y) * size_x + x
    there = (o_w < windows) & (k < WINDOW_Z * WINDOW_Y * WINDOW_X) & (z < size_z) & (y < size_y) & (x < size_x)
    if HAS_MASK:
        there = there & (tl.load(mask + first + n, there, 0) != 0)
    return n, there


@triton.jit
def window_of(
    o_n, size_y, size_x, pooled_y, pooled_x, WINDOW_Z: tl.constexpr, WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr
):
    """The windows of pixels o_n, and their places there."""
    line, x = o_n // size_x, o_n % size_x
    z, y = line // size_y, line % size_y
    window = (z // WINDOW_Z * pooled_y + y // WINDOW_Y) * pooled_x + x // WINDOW_X
    return window, (z % WINDOW_Z * WINDOW_Y + y % WINDOW_Y) * WINDOW_X + x % WINDOW_X


def sizes_of(x: torch.Tensor, window: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Sizes, windows and numbers of windows along z, y and x; 1 along an axis that is not there."""
    size, steps = ([1] * (5 - x.dim()) + list(of) for of in (x.shape[2:], window))
    return size, steps, [-(-n // step) for n, step in zip(size, steps, strict=True)]


def settings_of(size: list[int], steps: list[int]) -> dict[str, Any]:
    """INDEX is the type of pixels within a plane: divisions of 64 bits are slow."""
    index = tl.int32 if math.prod(size) < 2**30 else tl.int64
    return {"INDEX": index, "WINDOW_Z": steps[0], "WINDOW_Y": steps[1], "WINDOW_X": steps[2]}


def blocks_of(channels: int, neighbours: int, planes: bool, area: int) -> tuple[int, int]:
    """Channels and neighbours of a tile of `area` where a channel's pixels lie side by side, else of up to 32 neighbours."""
    columns = min(triton.next_power_of_2(neighbours), area if planes else 32)
    return min(triton.next_power_of_2(channels), (area if planes else 1024) // columns), columns


def over_windows(
    few: Any, many: Any, x: torch.Tensor, mask: torch.Tensor | None, outputs: list[torch.Tensor], window: list[int]
) -> None:
    """Launches `few` over tiles of channels by windows, or `many` over tiles of windows by their pixels."""
    B, C = x.shape[:2]
    size, steps, number = sizes_of(x, window)
    kept, strides = planes_of(x)
    windows = math.prod(number)
    settings = settings_of(size, steps) | {"A": A_OF.get(x.dtype, tl.float32), "HAS_MASK": mask is not None}
    small = math.prod(steps) <= FEW
    rows, columns = blocks_of(C, windows, strides[2] == 1, 256) if small else (1, 4)
    blocks = -(-windows // columns)
    args = kept, mask, *outputs, C, math.prod(size), windows, blocks, *size, *number[1:], *strides
    if small:
        few[(B * blocks, -(-C // rows))](*args, BLOCK_C=rows, BLOCK_W=columns, **settings)
    else:
        many[(B * C * blocks,)](*args, BLOCK_W=columns, BLOCK_K=256, **settings)


def over_pixels(
    kernel: Any,
    inputs: list[torch.Tensor | None],
    upstream: torch.Tensor,
    x: torch.Tensor,
    window: list[int],
    **more: Any,
) -> torch.Tensor:
    """The gradient, laid out as x, which `kernel` writes over tiles of channels by pixels."""
    gradient, written, strides = gradient_like(x)
    if x.numel() > 0:
        B, C = x.shape[:2]
        size, steps, number = sizes_of(x, window)
        N = math.prod(size)
        v, strides_v = planes_of(upstream)
        rows, columns = blocks_of(C, N, strides[2] == 1, 1024)
        blocks = -(-N // columns)
        kernel[(B * blocks, -(-C // rows))](
            *inputs, v, written, C, N, math.prod(number), blocks, *size[1:], *number[1:], *strides_v, *strides,
            BLOCK_C=rows, BLOCK_N=columns, **settings_of(size, steps), **more,
        )  # fmt: skip
    if written is not gradient:
        gradient.copy_(written)
    return gradient
