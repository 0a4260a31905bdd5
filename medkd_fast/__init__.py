"""Fused knowledge-distillation losses for medical image segmentation."""

from importlib.metadata import PackageNotFoundError, version

from medkd_fast.backend import set_backend, use_backend
from medkd_fast.distiller import Distiller, Term
from medkd_fast.functional import (
    ClassPearson,
    DecoupledKL,
    channel_gram,
    channel_relation,
    class_kl,
    class_pearson,
    decoupled_kl,
    pixel_affinity,
    pixel_relation,
    spatial_kl,
)

try:
    __version__ = version("medkd_fast")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "ClassPearson",
    "DecoupledKL",
    "Distiller",
    "Term",
    "channel_gram",
    "channel_relation",
    "class_kl",
    "class_pearson",
    "decoupled_kl",
    "pixel_affinity",
    "pixel_relation",
    "set_backend",
    "spatial_kl",
    "use_backend",
]
