"""A small made-up volume in place of the CT, and runs that take seconds."""

from __future__ import annotations

import pytest
import torch

from medkd_fast.training.data import Slices, Split, hold_out
from medkd_fast.training.runs import RunConfig

WIDTHS = (4, 4, 4, 8, 8, 4)


def small_slices() -> Slices:
    """32 slices of 32 x 32: a bright liver on the right, a brighter spleen on the left, an aorta between, noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(32, 1, 32, 32, dtype=torch.int64)
    labels[:, :, 8:20, 4:14] = 5
    labels[:, :, 10:18, 20:28] = 1
    labels[:, :, 22:26, 15:19] = 8
    level = torch.zeros(9)
    level[[5, 1, 8]] = torch.tensor([0.5, 0.7, 1.0])
    images = (level[labels] + 0.05 * torch.rand(labels.shape, generator=generator)).clamp(0, 1)
    return Slices(images=images, labels=labels, spacing=(2.0, 1.5, 1.5))


@pytest.fixture
def slices() -> Slices:
    return small_slices()


@pytest.fixture
def split(slices) -> Split:
    return hold_out(len(slices))


@pytest.fixture
def config() -> RunConfig:
    return RunConfig(WIDTHS, epochs=4, steps=6, learning_rate=0.02, seed=3)
