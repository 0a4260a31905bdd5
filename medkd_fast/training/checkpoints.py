"""Checkpoints that survive kills, full disks and damage: whole or absent, and the one before the last is kept."""

from __future__ import annotations

import io
import os
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from medkd_fast.training.errors import WrongUse
from medkd_fast.training.files import write_atomically

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"


class KeptCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside the old one, then moves it into place; a replaced last.ckpt becomes previous.ckpt.

    last_is_damaged: then the first one that is written replaces it, and previous.ckpt, which is good, stays.
    """

    def __init__(self, *, last_is_damaged: bool = False) -> None:
        super().__init__()
        self.last_is_damaged = last_is_damaged

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Raises WrongUse where the folder cannot be written; what is there stays as it is."""
        path, buffer = Path(path), io.BytesIO()
        torch.save(checkpoint, buffer)

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())  # or a power cut could leave a name without its content
            if path.name == LAST and path.exists() and not self.last_is_damaged:
                os.replace(path, path.with_name(PREVIOUS))

        try:
            write_atomically(path, write)
        except OSError as error:
            raise WrongUse(
                f"the checkpoint {path} cannot be written ({error.strerror}); the one before it is whole: make room, or the "
                "folder writable, and go on with --resume"
            ) from error
        if path.name == LAST:
            self.last_is_damaged = False


class MovableCheckpoint(ModelCheckpoint):
    """Lightning's, which forgets the best score when a run's folder has been moved before it goes on; this one does not."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert self.dirpath is not None
        here = Path(self.dirpath)

        def moved(path: str) -> str:
            return str(here / Path(path).name) if path else path

        paths = {k: moved(state_dict[k]) for k in ("best_model_path", "kth_best_model_path", "last_model_path")}
        best = {moved(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": best, "dirpath": self.dirpath})


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Everything in a checkpoint, on the CPU; no code in it is run. Raises one of many errors for a damaged one."""
    with zipfile.ZipFile(path) as file:  # torch.load does not look at the checksums
        if damaged := file.testzip():
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def newest_good(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The last checkpoint of a folder that can be read, and what is in it; says on standard error which one is damaged.

    None where there is no checkpoint. Raises WrongUse where all are damaged.
    """
    there = [folder / name for name in (LAST, PREVIOUS) if (folder / name).is_file()]
    for i, path in enumerate(there):
        try:
            return path, read_checkpoint(path)
        except Exception as error:  # noqa: BLE001  zip, pickle, system errors
            _say_damaged(path, error, there[i + 1 :])
    if there:
        raise WrongUse(f"all checkpoints in {folder} are damaged: train again into another --out")
    # killed between the two moves
    return None


def _say_damaged(path: Path, error: Exception, others: Sequence[Path]) -> None:
    then = f"taking {others[0].name}, one epoch earlier" if others else "there is no other"
    print(f"medkd-fast: {path} is damaged ({type(error).__name__}): {then}", file=sys.stderr, flush=True)
