"""Every Triton kernel becomes machine code of an H100 or H200, which its interpreter does not need and a GPU does.

Those that take most shared memory also fit the A100 and the GPUs that have least of it (RTX 3090, 4090 and 5090, A40, L40).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from compile_triton import SHARED_BYTES

from medkd_fast.backend import OPERATORS

ROOT = Path(__file__).parent.parent
MUCH_MEMORY = """
import sys
sys.path.insert(0, "tests")
import json, compile_triton, torch, medkd_fast
shared = compile_triton.compile_only(int(sys.argv[1]))
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for channels, divergence in ((64, "mse"), (128, "kl"), (144, "kl")):
        x = torch.randn(1, channels, 16, 16, dtype=dtype, requires_grad=True)
        medkd_fast.pixel_relation(x, x.detach(), divergence=divergence).backward()
print(json.dumps(shared))
"""
LOADS = """
import sys
sys.path.insert(0, "tests")
import json, re, compile_triton, torch, medkd_fast
compile_triton.compile_only(90)
for dtype in (torch.float32, torch.bfloat16):
    x = torch.randn(1, 64, 16, 16, dtype=dtype, requires_grad=True)
    for divergence in ("mse", "kl"):
        medkd_fast.pixel_relation(x, x.detach(), divergence=divergence).backward()
    medkd_fast.channel_relation(x, x.detach()).backward()
    medkd_fast.pixel_affinity(x).sum().backward()
waits = {}
for name, code in compile_triton.CODE:
    # in a loop; after it nothing is named
    for later in re.findall(r"ttg.async_wait %.*{num = (\\d+) : i32}", code):
        waits.setdefault(name, []).append(int(later))
print(json.dumps(waits))
"""


def compiled(*command: str) -> dict[str, int]:
    """The kernels that a process of its own compiled, and the shared memory that each takes."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("operator", OPERATORS)
def test_it_compiles(operator: str) -> None:
    shared = compiled("tests/compile_triton.py", operator)
    assert max(shared.values()) <= SHARED_BYTES[90], shared
    source = ROOT / f"medkd_fast/kernels/{operator}.py"
    own = re.findall(r"^@triton\.jit\ndef (\w+_kernel)\(", source.read_text(), re.MULTILINE)
    assert {f"{operator}.{name}" for name in own} <= set(shared)


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_it_fits(capability: int) -> None:
    """Those kernels that take most shared memory, in blocks that are larger where there is more of it."""
    most = max(compiled("-c", MUCH_MEMORY, str(capability)).values())
    assert SHARED_BYTES[capability] // 2 < most <= SHARED_BYTES[capability]


def test_tiles_are_loaded_ahead() -> None:
    """A loop waits for the loads of a tile before those of the next have ended."""
    waits = compiled("-c", LOADS)
    ahead = {f"{pixels}.gradient_kernel" for pixels in ("pixel_relation", "pixel_relation_kl", "pixel_affinity")}
    ahead |= {"channel_products.products_kernel", "channel_products.gradient_kernel"}
    ahead |= {"pixel_relation.products_kernel", "pixel_relation_kl.rows_kernel"}
    assert ahead <= set(waits)
    assert all(min(waits[name]) > 0 for name in ahead), waits
