"""What every Triton launcher needs: its name among torch's operators, its device, and how much memory a program has there."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

import torch
import triton
from triton.runtime import driver

#: Kernels run in Triton's interpreter, where an instruction costs the same for any number of lanes.
INTERPRETED = triton.knobs.runtime.interpret
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


def roomy(kibibytes: int = 160) -> bool:
    """Whether a program has so much shared memory: 227 KiB with compute capability 9.0 and 10.0, 163 with 8.0, 99 with 8.6, 8.9 and 12.0."""
    return not INTERPRETED and _shared_bytes(driver.active.get_current_device()) >= kibibytes * 1024


@cache
def _shared_bytes(device: int) -> int:
    return driver.active.utils.get_device_properties(device)["max_shared_mem"]


#: Programs that keep a GPU busy: some for each of its multiprocessors.
BUSY = 256
#: Triton's `num_stages` with which a tile is loaded while the one before is worked on. With 2 it is loaded after that work, and
#: waited for at once.
AHEAD = 3


def share_of(pixels: int, others: int, least: int, most: int) -> int:
    """Pixels of a program: `most`, halved until with `others` programs for each share there are enough, but `least`.

    The shape alone decides, so that sums have the same bits everywhere.
    """
    share = most
    while share > least and others * -(-pixels // share) < BUSY:
        share //= 2
    return share
