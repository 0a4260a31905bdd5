"""Scores and costs of networks side by side: one table for the screen, the same in metrics.json and metrics.csv."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from medkd_fast import backend
from medkd_fast.training.evaluate import PROTOCOLS, Evaluation
from medkd_fast.training.files import write_csv, write_json
from medkd_fast.training.metrics import Summary
from medkd_fast.training.timing import FUSED, REFERENCE, StepCost


@dataclass(frozen=True)
class Entry:
    """One network of a table. macs: of one slice or patch. costs: by backend, empty where nothing was timed."""

    evaluation: Evaluation
    parameters: int
    macs: int
    costs: Mapping[str, StepCost]
    distilled: bool = False


def write_metrics(folder: Path, entries: Mapping[str, Entry], about: Mapping[str, Any]) -> None:
    """metrics.json (`about`, then every network) and metrics.csv (one row a network and class)."""
    networks, rows = {}, []
    for name, entry in entries.items():
        cost = _cost_columns(entry)
        networks[name] = entry.evaluation.record() | cost
        rows += [row | cost for row in entry.evaluation.rows(network=name)]
    write_json(folder / "metrics.json", {**about, "networks": networks})
    write_csv(folder / "metrics.csv", [{k: "" if v is None else v for k, v in row.items()} for row in rows])


def print_scores(entries: Mapping[str, Entry], notes: Sequence[str]) -> None:
    """The table on the screen, then the notes, one a line."""
    unit = "voxels" if next(iter(entries.values())).evaluation.protocol == "transunet" else "mm"
    print_table(f"Dice / HD95 {unit} / ASSD {unit}", scores_table(entries), notes)


def print_table(title: str, table: Table, notes: Sequence[str] = ()) -> None:
    """A title, a table as wide as it needs to be, and notes, one a line."""
    console = Console(markup=False)  # names of classes and methods may hold brackets
    # a table squeezed into a narrow window or the 80 columns of a pipe is worse than long lines
    needed = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    console = Console(width=max(console.width, needed), markup=False)
    console.print(title, highlight=False)
    console.print(table)
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)


def scores_table(entries: Mapping[str, Entry]) -> Table:
    """Dice, HD95 and ASSD of every class and network, counts of valid, missed and false volumes, size and cost."""
    table = Table()
    table.add_column("")
    for name in entries:
        table.add_column(name, justify="right")

    def row(label: str, cells: list[str], **options: Any) -> None:
        table.add_row(label, *cells, **options)

    evaluations = [e.evaluation for e in entries.values()]
    summaries = [e.summaries for e in evaluations]
    classes = evaluations[0].classes
    for c, name in classes.items():
        row(name, [_scores_cell(s[c]) for s in summaries], end_section=c == list(classes)[-1])
    means = [e.mean for e in evaluations]
    row("mean", [three_numbers(m) for m in means])
    for count in ("valid", "missed", "false"):
        row(f"{count} (n_{count})", [str(getattr(m, f"n_{count}")) for m in means])
    table.add_section()
    row("parameters", [f"{e.parameters:,}" for e in entries.values()])
    row("MACs an input", [f"{e.macs / 1e6:,.0f} M" for e in entries.values()])
    if any(e.costs for e in entries.values()):
        for key, label in ((FUSED, "fused"), (REFERENCE, "reference")):
            costs = [e.costs.get(key) for e in entries.values()]
            row(f"ms a step, {label}", [f"{c.step_ms:.0f}" if c else "" for c in costs])
            shares = [c if e.distilled else None for c, e in zip(costs, entries.values(), strict=True)]
            row(f"loss's share, {label}", [f"{c.share:.1%} ({c.loss_ms:.1f} ms)" if c else "" for c in shares])
    return table


def findings(entries: Mapping[str, Entry], baseline: str) -> list[str]:
    """One sentence for every distilled network: its mean Dice and HD95 against the baseline's, and whether that helped.

    Means of HD95 over other organs, because one of the two missed some, are not compared.
    """
    alone, sentences = entries[baseline].evaluation, []
    for name, entry in entries.items():
        if not entry.distilled:
            continue
        scores, base = entry.evaluation.mean, alone.mean
        dice, hd95 = scores.dice - base.dice, scores.hd95 - base.hd95
        if _found(entry.evaluation) != _found(alone):
            sentences.append(
                f"{name}: Dice {dice:+.3f} against {baseline}: {'better' if dice > 0 else 'the distillation did not help'} "
                f"here; their HD95 are over different organs (missed: {scores.n_missed} and {base.n_missed}). "
                "One subject, one seed: not a finding."
            )
            continue
        verdict = {
            (True, True): "better on both here",
            (True, False): "better on Dice, not on HD95 here",
            (False, True): "better on HD95, not on Dice here",
            (False, False): "the distillation did not help here",
        }[dice > 0, hd95 < 0]
        sentences.append(
            f"{name}: Dice {dice:+.3f}, HD95 {hd95:+.1f} mm against {baseline}: {verdict}. "
            "One subject, one seed: not a finding."
        )
    return sentences


def _found(evaluation: Evaluation) -> set[tuple[str, int]]:
    """Cases and classes that have distances."""
    return {(case, c) for case, of in evaluation.cases.items() for c, s in of.items() if s.outcome == "valid"}


def caveats(evaluations: Sequence[Evaluation], notes: Sequence[str] = ()) -> list[str]:
    """What a reader of the table has to know about the data and the means. notes: of the data set."""
    first = evaluations[0]
    cases = {len(e.cases) for e in evaluations}
    counted = " or ".join(str(n) for n in sorted(cases))
    rule = f"Means over {counted} cases, scored on the grid of their files: {PROTOCOLS[first.protocol]}."
    lines = [*notes, rule]
    slow = [r.operator for r in backend.report() if r.device_type == "cpu" and not r.available]
    if slow:
        lines.append(f"Not fused on this machine: {', '.join(slow)}; `medkd-fast doctor` says why.")
    absent = [name for c, name in first.classes.items() if all(_absent(e.summaries[c]) for e in evaluations)]
    if absent and first.protocol != "transunet":
        lines.append(f"No label, in no mean: {', '.join(absent)}.")
    return lines


def three_numbers(scores: Summary) -> str:
    """`0.812 / 12.1 / 3.2`, with a dash for what there is not."""
    dice = "-" if math.isnan(scores.dice) else f"{scores.dice:.3f}"
    return " / ".join([dice, *("-" if math.isnan(v) else f"{v:.1f}" for v in (scores.hd95, scores.assd))])


def _scores_cell(summary: Summary) -> str:
    if _absent(summary):
        return "no label" + (f", {summary.n_false} false" if summary.n_false else "")
    return three_numbers(summary)


def _absent(summary: Summary) -> bool:
    return summary.n_valid + summary.n_missed == 0


def _cost_columns(entry: Entry) -> dict[str, Any]:
    columns: dict[str, Any] = {"parameters": entry.parameters, "macs": entry.macs}
    for name, label in ((FUSED, "fused"), (REFERENCE, "reference")):
        cost = entry.costs.get(name)
        columns[f"step_ms_{label}"] = cost and cost.step_ms
        columns[f"loss_ms_{label}"] = cost and cost.loss_ms
        columns[f"loss_share_{label}"] = cost and cost.share
    return columns
