"""importance_and_affinity in Triton: the passes of attention_map, class_means and channel_relation, and one gradient for both.

Derivation: medkd_fast/reference/importance_and_affinity.py.
"""

import torch

from medkd_fast.kernels.attention_map import ByClass, attention_map, gradient_of
from medkd_fast.kernels.channel_relation import channel_relation, channel_relation_backward
from medkd_fast.kernels.class_means import class_means
from medkd_fast.kernels.common import operator
from medkd_fast.reference.common import which_count
from medkd_fast.reference.importance_and_affinity import at_one_width, shares


@operator()
def importance_and_affinity(
    student: torch.Tensor,  # [B, C, *S]
    teacher: torch.Tensor,  # [B, other C, *S]
    target: torch.Tensor,  # [B, *S], contiguous
    num_classes: int,
    power: float,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    mask = which_count(target, ignore_index)
    (map, norms), (map_t, _) = (attention_map(x, mask, power) for x in (student, teacher))
    (means, counts), (means_t, _) = (class_means(x, target, num_classes, ignore_index) for x in (student, teacher))
    squared, matrix = channel_relation(*at_one_width(means, means_t), None, "cosine", "mse_of_pairs", 1.0, "none")
    of_maps, of_pairs = shares(counts, map.dtype)
    of_means = channel_relation_backward(means, None, matrix, of_pairs, "cosine", 1.0)
    difference = map - map_t
    affinity = (squared * of_pairs).sum()
    # labels that are none show in the means alone
    importance = difference.square().sum(dtype=torch.float64) * of_maps + 0 * affinity
    return importance.to(map.dtype), affinity, map, norms, counts, difference * (2 * of_maps), of_means


@operator()
def importance_and_affinity_backward(
    student: torch.Tensor,  # [B, C, *S]
    target: torch.Tensor,  # [B, *S], contiguous
    map: torch.Tensor,  # [B, *S]
    norms: torch.Tensor,  # [B], double
    counts: torch.Tensor,  # [B, K]
    of_map: torch.Tensor,  # [B, *S]
    of_means: torch.Tensor,  # [B, K, C], contiguous
    v_importance: torch.Tensor,  # []
    v_affinity: torch.Tensor,  # []
    power: float,
    ignore_index: int,
) -> torch.Tensor:
    by_class = ByClass(target, counts, of_means * v_affinity, ignore_index)
    # no mask: the labels say which pixels count
    return gradient_of(student, None, map, norms, of_map * v_importance, power, by_class)
