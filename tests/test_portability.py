"""The sources compile with clang and for aarch64, where those compilers are installed: compiled only, nothing runs."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from sources import setup_script


def compiles(compiler: str, package: str, source: Path, flags: list[str]) -> None:
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed; on Debian: apt-get install {package}")
    # -O1: instruction selection takes place, which is what differs; a higher level only takes longer
    command = [compiler, *setup_script().FLAGS, *flags, "-O1", "-c", str(source), "-o", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


JOBS = setup_script().cpu_jobs()
NAMES = [" ".join([source.stem, *(flag for flag in flags if "MEDKD_ISA=" in flag)]) for source, flags in JOBS]


@pytest.mark.parametrize(("source", "flags"), JOBS, ids=NAMES)
def test_clang(source: Path, flags: list[str]) -> None:
    compiles("clang++", "clang", source, flags)


def test_aarch64() -> None:
    if platform.machine() == "aarch64":
        pytest.skip("this machine is one: the build itself is the test")
    source, flags = next(job for job in JOBS if "-DMEDKD_ISA=portable" in job[1])
    compiles("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu", source, flags)
