"""nnU-Net's raw data: dataset.json, imagesTr/CASE_0000.nii.gz (one file a channel), labelsTr/CASE.nii.gz; versions 1 and 2.

imagesTs with labelsTs, where they are there, are the test. Every case counts as a patient of its own, but for names such as
ACDC's patient001_frame01.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from medkd_fast.training.data.dataset import Case, Dataset
from medkd_fast.training.data.layouts import acdc
from medkd_fast.training.data.layouts.common import IMAGE_ENDINGS, dataset_json, named_channels, named_labels
from medkd_fast.training.data.split import Split
from medkd_fast.training.errors import WrongUse

CHANNEL = re.compile(r"(.+)_(\d{4})")


def found(root: Path) -> bool:
    info = dataset_json(root)
    return "channel_names" in info or ("modality" in info and any((root / "imagesTr").glob("*_0000.*")))


def open(root: Path) -> Dataset:
    info = dataset_json(root)
    names = info.get("channel_names") or info.get("modality")
    channels = named_channels(names, "channel_names", root / "dataset.json")
    classes, label_values, ignore_label = named_labels(info.get("labels", {}), root / "dataset.json")
    ending = info.get("file_ending", ".nii.gz")
    train = _listed(root, info) or _cases(root / "imagesTr", root / "labelsTr", ending)
    test = _cases(root / "imagesTs", root / "labelsTs", ending)
    if not train:
        raise WrongUse(f"{root / 'imagesTr'} holds no file like CASE_0000{ending}: see file_ending in dataset.json")
    scored = tuple(c.name for c in test if c.label)
    return Dataset(
        name=str(info.get("name") or root.resolve().name),
        root=root,
        layout="nnunet",
        cases=(*train, *test),
        classes=classes,
        channels=channels,
        ignore_label=ignore_label,
        label_values=label_values,
        split=Split(tuple(c.name for c in train if c.label), test=scored) if scored else None,
    )


def stray_labels(dataset: Dataset) -> list[Path]:
    """Label files that belong to no case: called otherwise than their image, or without one."""
    if "dataset" in dataset_json(dataset.root):  # which lists what it wants
        return []
    known = {c.label for c in dataset.cases}
    files = sorted(path for folder in ("labelsTr", "labelsTs") for path in (dataset.root / folder).glob("*"))
    return [p for p in files if p not in known and p.name.endswith(IMAGE_ENDINGS) and not p.name.startswith(".")]


def _listed(root: Path, info: dict[str, Any]) -> list[Case]:
    """The cases whose files dataset.json lists itself."""
    listed = info.get("dataset", {})
    if not isinstance(listed, dict) or not all(_is_entry(files) for files in listed.values()):
        raise WrongUse(
            f"{root / 'dataset.json'}: dataset must hold the files of every case by its name, for example "
            "{'a': {'images': ['imagesTr/a_0000.nii.gz'], 'label': 'labelsTr/a.nii.gz'}}"
        )
    return [
        Case(
            name,
            _patient(name),
            tuple(root / p for p in files["images"]),
            root / files["label"] if "label" in files else None,
        )
        for name, files in sorted(listed.items())
    ]


def _is_entry(files: Any) -> bool:
    if not isinstance(files, dict) or not isinstance(files.get("images"), list) or not files["images"]:
        return False
    return all(isinstance(p, str) for p in [*files["images"], files.get("label", "")])


def _patient(name: str) -> str:
    match = acdc.FRAME.fullmatch(name)
    return match[1] if match else name


def _cases(images: Path, labels: Path, ending: str) -> list[Case]:
    files: dict[str, dict[int, Path]] = {}
    for path in sorted(images.glob(f"*{ending}")):
        match = CHANNEL.fullmatch(path.name.removesuffix(ending))
        if match and not path.name.startswith("."):
            files.setdefault(match[1], {})[int(match[2])] = path
    cases = []
    for name, of_case in files.items():
        if set(of_case) != set(range(len(of_case))):
            raise WrongUse(
                f"{images}: case {name} has the channels {', '.join(f'{k:04d}' for k in sorted(of_case))}: they are counted "
                f"from 0000 without gaps; add the file that is missing, or take the case out"
            )
        label = labels / f"{name}{ending}"
        cases.append(
            Case(name, _patient(name), tuple(of_case[k] for k in sorted(of_case)), label if label.is_file() else None)
        )
    return cases
