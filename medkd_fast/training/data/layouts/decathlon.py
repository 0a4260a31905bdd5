"""Medical Segmentation Decathlon: dataset.json lists image and label files; an image with several channels is 4-D."""

from __future__ import annotations

from pathlib import Path

from medkd_fast.training.data.dataset import Case, Dataset
from medkd_fast.training.data.layouts.common import dataset_json, named_channels, named_labels, stem
from medkd_fast.training.errors import WrongUse


def found(root: Path) -> bool:
    info = dataset_json(root)
    return "training" in info and "modality" in info


def open(root: Path) -> Dataset:
    info = dataset_json(root)
    channels = named_channels(info.get("modality"), "modality", root / "dataset.json")
    training = info.get("training")
    if not isinstance(training, list) or not training:
        raise WrongUse(f"{root / 'dataset.json'} needs training, a list of objects with image and label")
    classes, label_values, ignore_label = named_labels(info.get("labels", {}), root / "dataset.json")
    try:
        cases = [_case(root, pair["image"], pair["label"]) for pair in training]
        cases += [_case(root, image if isinstance(image, str) else image["image"]) for image in info.get("test", [])]
    except (TypeError, KeyError) as error:
        raise WrongUse(f"{root / 'dataset.json'}: training must list objects with image and label") from error
    return Dataset(
        name=str(info.get("name") or root.resolve().name),
        root=root,
        layout="decathlon",
        cases=tuple(cases),
        classes=classes,
        channels=channels,
        ignore_label=ignore_label,
        label_values=label_values,
    )


def _case(root: Path, image: str, label: str | None = None) -> Case:
    name = stem(image)
    return Case(name, name, (root / image,), root / label if label else None)
