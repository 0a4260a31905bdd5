"""The definition of max_pool.

Windows lie side by side, the last of an axis is cut off at the border. Of every window the largest value among the pixels that
count, and 0 where none does; the gradient goes to the first pixel that has it, in the order of memory of a contiguous tensor. A
value that is no number is the largest; of several the last one is taken, as PyTorch does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def max_pool(x: torch.Tensor, mask: torch.Tensor | None, window: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Arguments as those of `medkd_fast.max_pool`, checked."""
    if x.numel() == 0:
        size = [-(-n // step) for n, step in zip(x.shape[2:], window, strict=True)]
        return x.sum() + x.new_zeros((*x.shape[:2], *size)), mask if mask is None else mask.new_zeros(
            (x.shape[0], *size)
        )
    pool = POOL[x.dim() - 2]
    if mask is None:
        return pool(x, window, ceil_mode=True), None
    counts = mask.unsqueeze(1)
    # where nothing counts, or nothing above -inf, PyTorch names a window's first pixel; here it is the first that counts
    some, first = pool(counts.to(torch.float32), window, ceil_mode=True, return_indices=True)
    highest, index = pool(x.detach().masked_fill(~counts, -torch.inf), window, ceil_mode=True, return_indices=True)
    index = torch.where(highest == -torch.inf, first, index)
    pooled = x.flatten(2).gather(2, index.flatten(2)).reshape(index.shape)
    return torch.where(some > 0, pooled, 0), some.squeeze(1) > 0
