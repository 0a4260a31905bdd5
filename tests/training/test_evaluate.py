"""Evaluation: scores on the files' own grid, whatever the network saw; what is written; whose cases are scored."""

from __future__ import annotations

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from matplotlib.image import imread
from torch import Tensor, nn

from medkd_fast.cli import main
from medkd_fast.training import finish
from medkd_fast.training.data.dataset import IGNORE, open_dataset
from medkd_fast.training.data.prepare import plan, prepare
from medkd_fast.training.data.settings import Preprocessing
from medkd_fast.training.errors import WrongUse
from medkd_fast.training.evaluate import Evaluation, evaluate, on_source
from medkd_fast.training.finish import cases_of
from medkd_fast.training.metrics import Scores, segmentation_scores
from medkd_fast.training.runs import check_data, load_run

LEVELS = (0.0, 0.7, 9.0, 0.5, 1.0)  # of the small data's classes; nothing is as bright as the gallbladder


class Oracle(nn.Module):
    """Knows the small data: the class whose intensity is nearest; moved by `shift` columns."""

    def __init__(self, shift: int = 0, scale: float = 20.0) -> None:
        super().__init__()
        self.shift, self.scale = shift, scale

    def forward(self, image: Tensor) -> Tensor:
        levels = torch.tensor(LEVELS).view(1, -1, *[1] * (image.dim() - 2))
        return -(image.roll(self.shift, -1) - levels).abs() * self.scale


@pytest.fixture(scope="module")
def dataset(small_csv):
    return open_dataset(small_csv)


def volumes_of(dataset, names, **settings):
    return prepare(dataset, plan(dataset, Preprocessing(intensity=("none",), **settings)), names)


def test_scores_are_of_the_files_grid_in_mm(dataset):
    volumes = volumes_of(dataset, ["case4", "case5"])
    perfect = evaluate(Oracle(), dataset, volumes, patch=(32, 32))
    assert list(perfect.cases) == ["case4", "case5"]
    assert [s[:3] for c, s in perfect.cases["case4"].items() if c != 2] == [(1.0, 0.0, 0.0)] * 3
    assert perfect.cases["case4"][2].outcome == "absent"
    assert perfect.mean[:3] == (1.0, 0.0, 0.0) and perfect.mean.n_valid == 6

    moved = evaluate(Oracle(shift=2), dataset, volumes, patch=(32, 32))
    assert moved.cases["case4"][3].hd95 == pytest.approx(2 * 1.5)  # two columns of 1.5 mm
    voxels = evaluate(Oracle(shift=2), dataset, volumes, patch=(32, 32), protocol="transunet")
    assert voxels.cases["case4"][3].hd95 == pytest.approx(2.0)
    assert voxels.summaries[2].dice == 0.0 and not math.isnan(voxels.mean.dice)  # the absent class is in its means


def test_a_coarse_preparation_is_judged_on_the_fine_files(dataset):
    (volume,) = volumes_of(dataset, ["case4"], size=(16, 16)).values()
    assert volume.image.shape == (1, 6, 16, 16)
    seen: dict[str, Tensor] = {}
    found = evaluate(Oracle(), dataset, {"case4": volume}, patch=(16, 16), seen=seen).cases["case4"]
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(dataset.case("case4").label)))
    assert label.shape == (6, 32, 32) and seen["case4"].shape == (6, 16, 16)
    # on a grid of half the size the organs' blurred borders look like others: not perfect on the files' grid, nor far off
    assert 0.6 < found[3].dice < 1.0
    prediction, on_file, spacing = on_source(Oracle()(volume.image[None])[0], volume, dataset, dataset.case("case4"))
    np.testing.assert_array_equal(on_file, label)
    assert spacing == (2.0, 1.5, 1.5)
    assert segmentation_scores(prediction, label, spacing=spacing, classes=[3])[3] == found[3]


def test_a_case_of_some_slices_is_scored_on_them_alone(dataset):
    part = replace(dataset, cases=(replace(dataset.case("case4"), name="part", slices=(1, 3)),))
    volumes = volumes_of(part, ["part"])
    prediction, label, _ = on_source(Oracle()(volumes["part"].image[None])[0], volumes["part"], part, part.case("part"))
    whole = sitk.GetArrayFromImage(sitk.ReadImage(str(dataset.case("case4").label)))
    np.testing.assert_array_equal(label, whole[1:4])
    np.testing.assert_array_equal(prediction, label)


