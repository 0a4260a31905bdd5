"""What the machine can do, measured in the same run as the operators."""

from __future__ import annotations

import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def name() -> str:
    """The processor and the threads in use, as a file name."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text())
        model = match.group(1) if match else model
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\([^)]*\)|CPU|@.*", "", model).lower()).strip("-")
    return f"{slug}-{torch.get_num_threads()}-threads"


def median_seconds(function: Callable[[], object], rounds: int = 15) -> float:
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def copy_rate() -> float:
    """Bytes a second read and written by a copy that is larger than the second-level caches."""
    source = torch.rand(8 << 20)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / median_seconds(lambda: target.copy_(source))


def gemm_rate() -> float:
    """Floating-point operations a second of torch's fp32 matrix product."""
    a, b = torch.rand(1024, 1024), torch.rand(1024, 1024)
    out = torch.empty(1024, 1024)
    return 2 * 1024**3 / median_seconds(lambda: torch.mm(a, b, out=out))


def exp_rate() -> float:
    """Exponentials a second of torch's vectorised fp32 exp, out of the caches."""
    x = -torch.rand(1 << 17)
    out = torch.empty_like(x)
    return x.numel() / median_seconds(lambda: torch.exp(x, out=out), rounds=200)
