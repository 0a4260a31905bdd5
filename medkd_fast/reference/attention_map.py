"""The definition of attention_map.

Features X [C, N] of one image, one column a pixel; pixels that do not count are 0 and their entries of the map too.

    e_n = Σ_c |x_cn|^p,  q = e / |e|₂

The fused kernels take e in the type of the arithmetic and the sum of its squares in fp64, where it does not overflow. With v the
gradient that arrives for q,

    ∂/∂e_n  = (v_n − q_n ⟨v, q⟩) / |e|₂
    ∂/∂x_cn = p |x_cn|^(p−1) sgn(x_cn) ∂/∂e_n

An image whose features are all 0 has the map 0 and gradient 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from medkd_fast.reference.common import arithmetic


def attention_map(x: torch.Tensor, mask: torch.Tensor | None, power: float) -> torch.Tensor:
    """Arguments as those of `medkd_fast.attention_map`, checked."""
    x = x.to(arithmetic(x, x))
    if mask is not None:
        x = torch.where(mask.unsqueeze(1), x, 0)
    energy = (x.square() if power == 2 else x.abs().pow(power)).sum(1)
    if energy.numel() == 0:
        return energy
    flat = energy.flatten(1)
    # relative to the largest, so that its square does not overflow; the map is the same whatever constant divides it
    largest = flat.detach().amax(1, keepdim=True)
    return F.normalize(flat / torch.where(largest > 0, largest, 1), dim=1).view_as(energy)
