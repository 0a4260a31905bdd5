"""The commands of `medkd-fast`. What is heavy to import is imported inside them, so that --help answers at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from medkd_fast.training import options as o
from medkd_fast.training.errors import WrongUse

app = typer.Typer(
    name="medkd-fast",
    help="Distil segmentation networks with fused losses, on your own data or a built-in CT.",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# click's UsageError, from click or from the copy of it that newer typers carry
_UsageError = typer.BadParameter.__mro__[1]


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; wrong use is one line on standard error and code 2, Ctrl-C is 130."""
    try:
        return app(args=list(arguments), prog_name="medkd-fast", standalone_mode=False) or 0
    except WrongUse as error:
        print(f"medkd-fast: {error}", file=sys.stderr)
    except (KeyboardInterrupt, typer.Abort):
        print(
            "medkd-fast: stopped; the same command goes on where it was, train and distill with --resume",
            file=sys.stderr,
        )
        return 130
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "medkd-fast"
        print(f"{command}: {error.format_message().rstrip('.')}: see `{command} --help`", file=sys.stderr)
    return 2


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A few epochs: under 2 minutes on 2 cores.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the demo's runs, figures and pictures.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Decides first weights, order of slices and augmentation.")] = 0,
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
    data: o.Data = None,
    network: o.Network = None,
    network_arg: o.NetworkArg = None,
    out: o.Out = Path("runs/train"),
    resume: o.Resume = False,
    config: o.Config = None,
    layout: o.Layout = None,
    dims: o.Dims = None,
    patch: o.Patch = None,
    spacing: o.Spacing = None,
    size: o.Size = None,
    intensity: o.Intensity = None,
    fractions: o.Fractions = None,
    epochs: o.Epochs = None,
    steps: o.Steps = None,
    batch_size: o.BatchSize = None,
    learning_rate: o.LearningRate = None,
    patience: o.Patience = None,
    seed: o.Seed = None,
    precision: o.Precision = None,
    workers: o.Workers = None,
    devices: o.Devices = None,
    num_nodes: o.NumNodes = None,
    strategy: o.Strategy = None,
    accelerator: o.Accelerator = None,
    compile: o.Compile = None,
) -> None:
    """Train a network alone, as a teacher or as a baseline.

    Example: medkd-fast train demo --network BasicUNet --network-arg features=16,16,32,64,128,16 --dims 2 --out runs/teacher
    """
    _fit(locals())


@app.command()
def distill(
    data: o.Data = None,
    teacher: o.Teacher = None,
    student: o.Student = None,
    student_arg: o.StudentArg = None,
    loss: o.Loss = None,
    cache_teacher: o.CacheTeacher = None,
    out: o.Out = Path("runs/distill"),
    resume: o.Resume = False,
    config: o.Config = None,
    layout: o.Layout = None,
    dims: o.Dims = None,
    patch: o.Patch = None,
    spacing: o.Spacing = None,
    size: o.Size = None,
    intensity: o.Intensity = None,
    fractions: o.Fractions = None,
    epochs: o.Epochs = None,
    steps: o.Steps = None,
    batch_size: o.BatchSize = None,
    learning_rate: o.LearningRate = None,
    patience: o.Patience = None,
    seed: o.Seed = None,
    precision: o.Precision = None,
    workers: o.Workers = None,
    devices: o.Devices = None,
    num_nodes: o.NumNodes = None,
    strategy: o.Strategy = None,
    accelerator: o.Accelerator = None,
    compile: o.Compile = None,
) -> None:
    """Train a network, the student, with the help of a trained teacher.

    How volumes are prepared and how patients are shared out is taken from the teacher. Losses that compare layers take
    decoder layers where none is named.

    Example: medkd-fast distill demo --teacher runs/teacher --student BasicUNet --student-arg features=4,8,16,32,32,4 --loss cpkd --loss dmd:feature_weight=0.5 --out runs/student
    """
    if not (config or teacher):
        raise WrongUse("distill needs --teacher, the run or checkpoint of a trained network")
    if not (config or loss):
        raise WrongUse("distill needs a --loss, such as --loss cpkd: `medkd-fast distill --help` names them")
    _fit(locals())


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run or a checkpoint.")],
    data: Annotated[Optional[str], typer.Argument(help="Data set. [default: the run's]", show_default=False)] = None,  # noqa: UP045
) -> None:
    """Score a trained network on the test cases of its split; a run's folder gets scores and pictures.

    Example: medkd-fast evaluate runs/teacher demo
    """
    from medkd_fast.training.finish import evaluate_run

    evaluate_run(run, data)


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


def _fit(options: dict[str, Any]) -> None:
    from pytorch_lightning.utilities import rank_zero_only

    from medkd_fast.training.config import RunConfig
    from medkd_fast.training.runs import fit

    config, out = RunConfig.from_dict(o.settings_of(options)), options["out"]
    fit(config, out, resume=options["resume"])
    if rank_zero_only.rank == 0:
        print(f"the run is in {out}; `medkd-fast evaluate {out} {config.data}` scores it on the test cases")
