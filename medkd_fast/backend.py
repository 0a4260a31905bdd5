"""Which implementation of an operator runs, and why.

`auto` takes the fastest implementation that exists for the tensor's device; what is missing falls back to `reference`,
plain PyTorch, with one warning that says why. `MEDKD_FAST_BACKEND`, `set_backend` and `use_backend` force one.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

#: Names that `set_backend` takes.
BACKENDS = ("auto", "cpp", "cuda", "triton", "reference")
#: Operators and, fastest first where there is much to do, the fused backends that have them by device type. (CPU: one backend, nothing to measure.)
OPERATORS: dict[str, dict[str, tuple[str, ...]]] = {
    "decoupled_kl": {"cpu": ("cpp",), "cuda": ("triton", "cuda")},
    "class_kl": {"cpu": ("cpp",), "cuda": ("triton", "cuda")},
    "channel_gram": {"cpu": ("cpp",), "cuda": ("triton", "cuda")},
    "channel_relation": {"cpu": ("cpp",), "cuda": ("triton", "cuda")},
    "pixel_affinity": {"cpu": ("cpp",), "cuda": ("triton", "cuda")},
    "pixel_relation": {"cpu": ("cpp",), "cuda": ("triton", "cuda")},
    "spatial_kl": {"cpu": ("cpp",), "cuda": ("triton", "cuda")},
    "class_pearson": {"cpu": ("cpp",), "cuda": ("triton", "cuda")},
    "attention_map": {"cpu": ("cpp",), "cuda": ("triton", "cuda")},
    "importance_and_affinity": {"cpu": ("cpp",), "cuda": ("triton", "cuda")},
    "class_means": {"cpu": ("cpp",), "cuda": ("triton", "cuda")},
    "class_similarity": {"cpu": ("cpp",), "cuda": ("triton", "cuda")},
    "standardised_mse": {"cpu": ("cpp",), "cuda": ("triton", "cuda")},
    "max_pool": {"cpu": ("cpp",), "cuda": ("triton", "cuda")},
    "average_pool": {"cpu": ("cpp",), "cuda": ("triton", "cuda")},
}


#: Work up to which a GPU waits for its host to launch kernels, in numbers read or 32 multiply-adds, which take as long. A call of CUDA
#: C++ takes a host about half the time of Triton's (bench/README.md); what the two take on the GPU is not measured.
HOST_BOUND = 1 << 22


def _load(part: str) -> str:
    """Loads the native library of "cpu" or "cuda". Returns why it could not, or an empty string."""
    library = Path(__file__).parent / f"_{part}.so"
    if part == "cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not library.exists():
        return f"medkd_fast/_{part}.so is missing: {_built(part) or _never_built(Path(__file__).parents[1])}"
    if part == "cuda" and (error := _too_new(_built(part), _driver())):
        return error
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library} does not load: {error}"
    return ""


def _built(part: str) -> str:
    """How a library was built, or why not; an empty string where nothing tells."""
    report = Path(__file__).parent / "_build.json"
    return json.loads(report.read_text()).get(part, "") if report.exists() else ""


def _never_built(folder: Path) -> str:
    """Why there may be no library where no build has left word of it, of a package in that folder."""
    if not (folder / "setup.py").exists():
        return "not built (MEDKD_FAST_NO_EXT=1)"
    return (
        f"this is the source in {folder}, which Python takes before an installed package where that is the current folder: run "
        "elsewhere, or build here by `pip install --no-build-isolation --editable .`"
    )


def _driver() -> int | None:
    """The newest CUDA that the driver knows, 12080 for 12.8; None without a driver."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else version.value


def _too_new(built: str, driver: int | None) -> str:
    """Why a driver runs nothing of a library that was built so: it is of an earlier major version of CUDA."""
    release = re.search(r"nvcc release (\d+)", built)
    if driver is None or release is None or driver // 1000 >= int(release[1]):
        return ""
    return (
        f"medkd_fast/_cuda.so is {built}, and the driver is for CUDA {driver // 1000}.{driver % 1000 // 10}: want a driver for "
        f"CUDA {release[1]}, or a build with nvcc {driver // 1000}"
    )


def _load_triton() -> str:
    """Registers the Triton kernels. Returns why it could not, or an empty string."""
    if torch.version.cuda is None and not INTERPRETED:
        return f"torch {torch.__version__} was built without CUDA"
    try:
        import medkd_fast.kernels  # noqa: F401
    except ImportError as error:
        return f"Triton is not here: {error}"
    return ""


#: Triton kernels run on CPU tensors, thousands of times slower: for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
#: Why a backend cannot run here; an empty string where it can.
UNAVAILABLE = {"cpp": _load("cpu"), "cuda": _load("cuda"), "triton": _load_triton(), "reference": ""}
#: Fused backends that run on tensors of a device type when they are forced, and are never chosen there.
ON_REQUEST = {"cpu": ["triton"] if INTERPRETED else []}
_forced = "auto"  # a module global: torch.compile guards on it
_warned: set[str] = set()


