"""What every evaluated run gets: scores and pictures in its folder, its table on the screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medkd_fast.training.content import content_of
from medkd_fast.training.data.dataset import IGNORE, Dataset, open_dataset
from medkd_fast.training.data.prepare import Volume, prepare
from medkd_fast.training.errors import WrongUse
from medkd_fast.training.evaluate import Evaluation, evaluate
from medkd_fast.training.files import check_writable, read_json, slug, writing
from medkd_fast.training.networks import multiply_accumulates, parameter_count
from medkd_fast.training.pictures import Row, curves_figure, overlay_figure, save_png
from medkd_fast.training.runs import Trained, check_data, load_run
from medkd_fast.training.tables import Entry, caveats, print_scores

SIDES = ("test", "validation", "train", "all")


def evaluate_run(
    run: Path,
    data: str | None = None,
    *,
    layout: str | None = None,
    side: str = "test",
    protocol: str = "mm",
    out: Path | None = None,
) -> Evaluation:
    """Score a run's folder or a checkpoint on a side of its split, print the table, write scores and pictures.

    data: None takes the data set that it was trained on. out: None takes the run's folder, and of a checkpoint writes nothing;
    scores of other data, of another side or by another protocol have that in their names. Raises WrongUse where there is no
    run, nothing to score on, or no way to write; the table is printed before.
    """
    trained = load_run(run)
    dataset = dataset_of(trained, data, layout)
    names = cases_of(trained, dataset, side)
    folder = out or (run if run.is_dir() else None)
    words = [side, *([protocol] if protocol != "mm" else [])]
    if folder:  # before the work
        check_writable(folder)
        own = _is_own(trained, dataset)
        name, stem = (dataset.name, "-".join(["scores", *words])) if own else _free_name(dataset, folder, words)
    evaluation, seen, volumes = score(trained, dataset, names, protocol=protocol)
    print_scores({trained.name: entry_of(trained, evaluation)}, caveats([evaluation], notes_of(dataset, trained)))
    if not folder:
        print(f"{run} is a checkpoint: no scores are written; name a folder with --out")
        return evaluation
    with writing(folder):
        if own and words == ["test"]:
            finish_run(folder, trained, evaluation, {trained.name: seen}, volumes, dataset)
        else:
            where = {"data": name, "path": str(dataset.root.resolve())}
            evaluation.write(folder, stem, **(about(trained, dataset, side) | where))
    return evaluation


def _free_name(dataset: Dataset, folder: Path, words: Sequence[str]) -> tuple[str, str]:
    """What a data set is called in `folder`, and its scores: where other data have the name, parts of its path tell it apart.

    Raises WrongUse where they do not.
    """
    path = dataset.root.resolve()
    parts = [*path.parent.parts[1:], path.stem if path.suffix.lower() == ".csv" else path.name]
    for name in (dataset.name, *("/".join(parts[-n:]) for n in range(1, len(parts) + 1))):
        stem = "-".join(["scores", slug(name), *words])
        file = folder / f"{stem}.json"
        if not file.exists() or read_json(file).get("path") == str(path):
            return name, stem
    raise WrongUse(f"{file} holds the scores of other data: choose another --out")


def score(
    trained: Trained, dataset: Dataset, names: Sequence[str], *, protocol: str = "mm"
) -> tuple[Evaluation, dict[str, Tensor], dict[str, Volume]]:
    """The scores on some cases, the first predictions on their volumes' own grid, and the volumes.

    Runs on a GPU where there is one. Raises WrongUse where the data set is not what the network was trained for.
    """
    check_data(trained, dataset)
    volumes = prepare(dataset, trained.preprocessing, names)
    seen: dict[str, Tensor] = {}
    device = best_device()
    network = trained.network.to(device)
    evaluation = evaluate(network, dataset, volumes, patch=trained.patch, protocol=protocol, device=device, seen=seen)
    network.cpu()
    return evaluation, seen, volumes


def finish_run(
    folder: Path,
    trained: Trained,
    evaluation: Evaluation,
    seen: Mapping[str, Mapping[str, Tensor]],
    volumes: Mapping[str, Volume],
    dataset: Dataset,
) -> None:
    """Scores, overlay.png and, where there are logs, curves.png in a run's folder."""
    evaluation.write(folder, **about(trained, dataset, "test"))
    save_png(overlay_figure(overlay_rows(seen, volumes), trained.classes), folder / "overlay.png")
    if (folder / "logs").is_dir():
        save_png(curves_figure({folder.name: folder}), folder / "curves.png")


