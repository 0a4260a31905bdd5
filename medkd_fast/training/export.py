"""A trained network alone, as a file that runs without this package: ONNX, or a program of torch.export; and proof that it does."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from medkd_fast.layers import finest
from medkd_fast.training.data.prepare import prepare
from medkd_fast.training.errors import WrongUse
from medkd_fast.training.files import check_writable, write_atomically, write_json, writing
from medkd_fast.training.finish import dataset_of
from medkd_fast.training.inference import predict_logits
from medkd_fast.training.runs import check_data, load_run

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}
INPUT, OUTPUT = "image", "logits"
OPSET = 18
TOLERANCE = 1e-3  # of the largest logit: float32 in another order of the sums stays far below
log = logging.getLogger(__name__)


class Logits(nn.Module):
    """A network that answers with its logits alone, whatever else it has to say (deep supervision, dictionaries)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return finest(self.network(image), image.dim())


class Difference(NamedTuple):
    """What an exported file answers on a volume, against the network. logits: largest difference; scale: largest logit.

    voxels: share of voxels whose class is another one.
    """

    logits: float
    scale: float
    voxels: float


@dataclass(frozen=True)
class Exported:
    """An exported run. multiples: what the sizes of its input must be multiples of; None where they are fixed to `patch`.

    case: on whose volume it was checked. differences: with windows of the patch, of another size, and one of a third size.
    """

    file: Path
    patch: tuple[int, ...]
    multiples: tuple[int, ...] | None
    case: str
    differences: list[Difference]


def export_run(run: Path, *, format: str, out: Path | None = None, data: str | None = None) -> Exported:
    """Export a run's network and check the file on a real volume: the first test case of the run's data set, else its first case.

    out: the file; without it RUN/student.onnx or .pt2 (of a checkpoint: beside it). data: another data set for the check. Beside
    the file goes FILE.json: what the input must be prepared like, and what the classes are.

    A file that does not compute what the network does for other sizes is written again for the patch alone.

    Raises WrongUse where there is no run, format or data, where `out` cannot be written, or the file does not compute what the
    network does for the patch either; then it is removed.
    """
    check_format(format)
    trained = load_run(run)
    file = out or (run if run.is_dir() else run.parent) / f"student{SUFFIXES[format]}"
    if file.suffix != SUFFIXES[format]:
        raise WrongUse(f"a file of format {format} must end in {SUFFIXES[format]}, got {file.name}")
    dataset = dataset_of(trained, data)
    check_data(trained, dataset)
    check_writable(file.parent)
    names = [c.name for c in dataset.cases]
    case = next((name for name in names if name in trained.split.test), names[0])
    volume = prepare(dataset, trained.preprocessing, [case])[case]
    network, channels = trained.network, len(trained.channels)
    for any_size in (True, False):
        with writing(file):
            multiples = export_network(
                network, file, format=format, in_channels=channels, patch=trained.patch, any_size=any_size
            )
        differences, wrong = _check(file, network, volume.image, patch=trained.patch, multiples=multiples)
        if not wrong:
            break
        file.unlink()
        if multiples is None:
            raise WrongUse(
                f"the {format} file answers otherwise than the network on {case} ({wrong}): it was removed; try the other "
                "format"
            )
        log.debug("not for any size: %s", wrong)
    about = {
        "input": [
            INPUT,
            ["batch", len(trained.channels), *(trained.patch if multiples is None else names_of(trained.dims))],
        ],
        "output": [OUTPUT, ["batch", trained.num_classes]],
        "patch": trained.patch,
        "sizes_are_multiples_of": multiples,
        "channels": trained.channels,
        "classes": {"0": "background", **trained.classes},
        "preprocessing": trained.preprocessing.to_dict(),
        "checked_on": case,
        "differences": differences,
    }
    beside = file.with_name(f"{file.name}.json")
    with writing(beside):
        write_json(beside, about)
    return Exported(file, trained.patch, multiples, case, differences)


def names_of(dims: int) -> list[str]:
    """Of the axes of space: ["height", "width"], in 3-D with depth before."""
    return ["depth", "height", "width"][-dims:]


def export_network(
    network: nn.Module, file: Path, *, format: str, in_channels: int, patch: Sequence[int], any_size: bool = True
) -> tuple[int, ...] | None:
    """Write a network to `file`, whole or not at all. Its input is [batch, in_channels, *sizes], of any batch.

    format: "onnx" or "torch-export". patch: the window that the network was trained on. any_size: without it for the patch
    alone, as a network needs whose padding depends on the size: tracing may write down what one size asks for.
    Returns what the sizes must be multiples of: powers of two, at most 32, that divide the patch; None where the network takes
    no other size than the patch, or tracing could not see that it does.

    Raises WrongUse for an unknown format, a missing package, and a network that cannot be traced.
    """
    check_format(format)
    module = Logits(network).eval()
    program, multiples = _trace(module, in_channels, tuple(patch), any_size=any_size)
    if format == "torch-export":
        content = io.BytesIO()
        torch.export.save(program, content)  # into a file on a full disk it would end the process
        write_atomically(file, lambda p: p.write_bytes(content.getbuffer()))
    else:
        write_atomically(file, lambda p: _save_onnx(program, p))
    return multiples


