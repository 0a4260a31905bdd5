"""Forward and backward of every loss against its published form, as test_operators.py does it for operators."""

from __future__ import annotations

import pytest
from loss_works import LOSS_WORKS
from test_operators import compare


@pytest.mark.parametrize("key", LOSS_WORKS)
def test_loss(key: str, benchmark, limits: None) -> None:
    compare(key, LOSS_WORKS[key], benchmark)
