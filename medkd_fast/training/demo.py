"""The demo: a teacher, a thin student alone, and the same student distilled by CPKD and by DMD, on one real CT.

Every stage is a run in its own folder below the demo's. Calling the demo again with the same arguments takes finished
stages as they are and goes on where a killed one stopped; other arguments need another folder.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from medkd_fast.training.data import CLASSES, Slices, Split, demo_slices, hold_out
from medkd_fast.training.distillation import DEFAULT_WEIGHTS
from medkd_fast.training.finish import finish_run, held_out_notes, held_out_scores, overlay_rows, slice_macs
from medkd_fast.training.networks import parameter_count
from medkd_fast.training.pictures import curves_figure, overlay_figure, save_png
from medkd_fast.training.runs import RunConfig, RunFolder, build_module, fit, versions
from medkd_fast.training.sampling import train_loader
from medkd_fast.training.tables import Entry, caveats, findings, print_scores, write_metrics
from medkd_fast.training.timing import StepCost, step_costs

BASELINE = "student"
TEACHER_WIDTHS = (16, 16, 32, 64, 128, 16)
STUDENT_WIDTHS = (4, 8, 16, 32, 32, 4)


@dataclass(frozen=True)
class Length:
    """How long the demo's stages train, in epochs of `steps` steps, and how often a step is timed."""

    teacher_epochs: int
    student_epochs: int
    timing_rounds: int
    steps: int = 50


# lengths, widths, rate and weights were chosen on the seeds 5, 6, 11, 21 and 22; the demo shows seed 0 by default
FULL = Length(teacher_epochs=12, student_epochs=17, timing_rounds=3)
QUICK = Length(teacher_epochs=3, student_epochs=2, timing_rounds=1)


def stages(out: Path, length: Length, seed: int) -> dict[str, tuple[Path, RunConfig]]:
    """Name, folder and configuration of every stage; the students share their seed: first weights, order, augmentation."""
    teacher = RunFolder(out / "teacher")
    # another seed than the teacher's, or the two would start from the same random numbers
    student = {"widths": STUDENT_WIDTHS, "epochs": length.student_epochs, "seed": seed + 1, "steps": length.steps}
    found = {
        "teacher": (teacher.path, RunConfig(TEACHER_WIDTHS, length.teacher_epochs, seed=seed, steps=length.steps)),
        BASELINE: (out / "student", RunConfig(**student)),
    }
    for loss in ("cpkd", "dmd"):
        config = RunConfig(**student, losses={loss: DEFAULT_WEIGHTS[loss]}, teacher=str(teacher.last))
        found[f"{BASELINE} + {loss.upper()}"] = (out / f"student_{loss}", config)
    return found


def run_demo(out: Path, *, length: Length = FULL, seed: int = 0) -> dict[str, Entry]:
    """Train what is not trained yet, score and time all of it, write metrics and pictures into `out`, print the table.

    Raises WrongUse where `out` holds stages of another length or seed, or where the CT is missing.
    """
    start = time.perf_counter()
    slices = demo_slices()
    split = hold_out(len(slices))
    entries: dict[str, Entry] = {}
    networks: dict[str, nn.Module] = {}
    plan = stages(out, length, seed)
    for name, (folder, config) in plan.items():
        networks[name] = fit(config, folder, slices, split, resume=True)
        evaluation = held_out_scores(networks[name], slices, split)
        finish_run(folder, networks[name], evaluation, slices, split)
        entries[name] = Entry(
            evaluation=evaluation,
            parameters=parameter_count(networks[name]),
            macs=slice_macs(networks[name], slices),
            costs=_costs(config, slices, split, rounds=length.timing_rounds),
            distilled=bool(config.losses),
        )
    notes = findings(entries, BASELINE)
    notes += caveats([e.evaluation for e in entries.values()], held_out_notes(split))
    notes.append(
        f"Steps of {plan[BASELINE][1].batch_size} slices, timed on the CPU with {torch.get_num_threads()} threads."
    )
    about = {
        "seed": seed,
        "versions": versions(),
        "notes": notes,
        "train_slices": split.train,
        "held_out": split.held_out,
    }
    write_metrics(out, entries, about)
    save_png(overlay_figure(overlay_rows(networks, slices, split), CLASSES), out / "overlay.png")
    save_png(curves_figure({name: folder for name, (folder, _) in plan.items()}), out / "curves.png")
    print_scores(entries, notes)
    print(f"{time.perf_counter() - start:.0f} s; figures, pictures and runs are in {out}")
    return entries


def _costs(config: RunConfig, slices: Slices, split: Split, *, rounds: int) -> dict[str, StepCost]:
    """Time steps of a module built afresh: the trained one is left alone."""
    module = build_module(config)
    batch = next(iter(train_loader(slices, split.train, batch_size=config.batch_size, steps=1, seed=config.seed)))
    return step_costs(module, batch, rounds=rounds)
