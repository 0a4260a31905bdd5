"""Registers, shared memory and spills of every CUDA kernel, as the compiler says: `make cuda-report`.

Exits with 1 when a kernel spills registers to memory or has an array there.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from typing import NamedTuple

from sources import ROOT, setup_script

PATTERN = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<target>\w+)'\n.*\n"
    r" +(?P<stack>\d+) bytes stack frame, (?P<spilled>\d+) bytes spill stores, \d+ bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers"
)


class Kernel(NamedTuple):
    name: str
    target: str
    registers: int
    stack: int  # bytes of local memory: spilled registers, or arrays that are indexed at run time
    spilled: int


def kernels() -> list[Kernel]:
    """Every kernel of the library, compiled unless it is."""
    setup = setup_script()
    jobs = [(source, [setup.nvcc(), *flags]) for source, flags in setup.cuda_jobs()]
    objects = setup.compile_objects(jobs, ROOT / "build" / "objects")
    found = [match for each in objects for match in PATTERN.finditer(each.with_suffix(".txt").read_text())]
    names = [match["kernel"] for match in found]
    if names and shutil.which("c++filt"):
        done = subprocess.run(["c++filt", "-p", *names], capture_output=True, text=True, check=True)
        names = done.stdout.splitlines()
    return [
        Kernel(
            name.replace("medkd::", ""), match["target"], *(int(match[k]) for k in ("registers", "stack", "spilled"))
        )
        for name, match in zip(names, found, strict=True)
    ]


def main() -> int:
    rows = sorted(kernels())
    print(f"{'kernel':60} {'target':6} {'registers':>9} {'stack':>6} {'spilled':>7}")
    for row in rows:
        print(f"{row.name:60} {row.target:6} {row.registers:9} {row.stack:6} {row.spilled:7}")
    return any(row.stack or row.spilled for row in rows)


if __name__ == "__main__":
    sys.exit(main())
