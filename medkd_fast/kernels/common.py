"""What every Triton launcher needs: its name among torch's operators, and its device."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

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
        for key in ("CUDA", "CPU"):  # the CPU's for the interpreter
            _LIBRARY.impl(name, on_its_device, key)
        return launch

    return register
