"""A tiny run end to end: it learns, it is the same again, a killed one goes on bit for bit, the teacher stays out."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from medkd_fast.training.errors import WrongUse
from medkd_fast.training.finish import held_out_scores, predict
from medkd_fast.training.networks import build_network
from medkd_fast.training.pictures import read_curve
from medkd_fast.training.runs import RunConfig, RunFolder, build_module, fit, load_network

ALL_LOSSES = {"cpkd": 1.0, "dmd": 0.3, "kd": 0.1, "dkd": 0.1}


@pytest.fixture
def teacher(tmp_path, config, slices, split) -> Path:
    """Checkpoint of a briefly trained teacher of other widths."""
    fit(replace(config, widths=(8, 8, 8, 16, 16, 8), epochs=1), tmp_path / "teacher", slices, split)
    return RunFolder(tmp_path / "teacher").last


def state(checkpoint: Path) -> dict:
    return torch.load(checkpoint, weights_only=True)


def assert_same_bits(a, b, where="") -> None:
    """Equal tensors and values all the way down, optimiser and schedule included."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_bits(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(x, y, f"{where}/{i}")
    else:
        assert a == b, where


def assert_same_training(a: Path, b: Path) -> None:
    a, b = state(a), state(b)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
        assert_same_bits(a[key], b[key], key)


def test_a_run_learns_and_its_folder_tells_about_it(tmp_path, config, slices, split):
    config = replace(config, epochs=5, steps=30, learning_rate=0.02)
    untrained = held_out_scores(build_network(config.widths, seed=config.seed), slices, split).mean.dice
    network = fit(config, tmp_path / "run", slices, split)
    scores = held_out_scores(network, slices, split)
    assert untrained < 0.2 and scores.mean.dice > 0.9
    found = scores.summaries
    assert found[5].n_valid == 2 and found[2] == pytest.approx((float("nan"),) * 3 + (0, 0, 0), nan_ok=True)
    steps, losses = read_curve(tmp_path / "run", "task")
    assert losses[-1] < 0.6 * losses[0] and steps[-1] == 149
    # Lightning's validation counts as the report does
    assert read_curve(tmp_path / "run", "val_dice")[1][-1] == pytest.approx(scores.mean.dice, abs=1e-6)

    folder = tmp_path / "run"
    assert json.loads((folder / "config.json").read_text())["widths"] == list(config.widths)
    assert json.loads((folder / "versions.json").read_text())["torch"] == torch.__version__
    assert json.loads((folder / "finished.json").read_text()) == {"epochs": 5, "steps": 150}
    assert (folder / "checkpoints" / "best.ckpt").is_file() and list((folder / "tensorboard").glob("events*"))
    loaded = load_network(RunFolder(folder).last)
    assert torch.equal(predict(loaded, slices, [0, 9]), predict(network, slices, [0, 9]))


def test_the_same_configuration_gives_the_same_bits_and_another_seed_does_not(tmp_path, config, slices, split):
    config = replace(config, epochs=1)
    for name, c in {"a": config, "b": config, "c": replace(config, seed=4)}.items():
        fit(c, tmp_path / name, slices, split)
    a, b, c = (RunFolder(tmp_path / name).last for name in "abc")
    assert_same_training(a, b)
    with pytest.raises(AssertionError):
        assert_same_training(a, c)


KILLED_RUN = """
import json, os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from conftest import small_slices
from medkd_fast.training.data import hold_out
from medkd_fast.training.module import SegmentationModule
from medkd_fast.training.runs import RunConfig, fit
import torch
torch.set_num_threads({threads})
train, calls = SegmentationModule.training_step, []
def training_step(self, *arguments):
    calls.append(0)
    if len(calls) == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return train(self, *arguments)
SegmentationModule.training_step = training_step
slices = small_slices()
values = json.loads({config!r})
fit(RunConfig(**values), Path({out!r}), slices, hold_out(len(slices)))
"""


