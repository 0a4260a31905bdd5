"""Decoupled Knowledge Distillation: Zhao, Cui, Song, Qiu and Liang, CVPR 2022."""

from __future__ import annotations

import torch

from medkd_fast import functional
from medkd_fast.losses import common, settings
from medkd_fast.reference.common import which_count


class DKDLoss(common.DistillationLoss):
    """alpha · KL between {label, any other class} + beta · KL among the other classes, each times T², mean over pixels.

    Equation 7 of the paper with every pixel in the place of an image: alpha · TCKD + beta · NCKD.

    Other codes: on [B, C] logits seen as [B, C, 1, 1] the value is that of the authors' code, which also takes the mean over
    samples and T².

    Weight: 1, with alpha 1 and beta 8 (their CIFAR settings have beta 2 to 8 and T = 4, their ImageNet settings 0.5 and 2 and
    T = 1); 0.1 in tables of 3-D segmentation.

    Cost: one pass over student and teacher gives value and gradient; memory: the gradient.

    Args:
        alpha: weight of the target part.
        beta: weight of the non-target part.
        temperature: divides both logits.
        ignore_index: pixels with this label do not count.
        activation: "sigmoid" for binary and multi-label heads: every channel is two classes, which leave one other class, so
            the non-target part is 0 and the loss is alpha times that of `KDLoss(activation="sigmoid")`.

    >>> import torch
    >>> loss = DKDLoss(alpha=1.0, beta=8.0, temperature=1.0)
    >>> student = torch.tensor([[2.0, 0.0, 0.0]]).reshape(1, 3, 1, 1)
    >>> teacher = torch.tensor([[2.0, 1.0, 0.0]]).reshape(1, 3, 1, 1)
    >>> value = loss(student, teacher, torch.zeros(1, 1, 1, dtype=torch.long))
    >>> print(f"{value.item():.3f}, {({name: round(part.item(), 4) for name, part in loss.parts.items()})}")
    0.927, {'target': 0.0395, 'nontarget': 0.1109}
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        ignore_index: int = -100,
        activation: str = "softmax",
    ) -> None:
        super().__init__()
        settings.check_number(alpha=alpha, beta=beta)
        settings.check_temperature(temperature)
        settings.check_whole("ignore_index", ignore_index)
        common.check_activation(activation)
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.activation = activation

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """student, teacher: logits [B, C, *S], C >= 2; target: labels [B, *S] or [B, 1, *S], for "sigmoid" also
        [B, C, *S], which there only say what to ignore."""
        if self.activation == "sigmoid":
            common.check_heads(student, teacher)
            # from either of two classes the divergence is the same
            counts = which_count(common.labels_of_heads(target, teacher), self.ignore_index)
            target = torch.where(counts, 0, self.ignore_index)
            student, teacher = common.as_two_classes(student), common.as_two_classes(teacher)
        result = functional.decoupled_kl(
            student,
            teacher,
            target,
            target_weight=self.alpha,
            nontarget_weight=self.beta,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
        )
        self.parts = {"target": result.target, "nontarget": result.nontarget}
        return result.loss
