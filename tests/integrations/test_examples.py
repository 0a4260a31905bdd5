"""The examples run, on the real CT, with few small steps."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from sources import ROOT

EXAMPLES = ROOT / "examples"
SMALL = ["--steps", "6", "--size", "32"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*`torch.jit.*is deprecated.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*ground truth of class.*"),
]


@pytest.fixture(scope="module", autouse=True)
def on_the_path() -> Iterator[None]:
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def teachers() -> Iterator[None]:
    """One teacher for all examples: it is theirs to distil from, and its training is not what they show."""
    demo_ct = importlib.import_module("demo_ct")
    trained = demo_ct.trained_teacher(demo_ct.slices(32)[0], 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_ct, "trained_teacher", lambda dataset, steps: trained)
        yield


def example(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_every_example_has_a_test() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")} - {"demo_ct"}
    assert names == {"plain_pytorch", "ddp_torchrun", "with_accelerate", "with_lightning", "with_monai"}


@pytest.mark.parametrize("name", ["plain_pytorch", "with_accelerate"])
def test_a_loop(teachers: None, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    history = example(name).main(SMALL)
    assert len(history) == 6 and history[-1] < history[0]
    assert 0 <= float(re.search(r"student (0\.\d+)$", capsys.readouterr().out)[1]) <= 1


def test_lightning(teachers: None, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = example("with_lightning").main(SMALL, tmp_path)
    assert trainer.global_step == 6
    assert {"task", "val_task", "kd/cpkd", "kd/dkd"} <= set(trainer.callback_metrics)
    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=False)
    assert all(name.startswith(("network.", "task.")) for name in saved["state_dict"])
    assert re.search(r"student 0\.\d+$", capsys.readouterr().out)


def test_monai(teachers: None, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = example("with_monai").main(SMALL)
    assert trainer.state.iteration == 6 and 0 <= trainer.state.metrics["dice"] <= 1
    assert {"kd/cpkd", "kd/dkd"} <= set(trainer.state.output[0])
    assert re.search(r"student 0\.\d+$", capsys.readouterr().out)


def test_torchrun() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(EXAMPLES / "ddp_torchrun.py"), *SMALL], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    first, last = map(float, re.search(r"loss (\S+) -> (\S+) in 2 processes", done.stdout).groups())
    assert last < first and "between processes: 0.0\n" in done.stdout
