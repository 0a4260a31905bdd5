"""What the operator tests share: comparison with the truth in fp64, and layouts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

#: Relative rounding of one stored number, for tolerances that come from an output's type.
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


#: Backends whose kernels run one thread after another where there is no GPU: their tests take small shapes and few calls.
EMULATED = () if torch.cuda.is_available() else ("cuda", "triton")


def in_one(result: Any) -> torch.Tensor:
    """What has a gradient in the result of an operator by class."""
    return result if isinstance(result, torch.Tensor) else result.means


def compiled(function: Callable[..., Any], backend: str, **settings: Any) -> Callable[..., Any]:
    """`function` in one graph. Inductor generates code for what stands around an operator: once, not for each emulated backend."""
    torch._dynamo.reset()  # or graphs that other tests made of the same line would count
    by = "aot_eager" if backend in (*EMULATED, "reference") else "inductor"
    return torch.compile(function, fullgraph=True, backend=by, **settings)


class Comparison(NamedTuple):
    """How far `got` is from `want`, in fp64."""

    relative: float  # L2 of the difference over L2 of the truth
    cosine: float
    bias: float  # mean signed difference over mean magnitude of the truth
    worst: tuple[int, ...]


def compare(got: torch.Tensor, want: torch.Tensor) -> Comparison:
    assert got.shape == want.shape, f"got shape {tuple(got.shape)}, want {tuple(want.shape)}"
    a, b = got.detach().double().reshape(-1), want.detach().double().reshape(-1)
    norm, difference = b.norm().clamp_min(1e-300), a - b
    worst = int(difference.abs().nan_to_num(float("inf")).argmax()) if a.numel() else 0
    return Comparison(
        (difference.norm() / norm).item(),
        (a @ b / (a.norm() * norm).clamp_min(1e-300)).item(),
        (difference.mean() / b.abs().mean().clamp_min(1e-300)).item() if a.numel() else 0.0,
        tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), got.shape)) if got.dim() and a.numel() else (),
    )


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float, what: str = "") -> None:
    """Relative L2 error at most `tolerance`; equal where the truth is not finite."""
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite), f"{what}: finite at other places than the truth"
    assert torch.equal(got[~finite].double(), want[~finite].double()), f"{what}: other infinities than the truth"
    result = compare(got.where(finite, 0), want.where(finite, 0))
    assert result.relative <= tolerance, f"{what}: {result} is above {tolerance}"


def value_and_gradient(
    function: Callable[[torch.Tensor], torch.Tensor], student: torch.Tensor, upstream: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """function(student) and the gradient of its sum weighted with `upstream`."""
    student = student.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = function(student)
    value.backward(torch.ones_like(value) if upstream is None else upstream.to(value))
    return value.detach(), student.grad


def where_it_runs(settings: dict[str, Any]) -> dict[str, Any]:
    """Tensors that were made before the test chose a device, on it; those without content stay where they are."""
    device = torch.get_default_device()
    return {
        name: x.detach().to(device).requires_grad_(x.requires_grad)
        if isinstance(x, torch.Tensor) and not x.is_meta
        else x
        for name, x in settings.items()
    }


def in_new_processes(script: str, count: int = 2, **environment: str) -> None:
    """A Python script in several processes at once, each with its RANK; the failure of one is the test's."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, **environment, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    errors = [process.communicate(timeout=300)[1] for process in running]
    assert not any(process.returncode for process in running), "\n".join(errors)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


#: Of max_pool and average_pool: shapes and windows.
POOLS = [
    ((2, 5, 8, 16), 2),
    ((2, 3, 9, 11), 2),
    ((1, 3, 4, 5, 6), 2),
    ((1, 2, 5, 7, 8), (2, 1, 3)),
    ((1, 3, 9, 16), (3, 2)),
    ((1, 2, 6, 10), (2, 1)),
    ((2, 4, 31), 4),
    ((1, 3, 11, 13), (4, 5)),
    ((1, 2, 20, 37), (9, 30)),  # more pixels than a GPU's thread takes; added up in double
    ((1, 10, 7, 9), 2),
    ((3, 2, 1, 1), 1),
    ((1, 2, 700), 300),
]
#: Of labels; the operators' default.
IGNORED = -100


def labels(shape: tuple[int, ...], classes: int, coherent: bool, ignored: float = 0.3) -> torch.Tensor:
    """Of features [B, C, *S]: random labels [B, *S], or bands of equal ones."""
    target = torch.randint(0, classes, (shape[0], *shape[2:]))
    if coherent:
        target = target.flatten(1).sort(1).values.view_as(target)
    return target.masked_fill(torch.rand(target.shape) < ignored, IGNORED)


def over_threads(function: Callable[[], list[torch.Tensor]]) -> None:
    """`function` gives the same bits with 1, 2 and 3 threads."""
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(function())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b), "the bits depend on the number of threads"


def in_new_process(script: str, **environment: str) -> str:
    """The standard output of a Python script; its failure is the test's."""
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def with_loops_of(instruction_set: str, script: str) -> None:
    """Runs a Python script, which may import this module, with the CPU's loops of an instruction set; skips the test where the
    machine has not got it."""
    ask = "from medkd_fast.backend import instruction_set\nprint(instruction_set())\n"
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    got = in_new_process(script + ask, MEDKD_FAST_ISA=instruction_set, PYTHONPATH=path).strip()
    if got == "none":
        pytest.skip("built without the native library")
    if got != instruction_set:
        pytest.skip(f"this machine runs {got} at most")
