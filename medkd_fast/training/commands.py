"""The commands of `medkd-fast`. What is heavy to import is imported inside them, so that --help answers at once."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from medkd_fast.training import options as o
from medkd_fast.training.errors import WrongUse
from medkd_fast.training.files import quoted, read_json

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

_Text = Optional[str]  # noqa: UP045
Run = Annotated[Path, typer.Argument(help="Folder of a run (its last checkpoint counts) or a checkpoint.")]


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; wrong use is one line on standard error and code 2, Ctrl-C is 130."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = app(args=list(arguments), prog_name="medkd-fast", standalone_mode=False) or 0
        if code == 130:  # what newer typers make of Ctrl-C
            raise KeyboardInterrupt
        return code
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


def _show_warning(message: Any, category: type[Warning], filename: str, line: int, *rest: Any) -> None:
    """Our own warnings, which are about the data, in one line; others as Python shows them."""
    if category.__module__.startswith("medkd_fast"):
        print(f"medkd-fast: {message}", file=sys.stderr)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, line))


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
    run: Run,
    data: Annotated[_Text, typer.Argument(help="Data set. [default: the run's]", show_default=False)] = None,
    split: Annotated[str, typer.Option(help="Which cases: test, validation, train or all.")] = "test",
    protocol: Annotated[
        str, typer.Option(help="mm, or transunet: that script's numbers, in voxels and with its rule for empty masks.")
    ] = "mm",
    layout: o.Layout = None,
    out: Annotated[Optional[Path], typer.Option(help="Folder of the scores.", show_default="the run's")] = None,  # noqa: UP045
) -> None:
    """Score a trained network, volume by volume, on the grid of their files: Dice, HD95 and ASSD of every class.

    Writes scores.json, scores.csv, scores-cases.csv and pictures.

    Example: medkd-fast evaluate runs/student demo --split test
    """
    from medkd_fast.training.finish import evaluate_run

    evaluate_run(run, data, layout=layout, side=split, protocol=protocol, out=out)


@app.command()
def predict(
    run: Run,
    source: Annotated[Path, typer.Argument(metavar="IN", help="Image, folder of images, or DICOM series.")],
    out: Annotated[Path, typer.Argument(help="Folder, or for one image a .nii.gz file.")],
) -> None:
    """Segment images without labels: NIfTI in the geometry of the input, values are classes.

    What is there already stays. A file that fails is reported, the others go on, and the exit code is 1. Several channels:
    CASE_0000.nii.gz, CASE_0001.nii.gz, ...

    Example: medkd-fast predict runs/student images/ predictions/
    """
    from medkd_fast.training.predict import predict_run

    outcomes = predict_run(run, source, out)
    failed = [outcome for outcome in outcomes if outcome.error]
    skipped = sum(outcome.skipped for outcome in outcomes)
    print(f"{len(outcomes) - len(failed) - skipped} predicted, {skipped} there already, {len(failed)} failed; in {out}")
    if failed:
        raise typer.Exit(1)


@app.command()
def compare(
    data: o.Data = None,
    teacher: o.Teacher = None,
    student: o.Student = None,
    student_arg: o.StudentArg = None,
    methods: Annotated[
        str, typer.Option(help="Losses, as --loss of distill takes them, with commas between.")
    ] = "kd,cwd,dist,dkd,skd,cirkd,cpkd,dmd",
    seeds: Annotated[int, typer.Option(help="Runs of every method, with --seed, --seed + 1, ...")] = 3,
    out: Annotated[Path, typer.Option(help="Folder of the comparison.")] = Path("runs/compare"),
    retime: Annotated[bool, typer.Option("--retime", help="Measure what a step costs again.")] = False,
    config: o.Config = None,
    layout: o.Layout = None,
    dims: o.Dims = None,
    patch: o.Patch = None,
    spacing: o.Spacing = None,
    size: o.Size = None,
    intensity: o.Intensity = None,
    epochs: o.Epochs = None,
    steps: o.Steps = None,
    batch_size: o.BatchSize = None,
    learning_rate: o.LearningRate = None,
    seed: o.Seed = None,
    precision: o.Precision = None,
    accelerator: o.Accelerator = None,
) -> None:
    """Train the student alone and with every method, on the same cases and seeds; one table of scores, spread and cost.

    The same command again runs what is missing, and what failed. Exit code 1 where a run failed.

    Example: medkd-fast compare demo --teacher runs/teacher --student BasicUNet --student-arg features=4,8,16,32,32,4 --methods kd,cpkd,dmd --seeds 3 --out runs/compare
    """
    given = {k: v for k, v in locals().items() if k not in ("methods", "seeds", "retime")}
    from medkd_fast.training.compare import compare as run_comparison
    from medkd_fast.training.compare import failures, parse_methods
    from medkd_fast.training.config import RunConfig

    settings = o.settings_of(given)
    teacher = settings.pop("teacher", None)
    if not teacher:
        raise WrongUse("compare needs --teacher, the run or checkpoint of a trained network")
    record = run_comparison(
        RunConfig.from_dict(settings), Path(teacher), parse_methods(methods), out, seeds=seeds, retime=retime
    )
    report = f"medkd-fast report {quoted(out)} --out report.html"
    print(f"figures, pictures and runs are in {out}; `{report}` makes a page of them")
    if failures(record):
        raise typer.Exit(1)


@app.command()
def export(
    run: Run,
    format: Annotated[str, typer.Option(help="onnx or torch-export.")] = "onnx",
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="File, .onnx or .pt2.", show_default="RUN/student.onnx or .pt2"),
    ] = None,
    data: Annotated[_Text, typer.Option(help="Data set of the check.", show_default="the run's")] = None,
) -> None:
    """Write the trained network alone to a file, and check on a real volume that the file computes the same.

    ONNX files are checked with onnxruntime. Any batch; any size that is a multiple of what the command prints; where the
    network's padding depends on the size, the patch alone.

    Example: medkd-fast export runs/student --format onnx
    """
    from medkd_fast.training.export import export_run

    done = export_run(run, format=format, out=out, data=data)
    size = " x ".join(map(str, done.patch if done.multiples is None else done.multiples))
    print(f"{done.file}: any batch; sizes " + ("of " if done.multiples is None else "that are multiples of ") + size)
    kinds = ("windows of the patch", "other windows", "a window of a third size")
    for windows, found in zip(kinds, done.differences, strict=False):
        print(
            f"on {done.case}, {windows}: logits at most {found.logits:.2g} apart (the largest is {found.scale:.3g}), "
            f"another class in {found.voxels:.2%} of the voxels"
        )


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of evaluated runs and of comparisons.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
) -> None:
    """Write one HTML page about runs and comparisons: tables, curves, overlays. It needs no network.

    Example: medkd-fast report runs/teacher runs/student --out report.html
    """
    from medkd_fast.training.report import write_report

    write_report(runs, out)
    print(f"{out}: open it in a browser")


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
        score = f"medkd-fast evaluate {quoted(out)} {quoted(config.data)}"
        tested = read_json(out / "split.json")["test"]
        print(
            f"the run is in {out}; " + (f"`{score}` scores it on the test cases" if tested else "it has no test cases")
        )
