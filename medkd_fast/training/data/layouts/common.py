"""What several layouts need: names of files, dataset.json, and the classes of data sets that do not list them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import SimpleITK as sitk

from medkd_fast.training.bars import track
from medkd_fast.training.data import cache as store_of
from medkd_fast.training.data.dataset import IGNORE, Case
from medkd_fast.training.data.read import counts_of, read_label
from medkd_fast.training.errors import WrongUse
from medkd_fast.training.files import read_json, write_json

MOST_CLASSES = 254  # prepared labels are bytes, and 255 is the ignored voxel
IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".png", ".tif", ".tiff")


def stem(path: Path | str) -> str:
    """A file's name without its ending, which may have two parts.

    >>> stem("labels/case.01.nii.gz")
    'case.01'
    """
    name = Path(path).name
    for ending in IMAGE_ENDINGS:
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return Path(name).stem


def files_below(root: Path) -> Iterator[Path]:
    """All files below a folder, linked folders included; a folder that is reached twice counts once, without the link."""
    seen: set[Path] = set()
    folders = [root]
    while folders:
        for folder, inside, names in os.walk(folders.pop()):  # which follows no link
            place = Path(folder).resolve()
            if place in seen:
                inside.clear()
                continue
            seen.add(place)
            folders += [path for name in inside if (path := Path(folder, name)).is_symlink()]
            yield from (path for name in names if (path := Path(folder, name)).is_file())


def dataset_json(root: Path) -> dict[str, Any]:
    """What dataset.json in a folder says; nothing where there is none. Raises WrongUse where it is no JSON object."""
    path = root / "dataset.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WrongUse(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise WrongUse(f"{path} must hold an object with labels and channel names, got {type(found).__name__}")
    return found


def named_labels(labels: Mapping[str, Any], where: Path) -> tuple[dict[int, str], dict[int, int], int | None]:
    """(classes, label_values, ignore_label) of a table of labels, {name: value} or {value: name}.

    The values in the files may have gaps: classes are counted from 1 in their order. A label named "ignore" is left out of
    losses and scores. Raises WrongUse for regions (a name with several values), for a name that two classes have and for a
    background that is not 0.

    >>> named_labels({"background": 0, "liver": 2, "tumour": 5, "ignore": 6}, Path("dataset.json"))
    ({1: 'liver', 2: 'tumour'}, {0: 0, 2: 1, 5: 2, 6: 255}, 255)
    """
    if not isinstance(labels, Mapping) or not labels:
        raise WrongUse(f"{where} names no labels: write, for example, {{'background': 0, 'liver': 1}}")
    by_value = all(isinstance(v, str) and str(k).isdigit() for k, v in labels.items())
    names: dict[int, str] = {}
    for name, value in [(v, k) for k, v in labels.items()] if by_value else labels.items():
        if isinstance(value, list | tuple):
            raise WrongUse(
                f"{where}: the label {name!r} is a region of the values {list(value)}; regions overlap and are not supported: "
                "name every value by itself, for example 'oedema': 1, 'core': 2"
            )
        if isinstance(value, bool) or not str(value).isdigit():
            raise WrongUse(f"{where}: the label {name!r} must be a whole number >= 0, got {value!r}")
        if int(value) in names:
            raise WrongUse(f"{where}: the value {value} is both {names[int(value)]!r} and {name!r}")
        names[int(value)] = str(name)
    classes, label_values, ignore_label = {}, {0: 0}, None
    for value, name in sorted(names.items()):
        if value == 0:
            continue
        if name.casefold() == "background":
            raise WrongUse(
                f"{where}: the background must be 0, got {value}: the files need other values, or {value} another name"
            )
        if name in classes.values():
            raise WrongUse(f"{where}: two values are called {name!r}: every class needs a name of its own")
        if name.casefold() == "ignore":
            label_values[value], ignore_label = IGNORE, IGNORE
        else:
            classes[len(classes) + 1] = name
            label_values[value] = len(classes)
    if not classes:
        raise WrongUse(f"{where} names no label besides the background: there is nothing to segment")
    if len(classes) > MOST_CLASSES:
        raise WrongUse(f"{where} names {len(classes)} labels: at most {MOST_CLASSES} are possible")
    return classes, label_values, ignore_label


def named_channels(channels: Any, key: str, where: Path) -> tuple[str, ...]:
    """Names in the order of their numbers, of the table {number: name} that stands under a key of dataset.json.

    >>> named_channels({"1": "T2", "0": "T1"}, "modality", Path("dataset.json"))
    ('T1', 'T2')
    """
    if not isinstance(channels, dict) or not channels or not all(k.isdecimal() for k in channels):
        raise WrongUse(f"{where} needs {key}, numbers with their names, for example {{'0': 'CT'}}, got {channels!r}")
    return tuple(str(channels[k]) for k in sorted(channels, key=int))


def classes_beside(folder: Path, cases: Iterable[Case]) -> tuple[dict[int, str], dict[int, int], int | None]:
    """(classes, label_values, ignore_label) from classes.json in the folder, else from the values in the label files.

    classes.json: {"1": "liver", "2": "tumour"}. Without it every label is read once; what was found is remembered.
    """
    path = folder / "classes.json"
    if path.is_file():
        try:
            return named_labels(json.loads(path.read_text()), path)
        except ValueError as error:
            if isinstance(error, WrongUse):
                raise
            raise WrongUse(f"{path} cannot be read as JSON ({error})") from error
    values: set[int] = set()
    unread: list[WrongUse] = []  # for `check` to say, where the other labels tell the classes
    for case in track([c for c in cases if c.label is not None], "reading labels"):
        try:
            values |= set(_values_in(case))
        except WrongUse as error:
            unread.append(error)
        if len(values) > MOST_CLASSES:
            raise WrongUse(f"{case.label} and those before it hold {len(values)} different values: is it a label?")
    if values <= {0} and unread:
        raise unread[0]
    if values <= {0}:
        raise WrongUse(f"no label below {folder} holds anything besides 0: there is nothing to segment")
    return named_labels({str(v): f"label {v}" for v in sorted(values)}, folder)


def _values_in(case: Case) -> list[int]:
    """Whole numbers >= 0 in a label file; what else it holds is for `check` to say. Raises WrongUse where it cannot be read."""
    if not case.label.exists():
        raise WrongUse(f"{case.label} is not there")
    cache = store_of.default_cache()
    note = cache / "values" / f"{store_of.digest_of_content(case.label, cache)}.json"
    try:
        return read_json(note)
    except (OSError, ValueError):  # not there, or damaged
        pass
    found = counts_of(sitk.GetArrayFromImage(read_label(case)))
    values = [int(v) for v in found if v >= 0 and float(v).is_integer()]
    try:
        write_json(note, values)
    except OSError as error:
        raise store_of.not_writable(note.parent, error) from error
    return values
