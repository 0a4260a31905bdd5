"""Where the energy of a feature lies: the attention maps that several losses compare."""

from __future__ import annotations

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
    energy = _power(x, p).sum(1).flatten(1)
    largest = energy.detach().amax(1, keepdim=True)
    return F.normalize(energy / torch.where(largest > 0, largest, 1), dim=1)


def _power(x: torch.Tensor, p: float) -> torch.Tensor:
    """|x|^p; squares are several times cheaper than powers."""
    if p == 2:
        return x.square()
    if p == 4:
        return x.square().square()
    return x.abs() if p == 1 else x.abs().pow(p)


def check_power(p: float) -> None:
    if not 1 <= p < float("inf"):
        raise ValueError(f"p: got {p}, want a finite number of at least 1")
