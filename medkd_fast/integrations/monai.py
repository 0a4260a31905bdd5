"""MONAI: targets and words as its losses have them, and a training step for its trainers.

kd = Distiller(teacher, student, [Term("dkd", weight=0.1)])
trainer = SupervisedTrainer(network=student, iteration_update=distillation_step(kd), ...)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from monai.utils.enums import LossReduction
from torch import nn
from torch.nn.modules.loss import _Loss

from medkd_fast.distiller import Distiller

IGNORED = -100  # the label that losses leave out by default


def as_labels(target: torch.Tensor, *, include_background: bool = True, sigmoid: bool = False) -> torch.Tensor:
    """Integer labels, as `medkd_fast.losses` take them, from targets as MONAI's losses take them.

    Args:
        target: labels [B, 1, *S] of any type, or one-hot [B, C, *S]. A pixel without a class in it is ignored.
        include_background: False ignores pixels whose label is 0, the background. (MONAI's losses drop channel 0. A softmax without
            one of its classes would be another distribution, so the pixels go and the channel stays.)
        sigmoid: the target is of a sigmoid head, where channels do not exclude each other; it comes back as [B, C, *S], and
            include_background=False ignores channel 0.

    Returns:
        [B, *S], for sigmoid [B, C, *S], int64; -100 where a pixel is ignored.

    >>> one_hot = torch.eye(3)[torch.tensor([[[0, 2, 1]]])].movedim(-1, 1)  # [B, C, *S]
    >>> as_labels(one_hot), as_labels(torch.tensor([[[[0.0, 2.0, 1.0]]]]), include_background=False)
    (tensor([[[0, 2, 1]]]), tensor([[[-100,    2,    1]]]))
    """
    target = target.as_subclass(torch.Tensor)  # of MetaTensor the values are enough
    if target.dim() < 3:
        raise ValueError(f"target: got shape {tuple(target.shape)}, want labels [B, 1, *S] or one-hot [B, C, *S]")
    if sigmoid:
        labels = target.long()
        background = torch.arange(labels.shape[1], device=labels.device).view(1, -1, *[1] * (labels.dim() - 2)) == 0
    else:
        classes, labels = target.max(1) if target.shape[1] > 1 else (None, target[:, 0].long())
        if classes is not None:
            labels = torch.where(classes > 0, labels, IGNORED)
        background = labels == 0
    return labels if include_background else torch.where(background, IGNORED, labels)


class MonaiLoss(_Loss):
    """A loss of `medkd_fast.losses` with the targets and the words of MONAI's.

    Args:
        loss: called as loss(student, teacher, target).
        include_background, sigmoid: see `as_labels`. A sigmoid head also needs a loss made for one, such as
            KDLoss(activation="sigmoid"), or one on features that needs no classes; others raise.
        reduction: "mean" is the loss of the batch as it is; "none" one value for each image [B], as if it were the batch, and
            "sum" their sum.

    >>> from medkd_fast.losses import KDLoss
    >>> loss = MonaiLoss(KDLoss(temperature=1.0), include_background=False, reduction="none")
    >>> student, teacher = torch.zeros(2, 2, 1, 2), torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1).expand(2, 2, 1, 2)
    >>> loss(student, teacher, torch.tensor([[0.0, 1.0], [0.0, 0.0]]).reshape(2, 1, 1, 2))
    tensor([0.1109, 0.0000])
    """

    def __init__(
        self,
        loss: nn.Module,
        include_background: bool = True,
        sigmoid: bool = False,
        reduction: LossReduction | str = LossReduction.MEAN,
    ) -> None:
        super().__init__(reduction=LossReduction(reduction).value)
        self.loss = loss
        self.include_background = include_background
        self.sigmoid = sigmoid

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """student, teacher: logits [B, C, *S]; target: [B, 1, *S] or one-hot [B, C, *S]."""
        student, teacher = (x.as_subclass(torch.Tensor) for x in (student, teacher))
        if target.dim() != student.dim():
            raise ValueError(
                f"target: got shape {tuple(target.shape)} with logits of {tuple(student.shape)}, want labels [B, 1, *S] or one-hot "
                "[B, C, *S]; of labels [B, *S] make target.unsqueeze(1)"
            )
        labels = as_labels(target, include_background=self.include_background, sigmoid=self.sigmoid)
        if self.reduction == LossReduction.MEAN.value:
            value: torch.Tensor = self.loss(student, teacher, labels)
            return value
        images = zip(student.split(1), teacher.split(1), labels.split(1), strict=True)
        values = torch.stack([self.loss(*image) for image in images])
        return values.sum() if self.reduction == LossReduction.SUM.value else values


def distillation_step(
    kd: Distiller, *, include_background: bool = True, sigmoid: bool = False
) -> Callable[[Any, Any], Any]:
    """The `iteration_update` of a `SupervisedTrainer` that adds the distiller's loss to the trainer's own.

    Everything else is the trainer's own iteration: inferer, mixed precision, accumulation, events. The trainer's network is
    the student or the distiller (or either in DDP); give its optimiser `kd.parameters()`. The output gets every term of the
    loss as `kd/<name>`.

    include_background, sigmoid: see `as_labels`; for the distiller's losses, not for the trainer's.
    """

    def iteration(engine: Any, batch: Any) -> Any:
        task_loss = engine.loss_function

        def both(prediction: Any, target: torch.Tensor) -> torch.Tensor:
            labels = as_labels(target, include_background=include_background, sigmoid=sigmoid)
            loss: torch.Tensor = task_loss(prediction, target).mean() + kd.loss(labels)
            engine.state.output.update({f"kd/{name}": value for name, value in kd.log().items()})
            return loss

        engine.loss_function = both
        try:
            return engine._iteration(engine, batch)
        finally:
            engine.loss_function = task_loss

    return iteration
