"""compare: every method on the same cases and seeds, figures that are the cells' own, and cells that fail or are there already."""

from __future__ import annotations

import csv
import json
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import SimpleITK as sitk
from matplotlib.image import imread

from medkd_fast.cli import main
from medkd_fast.training import compare as module
from medkd_fast.training.compare import compare, parse_methods
from medkd_fast.training.config import read_yaml
from medkd_fast.training.data.dataset import open_dataset
from medkd_fast.training.data.split import Split
from medkd_fast.training.errors import WrongUse
from medkd_fast.training.runs import fit, load_run

METHODS = "kd,cpkd:0.2"
NETWORKS = ["teacher", "student", "student + KD", "student + cpkd:0.2"]


@pytest.fixture(scope="module")
def student(config):
    return config.resolved(epochs=1, steps=3, seed=5)


@pytest.fixture(scope="module")
def compared(student, teacher, tmp_path_factory) -> tuple[Path, dict]:
    """A comparison of two methods on two seeds, in which one cell failed at first."""
    out = tmp_path_factory.mktemp("compare") / "out"
    fit = module.fit

    def failing(config, folder, **options):
        if config.losses and config.losses[0].name == "kd" and config.seed == 6:
            raise RuntimeError("the loss was\nnan")
        return fit(config, folder, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "fit", failing)
        patch.setattr(module, "TIMING_ROUNDS", 1)
        return out, compare(student, teacher, parse_methods(METHODS), out, seeds=2)


def test_a_failed_cell_is_told_and_the_others_go_on(compared):
    out, record = compared
    assert list(record["networks"]) == NETWORKS
    assert record["networks"]["student + KD"]["failed"] == {"6": "the loss was nan"}
    assert [len(of["cells"]) for of in record["networks"].values()] == [1, 2, 1, 2]
    assert "RuntimeError: the loss was" in (out / "kd" / "seed-6.error.txt").read_text(encoding="utf-8")
    page = (out / "compare.md").read_text(encoding="utf-8")
    assert "* Failed: student + KD, seed 6: the loss was nan" in page
    assert "cannot be concluded from this table" in page
    assert (
        "a missed one with Dice 0 and without distances. So HD95 and ASSD of a network are over what it found." in page
    )


