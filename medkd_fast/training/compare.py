"""Every method on the same data, splits and seeds: what it scored, how that varies over the seeds, and what it costs.

A cell is one method with one seed, and one run in a folder of its own: OUT/METHOD/seed-N. A cell that has its scores is not
run again, a killed one goes on, a failed one is written down and tried again by the next call.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from medkd_fast.losses.catalogue import LOSSES
from medkd_fast.training.config import RunConfig
from medkd_fast.training.data.dataset import Dataset, open_dataset
from medkd_fast.training.data.prepare import prepare
from medkd_fast.training.distillation import LossTerm, parse_loss
from medkd_fast.training.errors import WrongUse
from medkd_fast.training.evaluate import PROTOCOLS, Evaluation
from medkd_fast.training.files import read_json, sha256, slug, write_atomically, write_csv, write_json, writing
from medkd_fast.training.finish import cases_of, finish_run, notes_of, overlay_rows, score
from medkd_fast.training.inference import predict_logits
from medkd_fast.training.metrics import MEASURES
from medkd_fast.training.pictures import bars_figure, classes_figure, overlay_figure, save_png
from medkd_fast.training.runs import Plan, Trained, build_module, check_content, fit, load_run, plan_run, versions
from medkd_fast.training.tables import print_table
from medkd_fast.training.timing import machine, time_networks

BASELINE = "student"
TEACHER = "teacher"
TIMING_ROUNDS = 9
NAMES = {"dice": "Dice", "hd95": "HD95, mm", "assd": "ASSD, mm"}


@dataclass(frozen=True)
class Cell:
    """One run of the comparison."""

    network: str
    seed: int
    config: RunConfig
    folder: Path

    @property
    def error(self) -> Path:
        """Why it failed, where it did."""
        return self.folder.with_name(f"{self.folder.name}.error.txt")


def parse_methods(text: str) -> dict[str, LossTerm]:
    """`kd,cpkd:0.5` to {"kd": ..., "cpkd:0.5": ...}; a method is a loss as `distill --loss` takes it.

    >>> list(parse_methods("kd,dmd:feature_weight=0.5,temperature=2,cwd:2"))
    ['kd', 'dmd:feature_weight=0.5,temperature=2', 'cwd:2']
    """
    parts: list[str] = []
    for piece in text.split(","):
        word = piece.strip()
        if parts and ":" in parts[-1] and word.partition(":")[0] not in LOSSES:
            parts[-1] += f",{word}"  # goes on with the settings of the one before
        elif word:
            parts.append(word)
    if not parts:
        raise WrongUse(f"--methods must name losses, such as kd,cwd,cpkd, got {text!r}")
    if len(set(parts)) < len(parts):
        raise WrongUse(f"--methods names a method twice: {text}")
    return {part: parse_loss(part) for part in parts}


def compare(
    config: RunConfig,
    teacher: Path,
    methods: Mapping[str, LossTerm],
    out: Path,
    *,
    seeds: int = 3,
    retime: bool = False,
) -> dict[str, Any]:
    """Run what is missing, then write compare.json, .csv, .md and pictures into `out`, print the table, return the record.

    config: of the student alone; its seed is the first of the `seeds`. All students are prepared, split and cut into
    patches as the teacher was. retime: measure steps again, though that was done.

    Raises WrongUse where `out` holds another comparison or cannot be written, and for what no cell could run with.
    """
    if seeds < 1:
        raise WrongUse(f"--seeds must be >= 1, got {seeds}")
    trained = load_run(teacher)
    if not trained.split.test:
        raise WrongUse(
            f"{teacher} was trained without test cases, and there is nothing to compare on: train a teacher with --fractions such "
            "as 0.7,0.1,0.2"
        )
    dataset = open_dataset(config.data, config.layout)
    base, run = _base(config, teacher, trained, next(iter(methods.values())))
    # of a teacher that comes from other data: it is scored on the students' test cases
    trained = replace(trained, split=run.split, content=run.content)
    with writing(out):
        _check_folder(out, base, run, trained)
        cells = _cells(base, teacher, methods, range(config.seed, config.seed + seeds), out)
        if not (out / TEACHER / "scores.json").exists():
            _finish(trained, dataset, out / TEACHER)
        failed, ran = _run_cells(cells, dataset)
        record = _record(cells, failed, dataset, out, trained)
        _add_costs(record, cells, out, retime=retime)
        _write(record, out)
        if ran or not (out / "overlay.png").exists():
            _overlay(trained, [c for c in cells if c.seed == config.seed and c.folder not in failed], dataset, out)
    print_table(f"{dataset.name}: mean ± standard deviation over the seeds", _screen(record), record["notes"])
    return record


def failures(record: Mapping[str, Any]) -> int:
    """How many cells of a comparison failed."""
    return sum(len(network["failed"]) for network in record["networks"].values())


def _base(config: RunConfig, teacher: Path, trained: Trained, term: LossTerm) -> tuple[RunConfig, Plan]:
    """The student's configuration with the teacher's preparation, patch and split, for runs with and without it; and its plan."""
    own = {"split_seed": trained.config.split_seed, "fractions": trained.config.fractions}
    base = replace(config, teacher=None, losses=(), **own)
    taught = plan_run(replace(base, teacher=str(teacher), losses=(term,)))
    made = taught.config
    base = replace(base, data=made.data, preprocessing=made.preprocessing, patch=made.patch)
    alone = plan_run(base)
    if alone.split != taught.split:
        raise WrongUse(
            f"{config.data} has changed since {teacher} was trained: students with and without it would be tested on "
            "different cases; train the teacher again"
        )
    return base, alone


def _check_folder(out: Path, base: RunConfig, run: Plan, trained: Trained) -> None:
    """Write down what is compared, or check that the folder's comparison is the one asked for; more methods or seeds may come."""
    asked = base.to_dict() | {"teacher_sha256": sha256(trained.checkpoint)}
    del asked["seed"]
    there = read_json(out / "settings.json") if (out / "settings.json").exists() else None
    if there is None and out.is_dir() and any(out.iterdir()):
        raise WrongUse(f"{out} is not empty and holds no comparison: choose another --out")
    asked = json.loads(json.dumps(asked))  # as it comes back from the file: lists, no tuples
    changed = [k for k in asked if there is not None and there.get(k) != asked[k]]
    if there is not None and changed:
        told = "; ".join(f"{k} is {there.get(k)}, asked for {asked[k]}" for k in changed)
        raise WrongUse(f"{out} holds another comparison ({told}): choose another --out or delete the folder")
    check_content(run, there and there.get("content"))  # or cells on other labels would stand in one table
    write_json(out / "settings.json", asked | {"content": run.content})


