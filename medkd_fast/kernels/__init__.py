"""Triton kernels: importing this registers them as torch.ops.medkd_fast.<operator>_triton."""

from medkd_fast.kernels import class_kl, decoupled_kl, scale_gradient  # noqa: F401
