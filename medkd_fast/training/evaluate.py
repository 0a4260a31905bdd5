"""Scores of a network on the cases of a data set, on the grid of their own files: case by case, and their means.

Networks answer on the grid that volumes were prepared on. Their logits go back to the grid of the files, and are scored
there against the labels as they came: a finer or coarser preparation does not change what a network is judged by.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor, nn

from medkd_fast.training.bars import track
from medkd_fast.training.data.dataset import IGNORE, Case, Dataset
from medkd_fast.training.data.geometry import Geometry
from medkd_fast.training.data.prepare import Volume, source_label, to_source
from medkd_fast.training.errors import WrongUse
from medkd_fast.training.files import write_csv, write_json
from medkd_fast.training.inference import check_logits, predict_logits
from medkd_fast.training.metrics import (
    Scores,
    Summary,
    mean_scores,
    segmentation_scores,
    summarise,
    transunet_scores,
)

PROTOCOLS = {
    "mm": "distances in mm; HD95 is the larger of the two directed 95th percentiles; means over the cases whose label has "
    "the class, a missed one with Dice 0 and without distances",
    "transunet": "as TransUNet's test script: HD95 in voxels, pooled; a class that the prediction alone has counts with Dice 1 "
    "and HD95 0, a missed or absent one with Dice 0 and HD95 0",
}


@dataclass(frozen=True)
class Evaluation:
    """What a network scored. classes: {class: name}. cases: {case: {class: scores}}. protocol: a key of `PROTOCOLS`."""

    classes: Mapping[int, str]
    cases: Mapping[str, Mapping[int, Scores]]
    protocol: str = "mm"

    @property
    def summaries(self) -> dict[int, Summary]:
        """Means over the cases, class by class."""
        return summarise(self.cases.values(), every_volume=self.protocol == "transunet")

    @property
    def mean(self) -> Summary:
        """Means over the classes."""
        return mean_scores(self.summaries)

    def record(self) -> dict[str, Any]:
        """For scores.json: classes and mean by name, then every case."""
        return {
            "protocol": self.protocol,
            "classes": {self.classes[c]: s._asdict() for c, s in self.summaries.items()},
            "mean": self.mean._asdict(),
            "cases": {name: {self.classes[c]: s._asdict() for c, s in of.items()} for name, of in self.cases.items()},
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Evaluation:
        """What `record` gave, read back from JSON."""
        classes = dict(enumerate(record["classes"], 1))

        def scores(values: Mapping[str, Any]) -> Scores:
            return Scores(**{k: math.nan if v is None else v for k, v in values.items()})

        cases = {case: {c: scores(of[name]) for c, name in classes.items()} for case, of in record["cases"].items()}
        return cls(classes, cases, record["protocol"])

    def rows(self, **first: Any) -> list[dict[str, Any]]:
        """One row a class and one for the mean, the columns of `first` first; nan becomes an empty field."""
        rows = [{"class": self.classes[c], **s._asdict()} for c, s in self.summaries.items()]
        return [first | _without_nan(row) for row in [*rows, {"class": "mean", **self.mean._asdict()}]]

    def case_rows(self) -> list[dict[str, Any]]:
        """One row a case and class."""
        return [
            {"case": case, "class": self.classes[c], **_without_nan(scores._asdict())}
            for case, of_case in self.cases.items()
            for c, scores in of_case.items()
        ]

    def write(self, folder: Path, stem: str = "scores", **about: Any) -> None:
        """STEM.json (with `about`), STEM.csv (one row a class) and STEM-cases.csv (one row a case and class)."""
        write_json(folder / f"{stem}.json", about | self.record())
        write_csv(folder / f"{stem}.csv", self.rows())
        write_csv(folder / f"{stem}-cases.csv", self.case_rows())


def evaluate(
    network: nn.Module,
    dataset: Dataset,
    volumes: Mapping[str, Volume],
    *,
    patch: Iterable[int],
    protocol: str = "mm",
    device: torch.device | str = "cpu",
    seen: dict[str, Tensor] | None = None,
) -> Evaluation:
    """Run a network over prepared volumes and score it against the labels of their cases, on the files' own grid.

    patch: (H, W) of a network that takes slices, (D, H, W) of one that takes patches. seen: gets the first three
    predictions on the volumes' own grid, [D, H, W] uint8, for pictures.

    Raises WrongUse for an unknown protocol, for no volume at all, for a case without a label and for logits that are no
    numbers.
    """
    if protocol not in PROTOCOLS:
        raise WrongUse(f"unknown protocol {protocol!r}: choose from {', '.join(PROTOCOLS)}")
    if not volumes:
        raise WrongUse(f"{dataset.name}: no case to score: choose another --split")
    patch = tuple(patch)
    cases = {}
    for name, volume in track(volumes.items(), "evaluating"):
        case = dataset.case(name)
        if case.label is None:
            raise WrongUse(f"case {name} of {dataset.name} has no label to score against: predict it instead")
        logits = predict_logits(network, volume.image, dims=len(patch), patch=patch, device=device)
        check_logits(logits, name)
        if seen is not None and len(seen) < 3:
            seen[name] = logits.argmax(0).to(torch.uint8)
        prediction, label, spacing = on_source(logits, volume, dataset, case)
        if protocol == "transunet":
            cases[name] = transunet_scores(prediction, label, classes=dataset.classes)
        else:
            cases[name] = segmentation_scores(prediction, label, spacing=spacing, classes=dataset.classes)
    return Evaluation(dataset.classes, cases, protocol)


def on_source(
    logits: Tensor, volume: Volume, dataset: Dataset, case: Case
) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """Prediction and label of a case on the grid of its label's file, in LPS order, and the spacing in array order, in mm.

    A case that is a range of slices is cut to them. What is one slice, along any axis and in any file, is 2-D: as a volume all of
    it would be surface. Where the label says to ignore a voxel, both are background.
    """
    label = source_label(dataset, case)  # LPS, cut
    prediction = to_source(logits, replace(volume, source=Geometry.of(label), flat=False))
    p, y = sitk.GetArrayFromImage(prediction), sitk.GetArrayFromImage(label)
    p[y == IGNORE] = 0
    y[y == IGNORE] = 0
    spacing = tuple(reversed(label.GetSpacing()))
    if 1 not in y.shape:
        return p, y, spacing
    thin = y.shape.index(1)
    return p.squeeze(thin), y.squeeze(thin), spacing[:thin] + spacing[thin + 1 :]


def _without_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
