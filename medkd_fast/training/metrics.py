"""Segmentation scores of integer volumes in millimetres: Dice, 95th percentile Hausdorff distance, mean surface distance.

"HD95" names several numbers. With the surface distances from prediction to label (P) and from label to prediction (L):
`definition="max"` is max(percentile95(P), percentile95(L)), MONAI's; `"pooled"` is percentile95 of both lists
joined, medpy's. ASSD is the mean of both lists joined. Percentiles interpolate linearly. A surface is the mask minus its
6-connected erosion (4-connected in 2-D); what lies outside the volume is background, so a mask cut by the border has
surface there.

`transunet_scores` gives what the test script of TransUNet (Chen et al. 2021) gives, which most tables of the Synapse
data set were made with: distances in voxels, pooled, and its own rule for empty masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk

DEFINITIONS = ("max", "pooled")
EMPTY = ("nan", "inf", "diagonal")
MEASURES = ("dice", "hd95", "assd")


class Scores(NamedTuple):
    """One class of one volume. dice in [0, 1]; hd95 and assd in mm.

    outcome: "valid" (label and prediction have the class), "missed" (the label alone), "false" (the prediction alone) or
    "absent" (neither).
    """

    dice: float
    hd95: float
    assd: float
    outcome: str


class Summary(NamedTuple):
    """One class over several volumes: means over the volumes whose label has the class, and the counts that qualify them.

    n_valid: volumes where label and prediction have it. n_missed: the label has it, the prediction does not (dice 0
    in the mean; distances by `empty`). n_false: the prediction has it, the label does not (in no mean).
    """

    dice: float
    hd95: float
    assd: float
    n_valid: int
    n_missed: int
    n_false: int


def segmentation_scores(
    prediction: Any,
    label: Any,
    *,
    spacing: Sequence[float],
    classes: Iterable[int],
    definition: str = "max",
    empty: str = "nan",
) -> dict[int, Scores]:
    """Dice, HD95 and ASSD of each class of one labelled volume (or 2-D image).

    prediction, label: integer arrays or CPU tensors of one shape, [Z, Y, X] or [Y, X].
    spacing: mm between voxels, in array order: (z, y, x), not SimpleITK's (x, y, z).
    classes: the values to score.
    definition: "max" (MONAI) or "pooled" (medpy), see the module's text.
    empty: distances where one of the two masks is empty: "nan", "inf" or "diagonal" (of the volume, in mm).
        Dice is 0 there. Where both are empty there is nothing to score: dice, hd95 and assd are nan.

    Raises ValueError for floating point volumes, unequal shapes, a spacing of another length or not positive, and unknown
    words.

    >>> label = np.zeros((4, 8, 8), dtype=np.uint8)
    >>> label[1:3, 2:5, 2:5] = 1
    >>> prediction = np.roll(label, 1, axis=2)
    >>> segmentation_scores(prediction, label, spacing=(5.0, 1.0, 1.0), classes=[1])[1].hd95
    1.0
    """
    prediction, label = _integers(prediction, "prediction"), _integers(label, "label")
    if prediction.shape != label.shape:
        raise ValueError(f"prediction and label must have one shape, got {prediction.shape} and {label.shape}")
    if label.ndim not in (2, 3):
        raise ValueError(
            f"prediction and label must be [Z, Y, X] or [Y, X], got shape {label.shape}; score each volume"
        )
    spacing = _positive(spacing, label.ndim)
    if definition not in DEFINITIONS:
        raise ValueError(f"definition must be one of {DEFINITIONS}, got {definition!r}")
    if empty not in EMPTY:
        raise ValueError(f"empty must be one of {EMPTY}, got {empty!r}")
    return {c: _scores(prediction == c, label == c, spacing, definition, empty) for c in classes}


def transunet_scores(prediction: Any, label: Any, *, classes: Iterable[int]) -> dict[int, Scores]:
    """Dice and HD95 as TransUNet's `test.py` gives them: HD95 in voxels, whatever the spacing, and pooled as medpy does.

    Its rule where a mask is empty: the prediction alone has the class: Dice 1, HD95 0; the label alone, or neither:
    Dice 0, HD95 0. So a missed organ counts with the best distance there is, and inventing one with a full score. The
    script has no ASSD: it is nan here. Average with `summarise(..., every_volume=True)`, then with `mean_scores`.

    Raises as `segmentation_scores` does. Source: Chen et al. 2021, `calculate_metric_percase`.

    >>> empty, full = np.zeros((2, 4, 4), int), np.ones((2, 4, 4), int)
    >>> transunet_scores(full, empty, classes=[1])[1]
    Scores(dice=1.0, hd95=0.0, assd=nan, outcome='false')
    """
    spacing = (1.0,) * np.ndim(label)
    found = segmentation_scores(prediction, label, spacing=spacing, classes=classes, definition="pooled")
    by_rule = {"missed": (0.0, 0.0), "false": (1.0, 0.0), "absent": (0.0, 0.0)}
    return {c: Scores(*by_rule.get(s.outcome, s[:2]), math.nan, s.outcome) for c, s in found.items()}


def summarise(volumes: Iterable[Mapping[int, Scores]], *, every_volume: bool = False) -> dict[int, Summary]:
    """The scores of several volumes averaged class by class, with n_valid, n_missed and n_false.

    every_volume: also volumes whose label lacks the class are in its means, as in TransUNet's script.
    A mean over no volume is nan; a nan distance (a missed volume under `empty="nan"`) leaves its mean and is counted.

    >>> full, none = np.ones((2, 4, 4), int), np.zeros((2, 4, 4), int)
    >>> summarise(segmentation_scores(p, full, spacing=(1, 1, 1), classes=[1]) for p in (full, none))[1]
    Summary(dice=0.5, hd95=0.0, assd=0.0, n_valid=1, n_missed=1, n_false=0)
    """
    by_class: dict[int, list[Scores]] = {}
    for volume in volumes:
        for c, scores in volume.items():
            by_class.setdefault(c, []).append(scores)
    summaries = {}
    for c, found in by_class.items():
        counted = [s for s in found if every_volume or s.outcome in ("valid", "missed")]
        means = (mean_without_nan(getattr(s, field) for s in counted) for field in MEASURES)
        counts = (sum(s.outcome == outcome for s in found) for outcome in ("valid", "missed", "false"))
        summaries[c] = Summary(*means, *counts)
    return summaries


def mean_scores(summaries: Mapping[int, Summary]) -> Summary:
    """Dice, HD95 and ASSD averaged over classes, the counts summed; a class that no label has (nan) leaves the mean."""
    means = (mean_without_nan(getattr(s, field) for s in summaries.values()) for field in MEASURES)
    counts = (sum(getattr(s, field) for s in summaries.values()) for field in ("n_valid", "n_missed", "n_false"))
    return Summary(*means, *counts)


def mean_without_nan(values: Iterable[float]) -> float:
    """Mean of the values that are not nan; nan where none is left.

    >>> mean_without_nan([1.0, math.nan, 3.0])
    2.0
    """
    kept = [v for v in values if not math.isnan(v)]
    return sum(kept) / len(kept) if kept else math.nan


def dice_score(prediction: np.ndarray, label: np.ndarray) -> float:
    """2 |P and L| / (|P| + |L|) of two boolean masks; nan where both are empty.

    >>> dice_score(np.array([True, True, False]), np.array([True, False, False]))
    0.6666666666666666
    """
    total = int(prediction.sum()) + int(label.sum())
    return 2 * int((prediction & label).sum()) / total if total else math.nan


def surface(mask: np.ndarray) -> np.ndarray:
    """Voxels of a boolean mask with a face neighbour outside it or outside the volume.

    >>> surface(np.ones((3, 3), bool)).astype(int)
    array([[1, 1, 1],
           [1, 0, 1],
           [1, 1, 1]])
    """
    padded = np.pad(mask, 1)
    inside = mask.copy()
    for axis in range(mask.ndim):
        for step in (-1, 1):
            window = [slice(1, -1)] * mask.ndim
            window[axis] = slice(1 + step, padded.shape[axis] - 1 + step)
            inside &= padded[tuple(window)]
    return mask & ~inside


def surface_distances(
    prediction: np.ndarray, label: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Distances in mm from each surface voxel of one boolean mask to the nearest of the other: (P to L, L to P)."""
    box = _bounding_box(prediction | label)
    # one voxel of margin, so that a distance map always has a background
    surfaces = [np.pad(surface(mask[box]), 1) for mask in (prediction, label)]
    maps = [_distance_map(s, spacing) for s in surfaces]
    return maps[1][surfaces[0]], maps[0][surfaces[1]]


