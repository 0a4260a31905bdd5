"""ACDC: patientXXX_frameYY.nii.gz with patientXXX_frameYY_gt.nii.gz, in one folder or one a patient.

Two frames of a patient (end of diastole, end of systole) stay on one side of a split. Patients below a folder "testing" are
the test.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from medkd_fast.training.data.dataset import Case, Dataset
from medkd_fast.training.data.layouts.common import files_below, stem
from medkd_fast.training.data.split import Split
from medkd_fast.training.errors import WrongUse

FRAME = re.compile(r"(patient\d+)_frame\d+")
CLASSES = {1: "right ventricle", 2: "myocardium", 3: "left ventricle"}


def found(root: Path) -> bool:
    return root.is_dir() and next(_frames(root), None) is not None


def open(root: Path) -> Dataset:
    cases, test = [], []
    for path, patient in sorted(_frames(root)):
        name = stem(path)
        label = path.with_name(path.name.replace(name, f"{name}_gt", 1))
        cases.append(Case(name, patient, (path,), label if label.is_file() else None))
        if "testing" in path.relative_to(root).parts and label.is_file():
            test.append(name)
    if not cases:
        raise WrongUse(f"{root} holds no file like patient001_frame01.nii.gz")
    train = tuple(c.name for c in cases if c.label and c.name not in test)
    return Dataset(
        name=root.resolve().name,
        root=root,
        layout="acdc",
        cases=tuple(cases),
        classes=CLASSES,
        channels=("MR",),
        split=Split(train, test=tuple(test)) if test and train else None,
    )


def _frames(root: Path) -> Iterator[tuple[Path, str]]:
    for path in files_below(root):
        match = FRAME.fullmatch(stem(path))
        if match and path.name.lower().endswith((".nii", ".nii.gz")):
            yield path, match[1]
