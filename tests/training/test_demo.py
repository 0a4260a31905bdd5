"""The demo on a small made-up data set: its stages, its files, its honesty, and that calling it again costs nothing."""

from __future__ import annotations

import csv
import json
import math

import pytest
from matplotlib.image import imread

from medkd_fast.training import demo
from medkd_fast.training.demo import BASELINE, Length, run_demo, stages
from medkd_fast.training.errors import WrongUse
from medkd_fast.training.evaluate import Evaluation
from medkd_fast.training.files import read_json, write_json
from medkd_fast.training.metrics import Scores, Summary
from medkd_fast.training.networks import multiply_accumulates, parameter_count
from medkd_fast.training.runs import RunFolder, load_run
from medkd_fast.training.tables import Entry, caveats, findings
from medkd_fast.training.timing import FUSED, REFERENCE, machine

NETWORKS = ["teacher", "student", "student + CPKD", "student + DMD"]
TINY = Length(teacher_epochs=1, student_epochs=1, timing_rounds=2, steps=3)


@pytest.fixture
def small_demo(monkeypatch, small_csv):
    monkeypatch.setattr(demo, "DATA", small_csv)
    monkeypatch.setattr(demo, "TEACHER_WIDTHS", [8, 8, 8, 16, 16, 8])
    monkeypatch.setattr(demo, "STUDENT_WIDTHS", [4, 4, 4, 8, 8, 4])


def test_the_demo_end_to_end_and_once_more(small_demo, tmp_path, capsys):
    entries = run_demo(tmp_path, length=TINY, seed=1)
    screen = capsys.readouterr().out
    assert list(entries) == NETWORKS
    where = f"timed on {machine()['device']}."  # a GPU where there is one
    for words in (*NETWORKS, "Means over 2 cases", "loss's share, reference", "not a finding", "gallbladder", where):
        assert words in screen

    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics["networks"]) == NETWORKS and metrics["seed"] == 1
    thin = metrics["networks"]["student + DMD"]
    student = load_run(tmp_path / "student_dmd").network
    assert thin["parameters"] == parameter_count(student) < metrics["networks"]["teacher"]["parameters"]
    assert thin["macs"] == multiply_accumulates(student, (1, 1, 32, 32))
    assert set(thin["classes"]["liver"]) == set(Summary._fields)
    for backend in ("fused", "reference"):
        assert 0 < thin[f"loss_ms_{backend}"] and 0 < thin[f"step_ms_{backend}"]
        assert thin[f"loss_share_{backend}"] == thin[f"loss_ms_{backend}"] / thin[f"step_ms_{backend}"]
    assert metrics["networks"]["student"]["loss_ms_fused"] == 0
    assert metrics["networks"]["student"]["step_ms_reference"] is None

    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * (4 + 1)
    mean = next(r for r in rows if r["network"] == "teacher" and r["class"] == "mean")
    assert float(mean["dice"]) == metrics["networks"]["teacher"]["mean"]["dice"]
    for picture in ("overlay.png", "curves.png", "student_cpkd/overlay.png", "teacher/curves.png"):
        assert imread(tmp_path / picture).std() > 0.05  # something is drawn

    checkpoints = [RunFolder(folder).last for folder, _ in stages(tmp_path, TINY, 1).values()]
    before = [c.stat().st_mtime_ns for c in checkpoints]
    again = run_demo(tmp_path, length=TINY, seed=1)
    assert [c.stat().st_mtime_ns for c in checkpoints] == before
    assert all(again[n].evaluation.mean.dice == e.evaluation.mean.dice for n, e in entries.items())
    with pytest.raises(WrongUse, match="another configuration .*seed is 1, asked for 2"):
        run_demo(tmp_path, length=TINY, seed=2)


def test_students_differ_in_the_loss_alone(tmp_path):
    plan = stages(tmp_path, TINY, 7)
    alone = plan[BASELINE][1].to_dict()
    for name, loss in (("student + CPKD", "cpkd"), ("student + DMD", "dmd")):
        helped = plan[name][1].to_dict()
        assert {k for k, v in helped.items() if alone[k] != v} == {"losses", "teacher"}
        assert helped["losses"] == [{"name": loss}]


def entry(dice: float, hd95: float, distilled: bool = True) -> Entry:
    scores = {5: Scores(dice, hd95, 1.0, "valid"), 4: Scores(0.0, math.nan, math.nan, "false")}
    return Entry(Evaluation({4: "gallbladder", 5: "liver"}, {"a": scores}), 1, 1, {}, distilled)


@pytest.mark.parametrize(
    ("dice", "hd95", "verdict"),
    [
        (0.62, 9.0, "Dice +0.020, HD95 -1.0 mm against student: better on both here."),
        (0.62, 11.0, "better on Dice, not on HD95 here."),
        (0.58, 9.5, "better on HD95, not on Dice here."),
        (0.60, 10.0, "Dice +0.000, HD95 +0.0 mm against student: the distillation did not help here."),
        (0.50, 30.0, "the distillation did not help here."),
    ],
)
def test_findings_say_when_it_did_not_help(dice, hd95, verdict):
    entries = {"student": entry(0.6, 10.0, distilled=False), "student + KD": entry(dice, hd95)}
    (sentence,) = findings(entries, "student")
    assert sentence.startswith("student + KD: ") and verdict in sentence and "One subject, one seed" in sentence


def test_findings_compare_no_hd95_over_different_organs():
    """A student that misses the organ that is far off would have the better one."""
    far, missed = Scores(0.1, 90.0, 40.0, "valid"), Scores(0.0, math.nan, math.nan, "missed")
    near = Scores(0.6, 10.0, 1.0, "valid")
    entries = {
        name: Entry(Evaluation({1: "aorta", 2: "liver"}, {"a": {1: scores, 2: near}}), 1, 1, {}, scores is missed)
        for name, scores in (("student", far), ("student + KD", missed))
    }
    (sentence,) = findings(entries, "student")
    assert sentence == (
        "student + KD: Dice -0.050 against student: the distillation did not help here; their HD95 are over different organs "
        "(missed: 1 and 0). One subject, one seed: not a finding."
    )


def test_caveats_name_the_absent_class():
    lines = caveats([entry(0.5, 1.0).evaluation], ["One subject."])
    assert lines[0] == "One subject."
    assert lines[-1] == "No label, in no mean: gallbladder."


def test_files_are_whole_or_absent(tmp_path):
    write_json(tmp_path / "a.json", {"x": math.nan, "y": [math.inf, 1.5], "s": Summary(1.0, 2.0, 3.0, 1, 0, 0)})
    assert read_json(tmp_path / "a.json")["x"] is None
    assert read_json(tmp_path / "a.json")["y"] == ["inf", 1.5]
    assert read_json(tmp_path / "a.json")["s"]["n_valid"] == 1
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert read_json(tmp_path / "a.json")["y"] == ["inf", 1.5]
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_backends_of_the_report_exist():
    from medkd_fast.backend import BACKENDS

    assert {FUSED, REFERENCE} <= set(BACKENDS)
