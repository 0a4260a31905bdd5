"""Tiny runs end to end: they learn, they are the same again, a killed one goes on bit for bit, faults lose nothing."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import SimpleITK as sitk
import torch
from pytorch_lightning.loggers import CSVLogger

from medkd_fast.training import runs
from medkd_fast.training.checkpoints import KeptCheckpoints, newest_good
from medkd_fast.training.config import RunConfig, read_yaml
from medkd_fast.training.data.dataset import open_dataset
from medkd_fast.training.data.prepare import prepare
from medkd_fast.training.data.split import Split
from medkd_fast.training.errors import WrongUse
from medkd_fast.training.evaluate import evaluate
from medkd_fast.training.finish import evaluate_run
from medkd_fast.training.module import SegmentationModule
from medkd_fast.training.networks import build_network, parameter_count
from medkd_fast.training.pictures import read_curve
from medkd_fast.training.runs import RunFolder, default_patch, fit, load_run, plan_run
from medkd_fast.training.teacher_cache import record_teacher


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


def test_a_run_learns_and_its_folder_tells_about_it(tmp_path, config):
    folder = RunFolder(fit(config.resolved(epochs=5, steps=20), tmp_path / "run"))
    trained, dataset = load_run(folder.path), open_dataset(config.data)
    volumes = prepare(dataset, trained.preprocessing, trained.split.validation)
    scores = evaluate(trained.network, dataset, volumes, patch=trained.patch)
    untrained = plan_run(config).network
    assert evaluate(untrained, dataset, volumes, patch=trained.patch).mean.dice < 0.3
    assert scores.mean.dice > 0.7
    steps, losses = read_curve(folder.path, "task")
    assert losses[-1] < 0.6 * losses[0] and steps[-1] == 99
    # the curve counts as the evaluation does; the two slide their windows in other steps, of which there is one here
    assert read_curve(folder.path, "val_dice")[1][-1] == pytest.approx(scores.mean.dice, abs=1e-6)

    there = read_yaml(folder.config)
    assert there["epochs"] == 5 and there["patch"] == [32, 32] and there["preprocessing"]["intensity"] == ["none"]
    assert RunConfig.from_dict(there) == RunConfig.from_dict(trained.config.to_dict())
    assert json.loads((folder.path / "split.json").read_text())["validation"] == ["case3"]
    assert json.loads((folder.path / "versions.json").read_text())["torch"] == torch.__version__
    assert json.loads(folder.finished.read_text()) == {"epochs": 5, "steps": 100}
    assert folder.best.is_file() and list((folder.path / "tensorboard").glob("events*"))
    assert (trained.name, trained.epochs, trained.dims, trained.patch) == ("run", 5, 2, (32, 32))
    assert trained.classes == {1: "spleen", 2: "gallbladder", 3: "liver", 4: "aorta"} and len(trained.channels) == 1
    assert not trained.network.training


def test_three_dimensions_and_another_architecture(tmp_path, config):
    """A 3-D teacher, and a student of another architecture with deep supervision."""
    wide = config.resolved(
        preprocessing={"dims": 3, "intensity": ["none"]},
        patch=(16, 16, 16),
        network="UNet",
        network_args={"channels": [4, 8, 8], "strides": [2, 2]},
        epochs=1,
        steps=2,
        batch_size=2,
    )
    teacher = fit(wide, tmp_path / "teacher")
    # 3-D, its patch and its intensities come from the teacher
    thin = config.resolved(
        preprocessing={},
        network="SegResNetDS",
        network_args={"init_filters": 8, "blocks_down": [1, 1, 1], "dsdepth": 2},
        losses=("cpkd", "dmd", "kd"),
        teacher=str(teacher),
        epochs=1,
        steps=2,
        batch_size=2,
    )
    student = load_run(fit(thin, tmp_path / "student"))
    assert student.patch == (16, 16, 16) and student.dims == 3 and student.preprocessing.intensity == ("none",)
    losses = {t.name: t for t in student.config.losses}
    assert losses["cpkd"].student == ("up_layers.0.blocks",) and losses["cpkd"].teacher == ("model.1.submodule.2",)
    assert student.network(torch.zeros(1, 1, 16, 16, 16)).shape == (1, 5, 16, 16, 16)


def test_the_same_configuration_gives_the_same_bits_and_another_seed_does_not(tmp_path, config):
    config = config.resolved(epochs=1)
    for name, c in {"a": config, "b": config.resolved(workers=1), "c": config.resolved(seed=4)}.items():
        fit(c, tmp_path / name)
    a, b, c = (RunFolder(tmp_path / name).last for name in "abc")
    assert_same_training(a, b)
    with pytest.raises(AssertionError):
        assert_same_training(a, c)


KILLED_RUN = """
import json, os, signal
from pathlib import Path
from medkd_fast.training.config import RunConfig
from medkd_fast.training.module import SegmentationModule
from medkd_fast.training.runs import fit
import torch
torch.set_num_threads({threads})
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background was started deaf to it
train, calls = SegmentationModule.training_step, []
def training_step(self, *arguments):
    calls.append(0)
    if len(calls) == {step}:
        os.kill(os.getpid(), signal.{signal})
    return train(self, *arguments)
