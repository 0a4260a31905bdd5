"""Options of `train` and `distill`, and how they, a YAML file and the defaults become a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from medkd_fast.training.errors import WrongUse

# typer before 0.16 does not read `int | None` at run time on Python 3.10
# ruff: noqa: UP045

# an option that is not given leaves its setting to --config, then to the teacher or the data set, then to the default
_Text, _Int, _Float, _Flag = Optional[str], Optional[int], Optional[float], Optional[bool]


def _option(text: str, default: str | bool = False, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, show_default=default, **more)


Data = Annotated[
    _Text, typer.Argument(help="Folder, CSV file, or demo or mni152. [default: data in --config]", show_default=False)
]
Out = Annotated[Path, typer.Option(help="Folder of the run.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the killed run in --out.")]
Config = Annotated[Optional[Path], _option("YAML file of settings, such as a run's config.yaml; options win over it.")]
Layout = Annotated[_Text, _option("Format of the data set.", "recognised")]
Network = Annotated[_Text, _option("Class of monai.networks.nets, or module:callable of your own.", "BasicUNet")]
NetworkArg = Annotated[Optional[list[str]], _option("key=value for the network; may be repeated.")]
Dims = Annotated[_Int, _option("2 learns from axial slices, 3 from patches.", "the data set's, or 2")]
Patch = Annotated[_Text, _option("Size of slices or patches, such as 96,96,96.", "from the volumes")]
Spacing = Annotated[_Text, _option("Spacing z,y,x of the voxels in mm.", "the median")]
Size = Annotated[_Text, _option("Rows,columns to which every slice is resampled, in place of a spacing.")]
Intensity = Annotated[
    _Text, _option("window, percentile, zscore or none, one a channel.", "window for CT, else zscore")
]
Fractions = Annotated[
    _Text, _option("Shares of the patients for train,validation,test.", "the teacher's, else 0.7,0.1,0.2")
]
Epochs = Annotated[_Int, _option("Epochs of --steps steps.", "100")]
Steps = Annotated[_Int, _option("Optimiser steps an epoch.", "50")]
BatchSize = Annotated[_Int, _option("Slices or patches a step and process.", "4")]
LearningRate = Annotated[_Float, _option("Highest learning rate (AdamW).", "0.003")]
Patience = Annotated[_Int, _option("Stop after so many epochs without a better validation Dice.", "never")]
Seed = Annotated[_Int, _option("Decides first weights, order of the draws and augmentation.", "0")]
Precision = Annotated[_Text, _option("32, bf16 or fp16 (mixed).", "32")]
Workers = Annotated[_Int, _option("Processes that draw the batches.", "0")]
Devices = Annotated[_Int, _option("Processes on this machine, one a GPU; -1: all.", "1")]
NumNodes = Annotated[_Int, _option("Machines.", "1")]
Strategy = Annotated[_Text, _option("Lightning's, such as ddp.", "auto")]
Accelerator = Annotated[_Text, _option("Lightning's: gpu, cpu, ...", "auto")]
Compile = Annotated[_Flag, _option("Run the network through torch.compile.", False, "--compile/--no-compile")]
Teacher = Annotated[_Text, _option("Run or checkpoint of a trained network.")]
Student = Annotated[_Text, _option("Class of monai.networks.nets, or module:callable of your own.", "BasicUNet")]
StudentArg = Annotated[Optional[list[str]], _option("key=value for the student; may be repeated.")]
Loss = Annotated[
    Optional[list[str]],
    _option(
        "name[:weight][:key=value,...]; may be repeated. Names: cpkd, dmd, kd, cwd, emkd, dsd, dkd, dist, sdd, boundary_kd, "
        "fitnet, at, skd, sp, ifvd, ickd, cirkd, pkd. Keys: weight, student and teacher (layers), warm_up (steps), and the "
        "loss's own."
    ),
]
CacheTeacher = Annotated[
    _Flag,
    _option(
        "Take the teacher's logits of the volumes from disk: turned, zoomed, shifted and cropped with the image; changes of "
        "intensity are the student's alone. For losses on logits.",
        False,
        "--cache-teacher/--no-cache-teacher",
    ),
]

_PREPROCESSING = ("dims", "spacing", "size", "intensity")
_LISTS = ("patch", "spacing", "size", "intensity", "fractions")


def settings_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were given: of --config, and of the options, which win.

    Raises WrongUse for a value that is not understood.
    """
    from medkd_fast.training.config import merged, read_yaml
    from medkd_fast.training.networks import parse_arguments, parse_value

    given = {k: v for k, v in options.items() if v is not None and k not in ("out", "resume", "config")}
    for old, new in (("student", "network"), ("student_arg", "network_arg"), ("loss", "losses")):
        if old in given:
            given[new] = given.pop(old)
    for name in _LISTS:
        if name in given:
            words = given[name].split(",")
            given[name] = [word.strip() if name == "intensity" else parse_value(word) for word in words]
    inner = {name: given.pop(name) for name in _PREPROCESSING if name in given}
    if inner:
        given["preprocessing"] = inner
    if "network_arg" in given:
        given["network_args"] = parse_arguments(given.pop("network_arg"))
    file = read_yaml(options["config"]) if options.get("config") else {}
    if "network" in given and given["network"] != file.get("network"):
        file.pop("network_args", None)  # of another network
    for name in ("preprocessing", "network_args"):
        if file.get(name) is not None and not isinstance(file[name], dict):
            raise WrongUse(f"{options['config']}: {name} must hold settings, got {file[name]!r}")
    return merged(file, given)
