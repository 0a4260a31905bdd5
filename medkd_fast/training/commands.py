"""The commands of `medkd-fast`. What is heavy to import is imported inside them, so that --help answers at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Optional

import typer

from medkd_fast.training.errors import WrongUse

app = typer.Typer(
    name="medkd-fast",
    help="Distil segmentation networks with fused losses, on one real CT for now.",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# click's UsageError, from click or from the copy of it that newer typers carry
_UsageError = typer.BadParameter.__mro__[1]

Out = Annotated[Path, typer.Option(help="Folder of the run.")]
Seed = Annotated[int, typer.Option(help="Decides first weights, order of slices and augmentation.")]
Epochs = Annotated[int, typer.Option(help="Epochs of 50 steps.")]
# typer before 0.16 does not read `int | None` at run time on Python 3.10
Patience = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="Stop after so many epochs without a better held-out Dice.", show_default="never"),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the killed run in --out.")]
Widths = Annotated[str, typer.Option(help="Channels of the five levels and of the last decoder level.")]

TEACHER = "16,16,32,64,128,16"
STUDENT = "4,8,16,32,32,4"


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; wrong use is one line on standard error and code 2."""
    try:
        return app(args=list(arguments), prog_name="medkd-fast", standalone_mode=False) or 0
    except WrongUse as error:
        print(f"medkd-fast: {error}", file=sys.stderr)
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "medkd-fast"
        print(f"{command}: {error.format_message().rstrip('.')}: see `{command} --help`", file=sys.stderr)
    return 2


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A few epochs: under 2 minutes on 2 cores.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the demo's runs, figures and pictures.")] = Path("runs/demo"),
    seed: Seed = 0,
) -> None:
    """Train a teacher, a thin student, and the student with CPKD and with DMD; one table of what that gave.

    The same command again takes finished runs as they are and goes on with a killed one. One subject, some blocks of its
    slices held out: a demonstration, not a study.

    Example: medkd-fast demo --quick --out runs/quick
    """
    from medkd_fast.training.demo import FULL, QUICK, run_demo

    run_demo(out, length=QUICK if quick else FULL, seed=seed)


@app.command()
def train(
    out: Out = Path("runs/train"),
    widths: Widths = TEACHER,
    epochs: Epochs = 16,
    patience: Patience = None,
    seed: Seed = 0,
    resume: Resume = False,
) -> None:
    """Train a U-Net alone on the demo's CT, as a teacher or as a baseline.

    Example: medkd-fast train --out runs/teacher --epochs 16
    """
    from medkd_fast.training.runs import RunConfig

    _fit(RunConfig(parse_widths(widths), epochs, seed=seed, patience=patience), out, resume)


@app.command()
def distill(
    teacher: Annotated[Path, typer.Option(help="Checkpoint of a trained network.")],
    loss: Annotated[list[str], typer.Option(help="cpkd, dmd, kd or dkd, with a weight if you like; may be repeated.")],
    out: Out = Path("runs/distill"),
    widths: Widths = STUDENT,
    epochs: Epochs = 16,
    patience: Patience = None,
    seed: Seed = 0,
    resume: Resume = False,
) -> None:
    """Train a thin U-Net on the demo's CT with the help of a trained teacher.

    Example: medkd-fast distill --teacher runs/teacher/checkpoints/last.ckpt --loss cpkd:0.5 --loss kd
    """
    from medkd_fast.training.distillation import parse_terms
    from medkd_fast.training.runs import RunConfig

    config = RunConfig(
        parse_widths(widths), epochs, seed=seed, patience=patience, losses=parse_terms(loss), teacher=str(teacher)
    )
    _fit(config, out, resume)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run (its last checkpoint counts) or a checkpoint.")],
) -> None:
    """Score a trained network on the held-out blocks; a run's folder gets scores.json, scores.csv and pictures.

    Example: medkd-fast evaluate runs/teacher
    """
    from medkd_fast.training.data import demo_slices, hold_out
    from medkd_fast.training.finish import evaluate_run

    slices = demo_slices()
    evaluate_run(run, slices, hold_out(len(slices)))


@app.command()
def data(
    dataset: Annotated[str, typer.Argument(help="A folder, a CSV file, or a built-in data set: demo, mni152.")],
    layout: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="nnunet, decathlon, acdc, synapse, csv or dicom.", show_default="found out"),
    ] = None,
) -> None:
    """Read a whole data set: its cases, spacings, classes and voxel counts, and everything that is wrong with it.

    The exit code is 1 where it cannot be trained on.

    Example: medkd-fast data demo
    """
    from medkd_fast.training.data.check import check, print_report
    from medkd_fast.training.data.dataset import open_dataset

    report = check(open_dataset(dataset, layout))
    print_report(report)
    raise typer.Exit(0 if report.trainable else 1)


@app.command()
def doctor() -> None:
    """Print versions, threads, instruction set, and which backend runs every operator and why.

    Example: medkd-fast doctor
    """
    from medkd_fast.training.doctor import doctor_lines

    print("\n".join(doctor_lines()))


@app.command()
def nnunet_path() -> None:
    """Print what to tell the shell so that nnU-Net finds nnUNetTrainerDistill.

    Example: medkd-fast nnunet-path
    """
    from medkd_fast.integrations.nnunet_path import export_line

    print(export_line())


def parse_widths(text: str) -> tuple[int, ...]:
    """Raises WrongUse for anything but six integers >= 1.

    >>> parse_widths("4,4,8,16,32,4")
    (4, 4, 8, 16, 32, 4)
    """
    try:
        widths = tuple(int(w) for w in text.split(","))
    except ValueError:
        widths = ()
    if len(widths) != 6 or min(widths) < 1:
        raise WrongUse(f"--widths must be six channel counts such as {STUDENT}, got {text!r}")
    return widths


def _fit(config, out: Path, resume: bool) -> None:
    from medkd_fast.training.data import demo_slices, hold_out
    from medkd_fast.training.finish import evaluate_run
    from medkd_fast.training.runs import fit

    slices = demo_slices()
    split = hold_out(len(slices))
    fit(config, out, slices, split, resume=resume)
    evaluate_run(out, slices, split)
