"""scale_gradient in Triton: what the backward of class_kl and decoupled_kl does."""

import triton
import triton.language as tl
from torch import Tensor

from medkd_fast.kernels.common import operator


@triton.jit
def scale_kernel(gradient, upstream, scale, numbers: tl.int64, BLOCK: tl.constexpr):
    factor = tl.load(upstream) * tl.load(scale)
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < numbers
    b_g = tl.load(gradient + o, mask=m).to(factor.dtype)
    tl.store(gradient + o, b_g * factor, mask=m)


@operator(mutates=("gradient",))
def scale_gradient(gradient: Tensor, upstream: Tensor, scale: Tensor) -> None:
    """gradient *= upstream * scale in the type of the arithmetic. The gradient is dense, in any order of its dimensions."""
    block = 2048
    numbers = gradient.numel()
    if numbers:
        scale_kernel[(-(-numbers // block),)](gradient, upstream, scale, numbers, BLOCK=block, num_warps=4)
