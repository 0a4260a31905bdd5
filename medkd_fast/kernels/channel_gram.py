"""channel_gram: the products of its channels, made a relation; and in the backward a matrix times the features."""

import torch

from medkd_fast.kernels.channel_matrices import gradient_matrix, relations
from medkd_fast.kernels.channel_products import count_pixels, gradient, products
from medkd_fast.kernels.common import operator
from medkd_fast.kernels.pixel_images import pixels_of
from medkd_fast.reference.common import arithmetic


@operator()
def channel_gram(
    x: torch.Tensor,  # [B, C, *S]
    mask: torch.Tensor | None,  # [B, *S], boolean, contiguous
    relation: str,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    type = arithmetic(x, x)
    sums, shift = products([x], mask, relation, temperature, type)
    matrix, state = relations(sums, shift, count_pixels(mask), pixels_of(x), relation, type)
    return matrix.squeeze(0), state.squeeze(0)


@operator()
def channel_gram_backward(
    x: torch.Tensor,  # [B, C, *S]
    mask: torch.Tensor | None,  # [B, *S], boolean, contiguous
    matrix: torch.Tensor,  # [B, C, C], contiguous, in the type of the arithmetic
    state: torch.Tensor,  # [B, 3, C], contiguous, double
    upstream: torch.Tensor,  # [B, C, C], in the type of the arithmetic
    relation: str,
    temperature: float,
) -> torch.Tensor:
    m = gradient_matrix(upstream, matrix, state, relation, temperature, matrix.dtype)
    return gradient(x, mask, m, None, relation, temperature)
