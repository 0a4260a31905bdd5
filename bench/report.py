"""The table and the picture of one machine's results."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

VARIANTS = ("published eager", "published compiled", "plain eager", "plain compiled")
OURS = ("fused fp32 contiguous", "fused triton", "fused cuda")


def table(result: dict[str, Any]) -> str:
    limits = result["limits"]
    units = "" if result["device"] == "gpu" else f"{result['instruction_set']}, "
    rates = ", ".join(f"{name} {rate / 1e9:.4g} {'GB/s' if name == 'copy' else 'G/s'}" for name, rate in limits.items())
    variants = [name for name in VARIANTS if any(name in row["ratio"] for row in result["rows"])]
    ours = [name for name in OURS if any(name in row["ratio"] for row in result["rows"])]
    lines = [
        (
            f"{result['machine']}, {units}torch {result['versions']['torch']}, commit {result['commit']}, "
            f"{result['date']}. Limits measured in the same run: {rates}."
        ),
        "",
        (
            "Forward and backward. Times: median (20–80 %). Ratios: median over rounds of variant / fused, so more is better for "
            "us. Peak: memory above the inputs, the gradient included, beside the size of the student's tensors."
            + " GPU: replays of CUDA graphs; «host»: what the host needs for an eager call."
            * (result["device"] == "gpu")
        ),
        "",
        "| work | fused, ms | "
        + " | ".join(f"vs {name}" for name in (*variants, *ours))
        + " | peak, MB (student) | published, MB "
        "| of the limit |",
        "|---|---|" + "---|" * len((*variants, *ours)) + "---|---|---|",
    ]
    for row in result["rows"]:
        own = row["milliseconds"]["fused"]
        ratios = [f"{row['ratio'][name]['p50']:.1f}x" if name in row["ratio"] else "does not fit" for name in variants]
        ratios += [f"{row['ratio'][name]['p50']:.2f}x" if name in row["ratio"] else "" for name in ours]
        published = row["peak_bytes"].get("published eager")
        lines.append(
            f"| {row['work']} | {own['p50']:.3g} ({own['p20']:.3g}–{own['p80']:.3g}) | "
            + " | ".join(ratios)
            + f" | {row['peak_bytes']['fused'] / 1e6:.1f} ({row['input_bytes'] / 1e6:.1f}) | "
            + ("does not fit" if published is None else f"{published / 1e6:.0f}")
            + f" | {100 * row['limit_share']:.0f} % ({row['limit_binds']}) |"
        )
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars: time of every variant over the fused one, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["rows"]
    figure, axes = pyplot.subplots(figsize=(10, 0.7 * len(rows) + 1.5), layout="constrained")
    height = 0.8 / len(VARIANTS)
    for i, name in enumerate(VARIANTS):
        places = [k + i * height for k, row in enumerate(rows) if name in row["ratio"]]
        found = [row["ratio"][name] for row in rows if name in row["ratio"]]
        values = [ratio["p50"] for ratio in found]
        spread = [[r["p50"] - r["p20"] for r in found], [r["p80"] - r["p50"] for r in found]]
        axes.barh(places, values, height, xerr=spread, label=name, error_kw={"linewidth": 0.8})
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks([k + 0.3 for k in range(len(rows))], [row["work"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("time over the fused operator's, forward and backward (1: equal)")
    axes.set_title(result["machine"])
    axes.legend()
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=120)
    os.replace(partial, path)
    pyplot.close(figure)
