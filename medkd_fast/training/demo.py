"""The demo: a teacher, a thin student alone, and the same student distilled by CPKD and by DMD, on one real CT.

Every stage is a run in its own folder below the demo's. Calling the demo again with the same arguments takes finished
stages as they are and goes on where a killed one stopped; other arguments need another folder.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from medkd_fast.training.config import RunConfig
from medkd_fast.training.data.dataset import open_dataset
from medkd_fast.training.data.prepare import prepare
from medkd_fast.training.distillation import LossTerm
from medkd_fast.training.evaluate import evaluate
from medkd_fast.training.finish import entry_of, finish_run, notes_of, overlay_rows
from medkd_fast.training.pictures import curves_figure, overlay_figure, save_png
from medkd_fast.training.runs import build_module, fit, load_run, plan_run, versions
from medkd_fast.training.tables import Entry, caveats, findings, print_scores, write_metrics
from medkd_fast.training.timing import StepCost, machine, step_costs

DATA = "demo"
BASELINE = "student"
TEACHER_WIDTHS = [16, 16, 32, 64, 128, 16]
STUDENT_WIDTHS = [4, 8, 16, 32, 32, 4]
LEARNING_RATE = 1e-2


@dataclass(frozen=True)
class Length:
    """How long the demo's stages train, in epochs of `steps` steps, and how often a step is timed."""

    teacher_epochs: int
    student_epochs: int
    timing_rounds: int
    steps: int = 50


# widths, rate and weights were chosen on the seeds 5, 6, 11, 21 and 22; the demo shows seed 0 by default
FULL = Length(teacher_epochs=12, student_epochs=15, timing_rounds=3)
QUICK = Length(teacher_epochs=3, student_epochs=2, timing_rounds=1)


def stages(out: Path, length: Length, seed: int) -> dict[str, tuple[Path, RunConfig]]:
    """Name, folder and configuration of every stage; the students share their seed: first weights, order, augmentation."""
    teacher = RunConfig(
        DATA,
        network_args={"features": TEACHER_WIDTHS},
        epochs=length.teacher_epochs,
        steps=length.steps,
        learning_rate=LEARNING_RATE,
        seed=seed,
        accelerator="cpu",
    )
    # another seed than the teacher's, or the two would start from the same random numbers
    student = replace(teacher, network_args={"features": STUDENT_WIDTHS}, epochs=length.student_epochs, seed=seed + 1)
    found = {"teacher": (out / "teacher", teacher), BASELINE: (out / "student", student)}
    for loss in ("cpkd", "dmd"):
        distilled = replace(student, losses=(LossTerm(loss),), teacher=str(out / "teacher"))
        found[f"{BASELINE} + {loss.upper()}"] = (out / f"student_{loss}", distilled)
    return found


def run_demo(out: Path, *, length: Length = FULL, seed: int = 0) -> dict[str, Entry]:
    """Train what is not trained yet, score and time all of it, write metrics and pictures into `out`, print the table.

    Raises WrongUse where `out` holds stages of another length or seed, or where the CT is missing.
    """
    start = time.perf_counter()
    dataset = open_dataset(DATA)
    entries: dict[str, Entry] = {}
    seen: dict[str, dict[str, Tensor]] = {}
    plan = stages(out, length, seed)
    for name, (folder, config) in plan.items():
        trained = load_run(fit(config, folder, resume=True))
        volumes = prepare(dataset, trained.preprocessing, trained.split.test)
        seen[name] = {}
        evaluation = evaluate(trained.network, dataset, volumes, patch=trained.patch, seen=seen[name])
        finish_run(folder, trained, evaluation, {name: seen[name]}, volumes, dataset)
        costs = _costs(config, rounds=length.timing_rounds)
        entries[name] = replace(entry_of(trained, evaluation), costs=costs, distilled=bool(config.losses))
    notes = findings(entries, BASELINE) + caveats([e.evaluation for e in entries.values()], notes_of(dataset))
    notes.append(f"Steps of {plan[BASELINE][1].batch_size} slices, timed on {machine()['device']}.")
    about = {"seed": seed, "versions": versions(), "notes": notes, "split": asdict(trained.split)}
    write_metrics(out, entries, about)
    save_png(overlay_figure(overlay_rows(seen, volumes), dataset.classes), out / "overlay.png")
    save_png(curves_figure({name: folder for name, (folder, _) in plan.items()}), out / "curves.png")
    print_scores(entries, notes)
    print(f"{time.perf_counter() - start:.0f} s; figures, pictures and runs are in {out}")
    return entries


def _costs(config: RunConfig, *, rounds: int) -> dict[str, StepCost]:
    """Time steps of a module built afresh: the trained one is left alone."""
    run = plan_run(config)
    return step_costs(build_module(run), next(iter(run.loader())), rounds=rounds)