def _cells(
    base: RunConfig, teacher: Path, methods: Mapping[str, LossTerm], seeds: Sequence[int], out: Path
) -> list[Cell]:
    """Seed by seed, so that a comparison that is stopped has whole rounds."""
    found = []
    for seed in seeds:
        found.append(Cell(BASELINE, seed, replace(base, seed=seed), out / BASELINE / f"seed-{seed}"))
        for name, term in methods.items():
            config = replace(base, seed=seed, teacher=str(teacher), losses=(term,))
            folder = out / slug(name) / f"seed-{seed}"
            found.append(Cell(f"{BASELINE} + {name.upper() if name in LOSSES else name}", seed, config, folder))
    return found


def _run_cells(cells: Sequence[Cell], dataset: Dataset) -> tuple[dict[Path, str], int]:
    """Train and score what has no scores; the folders of those that failed, with the reason, and how many came through."""
    failed, ran = {}, 0
    for number, cell in enumerate(cells, 1):
        if (cell.folder / "scores.json").exists():
            continue
        start = time.perf_counter()
        try:
            found = _finish(load_run(fit(cell.config, cell.folder, resume=True)), dataset, cell.folder)
            cell.error.unlink(missing_ok=True)
            ran += 1
            said = f"Dice {found.mean.dice:.3f}, {time.perf_counter() - start:.0f} s"
        except Exception as error:  # noqa: BLE001 the other cells are worth running whatever this one died of
            reason = " ".join(str(error).split()) or type(error).__name__
            failed[cell.folder] = reason
            trace = traceback.format_exc()
            write_atomically(cell.error, lambda p, text=trace: p.write_text(text, encoding="utf-8"))
            said = f"failed: {reason}; see {cell.error}"
        print(f"[{number}/{len(cells)}] {cell.network}, seed {cell.seed}: {said}", file=sys.stderr, flush=True)
    return failed, ran


def _finish(trained: Trained, dataset: Dataset, folder: Path) -> Evaluation:
    evaluation, seen, volumes = score(trained, dataset, cases_of(trained, dataset, "test"))
    finish_run(folder, trained, evaluation, {trained.name: seen}, volumes, dataset)
    return evaluation


