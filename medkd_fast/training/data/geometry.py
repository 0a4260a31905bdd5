"""Where voxels lie: grids in millimetres, resampling between them, and back. SimpleITK's order is x, y, z; arrays are z, y, x."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

SAME = 0.1  # voxels: how far apart the corners of two grids may lie that count as one


@dataclass(frozen=True)
class Geometry:
    """A grid in SimpleITK's order: size in voxels, spacing and origin in mm, direction row by row, x first."""

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]

    @classmethod
    def of(cls, image: sitk.Image) -> Geometry:
        return cls(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())

    def corners(self) -> np.ndarray:
        """Physical positions of the corner voxels' centres, [2^n, n] in mm."""
        n = len(self.size)
        indices = np.array(np.meshgrid(*[(0, s - 1) for s in self.size], indexing="ij")).reshape(n, -1)
        direction = np.array(self.direction).reshape(n, n)
        return (np.array(self.origin)[:, None] + direction @ (indices * np.array(self.spacing)[:, None])).T

    def lps(self, values: tuple) -> tuple:
        """The values of the image's axes, such as its size, in the order z, y, x that they have once it is oriented to LPS."""
        # DICOMOrient's own letters, one an image axis: two axes may lie nearest to the same one of the patient's
        letters = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(self.direction)
        return tuple(values[i] for pair in ("IS", "AP", "LR") for i, letter in enumerate(letters) if letter in pair)

    def stamp(self, image: sitk.Image) -> sitk.Image:
        """The image itself, now lying on this grid."""
        image.SetSpacing(self.spacing)
        image.SetOrigin(self.origin)
        image.SetDirection(self.direction)
        return image

    def __str__(self) -> str:
        numbers = [" x ".join(f"{v:.5g}" for v in values) for values in (self.size, self.spacing)]
        return f"{numbers[0]} voxels of {numbers[1]} mm, origin {tuple(round(o, 3) for o in self.origin)}"


def same_grid(a: Geometry, b: Geometry) -> bool:
    """Whether two grids have one size and their corners lie within a tenth of a voxel of each other."""
    if a.size != b.size:
        return False
    return float(np.abs(a.corners() - b.corners()).max()) <= SAME * min(*a.spacing, *b.spacing)


def resample(
    image: sitk.Image,
    *,
    spacing: Sequence[float | None] = (None, None, None),
    size: Sequence[int] | None = None,
    labels: bool = False,
) -> sitk.Image:
    """Resample to another spacing (z, y, x) over the same extent, the middles of both grids in one place.

    size: (rows, columns) in place of the y and x of `spacing`. An axis that keeps its spacing keeps its voxels. Where a
    spacing does not divide the extent, the new grid is the smallest that covers it.
    Images are smoothed to a coarser resolution and interpolated linearly; of labels the one is taken that has the largest share after
    the same. (The nearest neighbour of a new voxel between two old ones is the same side's everywhere, which moves all labels.)

    >>> small = resample(sitk.Image(8, 8, 3, sitk.sitkFloat32), size=(4, 4))
    >>> small.GetSize(), small.GetSpacing(), small.GetOrigin()
    ((4, 4, 3), (2.0, 2.0, 1.0), (0.5, 0.5, 0.0))
    """
    old_size, old_spacing = image.GetSize(), image.GetSpacing()
    new_spacing = [s or o for s, o in zip(reversed(spacing), old_spacing, strict=True)]
    if size is not None:
        for axis, count in enumerate(reversed(size)):
            new_spacing[axis] = old_size[axis] * old_spacing[axis] / count
    # a twentieth of a voxel more than whole voxels is rounding
    new_size = [max(1, math.ceil(n * o / s - 0.05)) for n, o, s in zip(old_size, old_spacing, new_spacing, strict=True)]
    if new_size == list(old_size) and np.allclose(new_spacing, old_spacing, rtol=1e-3):
        return image
    # the origin is the centre of the first voxel: put the middles of the grids, not the first voxels, in one place
    first = [
        (n - 1) / 2 - (m - 1) / 2 * s / o
        for n, m, s, o in zip(old_size, new_size, new_spacing, old_spacing, strict=True)
    ]
    origin = image.TransformContinuousIndexToPhysicalPoint(first)
    return (_largest_shares if labels else _smoothed)(image, new_size, new_spacing, origin)


def _smoothed(image: sitk.Image, size: Sequence[int], spacing: Sequence[float], origin: Sequence[float]) -> sitk.Image:
    """The image on another grid of its direction, x first; 0 outside of its own."""
    for axis, (count, old, new) in enumerate(zip(image.GetSize(), image.GetSpacing(), spacing, strict=True)):
        # the recursive filter needs four voxels
        if (sigma := _blur(old, new)) and count >= 4:
            image = sitk.RecursiveGaussian(image, sigma=sigma, direction=axis)
    return sitk.Resample(
        image,
        size,
        sitk.Transform(3, sitk.sitkIdentity),
        sitk.sitkLinear,
        origin,
        spacing,
        image.GetDirection(),
        0.0,
        image.GetPixelID(),
    )


def _blur(old: float, new: float) -> float:
    """Half of a new voxel's width, less what the old voxels have of it; 0 where that is next to nothing."""
    sigma = math.sqrt(max(new**2 - old**2, 0.0)) / 2
    return sigma if sigma > 0.2 * old else 0.0


def _largest_shares(
    labels: sitk.Image, size: Sequence[int], spacing: Sequence[float], origin: Sequence[float]
) -> sitk.Image:
    """The label of which every new voxel has most, the smallest of equals; the voxels of each are smoothed as an image."""
    values = sitk.GetArrayViewFromImage(labels)
    # beyond four deviations there is next to nothing of a label; and the filter needs four voxels
    room = [4 + math.ceil(4 * _blur(o, n) / o) for o, n in zip(labels.GetSpacing(), spacing, strict=True)]
    found = most = np.zeros(0)
    for i, value in enumerate(np.unique(values).tolist()):
        there = values == value
        box = []
        for axis, margin in zip(range(2, -1, -1), room, strict=True):
            along = np.flatnonzero(there.any(tuple({0, 1, 2} - {axis})))
            box.append(slice(max(int(along[0]) - margin, 0), int(along[-1]) + 1 + margin))
        part = sitk.Cast(labels[tuple(box)] == value, sitk.sitkFloat32)
        resampled = _smoothed(part, size, spacing, origin)
        shares = sitk.GetArrayViewFromImage(resampled)
        if i == 0:
            found, most = np.full(shares.shape, value, values.dtype), shares.copy()
        found[shares > most] = value
        np.maximum(most, shares, out=most)
    image = sitk.GetImageFromArray(found)
    image.CopyInformation(resampled)
    return image


def resample_onto(image: sitk.Image, grid: Geometry, *, labels: bool) -> sitk.Image:
    """The image on another grid; 0 outside of its own."""
    interpolator = sitk.sitkNearestNeighbor if labels else sitk.sitkLinear
    return sitk.Resample(
        image,
        grid.size,
        sitk.Transform(3, sitk.sitkIdentity),
        interpolator,
        grid.origin,
        grid.spacing,
        grid.direction,
        0.0,
        image.GetPixelID(),
    )
