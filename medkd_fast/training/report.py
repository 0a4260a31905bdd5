"""One HTML page about runs and comparisons that needs no network: tables, curves, overlays, configurations.

The page is filled in by Jinja2 from `report.html` beside this file. Pictures of curves are SVG inside the page, in its own
text colour, so that they are readable in light and in dark; overlays are PNG. A content security policy forbids the page to
fetch anything.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from medkd_fast.training.errors import WrongUse
from medkd_fast.training.evaluate import PROTOCOLS, Evaluation
from medkd_fast.training.files import quoted, read_json, write_atomically, writing
from medkd_fast.training.metrics import Scores, mean_without_nan
from medkd_fast.training.pictures import classes_figure, curves_figure, read_curve, svg_text

SCORES = "scores*.json"
MOST_ROWS = 1000  # of a table of every case
MOST_POINTS = 5000  # cases in the picture of the classes
MOST_BYTES = 20_000_000  # of all pictures of slices


@dataclass(frozen=True)
class Scored:
    """One scores*.json of a run: where its scores come from, and the scores. cases: the file that has all of them."""

    title: str
    evaluation: Evaluation
    about: Mapping[str, Any]
    cases: Path

    @property
    def count(self) -> int:
        """Rows that the table of every case would have."""
        return sum(len(of) for of in self.evaluation.cases.values())

    @property
    def rows(self) -> list[tuple[str, str, Scores]]:
        """(case, class, scores) of every case; where there are more than MOST_ROWS, those with the lowest Dice."""
        e = self.evaluation
        rows = [(case, e.classes[c], s) for case, of in e.cases.items() for c, s in of.items()]
        if len(rows) <= MOST_ROWS:
            return rows
        return sorted((r for r in rows if not math.isnan(r[2].dice)), key=lambda r: r[2].dice)[:MOST_ROWS]


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Write one page about runs (folders of `train` or `distill`) and comparisons (folders of `compare`).

    Raises WrongUse for a folder that is neither, for a run that was not evaluated yet, and where `out` cannot be written.
    """
    compared = [f for f in folders if (f / "compare.json").is_file()]
    names = _names(folders)
    runs = {name: folder for name, folder in names.items() if folder not in compared}
    scored = {name: _scores(folder) for name, folder in runs.items()}
    points = sum(of[0].count for of in scored.values()) <= MOST_POINTS
    page = _template().render(
        title=", ".join(runs) if len(runs) == 1 else "Runs side by side" if runs else "Comparison",
        overview=[_overview(name, folder, scored[name][0]) for name, folder in runs.items()],
        protocols=PROTOCOLS,
        scored=scored,
        curves=_curves(runs),
        classes=_classes({name: of[0].evaluation for name, of in scored.items()}, points=points),
        points=points,
        overlays=_overlays(runs),
        texts={name: _texts(folder) for name, folder in runs.items()},
        compared=[_comparison(name, folder) for name, folder in names.items() if folder in compared],
        notes=list(dict.fromkeys(note for of in scored.values() for s in of for note in s.about.get("notes", []))),
    )
    with writing(out):
        write_atomically(out, lambda p: p.write_text(page, encoding="utf-8"))


def png(path: Path) -> str | None:
    """A picture as a data URI; None where there is none."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" if path.is_file() else None


def number(value: float | None, digits: int) -> str:
    """`0.812`, or a dash for what there is not.

    >>> number(0.81234, 3), number(float("nan"), 1)
    ('0.812', '–')
    """
    return "–" if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    return environment.get_template("report.html")


def _names(folders: Sequence[Path]) -> dict[str, Path]:
    """A short name for every folder: its own, with as many of its parents' as tell it from the others."""
    paths = [f.resolve() for f in folders]
    for folder, path in zip(folders, paths, strict=True):
        if not path.is_dir():
            raise WrongUse(f"{folder} is no folder: give folders of runs or of comparisons")
        if paths.count(path) > 1:
            raise WrongUse(f"{folder} is given twice: give it once")
    parts = 1
    while len({p.parts[-parts:] for p in paths}) < len(paths):
        parts += 1
    return {"/".join(path.parts[-parts:]): folder for folder, path in zip(folders, paths, strict=True)}


def _scores(folder: Path) -> list[Scored]:
    files = sorted(folder.glob(SCORES), key=lambda p: (p.stem != "scores", p.stem))
    if not files:
        raise WrongUse(
            f"{folder} holds no scores and no comparison: run `medkd-fast evaluate {quoted(folder)}`, or give another folder"
        )
    found = []
    for file in files:
        record = read_json(file)
        where = ", ".join(str(record[k]) for k in ("data", "split") if k in record)
        cases = file.with_name(f"{file.stem}-cases.csv")
        found.append(Scored(where or file.stem, Evaluation.from_record(record), record, cases))
    return found


def _overview(name: str, folder: Path, scored: Scored) -> dict[str, Any]:
    finished = folder / "finished.json"
    return {
        "name": name,
        "mean": scored.evaluation.mean,
        "protocol": scored.evaluation.protocol,
        "where": scored.title,
        "cases": len(scored.evaluation.cases),
        "parameters": scored.about.get("parameters"),
        "macs": scored.about.get("macs"),
        "steps": read_json(finished)["steps"] if finished.is_file() else None,
    }


def _curves(runs: Mapping[str, Path]) -> Markup | None:
    if not any(read_curve(folder, "task")[0] for folder in runs.values()):
        return None
    return Markup(svg_text(curves_figure(runs), name="curves"))


def _classes(evaluations: Mapping[str, Evaluation], *, points: bool) -> Markup | None:
    """Dice class by class, a mark a run and, with `points`, a point a case, where all runs have the same classes."""
    names = {tuple(e.classes.values()) for e in evaluations.values()}
    if len(names) != 1:
        return None
    values: dict[str, dict[str, list[float]]] = {run: {} for run in evaluations}
    for run, e in evaluations.items():
        for c, name in e.classes.items():
            dice = (case[c] for case in e.cases.values())
            known = [s.dice for s in dice if s.outcome in ("valid", "missed")]
            values[run][name] = known if points else [mean_without_nan(known)]
    label = "Dice; a point a case" if points else "Dice"
    return Markup(svg_text(classes_figure(values, label), name="classes"))


def _overlays(runs: Mapping[str, Path]) -> dict[str, tuple[Path, str | None]]:
    """Every run's picture of slices, where it has one: its file, and what the page shows of it; None where it has no room for it."""
    room, found = MOST_BYTES, {}
    for name, folder in runs.items():
        file = folder / "overlay.png"
        if file.is_file():
            size = file.stat().st_size
            found[name] = file, png(file) if size <= room else None
            room -= min(size, room)
    return found


def _texts(folder: Path) -> dict[str, str]:
    """The files that say how a run was made, as they are."""
    names = ("config.yaml", "config.json", "split.json", "versions.json")
    return {n: (folder / n).read_text(encoding="utf-8") for n in names if (folder / n).is_file()}


def _comparison(name: str, folder: Path) -> dict[str, Any]:
    record = read_json(folder / "compare.json")
    return {
        "name": name,
        "record": record,
        "pictures": {
            "Means over the seeds, whiskers of one standard deviation": png(folder / "compare.png"),
            "Dice class by class": png(folder / "compare-classes.png"),
            "A slice of every test case": png(folder / "overlay.png"),
        },
        "about": json.dumps(record.get("versions", {}), indent=2),
    }
