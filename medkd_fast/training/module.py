"""The Lightning module: a network, its task loss, and, where there is a teacher, the distillation losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from monai.losses import DeepSupervisionLoss
from monai.networks.nets.basic_unet import UpCat
from torch import Tensor, nn

from medkd_fast.distiller import Distiller
from medkd_fast.processes import all_reduce
from medkd_fast.training.data.prepare import Volume
from medkd_fast.training.errors import WrongUse
from medkd_fast.training.inference import predict_logits
from medkd_fast.training.metrics import mean_without_nan
from medkd_fast.training.networks import all_outputs

WEIGHT_DECAY = 1e-2
WARM_UP = 20  # steps
GRADIENT_CLIP = 12.0  # nnU-Net's
CHECKPOINT_KEY = "medkd_fast"
OVERLAP = 0.25  # of the sliding window's places in validation: a curve, not a result


class SegmentationModule(pl.LightningModule):
    """Trains a network on (image [B, C, *S], label [B, 1, *S]) batches; validates on whole volumes.

    model: the network, or a `Distiller` around it. total_steps: optimiser steps of the whole run, for the learning rate's
    polynomial decay after a short warm-up. num_classes: with the background. volumes: to validate on; a batch of the
    validation is the number of one. description: stored in the checkpoint; `load_run` reads it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        learning_rate: float,
        num_classes: int,
        dims: int,
        patch: Sequence[int],
        ignore_label: int | None = None,
        volumes: Sequence[Volume] = (),
        seed: int = 0,
        description: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.total_steps, self.learning_rate, self.seed = total_steps, learning_rate, seed
        self.num_classes, self.dims, self.patch = num_classes, dims, tuple(patch)
        self.ignore_label, self.volumes = ignore_label, list(volumes)
        self.description = dict(description or {})
        # of outputs at several scales the finest weighs 1, each coarser one half as much
        self.task_loss = DeepSupervisionLoss(DiceCE(num_classes, ignore_label))
        self._counts = torch.zeros(0)
        self._some_finite = torch.zeros((), dtype=torch.bool)

    @property
    def network(self) -> nn.Module:
        """What is trained and kept: the student, or the network that learns alone."""
        return self.model.student if isinstance(self.model, Distiller) else self.model

    def compile_network(self, wanted: bool) -> None:
        """Let torch.compile make the network's forward, and nothing else of it: its parameters keep their names."""
        if not wanted:
            return
        for layer in self.network.modules():
            # torch 2.13's compiler has the strides of this padding's gradient wrong on a CPU; where every level halves
            # the patch evenly, nothing is padded
            if isinstance(layer, UpCat) and all(n % 16 == 0 for n in self.patch):
                layer.is_pad = False
        self.network.compile()

    def losses(self, batch: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch and, detached, its parts: "task", and "name" and "name/part" of every distillation loss."""
        image, label = batch[:2]
        if isinstance(self.model, Distiller):
            for teacher in self.model.teachers:
                if isinstance(teacher, RecordedTeacher):
                    teacher.logits = batch[2]
        outputs = all_outputs(self.model(image), image.dim())
        task = self.task_loss(outputs, label.float())
        if not isinstance(self.model, Distiller):
            return task, {"task": task.detach()}
        loss = task + self.model.loss(label)
        return loss, {"task": task.detach(), **self.model.log(parts=True)}

    def training_step(self, batch: Sequence[Tensor], batch_index: int) -> Tensor:
        loss, parts = self.losses(batch)
        self._some_finite = self._some_finite | loss.detach().isfinite()
        self.log_dict({"loss": loss.detach(), **parts}, prog_bar=True)
        return loss

    def on_train_start(self) -> None:
        """Raises WrongUse where one process goes on from a checkpoint and another begins: they would wait for each other."""
        least, most = (
            int(self.trainer.strategy.reduce(torch.tensor(self.trainer.global_step, device=self.device), reduce_op=op))
            for op in ("min", "max")
        )
        if least != most:
            raise WrongUse(
                f"a process goes on after {most} steps, another after {least}: --out must be one folder, which all machines share"
            )

    def on_train_epoch_start(self) -> None:
        # dropout draws the same numbers in an epoch that a killed run begins again
        torch.manual_seed((self.seed * 1_000_003 + self.current_epoch) * 4099 + self.global_rank)
        self._some_finite = torch.zeros((), dtype=torch.bool, device=self.device)

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Raises WrongUse after an epoch that diverged, before it is validated and kept.

        Single steps may overflow in float16: their weights stay as they were.
        """
        if not self.trainer.is_last_batch:
            return
        some = self.trainer.strategy.reduce(self._some_finite.int(), reduce_op="max")
        values = [*self.network.parameters(), *self.network.buffers()]
        finite = torch.stack([v.isfinite().all() for v in values]).all() & some.bool()
        if not self.trainer.strategy.reduce(finite.int(), reduce_op="min"):
            raise WrongUse(
                f"training has diverged: after epoch {self.current_epoch + 1} the weights or losses are no finite numbers; "
                "choose a lower --learning-rate or --precision 32; what was kept is of the epoch before"
            )

    def on_validation_epoch_start(self) -> None:
        self._counts = torch.zeros(len(self.volumes), 3, self.num_classes, dtype=torch.int64)

    def validation_step(self, batch: Tensor, batch_index: int) -> None:
        for number in batch.tolist():
            volume = self.volumes[number]
            logits = predict_logits(
                self.network, volume.image, dims=self.dims, patch=self.patch, overlap=OVERLAP, device=self.device
            )
            counted = volume.mask[0] < self.num_classes  # all but the ignore label
            p, y = logits.argmax(0)[counted], volume.mask[0][counted].long()
            # overlap, predicted, labelled
            self._counts[number] = torch.stack(
                [torch.bincount(v, minlength=self.num_classes) for v in (y[p == y], p, y)]
            )

    def on_validation_epoch_end(self) -> None:
        # every process has counted its volumes and has 0 for the others
        counts = self.trainer.strategy.reduce(self._counts.to(self.device), reduce_op="max")
        self.log("val_dice", mean_dice(counts.cpu()), prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=WEIGHT_DECAY)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _schedule(self, step: int) -> float:
        warm_up = min(1.0, (step + 1) / WARM_UP)
        return warm_up * max(0.0, 1 - step / self.total_steps) ** 0.9

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CHECKPOINT_KEY] = self.description