def _scores(prediction: np.ndarray, label: np.ndarray, spacing: tuple, definition: str, empty: str) -> Scores:
    predicted, labelled = bool(prediction.any()), bool(label.any())
    if not (predicted or labelled):
        return Scores(math.nan, math.nan, math.nan, "absent")
    if not (predicted and labelled):
        diagonal = math.hypot(*(n * s for n, s in zip(label.shape, spacing, strict=True)))
        distance = {"nan": math.nan, "inf": math.inf, "diagonal": diagonal}[empty]
        return Scores(0.0, distance, distance, "missed" if labelled else "false")
    to_label, to_prediction = surface_distances(prediction, label, spacing)
    joined = np.concatenate([to_label, to_prediction])
    lists = [to_label, to_prediction] if definition == "max" else [joined]
    hd95 = max(float(np.percentile(d, 95)) for d in lists)
    return Scores(dice_score(prediction, label), hd95, float(joined.mean()), "valid")


def _distance_map(mask: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Distance in mm of every voxel to the nearest True voxel of `mask`, float64."""
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    image.SetSpacing([float(s) for s in reversed(spacing)])  # arrays are zyx, images are xyz
    signed = sitk.SignedMaurerDistanceMap(image, insideIsPositive=False, squaredDistance=False, useImageSpacing=True)
    # negative inside the mask, where the distance is 0
    return np.maximum(sitk.GetArrayFromImage(signed), 0.0).astype(np.float64)


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    box = []
    for axis in range(mask.ndim):
        occupied = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        box.append(slice(int(occupied[0]), int(occupied[-1]) + 1))
    return tuple(box)


def _integers(volume: Any, name: str) -> np.ndarray:
    array = np.asarray(volume)
    if array.dtype != bool and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must hold integer class values, got {array.dtype}: take the argmax of logits first")
    return array


def _positive(spacing: Sequence[float], dimensions: int) -> tuple[float, ...]:
    values = tuple(float(s) for s in spacing)
    if len(values) != dimensions:
        raise ValueError(
            f"spacing must give {dimensions} values in mm, one an axis in array order, got {len(values)}: {values}"
        )
    if not all(math.isfinite(v) and v > 0 for v in values):
        raise ValueError(f"spacing must be positive and finite (mm), got {values}")
    return values
