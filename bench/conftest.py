"""Measures the machine once and writes what the benchmarks found: bench/results/<machine>.json, .md and .png."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
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


@pytest.fixture(scope="session")
def limits(request: pytest.FixtureRequest) -> dict[str, float]:
    found = machine.limits()
    request.config.stash[LIMITS] = found
    return found


LIMITS = pytest.StashKey[dict[str, float]]()


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
        "limits": session.config.stash[LIMITS],
        "rows": rows,
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
