"""Everything that is wrong with a data set, found by reading all of it; `medkd-fast data` prints it."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from medkd_fast.training.bars import track
from medkd_fast.training.data.dataset import IGNORE, Case, Dataset
from medkd_fast.training.data.geometry import Geometry, same_grid
from medkd_fast.training.data.layouts import nnunet
from medkd_fast.training.data.prepare import class_of, crop_slices, intensity_of, known_values, unknown_values
from medkd_fast.training.data.read import Repaired, counts_of, read_images, read_label, shown, uneven
from medkd_fast.training.data.split import split_by_patient
from medkd_fast.training.errors import WrongUse

ERROR, WARNING = "error", "warning"


@dataclass(frozen=True)
class Finding:
    """level: "error" where nothing can be trained until it is mended, else "warning". case: its name, or "" for the whole."""

    level: str
    case: str
    message: str


@dataclass
class Facts:
    """What a case holds. size: (slices, rows, columns) and spacing (z, y, x) in mm, in LPS order. voxels: by class."""

    case: Case
    size: tuple[int, int, int] | None = None
    spacing: tuple[float, float, float] | None = None
    voxels: dict[int, int] = field(default_factory=dict)
    content: str = ""


@dataclass
class Report:
    """Facts of every case and all findings."""

    dataset: Dataset
    facts: list[Facts]
    findings: list[Finding]

    @property
    def trainable(self) -> bool:
        return not any(f.level == ERROR for f in self.findings)


def check(dataset: Dataset, *, progress: bool = True) -> Report:
    """Read every case and say what is wrong; nothing is raised for what is in the files."""
    facts, findings = [], []
    try:
        for case in track(dataset.cases, f"reading {dataset.name}", show=progress):
            of_case, wrong = _check_case(dataset, case)
            facts.append(of_case)
            findings += wrong
    finally:
        _read.cache_clear()
    return Report(dataset, facts, findings + list(_check_whole(dataset, facts)))


def print_report(report: Report) -> None:
    """Two tables (cases, classes), then the findings, errors first, and the verdict."""
    console, dataset = Console(soft_wrap=True), report.dataset
    console.print(
        f"{shown(dataset.name)}: layout {dataset.layout}, {len(dataset.cases)} cases of "
        f"{len({c.patient for c in dataset.cases})} patients, channels {', '.join(dataset.channels)}",
        highlight=False,
        markup=False,
    )
    sides = {n: side for side in ("train", "validation", "test") for n in getattr(dataset.split, side, ())}
    table = Table()
    for name in ("case", "patient", "split"):
        table.add_column(name)
    for name in ("voxels z y x", "mm z y x", "classes", "labelled voxels"):
        table.add_column(name, justify="right")
    for f in report.facts:
        labelled = {c: n for c, n in f.voxels.items() if c not in (0, IGNORE)}
        table.add_row(
            escape(shown(f.case.name)),
            escape(shown(f.case.patient)),
            sides.get(f.case.name, ""),
            " ".join(map(str, f.size)) if f.size else "-",
            " ".join(f"{s:.3g}" for s in f.spacing) if f.spacing else "-",
            " ".join(map(str, sorted(labelled))) if f.case.label else "no label",
            f"{sum(labelled.values()):,}" if f.case.label else "",
        )
    _print_wide(table)
    table = Table()
    table.add_column("class")
    for name in ("cases", "voxels", "share"):
        table.add_column(name, justify="right")
    everything = sum(n for f in report.facts for n in f.voxels.values())
    names = {0: "0 background"} | {c: f"{c} {name}" for c, name in dataset.classes.items()}
    if dataset.ignore_label is not None:
        names[dataset.ignore_label] = "ignored"
    for c, name in names.items():
        counts = [f.voxels[c] for f in report.facts if f.voxels.get(c)]
        share = f"{sum(counts) / everything:.2%}" if everything else "-"
        table.add_row(escape(name), str(len(counts)), f"{sum(counts):,}", share)
    _print_wide(table)
    for note in dataset.notes:
        console.print(shown(note), highlight=False, markup=False)
    for finding in sorted(report.findings, key=lambda f: f.level != ERROR):
        where = f"{finding.case}: " if finding.case else ""
        console.print(shown(f"{finding.level}: {where}{finding.message}"), highlight=False, markup=False)
    errors = sum(f.level == ERROR for f in report.findings)
    console.print(
        f"{errors} error{'s' * (errors > 1)}: not to be trained on until that is mended"
        if errors
        else "ready to be trained on",
        highlight=False,
    )


def _print_wide(table: Table) -> None:
    """A table squeezed into a narrow window or the 80 columns of a pipe is worse than long lines."""
    console = Console()
    needed = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    Console(width=max(console.width, needed)).print(table)


def _check_case(dataset: Dataset, case: Case) -> tuple[Facts, list[Finding]]:
    facts, findings = Facts(case), []

    def say(level: str, message: str) -> None:
        findings.append(Finding(level, case.name, message))

    try:
        channels, facts.content, finite, repairs = _read(case.images, case.reader)
    except WrongUse as error:
        say(ERROR, str(error))
        return facts, findings
    for repair in repairs:
        say(WARNING, repair)
    source = Geometry.of(channels[0])
    facts.size, facts.spacing = source.lps(source.size), source.lps(source.spacing)
    if case.slices is not None:
        facts.size = (case.slices[1] - case.slices[0] + 1, *facts.size[1:])
    if len(channels) != len(dataset.channels):
        say(
            ERROR,
            f"{len(channels)} channels, where the data set has {len(dataset.channels)} ({_list(dataset.channels)})",
        )
    for i, channel in enumerate(channels[1:], start=1):
        if not same_grid(Geometry.of(channel), source):
            say(ERROR, f"channel {i} ({Geometry.of(channel)}) lies on another grid than channel 0 ({source})")
    if not finite:
        say(WARNING, "the image holds values that are not finite: they are taken as 0")
    for i, (channel, name) in enumerate(zip_longest(channels, dataset.channels[: len(channels)], fillvalue="")):
        values = sitk.GetArrayViewFromImage(channel)
        if values.min() == values.max():
            say(WARNING, f"channel {i} holds the one value {values.min():g}")
        elif intensity_of(name) == "zscore" and (body := values[values != 0]).min() == body.max():
            say(
                WARNING,
                f"channel {i} holds 0 and {body.min():g} alone, as a mask does: a channel called noNorm keeps its values",
            )
    if case.images[0].is_dir() and (gap := uneven(case.images[0])):
        say(WARNING, gap)
    if case.label is None:
        say(WARNING, "no label: not trained on")
        return facts, findings
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", Repaired)
            label = read_label(case)
    except WrongUse as error:
        say(ERROR, str(error))
        return facts, findings
    for repair in caught:
        say(WARNING, str(repair.message))
    if same_grid(Geometry.of(label), source):
        source.stamp(label)  # as it is prepared
    else:
        say(
            ERROR,
            f"the image ({source}) and its label {case.label} ({Geometry.of(label)}) lie on different grids: resample the "
            "label to the image with nearest neighbour first",
        )
    counts = counts_of(sitk.GetArrayFromImage(crop_slices(sitk.DICOMOrient(label, "LPS"), case)))
    unknown = unknown_values(counts, dataset)
    for value, count in counts.items():
        c = class_of(value, dataset)
        facts.voxels[c] = facts.voxels.get(c, 0) + count
    if unknown:
        say(
            ERROR,
            f"the label {case.label} holds {_list(unknown)}, which the data set does not name: its labels are "
            f"{_list(known_values(dataset))}",
        )
    elif not any(c not in (0, IGNORE) for c in facts.voxels):
        say(WARNING, "the label holds background alone")
    return facts, findings


def _check_whole(dataset: Dataset, facts: list[Facts]) -> Iterator[Finding]:
    for name, count in dataset.repeated.items():
        yield Finding(ERROR, name, f"{count} cases have this name: every case needs one of its own")
    if dataset.layout == "nnunet":
        for path in nnunet.stray_labels(dataset):
            yield Finding(WARNING, "", f"the label {path} belongs to no image: call it as its image, without _0000")
    if not dataset.labelled:
        yield Finding(ERROR, "", "no case has a label: there is nothing to learn from")
        return
    for c, name in dataset.classes.items():
        if not any(f.voxels.get(c) for f in facts):
            yield Finding(WARNING, "", f"no label shows class {c} ({name}): it is in no score")
    by_content: dict[str, list[Facts]] = {}
    for f in facts:
        if f.content:
            by_content.setdefault(f"{f.content} {f.case.slices}", []).append(f)
    for same in by_content.values():
        if len(same) > 1:
            yield Finding(WARNING, same[0].case.name, f"the same image as {_list([f.case.name for f in same[1:]])}")
    if dataset.layout != "built-in":
        patients = {c.name: c.patient for c in dataset.cases}
        sides = [{patients[n] for n in getattr(dataset.split, s, ())} for s in ("train", "validation", "test")]
        for patient in sorted((sides[0] & sides[1]) | (sides[0] & sides[2]) | (sides[1] & sides[2])):
            yield Finding(WARNING, "", f"patient {patient} is on two sides of the split that the data set gives")
    try:
        split_by_patient(dataset)
    except WrongUse as error:
        yield Finding(ERROR, "", str(error))


@lru_cache(maxsize=1)  # the blocks of a built-in volume follow each other
def _read(images: tuple[Path, ...], reader: str) -> tuple[list[sitk.Image], str, bool, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", Repaired)
        channels = read_images(Case(images[0].name, "", images, reader=reader))
    content, finite = hashlib.sha256(), True
    for channel in channels:
        values = sitk.GetArrayViewFromImage(channel)
        content.update(np.ascontiguousarray(values))
        finite = finite and bool(np.isfinite(values).all())
    return channels, content.hexdigest(), finite, [str(w.message) for w in caught if issubclass(w.category, Repaired)]


def _list(items: Iterable[object]) -> str:
    """The first eight, and how many more."""
    words = [str(i) for i in items]
    return ", ".join(words[:8]) + (f" and {len(words) - 8} more" if len(words) > 8 else "")
