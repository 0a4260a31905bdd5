"""A CSV file with a header: image,label and, where wanted, case, patient and split (train, validation, test).

Several channels are several columns, image_t1,image_t2,label. Paths are taken from the CSV file's folder. The names of the
classes come from classes.json beside it ({"1": "liver"}); without it the labels are read for their values.
"""

from __future__ import annotations

import csv
from pathlib import Path

from medkd_fast.training.data.dataset import Case, Dataset
from medkd_fast.training.data.layouts.common import classes_beside, stem
from medkd_fast.training.data.read import read_header
from medkd_fast.training.data.split import Split
from medkd_fast.training.errors import WrongUse

SIDES = {"train": "train", "training": "train", "val": "validation", "validation": "validation", "test": "test"}


def found(root: Path) -> bool:
    return root.is_file() and root.suffix.lower() == ".csv"


def open(root: Path) -> Dataset:
    if not root.is_file():
        raise WrongUse(f"{root} must be a CSV file")
    try:
        with root.open(newline="", encoding="utf-8-sig") as file:  # Excel puts a mark in front
            reader = csv.DictReader(file)
            header, rows = list(reader.fieldnames or []), list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise WrongUse(f"{root} cannot be read as a table ({error}): save it as CSV in UTF-8") from error
    columns = [c for c in header if c == "image" or c.startswith("image_")]
    if not columns or "label" not in header:
        raise WrongUse(f"the first line of {root} must name the columns image and label, got {header}")
    cases, sides, on_no_side = [], {}, []
    for line, row in enumerate(rows, start=2):
        cells = {k: (v or "").strip() for k, v in row.items() if k is not None}
        if not all(cells[c] for c in columns):
            raise WrongUse(
                f"line {line} of {root} has no file in the column {next(c for c in columns if not cells[c])}"
            )
        images = tuple(root.parent / cells[c] for c in columns)
        name = cells.get("case") or stem(images[0])
        label = root.parent / cells["label"] if cells["label"] else None
        cases.append(Case(name, cells.get("patient") or name, images, label))
        if cells.get("split"):
            if cells["split"].lower() not in SIDES:
                raise WrongUse(
                    f"line {line} of {root}: split must be train, validation or test, got {cells['split']!r}"
                )
            if label:
                sides.setdefault(SIDES[cells["split"].lower()], []).append(name)
        elif label:
            on_no_side.append(line)
    if not cases:
        raise WrongUse(f"{root} lists no case")
    if "train" in sides and on_no_side:
        raise WrongUse(
            f"{root} names training cases, and no split for the labels in its lines {', '.join(map(str, on_no_side[:8]))}"
            f"{', ...' if on_no_side[8:] else ''}: write train, validation or test there, or take these lines out"
        )
    classes, label_values, ignore_label = classes_beside(root.parent, cases)
    return Dataset(
        name=root.stem,
        root=root,
        layout="csv",
        cases=tuple(cases),
        classes=classes,
        channels=_channels(columns, cases[0]),
        ignore_label=ignore_label,
        label_values=label_values,
        split=Split(**{"train": (), **{side: tuple(names) for side, names in sides.items()}}) if sides else None,
    )


def _channels(columns: list[str], first: Case) -> tuple[str, ...]:
    """Named by the columns; the channels of a single file, such as a colour picture, by number."""
    try:
        count = read_header(first).channels
    except WrongUse:  # for `check` to say
        count = 1
    if len(columns) == 1 and count > 1:
        return tuple(f"{columns[0]} {i}" for i in range(count))
    return tuple(c.removeprefix("image_") for c in columns)