def set_backend(name: str) -> None:
    """Forces a backend for every operator from now on; `"auto"` restores the choice by device.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the backend cannot run on this machine; the message says why.

    >>> import medkd_fast
    >>> medkd_fast.set_backend("reference")
    >>> medkd_fast.set_backend("auto")
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, want one of {', '.join(BACKENDS)}")
    if name != "auto" and UNAVAILABLE[name]:
        raise RuntimeError(f"backend {name!r} cannot run here: {UNAVAILABLE[name]}. `medkd-fast doctor` shows what can")
    _forced = name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces a backend inside a `with` block, for all threads of the process: blocks of several threads must not overlap.
    Raises as `set_backend` does.

    >>> import torch, medkd_fast
    >>> student, teacher = torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 4, 4)
    >>> with medkd_fast.use_backend("reference"):
    ...     medkd_fast.class_kl(student, teacher)
    tensor(0.)
    """
    before = _forced
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def choose(operator: str, device_type: str, numbers: int, multiply_adds: int = 0, cuda_first: bool = False) -> str:
    """The backend that `operator` runs with on so many numbers of a device, with so many multiply-adds for each.

    `cuda_first`: CUDA C++ is the fastest there, however much there is to do.
    """
    candidates = OPERATORS[operator].get(device_type, ())
    if _forced in ON_REQUEST.get(device_type, ()) and _forced in OPERATORS[operator].get("cuda", ()):
        return _forced
    if _forced == "auto":
        work = 0 if cuda_first else numbers * max(multiply_adds // 32, 1)
        if device_type == "cuda" and (_waits_for_its_host(work) or (cuda_first and torch.compiler.is_compiling())):
            candidates = tuple(sorted(candidates, key="cuda".__ne__))
        for name in candidates:
            if not UNAVAILABLE[name]:
                return name
        _warn_once(operator, device_type)
        return "reference"
    if _forced != "reference" and _forced not in candidates:
        where = ", ".join(OPERATORS[operator]) or "no device"
        raise RuntimeError(
            f"{operator}: backend {_forced!r} is forced and has no kernel for {device_type} tensors; fused kernels exist "
            f"for {where}. Use set_backend('auto') or set_backend('reference')"
        )
    return _forced


def _waits_for_its_host(work: int) -> bool:
    """Whether the GPU is done before the host has launched more, and CUDA C++ is there for it.

    Not asked in torch.compile: a graph would be made anew when the size of its tensors crosses the bound.
    """
    return not torch.compiler.is_compiling() and work <= HOST_BOUND and _has_machine_code(torch.cuda.current_device())


@cache
def _has_machine_code(gpu: int) -> bool:
    """Whether CUDA C++ is compiled for a GPU. For later ones the driver does that, once, and a first call waits for it."""
    return (8, 0) <= torch.cuda.get_device_capability(gpu) < (10, 0)


def kernel(operator: str, backend: str) -> Callable[..., Any]:
    """The operator of a fused backend: each has its own, because two of them can share one device."""
    found: Callable[..., Any] = getattr(torch.ops.medkd_fast, f"{operator}_{backend}").default
    return found


_fakes: dict[str, Callable[..., Any]] = {}


def shapes_of(operator: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function that makes an operator's outputs without content, for torch.compile, with every fused backend."""

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        _fakes[operator] = fake
        for name in ("cpp", "cuda", "triton"):
            if not UNAVAILABLE[name] and hasattr(torch.ops.medkd_fast, f"{operator}_{name}"):
                torch.library.register_fake(f"medkd_fast::{operator}_{name}", fake)
        return fake

    return register


def _warn_once(operator: str, device_type: str) -> None:
    if torch.compiler.is_compiling() or f"{operator} {device_type}" in _warned:
        return
    _warned.add(f"{operator} {device_type}")
    why = _why(operator, device_type)
    warnings.warn(f"medkd_fast.{operator} runs on the slower reference backend: {why}", stacklevel=4)


def _why(operator: str, device_type: str) -> str:
    candidates = OPERATORS[operator].get(device_type, ())
    return (
        "; ".join(dict.fromkeys(UNAVAILABLE[name] for name in candidates))
        or f"there is no fused kernel for {device_type} tensors yet"
    )


class Row(NamedTuple):
    """A line of `medkd-fast doctor`."""

    operator: str
    device_type: str
    backend: str
    available: bool
    why: str


def report() -> list[Row]:
    """What runs each operator on each device type, and why not something faster."""
    rows = []
    for operator, devices in OPERATORS.items():
        for device_type in ("cpu", "cuda"):
            fused = next((name for name in devices.get(device_type, ()) if not UNAVAILABLE[name]), None)
            why = "" if fused else _why(operator, device_type)
            if fused == "triton" and not UNAVAILABLE["cuda"] and torch.cuda.is_available() and _waits_for_its_host(0):
                why = "cuda where there is little to do"
            rows.append(Row(operator, device_type, fused or "reference", fused is not None, why))
    return rows


def instruction_set() -> str:
    """The instruction set that the CPU loops run with: "avx512", "avx2", "portable", or "none" without the library."""
    return "none" if UNAVAILABLE["cpp"] else torch.ops.medkd_fast.instruction_set()


if os.environ.get("MEDKD_FAST_BACKEND"):
    set_backend(os.environ["MEDKD_FAST_BACKEND"])