def _record(
    cells: Sequence[Cell], failed: Mapping[Path, str], dataset: Dataset, out: Path, trained: Trained
) -> dict[str, Any]:
    networks = {TEACHER: {"failed": {}, **_scores({None: read_json(out / TEACHER / "scores.json")})}}
    for name in dict.fromkeys(c.network for c in cells):
        own = [c for c in cells if c.network == name]
        scored = {c.seed: read_json(c.folder / "scores.json") for c in own if c.folder not in failed}
        networks[name] = {
            "failed": {str(c.seed): failed[c.folder] for c in own if c.folder in failed},
            **_scores(scored),
        }
    seeds = list(dict.fromkeys(c.seed for c in cells))
    config = cells[0].config
    size = " x ".join(map(str, config.patch or ()))
    rule = f"Scored on the grid of the files: {PROTOCOLS['mm']}. So HD95 and ASSD of a network are over what it found."
    length = (
        f"Every student was trained for {config.epochs * config.steps} steps of {config.batch_size} inputs of {size}; its score is "
        "what that gives, not what the network can reach."
    )
    teacher = f"the checkpoint {trained.checkpoint.name} of one run" if trained.named else "one run"
    spread = (
        f"Mean ± standard deviation (n - 1) over {len(seeds)} seeds of the student, which decide first weights, order of the "
        f"draws and augmentation. The teacher is {teacher}. All students have the same cases, steps and learning rate."
    )
    limits = (
        "Weights of the losses are defaults, or what the name of a method says; none was tuned here. Spread over seeds is not "
        "spread over subjects: that one method is better than another cannot be concluded from this table."
    )
    return {
        "data": dataset.name,
        "split": "test",
        "seeds": seeds,
        "cases": list(trained.split.test),
        "classes": list(dataset.classes.values()),
        "steps": config.epochs * config.steps,
        "batch_size": config.batch_size,
        "patch": list(config.patch or ()),
        "notes": [*notes_of(dataset), rule, length, spread, limits],
        "networks": networks,
        "versions": versions(),
    }


