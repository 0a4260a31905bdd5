"""What a teacher gives under torch.inference_mode, and labels, masks and weights from there, go into every operator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from operators import assert_close, value_and_gradient

import medkd_fast as m

Function = Callable[..., torch.Tensor]
#: operator(student, teacher, labels, mask, weight)
OPERATORS: dict[str, Function] = {
    "decoupled_kl": lambda s, t, y, mask, w: m.decoupled_kl(s, t, y, weight=w).loss,
    "class_kl": lambda s, t, y, mask, w: m.class_kl(s, t, target=y, weight=w),
    "spatial_kl": lambda s, t, y, mask, w: m.spatial_kl(s, t, mask=mask),
    "class_pearson": lambda s, t, y, mask, w: m.class_pearson(s, t, target=y).loss,
    "channel_gram": lambda s, t, y, mask, w: m.channel_gram(s, mask=mask),
    "channel_relation": lambda s, t, y, mask, w: m.channel_relation(s, t, relation="gram", mask=mask),
    "pixel_affinity": lambda s, t, y, mask, w: (m.pixel_affinity(s) - m.pixel_affinity(t)).square(),
    "pixel_relation": lambda s, t, y, mask, w: m.pixel_relation(s, t, relation="gram", mask=mask, pool=2),
    "pixel_relation kl": lambda s, t, y, mask, w: m.pixel_relation(s, t, divergence="kl", mask=mask),
    "attention_map": lambda s, t, y, mask, w: m.attention_map(s, mask=mask) * m.attention_map(t, mask=mask),
    "class_means": lambda s, t, y, mask, w: m.class_means(s, y, num_classes=3).means,
    "importance_and_affinity": lambda s, t, y, mask, w: sum(m.importance_and_affinity(s, t, y, num_classes=3)),
    "class_similarity": lambda s, t, y, mask, w: m.class_similarity(s, y, num_classes=3),
    "standardised_mse": lambda s, t, y, mask, w: m.standardised_mse(s, t, mask=mask),
    "max_pool": lambda s, t, y, mask, w: m.max_pool(s, 2, mask=mask).pooled,
    "average_pool": lambda s, t, y, mask, w: m.average_pool(s, 2, mask=mask).pooled,
}


@pytest.mark.parametrize("name", OPERATORS)
def test_they_are_taken_as_others_are(backend: str, name: str) -> None:
    student = torch.randn(2, 3, 4, 6)

    def others() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(1)
        target = torch.randint(0, 3, (2, 4, 6))
        return torch.randn(2, 3, 4, 6), target, target > 0, torch.rand(2, 4, 6)

    want, want_gradient = value_and_gradient(lambda x: OPERATORS[name](x, *others()), student)
    with torch.inference_mode():
        inferred = others()
    value, gradient = value_and_gradient(lambda x: OPERATORS[name](x, *inferred), student)
    assert_close(value, want, 0)
    assert_close(gradient, want_gradient, 0)
    with torch.inference_mode():
        assert_close(OPERATORS[name](student, *inferred), want, 1e-6)
