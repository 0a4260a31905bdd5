"""Where the energy of a feature lies: the attention maps that several losses compare."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from medkd_fast.losses import common


def attention_map(x: torch.Tensor, p: float, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over channels of |x|^p, over the pixels of unit L2 norm: [B, C, *S] to [B, N].

    In the type of the arithmetic, and relative to the largest pixel before its norm is taken, so nothing overflows; the map is
    the same whatever constant divides x.
    """
    x = common.wide(x)
    if mask is not None:
        x = torch.where(mask.unsqueeze(1), x, 0)
    energy = _energy(x, p).flatten(1)
    largest = energy.detach().amax(1, keepdim=True)
    return F.normalize(energy / torch.where(largest > 0, largest, 1), dim=1)


def _energy(x: torch.Tensor, p: float) -> torch.Tensor:
    """Sum over channels of |x|^p."""
    if p == 2:
        return SumOfSquares.apply(x)
    if p == 4:
        return SumOfSquares.apply(x.square())
    return x.abs().sum(1) if p == 1 else x.abs().pow(p).sum(1)


class SumOfSquares(torch.autograd.Function):
    """Over channels. PyTorch's gradient of a square makes three passes over the features, this one makes one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.square().sum(1)

    @staticmethod
    def backward(ctx: Any, v_sum: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return x * (2 * v_sum).unsqueeze(1)


def check_power(p: float) -> None:
    if not 1 <= p < float("inf"):
        raise ValueError(f"p: got {p}, want a finite number of at least 1")
