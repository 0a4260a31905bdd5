"""Proves the GPU backends on a GPU: `make gpu-check`, or `python bench/gpu_check.py build bench` for some of its steps.

Builds, tests and measures with the Python that runs it, which needs torch with CUDA, Triton, pytest, pytest-benchmark and
hypothesis. Every step has its time and its log in $OUT (default build/gpu-check); the results of the benchmark are copied
there. It goes on after a step that failed, and says so in the end. Together they get $GPU_CHECK_SECONDS (default 540): what does
not fit has not passed, and can be run by itself.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUT = Path(os.environ.get("OUT", ROOT / "build" / "gpu-check"))
#: An operator has one name in every room; what several have in common has tests of its own, as have the losses.
TESTS = [
    *sorted(
        str(path)
        for operator in ROOT.glob("medkd_fast/reference/*.py")
        if (path := ROOT / f"tests/test_{operator.stem}.py").exists()
    ),
    *(
        str(ROOT / f"tests/test_{name}.py")
        for name in ("pixel_loss", "relation", "by_class", "pools", "numerics", "backend")
    ),
    *sorted(str(path) for path in ROOT.glob("tests/test_losses*.py")),
]
#: A step that has less than this is not begun.
LEAST = 20.0
START = time.monotonic()
#: What the steps before it leave for the benchmark, and of that what is for the work that has begun and for writing results.
BENCH, RESERVE = 240.0, 60.0
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]


def seconds_left(step: str) -> float:
    left = START + float(os.environ.get("GPU_CHECK_SECONDS", "540")) - time.monotonic()
    return left - BENCH if "bench" in ASKED and step in ("carried", "build", "test") else left


def run(step: str, command: list[str], **environment: str) -> bool:
    """Whether the command ended well in the time that is left; its output goes to a log."""
    start, limit = time.monotonic(), seconds_left(step)
    if limit < LEAST:
        print(f"{step:12}      0 s  NOT RUN: no time is left; STEPS={step} runs it by itself", flush=True)
        return False
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    with (OUT / f"{step}.log").open("w") as log:
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = child.wait(limit)
            outcome = f"FAILED (exit {code})" if code else "passed"
        except subprocess.TimeoutExpired:
            outcome = f"FAILED (over {limit:.0f} s)"
        finally:  # with the children that it has, which would keep the GPU busy
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    print(f"{step:12} {time.monotonic() - start:6.0f} s  {outcome}", flush=True)
    if outcome != "passed":
        print("\n".join((OUT / f"{step}.log").read_text().splitlines()[-15:]), flush=True)
    return outcome == "passed"


def carried() -> bool:
    """A library that came with the tree, built where there was no GPU and another torch, serves as it is."""
    if not (ROOT / "medkd_fast/_cuda.so").exists():
        print("carried      no medkd_fast/_cuda.so came with the tree: nothing to try")
        return True
    return tests("carried", "cuda and test_equals_the_definition")


def build() -> bool:
    return run("build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"])


def test() -> bool:
    return tests("test", "cuda or triton")


def tests(step: str, which: str) -> bool:
    parallel = ["-n", str(min(os.cpu_count() or 1, 8))] if _has("xdist") else []
    return run(step, [*PYTEST, *parallel, "-k", which, *TESTS])


def sanitize(tool: str) -> bool:
    """The CUDA kernels at small sizes under a checker."""
    if not shutil.which("compute-sanitizer"):
        print(f"{tool:12} compute-sanitizer is not here: not run")
        return False
    command = ["compute-sanitizer", "--error-exitcode", "9", "--target-processes", "all", "--tool", tool]
    return run(tool, [*command, *PYTEST, "-k", "cuda and gradcheck", *TESTS])


def fuzz() -> bool:
    """Generated calls of CUDA C++; of Triton most would be compiled for their own."""
    return run("fuzz", [*PYTEST, "-k", "cuda", str(ROOT / "tests/test_fuzz.py")])


def bench() -> bool:
    """Operators, then losses, in the order of the targets; those that there is no time for are left out."""
    files = ["bench/test_operators.py", "bench/test_losses.py"]
    until = time.time() + seconds_left("bench") - RESERVE
    done = run("bench", [*PYTEST, *files, "--benchmark-only", "-rs"], BENCH_UNTIL=str(until))
    for path in (ROOT / "bench/results").glob("nvidia*"):
        shutil.copy(path, OUT)
    log = OUT / "bench.log"
    left_out = re.search(r"SKIPPED \[(\d+)\].*BENCH_UNTIL", log.read_text() if log.exists() else "")
    if left_out:
        print(
            f"bench        {left_out[1]} works NOT RUN: no time is left; STEPS=bench runs them by themselves",
            flush=True,
        )
    return done and not left_out


def _has(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


STEPS: dict[str, Callable[[], bool]] = {
    **{step.__name__: step for step in (carried, build, test, bench)},
    **{tool: partial(sanitize, tool) for tool in ("memcheck", "racecheck")},
    "fuzz": fuzz,
}
ASKED = sys.argv[1:] or list(STEPS)

if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    import torch

    if not torch.cuda.is_available():
        sys.exit(f"gpu-check needs a GPU, and torch {torch.__version__} finds none here")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    failed = [name for name in ASKED if not STEPS[name]()]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