class DiceCE(nn.Module):
    """Soft Dice loss of the classes without the background, mean over classes, plus cross-entropy, mean over pixels.

    Both over the whole batch (most slices lack most organs, and Dice of an absent organ is noise) and, in a distributed
    run, over all processes' batches: the gradients are those of one process with the global batch. MONAI's
    `DiceCELoss(to_onehot_y=True, softmax=True, include_background=False, batch=True)`, which knows neither an ignore
    label nor other processes, is the same without them.
    """

    def __init__(self, num_classes: int, ignore_label: int | None = None) -> None:
        super().__init__()
        self.num_classes, self.ignore_label = num_classes, ignore_label

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """logits: [B, num_classes, *S]; target: [B, 1, *S], classes in any type."""
        logits, target = logits.float(), target[:, 0].long()
        valid = torch.ones_like(target, dtype=torch.bool) if self.ignore_label is None else target != self.ignore_label
        target = torch.where(valid, target, 0)
        cross_entropy = F.cross_entropy(logits, target, reduction="none")[valid].sum()
        probability = logits.softmax(1) * valid.unsqueeze(1)
        truth = F.one_hot(target, self.num_classes).movedim(-1, 1) * valid.unsqueeze(1)
        axes = [0, *range(2, logits.dim())]
        sums = [(probability * truth).sum(axes), probability.sum(axes), truth.sum(axes)]
        totals = over_processes(torch.cat([*sums, cross_entropy.view(1), valid.sum().view(1)]))
        overlap, predicted, labelled = totals[:-2].view(3, -1)[:, 1:]
        dice = (2 * overlap + 1e-5) / (predicted + labelled + 1e-5)
        return (1 - dice).mean() + totals[-2] / totals[-1].clamp(min=1)


def over_processes(sums: Tensor) -> Tensor:
    """Sums over all processes of a distributed run, with gradients; as they are without one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return sums
    return all_reduce(sums)


def mean_dice(counts: Tensor) -> float:
    """Dice averaged over the volumes that have a class, then over classes. counts: [volumes, 3, classes], overlap, predicted, labelled.

    >>> mean_dice(torch.tensor([[[5, 2, 0], [5, 2, 1], [5, 4, 0]]]))  # the last class has no label
    0.6666666666666666
    """
    per_class: list[float] = []
    for c in range(1, counts.shape[2]):
        per_class.append(mean_without_nan([2 * o / (p + y) for o, p, y in counts[:, :, c].tolist() if y]))
    return mean_without_nan(per_class)


class RecordedTeacher(nn.Module):
    """Stands for a teacher whose logits of the batch come with the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.zeros(0)

    def forward(self, image: Tensor) -> Tensor:
        return self.logits.to(image.device)
