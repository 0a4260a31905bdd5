"""Batches whose order and augmentation depend on (seed, epoch, position) alone: a resumed run draws the same ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from monai.transforms import Compose, RandAffined, RandGaussianNoised, RandScaleIntensityd, RandShiftIntensityd
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from medkd_fast.training.data import Slices


def augmentation() -> Compose:
    """Small rotations, scalings, shifts and changes of intensity; no flip, which would swap the two kidneys."""
    return Compose(
        [
            RandAffined(
                ("image", "label"),
                prob=0.9,
                rotate_range=0.2,  # radians
                scale_range=(0.12, 0.12),
                translate_range=6,  # pixels
                mode=("bilinear", "nearest"),
                padding_mode="zeros",
            ),
            RandScaleIntensityd("image", factors=0.15, prob=0.5),
            RandShiftIntensityd("image", offsets=0.08, prob=0.5),
            RandGaussianNoised("image", std=0.03, prob=0.3),
        ]
    )


class DrawSampler(Sampler[tuple[int, int]]):
    """Draws of one epoch: (slice index, seed of its augmentation), every slice once before any slice twice.

    The draws depend on `seed` and on the epoch that `set_epoch` names (Lightning calls it), on nothing else: there is
    no generator whose state a checkpoint would have to carry.

    >>> sampler = DrawSampler([4, 7, 9], draws=6, seed=0)
    >>> sampler.set_epoch(3)
    >>> sorted(index for index, _ in sampler), list(sampler) == list(sampler)
    ([4, 4, 7, 7, 9, 9], True)
    """

    def __init__(self, indices: list[int], *, draws: int, seed: int) -> None:
        if not indices or draws < 1:
            raise ValueError(f"a sampler needs slices and draws >= 1, got {len(indices)} slices and {draws} draws")
        self.indices, self.draws, self.seed, self.epoch = indices, draws, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.draws

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        rounds = -(-self.draws // len(self.indices))
        order = torch.cat([torch.randperm(len(self.indices), generator=generator) for _ in range(rounds)])
        seeds = torch.randint(2**31, (self.draws,), generator=generator)
        for position, seed in zip(order[: self.draws].tolist(), seeds.tolist(), strict=True):
            yield self.indices[position], seed


class AugmentedSlices(Dataset[tuple[Tensor, Tensor]]):
    """Slices augmented with the seed that comes with the index: item (3, 17) is the same whenever it is asked for."""

    def __init__(self, slices: Slices) -> None:
        self.slices, self.transform = slices, augmentation()

    def __getitem__(self, draw: tuple[int, int]) -> tuple[Tensor, Tensor]:
        index, seed = draw
        self.transform.set_random_state(seed=seed)
        item = self.transform({"image": self.slices.images[index], "label": self.slices.labels[index]})
        return item["image"].as_tensor(), item["label"].as_tensor().long()


class Blocks(Dataset[tuple[Tensor, Tensor, int]]):
    """Held-out slices in order, unchanged: (image, label, number of the block that they belong to)."""

    def __init__(self, slices: Slices, blocks: list[list[int]]) -> None:
        self.slices = slices
        self.items = [(index, number) for number, block in enumerate(blocks) for index in block]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, int]:
        index, number = self.items[position]
        return self.slices.images[index], self.slices.labels[index], number


def train_loader(slices: Slices, indices: list[int], *, batch_size: int, steps: int, seed: int) -> DataLoader:
    """An epoch of `steps` batches of `batch_size` augmented slices, in this process (the data are in memory)."""
    sampler = DrawSampler(indices, draws=batch_size * steps, seed=seed)
    return DataLoader(AugmentedSlices(slices), batch_size=batch_size, sampler=sampler)
