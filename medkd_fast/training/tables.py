"""The demo's figures: one table for the screen, the same in metrics.json and metrics.csv, and what they do not show."""

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
from medkd_fast.training.data import CLASSES, Split
from medkd_fast.training.evaluate import scores_record, scores_rows
from medkd_fast.training.files import write_csv, write_json
from medkd_fast.training.metrics import Summary, mean_scores
from medkd_fast.training.timing import FUSED, REFERENCE, StepCost


@dataclass(frozen=True)
class Entry:
    """One network of the report. macs: of one 128 x 128 slice. costs: by backend, empty where nothing was timed."""

    summaries: Mapping[int, Summary]
    parameters: int
    macs: int
    costs: Mapping[str, StepCost]
    distilled: bool = False


def write_metrics(folder: Path, entries: Mapping[str, Entry], about: Mapping[str, Any]) -> None:
    """metrics.json (`about`, then every network) and metrics.csv (one row a network and class)."""
    networks, rows = {}, []
    for name, entry in entries.items():
        cost = _cost_columns(entry)
        networks[name] = scores_record(entry.summaries) | cost
        rows += [row | cost for row in scores_rows(entry.summaries, network=name)]
    write_json(folder / "metrics.json", {**about, "networks": networks})
    write_csv(folder / "metrics.csv", [{k: "" if v is None else v for k, v in row.items()} for row in rows])


def print_scores(entries: Mapping[str, Entry], notes: Sequence[str]) -> None:
    """The table on the screen, then the notes, one a line."""
    table, console = scores_table(entries), Console()
    # a table squeezed into a narrow window or the 80 columns of a pipe is worse than long lines
    needed = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    console = Console(width=max(console.width, needed))
    console.print("Held-out blocks of slices: Dice / HD95 mm / ASSD mm")
    console.print(table)
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)


def scores_table(entries: Mapping[str, Entry]) -> Table:
    """Dice, HD95 and ASSD of every class and network, counts of missed and false volumes, size and cost."""
    table = Table()
    table.add_column("")
    for name in entries:
        table.add_column(name, justify="right")

    def row(label: str, cells: list[str], **options: Any) -> None:
        table.add_row(label, *cells, **options)

    summaries = [e.summaries for e in entries.values()]
    for c, name in CLASSES.items():
        row(name, [_scores_cell(s[c]) for s in summaries], end_section=c == len(CLASSES))
    row("mean", ["{:.3f} / {:.1f} / {:.1f}".format(*mean_scores(s)) for s in summaries])
    for count in ("missed", "false"):
        row(f"{count} organs", [str(sum(getattr(v, f"n_{count}") for v in s.values())) for s in summaries])
    table.add_section()
    row("parameters", [f"{e.parameters:,}" for e in entries.values()])
    row("MACs a slice", [f"{e.macs / 1e6:.0f} M" for e in entries.values()])
    if any(e.costs for e in entries.values()):
        for key, label in ((FUSED, "fused"), (REFERENCE, "reference")):
            costs = [e.costs.get(key) for e in entries.values()]
            row(f"ms a step, {label}", [f"{c.step_ms:.0f}" if c else "" for c in costs])
            shares = [c if e.distilled else None for c, e in zip(costs, entries.values(), strict=True)]
            row(f"loss's share, {label}", [f"{c.share:.1%} ({c.loss_ms:.1f} ms)" if c else "" for c in shares])
    return table


def findings(entries: Mapping[str, Entry], baseline: str) -> list[str]:
    """One sentence for every distilled network: its mean Dice and HD95 against the baseline's, and whether that helped."""
    base, sentences = mean_scores(entries[baseline].summaries), []
    for name, entry in entries.items():
        if not entry.distilled:
            continue
        scores = mean_scores(entry.summaries)
        dice, hd95 = scores.dice - base.dice, scores.hd95 - base.hd95
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


def caveats(entries: Mapping[str, Entry], split: Split) -> list[str]:
    """What a reader of the table has to know about the data and the means."""
    held_out = sum(len(block) for block in split.held_out)
    absent = [CLASSES[c] for c in CLASSES if all(_absent(e.summaries[c]) for e in entries.values())]
    lines = [
        f"One subject (LIDC-IDRI-0001): {len(split.train)} slices trained on, {held_out} held out in {len(split.held_out)} "
        + "blocks with a gap beside each. Nothing here speaks for other subjects.",
        "Last weights of each run; none was chosen by its held-out score. A missed organ is in the mean with Dice 0 and "
        + "without distances; a false one is only counted.",
    ]
    slow = [r.operator for r in backend.report() if r.device_type == "cpu" and not r.available]
    if slow:
        lines.append(f"Not fused on this machine: {', '.join(slow)}; `medkd-fast doctor` says why.")
    return lines + ([f"No label, in no mean: {', '.join(absent)}."] if absent else [])


def _scores_cell(summary: Summary) -> str:
    if _absent(summary):
        return "no label" + (f", {summary.n_false} false" if summary.n_false else "")
    distances = " / ".join("-" if math.isnan(v) else f"{v:.1f}" for v in (summary.hd95, summary.assd))
    return f"{summary.dice:.3f} / {distances}"


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