SegmentationModule.training_step = training_step
try:
    fit(RunConfig.from_dict(json.loads({config!r})), Path({out!r}))
except KeyboardInterrupt:
    raise SystemExit(130)
"""


def killed(config: RunConfig, out: Path, *, step: int, by: str) -> int:
    """A run in a process of its own that gets a signal in the middle of a step; its exit code."""
    script = KILLED_RUN.format(
        threads=torch.get_num_threads(), step=step, signal=by, config=json.dumps(config.to_dict()), out=str(out)
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode


@pytest.fixture(scope="module")
def helped(config, teacher) -> RunConfig:
    """A student with losses that train projectors and an adapter along, and with dropout, which draws random numbers."""
    arguments = {**config.network_args, "dropout": 0.2}
    return config.resolved(network_args=arguments, losses=("cpkd", "dmd", "fitnet", "dkd"), teacher=str(teacher))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, helped) -> Path:
    """The student, trained without an interruption."""
    return fit(helped, tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize(("by", "wanted"), [("SIGKILL", -signal.SIGKILL), ("SIGINT", 130), ("SIGTERM", 143)])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, helped, whole, by, wanted):
    out = tmp_path / "run"
    assert killed(helped, out, step=2 * helped.steps + 3, by=by) == wanted  # in the third of four epochs
    assert state(RunFolder(out).last)["epoch"] == 1 and not RunFolder(out).finished.exists()
    fit(helped, out, resume=True)
    assert_same_training(RunFolder(whole).last, RunFolder(out).last)
    assert_same_training(RunFolder(whole).best, RunFolder(out).best)
    assert read_curve(whole, "val_dice") == read_curve(out, "val_dice")


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path, helped, whole):
    out = tmp_path / "run"
    assert killed(helped, out, step=helped.steps, by="SIGINT") == 130
    assert RunFolder(out).config.exists() and not RunFolder(out).begun
    other = helped.resolved(epochs=1, steps=2)
    fit(other, out)  # another configuration takes the folder over, and its curve is its own
    assert read_curve(out, "task")[0] == [1] and read_yaml(RunFolder(out).config)["steps"] == 2

    out = tmp_path / "resumed"
    killed(helped, out, step=helped.steps, by="SIGKILL")
    fit(helped, out, resume=True)
    assert_same_training(RunFolder(whole).last, RunFolder(out).last)


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(tmp_path, helped, whole, capfd):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    folder = RunFolder(out)
    folder.finished.unlink()
    damaged = bytearray(folder.last.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF  # one byte of a weight or of the optimiser's state
    folder.last.write_bytes(damaged)
    assert load_run(out).epochs == helped.epochs - 1
    assert "last.ckpt is damaged" in capfd.readouterr().err
    fit(helped, out, resume=True)
    assert "taking previous.ckpt" in capfd.readouterr().err
    assert_same_training(RunFolder(whole).last, folder.last)
    # the damaged one did not become the one before the last
    assert state(folder.checkpoints / "previous.ckpt")["epoch"] == helped.epochs - 2

    folder.finished.unlink()
    for path in folder.checkpoints.glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WrongUse, match="all checkpoints in .* are damaged"):
        fit(helped, out, resume=True)


def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays_whole(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    kept = KeptCheckpoints()
    kept.save_checkpoint({"epoch": 0}, path)
    kept.save_checkpoint({"epoch": 1}, path)
    assert (state(path)["epoch"], state(tmp_path / "previous.ckpt")["epoch"]) == (1, 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # or the kernel would end the process
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with pytest.raises(
            WrongUse, match=r"last.ckpt cannot be written \(File too large\); the one before it is whole"
        ):
            kept.save_checkpoint({"weights": torch.rand(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert (state(path)["epoch"], state(tmp_path / "previous.ckpt")["epoch"]) == (1, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]


def test_killed_between_the_two_moves_of_a_checkpoint(tmp_path):
    kept = KeptCheckpoints()
    kept.save_checkpoint({"epoch": 0}, tmp_path / "last.ckpt")
    os.replace(tmp_path / "last.ckpt", tmp_path / "previous.ckpt")
    path, content = newest_good(tmp_path)
    assert (path.name, content["epoch"]) == ("previous.ckpt", 0)
    assert newest_good(tmp_path / "nothing") is None


def test_a_run_on_a_full_disk_stops_with_one_line_and_goes_on(tmp_path, config, monkeypatch):
    config, out = config.resolved(epochs=3), tmp_path / "run"
    write, full = KeptCheckpoints.save_checkpoint, []

    def save(self, checkpoint, path, storage_options=None):
        full.append(0)
        limit = 20_000 if len(full) > 2 else -1  # best and last of the first epoch fit
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
        try:
            write(self, checkpoint, path, storage_options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))

    monkeypatch.setattr(KeptCheckpoints, "save_checkpoint", save)
    with pytest.raises(WrongUse, match="cannot be written .*go on with --resume"):
        fit(config, out)
    assert state(RunFolder(out).last)["epoch"] == 0
    monkeypatch.undo()
    fit(config, out, resume=True)
    fit(config, tmp_path / "whole")
    assert_same_training(RunFolder(tmp_path / "whole").last, RunFolder(out).last)


def test_logs_that_cannot_be_written_are_one_line_too(tmp_path, config, monkeypatch):
    def full(self, *arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(CSVLogger, "log_metrics", full)
    with pytest.raises(
        WrongUse, match=r"run cannot be written \(No space left on device\); the last checkpoint is whole"
    ):
        fit(config.resolved(epochs=1), tmp_path / "run")


def test_resuming_a_finished_run_trains_no_further(tmp_path, config, teacher):
    out = tmp_path / "teacher"
    shutil.copytree(teacher, out)
    config, folder = load_run(out).config, RunFolder(out)
    before = folder.last.read_bytes()
    half = folder.checkpoints / ".123.last.ckpt"  # what a kill in the middle of writing leaves
    half.write_bytes(before[:1000])
    fit(config, out, resume=True)
    assert folder.last.read_bytes() == before and not half.exists()
    # killed between the last checkpoint and the note that it is the last
    folder.finished.unlink()
    fit(config, out, resume=True)
    assert_same_training(RunFolder(teacher).last, folder.last)
    assert folder.finished.is_file()


def test_a_moved_run_keeps_its_best(tmp_path, config):
    # a learning rate of 0: no epoch is better than the first
    config = config.resolved(epochs=2, steps=1, learning_rate=0.0)
    fit(config, tmp_path / "here")
    (tmp_path / "here" / "finished.json").unlink()
    os.replace(tmp_path / "here" / "checkpoints" / "previous.ckpt", tmp_path / "here" / "checkpoints" / "last.ckpt")
    shutil.move(tmp_path / "here", tmp_path / "there")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(config, tmp_path / "there", resume=True)
    folder = RunFolder(tmp_path / "there")
    assert (state(folder.best)["epoch"], state(folder.last)["epoch"]) == (0, 1)


def test_a_run_goes_on_with_its_data_under_another_name_and_with_no_others(tmp_path, config, small_csv, monkeypatch):
    data = Path(shutil.copytree(Path(small_csv).parent, tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    config = config.resolved(data="data/small.csv", epochs=1, steps=1)
    out = fit(config, tmp_path / "run")
    assert load_run(out).config.data == str(data / "small.csv")
    RunFolder(out).finished.unlink()
    os.replace(data, tmp_path / "moved")
    with pytest.raises(WrongUse, match=r"data that run was trained on: no data at .*; name where they lie now"):
        evaluate_run(out)
    moved = config.resolved(data=str(tmp_path / "moved" / "small.csv"))
    fit(moved, out, resume=True)
    assert RunFolder(out).finished.exists()
    RunFolder(out).finished.unlink()
    shutil.copy(tmp_path / "moved" / "label0.nii.gz", tmp_path / "moved" / "label4.nii.gz")
    with pytest.raises(WrongUse, match=r"small.csv has changed since the run began \(case4\): bring its files back"):
        fit(moved, out, resume=True)


def test_patience_stops_early(tmp_path, config):
    # a learning rate of 0: no epoch is better than the first
    config, folder = config.resolved(epochs=9, steps=1, learning_rate=0.0, patience=2), RunFolder(tmp_path / "run")
    fit(config, folder.path)
    assert json.loads(folder.finished.read_text()) == {"epochs": 3, "steps": 3}
    # killed right after its last epoch: resuming does not add one
    folder.finished.unlink()
    fit(config, folder.path, resume=True)
    assert state(folder.last)["global_step"] == 3


def test_patience_needs_a_validation_label_with_a_class(tmp_path, config, small_csv):
    data = Path(shutil.copytree(Path(small_csv).parent, tmp_path / "data"))
    label = sitk.ReadImage(str(data / "label3.nii.gz"))  # the one of the validation
    sitk.WriteImage(label * 0, str(data / "label3.nii.gz"))
    with pytest.raises(
        WrongUse, match="patience needs a validation case whose label has a class, .*: case3; leave it out"
    ):
        plan_run(config.resolved(data=str(data / "small.csv"), patience=2))


def test_a_student_from_recorded_logits(tmp_path, config, teacher, cache):
    config = config.resolved(losses=("kd", "dmd"), teacher=str(teacher), cache_teacher=True, epochs=1)
    run = plan_run(config)
    volumes = {name: run.volumes[name] for name in run.split.train}
    logits = record_teacher(run.teacher, volumes, patch=run.config.patch)
    volume = volumes["case0"]
    with torch.no_grad():
        direct = load_run(teacher).network(volume.image.transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(logits["case0"].float(), direct, rtol=2**-8, atol=1e-3)  # bfloat16 has 8 bits
    assert logits["case0"].dtype == torch.bfloat16
    # without augmentation a batch's logits are those of its image
    _, _, replayed = next(iter(run.loader(teacher_logits=logits)))
    assert replayed.shape == (4, 5, 32, 32) and replayed.dtype == torch.float32
    files = sorted((cache / "teachers").glob("*/logits.npy"))
    times = [f.stat().st_mtime_ns for f in files]
    fit(config, tmp_path / "run")
    assert sorted((cache / "teachers").glob("*/logits.npy")) == files and [f.stat().st_mtime_ns for f in files] == times
    assert read_curve(tmp_path / "run", "kd")[1][-1] > 0
    with pytest.raises(
        WrongUse, match=r"cache_teacher keeps the teacher's logits alone, and cpkd compares its layers \(upc"
    ):
        plan_run(config.resolved(losses=("kd", "cpkd")))


def test_the_student_takes_the_teachers_split_and_preprocessing(tmp_path, config, teacher):
    trained = load_run(teacher)
    run = plan_run(config.resolved(losses=("kd",), teacher=str(teacher), preprocessing={}))
    assert run.split == trained.split and run.config.preprocessing == trained.preprocessing
    assert (run.config.fractions, run.config.split_seed) == ((0.7, 0.1, 0.2), 0)


@pytest.fixture(scope="module")
def unsplit(tmp_path_factory, small_csv) -> Path:
    """The small data without its split, and without its sixth case: the folder."""
    folder = Path(shutil.copytree(Path(small_csv).parent, tmp_path_factory.mktemp("unsplit") / "data"))
    lines = [line.rpartition(",")[0] for line in (folder / "small.csv").read_text().splitlines()]
    (folder / "five.csv").write_text("\n".join(lines[:-1]))
    (folder / "small.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def taught(tmp_path_factory, config, unsplit) -> tuple[RunConfig, Split]:
    """A student's configuration, whose teacher was trained on five cases, and the teacher's split."""
    alone = config.resolved(data=str(unsplit / "five.csv"), epochs=1, steps=1)
    teacher = fit(alone, tmp_path_factory.mktemp("taught") / "teacher")
    return alone.resolved(losses=("kd",), teacher=str(teacher)), load_run(teacher).split


def test_new_and_lacking_cases_do_not_move_those_of_the_teacher(unsplit, taught):
    config, split = taught
    with pytest.warns(
        runs.OtherSplit, match=r"kept for its 5 cases that small holds; new ones are 1 \(case5\): in train"
    ):
        found = plan_run(config.resolved(data=str(unsplit / "small.csv"))).split
    assert found == replace(split, train=(*split.train, "case5"))
    # a new image of a patient whom the teacher was tested on is in the test too
    text = (unsplit / "small.csv").read_text().replace("image,label,case", "image,label,case,patient")
    lines = [f"{line},{split.test[0] if 'case5' in line else line[-5:]}" for line in text.splitlines()[1:]]
    (unsplit / "twice.csv").write_text("\n".join([text.splitlines()[0], *lines]))
    with pytest.warns(runs.OtherSplit):
        assert plan_run(config.resolved(data=str(unsplit / "twice.csv"))).split == replace(
            split, test=(*split.test, "case5")
        )
    lines = (unsplit / "five.csv").read_text().splitlines()
    (unsplit / "four.csv").write_text("\n".join(line for line in lines if split.train[0] not in line))
    with pytest.warns(runs.OtherSplit, match="kept for its 4 cases that four holds; new ones are none"):
        assert plan_run(config.resolved(data=str(unsplit / "four.csv"))).split == replace(split, train=split.train[1:])


def test_fractions_that_were_asked_for_win_over_the_teachers_split(taught):
    config, split = taught
    with warnings.catch_warnings():
        warnings.simplefilter("error", runs.OtherSplit)
        assert plan_run(config.resolved(fractions=(0.7, 0.1, 0.2), split_seed=0)).split == split
    with pytest.warns(runs.OtherSplit, match=r"trained on \d \(case.*\) of the student's test cases"):
        run = plan_run(config.resolved(fractions=(0.2, 0.2, 0.6)))
    assert len(run.split.test) == 3 and run.config.fractions == (0.2, 0.2, 0.6)


def test_of_several_processes_the_first_alone_tells_of_another_split(taught, monkeypatch):
    config, _ = taught
    monkeypatch.setattr(runs.rank_zero_only, "rank", 1, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", runs.OtherSplit)
        assert len(plan_run(config.resolved(fractions=(0.2, 0.2, 0.6))).split.test) == 3


def test_folders_that_cannot_be_used(tmp_path, config, teacher):
    out = tmp_path / "run"
    shutil.copytree(teacher, out)
    config = load_run(out).config
    with pytest.raises(WrongUse, match="holds a run already: add --resume"):
        fit(config, out)
    with pytest.raises(WrongUse, match=r"another configuration \(epochs is 1, asked for 2; seed is 3, asked for 5\)"):
        fit(config.resolved(epochs=2, seed=5), out, resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(WrongUse, match="not empty and holds no run"):
        fit(config, tmp_path / "other")
    with pytest.raises(WrongUse, match=r"thesis.txt/run cannot be written \(Not a directory\): choose another --out"):
        fit(config, tmp_path / "other" / "thesis.txt" / "run")
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"
    # a project that has a config.yaml and logs of its own
    (tmp_path / "project" / "logs").mkdir(parents=True)
    (tmp_path / "project" / "config.yaml").write_text("lr: 3\n")
    (tmp_path / "project" / "logs" / "metrics.csv").write_text("mine")
    for resume in (False, True):
        with pytest.raises(WrongUse, match="not empty and holds no run"):
            fit(config, tmp_path / "project", resume=resume)
    assert (tmp_path / "project" / "config.yaml").read_text() == "lr: 3\n"
    assert (tmp_path / "project" / "logs" / "metrics.csv").read_text() == "mine"


LOCKING = """
import sys
from pathlib import Path
from medkd_fast.training.lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time_trains_in_a_folder(tmp_path, config):
    config, out = config.resolved(epochs=1, steps=1), tmp_path / "run"
    command = [sys.executable, "-c", LOCKING, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        for resume in (False, True):
            with pytest.raises(WrongUse, match="another process trains in .*run: wait until it has ended, or choose"):
                fit(config, out, resume=resume)
        other.kill()
    fit(config, out)  # what a killed one leaves is in nobody's way
    assert not (out / ".lock").exists()


def test_a_damaged_split_is_told(tmp_path, teacher):
    out = Path(shutil.copytree(teacher, tmp_path / "run"))
    (out / "split.json").write_text('{"train": [')
    with pytest.raises(WrongUse, match=r"split.json is damaged \(Exp.*: bring it back, or choose another folder"):
        fit(load_run(out).config, out, resume=True)
    (out / "split.json").unlink()
    with pytest.raises(WrongUse, match=r"split.json cannot be read \(No such file"):
        fit(load_run(out).config, out, resume=True)


def test_another_teacher_under_the_same_name_is_another_run(tmp_path, config, teacher):
    theirs = tmp_path / "teacher"
    shutil.copytree(teacher, theirs)
    config = config.resolved(losses=("kd",), teacher=str(theirs), epochs=1, steps=1)
    fit(config, tmp_path / "student")
    content = state(RunFolder(theirs).last)
    content["state_dict"]["model.final_conv.bias"] += 1
    torch.save(content, RunFolder(theirs).last)
    with pytest.raises(WrongUse, match="teacher_sha256 is"):
        fit(config, tmp_path / "student", resume=True)


def test_checkpoints_that_cannot_be_used(tmp_path):
    with pytest.raises(WrongUse, match="no run at"):
        load_run(tmp_path / "none.ckpt")
    with pytest.raises(WrongUse, match="no checkpoint in"):
        load_run(tmp_path)
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(WrongUse, match="is no checkpoint of medkd-fast"):
        load_run(tmp_path / "other.ckpt")
    (tmp_path / "broken.ckpt").write_bytes(b"PK\x03\x04nothing")
    with pytest.raises(WrongUse, match="is no checkpoint, or a damaged one"):
        load_run(tmp_path / "broken.ckpt")


def test_only_the_student_is_kept(whole, config, helped):
    content = state(RunFolder(whole).last)
    assert {k.split(".")[1] for k in content["state_dict"]} == {"student", "losses"}
    trained = load_run(whole)
    alone = build_network(
        "BasicUNet", helped.network_args, dims=2, in_channels=1, num_classes=5, patch=(32, 32), seed=0
    )
    assert parameter_count(trained.network) == parameter_count(alone)
    assert asdict(trained.split)["test"] == ("case4", "case5")


def test_training_labels_without_any_class_are_told(tmp_path, config, small_csv):
    """Or it would train for hours towards background alone."""
    data = Path(shutil.copytree(Path(small_csv).parent, tmp_path / "my data"))
    for number in range(3):
        label = sitk.ReadImage(str(data / f"label{number}.nii.gz"))
        sitk.WriteImage(label * 0, str(data / f"label{number}.nii.gz"))
    data = data / "small.csv"
    command = f"`medkd-fast data '{data}'`"
    with pytest.raises(WrongUse, match=rf"training cases, 3 \(case0, case1, case2\), has a class.*: {command} counts"):
        plan_run(config.resolved(data=str(data)))


def test_the_default_patch(plan):
    volumes = list(plan.volumes.values())
    assert default_patch(volumes, 2) == (32, 32) and default_patch(volumes, 3) == (16, 32, 32)


def test_a_teacher_that_cannot_teach(tmp_path, config, teacher):
    content = state(RunFolder(teacher).last)
    content["medkd_fast"]["channels"] = ["T1", "T2"]
    weight = content["state_dict"]["model.conv_0.conv_0.conv.weight"]
    content["state_dict"]["model.conv_0.conv_0.conv.weight"] = torch.cat([weight, weight], 1)
    torch.save(content, tmp_path / "two.ckpt")
    with pytest.raises(WrongUse, match="two was trained for the channels T1, T2, small has .*: they must agree"):
        plan_run(config.resolved(losses=("kd",), teacher=str(tmp_path / "two.ckpt")))
    content = state(RunFolder(teacher).last)
    content["medkd_fast"]["classes"] = {1: "liver", 2: "gallbladder", 3: "spleen", 4: "aorta"}
    torch.save(content, tmp_path / "turned.ckpt")
    with pytest.raises(WrongUse, match="turned was trained for the classes liver, .*, small has spleen, .*: they must"):
        plan_run(config.resolved(losses=("kd",), teacher=str(tmp_path / "turned.ckpt")))
    with pytest.raises(WrongUse, match=r"has dims 2, the student's data 3"):
        plan_run(config.resolved(losses=("kd",), teacher=str(teacher), preprocessing={"dims": 3}, patch=(16, 32, 32)))


def test_what_needs_no_volumes_is_told_before_they_are_prepared(config, teacher, monkeypatch):
    monkeypatch.setattr(runs, "prepare", lambda *arguments: pytest.fail("may take hours"))
    three = {"preprocessing": {"dims": 3}}
    for change, message in (
        ({"patch": (16, 16, 16)}, "patch must be 2 sizes for dims 2"),
        ({"network": "UNut"}, "no network 'UNut'"),
        ({"losses": ("kd",), "teacher": str(teacher), **three}, "has dims 2, the student's data 3"),
    ):
        with pytest.raises(WrongUse, match=message):
            plan_run(config.resolved(**change))


def test_a_run_that_diverges_is_told_and_keeps_the_epoch_before(tmp_path, config, monkeypatch):
    config, folder = config.resolved(epochs=3, steps=3), RunFolder(tmp_path / "run")
    losses, calls = SegmentationModule.losses, []

    def diverging(self, batch):
        loss, parts = losses(self, batch)
        calls.append(0)
        return loss * (float("nan") if len(calls) == 5 else 1), parts

    monkeypatch.setattr(SegmentationModule, "losses", diverging)
    with pytest.raises(
        WrongUse, match="training has diverged: after epoch 2 the weights or losses are no finite numbers"
    ):
        fit(config, folder.path)
    assert state(folder.last)["epoch"] == state(folder.best)["epoch"] == 0 and not folder.finished.exists()
    assert all(v.isfinite().all() for v in state(folder.last)["state_dict"].values())


def test_losses_that_are_no_numbers_in_every_step_are_told_though_the_weights_stay(tmp_path, config, monkeypatch):
    """As where float16 overflows in every forward and its scaler skips every step."""
    losses = SegmentationModule.losses

    def skipped(self, batch):
        loss, parts = losses(self, batch)
        return loss.detach() * float("nan") + 0 * self.network.final_conv.bias.sum(), parts

    monkeypatch.setattr(SegmentationModule, "losses", skipped)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure: closure())
    with pytest.raises(WrongUse, match="after epoch 1 the weights or losses are no finite numbers"):
        fit(config.resolved(epochs=1, steps=1), tmp_path / "run")