def test_figures_are_the_cells_own(compared):
    out, record = compared
    dice = [json.loads((out / "student" / f"seed-{s}" / "scores.json").read_text())["mean"]["dice"] for s in (5, 6)]
    assert dice[0] != dice[1]
    found = record["networks"]["student"]["dice"]
    assert found == {"mean": statistics.fmean(dice), "sd": statistics.stdev(dice), "n": 2}
    assert record["networks"]["student + KD"]["dice"]["sd"] is None  # of one value there is none
    assert f"{statistics.fmean(dice):.3f} ± {statistics.stdev(dice):.3f}" in (out / "compare.md").read_text(
        encoding="utf-8"
    )
    with (out / "compare.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    mean = [r for r in rows if (r["network"], r["class"]) == ("student", "mean")]
    assert [float(r["dice"]) for r in mean] == dice and [r["seed"] for r in mean] == ["5", "6"]
    assert [r["error"] for r in rows if r["error"]] == ["the loss was nan"]
    assert len(rows) == (1 + 2 + 1 + 2) * 5 + 1
    thin, wide = (record["networks"][n] for n in ("student", "teacher"))
    assert thin["parameters"] < wide["parameters"] and thin["macs"] < wide["macs"]
    for name in ("compare.png", "compare-classes.png", "overlay.png"):
        assert imread(out / name).std() > 0.05


def test_a_mean_over_fewer_seeds_says_so():
    def scores(hd95: float | None) -> dict:
        mean = {"dice": 0.5, "hd95": hd95, "assd": None, "n_valid": 1, "n_missed": 0, "n_false": 0}
        return {"mean": mean, "classes": {}, "parameters": 1, "macs": 1}

    of = {"failed": {}, **module._scores({s: scores(v) for s, v in enumerate((10.0, None, 20.0))})}
    page = module.markdown({"data": "x", "notes": [], "networks": {"student": of}})
    assert "| student | 3 | 0.500 ± 0.000 | 15.0 ± 7.1 (n = 2) | - | 0.0 ± 0.0 |" in page


def test_the_note_names_a_teacher_that_is_a_checkpoint(compared, teacher):
    out, record = compared
    assert any("The teacher is one run." in note for note in record["notes"])
    best = load_run(teacher / "checkpoints" / "best.ckpt")
    cells = [module.Cell("student", 5, best.config, out / "student" / "seed-5")]
    notes = module._record(cells, {}, open_dataset(best.config.data), out, best)["notes"]
    assert any("The teacher is the checkpoint best.ckpt of one run." in note for note in notes)


def test_costs_of_every_student(compared):
    _, record = compared
    plain, helped = (record["networks"][n] for n in ("student", "student + cpkd:0.2"))
    assert plain["loss_ms"] == 0 and 0 < helped["loss_ms"] < helped["step_ms"]
    assert helped["peak_mib"] >= 0 and record["networks"]["teacher"]["step_ms"] is None
    assert any("Load of the machine: " in note for note in record["notes"])


def test_students_differ_in_the_loss_alone(compared, teacher):
    out, _ = compared
    alone = read_yaml(out / "student" / "seed-5" / "config.yaml")
    helped = read_yaml(out / "cpkd-0.2" / "seed-5" / "config.yaml")
    assert {k for k in alone if alone[k] != helped[k]} == {"losses", "teacher", "teacher_sha256"}
    assert [t["name"] for t in helped["losses"]] == ["cpkd"] and helped["losses"][0]["weight"] == 0.2
    splits = {(out / n / "seed-5" / "split.json").read_text() for n in ("student", "kd", "cpkd-0.2")}
    assert len(splits) == 1
    assert alone["preprocessing"] == load_run(teacher).preprocessing.to_dict()


def test_the_command_runs_what_is_missing_and_nothing_else(compared, student, teacher, tmp_path, capsys):
    out, _ = compared
    finished = sorted(out.glob("*/seed-*/checkpoints/last.ckpt"))
    before = [f.stat().st_mtime_ns for f in finished]
    timing = (out / "timing.json").read_text()
    (tmp_path / "student.yaml").write_text(
        f"data: {student.data}\nnetwork_args: {{features: {student.network_args['features']}}}\n"
        f"preprocessing: {{intensity: [none]}}\nepochs: 1\nsteps: 3\nseed: 5\nlearning_rate: 0.02\naccelerator: cpu\n"
    )
    arguments = ["compare", "--config", str(tmp_path / "student.yaml"), "--teacher", str(teacher), "--out", str(out)]
    arguments += ["--methods", METHODS, "--seeds", "2"]
    assert main(arguments) == 0
    screen = capsys.readouterr()
    assert "student + KD, seed 6: Dice" in screen.err and "seed 5" not in screen.err
    assert "student + cpkd:0.2" in screen.out and not (out / "kd" / "seed-6.error.txt").exists()
    record = json.loads((out / "compare.json").read_text())
    assert record["networks"]["student + KD"]["failed"] == {} and record["networks"]["student + KD"]["dice"]["n"] == 2
    assert [f.stat().st_mtime_ns for f in finished] == before
    assert json.loads((out / "timing.json").read_text())["networks"].keys() >= json.loads(timing)["networks"].keys()
    assert main([*arguments, "--steps", "4"]) == 2
    assert "holds another comparison (steps is 3, asked for 4): choose another --out" in capsys.readouterr().err
    again = fit(load_run(teacher).config.resolved(seed=4), tmp_path / "teacher")
    with pytest.raises(WrongUse, match=r"holds another comparison \(teacher_sha256 is \w{64}, asked for \w{64}\)"):
        compare(student, again, parse_methods(METHODS), out, seeds=2)


def test_labels_that_have_changed_are_another_comparison(compared, student, teacher, small_csv):
    out, _ = compared
    label = Path(small_csv).parent / "label4.nii.gz"
    before = label.read_bytes()
    image = sitk.ReadImage(str(label))
    image[0, 0, 0] = 1
    sitk.WriteImage(image, str(label))
    try:
        with pytest.raises(
            WrongUse, match=r"small.csv has changed since the run began \(case4\): bring its files back"
        ):
            compare(student, teacher, parse_methods(METHODS), out, seeds=2)
    finally:
        label.write_bytes(before)


def test_a_teacher_from_other_data_is_scored_on_the_students_test_cases(student, teacher, small_csv, tmp_path):
    other = Path(shutil.copytree(Path(small_csv).parent, tmp_path / "other")) / "small.csv"
    rows = [line.rpartition(",")[0] for line in other.read_text().replace("case", "patient ").splitlines()]
    other.write_text("\n".join(["image,label,case", *rows[1:]]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TIMING_ROUNDS", 1)
        record = compare(
            student.resolved(data=str(other), steps=1), teacher, parse_methods("kd"), tmp_path / "out", seeds=1
        )
    of = {name: json.loads((tmp_path / "out" / name / "scores.json").read_text()) for name in ("teacher", "kd/seed-5")}
    assert len(record["cases"]) == 1 and record["cases"][0].startswith("patient ")
    assert [list(scores["cases"]) for scores in of.values()] == [record["cases"]] * 2
    assert (tmp_path / "out" / "overlay.png").is_file()


def test_a_failure_is_exit_code_1(monkeypatch, teacher, small_csv, tmp_path):
    monkeypatch.setattr(module, "compare", lambda *a, **k: {"networks": {"student": {"failed": {"0": "why"}}}})
    assert main(["compare", small_csv, "--teacher", str(teacher), "--out", str(tmp_path)]) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "must name losses"), ("kd,kd", "names a method twice"), ("mse", "unknown distillation loss 'mse'")],
)
def test_methods_that_are_none(text, message):
    with pytest.raises(WrongUse, match=message):
        parse_methods(text)


def test_wrong_use(student, teacher, tmp_path, small_csv, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(WrongUse, match=r"file/out cannot be written \(Not a directory\): make room or choose another"):
        compare(student, teacher, parse_methods("kd"), tmp_path / "file" / "out")
    with pytest.raises(WrongUse, match="--seeds must be >= 1"):
        compare(student, teacher, parse_methods("kd"), tmp_path / "out", seeds=0)
    bare = replace(load_run(teacher), split=Split(("case0",)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_run", lambda path: bare)
        with pytest.raises(
            WrongUse, match="was trained without test cases, .*: train a teacher with --fractions such as"
        ):
            compare(student, teacher, parse_methods("kd"), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    with pytest.raises(WrongUse, match="is not empty and holds no comparison"):
        compare(student, teacher, parse_methods("kd"), tmp_path / "full")
    assert main(["compare", small_csv]) == 2
    assert "compare needs --teacher" in capsys.readouterr().err