@pytest.mark.parametrize("direction", [np.eye(3), [[1, 0, 0], [0, 0, 1], [0, -1, 0]]], ids=["axial", "coronal"])
def test_a_volume_of_one_slice_is_scored_as_an_image(tmp_path, direction):
    """Or all of its voxels would be surface, and nearly all distances 0."""
    label = np.zeros((1, 24, 32), np.uint8)
    label[0, 4:16, 6:18] = 3
    for name, array in (("image", np.array(LEVELS, np.float32)[label]), ("label", label)):
        image = sitk.GetImageFromArray(array)
        image.SetSpacing((0.5, 0.75, 3.0))
        image.SetDirection(np.asarray(direction, float).ravel().tolist())
        sitk.WriteImage(image, str(tmp_path / f"{name}.nii.gz"))
    (tmp_path / "classes.json").write_text('{"1": "a", "2": "b", "3": "c", "4": "d"}')
    (tmp_path / "set.csv").write_text("image,label,case\nimage.nii.gz,label.nii.gz,one\n")
    found = open_dataset(str(tmp_path / "set.csv"))
    settings = plan(found, Preprocessing(intensity=("none",), spacing=(None, None, None)))
    moved = evaluate(Oracle(shift=2), found, prepare(found, settings, ["one"]), patch=(32, 32)).cases["one"][3]
    want = segmentation_scores(np.roll(label[0], 2, -1), label[0], spacing=(0.75, 0.5), classes=[3])[3]
    assert moved[:3] == pytest.approx(want[:3]) and moved.hd95 == pytest.approx(1.0) and moved.assd > 0.3


def test_ignored_voxels_are_in_no_score(dataset):
    # everything right of column 16, the spleen with it, is ignored: what the network says there does not count
    ignoring = replace(dataset, ignore_label=IGNORE, label_values={0: 0, 1: IGNORE, 3: 3, 4: 4})
    volumes = volumes_of(ignoring, ["case4"])
    found = evaluate(Oracle(), ignoring, volumes, patch=(32, 32)).cases["case4"]
    assert found[1].outcome == "absent"
    assert found[3][:3] == (1.0, 0.0, 0.0)


def test_3d_windows(dataset):
    volumes = volumes_of(dataset, ["case4"], dims=3)
    found = evaluate(Oracle(), dataset, volumes, patch=(4, 16, 16))
    assert found.mean[:3] == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("flat", [False, True], ids=["turned", "flat"])
def test_files_that_lie_otherwise(tmp_path, flat):
    """A volume whose axes run to the other sides and are permuted, and a 2-D image: the same scores."""
    label = np.zeros((5, 16, 12), np.uint8)
    label[1:4, 3:9, 2:8] = 3
    for name, array in (("image", np.array(LEVELS, np.float32)[label]), ("label", label)):
        image = sitk.GetImageFromArray(array[2] if flat else array)
        image.SetSpacing((0.5, 0.75) if flat else (0.5, 0.75, 3.0))
        if not flat:
            image.SetDirection((0.0, 0.0, 1.0, -1.0, 0.0, 0.0, 0.0, -1.0, 0.0))
        sitk.WriteImage(image, str(tmp_path / f"{name}.mha"))
    (tmp_path / "classes.json").write_text('{"1": "a", "2": "b", "3": "c", "4": "d"}')
    (tmp_path / "set.csv").write_text("image,label,case\nimage.mha,label.mha,one\n")
    found = open_dataset(str(tmp_path / "set.csv"))
    settings = plan(found, Preprocessing(intensity=("none",), spacing=(None, None, None)))
    volumes = prepare(found, settings, ["one"])
    assert evaluate(Oracle(), found, volumes, patch=(16, 16)).cases["one"][3][:3] == (1.0, 0.0, 0.0)
    # the network moves it along the columns of LPS: x of the flat image, z of the turned one's file
    moved = evaluate(Oracle(shift=1), found, volumes, patch=(16, 16)).cases["one"][3]
    assert moved.hd95 == pytest.approx(0.5 if flat else 3.0)


