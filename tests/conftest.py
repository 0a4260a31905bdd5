"""Every test sees torch.empty filled with NaN, so an output that nobody wrote shows, and starts from the same seed.

Without a GPU Triton's kernels run on CPU tensors in Triton's interpreter: one program after another, so a race between
programs does not show. The CUDA kernels run on CPU tensors too, compiled for the host (cuda_host).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is defined

import cuda_host

from medkd_fast import backend as backends

if backends.INTERPRETED and not backends.UNAVAILABLE["triton"]:
    import triton_interpreter

    triton_interpreter.mend()


@pytest.fixture(autouse=True)
def nan_filled_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


#: A convolution of floats in TF32, as cuDNN makes it unless told, is as far off as one of halves.
torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@contextmanager
def emulated_cuda() -> Iterator[None]:
    """The backend "cuda" takes CPU tensors when it is forced."""
    assert not (error := cuda_host.load()), error
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.UNAVAILABLE, "cuda", "")
        patch.setitem(backends.ON_REQUEST, "cpu", [*backends.ON_REQUEST["cpu"], "cuda"])
        yield


def forced(name: str) -> Iterator[str]:
    """Forces a backend. A GPU's runs on its GPU: then tensors are made there."""
    on_gpu = name in ("cuda", "triton") and torch.cuda.is_available()
    with emulated_cuda() if name == "cuda" and not on_gpu else nullcontext():
        if backends.UNAVAILABLE[name]:
            pytest.skip(f"{name} is not here: {backends.UNAVAILABLE[name]}")
        with backends.use_backend(name), torch.device("cuda") if on_gpu else nullcontext():
            yield name


@pytest.fixture(params=["cpp", "cuda", "triton", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every operator test runs over every backend that this machine has."""
    yield from forced(request.param)


@pytest.fixture(params=["cpp", "cuda", "triton"])
def fused(request: pytest.FixtureRequest) -> Iterator[str]:
    """For what only fused backends do."""
    yield from forced(request.param)


@pytest.fixture(params=["cpp", "reference", *(["cuda"] if torch.cuda.is_available() else [])])
def composed(request: pytest.FixtureRequest) -> Iterator[str]:
    """For what is composed of operators, which run over every backend in tests of their own: on the CPU, and on a GPU if there is one."""
    yield from forced(request.param)


@pytest.fixture
def cuda() -> Iterator[str]:
    """For what only the CUDA C++ kernels do."""
    yield from forced("cuda")


@pytest.fixture
def cpp() -> Iterator[str]:
    """For what only the CPU's does."""
    yield from forced("cpp")
