"""From files to volumes that a network can take: orientation, intensities, resampling; done once and kept on disk."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from medkd_fast.training.bars import track
from medkd_fast.training.data import cache as store_of
from medkd_fast.training.data import layouts  # noqa: F401  (they know how to read their files)
from medkd_fast.training.data.dataset import Case, Dataset
from medkd_fast.training.data.geometry import Geometry, resample, resample_onto, same_grid
from medkd_fast.training.data.layouts.common import stem
from medkd_fast.training.data.read import counts_of, read_header, read_images, read_label
from medkd_fast.training.data.settings import Preprocessing
from medkd_fast.training.errors import WrongUse

__all__ = ["Preprocessing", "Volume", "plan", "prepare", "prepare_case", "source_label", "to_source", "volume_of"]

VERSION = 5  # of what this file does to the voxels: another number, another cache
BY_NAME = {"ct": "window", "nonorm": "none"}  # intensities by the channel's name, as in nnU-Net; others are z-scored
ROUNDING = 1e-6  # of the mean: values that deviate by no more are one value, such as the 1 of a mask
AIR = -500  # Hounsfield units: an image that goes below and whose channel does not say what it is, is a CT


@dataclass(frozen=True, eq=False)
class Volume:
    """A prepared case, in LPS order: slices run to the head, rows to the back, columns to the patient's left.

    image: [C, D, H, W] float32. mask: [1, D, H, W] uint8, classes 0..K and `dataset.IGNORE`, None without a label; both may
    be mapped from disk. spacing: (z, y, x) in mm. grid: where these voxels lie. source: the grid of the files.
    flat: the file was a 2-D image.
    """

    name: str
    patient: str
    image: Tensor
    mask: Tensor | None
    spacing: tuple[float, float, float]
    grid: Geometry
    source: Geometry
    flat: bool = False

    @property
    def label(self) -> Tensor | None:
        """The mask as [1, D, H, W] int64, made when it is asked for: eight times the memory."""
        return None if self.mask is None else self.mask.long()


def volume_of(
    name: str,
    image: Tensor,
    label: Tensor | None = None,
    *,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    patient: str | None = None,
) -> Volume:
    """A volume of tensors that are at hand: image [C, D, H, W], label [1, D, H, W], spacing (z, y, x) in mm.

    >>> volume_of("a", torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 8)).label.dtype
    torch.int64
    """
    z, y, x = (float(s) for s in spacing)
    grid = Geometry(
        tuple(image.shape[:0:-1]), (x, y, z), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    )
    mask = None if label is None else label.to(torch.uint8)
    return Volume(name, patient or name, image.float(), mask, (z, y, x), grid, grid)


def plan(dataset: Dataset, settings: Preprocessing | None = None) -> Preprocessing:
    """The settings with every choice made, from what the data set asks for and from the headers of its labelled cases.

    The spacing becomes the median one (2-D: of rows and columns, slices stay as they are). A channel called CT is windowed,
    any other one z-scored; where the name does not tell, the first volume does.

    Raises WrongUse where nothing can be prepared: no cases, several of one name, another number of channels than words.
    """
    for name, count in dataset.repeated.items():
        raise WrongUse(f"{dataset.name}: {name}: {count} cases have this name: every case needs one of its own")
    asked = settings or dataset.defaults
    given = {k: v for k, v in asdict(dataset.defaults).items() if getattr(asked, k) is None}
    settings = replace(asked, **given)
    cases = dataset.labelled or dataset.cases
    if not cases:
        raise WrongUse(f"{dataset.name} has no cases")
    if settings.spacing is None:
        settings = replace(settings, spacing=_median_spacing(cases, settings))
    if settings.intensity is None:
        settings = replace(settings, intensity=_intensities(dataset, cases[0]))
    if len(settings.intensity) == 1 and len(dataset.channels) > 1:
        settings = replace(settings, intensity=settings.intensity * len(dataset.channels))
    if len(settings.intensity) != len(dataset.channels):
        raise WrongUse(
            f"intensity must name one way a channel: {dataset.name} has {len(dataset.channels)} channels "
            f"({', '.join(dataset.channels)}), got {len(settings.intensity)}"
        )
    return settings


def prepare(
    dataset: Dataset,
    settings: Preprocessing | None = None,
    names: Iterable[str] | None = None,
    *,
    cache: Path | None = None,
    progress: bool = True,
) -> dict[str, Volume]:
    """Volumes of the cases with these names (of all), read from the cache or made and put there.

    cache: its folder; None takes `cache.default_cache()`. It is keyed by the content of the files and by the settings, so
    several processes may fill it at once. progress: a bar where it takes more than two seconds.

    Raises WrongUse, naming the case, for what cannot be prepared.
    """
    settings = plan(dataset, settings)
    cache = cache or store_of.default_cache()
    wanted = [dataset.case(n) for n in names] if names is not None else list(dataset.cases)
    try:
        return {c.name: _cached(dataset, c, settings, cache) for c in track(wanted, "preparing", show=progress)}
    finally:
        _whole.cache_clear()


def prepare_case(case: Case | Path | str | Sequence[Path | str], settings: Preprocessing) -> Volume:
    """A volume to predict: its label, if it has one, is not read, and nothing is cached.

    case: a case, a file or DICOM folder, or one file a channel. settings: a run's, with every choice made.
    """
    if not isinstance(case, Case):
        paths = [case] if isinstance(case, str | Path) else case
        files = tuple(Path(p) for p in paths)
        case = Case(stem(files[0]), stem(files[0]), files)
    try:
        image, grid, source, flat = _image(case, settings)
    finally:
        _whole.cache_clear()
    return Volume(case.name, case.patient, torch.from_numpy(image), None, _zyx(grid), grid, source, flat)


def to_source(prediction: Tensor, volume: Volume) -> sitk.Image:
    """A prediction on a volume's grid as an image in the geometry of the volume's files; outside of the volume it is 0.

    prediction: [D, H, W] integer classes (nearest neighbour), or [K + 1, D, H, W] logits or probabilities (each class
    interpolated linearly, then the largest), which gives smoother borders where the files are finer than the volume.
    """
    shape = tuple(volume.image.shape[1:])
    if tuple(prediction.shape[-3:]) != shape or prediction.dim() not in (3, 4):
        raise ValueError(f"prediction must be [D, H, W] or [K + 1, D, H, W] of {shape}, got {tuple(prediction.shape)}")
    prediction = prediction.detach().cpu()
    if prediction.dim() == 3:
        classes = volume.grid.stamp(sitk.GetImageFromArray(prediction.to(torch.uint8).numpy()))
        found = resample_onto(classes, volume.source, labels=True)
    else:
        lowest = prediction.amin().float()  # taken off, so that 0, which lies outside, wins nowhere
        best = np.zeros(volume.source.size[::-1], np.float32)
        winner = np.zeros(best.shape, np.uint8)
        for c, scores in enumerate(prediction):
            on_grid = volume.grid.stamp(sitk.GetImageFromArray((scores.float() - lowest).numpy()))
            values = sitk.GetArrayFromImage(resample_onto(on_grid, volume.source, labels=False))
            winner[values > best] = c
            np.maximum(best, values, out=best)
        found = volume.source.stamp(sitk.GetImageFromArray(winner))
    return found[:, :, 0] if volume.flat else found


def source_label(dataset: Dataset, case: Case) -> sitk.Image:
    """A case's label as classes (0..K and `dataset.IGNORE`), uint8, on its file's grid, in LPS order, cut to the case's slices."""
    return _as_classes(read_label(case), dataset, case)


