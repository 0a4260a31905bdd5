"""Scale Decoupled Distillation: Wei, Luo and Luo, CVPR 2024."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from medkd_fast import functional
from medkd_fast.losses import common, settings
from medkd_fast.ops.common import check_labels
from medkd_fast.reference.common import which_count


class SDDLoss(common.DistillationLoss):
    """KD or decoupled KD of logits averaged over the whole map and over its regions, mean over all regions and images.

    Each scale k divides the map into k×k (k×k×k) regions whose logits are averaged: 1 + 4 + 16 regions by default. Regions where
    the teacher's verdict, right or wrong, differs from its verdict on the whole map weigh 2, the others 1; the sum is divided by
    the number of regions of all images, 21·N, not by the weights.

    Other codes: equal to the authors' with an image's label [N] and maps whose sides 4 divides; of others they take the means of 2×2
    regions and of the whole map from the 4×4 means, which weighs some pixels more (pool both maps to 4×4 for the same). For
    segmentation a region's label is the majority of its pixels' (the smaller label of equals), and the verdict on the whole map is
    the one against the majority of all.

    Weight: 1, with base "dkd" and beta up to 8; with this base the authors raise it from 0 over the first epochs.

    Cost: one pass over the logits for each scale and one over the labels; memory: the gradient.

    Args:
        scales: regions along every axis; the first must be 1, the whole map.
        base: "dkd" (decoupled, with alpha and beta) or "kd".
        alpha, beta: weights of the target and the non-target part of "dkd".
        temperature: divides the averaged logits.
        ignore_index: with dense labels, pixels with this label leave averages and majorities.

    Maps may have any size, also unequal ones. Regions of a size that the scale does not divide overlap by a pixel.

    >>> import torch
    >>> loss = SDDLoss(scales=(1, 2), base="kd", temperature=1.0)
    >>> student, teacher = torch.zeros(1, 2, 2, 2), torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1).expand(1, 2, 2, 2)
    >>> print(f"{loss(student, teacher, torch.tensor([0])).item():.4f}")
    0.1109
    """

    def __init__(
        self,
        scales: Sequence[int] = (1, 2, 4),
        base: str = "dkd",
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        if base not in ("dkd", "kd"):
            raise ValueError(f"base: got {base!r}, want 'dkd' or 'kd'")
        whole = isinstance(scales, Sequence) and all(settings.is_whole(scale) and scale >= 1 for scale in scales)
        if not whole or not scales or scales[0] != 1:
            raise ValueError(
                f"scales: got {scales!r}, want whole numbers, the first 1: the whole map, to which regions are compared"
            )
        settings.check_number(alpha=alpha, beta=beta)
        settings.check_temperature(temperature)
        settings.check_whole("ignore_index", ignore_index)
        self.scales = tuple(scales)
        self.base = base
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        self.ignore_index = ignore_index

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """student, teacher: logit maps [N, C, *S]; target: labels [N], or dense [N, *S] or [N, 1, *S]."""
        common.check_dims(student, teacher)
        common.check_target(target)
        classes = teacher.shape[1]
        if target.dim() == 1:
            regions = sum(scale ** (teacher.dim() - 2) for scale in self.scales)
            labels = target.long().unsqueeze(1).expand(-1, regions)
            s, t = (self._averages(x, None) for x in (student, teacher))
        else:
            dense = common.resized_labels(target, teacher)
            check_labels(dense, classes, self.ignore_index)
            dense = torch.where(which_count(dense, self.ignore_index), dense.long(), -1)
            labels = self._majorities(dense, classes)
            s = self._averages(student, common.counted(target, student, self.ignore_index))
            t = self._averages(teacher, dense >= 0)
        valid = labels != self.ignore_index
        right = t.argmax(1) == labels
        weight = 1 + common.wide(right != right[:, :1])
        if self.base == "dkd":
            result = functional.decoupled_kl(
                s,
                t,
                labels,
                target_weight=self.alpha,
                nontarget_weight=self.beta,
                temperature=self.temperature,
                ignore_index=self.ignore_index,
                weight=weight,
                reduction="sum",
            )
            parts = {"loss": result.loss, "target": result.target, "nontarget": result.nontarget}
        else:
            loss = functional.class_kl(
                s,
                t,
                temperature=self.temperature,
                target=labels,
                ignore_index=self.ignore_index,
                weight=weight,
                reduction="sum",
            )
            parts = {"loss": loss, "kl": loss}
        parts = {name: part / valid.sum().clamp(min=1) for name, part in parts.items()}
        loss = parts.pop("loss")
        self.parts = {name: part.detach() for name, part in parts.items()}
        return loss

    def _averages(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Logits [N, C, R] averaged over every region of every scale, over the pixels that count."""
        x = common.wide(x)
        if mask is None:
            return self._pyramid(x)
        mask = mask.unsqueeze(1)
        share = self._pyramid(mask.to(x.dtype))
        return self._pyramid(torch.where(mask, x, 0)) / torch.where(share > 0, share, 1)

    def _pyramid(self, x: torch.Tensor) -> torch.Tensor:
        """Means [N, C, R] over every region of every scale."""
        dims, finest = x.dim() - 2, max(self.scales)
        if not any(finest % scale for scale in self.scales) and not any(size % finest for size in x.shape[2:]):
            # regions of equal size: a larger one's mean is that of its parts' means
            x = common.averaged(x, [finest] * dims)
        return torch.cat([common.averaged(x, [scale] * dims).flatten(2) for scale in self.scales], 2)

    def _majorities(self, target: torch.Tensor, classes: int) -> torch.Tensor:
        """The most frequent label [N, R] of every region of labels [N, *S] (−1: none), ignore_index where there is none."""
        found = []
        for scale in self.scales:
            region = torch.zeros((), dtype=torch.long, device=target.device)
            for size in target.shape[1:]:
                region = region.unsqueeze(-1) * scale + torch.arange(size, device=target.device) * scale // size
            regions = scale ** (target.dim() - 1)
            index = (region * (classes + 1) + target + 1).flatten(1)
            counts = torch.zeros(len(target), regions * (classes + 1), dtype=torch.long, device=target.device)
            counts = counts.scatter_add(1, index, torch.ones_like(index)).unflatten(1, (regions, classes + 1))
            most, label = counts[:, :, 1:].max(2)
            found.append(torch.where(most > 0, label, self.ignore_index))
        return torch.cat(found, 1)
