"""Figures: slices as label and networks see them, curves of training, scores class by class. As PNG or as SVG for a page."""

from __future__ import annotations

import csv
import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from medkd_fast.training.data.layouts.common import MOST_CLASSES
from medkd_fast.training.files import write_atomically

# Okabe and Ito's palette, told apart by colour-blind readers too, with grey and violet
FIRST_COLOURS = np.array(
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
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6a3dc8", "#8c8c8c")
INK = "#0d0d0d"  # of everything that is no data: a page replaces it by its own text colour


@dataclass(frozen=True)
class Row:
    """One slice of an overlay. image: [H, W], any range. masks: {column: [H, W] classes}. aspect: height of a pixel to its width."""

    title: str
    image: np.ndarray
    masks: Mapping[str, np.ndarray]
    aspect: float = 1.0


def overlay_figure(rows: Sequence[Row], classes: Mapping[int, str]) -> Figure:
    """Every row's image alone, then with each of its masks; the classes that show are named below."""
    titles = ["image", *rows[0].masks]
    present = [c for c in classes if any((mask == c).any() for row in rows for mask in row.masks.values())]
    width = 2.4 * len(titles)
    # what the longest name takes of the legend, in inches
    columns = max(1, int(width / (0.6 + 0.1 * max((len(classes[c]) for c in present), default=0))))
    height = 2.4 * len(rows) + 0.7 + 0.22 * math.ceil(len(present) / columns)
    figure = Figure(figsize=(width, height), layout="compressed")
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        grey = _grey(row.image)
        for axis, mask in zip(line, [np.zeros_like(grey, dtype=int), *row.masks.values()], strict=True):
            axis.imshow(_blend(grey, mask), aspect=row.aspect, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        high = min(1.0, row.aspect * grey.shape[0] / grey.shape[1])  # of a picture's 2.4 inches, which hold 28 letters
        line[0].set_ylabel(textwrap.fill(row.title, max(8, int(28 * high))))  # a case's name may be a UID
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    figure.legend(
        handles=[Patch(color=_colour(c) / 255, label=classes[c]) for c in present],
        loc="outside lower center",
        ncols=min(max(len(present), 1), columns),
        frameon=False,
    )
    return figure


def curves_figure(runs: Mapping[str, Path]) -> Figure:
    """Training loss (running mean over 9 logged steps) and Dice on the validation cases of every run folder."""
    figure = Figure(figsize=(11, max(4, 0.22 * len(runs) + 0.4)), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (name, folder) in enumerate(runs.items()):
        look = {"color": LINES[i % len(LINES)], "linestyle": ("-", "--", ":", "-.")[i // len(LINES) % 4], "label": name}
        steps, losses = read_curve(folder, "task")
        if len(losses) > 9:
            left.plot(steps[4:-4], np.convolve(losses, np.ones(9) / 9, mode="valid"), **look)
        else:
            left.plot(steps, losses, **look)
        steps, dice = read_curve(folder, "val_dice")
        right.plot(steps, dice, marker="." if len(dice) < 100 else None, **look)
    left.set(xlabel="step", ylabel="Dice + cross-entropy (training)", yscale="log")
    right.set(xlabel="step", ylabel="mean Dice (validation)", ylim=(0, 1))
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.legend(*right.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def bars_figure(networks: Mapping[str, Mapping[str, tuple[float, float]]], measures: Mapping[str, str]) -> Figure:
    """One panel a measure, one bar a network: its mean, and a whisker of one standard deviation over the seeds.

    networks: {network: {measure: (mean, standard deviation)}}, the first drawn on top. measures: {measure: what its axis says}.
    """
    figure = Figure(figsize=(3.6 * len(measures) + 1.2, 0.36 * len(networks) + 1.2), layout="constrained")
    axes = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    names = list(networks)
    for axis, (measure, label) in zip(axes, measures.items(), strict=True):
        for position, name in enumerate(names):
            mean, deviation = networks[name].get(measure, (math.nan, math.nan))
            if math.isnan(mean):
                axis.text(0, position, " no value", va="center", fontsize=8)
                continue
            whisker = None if math.isnan(deviation) else deviation
            axis.barh(position, mean, xerr=whisker, color=LINES[0], height=0.62, error_kw={"ecolor": INK, "capsize": 3})
        axis.set(xlabel=label, yticks=range(len(names)), yticklabels=names)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3, axis="x")
        axis.set_axisbelow(True)
    axes[0].invert_yaxis()
    return figure


def classes_figure(networks: Mapping[str, Mapping[str, Sequence[float]]], label: str) -> Figure:
    """One row a class, one mark a network: the mean over its seeds, small points for the seeds.

    networks: {network: {class: one value a seed}}.
    """
    classes = list(next(iter(networks.values())))
    lanes = len(networks)
    figure = Figure(figsize=(8, 0.5 + len(classes) * (0.3 + 0.14 * lanes)), layout="constrained")
    axis = figure.subplots()
    markers = "os^Dv<>Pp*X"
    for lane, (name, values) in enumerate(networks.items()):
        shift = (lane - (lanes - 1) / 2) * 0.8 / lanes
        colour = LINES[lane % len(LINES)]
        for row, c in enumerate(classes):
            known = [v for v in values.get(c, ()) if not math.isnan(v)]
            axis.plot(known, [row + shift] * len(known), ".", color=colour, alpha=0.5, markersize=4)
            mean = sum(known) / len(known) if known else math.nan
            axis.plot(
                mean, row + shift, markers[lane % len(markers)], color=colour, label=None if row else name, markersize=6
            )
    for row in range(len(classes) - 1):
        axis.axhline(row + 0.5, color=INK, alpha=0.12, linewidth=0.8)
    axis.set(xlabel=label, yticks=range(len(classes)), yticklabels=classes, ylim=(len(classes) - 0.5, -0.5))
    axis.grid(alpha=0.3, axis="x")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """The figure as a picture file, whole or absent."""
    write_atomically(path, lambda p: figure.savefig(p, dpi=110))


def png_bytes(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def svg_text(figure: Figure, *, name: str) -> str:
    """The figure as an <svg> element to stand in a page: transparent, in the page's text colour and font.

    name: tells this figure's ids from those of the page's other figures.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # without the XML declaration, which has no place inside a page
    for ink in (INK, "#000000"):
        text = text.replace(ink, "currentColor")
    # matplotlib counts from 1 in every figure; of a page's ids no two may be equal
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)


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


def oklab(colours: npt.ArrayLike) -> np.ndarray:
    """Colours [..., 3] in 0..255 (sRGB) in the space where distances are those that are seen: lightness and two axes of hue.

    Source: Ottosson 2020, OKLab.

    >>> oklab([[255, 255, 255], [255, 0, 0]]).round(3) + 0.0
    array([[1.   , 0.   , 0.   ],
           [0.628, 0.225, 0.126]])
    """
    rgb = np.asarray(colours) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    cones = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566]]
    cones += [[0.0883024619, 0.2817188376, 0.6299787005]]
    axes = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099]]
    axes += [[0.0259040371, 0.7827717662, -0.8086757660]]
    return np.cbrt(linear @ np.transpose(cones)) @ np.transpose(axes)


@lru_cache
def class_colours() -> np.ndarray:
    """[MOST_CLASSES, 3] in 0..255, no two alike: the first eight, then always the one that is farthest from all before it."""
    steps = np.linspace(0, 255, 18).round()
    others = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3)
    lightness, *hue = oklab(others).T
    others = others[(lightness > 0.3) & (np.hypot(*hue) > 0.06)]  # neither dark nor grey, as the image below is
    seen, found = oklab(others), list(FIRST_COLOURS)
    room = np.min([np.linalg.norm(seen - colour, axis=1) for colour in oklab(found)], axis=0)
    while len(found) < MOST_CLASSES:
        farthest = int(room.argmax())
        found.append(others[farthest])
        room = np.minimum(room, np.linalg.norm(seen - seen[farthest], axis=1))
    return np.array(found)


def _grey(image: np.ndarray) -> np.ndarray:
    """[H, W] in 0..255, from its 0.5 to its 99.5 percentile."""
    low, high = np.percentile(image, (0.5, 99.5))
    return np.clip((image - low) / max(float(high - low), 1e-6), 0, 1) * 255


def _blend(grey: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A grey image [H, W] in 0..255 with its classes in colour, [H, W, 3] uint8."""
    picture = np.repeat(grey[..., None], 3, axis=-1)
    return np.where((mask > 0)[..., None], 0.4 * picture + 0.6 * _colour(np.maximum(mask, 1)), picture).astype(np.uint8)


def _colour(c: int | np.ndarray) -> np.ndarray:
    return class_colours()[np.asarray(c) - 1]
