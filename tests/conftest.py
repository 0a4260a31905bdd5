"""Every test sees torch.empty filled with NaN, so an output that nobody wrote shows, and starts from the same seed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from medkd_fast import backend as backends


@pytest.fixture(autouse=True)
def nan_filled_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpp", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every operator test runs over every backend that this machine has."""
    if backends.UNAVAILABLE[request.param]:
        pytest.skip(f"{request.param} is not here: {backends.UNAVAILABLE[request.param]}")
    with backends.use_backend(request.param):
        yield request.param


@pytest.fixture
def cpp() -> Iterator[None]:
    """For what only the fused backend does."""
    if backends.UNAVAILABLE["cpp"]:
        pytest.skip(f"cpp is not here: {backends.UNAVAILABLE['cpp']}")
    with backends.use_backend("cpp"):
        yield
