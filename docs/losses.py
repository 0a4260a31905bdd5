"""Writes docs/losses.md: what stands in the docstrings of the losses, in one page. `make losses-page` runs it."""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path

from medkd_fast import losses

DOCUMENT = Path(__file__).parent / "losses.md"
LABELS = ("Other codes", "Weight", "Cost")

INTRODUCTION = """# The losses

Written by `make losses-page` (`docs/losses.py`) from the docstrings, which also have the arguments and an example:
`help(medkd_fast.losses.CWDLoss)`.

Every loss is called `loss(student, teacher, target)` on maps [N, C, H, W] or [N, C, D, H, W] and returns a scalar in float32
(float64 for float64 maps), whatever the maps' type; its parts, detached and unweighted, are in `loss.parts`.
`losses.build("cwd", temperature=4)` makes one by name, `losses.available()` lists them.

N is the number of images, C of classes or channels, V of pixels; T is the temperature. Wherever a loss takes a target, pixels
with `ignore_index` count nowhere: in no sum, norm, softmax or denominator. Without any pixel that counts, value and gradient are
0. Labels are brought to a feature's size by the nearest pixel. Statistics over the batch (`DISTLoss`, `PKDLoss`, `SPLoss`) are those
of the process's own batch; `sync=True` takes them over all processes of a distributed run.

Maps of unequal size are brought to one size by PyTorch's pooling or linear interpolation. On CUDA the gradient of these (but of
pooling in 2-D where one size divides the other) need not have the same bits on every run; nor has that of max-pooling in 3-D.

**Weight** is the factor that the authors' code, or a named table, puts before the loss as it is defined here. **Cost** counts passes
over student and teacher, forward and backward, and memory above the inputs.
"""


def page() -> str:
    entries = losses.available()
    lines = [INTRODUCTION, "| name | loss | compares | source |", "|---|---|---|---|"]
    for entry in entries:
        name = entry.loss.__name__
        cells = (f"`{entry.name}`", f"[`{name}`](#{name.lower()})", entry.summary, entry.source)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, *(section(entry) for entry in entries)]) + "\n"


def section(entry: losses.catalogue.Entry) -> str:
    """A loss's docstring without its arguments and example, its labelled paragraphs as a list at the end."""
    paragraphs = inspect.cleandoc(entry.loss.__doc__).split("\n\n")
    paragraphs = [p for p in paragraphs if not p.startswith(("Args:", ">>>"))]
    labelled = [f"* *Source*: {entry.source}"]
    for label in LABELS:
        (found,) = (p for p in paragraphs if p.startswith(f"{label}: "))
        paragraphs.remove(found)
        labelled.append(f"* *{label}*: {joined(found.removeprefix(f'{label}: '))}")
    signature = inspect.signature(entry.loss)
    signature = signature.replace(
        parameters=[p.replace(annotation=p.empty) for p in signature.parameters.values()],
        return_annotation=signature.empty,
    )
    text = "\n\n".join(joined(p) for p in paragraphs)
    return f"\n## {entry.loss.__name__}\n\n`{entry.loss.__name__}{signature}`\n\n{text}\n\n" + "\n".join(labelled)


def joined(paragraph: str) -> str:
    """A paragraph on one line, its list items on lines of their own."""
    return re.sub(r"\n(?!\* )\s*", " ", paragraph)


if __name__ == "__main__":
    partial = DOCUMENT.with_suffix(".partial")
    partial.write_text(page())
    os.replace(partial, DOCUMENT)
    print(f"written: {DOCUMENT}")
