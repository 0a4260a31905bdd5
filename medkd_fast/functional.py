"""The public functions. Each runs through the fused backend that `medkd_fast.backend` chooses for its tensors."""

from medkd_fast.ops.class_kl import class_kl
from medkd_fast.ops.decoupled_kl import DecoupledKL, decoupled_kl

__all__ = ["DecoupledKL", "class_kl", "decoupled_kl"]
