"""The numerical contract, asserted: see numerics.py for what is measured and why a limit is what it is."""

from __future__ import annotations

import pytest
import torch
from numerics import CONTRACT, DOCUMENT, DTYPES, POINTS, SETTINGS, limits, measure


def check(name: str, point: str, dtype: torch.dtype, backend: str) -> None:
    setting = SETTINGS[name]
    row = measure(setting, point, dtype, backend)
    limit = limits(point, dtype, row.plain, setting.by_products)
    assert row.fused.value <= limit.value, f"value: {row} is above {limit}"
    assert row.fused.gradient <= limit.gradient, f"gradient: {row} is above {limit}"
    assert row.lowest >= -CONTRACT["converged"].value, f"a divergence is not negative beyond rounding: {row}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("name", SETTINGS)
def test_contract(cpp: str, name: str, point: str, dtype: str) -> None:
    check(name, point, DTYPES[dtype], cpp)


@pytest.mark.parametrize("point", ["converged", "rotated"])
@pytest.mark.parametrize("name", SETTINGS)
def test_contract_of_every_backend(fused: str, name: str, point: str) -> None:
    check(name, point, torch.float32, fused)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_document_is_complete(name: str) -> None:
    # not byte by byte: the figures are one machine's, and the last digit moves with the instruction set
    sections = dict(part.split("\n", 1) for part in DOCUMENT.read_text(encoding="utf-8").split("\n## ")[1:])
    assert name in sections, "docs/numerics.md has no such section: run `make numerics`"
    for point in POINTS:
        for dtype in DTYPES:
            assert f"| {point} | {dtype} |" in sections[name], f"no line for {point}, {dtype}: run `make numerics`"