def test_wrong_use(dataset):
    volumes = volumes_of(dataset, ["case4"])
    with pytest.raises(WrongUse, match="unknown protocol 'cm': choose from mm, transunet"):
        evaluate(Oracle(), dataset, volumes, patch=(32, 32), protocol="cm")
    with pytest.raises(WrongUse, match="no case to score"):
        evaluate(Oracle(), dataset, {}, patch=(32, 32))
    with pytest.raises(WrongUse, match="logits of case case4 are no finite numbers"):
        evaluate(Oracle(scale=float("nan")), dataset, volumes, patch=(32, 32))
    unlabelled = replace(dataset, cases=(replace(dataset.case("case4"), label=None),))
    with pytest.raises(WrongUse, match="case4 of small has no label to score against"):
        evaluate(Oracle(), unlabelled, volumes, patch=(32, 32))


def test_a_record_comes_back(tmp_path):
    scores = {1: Scores(0.5, 2.0, 1.0, "valid"), 2: Scores(math.nan, math.nan, math.nan, "absent")}
    evaluation = Evaluation({1: "liver", 2: "spleen"}, {"a": scores})
    evaluation.write(tmp_path, data="x")
    record = json.loads((tmp_path / "scores.json").read_text())
    assert record["data"] == "x" and record["classes"]["spleen"]["dice"] is None
    back = Evaluation.from_record(record)
    assert back.classes == evaluation.classes and back.cases["a"][1] == scores[1]
    assert math.isnan(back.cases["a"][2].dice) and back.mean == evaluation.mean
    with (tmp_path / "scores-cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[1] == {"case": "a", "class": "spleen", "dice": "", "hd95": "", "assd": "", "outcome": "absent"}


def test_the_command(teacher, small_csv, tmp_path, capsys):
    run = Path(shutil.copytree(teacher, tmp_path / "run"))
    assert main(["evaluate", str(run)]) == 0
    screen = capsys.readouterr().out
    for words in ("liver", "n_missed", "Means over 2 cases", "No label, in no mean: gallbladder."):
        assert words in screen
    record = json.loads((run / "scores.json").read_text())
    assert set(record["cases"]) == {"case4", "case5"} and record["split"] == "test" and record["parameters"] > 1000
    assert record["notes"][-1] == "Last weights of each run; none was chosen by its test score."
    with (run / "scores.csv").open(newline="") as file:
        assert [row["class"] for row in csv.DictReader(file)] == ["spleen", "gallbladder", "liver", "aorta", "mean"]
    assert imread(run / "overlay.png").std() > 0.05 and imread(run / "curves.png").std() > 0.05

    before = (run / "scores.json").read_text()
    arguments = ["evaluate", str(run), small_csv, "--split", "validation", "--protocol", "transunet"]
    assert main(arguments) == 0
    assert "HD95 voxels" in capsys.readouterr().out
    other = json.loads((run / "scores-validation-transunet.json").read_text())
    assert set(other["cases"]) == {"case3"} and other["protocol"] == "transunet"
    assert (run / "scores.json").read_text() == before
    checkpoint = run / "checkpoints" / "best.ckpt"
    assert main(["evaluate", str(checkpoint)]) == 0
    screen = capsys.readouterr().out
    assert f"{checkpoint} is a checkpoint: no scores are written; name a folder with --out" in screen
    assert "Weights of the checkpoint best.ckpt." in screen and "Last weights" not in screen
    assert main(["evaluate", str(checkpoint), "--out", str(tmp_path / "elsewhere")]) == 0
    record = json.loads((tmp_path / "elsewhere" / "scores.json").read_text())
    assert record["notes"][-1] == "Weights of the checkpoint best.ckpt."
    capsys.readouterr()
    assert main(["evaluate", str(run), "--split", "tset"]) == 2
    assert "unknown split 'tset': choose from test, validation, train, all" in capsys.readouterr().err


def test_names_with_brackets_and_slashes(teacher, tmp_path, monkeypatch, capsys):
    """Which a dataset.json may give to classes and to the data set."""
    names = {1: "spleen", 2: "gallbladder", 3: "liver [left]", 4: "[/aorta]"}
    stranger = replace(open_dataset(load_run(teacher).config.data), name="Abdomen/CT: [all] parts", classes=names)
    trained = replace(load_run(teacher), classes=names, content={})
    stranger = replace(stranger, root=tmp_path)
    monkeypatch.setattr(finish, "load_run", lambda run: trained)
    monkeypatch.setattr(finish, "dataset_of", lambda *a: stranger)
    finish.evaluate_run(tmp_path, out=tmp_path / "out")
    screen = capsys.readouterr().out
    assert "liver [left]" in screen and "[/aorta]" in screen
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "scores-Abdomen-CT-all-parts-test-cases.csv",
        "scores-Abdomen-CT-all-parts-test.csv",
        "scores-Abdomen-CT-all-parts-test.json",
    ]


