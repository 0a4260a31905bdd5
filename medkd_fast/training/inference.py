"""Logits of a whole volume from a network that was trained on slices or patches: MONAI's sliding window."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from medkd_fast.layers import finest
from medkd_fast.training.bars import track
from medkd_fast.training.data.sampling import filled, window_at
from medkd_fast.training.errors import WrongUse

Network = Callable[[Tensor], Tensor]


@torch.inference_mode()
def predict_logits(
    network: nn.Module | Network,
    image: Tensor,
    *,
    dims: int,
    patch: Sequence[int],
    overlap: float = 0.5,
    batch_size: int = 4,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Tensor:
    """Logits [K + 1, D, H, W] float32, on the CPU, of a prepared image [C, D, H, W].

    dims: 2 takes the image slice by slice, with windows `patch` = (H, W); 3 takes windows (D, H, W). A smaller image is
    padded with its lowest intensity.
    overlap: share of a window that its neighbour covers too; windows weigh in with a Gaussian, so that their borders count
    less. batch_size: windows a forward. device: where the network runs and is. progress: a bar, for one large volume.

    The network answers with logits, or with several outputs of which the finest is taken (deep supervision).

    >>> predict_logits(lambda x: torch.cat([x, 1 - x], 1), torch.ones(1, 2, 5, 7), dims=2, patch=(4, 4)).shape
    torch.Size([2, 2, 5, 7])
    """
    if dims not in (2, 3) or len(patch) != dims or image.ndim != 4:
        raise ValueError(
            f"dims must be 2 or 3, patch that many sizes and image [C, D, H, W], got {dims}, {tuple(patch)} and "
            f"{tuple(image.shape)}"
        )
    if isinstance(network, nn.Module):
        network.eval()
    window = SlidingWindowInferer(
        progress=progress and dims == 3 and sys.stderr.isatty(),
        roi_size=tuple(patch),
        sw_batch_size=batch_size,
        overlap=overlap,
        mode="gaussian",
        sw_device=device,
        device="cpu",
    )

    def logits(windows: Tensor) -> Tensor:
        return finest(network(windows), windows.dim()).float()

    def answered(x: Tensor) -> Tensor:
        """Of [B, C, *S]. What is missing of a window has the image's lowest intensity, as in training."""
        _, room = window_at(x.shape[2:], [n // 2 for n in x.shape[2:]], patch)
        return F.pad(window(filled(x, room), logits), [-size for size in room]) if any(room) else window(x, logits)

    if dims == 3:
        return answered(image[None])[0]
    # a few slices at a time: all of them at once would hold every window of the volume, and pieces put together be there twice
    found = torch.empty(0)
    for number, slices in enumerate(track(image.transpose(0, 1).split(batch_size), "slices", show=progress)):
        answer = answered(slices).transpose(0, 1)  # [K + 1, batch_size, H, W]
        if not number:
            found = answer.new_empty(len(answer), *image.shape[1:])
        found[:, number * batch_size : (number + 1) * batch_size] = answer
    return found


def check_logits(logits: Tensor, case: str) -> None:
    """Raises WrongUse where a network answered with what is no finite number: its largest class would be any."""
    if not logits.isfinite().all():
        raise WrongUse(
            f"the network's logits of case {case} are no finite numbers: its weights have diverged, or the image's "
            "values are far from those of the training data"
        )