def test_a_killed_run_resumes_bit_for_bit(tmp_path, config, slices, split, teacher):
    # all losses, for the projectors' and the adapter's parameters and their optimiser state
    config = replace(config, losses=ALL_LOSSES, teacher=str(teacher))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    fit(config, whole, slices, split)
    script = KILLED_RUN.format(
        tests=str(Path(__file__).parent),
        threads=torch.get_num_threads(),
        step=2 * config.steps + 3,  # in the third of four epochs
        config=json.dumps({**vars(config), "widths": list(config.widths)}),
        out=str(killed),
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert state(RunFolder(killed).last)["epoch"] == 1 and not RunFolder(killed).finished.exists()
    fit(config, killed, slices, split, resume=True)
    assert_same_training(RunFolder(whole).last, RunFolder(killed).last)
    assert_same_training(RunFolder(whole).last.with_name("best.ckpt"), RunFolder(killed).last.with_name("best.ckpt"))
    assert read_curve(whole, "val_dice") == read_curve(killed, "val_dice")


def test_resuming_a_finished_run_trains_no_further(tmp_path, config, slices, split):
    config = replace(config, epochs=1)
    first = fit(config, tmp_path / "run", slices, split)
    before = RunFolder(tmp_path / "run").last.read_bytes()
    second = fit(config, tmp_path / "run", slices, split, resume=True)
    assert_same_bits(first.state_dict(), second.state_dict())
    assert RunFolder(tmp_path / "run").last.read_bytes() == before
    # killed between the last checkpoint and the note that it is the last
    RunFolder(tmp_path / "run").finished.unlink()
    third = fit(config, tmp_path / "run", slices, split, resume=True)
    assert_same_bits(first.state_dict(), third.state_dict())


def test_patience_stops_early(tmp_path, config, slices, split):
    # a learning rate of 0: no epoch is better than the first
    config, folder = replace(config, epochs=9, learning_rate=0.0, patience=2), RunFolder(tmp_path / "run")
    fit(config, folder.path, slices, split)
    assert json.loads(folder.finished.read_text()) == {"epochs": 3, "steps": 3 * config.steps}
    # killed right after its last epoch: resuming does not add one
    folder.finished.unlink()
    fit(config, folder.path, slices, split, resume=True)
    assert state(folder.last)["global_step"] == 3 * config.steps


def test_the_teacher_helps_unchanged_and_stays_out_of_the_checkpoint(tmp_path, config, slices, split, teacher):
    config = replace(config, losses=ALL_LOSSES, teacher=str(teacher))
    module = build_module(config)
    before = {k: v.clone() for k, v in module.teacher.network.state_dict().items()}
    module.train()
    batch = slices.pick([0, 12])
    module.losses(batch)[0].backward()
    assert not module.teacher.network.training
    assert all(p.grad is None and not p.requires_grad for p in module.teacher.network.parameters())
    assert_same_bits(before, module.teacher.network.state_dict())
    # a network in training mode would give other features; the module's own modes do not reach the teacher
    reference = load_network(teacher)
    assert torch.equal(module.teacher(batch[0])[0], reference(batch[0]))

    teacher_bytes = teacher.read_bytes()
    fit(config, tmp_path / "student", slices, split)
    assert teacher.read_bytes() == teacher_bytes
    keys = state(RunFolder(tmp_path / "student").last)["state_dict"]
    assert {k.split(".")[0] for k in keys} == {"network", "distillation"}
    network = [v for k, v in keys.items() if k.startswith("network.")]
    assert sum(v.numel() for v in network) == sum(p.numel() for p in build_network(config.widths, seed=0).parameters())


def test_the_loss_is_the_task_and_the_weighted_parts(slices, config, teacher):
    weights = {"cpkd": 0.5, "dmd": 0.25}
    module = build_module(replace(config, losses=weights, teacher=str(teacher)))
    loss, parts = module.losses(slices.pick([0, 5]))
    assert set(parts) == {"task", "cpkd/channel", "cpkd/pixel", "dmd/features", "dmd/logits"}
    cpkd, dmd = module.distillation.losses["cpkd"], module.distillation.losses["dmd"]
    expected = parts["task"]
    expected += 0.5 * (cpkd.channel_weight * parts["cpkd/channel"] + cpkd.pixel_weight * parts["cpkd/pixel"])
    expected += 0.25 * (dmd.feature_weight * parts["dmd/features"] + dmd.logit_weight * parts["dmd/logits"])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)  # sums of float32 in another order
    assert all(v.item() > 0 and not v.requires_grad for v in parts.values())


def test_students_start_alike_whatever_helps_them(config, teacher):
    alone = build_module(config).network.state_dict()
    helped = build_module(replace(config, losses={"dmd": 1.0}, teacher=str(teacher))).network.state_dict()
    assert_same_bits(alone, helped)


def test_folders_that_cannot_be_used(tmp_path, config, slices, split, teacher):
    config = replace(config, epochs=1)
    out = tmp_path / "run"
    fit(config, out, slices, split)
    with pytest.raises(WrongUse, match="holds a run already: add --resume"):
        fit(config, out, slices, split)
    with pytest.raises(WrongUse, match=r"another configuration \(epochs is 1, asked for 2; seed is 3, asked for 5\)"):
        fit(replace(config, epochs=2, seed=5), out, slices, split, resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(WrongUse, match="not empty and holds no run"):
        fit(config, tmp_path / "other", slices, split)
    # another teacher under the same path is another run
    distilled = replace(config, losses={"kd": 1.0}, teacher=str(teacher))
    fit(distilled, tmp_path / "student", slices, split)
    teacher.write_bytes(RunFolder(out).last.read_bytes())
    with pytest.raises(WrongUse, match="teacher_sha256 is"):
        fit(distilled, tmp_path / "student", slices, split, resume=True)


def test_checkpoints_that_cannot_be_used(tmp_path):
    with pytest.raises(WrongUse, match="no checkpoint at"):
        load_network(tmp_path / "none.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(WrongUse, match="is no checkpoint of medkd-fast"):
        load_network(tmp_path / "other.ckpt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be >= 1, got 0"),
        ({"patience": 0}, "patience must be >= 1"),
        ({"losses": {"kd": 1.0}}, "give both"),
        ({"teacher": "t.ckpt"}, "give both"),
    ],
)
def test_configurations_that_make_no_sense(change, message):
    with pytest.raises(WrongUse, match=message):
        RunConfig(**{"widths": (4,) * 6, "epochs": 1} | change)