def _scores(scored: Mapping[int | None, Mapping[str, Any]]) -> dict[str, Any]:
    """One network: means and deviations over its seeds, size, and every seed's scores."""
    first = next(iter(scored.values()), {})
    return {
        **{
            m: _spread([of["mean"][m] for of in scored.values()]) for m in (*MEASURES, "n_valid", "n_missed", "n_false")
        },
        "parameters": first.get("parameters"),
        "macs": first.get("macs"),
        "step_ms": None,
        "loss_ms": None,
        "peak_mib": None,
        "cells": [{"seed": seed, "mean": of["mean"], "classes": of["classes"]} for seed, of in scored.items()],
    }


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and standard deviation of the values that there are, and how many these are."""
    known = [v for v in values if v is not None and not math.isnan(v)]
    return {
        "mean": statistics.fmean(known) if known else None,
        "sd": statistics.stdev(known) if len(known) > 1 else None,
        "n": len(known),
    }


def _add_costs(record: dict[str, Any], cells: Sequence[Cell], out: Path, *, retime: bool) -> None:
    """What a step of every student costs, measured once, all of them in turns."""
    first: dict[str, Cell] = {}
    for cell in cells:
        if not record["networks"][cell.network]["failed"]:
            first.setdefault(cell.network, cell)
    file = out / "timing.json"
    known = read_json(file) if file.exists() and not retime else {"networks": {}}
    if set(first) - set(known["networks"]):
        print("timing steps of every student", file=sys.stderr, flush=True)
        modules = {}
        for name, cell in first.items():
            run = plan_run(cell.config)
            modules[name] = (build_module(run), next(iter(run.loader())))
        before = machine()
        networks = time_networks(modules, rounds=TIMING_ROUNDS)
        known = {"about": before | {"load_after": machine()["load"]}, "networks": networks}
        write_json(file, known)
    for name, cost in known["networks"].items():
        if name in record["networks"]:
            record["networks"][name] |= cost
    if known["networks"]:
        record["timing"] = known["about"]
        record["notes"].append(
            "A step is forward, teacher's forward, losses, backward and optimiser; median of {rounds} in turns, on {device}. "
            "Load of the machine: {load:.1f} before, {load_after:.1f} after, on {cores} cores.".format(
                rounds=TIMING_ROUNDS, **known["about"]
            )
            + " Peak memory is what a step adds to what is resident."
        )


def _write(record: Mapping[str, Any], out: Path) -> None:
    write_json(out / "compare.json", record)
    write_csv(out / "compare.csv", _rows(record))
    write_atomically(out / "compare.md", lambda p: p.write_text(markdown(record), encoding="utf-8"))
    networks = record["networks"]
    bars = {name: {m: (_nan(of[m]["mean"]), _nan(of[m]["sd"])) for m in MEASURES} for name, of in networks.items()}
    save_png(bars_figure(bars, NAMES), out / "compare.png")
    labelled = [
        c for c in record["classes"] if any(_labelled(cell, c) for of in networks.values() for cell in of["cells"])
    ]
    by_class = {
        name: {c: [_nan(cell["classes"][c]["dice"]) for cell in of["cells"]] for c in labelled}
        for name, of in networks.items()
    }
    save_png(classes_figure(by_class, "Dice; small points are seeds"), out / "compare-classes.png")


def markdown(record: Mapping[str, Any]) -> str:
    """The table with its caveats, for a README."""
    head = [
        "network",
        "seeds",
        *NAMES.values(),
        "missed",
        "parameters",
        "MACs",
        "ms a step",
        "of it the loss",
        "peak, MiB",
    ]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(cells)} |" for cells in _table_cells(record)]
    failed = [
        f"{name}, seed {seed}: {reason}"
        for name, of in record["networks"].items()
        for seed, reason in of["failed"].items()
    ]
    notes = [*record["notes"], *(f"Failed: {f}" for f in failed)]
    return "\n".join([f"# {record['data']}", "", *lines, "", *(f"* {n}" for n in notes), ""])


def _screen(record: Mapping[str, Any]) -> Table:
    table = Table()
    for i, head in enumerate(
        ["", "seeds", *NAMES.values(), "missed", "parameters", "MACs", "ms a step", "loss", "MiB"]
    ):
        table.add_column(head, justify="right" if i else "left")
    for cells in _table_cells(record):
        table.add_row(*cells)
    for name, of in record["networks"].items():
        for seed, reason in of["failed"].items():
            table.add_row(f"{name}, seed {seed}", "failed", reason[:60])
    return table


def _table_cells(record: Mapping[str, Any]) -> list[list[str]]:
    def spread(of: Mapping[str, Any], digits: int, seeds: int) -> str:
        if of["mean"] is None:
            return "-"
        fewer = f" (n = {of['n']})" if of["n"] < seeds else ""  # in the others all was missed
        return f"{of['mean']:.{digits}f}" + ("" if of["sd"] is None else f" ± {of['sd']:.{digits}f}") + fewer

    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:,.{digits}f}"

    return [
        [
            name,
            str(len(of["cells"])),
            *(spread(of[m], 3 if m == "dice" else 1, len(of["cells"])) for m in MEASURES),
            spread(of["n_missed"], 1, len(of["cells"])),
            number(of["parameters"], 0),
            "" if of["macs"] is None else f"{of['macs'] / 1e6:,.0f} M",
            *(number(of[k], 1) for k in ("step_ms", "loss_ms")),
            number(of["peak_mib"], 0),
        ]
        for name, of in record["networks"].items()
    ]


def _rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a network, seed and class (and the mean), with the network's size and cost."""
    rows = []
    for name, of in record["networks"].items():
        cost = {k: of[k] for k in ("parameters", "macs", "step_ms", "loss_ms", "peak_mib")}
        for cell in of["cells"]:
            for c, scores in [*cell["classes"].items(), ("mean", cell["mean"])]:
                rows.append({"network": name, "seed": cell["seed"], "class": c, **scores, **cost, "error": None})
        for seed, reason in of["failed"].items():
            rows.append(dict.fromkeys(rows[0]) | {"network": name, "seed": seed, "error": reason})
    return [{k: "" if v is None else v for k, v in row.items()} for row in rows]


def _overlay(trained: Trained, cells: Sequence[Cell], dataset: Dataset, out: Path) -> None:
    """overlay.png: a slice of every test case as the teacher and the first seed of every student see it."""
    volumes = prepare(dataset, trained.preprocessing, trained.split.test[:3])
    seen = {}
    for name, network in [(TEACHER, trained), *((c.network, load_run(c.folder)) for c in cells)]:
        seen[name] = {
            case: predict_logits(network.network, v.image, dims=network.dims, patch=network.patch).argmax(0)
            for case, v in volumes.items()
        }
    save_png(overlay_figure(overlay_rows(seen, volumes), dataset.classes), out / "overlay.png")


def _labelled(cell: Mapping[str, Any], c: str) -> bool:
    return cell["classes"][c]["n_valid"] + cell["classes"][c]["n_missed"] > 0


def _nan(value: float | None) -> float:
    return math.nan if value is None else value
