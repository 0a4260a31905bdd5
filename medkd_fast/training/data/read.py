"""Files to images: whatever SimpleITK reads, DICOM folders, several channels in one file, headers with a bent direction."""

from __future__ import annotations

import gzip
import math
import os
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from medkd_fast.training.data.dataset import Case
from medkd_fast.training.data.geometry import Geometry
from medkd_fast.training.errors import WrongUse

NIFTI = (".nii", ".nii.gz")
ORTHONORMAL = 1e-4  # how far from the identity Dᵀ·D may be


class Repaired(UserWarning):
    """A file is not quite right and was put right in memory; the message says what and where."""


class Header(NamedTuple):
    """geometry: of the first channel, in 3-D. flat: the file is a 2-D image."""

    geometry: Geometry
    channels: int
    flat: bool = False


def read_images(case: Case) -> list[sitk.Image]:
    """One 3-D image a channel, in the files' own geometry. Raises WrongUse, naming the file that cannot be read."""
    return READERS[case.reader].images(case)


def read_label(case: Case) -> sitk.Image:
    """The label volume of a case that has one, in its file's own values and geometry."""
    return READERS[case.reader].label(case)


def read_header(case: Case) -> Header:
    """Geometry and number of channels of a case's images, without their voxels where the files allow that."""
    return READERS[case.reader].header(case)


def read_file(path: Path) -> sitk.Image:
    """One file, or one folder that holds a DICOM series; a direction that is not orthonormal is repaired with a warning."""
    name = utf8(path)
    if not path.exists():
        raise WrongUse(f"{path} is not there")
    if not whole(path):
        raise WrongUse(f"{path} is cut off or damaged: fetch it again")  # ITK would fill it up with anything
    try:
        return orthonormal(read_series(path) if path.is_dir() else sitk.ReadImage(name), path)
    except RuntimeError as error:
        if "orthonormal" in str(error) and path.name.lower().endswith(NIFTI):
            return _read_bent_nifti(path)
        raise WrongUse(f"{path} cannot be read as an image ({_reason(error)})") from error


def utf8(path: Path | str) -> str:
    """A path as SimpleITK takes it, which ends the whole process at a name that is not UTF-8. Raises WrongUse for that."""
    name = str(path)
    if shown(name) != name:
        raise WrongUse(f"the name {shown(name)} is not UTF-8: rename it")
    return name


def shown(text: str) -> str:
    """A text that can be printed: bytes of a file's name that are not UTF-8 as \\x and their number.

    >>> print(shown(os.fsdecode(b"M\\xfcller.nii.gz")))
    M\\xfcller.nii.gz
    """
    return os.fsencode(text).decode(errors="backslashreplace")


def read_series(folder: Path) -> sitk.Image:
    """The DICOM series in a folder, its slices sorted by position. Raises WrongUse where there is none or several."""
    files = series_files(folder)
    if len(files) == 1:  # one slice, or all of them in one file
        return sitk.ReadImage(files[0])
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(files)
    return reader.Execute()


def series_files(folder: Path) -> tuple[str, ...]:
    """Files of the one DICOM series in a folder, in the order of their positions."""
    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(utf8(folder))
    if len(series) != 1:
        found = f"{len(series)} DICOM series" if series else "no DICOM series"
        raise WrongUse(f"{folder} holds {found}: one folder must hold one series")
    return tuple(utf8(f) for f in sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0]))


def channels_of(image: sitk.Image) -> list[sitk.Image]:
    """The 3-D channels of an image: of vector pixels, of a 4th axis, or the image alone; a 2-D image becomes one slice."""
    if image.GetNumberOfComponentsPerPixel() > 1:
        parts = [sitk.VectorIndexSelectionCast(image, i) for i in range(image.GetNumberOfComponentsPerPixel())]
        return [channel for part in parts for channel in channels_of(part)]
    if image.GetDimension() == 2:
        return [sitk.JoinSeries(image)]
    if image.GetDimension() == 4:
        *size, count = image.GetSize()
        return [sitk.Extract(image, [*size, 0], [0, 0, 0, i]) for i in range(count)]
    return [image]


