"""The definition of importance_and_affinity.

Of every image the attention maps q (attention_map) and class means M [K, C] (class_means) of student and teacher, s and t, over the
pixels that are not ignored; a is the number of images with such a pixel.

    importance  Σ_images Σ_n (q^s_n − q^t_n)² / a

With R = M̂ M̂ᵀ the cosines between class means (channel_gram, the classes as its channels), k the number of classes of an image and
b the number of images with two or more,

    affinity    Σ_images Σ_{c ≠ d} (R^s_cd − R^t_cd)² / (k (k − 1)) / b

over the images that b counts. An absent class has the mean 0, and with that the cosine 0 in both networks; so has, in one of them, a class
whose features are all 0 there.

**Gradients.** 2 (q^s − q^t) / a arrives for the student's map, and M G for its means with G that of channel_relation: both are known
when the forward ends, and the backward multiplies them by what arrives for the two numbers before it takes them to the features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from medkd_fast.reference.attention_map import attention_map
from medkd_fast.reference.channel_gram import channel_gram
from medkd_fast.reference.class_means import class_means
from medkd_fast.reference.common import which_count


def importance_and_affinity(
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor,
    num_classes: int,
    power: float,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both numbers; arguments as those of `medkd_fast.importance_and_affinity`, checked."""
    counted = which_count(target, ignore_index)
    map_s, map_t = (attention_map(x, counted, power) for x in (student, teacher))
    (means_s, counts), (means_t, _) = (class_means(x, target, num_classes, ignore_index) for x in (student, teacher))
    means_s, means_t = at_one_width(means_s, means_t)
    cosines_s, cosines_t = (channel_gram(x, None, "cosine", 1.0) for x in (means_s, means_t))
    alone = torch.eye(num_classes, dtype=torch.bool, device=target.device)
    squared = (cosines_s - cosines_t).masked_fill(alone, 0).square().mean((1, 2))
    of_maps, of_pairs = shares(counts, squared.dtype)
    return (map_s - map_t).square().sum() * of_maps, (squared * of_pairs).sum()


def at_one_width(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Class means [B, K, C] of the larger number of features: those that one network lacks are 0, which changes no cosine."""
    missing = teacher.shape[2] - student.shape[2]
    if missing == 0:
        return student, teacher
    return F.pad(student, (0, max(missing, 0))), F.pad(teacher, (0, max(-missing, 0)))


def shares(counts: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Of numbers of pixels [B, K]: what squared differences of maps are multiplied by, [], and every image's mean over all K² pairs
    of classes, [B]."""
    classes = counts.count_nonzero(1)
    pairs = classes * (classes - 1)
    of_pairs = counts.shape[1] ** 2 / (pairs * pairs.count_nonzero()).clamp(min=1).to(dtype)
    return classes.count_nonzero().clamp(min=1).to(dtype).reciprocal(), torch.where(pairs > 0, of_pairs, 0)