def classes_of(label: sitk.Image, dataset: Dataset, case: Case) -> np.ndarray:
    """A label volume's values as classes, uint8. Raises WrongUse for values that the data set does not know."""
    values = sitk.GetArrayViewFromImage(label)
    present = counts_of(values)
    unknown = unknown_values(present, dataset)
    if unknown:
        raise WrongUse(
            f"{case.label} of case {case.name} holds {', '.join(unknown[:8])}, which {dataset.name} does not name: "
            f"its labels are {', '.join(map(str, known_values(dataset)))}"
        )
    found = np.zeros(values.shape, np.uint8)
    for value in present:
        if c := class_of(value, dataset):
            found[values == value] = c
    return found


def class_of(value: float, dataset: Dataset) -> int:
    """The class that a value in a label file stands for; an unknown one counts as background."""
    mapping = dataset.label_values or {c: c for c in dataset.classes}
    return mapping.get(int(value), 0) if float(value).is_integer() else 0


def known_values(dataset: Dataset) -> list[int]:
    """The values that a label file of this data set may hold."""
    return sorted(dataset.label_values or [0, *dataset.classes])


def unknown_values(present: Iterable[float], dataset: Dataset) -> list[str]:
    """Those of a label volume's values that the data set does not know, to every digit."""
    known = set(known_values(dataset))
    found = []
    for value in present:
        if not float(value).is_integer():
            found.append(f"{value} (not whole)")
        elif int(value) not in known and not dataset.other_values:
            found.append(str(int(value)))
    return found


