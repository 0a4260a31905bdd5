"""A run: its folder, training that a kill does not lose, and what can be loaded from it.

A run's folder holds config.yaml (with every choice made), split.json, versions.json, checkpoints/best.ckpt (highest
validation Dice), last.ckpt and previous.ckpt, logs/version_*/metrics.csv (one file an attempt) and tensorboard/. Whoever
evaluates it adds scores and pictures.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import shutil
import signal
import statistics
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import monai
import numpy as np
import pytorch_lightning as pl
import SimpleITK as sitk
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping, ProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch import nn
from torch.utils.data import DataLoader

import medkd_fast
from medkd_fast.training.checkpoints import (
    BEST,
    LAST,
    PREVIOUS,
    KeptCheckpoints,
    MovableCheckpoint,
    newest_good,
    read_checkpoint,
)
from medkd_fast.training.config import PRECISIONS, RunConfig, read_yaml, write_yaml
from medkd_fast.training.content import content_of
from medkd_fast.training.data.dataset import Dataset, open_dataset
from medkd_fast.training.data.layouts import BUILT_IN
from medkd_fast.training.data.prepare import Preprocessing, Volume, plan, prepare
from medkd_fast.training.data.sampling import train_loader
from medkd_fast.training.data.split import FRACTIONS, Split, split_by_patient
from medkd_fast.training.distillation import describe, make_distiller, resolve
from medkd_fast.training.errors import WrongUse
from medkd_fast.training.files import CANNOT_WRITE, quoted, read_json, sha256, write_json
from medkd_fast.training.lock import locked
from medkd_fast.training.module import CHECKPOINT_KEY, GRADIENT_CLIP, RecordedTeacher, SegmentationModule
from medkd_fast.training.networks import Survey, build_network, check_network, find_network
from medkd_fast.training.progress import progress_callback
from medkd_fast.training.teacher_cache import record_teacher

LARGEST_PATCH = {2: 256, 3: 96}  # along an axis, where nobody asked for another
NO_SHARED_MEMORY = ("shared memory(shm)", "out of shared memory", "signal: Bus error")  # in torch's words for workers
PATCH_MULTIPLE = 16  # what U-Nets of five levels take
# what may differ when a run goes on: data and teacher count by their contents, the others do not change what is computed
_MAY_DIFFER = {"data", "teacher", "workers", "strategy", "accelerator", "compile"}


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run's folder."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def last(self) -> Path:
        return self.checkpoints / LAST

    @property
    def best(self) -> Path:
        return self.checkpoints / BEST

    @property
    def finished(self) -> Path:
        return self.path / "finished.json"

    @property
    def begun(self) -> bool:
        """Whether there is something to lose: a checkpoint, or the note that the run is finished."""
        return self.finished.exists() or any((self.checkpoints / name).exists() for name in (LAST, PREVIOUS, BEST))


@dataclass(frozen=True)
class Trained:
    """A trained network and what it needs to be used: in eval mode, on the CPU.

    config: with every choice made. classes: {1..K: name}. content: digests of the split's cases, by `content_of`; None in
    older runs. name: of the run's folder, or of the checkpoint. named: whether a checkpoint was asked for, not a folder.
    epochs: trained.
    """

    network: nn.Module
    config: RunConfig
    classes: dict[int, str]
    channels: tuple[str, ...]
    split: Split
    content: dict[str, str] | None
    ignore_label: int | None
    name: str
    checkpoint: Path
    named: bool
    epochs: int

    @property
    def num_classes(self) -> int:
        """With the background."""
        return len(self.classes) + 1

    @property
    def preprocessing(self) -> Preprocessing:
        assert isinstance(self.config.preprocessing, Preprocessing)
        return self.config.preprocessing

    @property
    def dims(self) -> int:
        return self.preprocessing.dims

    @property
    def patch(self) -> tuple[int, ...]:
        assert self.config.patch is not None
        return self.config.patch


@dataclass(frozen=True)
class Plan:
    """A run with every choice made, before any training: `config` says them; volumes are those of train and validation.

    content: digests of the split's cases, by `content_of`.
    """

    config: RunConfig
    dataset: Dataset
    split: Split
    content: dict[str, str]
    volumes: Mapping[str, Volume]
    network: nn.Module
    teacher: Trained | None
    surveys: tuple[Survey, ...]

    @property
    def dims(self) -> int:
        assert isinstance(self.config.preprocessing, Preprocessing)
        return self.config.preprocessing.dims

    @property
    def num_classes(self) -> int:
        return len(self.dataset.classes) + 1

    def loader(
        self, *, rank: int = 0, world_size: int = 1, teacher_logits: Mapping[str, Any] | None = None
    ) -> DataLoader:
        """The batches of an epoch of one process."""
        assert self.config.patch is not None
        return train_loader(
            self.volumes,
            self.split.train,
            dims=self.dims,
            patch=self.config.patch,
            batch_size=self.config.batch_size,
            steps=self.config.steps,
            seed=self.config.seed,
            num_classes=self.num_classes,
            ignore_label=self.dataset.ignore_label,
            rank=rank,
            world_size=world_size,
            workers=self.config.workers,
            maps=teacher_logits,
        )


def fit(config: RunConfig, out: Path, *, resume: bool = False) -> Path:
    """Train as `config` says into the folder `out` and return it.

    resume: go on from the folder's last good checkpoint (from the start where there is none yet). A folder whose run was
    stopped before its first checkpoint is taken over, whatever its configuration. On a CPU with the same
    number of threads the result has the same bits as a run that was never interrupted.

    Raises WrongUse where the folder holds a run already (without `resume`) or a run of another configuration, where another
    process trains in it or it cannot be written, and for what the data, the networks and the losses do not allow. Raises
    KeyboardInterrupt after Ctrl-C, SystemExit with code 143 after SIGTERM.
    """
    first = rank_zero_only.rank == 0  # the other processes leave the folder to the first
    with locked(out) if first else nullcontext():
        return _fit(config, RunFolder(out), resume=resume, first=first)


def _fit(config: RunConfig, folder: RunFolder, *, resume: bool, first: bool) -> Path:
    out = folder.path
    if first:
        check_folder(folder, resume=resume)
        for half in folder.checkpoints.glob(".*.ckpt"):  # of a process that was killed while it wrote
            half.unlink()
    run = plan_run(config)
    if first:
        write_folder(run, folder)
        for term in run.config.losses:
            print(f"{out.name}: {describe(term)}", file=sys.stderr, flush=True)
    if folder.finished.exists() and resume:
        return out
    found = newest_good(folder.checkpoints) if resume else None
    if found:
        check_content(run, found[1][CHECKPOINT_KEY].get("content"))
    module = build_module(run)
    module.compile_network(run.config.compile)
    data = Batches(run)
    with _quiet(), _ctrl_c():
        checkpoints = KeptCheckpoints(last_is_damaged=found is not None and found[0] != folder.last)
        try:
            trainer = _trainer(run, folder, checkpoints)
        except (MisconfigurationException, ImportError, ValueError) as error:
            raise WrongUse(f"this machine cannot train like that: {' '.join(str(error).split())}") from error
        _check_processes(trainer, first=first)
        try:
            with _all_end(trainer):
                trainer.fit(module, datamodule=data, ckpt_path=str(found[0]) if found else None)
        except OSError as error:
            if error.errno not in CANNOT_WRITE:
                raise
            raise WrongUse(
                f"{folder.path} cannot be written ({error.strerror}); the last checkpoint is whole: make room, or the folder "
                "writable, and go on with --resume"
            ) from error
        except RuntimeError as error:
            if not any(words in str(error) for words in NO_SHARED_MEMORY):
                raise
            raise WrongUse(
                f"the {config.workers} workers have no room for their batches in the shared memory (/dev/shm): enlarge it, as with "
                "docker run --shm-size 8g, or give fewer --workers, 0 needs none; then go on with --resume"
            ) from error
    if trainer.is_global_zero:
        write_json(folder.finished, {"epochs": trainer.current_epoch, "steps": trainer.global_step})
    return out


def plan_run(config: RunConfig) -> Plan:
    """Make every choice that a configuration leaves open: from the teacher, then from the data. Prepares the volumes."""
    teacher = load_run(Path(config.teacher)) if config.teacher else None
    layout = config.layout
    dataset = open_dataset(config.data, layout)
    preprocessing = plan(dataset, _asked(config.preprocessing, dataset, teacher))
    # what can be wrong without the volumes, whose preparation may take hours, is told first
    if teacher:
        check_teacher(teacher, dataset, preprocessing)
    if config.patch is not None and len(config.patch) != preprocessing.dims:
        raise WrongUse(f"patch must be {preprocessing.dims} sizes for dims {preprocessing.dims}, got {config.patch}")
    find_network(config.network)
    fractions, split_seed = _shares(config, teacher)
    split = _split(dataset, teacher, fractions, split_seed)
    if config.patience and not split.validation:
        raise WrongUse("patience needs validation cases, and this split has none: give --fractions such as 0.7,0.1,0.2")
    volumes = prepare(dataset, preprocessing, [*split.train, *split.validation])
    num_classes = len(dataset.classes) + 1
    if not any(_has_class(volumes[name], num_classes) for name in split.train):
        raise WrongUse(
            f"no label of the training cases, {_some(split.train)}, has a class, and there is nothing to learn: "
            f"`medkd-fast data {quoted(config.data)}` counts what is in them"
        )
    if config.patience and not any(_has_class(volumes[name], num_classes) for name in split.validation):
        raise WrongUse(
            "patience needs a validation case whose label has a class, and no label of these has one: "
            f"{', '.join(split.validation[:8])}; leave it out, or give another split"
        )
    patch = (
        config.patch
        or (teacher.patch if teacher else None)
        or default_patch(list(volumes.values()), preprocessing.dims)
    )
    shape = (min(config.batch_size, 2), len(dataset.channels), *patch)
    network = build_network(
        config.network,
        config.network_args,
        dims=preprocessing.dims,
        in_channels=shape[1],
        num_classes=num_classes,
        patch=patch,
        seed=config.seed,
    )
    surveys = [check_network(network, config.network, shape, num_classes)]
    changes: dict[str, Any] = {
        "data": _lasting(config),
        "preprocessing": preprocessing,
        "patch": patch,
        "fractions": fractions,
        "split_seed": split_seed,
    }
    if teacher:
        surveys.append(check_network(teacher.network, teacher.config.network, shape, num_classes, training=False))
        changes |= {"losses": resolve(config.losses, *surveys), "teacher_sha256": sha256(teacher.checkpoint)}
    config = config.resolved(**changes)
    if config.cache_teacher:
        _check_cacheable(config)
    content = content_of(dataset, [*split.train, *split.validation, *split.test])
    return Plan(config, dataset, split, content, volumes, network, teacher, tuple(surveys))


def build_module(run: Plan) -> SegmentationModule:
    """The untrained module of a plan, with its teacher and distillation losses where it has them."""
    config, model = run.config, run.network
    if run.teacher:
        model = make_distiller(
            config.losses,
            student=run.network,
            teacher=RecordedTeacher() if config.cache_teacher else run.teacher.network,
            surveys=(run.surveys[0], run.surveys[1]),
            ignore_index=run.dataset.ignore_label,
            seed=config.seed,
        )
    assert config.patch is not None
    return SegmentationModule(
        model,
        total_steps=config.epochs * config.steps,
        learning_rate=config.learning_rate,
        num_classes=run.num_classes,
        dims=run.dims,
        patch=config.patch,
        ignore_label=run.dataset.ignore_label,
        volumes=[run.volumes[name] for name in run.split.validation],
        seed=config.seed,
        description={
            "config": config.to_dict(),
            "classes": dict(run.dataset.classes),
            "channels": list(run.dataset.channels),
            "split": {k: list(v) for k, v in asdict(run.split).items()},
            "content": run.content,
            "ignore_label": run.dataset.ignore_label,
        },
    )


def load_run(path: Path) -> Trained:
    """The network of a run's folder (its last good checkpoint) or of a checkpoint.

    Raises WrongUse where there is none.
    """
    path = Path(path)
    if path.is_dir():
        found = newest_good(RunFolder(path).checkpoints)
        if found is None:
            raise WrongUse(f"no checkpoint in {path}: give the folder of a run, such as runs/teacher, or a checkpoint")
        checkpoint, content = found
    elif path.is_file():
        try:
            checkpoint, content = path, read_checkpoint(path)
        except Exception as error:
            raise WrongUse(f"{path} is no checkpoint, or a damaged one ({type(error).__name__})") from error
    else:
        raise WrongUse(f"no run at {path}: give the folder of a run, such as runs/teacher, or a checkpoint")
    try:
        about = content[CHECKPOINT_KEY]
        config = RunConfig.from_dict(about["config"])
        preprocessing = Preprocessing.from_dict(config.preprocessing)
        weights = _network_weights(content["state_dict"])
    except (KeyError, TypeError) as error:
        raise WrongUse(f"{checkpoint} is no checkpoint of medkd-fast train or distill (it lacks {error})") from error
    classes = {int(c): name for c, name in about["classes"].items()}
    network = build_network(
        config.network,
        config.network_args,
        dims=preprocessing.dims,
        in_channels=len(about["channels"]),
        num_classes=len(classes) + 1,
        patch=config.patch,
        seed=0,
    )
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise WrongUse(
            f"{checkpoint} does not fit {config.network}, whose code has changed: {str(error).splitlines()[0]}"
        ) from error
    return Trained(
        network=network.eval(),
        config=config.resolved(preprocessing=preprocessing),
        classes=classes,
        channels=tuple(about["channels"]),
        split=Split(**{k: tuple(v) for k, v in about["split"].items()}),
        content=about.get("content"),
        ignore_label=about["ignore_label"],
        name=path.name if path.is_dir() else path.stem,
        checkpoint=checkpoint,
        named=path.is_file(),
        epochs=content["epoch"] + 1,
    )


def check_folder(folder: RunFolder, *, resume: bool) -> None:
    """Raises WrongUse where a folder holds a run (without `resume`) or something else."""
    if folder.config.exists():
        if not resume and folder.begun:
            raise WrongUse(f"{folder.path} holds a run already: add --resume to go on with it, or choose another --out")
        # taken over is what a start of ours left, not whatever has a config.yaml
        ours = folder.begun or set(read_yaml(folder.config)) <= {f.name for f in fields(RunConfig)}
    else:
        ours = all(p.name.startswith(".") for p in folder.path.iterdir())
    if not ours:
        raise WrongUse(f"{folder.path} is not empty and holds no run: choose another --out")


def write_folder(run: Plan, folder: RunFolder) -> None:
    """config.yaml, split.json and versions.json; where there are checkpoints, a check that the run is the one asked for."""
    asked = run.config.to_dict()
    if folder.begun:
        there = RunConfig.from_dict(read_yaml(folder.config)).to_dict()
        changed = [
            f"{k} is {there[k]}, asked for {v}" for k, v in asked.items() if k not in _MAY_DIFFER and there[k] != v
        ]
        if changed:
            raise WrongUse(
                f"{folder.path} holds a run of another configuration ({'; '.join(changed)}): "
                "choose another --out or delete the folder"
            )
        split = read_json(folder.path / "split.json")
        if split != {k: list(v) for k, v in asdict(run.split).items()}:
            raise WrongUse(f"{run.config.data} has other cases than the run in {folder.path}: choose another --out")
    else:
        for logs in ("logs", "tensorboard"):  # of a start that came to nothing
            shutil.rmtree(folder.path / logs, ignore_errors=True)
    try:
        write_yaml(folder.config, run.config)  # first: it says whose the other files are
        write_json(folder.path / "split.json", asdict(run.split))
        write_json(folder.path / "versions.json", versions())
    except OSError as error:
        raise WrongUse(
            f"{folder.path} cannot be written ({error.strerror}): make room or choose another --out"
        ) from error


def check_content(run: Plan, known: Mapping[str, str] | None) -> None:
    """Raises WrongUse where the files of a case are no longer those that are known; None, of older runs, knows nothing."""
    known = known or run.content
    changed = [name for name, content in run.content.items() if known.get(name) != content]
    if changed:
        raise WrongUse(
            f"{run.config.data} has changed since the run began ({', '.join(changed[:8])}{', ...' if changed[8:] else ''}): "
            "bring its files back, or choose another --out"
        )


def check_data(trained: Trained, dataset: Dataset) -> None:
    """Raises WrongUse where a data set has other classes or another number of channels than a network was trained for."""
    for what, known, found in (
        ("classes", list(trained.classes.values()), list(dataset.classes.values())),
        ("channels", list(trained.channels), list(dataset.channels)),
    ):
        if known != found and (what == "classes" or len(known) != len(found)):
            raise WrongUse(
                f"{trained.name} was trained for the {what} {', '.join(known)}, {dataset.name} has {', '.join(found)}: "
                "they must agree"
            )


def check_teacher(teacher: Trained, dataset: Dataset, preprocessing: Preprocessing) -> None:
    """Raises WrongUse for a teacher that cannot teach on this data."""
    check_data(teacher, dataset)
    if teacher.dims != preprocessing.dims:
        raise WrongUse(
            f"the teacher {teacher.checkpoint} has dims {teacher.dims}, the student's data {preprocessing.dims}: "
            "they must agree"
        )


def default_patch(volumes: Sequence[Volume], dims: int) -> tuple[int, ...]:
    """The median size of the volumes, up to a multiple of 16, and at most 256² (2-D) or 96³."""
    sizes = zip(*(v.image.shape[-dims:] for v in volumes), strict=True)
    median = [statistics.median_high(size) for size in sizes]
    return tuple(min(LARGEST_PATCH[dims], math.ceil(n / PATCH_MULTIPLE) * PATCH_MULTIPLE) for n in median)


def versions() -> dict[str, str]:
    """Versions of what decides the numbers, and the number of threads."""
    return {
        "medkd_fast": getattr(medkd_fast, "__version__", "unknown"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "monai": monai.__version__,
        "pytorch_lightning": pl.__version__,
        "SimpleITK": sitk.Version.VersionString(),
        "numpy": np.__version__,
        "threads": str(torch.get_num_threads()),
    }


class Batches(pl.LightningDataModule):
    """A plan's loaders, made when it is known which process this is."""

    def __init__(self, run: Plan) -> None:
        super().__init__()
        self.run = run

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        logits = None
        if self.run.config.cache_teacher:
            assert self.run.teacher is not None
            logits = record_teacher(
                self.run.teacher,
                {name: self.run.volumes[name] for name in self.run.split.train},
                patch=self.run.config.patch,
                device=self.trainer.strategy.root_device,
            )
        return self.run.loader(rank=self.trainer.global_rank, world_size=self.trainer.world_size, teacher_logits=logits)

    def val_dataloader(self) -> DataLoader | list:
        """Numbers of the volumes that this process validates on; as many in every process, so that none waits for another."""
        assert self.trainer is not None
        rank, world_size, count = self.trainer.global_rank, self.trainer.world_size, len(self.run.split.validation)
        if not count:
            return []
        return DataLoader([(rank + i * world_size) % count for i in range(-(-count // world_size))])


class OtherSplit(UserWarning):
    """A student's split is not its teacher's."""


class Patience(EarlyStopping):
    """EarlyStopping that, resumed from the checkpoint of the epoch that exhausted it, stops before another epoch."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.wait_count >= self.patience:
            trainer.should_stop = True


def _lasting(config: RunConfig) -> str:
    """The data set's name as it is understood in any folder."""
    built_in = str(config.data) in BUILT_IN and config.layout is None
    return str(config.data) if built_in else os.path.abspath(config.data)


def _asked(given: Preprocessing | Mapping[str, Any], dataset: Dataset, teacher: Trained | None) -> Preprocessing:
    """What was asked for; for the rest the teacher's choices (a student sees what it saw), else the data set's."""
    if isinstance(given, Preprocessing):
        return given
    rest = (teacher.preprocessing if teacher else dataset.defaults).to_dict()
    if given.get("spacing") is not None and given.get("size") is None:
        rest["size"] = None  # which would win over the spacing
    if given.get("size") is not None and given.get("spacing") is None:
        rest["spacing"] = None
    if given.get("dims") not in (None, rest["dims"]):
        rest["spacing"] = None  # chosen for the other
    return Preprocessing.from_dict({**rest, **given})


def _has_class(volume: Volume, num_classes: int) -> bool:
    assert volume.mask is not None
    return bool(((volume.mask > 0) & (volume.mask < num_classes)).any())


def _shares(config: RunConfig, teacher: Trained | None) -> tuple[tuple[float, float, float], int]:
    """The fractions and the seed of the split that were asked for; for the rest the teacher's, else the usual ones."""
    others = teacher.config if teacher else config
    fractions = config.fractions or others.fractions or FRACTIONS
    seeds = (config.split_seed, others.split_seed, 0)
    return fractions, next(seed for seed in seeds if seed is not None)


def _split(dataset: Dataset, teacher: Trained | None, fractions: tuple[float, float, float], seed: int) -> Split:
    """The teacher's split of its cases, unless another is asked for: what tests a student must not have taught its teacher."""
    known = {*teacher.split.train, *teacher.split.validation, *teacher.split.test} if teacher else set()
    if not teacher or known.isdisjoint(c.name for c in dataset.labelled):
        return split_by_patient(dataset, seed=seed, fractions=fractions)
    if _shares(teacher.config, None) == (fractions, seed):
        return _continued(teacher.split, dataset)
    split = split_by_patient(dataset, seed=seed, fractions=fractions)
    if taught := [name for name in split.test if name in teacher.split.train]:
        _tell(
            f"the teacher was trained on {_some(taught)} of the student's test cases: their scores flatter the student; "
            "without --fractions and split_seed it takes the teacher's split"
        )
    return split


def _continued(split: Split, dataset: Dataset) -> Split:
    """A split of some cases of a data set, with its other cases: on their patient's side, else the data set's, else in train."""
    sides = {side: list(names) for side, names in asdict(split).items()}
    side_of = {name: side for side, names in sides.items() for name in names}
    of_patient = {c.patient: side_of[c.name] for c in dataset.labelled if c.name in side_of}
    of_data = {name: side for side, names in asdict(dataset.split or Split(())).items() for name in names}
    new = [c for c in dataset.labelled if c.name not in side_of]
    for case in new:
        sides[of_patient.get(case.patient) or of_data.get(case.name, "train")].append(case.name)
    there = {c.name for c in dataset.labelled}
    found = Split(**{side: tuple(name for name in names if name in there) for side, names in sides.items()})
    if not found.train:
        raise WrongUse(
            f"{dataset.name} holds no case that the teacher was trained on, and its others are held out: "
            "give --fractions to share them out anew"
        )
    if new or side_of.keys() - there:
        _tell(
            f"the teacher's split is kept for its {len(side_of.keys() & there)} cases that {dataset.name} holds; "
            f"new ones are {_some([c.name for c in new])}: in train, where neither their patient nor the data say otherwise"
        )
    return found


def _some(names: Sequence[str]) -> str:
    """How many, and the first of them."""
    return f"{len(names)} ({', '.join(names[:8])}{', ...' if names[8:] else ''})" if names else "none"


def _tell(text: str) -> None:
    if rank_zero_only.rank == 0:  # the other processes have found the same
        warnings.warn(text, OtherSplit, stacklevel=3)


def _check_cacheable(config: RunConfig) -> None:
    for term in config.losses:
        if term.teacher:
            raise WrongUse(
                f"cache_teacher keeps the teacher's logits alone, and {term.name} compares its layers "
                f"({', '.join(term.teacher)}): leave one of the two out"
            )


def _network_weights(state: Mapping[str, Any]) -> dict[str, Any]:
    """The network's part of a module's state: the student's, where there is one."""
    prefix = "model.student." if any(k.startswith("model.student.") for k in state) else "model."
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _trainer(run: Plan, folder: RunFolder, checkpoints: KeptCheckpoints) -> pl.Trainer:
    config = run.config
    # saved after the validation: resuming starts at an epoch's first batch. Two callbacks, because Lightning's save_last
    # saves only when the best changes.
    where = {"dirpath": folder.checkpoints, "save_on_train_epoch_end": True, "enable_version_counter": False}
    callbacks: list[Callback] = [
        MovableCheckpoint(filename=folder.last.stem, **where),
        progress_callback(folder.path.name),
    ]
    if run.split.validation:
        callbacks.insert(0, MovableCheckpoint(filename=folder.best.stem, monitor="val_dice", mode="max", **where))
    if config.patience:
        callbacks.append(Patience(monitor="val_dice", mode="max", patience=config.patience))
    attempts = len(list((folder.path / "logs").glob("version_*")))
    return pl.Trainer(
        default_root_dir=folder.path,
        max_epochs=config.epochs,
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=config.strategy,
        precision=PRECISIONS[config.precision],
        plugins=[checkpoints],
        callbacks=callbacks,
        logger=[
            CSVLogger(folder.path, name="logs", version=attempts),
            TensorBoardLogger(folder.path, name="tensorboard", version=""),
        ],
        log_every_n_steps=min(5, config.steps),
        gradient_clip_val=GRADIENT_CLIP,
        num_sanity_val_steps=0,
        enable_progress_bar=any(isinstance(c, ProgressBar) for c in callbacks),
        use_distributed_sampler=False,  # the draws know which process they are for
        enable_model_summary=False,
    )


def _check_processes(trainer: pl.Trainer, *, first: bool) -> None:
    """Raises WrongUse where others were started than the trainer knows of: each could train alone, in the same folder."""
    torchrun = torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()
    known = trainer.num_devices * trainer.num_nodes
    started = int(os.environ["WORLD_SIZE"]) if torchrun else known
    if started != known or (trainer.is_global_zero and not first):
        raise WrongUse(
            f"{started if torchrun else 'several'} processes were started, and devices times num_nodes is {known}: "
            "give --devices, the processes on a machine, and --num-nodes, the machines"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's lines that tell a user nothing."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)  # "GPU available: False, ..."
    with warnings.catch_warnings():
        # how many workers are worth their cost is the user's choice
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # Lightning 2.6 with torch 2.13: about a class that Lightning uses inside
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
        # resuming adds to the folder on purpose
        warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
        # volumes are mapped copy-on-write
        warnings.filterwarnings("ignore", message=".*given NumPy array is not writable.*")
        # the validation's counts are reduced over the processes before the Dice is logged
        warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
        # of the validation's cases: a run may do without
        warnings.filterwarnings("ignore", message="Total length of .* across ranks is zero")
        yield


@contextmanager
def _all_end(trainer: pl.Trainer) -> Iterator[None]:
    """No process that Lightning has started waits for one that has failed."""
    try:
        yield
    except BaseException:
        if trainer.strategy.launcher:
            trainer.strategy.launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))  # Windows has none
        raise


@contextmanager
def _ctrl_c() -> Iterator[None]:
    """Lightning ends the process after Ctrl-C, with exit code 1 and deaf to a second one: here it stays a KeyboardInterrupt.

    After SIGTERM the exit code is 143; Lightning's 0 says that all is done.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SIGTERMException:
        raise SystemExit(128 + signal.SIGTERM) from None
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        if main:
            signal.signal(signal.SIGINT, before)
