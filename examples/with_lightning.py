"""Distillation into a LightningModule that knows nothing of it: one callback.

python examples/with_lightning.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from demo_ct import BATCH, arguments, batches, mean_dice, network, slices, task_loss, trained_teacher
from torch import Tensor
from torch.utils.data import DataLoader

from medkd_fast import Term
from medkd_fast.integrations.lightning import DistillationCallback


class Segmentation(pl.LightningModule):
    """As you have it already."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = network(width)
        self.task = task_loss()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        image, label = batch
        loss = self.task(self.network(image), label)
        self.log("task", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        image, label = batch
        self.log("val_task", self.task(self.network(image), label))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main(given: Sequence[str] | None = None, folder: Path | None = None) -> pl.Trainer:
    args = arguments(__doc__, given)
    train, held_out = slices(args.size)
    distillation = DistillationCallback(
        trained_teacher(train, args.steps),
        [Term("cpkd", student="upcat_2", weight=0.3), Term("dkd", weight=0.02)],
        example=train[0][0].unsqueeze(0),
    )
    trainer = pl.Trainer(max_epochs=1, callbacks=[distillation], default_root_dir=folder, log_every_n_steps=1)
    trainer.fit(Segmentation(), batches(train, args.steps), DataLoader(held_out, BATCH))
    print({name: f"{value:.4f}" for name, value in trainer.callback_metrics.items()})

    # the checkpoint has no trace of the teacher
    student = Segmentation.load_from_checkpoint(trainer.checkpoint_callback.best_model_path, map_location="cpu")
    print(f"Dice on held-out slices: student {mean_dice(student.network, held_out):.3f}")
    return trainer


if __name__ == "__main__":
    main()
