"""Synapse's abdominal CTs as TransUNet ships them: train_npz/*.npz (slices), test_vol_h5/*.npy.h5 (volumes), lists.

The intensities are windowed to [0, 1] already, and no spacing is stored: 1 mm is taken, so distances are in voxels, as that
script reports them.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from medkd_fast.training.data.dataset import Case, Dataset
from medkd_fast.training.data.geometry import Geometry
from medkd_fast.training.data.read import READERS, Header, Reader
from medkd_fast.training.data.settings import Preprocessing
from medkd_fast.training.data.split import Split
from medkd_fast.training.errors import WrongUse

# the order of TransUNet's labels
ORGANS = ("aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach")
SLICE = re.compile(r"(.+)_slice(\d+)")
LISTS = (".", "lists", "lists/lists_Synapse", "lists_Synapse")


def found(root: Path) -> bool:
    return (root / "train_npz").is_dir() or (root / "test_vol_h5").is_dir()


def open(root: Path) -> Dataset:
    slices: dict[str, dict[int, Path]] = {}
    for name in _listed(root, "train.txt") or [p.stem for p in sorted((root / "train_npz").glob("*.npz"))]:
        match = SLICE.fullmatch(name)
        if not match:
            raise WrongUse(f"{root}: the training slice {name!r} is not named like case0005_slice000")
        slices.setdefault(match[1], {})[int(match[2])] = root / "train_npz" / f"{name}.npz"
    train = []
    for name, of_case in sorted(slices.items()):
        files = tuple(of_case[i] for i in sorted(of_case))
        train.append(Case(name, name, files, files[0], "npz"))
    volumes = _listed(root, "test_vol.txt") or [p.name[:-7] for p in sorted((root / "test_vol_h5").glob("*.npy.h5"))]
    files = {name: root / "test_vol_h5" / f"{name}.npy.h5" for name in volumes}
    test = [Case(name, name, (file,), file, "h5") for name, file in files.items()]
    if not train and not test:
        raise WrongUse(f"{root} holds neither train_npz/*.npz nor test_vol_h5/*.npy.h5")
    notes = ["No spacing is stored in this layout: 1 mm is taken, and distances are in voxels."]
    notes += [
        f"{name}: {len(of_case)} slices numbered {min(of_case)} to {max(of_case)}, some are missing between: "
        "3-D patches would join slices that are no neighbours"
        for name, of_case in sorted(slices.items())
        if len(of_case) != max(of_case) - min(of_case) + 1
    ]
    return Dataset(
        name=root.resolve().name,
        root=root,
        layout="synapse",
        cases=(*train, *test),
        classes=dict(enumerate(ORGANS, start=1)),
        channels=("CT",),
        split=Split(tuple(c.name for c in train), test=tuple(c.name for c in test)) if train and test else None,
        defaults=Preprocessing(intensity=("none",)),
        notes=tuple(notes),
    )


def _listed(root: Path, name: str) -> list[str]:
    for folder in LISTS:
        path = root / folder / name
        if path.is_file():
            # some copies of the lists carry the files' endings
            return [line.strip().split(".")[0] for line in path.read_text().splitlines() if line.strip()]
    return []


def _npz(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file) as content:
            return {"image": content["image"], "label": content["label"]}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise WrongUse(f"{file} cannot be read as an npz file with image and label ({error})") from error


def _h5(file: Path) -> dict[str, np.ndarray]:
    try:
        import h5py
    except ImportError as error:
        raise WrongUse(
            f"{file} needs h5py: run `pip install h5py`, or install medkd_fast with the extra [synapse]"
        ) from error
    try:
        with h5py.File(file, "r") as content:
            return {"image": content["image"][:], "label": content["label"][:]}
    except (OSError, KeyError) as error:
        raise WrongUse(f"{file} cannot be read as an HDF5 file with image and label ({error})") from error


def _stack(case: Case, key: str) -> np.ndarray:
    """[D, H, W] of a case's npz slices or of its h5 volume."""
    if case.reader == "h5":
        return _h5(case.images[0])[key]
    slices = [_npz(file)[key] for file in case.images]
    if len({s.shape for s in slices}) != 1 or slices[0].ndim != 2:
        raise WrongUse(
            f"the slices of {case.name} have the shapes {sorted({s.shape for s in slices})}: one [H, W] is wanted"
        )
    return np.stack(slices)


def _images(case: Case) -> list[sitk.Image]:
    return [sitk.GetImageFromArray(_stack(case, "image").astype(np.float32))]


def _label(case: Case) -> sitk.Image:
    label = _stack(case, "label")
    whole = np.issubdtype(label.dtype, np.integer)
    return sitk.GetImageFromArray(label if whole else label.astype(np.float32))


def _header(case: Case) -> Header:
    depth, rows, columns = (
        _stack(case, "image").shape
        if case.reader == "h5"
        else (
            len(case.images),
            *_npz(case.images[0])["image"].shape,
        )
    )
    identity = tuple(np.eye(3).ravel().tolist())
    return Header(Geometry((columns, rows, depth), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), identity), 1)


READERS["npz"] = READERS["h5"] = Reader(_images, _label, _header)
