"""Decoupled knowledge distillation: Zhao, Cui, Song, Qiu and Liang, CVPR 2022, at every pixel."""

from __future__ import annotations

import torch
from torch import nn

from medkd_fast import functional


class DKDLoss(nn.Module):
    """alpha · TCKD + beta · NCKD, each times T², mean over valid pixels.

    Equation 7 of the paper with every pixel in the place of an image. On [B, C] logits seen as [B, C, 1, 1] the value is that
    of the authors' code, which also takes the mean over samples and T².

    Args:
        alpha: weight of the target part.
        beta: weight of the non-target part; 8 is the paper's for ImageNet-like settings and segmentation tables.
        temperature: divides both logits.
        ignore_index: pixels with this label do not count.

    >>> import torch
    >>> loss = DKDLoss(alpha=1.0, beta=8.0, temperature=1.0)
    >>> student = torch.tensor([[2.0, 0.0, 0.0]]).reshape(1, 3, 1, 1)
    >>> teacher = torch.tensor([[2.0, 1.0, 0.0]]).reshape(1, 3, 1, 1)
    >>> value = loss(student, teacher, torch.zeros(1, 1, 1, dtype=torch.long))
    >>> print(f"{value.item():.3f}, {({name: round(part.item(), 4) for name, part in loss.parts.items()})}")
    0.927, {'target': 0.0395, 'nontarget': 0.1109}
    """

    def __init__(
        self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, ignore_index: int = -100
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.parts: dict[str, torch.Tensor] = {}

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """student, teacher: logits [B, C, *S], C >= 2; target: labels [B, *S] or [B, 1, *S]."""
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

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, temperature={self.temperature}, ignore_index={self.ignore_index}"