def check_format(format: str) -> None:
    """Raises WrongUse for a format that there is not, or whose packages are missing."""
    if format not in SUFFIXES:
        raise WrongUse(f"unknown format {format!r}: choose from {', '.join(SUFFIXES)}")
    missing = [p for p in ("onnx", "onnxscript", "onnxruntime") if format == "onnx" and find_spec(p) is None]
    if missing:
        raise WrongUse(f"{', '.join(missing)} not installed: run `pip install {' '.join(missing)}`")


def load_exported(file: Path) -> Callable[[Tensor], Tensor]:
    """What an exported file computes, as a function of [B, C, *S]: with onnxruntime, or as torch loads it."""
    if file.suffix == SUFFIXES["onnx"]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what fails is raised
        session = onnxruntime.InferenceSession(os.fspath(file), options, providers=["CPUExecutionProvider"])
        return lambda image: torch.from_numpy(session.run([OUTPUT], {INPUT: image.numpy()})[0])
    program = torch.export.load(file).module()
    return lambda image: program(image)


def compare_exported(
    file: Path, network: nn.Module, image: Tensor, *, patch: Sequence[int], multiples: Sequence[int] | None
) -> list[Difference]:
    """Run the file and the network over a prepared volume [C, D, H, W], window by window, and say how far they differ.

    First with windows of the patch; then, where other sizes are allowed, with windows of another size and another batch, and
    with one of a third size.
    """
    exported, dims = load_exported(file), len(patch)
    windows = [(tuple(patch), 2, image)]
    if multiples:
        windows.append((tuple(p + m for p, m in zip(patch, multiples, strict=True)), 3, image))
        # every second axis is longer: what is padded along an axis may depend on whether its size is an odd multiple
        third = tuple(p + 3 * m * (i % 2 == 0) for i, (p, m) in enumerate(zip(patch, multiples, strict=True)))
        depth, height, width = (1, *third)[-3:]
        windows.append((third, 1, image[:, :depth, :height, :width]))
    found = []
    for window, batch, part in windows:
        answers = [
            predict_logits(f, part, dims=dims, patch=window, batch_size=batch, overlap=0.25)
            for f in (network, exported)
        ]
        found.append(
            Difference(
                float((answers[0] - answers[1]).abs().max()),
                float(answers[0].abs().max()),
                float((answers[0].argmax(0) != answers[1].argmax(0)).float().mean()),
            )
        )
    return found


def _check(
    file: Path, network: nn.Module, image: Tensor, *, patch: Sequence[int], multiples: Sequence[int] | None
) -> tuple[list[Difference], str]:
    """How far a file and the network differ, and what is wrong with that; nothing where they agree."""
    try:
        differences = compare_exported(file, network, image, patch=patch, multiples=multiples)
    except Exception as error:  # noqa: BLE001 onnxruntime and torch have their own for a size that a file does not take
        return [], _first_line(error)
    for found in differences:
        if not found.logits <= TOLERANCE * max(found.scale, 1):
            return differences, f"logits {found.logits:.3g} apart of {found.scale:.3g}"
    return differences, ""


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _trace(
    module: nn.Module, in_channels: int, patch: tuple[int, ...], *, any_size: bool
) -> tuple[ExportedProgram, tuple[int, ...] | None]:
    batch = Dim("batch", min=1)
    multiples = tuple(max(m for m in (1, 2, 4, 8, 16, 32) if size % m == 0) for size in patch)
    # sizes of 1 or of one multiple would be taken for constants
    example = torch.zeros(2, in_channels, *(m * (3 + i) for i, m in enumerate(multiples)))
    names = names_of(len(patch))
    sizes = {2 + i: m * Dim(name, min=1) for i, (name, m) in enumerate(zip(names, multiples, strict=True))}
    with _quiet():
        try:
            if any_size:
                return torch.export.export(module, (example,), dynamic_shapes=({0: batch, **sizes},)), multiples
        except Exception:
            log.debug("no program for any size", exc_info=True)  # the network may take its patch and nothing else
        try:
            return torch.export.export(
                module, (torch.zeros(2, in_channels, *patch),), dynamic_shapes=({0: batch},)
            ), None
        except Exception as error:
            raise WrongUse(f"the network cannot be traced by torch.export: {_first_line(error)}") from error


def _save_onnx(program: ExportedProgram, file: Path) -> None:
    with _quiet():
        onnx = torch.onnx.export(
            program, input_names=[INPUT], output_names=[OUTPUT], dynamo=True, verbose=False, opset_version=OPSET
        )
    onnx.save(file, external_data=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracer's remarks on torchvision and on itself."""
    of_torch = logging.getLogger("torch")
    level = of_torch.level
    of_torch.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        of_torch.setLevel(level)
