"""Every Triton kernel becomes machine code of an H100 or H200, which its interpreter does not need and a GPU does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from medkd_fast.backend import OPERATORS

ROOT = Path(__file__).parent.parent
#: Bytes that a block may have on compute capability 9.0.
MOST_SHARED = 232_448


@pytest.mark.parametrize("operator", OPERATORS)
def test_it_compiles(operator: str) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "tests/compile_triton.py", operator],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shared = json.loads(done.stdout.splitlines()[-1])
    assert max(shared.values()) <= MOST_SHARED, shared
    source = ROOT / f"medkd_fast/kernels/{operator}.py"
    own = re.findall(r"^@triton\.jit\ndef (\w+_kernel)\(", source.read_text(), re.MULTILINE)
    assert {f"{operator}.{name}" for name in own} <= set(shared)
