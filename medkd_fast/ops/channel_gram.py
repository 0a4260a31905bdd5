"""channel_gram: how the channels of one network relate to each other, over all pixels of an image."""

from __future__ import annotations

from typing import Any

import torch

from medkd_fast.backend import choose, kernel, shapes_of
from medkd_fast.ops import common
from medkd_fast.ops.channel_relation import RELATIONS
from medkd_fast.ops.relation import pixel_mask
from medkd_fast.reference.channel_gram import channel_gram as reference
from medkd_fast.reference.common import arithmetic


def channel_gram(
    x: torch.Tensor,
    *,
    relation: str = "cosine",
    temperature: float | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The C×C relation between the channels of every image, which `channel_relation` compares between two networks.

    A channel of an image is a vector over its pixels. For losses of one's own on the relation: one pass over the pixels
    forward and one backward, whatever the relation.

    Args:
        x: features or logits [B, C, *S]: float32, bfloat16, float16 or float64, in any memory format.
        relation: "cosine", "pearson", "gram", "row" or "softmax", as `channel_relation` describes them with their
            sources. All but "row" are symmetric.
        temperature: of relation "softmax", 1.0 if not given; the others have none.
        mask: [B, *S] or [B, 1, *S], booleans or integers: pixels where it is False or 0 are left out.

    Returns:
        The relation [B, C, C], float32 (float64 for float64 features). An image without a valid pixel: zeros.

    Raises:
        ValueError: a shape that does not fit, or a temperature for a relation that has none.
        TypeError: a dtype that does not fit.

    >>> import torch
    >>> x = torch.tensor([[3.0, 0.0], [1.0, 1.0]]).reshape(1, 2, 1, 2)
    >>> channel_gram(x)
    tensor([[[1.0000, 0.7071],
             [0.7071, 1.0000]]])
    >>> channel_gram(x, relation="gram")
    tensor([[[4.5000, 1.5000],
             [1.5000, 1.0000]]])
    """
    common.check_features("x", x)
    common.check_choice("relation", relation, RELATIONS)
    if temperature is not None and relation != "softmax":
        raise ValueError(
            f"temperature: got {temperature} with relation={relation!r}, which has none; leave it out, or use "
            "relation='softmax'"
        )
    temperature = 1.0 if temperature is None else temperature
    common.check_temperature(temperature)
    if x.shape[1] == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, want at least one channel")
    mask = pixel_mask(mask, x)
    backend = choose("channel_gram", x.device.type, x.numel(), x.shape[1])
    if backend == "reference":
        return common.plainly(reference, x, mask, relation, temperature)
    if common.wants_gradient(x):
        return common.apply(ChannelGram, x, mask, backend, relation, temperature)
    return kernel("channel_gram", backend)(x, mask, relation, temperature)[0]


class ChannelGram(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, mask: torch.Tensor | None, backend: str, relation: str, temperature: float
    ) -> torch.Tensor:
        matrix, state = kernel("channel_gram", backend)(x, mask, relation, temperature)
        ctx.save_for_backward(x, mask, matrix, state)
        ctx.backend, ctx.settings = backend, (relation, temperature)
        return matrix

    @staticmethod
    def backward(ctx: Any, v_matrix: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, mask, matrix, state = ctx.saved_tensors
        backward = kernel("channel_gram_backward", ctx.backend)
        gradient = backward(x, mask, matrix, state, v_matrix, *ctx.settings)
        return common.first_order(x, gradient, "channel_gram"), None, None, None, None


@shapes_of("channel_gram")
def _fake(
    x: torch.Tensor, mask: torch.Tensor | None, relation: str, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    images, channels = x.shape[:2]
    matrix = x.new_empty((images, channels, channels), dtype=arithmetic(x, x))
    return matrix, x.new_empty((images, 3, channels), dtype=torch.float64)


@shapes_of("channel_gram_backward")
def _fake_backward(
    x: torch.Tensor,
    mask: torch.Tensor | None,
    matrix: torch.Tensor,
    state: torch.Tensor,
    upstream: torch.Tensor,
    relation: str,
    temperature: float,
) -> torch.Tensor:
    return torch.empty_like(x)