def test_where_scores_cannot_be_written(teacher, tmp_path, monkeypatch, capsys):
    (tmp_path / "out" / "scores.json").mkdir(parents=True)
    assert main(["evaluate", str(teacher), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert "liver" in said.out and "out cannot be written (Is a directory): make room or choose another" in said.err
    (tmp_path / "file").touch()
    monkeypatch.setattr(finish, "score", None)  # it is told before the work
    assert main(["evaluate", str(teacher), "--out", str(tmp_path / "file" / "out")]) == 2
    assert "out cannot be written (Not a directory)" in capsys.readouterr().err


def test_other_data_with_the_same_names_are_not_the_runs_own(teacher, small_csv, tmp_path, capsys):
    run = Path(shutil.copytree(teacher, tmp_path / "run"))
    other = Path(shutil.copytree(Path(small_csv).parent, tmp_path / "other"))
    moved = Path(shutil.copytree(other, tmp_path / "moved"))
    shutil.copy(other / "image0.nii.gz", other / "image1.nii.gz")
    assert main(["evaluate", str(run), str(other / "small.csv"), "--split", "all"]) == 0
    assert main(["evaluate", str(run), str(other / "small.csv")]) == 0
    assert {p.name for p in run.glob("scores*.json")} == {"scores-small-all.json", "scores-small-test.json"}
    assert main(["evaluate", str(run), str(moved / "small.csv")]) == 0  # the same files elsewhere
    assert (run / "scores.json").exists()


def test_scores_of_two_data_sets_of_one_name_stand_beside_each_other(teacher, small_csv, tmp_path):
    run = Path(shutil.copytree(teacher, tmp_path / "run"))
    for folder in ("a", "b"):
        other = Path(shutil.copytree(Path(small_csv).parent, tmp_path / folder))
        shutil.copy(other / f"image{'ab'.index(folder)}.nii.gz", other / "image2.nii.gz")
    for folder in ("a", "b", "a", "b"):  # the same data again replace their own scores
        assert main(["evaluate", str(run), str(tmp_path / folder / "small.csv")]) == 0
    found = {p.name: json.loads(p.read_text()) for p in run.glob("scores*.json")}
    assert {name: (of["data"], of["path"]) for name, of in found.items()} == {
        "scores-small-test.json": ("small", str(tmp_path / "a" / "small.csv")),
        "scores-b-small-test.json": ("b/small", str(tmp_path / "b" / "small.csv")),
    }


def test_other_data_must_have_the_same_classes_and_channels(teacher, dataset):
    trained = load_run(teacher)
    assert cases_of(trained, dataset, "test") == ("case4", "case5")
    assert len(cases_of(trained, dataset, "all")) == 6
    stranger = replace(dataset, cases=tuple(replace(c, name=f"new {c.name}") for c in dataset.cases), split=None)
    assert len(cases_of(trained, stranger, "test")) == 6  # data that brings no split is all test
    with pytest.raises(WrongUse, match="no labelled train cases"):
        cases_of(trained, stranger, "train")
    with pytest.raises(WrongUse, match="trained for the classes spleen, gallbladder, liver, aorta, small has kidney"):
        check_data(trained, replace(dataset, classes={1: "kidney"}))
    with pytest.raises(WrongUse, match="channels"):
        check_data(trained, replace(dataset, channels=("T1", "T2")))
