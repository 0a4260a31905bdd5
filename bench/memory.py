"""Peak memory of a work's calls: on a GPU what torch allocates, on a CPU measured in a process of its own, where
`python memory.py KEY` prints {variant: bytes} as JSON.

A CPU's is what the process's resident set rises to above where it stood with the inputs. For that, freed blocks must go
back to the system at once, which costs time: so nothing is timed here, and the timed process is left alone.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import machine
import torch
from loss_works import LOSS_WORKS
from works import WORKS


def measure(key: str) -> dict[str, int]:
    """Bytes above the inputs, forward and backward, the gradient included: the fused call and the eager baselines."""
    if machine.GPU:
        return every_peak(key)
    # blocks from 64 kB come from mmap and return there
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, __file__, key]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _status(field: str) -> int:
    match = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert match, f"/proc/self/status has no {field}"
    return int(match.group(1)) * 1024


def peak_bytes(leaves: tuple[torch.Tensor, ...], function: Callable[[], torch.Tensor]) -> int:
    def forget() -> None:
        for x in leaves:
            x.grad = None

    if leaves[0].is_cuda:
        forget()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function().backward()
        return torch.cuda.max_memory_allocated() - before
    for _ in range(2):  # the first call loads code and starts threads
        forget()
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        function().backward()
        peak = _status("VmHWM")
    return max(peak - before, 0)


def every_peak(key: str) -> dict[str, int]:
    work = {**WORKS, **LOSS_WORKS}[key]()
    peaks = {"fused": peak_bytes(work.leaves, work.fused)}
    for kind, (baseline, args) in work.variants.items():
        try:
            peaks[f"{kind} eager"] = peak_bytes(work.leaves, lambda f=baseline, a=args: f(*a))
        except torch.OutOfMemoryError:
            continue
    return peaks


if __name__ == "__main__":
    print(json.dumps(every_peak(sys.argv[1])))
