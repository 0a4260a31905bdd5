"""Two processes with half the batch each learn what one process with the whole batch does."""

from __future__ import annotations

import copy
import json
import resource
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from medkd_fast import cli
from medkd_fast.losses.catalogue import LOSSES
from medkd_fast.training.config import RunConfig, read_yaml
from medkd_fast.training.distillation import LossTerm, resolve
from medkd_fast.training.module import SegmentationModule
from medkd_fast.training.runs import Plan, RunFolder, build_module, load_run, plan_run

# A loss whose mean is over pixels, images or channels of which every process has as many, and those that `sync` takes over
# all processes. The others: cirkd compares all pairs of images, and a process has only its own; boundary_kd and the parts
# of emkd, ifvd and the projected features with ignored pixels divide by a count that differs between processes; ickd's
# adapter has a batch normalisation, whose statistics are the process's own.
DIFFERENT = {"cirkd", "boundary_kd", "emkd", "ickd"}
NAMES = [n for n in LOSSES if n not in DIFFERENT]

WORKER = """
import json, os, sys
import torch, torch.distributed as dist
from medkd_fast.training.config import RunConfig
from medkd_fast.training.runs import plan_run
sys.path.insert(0, {tests!r})
from test_ddp import all_gradients
torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{store}", rank=rank, world_size=2)
config = RunConfig.from_dict(json.loads({config!r}))
image, label = torch.load({batch!r})
half = slice(2 * rank, 2 * rank + 2)
found = all_gradients(plan_run(config), (image[half], label[half]), ddp=True)
torch.save(found, {out!r} if rank == 0 else os.devnull)  # right after a collective, leaving the group can hang
dist.destroy_process_group()
"""


class Step(torch.nn.Module):
    """A training step as the forward of a module, for DistributedDataParallel, which looks at nothing else."""

    def __init__(self, module: SegmentationModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, *batch: torch.Tensor) -> torch.Tensor:
        return self.module.losses(batch)[0]


def all_gradients(run: Plan, batch, *, ddp: bool = False) -> dict[str, dict[str, torch.Tensor]]:
    """Of the task loss with every loss in turn: the gradient of every parameter."""
    found = {}
    for name in NAMES:
        config = run.config.resolved(losses=resolve([LossTerm(name)], *run.surveys))
        module = build_module(replace(run, config=config, network=copy.deepcopy(run.network)))
        step: torch.nn.Module = Step(module.train())
        if ddp:
            step = torch.nn.parallel.DistributedDataParallel(step)
        step(*batch).backward()
        found[name] = {name: p.grad.clone() for name, p in module.named_parameters()}
        module.model.close()
    return found


@pytest.fixture(scope="module")
def distilled(config, teacher) -> RunConfig:
    return config.resolved(teacher=str(teacher), losses=("kd",))


