"""Forward and backward of every operator against its baselines, interleaved: one step of each variant a round."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import clock
import machine
import memory
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from works import WORKS, Call, Work

import medkd_fast
from medkd_fast import backend

#: A variant whose step takes more seconds is measured in the first rounds alone. (A processor without bfloat16 arithmetic: 36.)
PATIENCE, FIRST_ROUNDS = 5.0, 2
#: A step on a CPU that takes more seconds comes right after one of its own that no one times, and finds memory as it does in a training
#: run. (A virtual machine gives back what was free for two seconds: then the first touch of 100 MB takes 0.1 s.)
LONG = 0.02
CLOCKS: dict[str, clock.Clock] = {"cpu": clock.cpu, "gpu": clock.gpu, "host": clock.host}


def step(leaves: tuple[torch.Tensor, ...], function: Call) -> None:
    for x in leaves:
        x.grad = None
    function().backward()


def forced(name: str, function: Call) -> Call:
    def call() -> torch.Tensor:
        with medkd_fast.use_backend(name):
            return function()

    return call


def calls_of(work: Work, backends: list[str]) -> dict[str, tuple[tuple[torch.Tensor, ...], Call]]:
    """Of every variant, what gets a gradient and the call on one set of inputs. `backends`: those that the fused call runs on."""
    calls = {"fused": (work.leaves, work.fused)}
    for name in backend.OPERATORS.get(work.operator, {}).get("cuda", ()) if machine.GPU else ():
        if not backend.UNAVAILABLE[name] and name not in backends:
            calls[f"fused {name}"] = work.leaves, forced(name, work.fused)
    if work.ordinary:
        calls["fused fp32 contiguous"] = work.ordinary.leaves, work.ordinary.fused
    for kind, (function, args) in work.variants.items():
        compiled = torch.compile(function, fullgraph=True, dynamic=False)
        calls[f"{kind} eager"] = work.leaves, lambda f=function, a=args: f(*a)
        calls[f"{kind} compiled"] = work.leaves, lambda f=compiled, a=args: f(*a)
    return calls


class Seen(TorchDispatchMode):
    """The operators of a call."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def backends_of(function: Call) -> list[str]:
    with Seen() as seen, torch.no_grad():
        function()
    return sorted({name.split(".")[1].rpartition("_")[2] for name in seen.names if name.startswith("medkd_fast.")})


def quantiles(times: list[float]) -> dict[str, float]:
    """Milliseconds: 20, 50 and 80 %."""
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return {"p20": cuts[1] * 1e3, "p50": statistics.median(times) * 1e3, "p80": cuts[7] * 1e3}


def sets_of_inputs(work: Work) -> int:
    """So many are more than a GPU's cache holds, where it counts that they come from memory: not in the host's time, and not
    beside seconds of arithmetic."""
    if work.clock == "host" or work.rounds < Work.rounds:
        return 1
    return 1 + int(machine.BEYOND_CACHE // work.input_bytes)


def beside_fused(
    ready: Callable[[], Callable[[], float]], ready_fused: Callable[[], Callable[[], float]], rounds: int
) -> list[tuple[float, float]]:
    """Seconds of a variant that has no room beside all the others, and of the fused call."""
    torch.cuda.empty_cache()
    other, own = ready(), ready_fused()
    return [(other(), own()) for _ in range(rounds)]


@pytest.mark.parametrize("key", WORKS)
def test_operator(key: str, benchmark, limits: None) -> None:
    compare(key, WORKS[key], benchmark)


def compare(key: str, make: Callable[[], Work], benchmark) -> None:
    """Measures the work that `make` makes; `key` is its name for memory.py."""
    torch._dynamo.reset()
    work = make()
    backends = backends_of(work.fused)
    calls = [calls_of(one, backends) for one in (work, *(make() for _ in range(sets_of_inputs(work) - 1)))]
    ready = {name: partial(CLOCKS[work.clock], [partial(step, *every[name]) for every in calls]) for name in calls[0]}
    run: dict[str, Callable[[], float]] = {}
    crowded = []
    for name, clock_of in ready.items():
        try:
            run[name] = clock_of()
        except torch.OutOfMemoryError:
            assert not name.startswith("fused")
            crowded.append(name)
    times: dict[str, list[float]] = {name: [] for name in run}

    def ahead(name: str) -> None:
        if not machine.GPU and times[name] and LONG < times[name][-1] < PATIENCE:
            run[name]()

    def others() -> None:
        """Runs in every round before the fused call, which pytest-benchmark times."""
        for name, seconds in run.items():
            if name != "fused" and (len(times[name]) < FIRST_ROUNDS or times[name][-1] < PATIENCE):
                ahead(name)
                times[name].append(seconds())
        ahead("fused")

    benchmark.pedantic(lambda: times["fused"].append(run["fused"]()), setup=others, rounds=work.rounds, iterations=1)
    ratios = {
        name: [other / own for other, own in zip(values, times["fused"], strict=False)]
        for name, values in times.items()
        if name != "fused"
    }
    run.clear()
    for name in crowded:
        with suppress(torch.OutOfMemoryError):
            pairs = beside_fused(ready[name], ready["fused"], work.rounds)
            times[name], ratios[name] = [other for other, _ in pairs], [other / own for other, own in pairs]
    benchmark.extra_info.update(
        work=work.name,
        milliseconds={name: quantiles(values) for name, values in times.items()},
        ratio={name: {q: v / 1e3 for q, v in quantiles(values).items()} for name, values in ratios.items()},
        peak_bytes=memory.measure(key),
        input_bytes=work.student_bytes,
        demands={"memory": (work.bytes, "copy"), "exp": (work.exps, "exp"), "gemm": (work.flops, work.gemm)},
        backends=backends,
        group=work.group,
    )
