"""channel_relation: the products of both networks' channels, made relations and compared; the forward leaves the matrix that
the backward multiplies the student with."""

import torch

from medkd_fast.kernels.channel_matrices import divergence_of, gradient_matrix, relations
from medkd_fast.kernels.channel_products import count_pixels, gradient, products
from medkd_fast.kernels.common import operator
from medkd_fast.kernels.pixel_images import pixels_of
from medkd_fast.reference.common import arithmetic


@operator()
def channel_relation(
    student: torch.Tensor,  # [B, C, *S]
    teacher: torch.Tensor,  # [B, C, *S]
    mask: torch.Tensor | None,  # [B, *S], boolean, contiguous
    relation: str,
    divergence: str,
    temperature: float,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    type, N, pixels = arithmetic(student, teacher), pixels_of(student), count_pixels(mask)
    sums, shift = products([student, teacher], mask, relation, temperature, type)
    # compared in double: their differences are small near convergence
    both, state = relations(sums, shift, pixels, N, relation, torch.float64)
    loss, v = divergence_of(both, pixels, N, divergence, temperature, reduction, type)
    return loss, gradient_matrix(v, both[0], state[0], relation, temperature, type)


@operator()
def channel_relation_backward(
    student: torch.Tensor,  # [B, C, *S]
    mask: torch.Tensor | None,  # [B, *S], boolean, contiguous
    matrix: torch.Tensor,  # [B, C or C + 1, the same], contiguous, in the type of the arithmetic
    upstream: torch.Tensor,  # [] or [B], in the type of the arithmetic
    relation: str,
    temperature: float,
) -> torch.Tensor:
    return gradient(student, mask, matrix, upstream, relation, temperature)