def intensity_of(channel: str) -> str:
    """How the values of a channel are prepared, by its name alone.

    >>> intensity_of("CT"), intensity_of("T1"), intensity_of("noNorm")
    ('window', 'zscore', 'none')
    """
    return BY_NAME.get(channel.casefold(), "zscore")


def crop_slices(image: sitk.Image, case: Case) -> sitk.Image:
    """The case's slices of an image in LPS order; all of it where the case is the whole volume."""
    return image if case.slices is None else image[:, :, case.slices[0] : case.slices[1] + 1]


def _median_spacing(cases: Sequence[Case], settings: Preprocessing) -> tuple[float | None, ...]:
    if settings.dims == 2 and settings.size is not None:
        return None, None, None
    volumes = {c.images: c for c in cases}.values()  # blocks of one volume count once
    grids = [read_header(c).geometry for c in track(volumes, "reading headers")]
    z, y, x = (statistics.median(s) for s in zip(*(g.lps(g.spacing) for g in grids), strict=True))
    return (None if settings.dims == 2 else z, *((y, x) if settings.size is None else (None, None)))


def _intensities(dataset: Dataset, case: Case) -> tuple[str, ...]:
    words = [intensity_of(name) for name in dataset.channels]
    untold = [i for i, name in enumerate(dataset.channels) if name.casefold().startswith("image")]
    images = read_images(case) if untold else []
    for i in untold:
        if i < len(images) and sitk.GetArrayViewFromImage(images[i]).min() < AIR:
            words[i] = "window"  # the name does not tell, but it is a CT
    return tuple(words)


def _cached(dataset: Dataset, case: Case, settings: Preprocessing, cache: Path) -> Volume:
    folder = cache / "volumes" / _key(dataset, case, settings, cache)
    found = store_of.load(folder)
    if found is None:
        store_of.store(folder, *_made(dataset, case, settings))
        found = store_of.load(folder)
        assert found is not None, folder
    arrays, facts = found
    grid, source = (Geometry(**{k: tuple(v) for k, v in facts[g].items()}) for g in ("grid", "source"))
    mask = torch.from_numpy(arrays["mask"])[None] if "mask" in arrays else None
    image = torch.from_numpy(arrays["image"])
    return Volume(case.name, case.patient, image, mask, _zyx(grid), grid, source, facts["flat"])


def _key(dataset: Dataset, case: Case, settings: Preprocessing, cache: Path) -> str:
    files = [*case.images, *([case.label] if case.label else [])]
    try:
        content = [store_of.digest_of_content(f, cache) for f in files]
    except OSError as error:
        raise WrongUse(f"case {case.name}: {error.filename} cannot be read ({error.strerror})") from error
    values = [list(item) for item in sorted((dataset.label_values or {}).items())]
    known = [values, known_values(dataset), dataset.other_values]
    settings_ = settings.to_dict()
    settings_.pop("dims")  # decides the spacing, which is chosen already
    facts = [VERSION, content, case.reader, case.slices, settings_, known, bool(case.label)]
    return store_of.digest(json.dumps(facts))