@pytest.mark.parametrize(
    "words",
    [
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of ...",
        "Caught RuntimeError in DataLoader worker process 0.\nunable to allocate shared memory(shm) for file </torch_7>: No space",
        "CUDA error: out of memory",
    ],
)
def test_workers_without_shared_memory_are_one_line(tmp_path, config, monkeypatch, words):
    def failing(module, *arguments):
        raise RuntimeError(words)

    monkeypatch.setattr(SegmentationModule, "training_step", failing)
    ours = "CUDA" not in words
    with pytest.raises(WrongUse if ours else RuntimeError, match="in the shared memory" if ours else "CUDA"):
        fit(config.resolved(epochs=1, workers=1), tmp_path / "run")


def test_what_this_machine_cannot_do(tmp_path, config):
    for change in ({"accelerator": "abacus"}, {"strategy": "hope"}):
        with pytest.raises(WrongUse, match="this machine cannot train like that: .*"):
            fit(config.resolved(**change), tmp_path / "run")
    fit(config.resolved(epochs=1, steps=1), tmp_path / "run")  # nothing was lost
    with pytest.raises(WrongUse, match="holds a run already"):
        fit(config.resolved(epochs=1, steps=1), tmp_path / "run")


def test_a_start_on_a_full_disk_leaves_nothing_in_the_way(tmp_path, config, monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runs, "versions", full)  # what is written beside config.yaml
    with pytest.raises(WrongUse, match="cannot be written .*make room or choose another --out"):
        fit(config, tmp_path / "run")
    monkeypatch.undo()
    fit(config.resolved(epochs=1, steps=1), tmp_path / "run")
