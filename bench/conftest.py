"""Measures the machine and writes what the benchmarks found: bench/results/<machine>.json, .md and .png."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import machine
import pytest
import torch

import medkd_fast
from medkd_fast import backend

sys.path.insert(0, str(Path(__file__).parent))
RESULTS = Path(__file__).parent / "results"


LIMITS = pytest.StashKey[dict[str, float]]()
#: After this time (seconds since 1970) no work is begun: a run that is killed writes no results.
DEADLINE = float(os.environ.get("BENCH_UNTIL", "inf"))


@pytest.fixture
def limits(request: pytest.FixtureRequest) -> None:
    """Measured anew before every work on a CPU, where others may run in the meantime: the highest rates are the machine's."""
    if time.time() > DEADLINE:
        pytest.skip("no time is left (BENCH_UNTIL)")
    before = request.config.stash.get(LIMITS, {})
    if not (before and machine.GPU):
        found = machine.limits()
        request.config.stash[LIMITS] = {name: max(rate, before.get(name, 0.0)) for name, rate in found.items()}


def _beside_limit(row: dict[str, Any], limits: dict[str, float]) -> dict[str, Any]:
    """A row, and in place of what its work takes the time that it needs at the machine's rates, which of them, and its share."""
    milliseconds = {name: 1e3 * amount / limits[rate] for name, (amount, rate) in row["demands"].items()}
    binding = max(milliseconds, key=lambda name: milliseconds[name])
    return {
        **{name: value for name, value in row.items() if name != "demands"},
        "limit_milliseconds": milliseconds[binding],
        "limit_binds": binding,
        "limit_share": milliseconds[binding] / row["milliseconds"]["fused"]["p50"],
    }


def _commit() -> str:
    """COMMIT names it where the tree came without its repository."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def pytest_sessionfinish(session: pytest.Session) -> None:
    measured = getattr(session.config, "_benchmarksession", None)
    rows = [b.extra_info for b in measured.benchmarks if b.extra_info] if measured else []
    if not rows or LIMITS not in session.config.stash:
        return
    commit = _commit()  # before the first result changes the tree
    for group in sorted({row["group"] for row in rows}):
        _write(session, commit, group, [row for row in rows if row["group"] == group])


def _write(session: pytest.Session, commit: str, group: str, rows: list[dict[str, Any]]) -> None:
    from report import plot, table

    limits = session.config.stash[LIMITS]
    result: dict[str, Any] = {
        "machine": machine.name(),
        "date": date.today().isoformat(),
        "commit": commit,
        "versions": {
            "medkd_fast": medkd_fast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "instruction_set": backend.instruction_set(),
        "threads": torch.get_num_threads(),
        "device": "gpu" if machine.GPU else "cpu",
        "limits": limits,
        "rows": [_beside_limit(row, limits) for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{machine.name()}{f'-{group}' if group else ''}.json"
    if len(rows) < 2:  # a single selected benchmark does not replace a whole table
        return
    for target, text in ((path, json.dumps(result, indent=1)), (path.with_suffix(".md"), table(result))):
        partial = target.with_suffix(".partial")
        partial.write_text(text + "\n")
        os.replace(partial, target)
    plot(result, path.with_suffix(".png"))
    print(f"\nwritten: {path}\n\n{table(result)}")
