"""A run: its configuration, its folder, and training that a kill does not lose.

A run's folder holds config.json, versions.json, checkpoints/best.ckpt (highest held-out Dice during training) and last.ckpt,
logs/version_*/metrics.csv (one file an attempt) and tensorboard/. Whoever evaluates it adds scores and pictures.
"""

from __future__ import annotations

import logging
import platform
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import monai
import numpy as np
import pytorch_lightning as pl
import SimpleITK as sitk
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint, ProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader

import medkd_fast
from medkd_fast.training.data import Slices, Split
from medkd_fast.training.distillation import Distillation
from medkd_fast.training.errors import WrongUse
from medkd_fast.training.files import read_json, sha256, write_json
from medkd_fast.training.module import CHECKPOINT_KEY, GRADIENT_CLIP, SegmentationModule, Teacher
from medkd_fast.training.networks import build_network
from medkd_fast.training.progress import progress_callback
from medkd_fast.training.sampling import Blocks, train_loader


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's numbers besides the data and the machine.

    An epoch is `steps` optimiser steps of `batch_size` slices. losses: {distillation loss: weight}, empty without teacher.
    teacher: path of its checkpoint. patience: epochs without a better held-out Dice before training stops.
    """

    widths: tuple[int, ...]
    epochs: int
    seed: int = 0
    steps: int = 50
    batch_size: int = 4
    learning_rate: float = 1e-2
    patience: int | None = None
    losses: dict[str, float] = field(default_factory=dict)
    teacher: str | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise WrongUse(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.patience is not None and self.patience < 1:
            raise WrongUse(f"patience must be >= 1 epoch, got {self.patience}; leave it out to train to the end")
        if bool(self.losses) != bool(self.teacher):
            raise WrongUse("distillation losses need a teacher's checkpoint, and a teacher needs a loss: give both")

    def echo(self) -> dict[str, Any]:
        """What goes into config.json; the teacher by its contents too, so that another teacher is another run."""
        values = asdict(self) | {"widths": list(self.widths)}
        if self.teacher:
            check_is_file(Path(self.teacher))
            values["teacher_sha256"] = sha256(Path(self.teacher))
        return values


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run's folder."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def last(self) -> Path:
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def finished(self) -> Path:
        return self.path / "finished.json"


def fit(config: RunConfig, out: Path, slices: Slices, split: Split, *, resume: bool = False) -> nn.Module:
    """Train as `config` says into the folder `out` and return the network with its last weights.

    resume: go on from the folder's last checkpoint (from the start where there is none yet). On a CPU with the same
    number of threads the result has the same bits as a run that was never interrupted.

    Raises WrongUse where the folder holds a run already (without `resume`) or a run of another configuration.
    """
    folder = RunFolder(out)
    prepare(config, folder, resume=resume)
    if folder.finished.exists():
        return load_network(folder.last)
    module = build_module(config)
    trainer = _trainer(config, folder)
    loader = train_loader(slices, split.train, batch_size=config.batch_size, steps=config.steps, seed=config.seed)
    held_out = DataLoader(Blocks(slices, split.held_out), batch_size=config.batch_size)
    with warnings.catch_warnings():
        # the data are in memory: worker processes would only cost
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # Lightning 2.6 with torch 2.13: about a class that Lightning uses inside
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
        # resuming adds to the folder on purpose
        warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
        checkpoint = str(folder.last) if resume and folder.last.exists() else None
        trainer.fit(module, loader, held_out, ckpt_path=checkpoint)
    if trainer.interrupted:
        raise KeyboardInterrupt
    write_json(folder.finished, {"epochs": trainer.current_epoch, "steps": trainer.global_step})
    return module.network.cpu().eval()


def build_module(config: RunConfig) -> SegmentationModule:
    """The untrained module of a configuration, with its teacher and distillation terms where it has them."""
    distillation = teacher = None
    if config.teacher:
        teacher_network, teacher_widths = _read_checkpoint(Path(config.teacher))
        teacher = Teacher(teacher_network)
        distillation = Distillation(
            config.losses, student_widths=config.widths, teacher_widths=teacher_widths, seed=config.seed
        )
    return SegmentationModule(
        build_network(config.widths, seed=config.seed),
        total_steps=config.epochs * config.steps,
        learning_rate=config.learning_rate,
        distillation=distillation,
        teacher=teacher,
        description={"widths": list(config.widths)},
    )


def prepare(config: RunConfig, folder: RunFolder, *, resume: bool) -> None:
    """Write config.json and versions.json, or check that the folder's run is the one asked for."""
    asked = config.echo()
    if folder.config.exists():
        if not resume:
            raise WrongUse(f"{folder.path} holds a run already: add --resume to go on with it, or choose another --out")
        there = read_json(folder.config)
        # the teacher counts by its contents, not by its path
        keys = sorted((asked.keys() | there.keys()) - {"teacher"})
        changed = [f"{k} is {there.get(k)}, asked for {asked.get(k)}" for k in keys if there.get(k) != asked.get(k)]
        if changed:
            raise WrongUse(
                f"{folder.path} holds a run of another configuration ({'; '.join(changed)}): "
                "choose another --out or delete the folder"
            )
    elif folder.path.exists() and any(not p.name.startswith(".") for p in folder.path.iterdir()):
        raise WrongUse(f"{folder.path} is not empty and holds no run: choose another --out")
    write_json(folder.config, asked)
    write_json(folder.path / "versions.json", versions())


