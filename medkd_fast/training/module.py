"""The Lightning module: a network, DiceCE, and, where there is a teacher, the distillation terms."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn

from medkd_fast.training.data import NUM_CLASSES
from medkd_fast.training.distillation import Distillation
from medkd_fast.training.metrics import mean_without_nan
from medkd_fast.training.networks import DecoderTap

WEIGHT_DECAY = 1e-2
WARM_UP = 20  # steps
GRADIENT_CLIP = 12.0  # nnU-Net's
CHECKPOINT_KEY = "medkd_fast"


class Teacher:
    """A trained network that only answers: eval mode, no gradient, and no submodule of whoever holds it.

    Because it is not an `nn.Module`, the student's state_dict, optimiser and checkpoint do not know it.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)
        self.tap = DecoderTap(self.network)

    @torch.no_grad()
    def __call__(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.tap(image)


class SegmentationModule(pl.LightningModule):
    """Trains `network` on (image [B, 1, H, W], label [B, 1, H, W]) batches; validates on held-out blocks of slices.

    total_steps: optimiser steps of the whole run, for the learning rate's polynomial decay after a short warm-up.
    distillation, teacher: both or neither. description: stored in the checkpoint; `load_network` reads it.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        total_steps: int,
        learning_rate: float,
        distillation: Distillation | None = None,
        teacher: Teacher | None = None,
        description: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if (distillation is None) != (teacher is None):
            raise ValueError("distillation terms need a teacher and a teacher needs distillation terms: give both")
        self.network, self.distillation, self.teacher = network, distillation, teacher
        self.total_steps, self.learning_rate = total_steps, learning_rate
        self.description = description or {}
        self.tap = DecoderTap(network)
        # Dice over the batch: most slices lack most organs, and Dice of an absent organ is noise
        self.task_loss = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False, batch=True)
        self._overlaps: dict[int, Tensor] = {}

    def setup(self, stage: str) -> None:
        if self.teacher is not None:
            self.teacher.network.to(self.device)

    def losses(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch and, detached, its parts: "task" and "name/part" of every distillation term."""
        image, label = batch
        student = self.tap(image)
        task = self.task_loss(student[0], label)
        if self.teacher is None or self.distillation is None:
            return task, {"task": task.detach()}
        loss = task + self.distillation(student, self.teacher(image), label)
        return loss, {"task": task.detach(), **self.distillation.parts}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        loss, parts = self.losses(batch)
        self.log_dict({"loss": loss.detach(), **parts}, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        self._overlaps = {}

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_index: int) -> None:
        image, label, block = batch
        prediction = self.network(image).argmax(1, keepdim=True)
        for number in block.unique().tolist():
            p, y = prediction[block == number], label[block == number]
            counts = torch.stack(
                [torch.bincount(v.flatten(), minlength=NUM_CLASSES) for v in (y[p == y], p, y)]
            )  # [3, classes]: overlap, predicted, labelled
            self._overlaps[number] = self._overlaps.get(number, 0) + counts

    def on_validation_epoch_end(self) -> None:
        self.log("val_dice", self._mean_dice(), prog_bar=True)

    def _mean_dice(self) -> float:
        """Dice averaged over the blocks that have a class, then over classes, as `metrics.summarise` does."""
        per_class: list[float] = []
        for c in range(1, NUM_CLASSES):
            counts = [block[:, c].tolist() for block in self._overlaps.values()]
            per_class.append(mean_without_nan([2 * o / (p + y) for o, p, y in counts if y]))
        return mean_without_nan(per_class)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=WEIGHT_DECAY)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _schedule(self, step: int) -> float:
        warm_up = min(1.0, (step + 1) / WARM_UP)
        return warm_up * max(0.0, 1 - step / self.total_steps) ** 0.9

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CHECKPOINT_KEY] = self.description
