"""Forward and backward of every operator against its baselines, interleaved: one call of each variant a round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import memory
import pytest
import torch
from works import WORKS

import medkd_fast

ROUNDS = 21


def step(student: torch.Tensor, function: Callable[[], torch.Tensor]) -> None:
    student.grad = None
    function().backward()


def quantiles(times: list[float]) -> dict[str, float]:
    """Milliseconds: 20, 50 and 80 %."""
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return {"p20": cuts[1] * 1e3, "p50": statistics.median(times) * 1e3, "p80": cuts[7] * 1e3}


@pytest.mark.parametrize("key", WORKS)
def test_operator(key: str, benchmark, limits: dict[str, float]) -> None:
    torch._dynamo.reset()
    work = WORKS[key]()
    calls: dict[str, Callable[[], None]] = {"fused": lambda: step(work.student, work.fused)}
    for kind, (function, args) in work.variants.items():
        compiled = torch.compile(function, fullgraph=True, dynamic=False)
        calls[f"{kind} eager"] = lambda f=function, a=args: step(work.student, lambda: f(*a))
        calls[f"{kind} compiled"] = lambda f=compiled, a=args: step(work.student, lambda: f(*a))
    for call in calls.values():  # compiles, and warms up
        call()
        call()

    times: dict[str, list[float]] = {name: [] for name in calls}

    def others() -> None:
        """Runs in every round before the fused call, which pytest-benchmark times."""
        for name, call in calls.items():
            if name != "fused":
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)

    def fused() -> None:
        start = time.perf_counter()
        calls["fused"]()
        times["fused"].append(time.perf_counter() - start)

    benchmark.pedantic(fused, setup=others, rounds=ROUNDS, iterations=1)
    bound = {
        "memory": work.bytes / limits["copy_bytes_per_second"],
        "exp": work.exps / limits["exps_per_second"],
        "gemm": work.flops / limits["gemm_flops_per_second"],
    }
    binding = max(bound, key=bound.get)
    ratios = {
        name: [other / own for other, own in zip(values, times["fused"], strict=True)]
        for name, values in times.items()
        if name != "fused"
    }
    benchmark.extra_info.update(
        work=work.name,
        milliseconds={name: quantiles(values) for name, values in times.items()},
        ratio={name: {q: v / 1e3 for q, v in quantiles(values).items()} for name, values in ratios.items()},
        peak_bytes=memory.measure(key),
        input_bytes=work.largest_input,
        limit_milliseconds=bound[binding] * 1e3,
        limit_binds=binding,
        limit_share=bound[binding] / statistics.median(times["fused"]),
        backend=medkd_fast.backend.choose(work.name.split()[0], "cpu"),
    )
