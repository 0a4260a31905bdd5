"""Distilling the Knowledge in a Neural Network: Hinton, Vinyals and Dean, NIPS workshop 2014 (arXiv 2015)."""

from __future__ import annotations

import torch

from medkd_fast import functional
from medkd_fast.losses import common, settings


class KDLoss(common.DistillationLoss):
    """KL(softmax(teacher / T) ‖ softmax(student / T)) over the classes of a pixel, times T², mean over valid pixels.

    Other codes: `torch.nn.KLDivLoss("mean")` on [B, C, *S] is this / (C·T²), `"batchmean"` is this times pixels / T²,
    Fast-nnUNet's term is this / C.

    Weight: 1 in CIRKD's tables, 10 · N in SKD's code (80: it sums over the N images), 10 / C in IFVD's (0.53 at 19 classes: it takes
    the mean over classes too), all with T = 1.

    Cost: one pass over student and teacher gives value and gradient; memory: the gradient.

    Args:
        temperature: divides both logits.
        ignore_index: pixels with this label do not count.
        activation: "sigmoid" for binary and multi-label heads: the KL divergence between Bernoulli distributions at every
            pixel and channel, mean over both; logits go in as two classes [0, x], which takes twice the memory.

    >>> import torch
    >>> loss = KDLoss(temperature=1.0)
    >>> student, teacher = torch.zeros(1, 2, 1, 1), torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1)
    >>> print(f"{loss(student, teacher).item():.4f}")
    0.1109
    """

    def __init__(self, temperature: float = 4.0, ignore_index: int = -100, activation: str = "softmax") -> None:
        super().__init__()
        settings.check_temperature(temperature)
        settings.check_whole("ignore_index", ignore_index)
        common.check_activation(activation)
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.activation = activation

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        """student, teacher: logits [B, C, *S]; target: labels [B, *S] or [B, 1, *S], for "sigmoid" also [B, C, *S]."""
        if self.activation == "sigmoid":
            common.check_heads(student, teacher)
            target = None if target is None else common.labels_of_heads(target, teacher)
            student, teacher = common.as_two_classes(student), common.as_two_classes(teacher)
        loss = functional.class_kl(
            student, teacher, temperature=self.temperature, target=target, ignore_index=self.ignore_index
        )
        self.parts = {"kl": loss.detach()}
        return loss