def _made(dataset: Dataset, case: Case, settings: Preprocessing) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    image, grid, source, flat = _image(case, settings)
    arrays = {"image": image}
    if case.label is not None:
        label = read_label(case)
        if not same_grid(Geometry.of(label), source):
            raise WrongUse(
                f"case {case.name}: the image ({source}) and its label {case.label} ({Geometry.of(label)}) lie on different "
                "grids: resample the label to the image with nearest neighbour first"
            )
        # close to 45 degrees, what is left between the two directions would turn them differently
        classes = _as_classes(source.stamp(label), dataset, case)
        classes = resample(classes, spacing=settings.spacing, size=settings.size, labels=True)
        arrays["mask"] = sitk.GetArrayFromImage(classes)
    return arrays, {"grid": asdict(grid), "source": asdict(source), "flat": flat}


def _as_classes(label: sitk.Image, dataset: Dataset, case: Case) -> sitk.Image:
    label = crop_slices(sitk.DICOMOrient(label, "LPS"), case)
    return Geometry.of(label).stamp(sitk.GetImageFromArray(classes_of(label, dataset, case)))


def _image(case: Case, settings: Preprocessing) -> tuple[np.ndarray, Geometry, Geometry, bool]:
    channels, source, flat = _whole(case.images, case.reader, settings)
    resampled = [resample(crop_slices(c, case), spacing=settings.spacing, size=settings.size) for c in channels]
    arrays = [sitk.GetArrayFromImage(c) for c in resampled]
    for array, word in zip(arrays, settings.intensity, strict=True):
        if word in ("window", "percentile"):
            np.clip(array, 0.0, 1.0, out=array)
    return np.stack(arrays), Geometry.of(resampled[0]), source, flat


@lru_cache(maxsize=1)  # the blocks of a built-in volume follow each other
def _whole(images: tuple[Path, ...], reader: str, settings: Preprocessing) -> tuple[list[sitk.Image], Geometry, bool]:
    case = Case(images[0].name, "", images, reader=reader)
    channels = read_images(case)
    if len(channels) != len(settings.intensity):
        raise WrongUse(
            f"{images[0]} gives {len(channels)} channels, {len(settings.intensity)} are wanted: "
            "one file a channel, in the order of the training data"
        )
    source = Geometry.of(channels[0])
    for other, path in zip(channels[1:], [*images[1:], *images], strict=False):
        if not same_grid(Geometry.of(other), source):
            raise WrongUse(f"{path} ({Geometry.of(other)}) and {images[0]} ({source}) lie on different grids")
    normalised = [
        sitk.DICOMOrient(source.stamp(_normalise(c, word, settings)), "LPS")
        for c, word in zip(channels, settings.intensity, strict=True)
    ]
    return normalised, source, read_header(case).flat


def _normalise(image: sitk.Image, word: str, settings: Preprocessing) -> sitk.Image:
    values = sitk.GetArrayFromImage(image).astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    if word == "window":
        low, high = settings.window
        values = (np.clip(values, low, high) - low) / (high - low)
    elif word == "percentile":
        low, high = np.percentile(values, settings.percentiles)
        values = (np.clip(values, low, high) - low) / max(high - low, 1e-8)
    elif word == "zscore":
        body = values[values != 0]
        if body.size:
            values = np.where(values != 0, np.clip(values, *np.percentile(body, settings.percentiles)), values)
            body = values[values != 0]
            mean, deviation = body.mean(dtype=np.float64), body.std(dtype=np.float64)
            values = (values - mean) / (deviation if deviation > ROUNDING * abs(mean) else 1.0)
    return sitk.GetImageFromArray(values.astype(np.float32, copy=False))


def _zyx(grid: Geometry) -> tuple[float, float, float]:
    x, y, z = grid.spacing
    return z, y, x
