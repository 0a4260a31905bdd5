"""The CPU's gradients ask for large pages: a first write to each of 24,000 small ones would take longer than the loss."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import medkd_fast
from medkd_fast import backend

LINES = Path("/proc/self/smaps")
pytestmark = [
    pytest.mark.skipif(bool(backend.UNAVAILABLE["cpp"]), reason="the C++ library is not built"),
    pytest.mark.skipif(sys.platform != "linux", reason="asked for on Linux alone"),
    pytest.mark.skipif(
        not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no transparent huge pages"
    ),
]


def flags_at(address: int) -> list[str]:
    """What the kernel keeps of the mapping that holds an address."""
    inside = False
    for line in LINES.read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= address < int(span[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no mapping holds {address:#x}")


def test_gradient_asks_for_large_pages() -> None:
    # 66 MB: a mapping of its own, or what earlier gradients left
    student = torch.randn(1, 4, 160, 160, 160).requires_grad_()
    before = flags_at(student.data_ptr() + 32 * 2**20)
    medkd_fast.class_kl(student, torch.randn_like(student)).backward()
    assert student.grad is not None
    middle = student.grad.data_ptr() + 32 * 2**20
    assert "hg" in flags_at(middle)
    assert flags_at(student.data_ptr() + 32 * 2**20) == before, "the inputs are not ours to change"
