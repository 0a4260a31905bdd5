"""overlay.png (a held-out slice as label and networks see it) and curves.png (loss and held-out Dice over the steps)."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import nn

from medkd_fast.training.data import CLASSES, Slices, Split
from medkd_fast.training.evaluate import predict
from medkd_fast.training.files import write_atomically

# Okabe and Ito's palette, told apart by colour-blind readers too, with grey and violet
COLOURS = np.array(
    [
        [230, 159, 0],
        [86, 180, 233],
        [0, 158, 115],
        [150, 150, 150],
        [213, 94, 0],
        [240, 228, 66],
        [204, 121, 167],
        [100, 60, 200],
    ]
)
LINES = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7")


def overlay_png(path: Path, networks: Mapping[str, nn.Module], slices: Slices, split: Split) -> None:
    """The middle slice of every held-out block: the CT, its label and every network's prediction, one column each."""
    rows = [block[len(block) // 2] for block in split.held_out]
    titles = ["CT", "label", *networks]
    figure = Figure(figsize=(2.4 * len(titles), 2.4 * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    _, between_rows, between_columns = slices.spacing
    for row, index in zip(axes, rows, strict=True):
        image = slices.images[index, 0].numpy()
        masks = [np.zeros_like(image, dtype=int), slices.labels[index, 0].numpy()]
        masks += [predict(network, slices, [index])[0].numpy() for network in networks.values()]
        for axis, mask in zip(row, masks, strict=True):
            axis.imshow(_blend(image, mask), aspect=between_rows / between_columns, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"slice {slices.first + index}")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    present = [c for c in CLASSES if (slices.labels == c).any()]
    figure.legend(
        handles=[Patch(color=COLOURS[c - 1] / 255, label=CLASSES[c]) for c in present],
        loc="outside lower center",
        ncols=min(len(present), 2 * len(titles)),
        frameon=False,
    )
    write_atomically(path, lambda p: figure.savefig(p, dpi=110))


def curves_png(path: Path, runs: Mapping[str, Path]) -> None:
    """Training loss (running mean) and mean Dice on the held-out blocks of every run folder."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, folder), colour in zip(runs.items(), LINES * len(runs), strict=False):
        steps, losses = read_curve(folder, "task")
        if len(losses) > 9:
            left.plot(steps[4:-4], np.convolve(losses, np.ones(9) / 9, mode="valid"), color=colour, label=name)
        else:
            left.plot(steps, losses, color=colour, label=name)
        right.plot(*read_curve(folder, "val_dice"), color=colour, label=name, marker=".")
    left.set(xlabel="step", ylabel="Dice + cross-entropy (training)", yscale="log")
    right.set(xlabel="step", ylabel="mean Dice (held-out blocks)", ylim=(0, 1))
    for axis in (left, right):
        axis.grid(alpha=0.3)
    right.legend(frameon=False)
    write_atomically(path, lambda p: figure.savefig(p, dpi=110))


def read_curve(folder: Path, column: str) -> tuple[Sequence[int], Sequence[float]]:
    """(steps, values) of one column of a run's logs; where two attempts logged a step, the later one counts."""
    values: dict[int, float] = {}
    attempts = (folder / "logs").glob("version_*/metrics.csv")
    for file in sorted(attempts, key=lambda p: int(p.parent.name.removeprefix("version_"))):
        with file.open(newline="") as lines:
            for row in csv.DictReader(lines):
                if row.get(column):
                    values[int(row["step"])] = float(row[column])
    steps = sorted(values)
    return steps, [values[s] for s in steps]


def _blend(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A grey image [H, W] in [0, 1] with its classes in colour, [H, W, 3] uint8."""
    grey = np.repeat(image[..., None] * 255, 3, axis=-1)
    colour = COLOURS[np.maximum(mask, 1) - 1]
    return np.where((mask > 0)[..., None], 0.4 * grey + 0.6 * colour, grey).astype(np.uint8)
