"""Where the energy of a feature lies: the attention maps that several losses compare."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from medkd_fast.losses import common


def attention_map(x: torch.Tensor, p: float, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over channels of |x|^p, over the pixels of unit L2 norm: [B, C, *S] to [B, N].

    The norm over channels in the type of the arithmetic, taken to the power p relative to its largest pixel, so nothing
    overflows; the map is the same whatever constant divides x.
    """
    x = common.wide(x)
    if mask is not None:
        x = torch.where(mask.unsqueeze(1), x, 0)
    size = torch.linalg.vector_norm(x.flatten(2), ord=p, dim=1)
    largest = size.detach().amax(1, keepdim=True)
    return F.normalize((size / torch.where(largest > 0, largest, 1)).pow(p), dim=1)


def check_power(p: float) -> None:
    if not 1 <= p < float("inf"):
        raise ValueError(f"p: got {p}, want a finite number of at least 1")
