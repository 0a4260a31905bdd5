"""Knowledge distillation: Hinton, Vinyals and Dean, 2015, at every pixel."""

from __future__ import annotations

import torch
from torch import nn

from medkd_fast import functional


class KDLoss(nn.Module):
    """KL(softmax(teacher / T) ‖ softmax(student / T)) times T², mean over valid pixels.

    Published codes divide by other things: `torch.nn.KLDivLoss("mean")` on [B, C, *S] is this / (C·T²), `"batchmean"` is
    this times pixels / T², Fast-nnUNet's term is this / C.

    Args:
        temperature: divides both logits.
        ignore_index: pixels with this label do not count.

    >>> import torch
    >>> loss = KDLoss(temperature=1.0)
    >>> student, teacher = torch.zeros(1, 2, 1, 1), torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1)
    >>> print(f"{loss(student, teacher).item():.4f}")
    0.1109
    """

    def __init__(self, temperature: float = 4.0, ignore_index: int = -100) -> None:
        super().__init__()
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.parts: dict[str, torch.Tensor] = {}

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        """student, teacher: logits [B, C, *S]; target: labels [B, *S] or [B, 1, *S]."""
        loss = functional.class_kl(
            student, teacher, temperature=self.temperature, target=target, ignore_index=self.ignore_index
        )
        self.parts = {"kl": loss.detach()}
        return loss

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, ignore_index={self.ignore_index}"
