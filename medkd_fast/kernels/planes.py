"""A tensor [B, C, *S] as planes of flat pixels: the strides that a kernel walks, without a copy for the ordinary layouts."""

from __future__ import annotations

import torch
from torch import Tensor


def pixel_stride(x: Tensor) -> int:
    """The stride from pixel to pixel when the spatial dimensions lie one after another in memory, else 0."""
    stride = expected = 0
    for size, step in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size == 1:
            continue
        if stride == 0:
            stride = expected = step
        if step != expected or expected == 0:
            return 0
        expected *= size
    return stride or 1


def planes_of(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """The tensor to read and its strides over images, channels and pixels; a copy where pixels have no single stride."""
    stride = pixel_stride(x)
    if stride == 0:
        x, stride = x.contiguous(), 1
    return x, (x.stride(0), x.stride(1), stride)


def gradient_like(x: Tensor) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
    """A gradient laid out as x, what a kernel writes of it, and that one's strides.

    The two differ where the pixels have no single stride; then the caller copies the second into the first.
    """
    result = torch.empty_like(x)
    stride = pixel_stride(result)
    if stride:
        return result, result, (result.stride(0), result.stride(1), stride)
    written = torch.empty_like(x, memory_format=torch.contiguous_format)
    return result, written, (written.stride(0), written.stride(1), 1)
