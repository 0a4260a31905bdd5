"""Scores of a network on the held-out blocks, each block one volume."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medkd_fast.training.data import CLASSES, Slices, Split
from medkd_fast.training.files import write_csv, write_json
from medkd_fast.training.metrics import Summary, mean_scores, segmentation_scores, summarise


@torch.no_grad()
def predict(network: nn.Module, slices: Slices, indices: list[int]) -> Tensor:
    """Class of every pixel of some slices, [len(indices), H, W] int64, one slice at a time."""
    network.eval()
    device = next(network.parameters()).device
    return torch.cat([network(slices.images[[i]].to(device)).argmax(1).cpu() for i in indices])


def held_out_scores(network: nn.Module, slices: Slices, split: Split) -> dict[int, Summary]:
    """Per class of `CLASSES`: means over the held-out blocks, in mm, each block scored as one 3-D volume."""
    return summarise(
        segmentation_scores(
            predict(network, slices, block), slices.labels[block, 0], spacing=slices.spacing, classes=CLASSES
        )
        for block in split.held_out
    )


def scores_record(summaries: Mapping[int, Summary]) -> dict[str, Any]:
    """The summaries by class name, and the mean over the classes that the labels have, for metrics.json."""
    return {
        "classes": {CLASSES[c]: s._asdict() for c, s in summaries.items()},
        "mean": mean_scores(summaries)._asdict(),
    }


def scores_rows(summaries: Mapping[int, Summary], **first: Any) -> list[dict[str, Any]]:
    """One row a class and one for the mean, for metrics.csv, the columns of `first` first; nan becomes an empty field."""
    rows = [{"class": CLASSES[c], **s._asdict()} for c, s in summaries.items()]
    rows.append({"class": "mean", **mean_scores(summaries)._asdict()})
    return [first | {k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows]


def write_scores(folder: Path, summaries: Mapping[int, Summary]) -> None:
    """scores.json and scores.csv in a run's folder."""
    write_json(folder / "scores.json", scores_record(summaries))
    write_csv(folder / "scores.csv", scores_rows(summaries))
