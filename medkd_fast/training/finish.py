"""What every evaluated run gets: scores and pictures in its folder, its table on the screen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from medkd_fast.training.data.dataset import Dataset, open_dataset
from medkd_fast.training.data.prepare import Volume, prepare
from medkd_fast.training.errors import WrongUse
from medkd_fast.training.evaluate import Evaluation, evaluate
from medkd_fast.training.networks import multiply_accumulates, parameter_count
from medkd_fast.training.pictures import Row, curves_figure, overlay_figure, save_png
from medkd_fast.training.runs import Trained, load_run
from medkd_fast.training.tables import Entry, caveats, print_scores


def evaluate_run(run: Path, data: str | None = None, *, side: str = "test") -> Evaluation:
    """Score a run's folder or a checkpoint on a side of its split and print the table; a folder keeps scores and pictures.

    data: None takes the data set that it was trained on. Raises WrongUse where there is no run, or nothing to score on.
    """
    trained = load_run(run)
    dataset = open_dataset(data or trained.config.data, trained.config.layout)
    names = getattr(trained.split, side)
    if not names:
        raise WrongUse(f"{run} has no {side} cases: choose another --split")
    volumes = prepare(dataset, trained.preprocessing, names)
    seen: dict[str, Tensor] = {}
    evaluation = evaluate(trained.network, dataset, volumes, patch=trained.patch, seen=seen)
    if run.is_dir():
        finish_run(run, trained, evaluation, {trained.name: seen}, volumes)
    print_scores({trained.name: entry_of(trained, evaluation)}, caveats([evaluation], notes_of(dataset)))
    return evaluation


def finish_run(
    folder: Path,
    trained: Trained,
    evaluation: Evaluation,
    seen: Mapping[str, Mapping[str, Tensor]],
    volumes: Mapping[str, Volume],
) -> None:
    """Scores, overlay.png and, where there are logs, curves.png in a run's folder."""
    evaluation.write(folder)
    save_png(overlay_figure(overlay_rows(seen, volumes), trained.classes), folder / "overlay.png")
    save_png(curves_figure({folder.name: folder}), folder / "curves.png")


def entry_of(trained: Trained, evaluation: Evaluation) -> Entry:
    """A network's column of the table, without what a step costs."""
    shape = (1, len(trained.channels), *trained.patch)
    macs = multiply_accumulates(trained.network, shape)
    return Entry(evaluation, parameter_count(trained.network), macs, costs={})


def overlay_rows(seen: Mapping[str, Mapping[str, Tensor]], volumes: Mapping[str, Volume]) -> list[Row]:
    """Of every case that all networks have seen, the slice with most labelled voxels. seen: {network: {case: [D, H, W]}}."""
    rows = []
    for case in next(iter(seen.values())):
        volume = volumes[case]
        assert volume.mask is not None
        label = volume.mask[0].numpy()
        z = int(np.argmax((label > 0).sum((1, 2))))
        masks = {"label": label[z]} | {name: of[case][z].numpy() for name, of in seen.items()}
        rows.append(Row(f"{case}, slice {z}", volume.image[0, z].numpy(), masks, volume.spacing[1] / volume.spacing[2]))
    return rows


def notes_of(dataset: Dataset) -> list[str]:
    return [*dataset.notes, "Last weights of each run; none was chosen by its test score."]
