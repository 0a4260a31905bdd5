"""What every finished run gets: scores and pictures in its folder, its table on the screen."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from medkd_fast.training.data import Slices, Split
from medkd_fast.training.evaluate import held_out_scores, write_scores
from medkd_fast.training.metrics import Summary
from medkd_fast.training.networks import multiply_accumulates, parameter_count
from medkd_fast.training.pictures import curves_png, overlay_png
from medkd_fast.training.runs import RunFolder, load_network
from medkd_fast.training.tables import Entry, caveats, print_scores


def evaluate_run(run: Path, slices: Slices, split: Split) -> dict[int, Summary]:
    """Score a run's folder (its last checkpoint) or a checkpoint, print the table; a folder keeps scores and pictures.

    Raises WrongUse where `run` is neither.
    """
    network = load_network(RunFolder(run).last if run.is_dir() else run)
    summaries = held_out_scores(network, slices, split)
    if run.is_dir():
        finish_run(run, network, summaries, slices, split)
    entries = {run.stem: Entry(summaries, parameter_count(network), slice_macs(network, slices), costs={})}
    print_scores(entries, caveats(entries, split))
    return summaries


def finish_run(folder: Path, network: nn.Module, summaries: dict[int, Summary], slices: Slices, split: Split) -> None:
    """scores.json, scores.csv, overlay.png and curves.png in a run's folder."""
    write_scores(folder, summaries)
    overlay_png(folder / "overlay.png", {folder.name: network}, slices, split)
    curves_png(folder / "curves.png", {folder.name: folder})


def slice_macs(network: nn.Module, slices: Slices) -> int:
    """Multiply-accumulates of one slice."""
    return multiply_accumulates(network, (1, *slices.images.shape[1:]))
