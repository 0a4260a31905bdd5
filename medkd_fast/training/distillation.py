"""The distillation terms that a run names, such as `cpkd:0.5`: which loss, on which outputs, with which weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from medkd_fast.losses import CPKDLoss, DKDLoss, DMDLoss, KDLoss
from medkd_fast.training.data import NUM_CLASSES
from medkd_fast.training.errors import WrongUse
from medkd_fast.training.networks import DECODER, decoder_channels

# cpkd and dmd chosen on other seeds than the demo's default; kd and dkd of about that size, untried
DEFAULT_WEIGHTS = {"cpkd": 0.3, "dmd": 0.1, "kd": 0.1, "dkd": 0.02}

CPKD_LEVEL = DECODER.index("upcat_2")
DMD_LEVELS = slice(0, 3)  # the coarse decoder levels; the finest is next to the logits

Outputs = tuple[Tensor, list[Tensor]]  # logits [B, C, H, W] and the features of DECODER


class Distillation(nn.Module):
    """Sum of weighted distillation losses between a student's and a teacher's outputs.

    weights: {name: weight}, names of `DEFAULT_WEIGHTS`. student_widths, teacher_widths: of the two networks.
    `parts` holds, after a call, every part of every term, unweighted and detached, as "name/part". Parameters (the projectors of
    `dmd`, the adapter of `cpkd`) are drawn from `seed` alone.

    >>> term = Distillation({"kd": 0.1}, student_widths=(4, 4, 8, 16, 32, 4), teacher_widths=(8, 8, 16, 32, 64, 8), seed=0)
    >>> logits, label = torch.zeros(1, 9, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.int64)
    >>> term((logits, []), (logits, []), label)
    tensor(0.)
    """

    def __init__(
        self, weights: Mapping[str, float], *, student_widths: Sequence[int], teacher_widths: Sequence[int], seed: int
    ) -> None:
        super().__init__()
        check_weights(weights)
        self.weights = dict(weights)
        student, teacher = decoder_channels(tuple(student_widths)), decoder_channels(tuple(teacher_widths))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.losses = nn.ModuleDict({name: _make(name, student, teacher) for name in weights})
        self.parts: dict[str, Tensor] = {}

    def forward(self, student: Outputs, teacher: Outputs, label: Tensor) -> Tensor:
        self.parts, terms = {}, []
        for name, loss in self.losses.items():
            if name == "cpkd":
                value = loss(student[1][CPKD_LEVEL], teacher[1][CPKD_LEVEL], label)
            elif name == "dmd":
                value = loss(student[0], teacher[0], label, features=student[1][DMD_LEVELS])
            else:
                value = loss(student[0], teacher[0], label)
            terms.append(self.weights[name] * value)
            self.parts |= {f"{name}/{part}": v for part, v in loss.parts.items()}
        return torch.stack(terms).sum()


def check_weights(weights: Mapping[str, float]) -> None:
    """Raises WrongUse for a loss that does not exist or a weight that is not positive."""
    for name, weight in weights.items():
        if name not in DEFAULT_WEIGHTS:
            raise WrongUse(f"unknown distillation loss {name!r}: choose from {', '.join(DEFAULT_WEIGHTS)}")
        if not 0 < weight < float("inf"):
            raise WrongUse(f"the weight of {name} must be positive and finite, got {weight}")


def parse_terms(terms: Sequence[str]) -> dict[str, float]:
    """`["cpkd:0.5", "kd"]` to `{name: weight}`, with the default weight where none is given.

    Raises WrongUse for a name twice and as `check_weights` does.

    >>> parse_terms(["cpkd:0.5", "kd"])
    {'cpkd': 0.5, 'kd': 0.1}
    """
    weights: dict[str, float] = {}
    for term in terms:
        name, colon, number = term.partition(":")
        if name in weights:
            raise WrongUse(f"the loss {name} is given twice: give it once, with its weight")
        try:
            weights[name] = float(number) if colon else DEFAULT_WEIGHTS.get(name, 1.0)
        except ValueError:
            raise WrongUse(f"the weight of {name} must be a number, got {number!r}: write {name}:0.5") from None
    check_weights(weights)
    return weights


def _make(name: str, student: list[int], teacher: list[int]) -> nn.Module:
    if name == "kd":
        return KDLoss(temperature=4.0)
    if name == "dkd":
        return DKDLoss()
    if name == "dmd":
        return DMDLoss(num_classes=NUM_CLASSES, feature_channels=student[DMD_LEVELS])
    return CPKDLoss(student_channels=student[CPKD_LEVEL], teacher_channels=teacher[CPKD_LEVEL])
