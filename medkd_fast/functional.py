"""The public functions. Each runs through the fused backend that `medkd_fast.backend` chooses for its tensors."""

from medkd_fast.ops.channel_gram import channel_gram
from medkd_fast.ops.channel_relation import channel_relation
from medkd_fast.ops.class_kl import class_kl
from medkd_fast.ops.class_pearson import ClassPearson, class_pearson
from medkd_fast.ops.decoupled_kl import DecoupledKL, decoupled_kl
from medkd_fast.ops.pixel_affinity import pixel_affinity
from medkd_fast.ops.pixel_relation import pixel_relation
from medkd_fast.ops.spatial_kl import spatial_kl

__all__ = [
    "ClassPearson",
    "DecoupledKL",
    "channel_gram",
    "channel_relation",
    "class_kl",
    "class_pearson",
    "decoupled_kl",
    "pixel_affinity",
    "pixel_relation",
    "spatial_kl",
]
