"""Predictions for images without labels: a file, a folder of them, or DICOM series, to NIfTI in the input's own geometry."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import SimpleITK as sitk

from medkd_fast.training.bars import track
from medkd_fast.training.data.dataset import Case
from medkd_fast.training.data.layouts.dicom import is_dicom
from medkd_fast.training.data.layouts.nnunet import CHANNEL
from medkd_fast.training.data.prepare import prepare_case, to_source
from medkd_fast.training.data.read import shown, utf8
from medkd_fast.training.errors import WrongUse
from medkd_fast.training.files import read_json, sha256, write_atomically, write_json
from medkd_fast.training.finish import best_device
from medkd_fast.training.inference import check_logits, predict_logits
from medkd_fast.training.runs import Trained, load_run

IMAGES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr", ".hdr", ".png", ".tif", ".tiff", ".bmp", ".jpg", ".jpeg")
OUTPUTS = (".nii", ".nii.gz")
RECORD = "predictions.json"


@dataclass(frozen=True)
class Outcome:
    """What became of a case: the file that holds its prediction, or the reason why there is none."""

    case: str
    file: Path
    error: str | None = None
    skipped: bool = False


def predict_run(run: Path, source: Path, out: Path) -> list[Outcome]:
    """Predict every image at `source` with a trained network.

    source: an image file; a folder of image files, of DICOM files, or of folders with a DICOM series each. Networks with
    several channels take one file a channel, named as nnU-Net does (CASE_0000.nii.gz, CASE_0001.nii.gz, ...), or one file with
    all of them. out: a folder, or for one image a .nii or .nii.gz file. The values written are classes, 0 is background;
    predictions.json in the folder names them.

    A prediction that is there already stays. A case that fails is reported and the others go on.

    Raises WrongUse where there is nothing to predict, or `out` holds the predictions of another network.
    """
    trained = load_run(run)
    cases = find_cases(source, channels=len(trained.channels))
    files = _outputs(cases, out)
    if not _is_image(out, OUTPUTS):
        _check_folder(trained, out)
    device = best_device()
    trained.network.to(device)
    outcomes = []
    for case, file in track(list(zip(cases, files, strict=True)), "predicting"):
        if file.exists():
            outcomes.append(Outcome(case.name, file, skipped=True))
            continue
        try:
            prediction = predict_case(trained, case, device=device, progress=len(cases) == 1)
            write_atomically(file, lambda p, image=prediction: sitk.WriteImage(image, str(p), useCompression=True))
            outcomes.append(Outcome(case.name, file))
        except Exception as error:  # noqa: BLE001 one bad file must not take the others with it
            reason = " ".join(str(error).split()) or type(error).__name__
            outcomes.append(Outcome(case.name, file, error=reason))
            print(f"medkd-fast: {shown(case.name)} failed: {reason}", file=sys.stderr)
    return outcomes


def predict_case(trained: Trained, case: Case, *, device: str = "cpu", progress: bool = False) -> sitk.Image:
    """The classes of every voxel of a case, uint8, in the geometry of its files. progress: a bar over its windows."""
    volume = prepare_case(case, trained.preprocessing)
    logits = predict_logits(
        trained.network, volume.image, dims=trained.dims, patch=trained.patch, device=device, progress=progress
    )
    check_logits(logits, case.name)
    return to_source(logits, volume)


def find_cases(source: Path, *, channels: int) -> list[Case]:
    """The cases at a path, in the order of their names. Raises WrongUse where there are none."""
    if not source.exists():
        raise WrongUse(f"no image at {source}: give a file, a folder of images or a DICOM folder")
    if source.is_file():
        return [_case(_stem(source), [source])]
    if _is_series(source):
        return [_case(source.resolve().name, [source])]
    groups: dict[str, list[Path]] = {}
    for file in sorted(source.iterdir()):
        if file.is_file() and _is_image(file, IMAGES) and not file.name.startswith("."):
            groups.setdefault(_case_name(file, channels), []).append(file)
        elif file.is_dir() and _is_series(file):
            groups.setdefault(file.name, []).append(file)
    own = [name for name in groups if (numbered := CHANNEL.fullmatch(name)) and numbered[1] in groups]
    if own:
        print(
            f"medkd-fast: the network takes {channels} channel{'s' * (channels > 1)}, so these are cases of their own: "
            f"{', '.join(own[:3])}{', ...' if own[3:] else ''}; if they are channels, take them out of {source}",
            file=sys.stderr,
        )
    if not groups:
        raise WrongUse(f"{source} holds no image ({', '.join(IMAGES)}) and no DICOM series: give another folder")
    return [_case(name, files) for name, files in sorted(groups.items())]


def _case(name: str, files: Sequence[Path]) -> Case:
    return Case(name, name, tuple(files))


def _case_name(file: Path, channels: int) -> str:
    """`liver_01` for `liver_01_0000.nii.gz`: the name without nnU-Net's number of the channel."""
    stem = _stem(file)
    found = CHANNEL.fullmatch(stem)
    return found[1] if found and int(found[2]) < channels else stem


def _stem(file: Path) -> str:
    for suffix in sorted(IMAGES, key=len, reverse=True):
        if file.name.lower().endswith(suffix):
            return file.name[: -len(suffix)]
    return file.stem


def _is_image(file: Path, suffixes: Sequence[str]) -> bool:
    return file.name.lower().endswith(tuple(suffixes))


def _is_series(folder: Path) -> bool:
    """Whether a folder holds a DICOM series; ITK's warning that it does not is no news."""
    try:
        name = utf8(folder)
    except WrongUse:  # for reading it to say
        return any(is_dicom(file) for file in folder.iterdir())
    warns = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        return bool(sitk.ImageSeriesReader.GetGDCMSeriesIDs(name))
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(warns)


def _outputs(cases: Sequence[Case], out: Path) -> list[Path]:
    if not _is_image(out, OUTPUTS):
        if _is_image(out, IMAGES) and not out.is_dir():
            raise WrongUse(f"predictions are NIfTI, got {out}: give a folder, or a name that ends in .nii.gz")
        if out.is_file():
            raise WrongUse(f"{out} is a file: give a folder, or a name that ends in .nii.gz")
        return [out / f"{case.name}.nii.gz" for case in cases]
    if len(cases) != 1:
        raise WrongUse(f"{len(cases)} images do not go into the one file {out}: give a folder")
    return [out]


def _check_folder(trained: Trained, out: Path) -> None:
    """Write down whose predictions a folder holds, or check that they are this network's."""
    record = {"network": trained.name, "checkpoint_sha256": sha256(trained.checkpoint)}
    try:
        if (out / RECORD).exists():
            there = read_json(out / RECORD)
            if not isinstance(there, dict) or there.get("checkpoint_sha256") != record["checkpoint_sha256"]:
                raise WrongUse(f"{out} holds the predictions of another network: choose another folder")
        elif out.is_dir() and any(_is_image(f, OUTPUTS) for f in out.iterdir()):
            raise WrongUse(f"{out} holds images that this command did not write: choose another folder")
        write_json(out / RECORD, {**record, "classes": {"0": "background", **trained.classes}})
    except OSError as error:
        raise WrongUse(f"{out} cannot be written ({error.strerror}): choose another folder") from error
