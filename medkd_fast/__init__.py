"""Fused knowledge-distillation losses for medical image segmentation."""

from importlib.metadata import PackageNotFoundError, version

from medkd_fast.backend import set_backend, use_backend
from medkd_fast.distiller import Distiller, Term
from medkd_fast.functional import (
    AveragePool,
    ClassMeans,
    ClassPearson,
    DecoupledKL,
    ImportanceAndAffinity,
    MaxPool,
    attention_map,
    average_pool,
    channel_gram,
    channel_relation,
    class_kl,
    class_means,
    class_pearson,
    class_similarity,
    decoupled_kl,
    importance_and_affinity,
    max_pool,
    pixel_affinity,
    pixel_relation,
    spatial_kl,
    standardised_mse,
)

try:
    __version__ = version("medkd_fast")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "AveragePool",
    "ClassMeans",
    "ClassPearson",
    "DecoupledKL",
    "Distiller",
    "ImportanceAndAffinity",
    "MaxPool",
    "Term",
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
    "set_backend",
    "spatial_kl",
    "standardised_mse",
    "use_backend",
]
