"""What every Triton launcher needs: its name among torch's operators, and its device."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch

_LIBRARY = torch.library.Library("medkd_fast", "FRAGMENT")
Launcher = TypeVar("Launcher", bound=Callable[..., Any])


def operator(*, mutates: tuple[str, ...] = ()) -> Callable[[Launcher], Launcher]:
    """Registers a launcher as the operator <its name>_triton; the schema is read off its annotations."""

    def register(launch: Launcher) -> Launcher:
        @wraps(launch)
        def on_its_device(x: torch.Tensor, *args: Any) -> Any:
            if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
                with torch.cuda.device(x.device):
                    return launch(x, *args)
            return launch(x, *args)

        name = f"{launch.__name__}_triton"
        _LIBRARY.define(name + torch.library.infer_schema(launch, mutates_args=mutates))
        _LIBRARY.impl(name, on_its_device, "CompositeExplicitAutograd")
        return launch

    return register


class Planes(NamedTuple):
    """Features [B, C, *S] as pixels with one stride."""

    x: torch.Tensor
    image: int
    channel: int
    pixel: int


def pixel_stride(x: torch.Tensor) -> int:
    """The stride from pixel to pixel when the spatial dimensions lie one after another in memory, else 0."""
    if x.is_contiguous():
        return 1
    stride = expected = 0
    for size, step in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size == 1:
            continue
        if stride == 0:
            stride = expected = step
        if step != expected or step == 0:
            return 0
        expected *= size
    return stride or 1


def planes(x: torch.Tensor) -> Planes:
    """Contiguous and channels_last tensors are taken as they lie; what has no single stride from pixel to pixel is copied."""
    stride = pixel_stride(x)
    if stride == 0:
        x, stride = x.contiguous(), 1
    return Planes(x, x.stride(0), x.stride(1), stride)
