"""What the Triton kernels of max_pool and average_pool share: where windows lie, and how large tiles are."""

import math

import torch
import triton
import triton.language as tl

#: Pixels of the largest window that a program goes over one by one.
FEW = 64


@triton.jit
def corner(o_w, pooled_y, pooled_x, WINDOW_Z: tl.constexpr, WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr):
    """z, y and x of the first pixels of windows o_w."""
    line = o_w // pooled_x
    return line // pooled_y * WINDOW_Z, line % pooled_y * WINDOW_Y, o_w % pooled_x * WINDOW_X


def sizes_of(x: torch.Tensor, window: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Sizes, windows and numbers of windows along z, y and x; 1 along an axis that is not there."""
    size, steps = ([1] * (5 - x.dim()) + list(of) for of in (x.shape[2:], window))
    return size, steps, [-(-n // step) for n, step in zip(size, steps, strict=True)]


def index_type(size: list[int]) -> tl.dtype:
    """Of pixels within a plane: divisions of 64 bits are slow."""
    return tl.int32 if math.prod(size) < 2**30 else tl.int64


def blocks_of(channels: int, neighbours: int, planes: bool, area: int) -> tuple[int, int]:
    """Channels and neighbours of a tile of `area` where a channel's pixels lie side by side, else of up to 32 neighbours."""
    columns = min(triton.next_power_of_2(neighbours), area if planes else 32)
    return min(triton.next_power_of_2(channels), (area if planes else 1024) // columns), columns
