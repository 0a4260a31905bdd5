"""Eight methods on a built-in data set, three seeds: `python bench/compare.py demo` and `python bench/compare.py mni152`.

Trains a teacher and 27 thin students in runs/compare-SET (what is there already is not trained again), and copies the figures
into bench/results. `--retime` measures what a step costs again: give it a quiet machine.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from medkd_fast.cli import main

RESULTS = Path(__file__).parent / "results"
METHODS = "kd,cwd,dist,dkd,skd,cirkd,cpkd,dmd"
# small enough for twelve minutes on two cores; the loss's weights are the defaults of `medkd-fast distill`
RECIPES = {
    # axial slices of 64 x 64
    "demo": {
        "data": ["--size", "64,64", "--patch", "64,64", "--intensity", "window"],
        "teacher": ["--network-arg", "features=16,16,32,64,128,16", "--epochs", "10"],
        "student": ["--student-arg", "features=4,8,16,32,32,4", "--epochs", "8"],
        "both": ["--steps", "50", "--batch-size", "4", "--learning-rate", "0.01", "--accelerator", "cpu"],
    },
    # patches of 32 x 96 x 96 mm at 2 mm
    "mni152": {
        "data": ["--dims", "3", "--spacing", "2,2,2", "--patch", "16,48,48"],
        "teacher": ["--network-arg", "features=16,16,32,32,64,16", "--epochs", "3"],
        "student": ["--student-arg", "features=4,4,8,8,16,4", "--epochs", "2"],
        "both": ["--steps", "50", "--batch-size", "2", "--learning-rate", "0.01", "--accelerator", "cpu"],
    },
}


def run(name: str, more: list[str]) -> int:
    """Train and compare; exit code of the comparison."""
    recipe, out = RECIPES[name], Path("runs") / f"compare-{name}"
    teacher = out / "teacher-run"
    train = [
        "train",
        name,
        *recipe["data"],
        *recipe["teacher"],
        *recipe["both"],
        "--seed",
        "100",
        "--out",
        str(teacher),
    ]
    code = main([*train, *(["--resume"] if teacher.exists() else [])])
    if code:
        return code
    compared = out / "students"
    compare = ["compare", name, "--teacher", str(teacher), *recipe["student"], *recipe["both"], "--methods", METHODS]
    code = main([*compare, "--seeds", "3", "--out", str(compared), *more])
    if code != 2:
        for suffix in ("json", "csv", "md", "png"):
            shutil.copyfile(compared / f"compare.{suffix}", RESULTS / f"compare-{name}.{suffix}")
        for picture in ("classes", "overlay"):
            source = compared / ("overlay.png" if picture == "overlay" else f"compare-{picture}.png")
            shutil.copyfile(source, RESULTS / f"compare-{name}-{picture}.png")
    return code


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in RECIPES:
        sys.exit(f"usage: python bench/compare.py {'|'.join(RECIPES)} [--retime]")
    sys.exit(run(sys.argv[1], sys.argv[2:]))
