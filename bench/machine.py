"""What the machine can do, measured in the same run as the operators."""

from __future__ import annotations

import platform
import re
import statistics
from pathlib import Path

import clock
import torch

from medkd_fast import backend

GPU = torch.cuda.is_available()
#: Inputs of one step together are larger than this, so that no step finds its inputs in the cache that the last one left.
BEYOND_CACHE = 3 * torch.cuda.get_device_properties(0).L2_cache_size if GPU else 0


def name() -> str:
    """The processor, its instruction set and the threads in use, or the GPU, as a file name."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if GPU:
        model = torch.cuda.get_device_name()
    elif cpuinfo.exists():
        match = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text())
        model = match.group(1) if match else model
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\([^)]*\)|CPU|@.*", "", model).lower()).strip("-")
    return slug if GPU else f"{slug}-{backend.instruction_set()}-{torch.get_num_threads()}-threads"


def limits() -> dict[str, float]:
    """Bytes, exponentials and, for each type, floating-point operations of a matrix product, each a second."""
    device = "cuda" if GPU else "cpu"
    with torch.device(device):
        found = {"copy": _copy_rate(), "exp": _exp_rate(), "gemm float32": _gemm_rate(torch.float32)}
        if GPU:
            found["gemm bfloat16"] = _gemm_rate(torch.bfloat16)
            # a product in three of TF32 is as exact as one in fp32
            torch.backends.cuda.matmul.allow_tf32 = True
            found["gemm float32"] = max(found["gemm float32"], _gemm_rate(torch.float32) / 3)
            torch.backends.cuda.matmul.allow_tf32 = False
            # and of rows whose norm is known so is one in three of float16
            found["gemm float32, norm 1"] = max(found["gemm float32"], _gemm_rate(torch.float16) / 3)
    return found


def _median_seconds(step: clock.Step, rounds: int = 15) -> float:
    seconds = (clock.gpu if GPU else clock.cpu)([step])
    return statistics.median(seconds() for _ in range(rounds))


def _copy_rate() -> float:
    """Bytes read and written by a copy that is larger than the caches that it has to itself."""
    source = torch.rand((1 << 30) if GPU else (8 << 20))
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _median_seconds(lambda: target.copy_(source))


def _gemm_rate(dtype: torch.dtype) -> float:
    size = 8192 if GPU else 1024
    a, b = torch.rand(size, size).to(dtype), torch.rand(size, size).to(dtype)
    out = torch.empty_like(a)
    return 2 * size**3 / _median_seconds(lambda: torch.mm(a, b, out=out))


def _exp_rate() -> float:
    """Of torch's vectorised fp32 exp: out of a CPU's caches, and on a GPU out of registers, 64 in a row."""
    if not GPU:
        x = -torch.rand(1 << 17)
        out = torch.empty_like(x)
        return x.numel() / _median_seconds(lambda: torch.exp(x, out=out), rounds=200)

    def in_a_row(x: torch.Tensor) -> torch.Tensor:
        for _ in range(64):
            x = torch.exp(-x)
        return x

    x = torch.rand(1 << 24)
    compiled = torch.compile(in_a_row)
    return 64 * x.numel() / _median_seconds(lambda: compiled(x))
