"""Triton kernels: importing this registers them as torch.ops.medkd_fast.<operator>_triton."""

from medkd_fast.kernels import (  # noqa: F401
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
    pixel_relation_kl,
    scale_gradient,
    spatial_kl,
    standardised_mse,
)
