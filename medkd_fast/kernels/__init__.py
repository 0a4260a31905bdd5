"""Triton kernels: importing this registers them as torch.ops.medkd_fast.<operator>_triton."""

from medkd_fast.kernels import (  # noqa: F401
    channel_gram,
    channel_relation,
    class_kl,
    class_pearson,
    decoupled_kl,
    max_pool,
    pixel_affinity,
    pixel_relation,
    pixel_relation_kl,
    scale_gradient,
    spatial_kl,
)
