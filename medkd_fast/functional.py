"""The public functions. Each runs through the fused backend that `medkd_fast.backend` chooses for its tensors."""

from medkd_fast.ops.attention_map import attention_map
from medkd_fast.ops.average_pool import AveragePool, average_pool
from medkd_fast.ops.channel_gram import channel_gram
from medkd_fast.ops.channel_relation import channel_relation
from medkd_fast.ops.class_kl import class_kl
from medkd_fast.ops.class_means import ClassMeans, class_means
from medkd_fast.ops.class_pearson import ClassPearson, class_pearson
from medkd_fast.ops.class_similarity import class_similarity
from medkd_fast.ops.decoupled_kl import DecoupledKL, decoupled_kl
from medkd_fast.ops.importance_and_affinity import ImportanceAndAffinity, importance_and_affinity
from medkd_fast.ops.max_pool import MaxPool, max_pool
from medkd_fast.ops.pixel_affinity import pixel_affinity
from medkd_fast.ops.pixel_relation import pixel_relation
from medkd_fast.ops.spatial_kl import spatial_kl
from medkd_fast.ops.standardised_mse import standardised_mse

__all__ = [
    "AveragePool",
    "ClassMeans",
    "ClassPearson",
    "DecoupledKL",
    "ImportanceAndAffinity",
    "MaxPool",
    "attention_map",
    "average_pool",
    "channel_gram",
    "channel_relation",
    "class_kl",
    "class_means",
    "class_pearson",
    "class_similarity",
    "decoupled_kl",
    "importance_and_affinity",
    "max_pool",
    "pixel_affinity",
    "pixel_relation",
    "spatial_kl",
    "standardised_mse",
]