def orthonormal(image: sitk.Image, path: Path) -> sitk.Image:
    """The image itself, or, with a warning, with the rotation that is nearest to its direction."""
    n = image.GetDimension()
    direction = np.array(image.GetDirection()).reshape(n, n)
    if np.allclose(direction.T @ direction, np.eye(n), atol=ORTHONORMAL):
        return image
    image.SetDirection(nearest_rotation(direction).ravel().tolist())
    _warn_bent(path)
    return image


def nearest_rotation(matrix: np.ndarray) -> np.ndarray:
    """The orthonormal matrix nearest to a matrix (its polar factor), [n, n].

    >>> nearest_rotation(np.array([[1.0, 0.1], [0.1, 1.0]])).round(6) + 0.0
    array([[1., 0.],
           [0., 1.]])
    """
    left, _, right = np.linalg.svd(matrix)
    return left @ right


def counts_of(array: np.ndarray) -> dict[int | float, int]:
    """How often every value is in an array; much faster than sorting where they are few whole numbers.

    >>> counts_of(np.array([3, -1, 3]))
    {-1: 1, 3: 2}
    """
    if np.issubdtype(array.dtype, np.integer) and array.size:
        low, high = int(array.min()), int(array.max())
        if high - low < 1 << 16:
            flat = array.reshape(-1)
            if low or flat.dtype == np.uint64:  # bincount counts from 0, and takes no uint64
                flat = flat.astype(np.int64) - low
            counts = np.bincount(flat)
            return {int(i) + low: int(counts[i]) for i in np.flatnonzero(counts)}
    values, counts = np.unique(array, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def uneven(folder: Path) -> str:
    """What is wrong with the distances between the slices of a DICOM series; "" where they are equal to 1 %."""
    positions = []
    for file in series_files(folder):
        reader = sitk.ImageFileReader()
        reader.SetFileName(file)
        reader.ReadImageInformation()
        positions.append(reader.GetOrigin())
    steps = np.linalg.norm(np.diff(np.array(positions), axis=0), axis=1)
    if not len(steps) or np.allclose(steps, np.median(steps), rtol=0.01):
        return ""
    worst = int(np.abs(steps - np.median(steps)).argmax())
    return (
        f"slices are missing or unevenly spaced: {np.median(steps):.3g} mm apart, but {steps[worst]:.3g} mm between slices "
        f"{worst} and {worst + 1}; the volume is read as if they were even"
    )


def whole(path: Path) -> bool:
    """Whether a NIfTI file has all the bytes that its header asks for; of a compressed file, its checksum decides."""
    try:
        if is_gzip(path):
            with gzip.open(path) as file:
                while file.read(1 << 22):
                    pass
        elif path.name.lower().endswith(NIFTI):
            with path.open("rb") as file:
                header = file.read(348)
            if order := _byte_order(header):
                axes, *sizes = struct.unpack_from(f"{order}8h", header, 40)
                (bits,) = struct.unpack_from(f"{order}h", header, 72)
                (offset,) = struct.unpack_from(f"{order}f", header, 108)
                return path.stat().st_size >= offset + math.prod(sizes[:axes]) * bits // 8
    except (OSError, EOFError, zlib.error, struct.error):
        return False
    return True


def is_gzip(path: Path) -> bool:
    """Whether a file called .gz is compressed; some are not, and ITK reads them all the same."""
    if not path.name.lower().endswith(".gz"):
        return False
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _byte_order(header: bytes) -> str | None:
    """ "<" or ">" of a NIfTI-1 header, None of anything else."""
    return {348: "<", 0x5C010000: ">"}.get(struct.unpack_from("<I", header, 0)[0])


def _read_bent_nifti(path: Path) -> sitk.Image:
    """ITK refuses a NIfTI file whose axes are not at right angles: read a copy with the nearest rotation in its header."""
    data = path.read_bytes()
    header = bytearray(gzip.decompress(data) if is_gzip(path) else data)
    order = _byte_order(header)
    if order is None:
        raise WrongUse(f"{path} has axes that are not at right angles: write it anew as NIfTI-1")
    affine = np.array(struct.unpack_from(f"{order}12f", header, 280)).reshape(3, 4)  # srow_x, srow_y, srow_z
    spacing = np.linalg.norm(affine[:, :3], axis=0)
    affine[:, :3] = nearest_rotation(affine[:, :3] / spacing) * spacing
    struct.pack_into(f"{order}12f", header, 280, *affine.ravel())
    struct.pack_into(f"{order}3f", header, 80, *spacing)  # pixdim[1..3]
    struct.pack_into(f"{order}2h", header, 252, 0, 1)  # qform_code, sform_code: only the repaired form counts
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.nii"
        copy.write_bytes(header)
        image = sitk.ReadImage(str(copy))
    _warn_bent(path)
    return image


def _warn_bent(path: Path) -> None:
    warnings.warn(
        f"the axes of {path} are not at right angles: read with the nearest direction that is", Repaired, stacklevel=2
    )


def _reason(error: RuntimeError) -> str:
    """The last telling line of ITK's message, without the place in its sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[-1].startswith("Reason:"):  # MetaImage tells what the system could not do last, or long before
        return "it, or the file with its voxels, is cut off, damaged or not there"
    return lines[-1].removeprefix("ITK ERROR: ").removeprefix("sitk::ERROR: ").rstrip(".") if lines else "no reason"


def _images(case: Case) -> list[sitk.Image]:
    return [channel for path in case.images for channel in channels_of(read_file(path))]


def _label(case: Case) -> sitk.Image:
    channels = channels_of(read_file(case.label))
    if len(channels) != 1:
        raise WrongUse(f"the label {case.label} has {len(channels)} channels: one is wanted")
    return channels[0]


def _header(case: Case) -> Header:
    headers = [_header_of(path) for path in case.images]
    return headers[0]._replace(channels=sum(h.channels for h in headers))


def _header_of(path: Path) -> Header:
    if path.is_dir():
        return _series_header(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(utf8(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:  # read_file repairs it or says what is wrong
        image = read_file(path)
        channels = channels_of(image)
        return Header(Geometry.of(channels[0]), len(channels), image.GetDimension() == 2)
    n, parts = reader.GetDimension(), reader.GetNumberOfComponents()
    # an image of these dimensions without its voxels' memory is not to be had: the geometry is put together by hand
    direction = np.eye(3)
    direction[: min(n, 3), : min(n, 3)] = np.array(reader.GetDirection()).reshape(n, n)[:3, :3]
    geometry = Geometry(
        (*reader.GetSize(), 1)[:3],
        (*reader.GetSpacing(), 1.0)[:3],
        (*reader.GetOrigin(), 0.0)[:3],
        tuple((direction.ravel() + 0.0).tolist()),
    )
    return Header(geometry, parts * (reader.GetSize()[3] if n == 4 else 1), n == 2)


def _series_header(folder: Path) -> Header:
    """From the first and the last slice: a single slice's header does not know how far it is to the next."""
    files = series_files(folder)
    if len(files) == 1:
        return _header_of(Path(files[0]))
    ends = []
    for file in (files[0], files[-1]):
        reader = sitk.ImageFileReader()
        reader.SetFileName(file)
        reader.ReadImageInformation()
        ends.append(reader)
    first, last = ends
    spacing = list(first.GetSpacing()[:3])
    spacing[2] = float(np.linalg.norm(np.subtract(last.GetOrigin(), first.GetOrigin()))) / (len(files) - 1)
    size = (*first.GetSize()[:2], len(files))
    return Header(
        Geometry(size, tuple(spacing), first.GetOrigin(), first.GetDirection()), first.GetNumberOfComponents()
    )


class Reader(NamedTuple):
    """How the files of a case are understood."""

    images: Callable[[Case], list[sitk.Image]]
    label: Callable[[Case], sitk.Image]
    header: Callable[[Case], Header]


FILES = Reader(_images, _label, _header)
READERS = {"image": FILES}  # layouts with files of their own kind add theirs
