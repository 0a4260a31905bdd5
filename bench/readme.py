"""Writes the README's table from the results of a machine: `python bench/readme.py bench/results/<machine>.json`.

The works are those that the table has; their figures become those of the results.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from report import VARIANTS

README = Path(__file__).parent.parent / "README.md"


def rewritten(text: str, path: Path) -> str:
    """The README with the figures of the results in `path`."""
    result = json.loads(path.read_text())
    rows = {row["work"]: row for row in result["rows"]}
    begin = text.index("Forward and backward on ")
    end = text.index("\n\n", text.index("|---|", begin))
    lines = text[begin:end].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|---|")) + 1
    machine = re.sub(rf"-{result['instruction_set']}-\d+-threads$", "", result["machine"]).replace("-", " ")
    where = f"on {result['threads']} threads of an {machine} ({result['instruction_set']}, torch {result['versions']['torch']}),"
    lines[0] = (
        f"Forward and backward {where} commit {result['commit'][:7]}, fp32 unless a row says otherwise; how many times longer"
    )
    lines[first:] = [_line(rows[line.split("|")[1].strip()]) for line in lines[first:]]
    return text[:begin] + "\n".join(lines) + text[end:]


def _line(row: dict[str, Any]) -> str:
    ratios = [f"{row['ratio'][name]['p50']:.1f}x" if name in row["ratio"] else "does not fit" for name in VARIANTS]
    published = row["peak_bytes"].get("published eager")
    cells = [
        row["work"],
        f"{row['milliseconds']['fused']['p50']:.1f} ms",
        *ratios,
        f"{row['peak_bytes']['fused'] / 1e6:.1f} MB",
        "does not fit" if published is None else f"{published / 1e6:.0f} MB",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    partial = README.with_suffix(".partial")
    partial.write_text(rewritten(README.read_text(), Path(sys.argv[1])))
    os.replace(partial, README)