@pytest.fixture(scope="module")
def both(tmp_path_factory, distilled) -> tuple[dict, dict]:
    """Gradients of every loss with the task loss: of one process, and of two."""
    folder = tmp_path_factory.mktemp("ddp")
    run = plan_run(distilled)
    batch = next(iter(run.loader()))
    torch.save(batch, folder / "batch.pt")
    one = all_gradients(run, batch)
    code = WORKER.format(
        tests=str(Path(__file__).parent),
        store=folder / "store",
        config=json.dumps(distilled.to_dict()),
        batch=str(folder / "batch.pt"),
        out=str(folder / "two.pt"),
    )
    workers = [
        subprocess.Popen([sys.executable, "-c", code, str(rank)], stderr=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    errors = [w.communicate(timeout=300)[1] for w in workers]
    assert [w.returncode for w in workers] == [0, 0], "\n".join(errors)
    return one, torch.load(folder / "two.pt")


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_give_the_gradients_of_one(both, name):
    one, two = both
    assert one[name].keys() == two[name].keys()
    scale = max(g.abs().max() for g in one[name].values())
    for parameter, gradient in one[name].items():
        # sums of float32 in another order
        torch.testing.assert_close(
            two[name][parameter], gradient, rtol=1e-3, atol=2e-5 * scale, msg=lambda m, p=parameter: f"{p}: {m}"
        )


def test_a_run_with_two_processes_ends_where_one_with_twice_the_batch_does(tmp_path, config):
    """Through the command line and Lightning: the same draws, the same weights, the same validation."""
    options = ["--network-arg", "features=4,4,4,8,8,4", "--intensity", "none", "--epochs", "2", "--steps", "3"]
    options += ["--accelerator", "cpu", "--seed", "3"]
    for out, more in (
        ("one", ["--batch-size", "4"]),
        ("two", ["--batch-size", "2", "--devices", "2", "--strategy", "ddp"]),
    ):
        command = [
            sys.executable,
            "-m",
            "medkd_fast.cli",
            "train",
            config.data,
            *options,
            *more,
            "--out",
            str(tmp_path / out),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("the run is in") == 1  # the first process speaks for all
        assert done.stderr.count("epoch 2/2") == 1
    image = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    one, two = (load_run(tmp_path / out).network(image) for out in ("one", "two"))
    # a bias before an instance normalisation changes nothing, and its gradient is rounding alone: not the weights are compared
    torch.testing.assert_close(two, one, rtol=1e-2, atol=1e-2 * one.abs().max().item())
    callbacks = [torch.load(RunFolder(tmp_path / out).best, weights_only=True)["callbacks"] for out in ("one", "two")]
    best = [next(v["best_model_score"].item() for k, v in c.items() if "val_dice" in k) for c in callbacks]
    assert best[1] == pytest.approx(best[0], abs=0.02)


def trained(launcher: list[str], data: str, out: Path, *options: str, file_size: int = -1) -> tuple[int, str]:
    """A tiny run of the command line in several processes: exit code and standard error. file_size: of the largest file."""
    command = ["medkd_fast.cli", "train", data, "--network-arg", "features=4,4,4,8,8,4", "--intensity", "none"]
    command += ["--steps", "2", "--batch-size", "2", "--accelerator", "cpu", "--out", str(out), *options]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *command],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, -1)),
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("devices", ["1", "3"])
def test_processes_of_torchrun_that_devices_do_not_count_are_refused(tmp_path, config, devices):
    """With the default, one device, each would train alone and write into the other's folder."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    code, said = trained(torchrun, config.data, tmp_path / "run", "--devices", devices)
    assert f"2 processes were started, and devices times num_nodes is {devices}: give --devices" in said
    assert code != 0 and not RunFolder(tmp_path / "run").begun


def test_a_disk_that_the_first_process_finds_full_is_one_line(tmp_path, config):
    """The other, which waits for it, ends without a word."""
    plan_run(config)  # the prepared volumes are on the disk
    code, said = trained([], config.data, tmp_path / "run", "--devices", "2", "--epochs", "1", file_size=60_000)
    assert code == 2, said
    assert said.splitlines()[-1].startswith("medkd-fast: the checkpoint") and "Traceback" not in said, said


def test_machines_that_do_not_share_the_runs_folder_do_not_go_on(tmp_path, config):
    """One would go on from its checkpoint, the other from the start."""
    options = ["--intensity", "none", "--accelerator", "cpu", "--steps", "2", "--epochs", "2"]
    assert cli.main(["train", config.data, *options, "--num-nodes", "1", "--out", str(tmp_path / "0")]) == 0
    first = RunFolder(tmp_path / "0")
    first.finished.unlink()
    (first.checkpoints / "previous.ckpt").replace(first.last)
    values = read_yaml(first.config)
    first.config.write_text(yaml.safe_dump({**values, "num_nodes": 2}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        at = ["--master-addr", "127.0.0.1", "--master-port", str(free.getsockname()[1])]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *at]
    run = ["-m", "medkd_fast.cli", "train", config.data, *options, "--num-nodes", "2", "--resume"]
    machines = [
        subprocess.Popen(
            [*torchrun, "--node-rank", n, *run, "--out", str(tmp_path / n)], stderr=subprocess.PIPE, text=True
        )
        for n in "01"
    ]
    try:
        said = [machine.communicate(timeout=120)[1] for machine in machines]
    finally:
        for machine in machines:
            machine.terminate()
    assert all("a process goes on after 2 steps, another after 0: --out must be one folder" in text for text in said)