def load_network(checkpoint: Path) -> nn.Module:
    """The network of a checkpoint that `fit` wrote, in eval mode on the CPU. Raises WrongUse where it is none."""
    return _read_checkpoint(checkpoint)[0]


def check_is_file(checkpoint: Path) -> None:
    """Raises WrongUse where there is no file."""
    if not checkpoint.is_file():
        raise WrongUse(f"no checkpoint at {checkpoint}: give a file such as runs/teacher/checkpoints/last.ckpt")


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


class Patience(EarlyStopping):
    """EarlyStopping that, resumed from the checkpoint of the epoch that exhausted it, stops before another epoch."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.wait_count >= self.patience:
            trainer.should_stop = True


def _trainer(config: RunConfig, folder: RunFolder) -> pl.Trainer:
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)  # "GPU available: False, ..."
    # saved after the validation: resuming starts at an epoch's first batch. Two callbacks, because Lightning's save_last
    # saves only when the best changes.
    where = {"dirpath": folder.last.parent, "save_on_train_epoch_end": True, "enable_version_counter": False}
    callbacks: list[Callback] = [
        ModelCheckpoint(filename="best", monitor="val_dice", mode="max", **where),
        ModelCheckpoint(filename=folder.last.stem, **where),
        progress_callback(folder.path.name),
    ]
    if config.patience:
        callbacks.append(Patience(monitor="val_dice", mode="max", patience=config.patience))
    attempts = len(list((folder.path / "logs").glob("version_*")))
    return pl.Trainer(
        default_root_dir=folder.path,
        max_epochs=config.epochs,
        callbacks=callbacks,
        logger=[
            CSVLogger(folder.path, name="logs", version=attempts),
            TensorBoardLogger(folder.path, name="tensorboard", version=""),
        ],
        log_every_n_steps=min(5, config.steps),
        gradient_clip_val=GRADIENT_CLIP,
        num_sanity_val_steps=0,
        enable_progress_bar=any(isinstance(c, ProgressBar) for c in callbacks),
        use_distributed_sampler=False,  # the sampler's order is part of the run
        enable_model_summary=False,
    )


def _read_checkpoint(path: Path) -> tuple[nn.Module, tuple[int, ...]]:
    check_is_file(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        widths = tuple(checkpoint[CHECKPOINT_KEY]["widths"])
    except Exception as error:
        raise WrongUse(f"{path} is no checkpoint of medkd-fast train or distill ({type(error).__name__})") from error
    network = build_network(widths, seed=0)
    prefix = "network."
    network.load_state_dict(
        {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    )
    return network.eval(), widths
