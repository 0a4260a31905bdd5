"""Batches of slices or patches. What is drawn depends on (seed, epoch, position) alone: a resumed run draws the same ones.

A position counts the samples of an epoch over all processes, so that two processes with half the batch each draw together
what one process would.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from medkd_fast.training.bars import track
from medkd_fast.training.data.prepare import Volume
from medkd_fast.training.errors import WrongUse

FOREGROUND = 1 / 3  # share of the draws that are centred on a class, as in nnU-Net
VOXELS_KEPT = 10_000  # of every class and volume, to centre on


def train_loader(
    volumes: Mapping[str, Volume],
    names: Sequence[str],
    *,
    dims: int,
    patch: Sequence[int],
    batch_size: int,
    steps: int,
    seed: int,
    num_classes: int,
    ignore_label: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    augment: bool = True,
    maps: Mapping[str, Tensor] | None = None,
) -> DataLoader:
    """An epoch of `steps` batches (image [B, C, *patch] float32, label [B, 1, *patch] int64) of augmented draws.

    dims: 2 draws axial slices, 3 patches. patch: (rows, columns) or (slices, rows, columns). A third of the draws is centred
    on a class that the volume has, each of its classes equally likely; the others lie anywhere. Slices (2-D) and volumes (3-D)
    come in a shuffled order, each once before any comes again. What lies outside of a volume gets the lowest intensity of the
    patch, and the ignore label, or the background where there is none.
    maps: of every volume by name, [K, D, H, W]: a third tensor in the batches, [B, K, *patch] float32, cropped and augmented like
    the image, but for its intensities.
    batch_size: of this process; rank and world_size: which of the processes it is. The loader's sampler has `set_epoch`.

    Raises WrongUse for a patch of another number of axes and for no labelled volume.
    """
    if dims not in (2, 3) or len(patch) != dims or min(patch) < 1:
        raise WrongUse(f"patch must be {dims} sizes >= 1 for dims {dims}, got {tuple(patch)}")
    chosen = [volumes[name] for name in names]
    if not chosen or any(v.mask is None for v in chosen):
        raise WrongUse("training needs labelled volumes: no names, or a volume without a label")
    data = Draws(
        chosen,
        patch=patch,
        seed=seed,
        num_classes=num_classes,
        ignore_label=ignore_label,
        epoch_size=batch_size * steps * world_size,
        augment=augment,
        maps=[maps[name] for name in names] if maps is not None else None,
    )
    sampler = Positions(batch_size=batch_size, steps=steps, rank=rank, world_size=world_size)
    # a generator of its own: the loader must not take numbers from the one that dropout takes its from
    return DataLoader(
        data,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        # the default of Python 3.14 would send every worker a copy of all volumes
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )


class Positions(Sampler[tuple[int, int]]):
    """(epoch, position) of the draws of one process; Lightning calls `set_epoch`.

    >>> [position for _, position in Positions(batch_size=2, steps=2, rank=1, world_size=2)]
    [2, 3, 6, 7]
    """

    def __init__(self, *, batch_size: int, steps: int, rank: int = 0, world_size: int = 1) -> None:
        if min(batch_size, steps, world_size) < 1 or not 0 <= rank < world_size:
            raise WrongUse(
                f"batch_size, steps and world_size must be >= 1 and rank below world_size, got {batch_size}, {steps}, "
                f"{world_size} and {rank}"
            )
        self.batch_size, self.steps, self.rank, self.world_size = batch_size, steps, rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batch_size * self.steps

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for step in range(self.steps):
            start = (step * self.world_size + self.rank) * self.batch_size
            for position in range(start, start + self.batch_size):
                yield self.epoch, position


class Draws(Dataset[tuple[Tensor, ...]]):
    """Item (epoch, position) is the same whenever, and in whichever process, it is asked for."""

    def __init__(
        self,
        volumes: Sequence[Volume],
        *,
        patch: Sequence[int],
        seed: int,
        num_classes: int,
        ignore_label: int | None = None,
        epoch_size: int,
        augment: bool = True,
        maps: Sequence[Tensor] | None = None,
    ) -> None:
        self.maps = maps
        self.volumes, self.seed, self.epoch_size = list(volumes), seed, epoch_size
        self.flat = len(patch) == 2
        self.patch = (1, *patch) if self.flat else tuple(patch)
        self.outside = 0 if ignore_label is None else ignore_label
        self.augment = augment
        self.places = [class_places(v.mask[0].numpy(), num_classes) for v in track(self.volumes, "looking for classes")]
        self.order: tuple[int, np.ndarray] | None = None  # of the units, in the turn that was drawn from last
        # in 2-D a draw of any place is a slice, in 3-D a volume
        self.units = [
            (v, z)
            for v, volume in enumerate(self.volumes)
            for z in (range(volume.image.shape[1]) if self.flat else [None])
        ]

    def __getitem__(self, draw: tuple[int, int]) -> tuple[Tensor, ...]:
        epoch, position = draw
        random = np.random.default_rng([self.seed, epoch, position])
        volume, centre = self._place(random, epoch, position)
        image, label = crop(self.volumes[volume], centre, self.patch, self.outside)
        extra = None if self.maps is None else crop_map(self.maps[volume], centre, self.patch)
        if self.flat:
            image, label = image[:, 0], label[:, 0]
            extra = None if extra is None else extra[:, 0]
        if self.augment:
            return augmented(image, label, self.outside, random, extra)
        return (image.clone(), label.long()) if extra is None else (image.clone(), label.long(), extra)

    def _place(self, random: np.random.Generator, epoch: int, position: int) -> tuple[int, list[int]]:
        """(volume, voxel that the patch is centred on)."""
        volume, z = self._unit(epoch, position)
        shape = self.volumes[volume].image.shape[1:]
        places = self.places[volume]
        if random.random() < FOREGROUND:
            if self.flat and not places:  # a block without any class: slices of other volumes have some
                volume = int(random.integers(len(self.volumes)))
                places, shape = self.places[volume], self.volumes[volume].image.shape[1:]
            if places:
                of_class = places[sorted(places)[random.integers(len(places))]]
                return volume, np.unravel_index(int(of_class[random.integers(len(of_class))]), shape)
        # any place where the patch lies inside, or the middle where it does not fit
        centre = [
            int(random.integers(n - p + 1)) + p // 2 if n >= p else n // 2
            for n, p in zip(shape, self.patch, strict=True)
        ]
        return volume, [z if z is not None else centre[0], *centre[1:]]

    def _unit(self, epoch: int, position: int) -> tuple[int, int | None]:
        """Every unit once before any unit twice, through the epochs."""
        count = epoch * self.epoch_size + position
        turn, place = divmod(count, len(self.units))
        if self.order is None or self.order[0] != turn:
            # another sequence than that of any position
            random = np.random.default_rng([self.seed, turn, 0, 1])  # zeros at the end would not count
            self.order = turn, random.permutation(len(self.units))
        return self.units[self.order[1][place]]


def augmented(
    image: Tensor, label: Tensor, outside: int, random: np.random.Generator, extra: Tensor | None = None
) -> tuple[Tensor, ...]:
    """A small rotation in the axial plane, zoom and shift of both; gain, offset and noise of the image. No flip: left is left.

    image: [C, *S] float32, label: [1, *S]; *S is (rows, columns) or (slices, rows, columns). What comes in from outside has
    the image's lowest intensity and the label `outside`. Intensities change in units of the patch's standard deviation.
    extra: [K, *S], turned, zoomed and shifted along, continued by its border; where it is given, it comes third.
    """
    axes = tuple(range(1, image.dim()))
    low = image.amin(axes, keepdim=True)
    scale = image.std(axes, keepdim=True).clamp(min=1e-6)
    image, mask = (image - low) / scale, label.float() - outside  # 0 is outside for both
    if random.random() < 0.9:
        # the slices of a patch turn together: to one 2-D grid they are channels
        rows, columns = image.shape[-2:]
        grid = F.affine_grid(_affine(rows, columns, random)[None], [1, 1, rows, columns], align_corners=False)

        def moved(x: Tensor, mode: str, outside: str = "zeros") -> Tensor:
            x_ = x.reshape(1, -1, rows, columns)
            return F.grid_sample(x_, grid, mode=mode, padding_mode=outside, align_corners=False).reshape(x.shape)

        image, mask = moved(image, "bilinear"), moved(mask, "nearest")
        extra = None if extra is None else moved(extra, "bilinear", "border")
    if random.random() < 0.5:
        image = image * random.uniform(0.85, 1.15)
    if random.random() < 0.5:
        image = image + random.uniform(-0.25, 0.25)
    if random.random() < 0.3:
        noise = torch.from_numpy(random.standard_normal(tuple(image.shape), dtype=np.float32))
        image = image + random.uniform(0.0, 0.1) * noise
    image, label = image * scale + low, (mask + outside).long()
    return (image, label) if extra is None else (image, label, extra)


def _affine(rows: int, columns: int, random: np.random.Generator) -> Tensor:
    """[2, 3] for `affine_grid`: a turn by up to 0.2 radians, a zoom by up to 12 % an axis, a shift by up to 5 % of the side."""
    angle, zoom, shift = random.uniform(-0.2, 0.2), random.uniform(0.88, 1.12, 2), random.uniform(-0.1, 0.1, 2)
    # normalised coordinates run from -1 to 1 over every side; the turn is one of voxels
    half = np.array([columns, rows]) / 2
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return torch.from_numpy(np.hstack([turn * zoom * half / half[:, None], shift[:, None]]).astype(np.float32))


def class_places(mask: np.ndarray, num_classes: int) -> dict[int, np.ndarray]:
    """{class: flat indices of its voxels in [D, H, W], evenly thinned} for the classes from 1 that are there.

    >>> class_places(np.array([[[0, 2], [2, 0]]]), 3)
    {2: array([1, 2])}
    """
    flat = mask.reshape(-1)
    labelled = np.flatnonzero(flat)
    values, places = flat[labelled], {}
    order = np.argsort(values, kind="stable")  # once, where a comparison a class takes seconds for a hundred of them
    counts = np.bincount(values, minlength=num_classes)
    ends = counts.cumsum()
    for c in np.flatnonzero(counts[:num_classes]).tolist():
        kept = np.linspace(0, counts[c] - 1, min(counts[c], VOXELS_KEPT)).round().astype(np.int64)
        places[c] = labelled[order[ends[c] - counts[c] + kept]]
    return places


def crop(volume: Volume, centre: Sequence[int], size: Sequence[int], outside: int) -> tuple[Tensor, Tensor]:
    """The patch (image [C, *size], label [1, *size] uint8) of a size around a voxel, filled where it leaves the volume."""
    inside, room = window_at(volume.image.shape[1:], centre, size)
    image, label = volume.image[inside], volume.mask[inside]
    if any(room):
        image = filled(image, room)
        label = F.pad(label, room, value=outside)
    return image, label


def crop_map(x: Tensor, centre: Sequence[int], size: Sequence[int]) -> Tensor:
    """The same patch of a map [K, D, H, W], as float32; where it leaves the map, its border goes on."""
    inside, room = window_at(x.shape[1:], centre, size)
    patch = x[inside].float()
    return F.pad(patch, room, mode="replicate") if any(room) else patch


def filled(image: Tensor, room: Sequence[int]) -> Tensor:
    """An image [..., *S] with room around it, as `F.pad` wants it, of every channel's lowest intensity."""
    lowest = image.amin(tuple(range(-(len(room) // 2), 0)), keepdim=True)
    return F.pad(image - lowest, room) + lowest


def window_at(shape: Sequence[int], centre: Sequence[int], size: Sequence[int]) -> tuple[tuple[slice, ...], list[int]]:
    """What of an array [C, *shape] a patch covers, and by how much it leaves it, as `F.pad` wants it."""
    inside, room = [slice(None)], []
    for c, n, p in zip(centre, shape, size, strict=True):
        start = int(c) - p // 2
        if n >= p:  # a patch that fits stays inside
            start = min(max(start, 0), n - p)
        low, high = max(start, 0), min(start + p, n)
        inside.append(slice(low, high))
        room = [low - start, start + p - high, *room]  # pad counts from the last axis
    return tuple(inside), room
