"""Triton kernels: importing this registers them as torch.ops.medkd_fast.<operator>_triton."""
