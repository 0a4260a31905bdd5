"""attention_and_means in Triton: the passes of attention_map and class_means, and one gradient for both.

Derivations: medkd_fast/reference/attention_map.py, class_means.py.
"""

import torch

from medkd_fast.kernels.attention_map import ByClass, attention_map, gradient_of
from medkd_fast.kernels.class_means import class_means
from medkd_fast.kernels.common import operator


@operator()
def attention_and_means(
    x: torch.Tensor,  # [B, C, *S]
    target: torch.Tensor,  # [B, *S], contiguous
    num_classes: int,
    power: float,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    result, norms = attention_map(x, target != ignore_index, power)
    means, counts = class_means(x, target, num_classes, ignore_index)
    return result, norms, means, counts


@operator()
def attention_and_means_backward(
    x: torch.Tensor,  # [B, C, *S]
    target: torch.Tensor,  # [B, *S], contiguous
    map: torch.Tensor,  # [B, *S]
    norms: torch.Tensor,  # [B], double
    counts: torch.Tensor,  # [B, K]
    of_map: torch.Tensor,  # [B, *S]
    of_means: torch.Tensor,  # [B, K, C]
    power: float,
    ignore_index: int,
) -> torch.Tensor:
    by_class = ByClass(target, counts, of_means.contiguous(), ignore_index)
    return gradient_of(x, None, map, norms, of_map, power, by_class)  # the labels say which pixels count
