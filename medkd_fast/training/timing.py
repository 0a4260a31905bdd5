"""What a training step costs, and how much of it are the distillation losses: time by backend, and memory at the peak."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from medkd_fast import use_backend
from medkd_fast.distiller import Distiller
from medkd_fast.layers import find_layers, unwrapped
from medkd_fast.training.bars import track
from medkd_fast.training.module import SegmentationModule

FUSED, REFERENCE = "auto", "reference"
FUSED_STEPS = 5

Batch = Sequence[Tensor]


class StepCost(NamedTuple):
    """Medians of one backend. step_ms: a whole optimiser step, in ms. loss_ms: the distillation losses in it, forward and backward."""

    step_ms: float
    loss_ms: float

    @property
    def share(self) -> float:
        """The losses' part of the step, in [0, 1]."""
        return self.loss_ms / self.step_ms


def step_costs(module: SegmentationModule, batch: Batch, *, rounds: int) -> dict[str, StepCost]:
    """Time steps on one real batch for each backend, in turns, so that a busy moment hits both.

    A round is `FUSED_STEPS` fused steps and one reference step, which can take many times as long.

    A step is the student's forward, the teacher's forward, all losses, the backward and the optimiser. Without a teacher there
    is no distillation loss (0 ms) and no second backend. The module trains on while it is timed: give it a copy.
    """
    step = _Step(module, batch)
    turn = [FUSED] * FUSED_STEPS + ([] if step.distiller is None else [REFERENCE])
    times: dict[str, list[tuple[float, float]]] = {b: [] for b in turn}
    with use_backend(FUSED):
        step()  # warms up
    for backend in turn * rounds:
        with use_backend(backend):
            times[backend].append((step.milliseconds(), step.loss_milliseconds()))
    return {
        b: StepCost(statistics.median(s for s, _ in t), statistics.median(d for _, d in t)) for b, t in times.items()
    }


def time_networks(
    modules: Mapping[str, tuple[SegmentationModule, Batch]], *, rounds: int
) -> dict[str, dict[str, float]]:
    """Steps of several modules, each on a batch of its own, in turns: step_ms, loss_ms (medians) and peak_mib of each.

    Runs on a GPU where there is one. The modules train on while they are timed.
    """
    steps = {name: _Step(*of) for name, of in modules.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    peaks = {}
    for name, step in steps.items():
        step()  # warms up
        peaks[name] = step.peak_bytes() / 2**20
    for _ in track(range(rounds), "timing"):
        for name, step in steps.items():
            times[name].append((step.milliseconds(), step.loss_milliseconds()))
    return {
        name: {
            "step_ms": statistics.median(s for s, _ in t),
            "loss_ms": statistics.median(d for _, d in t),
            "peak_mib": peaks[name],
        }
        for name, t in times.items()
    }


def machine() -> dict[str, Any]:
    """Where something is timed: device, threads, cores, and the load of the last minute."""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"{_processor()}, {torch.get_num_threads()} threads"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    return {"device": device, "cores": os.cpu_count(), "load": load}


class _Step:
    """A module with its optimiser and one batch: a training step that can be taken again and again."""

    def __init__(self, module: SegmentationModule, batch: Batch) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.module = module.to(device).train()
        self.batch = [x.to(device) for x in batch]
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=0.0)

    @property
    def distiller(self) -> Distiller | None:
        return self.module.model if isinstance(self.module.model, Distiller) else None

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.module.losses(self.batch)[0].backward()
        self.optimizer.step()

    def milliseconds(self) -> float:
        return _milliseconds(self)

    def loss_milliseconds(self) -> float:
        """The distillation losses alone on the batch's real outputs: forward, and backward down to the student's layers."""
        if self.distiller is None:
            return 0.0
        with _cut(self.distiller):
            self.distiller(self.batch[0])  # a recorded teacher has the batch's logits from the step before
        return _milliseconds(lambda: self.distiller.loss(self.batch[1]).backward())

    def peak_bytes(self) -> int:
        """What a step adds, at its peak, to the memory in use: of the GPU, else of this process; Linux alone tells that."""
        self.optimizer.zero_grad()
        if torch.cuda.is_available():
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self()
            return torch.cuda.max_memory_allocated() - before
        try:
            ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system, and is not counted as in use
            before = _status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        except (OSError, AttributeError):
            return 0
        self()
        return max(_status("VmHWM") - before, 0)


@contextmanager
def _cut(distiller: Distiller) -> Iterator[None]:
    """Let every layer that a loss compares put out a leaf: a backward from the losses ends there."""
    student = unwrapped(distiller.student)
    patterns = {p for term in distiller.terms for p in (term.student, *term.student_features)}
    layers = {student.get_submodule(name) for p in patterns for name in find_layers(student, p, "student")}

    def leaf(layer: nn.Module, inputs: Any, output: Any) -> Any:
        return tree_map_only(Tensor, lambda x: x.detach().requires_grad_(x.is_floating_point()), output)

    # first among the layer's hooks, so that the distiller catches the leaf
    handles = [layer.register_forward_hook(leaf, prepend=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _milliseconds(work: Callable[[], Any]) -> float:
    _synchronise()
    start = time.perf_counter()
    work()
    _synchronise()
    return (time.perf_counter() - start) * 1e3


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _status(field: str) -> int:
    """A size from /proc/self/status, in bytes."""
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found, f"/proc/self/status has no {field}"
    return int(found[1]) * 1024


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()
