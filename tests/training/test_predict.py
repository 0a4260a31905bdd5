"""predict: the input's geometry, every kind of input, and files that fail without taking the others with them."""

from __future__ import annotations

import json
import locale
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from torch import Tensor, nn

from medkd_fast import cli
from medkd_fast.cli import main
from medkd_fast.training.data.dataset import Case
from medkd_fast.training.errors import WrongUse
from medkd_fast.training.predict import find_cases, predict_case, predict_run
from medkd_fast.training.runs import load_run


class Bright(nn.Module):
    """Class 3 where the image is brighter than one half."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([0.5 - image, image * 0 - 9, image * 0 - 9, image - 0.5, image * 0 - 9], 1)


def block(shape=(6, 20, 24)) -> np.ndarray:
    array = np.zeros(shape, np.float32)
    array[1:4, 5:9, 10:20] = 1
    return array


def image_of(array: np.ndarray, direction=None) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((0.8, 1.2, 3.0))
    image.SetOrigin((-12.5, 40.0, 7.25))
    if direction is not None:
        image.SetDirection(np.asarray(direction, float).ravel().tolist())
    return image


def same_geometry(a: sitk.Image, b: sitk.Image) -> bool:
    pairs = [(getattr(a, f"Get{g}")(), getattr(b, f"Get{g}")()) for g in ("Size", "Spacing", "Origin", "Direction")]
    return all(np.allclose(x, y, atol=1e-4) for x, y in pairs)


def oblique() -> np.ndarray:
    c, s = np.cos(0.3), np.sin(0.3)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])


@pytest.mark.parametrize(
    "direction", [np.eye(3), np.diag([-1, -1, 1]), [[0, 0, 1], [-1, 0, 0], [0, -1, 0]], oblique()], ids=str
)
def test_a_prediction_lies_where_its_image_lies(teacher, tmp_path, direction):
    image = image_of(block(), direction)
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
    trained = replace(load_run(teacher), network=Bright())
    # on the voxels of the file: nothing is resampled
    settings = replace(trained.preprocessing, spacing=(None, None, None), size=None)
    config = trained.config.resolved(preprocessing=settings)
    found = predict_case(replace(trained, config=config), Case("a", "a", (tmp_path / "a.nrrd",)))
    assert same_geometry(found, image)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(found), block().astype(np.uint8) * 3)


def test_logits_that_are_no_numbers_are_no_prediction(teacher, tmp_path):
    sitk.WriteImage(image_of(block()), str(tmp_path / "a.nrrd"))
    trained = load_run(teacher)
    torch.nn.init.constant_(trained.network.final_conv.bias, float("nan"))
    with pytest.raises(WrongUse, match="logits of case a are no finite numbers: its weights have diverged"):
        predict_case(trained, Case("a", "a", (tmp_path / "a.nrrd",)))


def test_a_folder_one_bad_file_and_once_more(teacher, tmp_path, capfd):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for name in ("b.nii.gz", "a.mha"):
        sitk.WriteImage(image_of(block()), str(images / name))
    (images / "bad.nii.gz").write_bytes(b"not an image")
    (images / "notes.txt").write_text("not an image either")
    assert main(["predict", str(teacher), str(images), str(out)]) == 1
    captured = capfd.readouterr()
    assert "No Series were found" not in captured.err  # which ITK says of a folder without DICOM files
    assert "2 predicted, 0 there already, 1 failed" in captured.out
    assert "bad failed:" in captured.err and str(images / "bad.nii.gz") in captured.err
    assert sorted(p.name for p in out.iterdir()) == ["a.nii.gz", "b.nii.gz", "predictions.json"]
    prediction = sitk.ReadImage(str(out / "a.nii.gz"))
    assert same_geometry(prediction, image_of(block())) and prediction.GetPixelID() == sitk.sitkUInt8
    assert json.loads((out / "predictions.json").read_text())["classes"]["3"] == "liver"

    written = (out / "a.nii.gz").stat().st_mtime_ns
    sitk.WriteImage(image_of(block()), str(images / "bad.nii.gz"))
    assert main(["predict", str(teacher), str(images), str(out)]) == 0
    assert "1 predicted, 2 there already, 0 failed" in capfd.readouterr().out
    assert (out / "a.nii.gz").stat().st_mtime_ns == written


def test_a_dicom_series_and_a_slice(teacher, tmp_path):
    series = tmp_path / "series"
    series.mkdir()
    image = sitk.Cast(image_of(block() * 100), sitk.sitkInt16)
    for z in range(image.GetDepth()):
        one = image[:, :, z]
        position = image.TransformIndexToPhysicalPoint((0, 0, z))
        tags = {
            "0008|0060": "CT",
            "0020|000e": "1.2.3.4",
            "0020|000d": "1.2.3",
            "0008|0018": f"1.2.3.4.{z + 1}",
            "0020|0032": "\\".join(f"{p:.4f}" for p in position),
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0013": str(z + 1),
        }
        for tag, value in tags.items():
            one.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(series / f"{z}.dcm"))
        before = locale.setlocale(
            locale.LC_ALL
        )  # SimpleITK leaves the locale C, by which torch.compile reads its files
        writer.Execute(one)
        locale.setlocale(locale.LC_ALL, before)
    outcomes = predict_run(teacher, series, tmp_path / "out")
    assert [(o.case, o.error) for o in outcomes] == [("series", None)]
    assert same_geometry(sitk.ReadImage(str(tmp_path / "out" / "series.nii.gz")), image)
    assert [c.name for c in find_cases(tmp_path, channels=1)] == ["series"]  # and in a folder of folders

    flat = sitk.GetImageFromArray(block()[2])
    flat.SetSpacing((0.5, 0.7))
    sitk.WriteImage(flat, str(tmp_path / "flat.mha"))
    (outcome,) = predict_run(teacher, tmp_path / "flat.mha", tmp_path / "flat.nii.gz")
    assert outcome.error is None
    assert sitk.ReadImage(str(tmp_path / "flat.nii.gz")).GetSize() == (24, 20)


def test_a_folder_whose_name_is_not_utf_8_fails_alone(teacher, tmp_path):
    images = tmp_path / "images"
    for name in (b"M\xfcller", b"M\xfcller's notes"):
        (images / os.fsdecode(name)).mkdir(parents=True)
    (images / os.fsdecode(b"M\xfcller") / "0.dcm").write_bytes(b"")
    sitk.WriteImage(image_of(block()), str(images / "a.nii.gz"))
    command = [sys.executable, "-m", cli.__name__, "predict", str(teacher), str(images), str(tmp_path / "out")]
    # on its own: ITK would end the process
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "1 predicted, 0 there already, 1 failed" in done.stdout
    assert f"M\\xfcller failed: the name {images}/M\\xfcller is not UTF-8: rename it" in done.stderr
    assert (tmp_path / "out" / "a.nii.gz").exists()


def test_channels_are_files_with_a_number(tmp_path, capsys):
    for name in (
        "liver_01_0000.nii.gz",
        "liver_01_0001.nii.gz",
        "liver_02_0000.nii.gz",
        "liver_02_0001.nii.gz",
        "x_0007.nii.gz",
    ):
        sitk.WriteImage(image_of(block()), str(tmp_path / name))
    cases = find_cases(tmp_path, channels=2)
    assert [(c.name, len(c.images)) for c in cases] == [("liver_01", 2), ("liver_02", 2), ("x_0007", 1)]
    assert [p.name for p in cases[0].images] == ["liver_01_0000.nii.gz", "liver_01_0001.nii.gz"]
    assert capsys.readouterr().err == ""
    assert find_cases(tmp_path, channels=1)[0].name == "liver_01"
    assert capsys.readouterr().err == (
        "medkd-fast: the network takes 1 channel, so these are cases of their own: liver_01_0001, liver_02_0001; "
        f"if they are channels, take them out of {tmp_path}\n"
    )


def test_wrong_use(teacher, tmp_path, capsys):
    def error(*arguments: str | Path) -> str:
        assert main(["predict", str(teacher), *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "no image at" in error(tmp_path / "nothing", tmp_path / "out")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no image" in error(empty, tmp_path / "out")
    for name in ("a.nii.gz", "b.nii.gz"):
        sitk.WriteImage(image_of(block()), str(empty / name))
    assert "2 images do not go into the one file" in error(empty, tmp_path / "one.nii.gz")
    assert "that this command did not write" in error(empty, empty)
    assert "predictions are NIfTI, got" in error(empty / "a.nii.gz", tmp_path / "one.mha")
    other = tmp_path / "other"
    other.mkdir()
    (other / "predictions.json").write_text('{"checkpoint_sha256": "0"}')
    assert "holds the predictions of another network" in error(empty, other)
    (other / "predictions.json").write_text('{"checkpoint')
    assert "predictions.json is damaged" in error(empty, other)
    (other / "predictions.json").write_text("[]")
    assert "holds the predictions of another network" in error(empty, other)
    (tmp_path / "file").write_text("")
    assert "is a file" in error(empty, tmp_path / "file")
    assert not (tmp_path / "out").exists() and not (tmp_path / "one.mha").exists()


def test_a_case_with_a_channel_too_few_says_so(teacher, tmp_path):
    two = tmp_path / "two.nii.gz"
    sitk.WriteImage(sitk.JoinSeries([image_of(block()), image_of(block())]), str(two))
    (outcome,) = predict_run(teacher, two, tmp_path / "out")
    assert outcome.error is not None and "gives 2 channels, 1 are wanted" in outcome.error
    assert not outcome.file.exists()
    with pytest.raises(WrongUse, match="no run at"):
        predict_run(tmp_path / "none", two, tmp_path / "out")
