"""Progress of a training run: a bar on a terminal, one line an epoch elsewhere."""

from __future__ import annotations

import sys

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, RichProgressBar


def progress_callback(name: str) -> Callback:
    """Lightning's bar with the loss's parts where standard error is a terminal, `EpochLines` in a pipe or a log."""
    return RichProgressBar() if sys.stderr.isatty() else EpochLines(name)


class EpochLines(Callback):
    """One line an epoch on standard error: the losses of its last logged step and the validation Dice."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        values = "  ".join(f"{k} {float(v):.3f}" for k, v in trainer.callback_metrics.items() if "/" not in k)
        print(
            f"{self.name}: epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {values}",
            file=sys.stderr,
            flush=True,
        )
