"""What every finished run gets: scores and pictures in its folder, its table on the screen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from medkd_fast.training.data import CLASSES, Slices, Split
from medkd_fast.training.evaluate import Evaluation
from medkd_fast.training.metrics import segmentation_scores
from medkd_fast.training.networks import multiply_accumulates, parameter_count
from medkd_fast.training.pictures import Row, curves_figure, overlay_figure, save_png
from medkd_fast.training.runs import RunFolder, load_network
from medkd_fast.training.tables import Entry, caveats, print_scores


def evaluate_run(run: Path, slices: Slices, split: Split) -> Evaluation:
    """Score a run's folder (its last checkpoint) or a checkpoint, print the table; a folder keeps scores and pictures.

    Raises WrongUse where `run` is neither.
    """
    network = load_network(RunFolder(run).last if run.is_dir() else run)
    evaluation = held_out_scores(network, slices, split)
    if run.is_dir():
        finish_run(run, network, evaluation, slices, split)
    entries = {run.stem: Entry(evaluation, parameter_count(network), slice_macs(network, slices), costs={})}
    print_scores(entries, caveats([evaluation], held_out_notes(split)))
    return evaluation


def finish_run(folder: Path, network: nn.Module, evaluation: Evaluation, slices: Slices, split: Split) -> None:
    """Scores, overlay.png and curves.png in a run's folder."""
    evaluation.write(folder)
    save_png(overlay_figure(overlay_rows({folder.name: network}, slices, split), CLASSES), folder / "overlay.png")
    save_png(curves_figure({folder.name: folder}), folder / "curves.png")


def held_out_scores(network: nn.Module, slices: Slices, split: Split) -> Evaluation:
    """Scores of the held-out blocks, each one 3-D volume."""
    cases = {
        f"block {number}": segmentation_scores(
            predict(network, slices, block), slices.labels[block, 0], spacing=slices.spacing, classes=CLASSES
        )
        for number, block in enumerate(split.held_out)
    }
    return Evaluation(CLASSES, cases)


@torch.no_grad()
def predict(network: nn.Module, slices: Slices, indices: list[int]) -> Tensor:
    """Class of every pixel of some slices, [len(indices), H, W] int64, one slice at a time."""
    network.eval()
    device = next(network.parameters()).device
    return torch.cat([network(slices.images[[i]].to(device)).argmax(1).cpu() for i in indices])


def overlay_rows(networks: Mapping[str, nn.Module], slices: Slices, split: Split) -> list[Row]:
    """The middle slice of every held-out block."""
    rows = []
    for index in (block[len(block) // 2] for block in split.held_out):
        masks = {"label": slices.labels[index, 0].numpy()}
        masks |= {name: predict(network, slices, [index])[0].numpy() for name, network in networks.items()}
        aspect = slices.spacing[1] / slices.spacing[2]
        rows.append(Row(f"slice {slices.first + index}", slices.images[index, 0].numpy(), masks, aspect))
    return rows


def held_out_notes(split: Split) -> list[str]:
    held_out = sum(len(block) for block in split.held_out)
    subject = (
        f"One subject (LIDC-IDRI-0001): {len(split.train)} slices trained on, {held_out} held out in {len(split.held_out)} "
        "blocks with a gap beside each. Nothing here speaks for other subjects."
    )
    return [subject, "Last weights of each run; none was chosen by its held-out score."]


def slice_macs(network: nn.Module, slices: Slices) -> int:
    """Multiply-accumulates of one slice."""
    return multiply_accumulates(network, (1, *slices.images.shape[1:]))
