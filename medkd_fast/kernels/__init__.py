"""Triton kernels: importing this registers them as torch.ops.medkd_fast.<operator>_triton."""

from medkd_fast.kernels import class_pearson, pixel_affinity, pixel_relation, pixel_relation_kl, spatial_kl  # noqa: F401
