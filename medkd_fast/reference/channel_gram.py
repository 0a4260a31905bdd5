"""The definition of channel_gram. Formulas and derivation: reference/channel_relation.py."""

from __future__ import annotations

import torch

from medkd_fast.reference.channel_relation import prepare, relation_matrix


def channel_gram(x: torch.Tensor, mask: torch.Tensor | None, relation: str, temperature: float) -> torch.Tensor:
    """Arguments as those of `medkd_fast.channel_gram`, checked."""
    features, _, valid = prepare(x, x.detach(), mask)
    return relation_matrix(features, mask, valid, relation, temperature)
