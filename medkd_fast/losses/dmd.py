"""Decoupled Multi-scale Distillation (DMD): Zhang and Yu, Proc. SPIE 13213, 2024."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence

import torch
from torch import nn

from medkd_fast import functional
from medkd_fast.losses import common, settings
from medkd_fast.losses.spatial import enhanced_spatial

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


class DMDLoss(common.DistillationLoss):
    """feature_weight · non-target KL of projected decoder features, mean over scales, + logit_weight · target KL of logits.

    Multi-scale feature distillation (MFD) takes the teacher's logits as target for the student's decoder features at several
    scales. Decoupled, the features learn the non-target classes, where the knowledge lies, and the logits learn the target
    class, where the student is judged. Only the abstract of the paper is public; our readings: a feature becomes class
    logits through a learned projector at its own resolution; the teacher's logits stay at full resolution and the
    projected ones are upsampled inside the kernel (linear), so small structures are not averaged away; scales weigh the same,
    so that feature_weight means the same for any number of them; both parts carry T².

    Other codes: none is public.

    Weight: not in the abstract; the demo of this package takes 0.1.

    Cost: one pass over the teacher and the student's logits, one over the teacher for each scale, value and gradient together;
    memory: the gradients and the projected logits at the features' size.

    Args:
        num_classes: C of the logits.
        feature_channels: channels of every decoder feature, in the order of `features`.
        feature_weight, logit_weight: weights of the parts; 0 leaves a part out.
        temperature: divides both logits.
        projector: "conv1x1", or "transposed": per scale a stack of stride-2 transposed convolutions, each halving the
            channels, with instance norm and PReLU, the last one to the classes. For it features come as a decoder makes
            them, coarsest first and each twice the size of the one before; the i-th of n is taken up n − 1 − i times, and
            what then is still missing to the teacher's size is upsampled.
        spatial_dims: 2 or 3 (1 for signals).
        decoupled: False is MFD alone: the full KL divergence on the features, nothing on the logits.
        logit_term: "target": the target part of the decoupled KL. "enhanced_spatial": cross-entropy between softmaxes over the
            pixels, the teacher's raised by the label: with p = softmax over pixels at T and m = one-hot(target),
            −1/(N·C) · Σ ((p_t + m)^1.2 − m) · log p_s, not multiplied by T².
        ignore_index: pixels with this label do not count.

    With two classes there is one non-target class and NCKD is 0; a warning says so.

    >>> import torch
    >>> loss = DMDLoss(num_classes=3, feature_channels=[8, 4])
    >>> features = [torch.rand(2, 8, 4, 4), torch.rand(2, 4, 8, 8)]
    >>> logits, teacher = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    >>> value = loss(logits, teacher, torch.zeros(2, 8, 8, dtype=torch.long), features=features)
    >>> value.shape, sorted(loss.parts)
    (torch.Size([]), ['features', 'logits'])
    """

    def __init__(
        self,
        num_classes: int,
        feature_channels: Sequence[int],
        feature_weight: float = 1.0,
        logit_weight: float = 1.0,
        temperature: float = 4.0,
        projector: str = "conv1x1",
        spatial_dims: int = 2,
        decoupled: bool = True,
        ignore_index: int = -100,
        logit_term: str = "target",
    ) -> None:
        super().__init__()
        if not feature_channels:
            raise ValueError("feature_channels: got none, want the channels of at least one decoder feature")
        if logit_term not in ("target", "enhanced_spatial"):
            raise ValueError(f"logit_term: got {logit_term!r}, want 'target' or 'enhanced_spatial'")
        if not settings.is_whole(spatial_dims) or spatial_dims not in CONV:
            raise ValueError(f"spatial_dims: got {spatial_dims!r}, want 2 or 3 (1 for signals)")
        settings.check_whole("num_classes", num_classes, at_least=2)
        settings.check_number(feature_weight=feature_weight, logit_weight=logit_weight)
        settings.check_temperature(temperature)
        settings.check_flag("decoupled", decoupled)
        settings.check_whole("ignore_index", ignore_index)
        if decoupled and num_classes == 2:
            warnings.warn(
                "DMDLoss with 2 classes: the non-target part on the features is always 0; decoupled=False teaches them",
                stacklevel=2,
            )
        self.num_classes = num_classes
        self.feature_channels = tuple(feature_channels)
        self.feature_weight = feature_weight
        self.logit_weight = logit_weight
        self.temperature = temperature
        self.projector = projector
        self.spatial_dims = spatial_dims
        self.decoupled = decoupled
        self.ignore_index = ignore_index
        self.logit_term = logit_term
        if projector == "conv1x1":
            steps = [0] * len(self.feature_channels)
        elif projector == "transposed":
            steps = list(range(len(self.feature_channels) - 1, -1, -1))
        else:
            raise ValueError(f"projector: got {projector!r}, want 'conv1x1' or 'transposed'")
        self.projectors = nn.ModuleList(
            _projector(channels, num_classes, count, spatial_dims)
            for channels, count in zip(self.feature_channels, steps, strict=True)
        )

    def forward(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        target: torch.Tensor,
        features: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """student, teacher: logits [B, C, *S]; target: labels [B, *S] or [B, 1, *S]; features: the student's, [B, c, *s]."""
        self._check(features)
        parts = {}
        if self.feature_weight:
            scales = [
                self._feature_term(project(x.to(next(project.parameters()).dtype)), teacher, target)
                for project, x in zip(self.projectors, features, strict=True)
            ]
            parts["feature"] = torch.stack(scales).mean()
        if self.logit_weight and self.decoupled:
            parts["logit"] = self._logit_term(student, teacher, target)
        self.parts = {f"{name}s": part.detach() for name, part in parts.items()}
        return common.weighted_sum(student, {name: (getattr(self, f"{name}_weight"), x) for name, x in parts.items()})

    def _logit_term(self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self.logit_term == "enhanced_spatial":
            return enhanced_spatial(student, teacher, target, self.temperature, self.ignore_index)
        return functional.decoupled_kl(
            student,
            teacher,
            target,
            nontarget_weight=0.0,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
        ).loss

    def _feature_term(self, logits: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self.decoupled:
            return functional.decoupled_kl(
                logits,
                teacher,
                target,
                target_weight=0.0,
                temperature=self.temperature,
                ignore_index=self.ignore_index,
            ).loss
        return functional.class_kl(
            logits, teacher, temperature=self.temperature, target=target, ignore_index=self.ignore_index
        )

    def _check(self, features: Sequence[torch.Tensor]) -> None:
        if features is None or len(features) != len(self.feature_channels):
            got = "none" if features is None else f"{len(features)}"
            raise ValueError(
                f"features: got {got}, want {len(self.feature_channels)}, one for each of feature_channels"
            )
        for i, (x, channels) in enumerate(zip(features, self.feature_channels, strict=True)):
            if x.dim() != self.spatial_dims + 2 or x.shape[1] != channels:
                raise ValueError(
                    f"features[{i}]: got shape {tuple(x.shape)}, want [B, {channels}] and {self.spatial_dims} spatial "
                    "dimensions, as feature_channels and spatial_dims say"
                )
        sizes = [x.shape[2:].numel() for x in features]
        if self.projector == "transposed" and any(a >= b for a, b in itertools.pairwise(sizes)):
            raise ValueError(
                f"features: got spatial shapes {[tuple(x.shape[2:]) for x in features]}; the transposed projector wants "
                "the coarsest first, as a decoder makes them"
            )


def _projector(channels: int, classes: int, steps: int, dims: int) -> nn.Module:
    """From a feature to class logits, 2^steps times as large: a 1×1 convolution, or stride-2 transposed convolutions."""
    if steps == 0:
        return CONV[dims](channels, classes, kernel_size=1)
    layers: list[nn.Module] = []
    for _ in range(steps - 1):
        halved = max(channels // 2, 1)
        layers += [
            TRANSPOSED[dims](channels, halved, kernel_size=2, stride=2, bias=False),
            NORM[dims](halved, affine=True),
            nn.PReLU(halved),
        ]
        channels = halved
    layers.append(TRANSPOSED[dims](channels, classes, kernel_size=2, stride=2))
    return nn.Sequential(*layers)
