"""A NaN among what counts is seen in the loss: a training that broke must not look converged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from operators import where_it_runs

import medkd_fast

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

CALLS: dict[str, Call] = {
    "decoupled_kl": lambda s, t, y: medkd_fast.decoupled_kl(s, t, y).loss,
    "class_kl": lambda s, t, y: medkd_fast.class_kl(s, t),
    "spatial_kl": lambda s, t, y: medkd_fast.spatial_kl(s, t),
    "class_pearson": lambda s, t, y: medkd_fast.class_pearson(s, t).loss,
    "importance_and_affinity": lambda s, t, y: medkd_fast.importance_and_affinity(s, t, y, num_classes=3).importance,
    "standardised_mse": lambda s, t, y: medkd_fast.standardised_mse(s, t),
    "attention_map": lambda s, t, y: (medkd_fast.attention_map(s) - medkd_fast.attention_map(t)).square().sum(),
    "class_similarity": lambda s, t, y: (
        (medkd_fast.class_similarity(s, y, num_classes=3) - medkd_fast.class_similarity(t, y, num_classes=3))
        .square()
        .sum()
    ),
    "max_pool": lambda s, t, y: (medkd_fast.max_pool(s, 2).pooled - medkd_fast.max_pool(t, 2).pooled).square().sum(),
    "average_pool": lambda s, t, y: (
        (medkd_fast.average_pool(s, 2).pooled - medkd_fast.average_pool(t, 2).pooled).square().sum()
    ),
}
CALLS |= {
    f"channel_relation {relation} {divergence}": lambda s, t, y, r=relation, d=divergence: medkd_fast.channel_relation(
        s, t, relation=r, divergence=d
    )
    for relation, divergence in [
        ("cosine", "mse"), ("pearson", "mse"), ("gram", "mse"), ("row", "mse"), ("softmax", "mse"), ("cosine", "kl"), ("gram", "kl")
    ]
}  # fmt: skip
CALLS |= {
    f"pixel_relation {relation} {divergence} {temperature}": lambda s, t, y, r=relation, d=divergence, k=temperature: (
        medkd_fast.pixel_relation(s, t, relation=r, divergence=d, temperature=k)
    )
    for relation, divergence, temperature in [
        ("cosine", "mse", 0.1), ("pearson", "mse", 0.1), ("gram", "mse", 0.1),
        ("cosine", "kl", 0.1), ("cosine", "kl", 0.01), ("pearson", "kl", 0.1), ("gram", "kl", 0.1),
    ]
}  # fmt: skip


@pytest.mark.parametrize("network", ["student", "teacher"])
@pytest.mark.parametrize("call", CALLS)
def test_it_is_seen(backend: str, call: str, network: str) -> None:
    both = {"student": torch.randn(2, 4, 6, 8), "teacher": torch.randn(2, 4, 6, 8)}
    both[network][0, 1, 2, 3] = torch.nan
    made = where_it_runs({**both, "target": torch.randint(0, 3, (2, 6, 8))})
    assert CALLS[call](made["student"], made["teacher"], made["target"]).isnan()
