"""The small CT and its labels, read once, and data sets made of it."""

from __future__ import annotations

import pytest
import SimpleITK as sitk
from small_sets import WRITERS, small_ct


@pytest.fixture(scope="session")
def ct_and_label() -> tuple[sitk.Image, sitk.Image]:
    return small_ct()


@pytest.fixture
def ct(ct_and_label) -> sitk.Image:
    return ct_and_label[0]


@pytest.fixture
def label(ct_and_label) -> sitk.Image:
    return ct_and_label[1]


@pytest.fixture(scope="session")
def sets(ct_and_label, tmp_path_factory) -> dict:
    """The path of a data set in every layout; nobody may change it."""
    root = tmp_path_factory.mktemp("sets")
    return {name: write(root / name, *ct_and_label) for name, write in WRITERS.items()}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MEDKD_FAST_CACHE", str(tmp_path / "cache"))
