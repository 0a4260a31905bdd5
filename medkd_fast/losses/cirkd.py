"""Cross-Image Relational Knowledge Distillation for Semantic Segmentation: Yang, Zhou, An, Jiang, Xu and Zhang, CVPR 2022."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from medkd_fast import functional
from medkd_fast.losses import common, pooling, settings


class CIRKDLoss(common.DistillationLoss):
    """KL between rows of pixel affinities of every pair of images: softmax over one image's pixels for each of the other's.

    The mini-batch term of the paper: for all N² ordered pairs of images, cosine similarities between the pixels of one and those
    of the other, row softmax at the temperature, KL, mean over rows and pairs, not multiplied by T². The memory queues of the
    paper are not here. The V×V matrices are never held.

    Other codes: equal to the authors' (`batchmean` is the mean over rows), which since 2025 averages maps of 256×256 and more by 4
    first: `pool=4`. With T² it is this times 0.01.

    Weight: 1 (the authors'), on features before the classifier.

    Cost: two passes over all pairs of pixels, N² · V² · C operations; memory: the gradient and N² · V numbers.

    Args:
        temperature: divides the similarities.
        pool: average-pools both maps by this factor, or one for each axis; the cost falls with the fourth power (2-D), the sixth (3-D).
        ignore_index: with a target, pixels with this label are neither rows nor columns.

    Numbers of channels may differ. Maps of unequal size: the larger one is average-pooled first. Under DDP the pairs are those of
    the process's own batch.

    >>> import torch
    >>> features = torch.eye(4).reshape(1, 4, 2, 2)
    >>> CIRKDLoss()(3 * features, features).abs() < 1e-6
    tensor(True)
    """

    def __init__(
        self, temperature: float = 0.1, pool: int | Sequence[int] | None = None, ignore_index: int = -100
    ) -> None:
        super().__init__()
        settings.check_temperature(temperature)
        pooling.check_pool(pool)
        settings.check_whole("ignore_index", ignore_index)
        self.temperature = temperature
        self.pool = pool
        self.ignore_index = ignore_index

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        """student, teacher: features [B, C, *S]; target: labels, of any size."""
        student, teacher = common.to_common_size(student, teacher)
        mask = common.counted(target, student, self.ignore_index)
        student, left = pooling.average_pooled(student, self.pool, mask)
        teacher, _ = pooling.average_pooled(teacher, self.pool, mask)
        loss = functional.pixel_relation(
            student, teacher, divergence="kl", temperature=self.temperature, mask=left, across_images=True
        )
        self.parts = {"affinity": loss.detach()}
        return loss
