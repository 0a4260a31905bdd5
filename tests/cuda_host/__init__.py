"""The CUDA kernels without a GPU: csrc/cuda compiled by the host's compiler against an emulated launch.

The operators <name>_cuda of that library take CPU tensors. What it cannot show: what the compiler for the device makes of
the sources, its elementary functions, and a race inside a warp between two of its barriers.
"""

from __future__ import annotations

import fcntl
import hashlib
from functools import cache
from pathlib import Path

import torch
from sources import ROOT, setup_script

from medkd_fast import backend

HERE = Path(__file__).parent
# -O1: kernels are large when every loop in them is unrolled, and compiling them is most of the time
FLAGS = ["-x", "c++", "-I", str(HERE), "-O1", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-Wno-subobject-linkage"]


def build(sources: list[Path], name: str) -> Path:
    """A library, compiled unless one of the same content is there; of several processes one compiles, the others wait."""
    setup = setup_script()
    directory = ROOT / "build" / "cuda_host"
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [*setup.compiler().split(), *setup.FLAGS, *FLAGS, *setup.INCLUDES, *setup.TORCH_FLAGS]
        jobs = [(source, [*command, f'-DMEDKD_BACKEND="{name}"']) for source in [*sources, HERE / "emulator.cpp"]]
        objects = setup.compile_objects(
            jobs, directory, [*sorted(HERE.glob("*.h")), *sorted(ROOT.glob("csrc/cuda/*.h"))]
        )
        key = hashlib.sha256(" ".join(path.name for path in objects).encode()).hexdigest()
        target = directory / f"{name}-{key[:16]}.so"
        if not target.exists():
            libraries = [f"-L{setup.TORCH_LIBRARIES}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
            partial = target.with_suffix(".partial")
            setup.run([*setup.compiler().split(), "-shared", "-o", str(partial), *map(str, objects), *libraries])
            partial.replace(target)
    return target


@cache
def load() -> str:
    """Registers the emulated operators and their fake kernels. Returns what does not compile, or an empty string."""
    try:
        library = build([*sorted(ROOT.glob("csrc/cuda/*.cu")), ROOT / "csrc/schema.cpp"], "cuda")
    except setup_script().BuildError as error:
        return str(error)
    torch.ops.load_library(str(library))
    for operator, fake in backend._fakes.items():
        torch.library.register_fake(f"medkd_fast::{operator}_cuda", fake)
    return ""