def dataset_of(trained: Trained, data: str | None, layout: str | None = None) -> Dataset:
    """The data set of this name, or without one that of the run. Raises WrongUse where it is not there, or no longer."""
    if data:
        return open_dataset(data, layout)
    try:
        return open_dataset(trained.config.data, layout or trained.config.layout)
    except WrongUse as error:
        raise WrongUse(f"the data that {trained.name} was trained on: {error}; name where they lie now") from error


def cases_of(trained: Trained, dataset: Dataset, side: str) -> tuple[str, ...]:
    """Names of the cases to score: of the run's split where it was trained on this data, else of the data set's own.

    Data that brings no split is all test. Raises WrongUse for an unknown side and where it has no case.
    """
    if side not in SIDES:
        raise WrongUse(f"unknown split {side!r}: choose from {', '.join(SIDES)}")
    labelled = tuple(c.name for c in dataset.labelled)
    split = trained.split if _is_own(trained, dataset) else dataset.split
    if side == "all" or (side == "test" and split is None):
        names = labelled
    else:
        names = tuple(getattr(split, side)) if split else ()
    if not names:
        raise WrongUse(f"{dataset.name} has no labelled {side} cases: choose another --split ({', '.join(SIDES)})")
    return names


def about(trained: Trained, dataset: Dataset, side: str) -> dict[str, Any]:
    """What stands in scores.json beside the scores."""
    return {
        "data": dataset.name,
        "split": side,
        "parameters": parameter_count(trained.network),
        "macs": macs_of(trained),
        "epochs": trained.epochs,
        "notes": notes_of(dataset, trained),
    }


def entry_of(trained: Trained, evaluation: Evaluation) -> Entry:
    """A network's column of the table, without what a step costs."""
    return Entry(evaluation, parameter_count(trained.network), macs_of(trained), costs={})


def macs_of(trained: Trained) -> int:
    """Multiply-accumulates of one slice or patch."""
    return multiply_accumulates(trained.network, (1, len(trained.channels), *trained.patch))


def overlay_rows(seen: Mapping[str, Mapping[str, Tensor]], volumes: Mapping[str, Volume]) -> list[Row]:
    """Of every case that all networks have seen, the slice with most labelled voxels. seen: {network: {case: [D, H, W]}}."""
    rows = []
    for case in next(iter(seen.values())):
        volume = volumes[case]
        assert volume.mask is not None
        mask = volume.mask[0].numpy()
        label = np.where(mask == IGNORE, 0, mask)
        z = int(np.argmax((label > 0).sum((1, 2))))
        masks = {"label": label[z]} | {name: of[case][z].numpy() for name, of in seen.items()}
        rows.append(Row(f"{case}, slice {z}", volume.image[0, z].numpy(), masks, volume.spacing[1] / volume.spacing[2]))
    return rows


def notes_of(dataset: Dataset, trained: Trained | None = None) -> list[str]:
    """What a data set says of itself, and whose weights were scored: without `trained` the last ones of several runs."""
    if trained and trained.named:
        return [*dataset.notes, f"Weights of the checkpoint {trained.checkpoint.name}."]
    return [*dataset.notes, "Last weights of each run; none was chosen by its test score."]


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _is_own(trained: Trained, dataset: Dataset) -> bool:
    """Whether a data set holds the very cases that a network's split names: it lies where theirs lay, or its files say so."""
    split = trained.split
    names = {*split.train, *split.validation, *split.test}
    if not names <= {c.name for c in dataset.cases}:
        return False
    return dataset.root.resolve() == Path(trained.config.data).resolve() or (
        trained.content is not None and content_of(dataset, sorted(names)) == trained.content
    )
