"""The networks: MONAI's BasicUNet by its widths, its decoder features by forward hooks, its size in figures."""

from __future__ import annotations

import torch
from monai.networks.nets import BasicUNet
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from medkd_fast.training.data import NUM_CLASSES

DECODER = ("upcat_4", "upcat_3", "upcat_2", "upcat_1")  # from coarse (1/8 of the size) to fine (full size)


def build_network(widths: tuple[int, ...], *, seed: int) -> BasicUNet:
    """A 2-D BasicUNet for one input channel and `NUM_CLASSES` classes, its weights drawn from `seed` alone.

    widths: channels of the five encoder levels, then of the last decoder level (MONAI's `features`).

    >>> network = build_network((4, 4, 8, 16, 32, 4), seed=0)
    >>> network(torch.zeros(2, 1, 32, 32)).shape
    torch.Size([2, 9, 32, 32])
    """
    if len(widths) != 6 or min(widths) < 1:
        raise ValueError(f"widths must be six channel counts >= 1 (five encoder levels and the last), got {widths}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BasicUNet(spatial_dims=2, in_channels=1, out_channels=NUM_CLASSES, features=tuple(widths))


def decoder_channels(widths: tuple[int, ...]) -> list[int]:
    """Channels of the features of `DECODER`, coarse to fine.

    >>> decoder_channels((4, 4, 8, 16, 32, 6))
    [16, 8, 4, 6]
    """
    return [widths[3], widths[2], widths[1], widths[5]]


class DecoderTap:
    """Runs a BasicUNet and gives its logits together with its decoder features, caught by forward hooks.

    >>> tap = DecoderTap(build_network((4, 4, 8, 16, 32, 4), seed=0))
    >>> logits, features = tap(torch.zeros(1, 1, 32, 32))
    >>> [tuple(f.shape) for f in features]
    [(1, 16, 4, 4), (1, 8, 8, 8), (1, 4, 16, 16), (1, 4, 32, 32)]
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._caught: dict[str, Tensor] = {}
        for name in DECODER:
            network.get_submodule(name).register_forward_hook(self._catch(name))

    def _catch(self, name: str):
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            self._caught[name] = output

        return hook

    def __call__(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        logits = self.network(image)
        features = [self._caught[name] for name in DECODER]
        self._caught.clear()  # keep no graph alive
        return logits, features


def parameter_count(network: nn.Module) -> int:
    """Number of trainable values."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def multiply_accumulates(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-accumulate operations of the convolutions and matrix products of one forward on an input of `shape`."""
    device = next(network.parameters()).device
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(shape, device=device))
    return counter.get_total_flops() // 2
