"""DICOM series, one folder a series, with a label beside it: CASE.nii.gz beside CASE/, or one such file in the folder.

The first folder below the root names the patient. The names of the classes come from classes.json in the root
({"1": "liver"}); without it the labels are read for their values.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import SimpleITK as sitk

from medkd_fast.training.data.dataset import Case, Dataset
from medkd_fast.training.data.layouts.common import classes_beside, files_below
from medkd_fast.training.data.read import utf8
from medkd_fast.training.errors import WrongUse

LABELS = (".nii.gz", ".nii", ".nrrd", ".mha")
LOOKED_AT = 1000  # files, before a folder counts as one without DICOM
MODALITY = "0008|0060"


def found(root: Path) -> bool:
    return root.is_dir() and any(is_dicom(p) for p in islice(_files(root), LOOKED_AT))


def open(root: Path) -> Dataset:
    folders = sorted({p.parent for p in _files(root) if is_dicom(p)})
    if not folders:
        raise WrongUse(f"no folder below {root} holds DICOM files")
    cases = [_case(root, folder) for folder in folders]
    if not any(c.label for c in cases):
        classes, label_values, ignore_label = {}, None, None
    else:
        classes, label_values, ignore_label = classes_beside(root, cases)
    return Dataset(
        name=root.resolve().name,
        root=root,
        layout="dicom",
        cases=tuple(cases),
        classes=classes,
        channels=(modality(folders[0]),),
        ignore_label=ignore_label,
        label_values=label_values,
    )


def is_dicom(path: Path) -> bool:
    """Whether a file says that it is DICOM, by its mark at byte 128 or, for the files without, by its ending."""
    if path.name.upper() == "DICOMDIR":  # has the mark, but no image: it lists the files of a disc
        return False
    if path.suffix.lower() in (".dcm", ".ima"):
        return True
    try:
        with path.open("rb") as file:  # whatever its ending: that of a file called by its UID is a number
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def modality(folder: Path) -> str:
    """What the first file says it is: CT, MR, ..."""
    reader = sitk.ImageFileReader()
    try:
        reader.SetFileName(utf8(next(p for p in sorted(folder.iterdir()) if p.is_file() and is_dicom(p))))
        reader.ReadImageInformation()
    except (RuntimeError, WrongUse):  # for `check` to say
        return "image"
    return reader.GetMetaData(MODALITY).strip() if reader.HasMetaDataKey(MODALITY) else "image"


def _files(root: Path) -> Iterator[Path]:
    return (p for p in files_below(root) if not p.name.startswith("."))


def _case(root: Path, folder: Path) -> Case:
    parts = folder.relative_to(root).parts or (root.resolve().name,)
    beside = [folder.parent / f"{folder.name}{ending}" for ending in LABELS]
    inside = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name.lower().endswith(LABELS)]
    labels = [p for p in beside if p.is_file()] + inside
    if len(labels) > 1:
        raise WrongUse(f"{folder} has several labels ({', '.join(str(p) for p in labels)}): one is wanted")
    return Case("_".join(parts), parts[0], (folder,), labels[0] if labels else None)
