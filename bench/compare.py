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
# small, so that two cores do; the losses' weights are the defaults of `medkd-fast distill`
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
    train = ["train", name, *recipe["data"], *recipe["teacher"], *recipe["both"], "--seed=100", f"--out={teacher}"]
    code = main([*train, *(["--resume"] if teacher.exists() else [])])
    if code:
        return code
    compared = out / "students"
    compare = ["compare", name, "--teacher", str(teacher), *recipe["student"], *recipe["both"], "--methods", METHODS]
    code = main([*compare, "--seeds", "3", "--out", str(compared), *more])
    if code != 2:
        copy_results(compared, name)
    return code


def copy_results(compared: Path, name: str) -> None:
    """Into bench/results: figures as data, the table with its pictures and how to repeat it."""
    for file in ("compare.json", "compare.csv", "compare.png", "compare-classes.png", "overlay.png"):
        stem, _, suffix = file.partition(".")
        part = stem.removeprefix("compare")
        shutil.copyfile(compared / file, RESULTS / f"compare-{name}{'-' * (part == 'overlay')}{part}.{suffix}")
    pictures = [
        f"![Means over the seeds, whiskers of one standard deviation](compare-{name}.png)",
        f"![Dice class by class](compare-{name}-classes.png)",
        f"![A slice of every test case, first seed](compare-{name}-overlay.png)",
    ]
    text = (compared / "compare.md").read_text(encoding="utf-8")
    again = (
        f"`make compare SETS={name}` repeats it; what is trained and for how long is in [compare.py](../compare.py)."
    )
    (RESULTS / f"compare-{name}.md").write_text("\n\n".join([text.rstrip(), again, *pictures]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in RECIPES:
        sys.exit(f"usage: python bench/compare.py {'|'.join(RECIPES)} [--retime]")
    sys.exit(run(sys.argv[1], sys.argv[2:]))
