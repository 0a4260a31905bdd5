"""What this machine can run: versions, threads, instruction set, and the backend of every operator. Needs no extra."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from medkd_fast import backend

# module name of each distribution of the extra [train]
EXTRA = {
    "typer": "typer",
    "rich": "rich",
    "pytorch_lightning": "pytorch-lightning",
    "monai": "monai",
    "SimpleITK": "SimpleITK",
    "matplotlib": "matplotlib",
    "tensorboard": "tensorboard",
    "yaml": "PyYAML",
}
INSTALL_EXTRA = 'pip install --no-build-isolation ".[train]"'


def missing_extra() -> list[str]:
    """Distributions of the extra [train] that are not installed; nothing is imported to find out."""
    return [distribution for module, distribution in EXTRA.items() if find_spec(module) is None]


def doctor_lines() -> list[str]:
    """The report, line by line."""
    lines = [
        f"python       {platform.python_version()} on {platform.platform()}",
        f"medkd_fast   {_version('medkd_fast')}",
        f"torch        {torch.__version__}",  # which says for what it was built, where its distribution may not
        *(f"{name:12} {_version(name)}" for name in ("triton", "numpy")),
        f"cpu          {os.cpu_count()} cores, {torch.get_num_threads()} threads, {backend.instruction_set()} instructions",
        f"gpu          {_gpu()}",
        f"[train]      {_extra()}",
        f"demo's CT    {_demo_data()}",
        "",
        f"{'operator':23} {'device':8} {'backend':10} why",
    ]
    return lines + [f"{r.operator:23} {r.device_type:8} {r.backend:10} {r.why}".rstrip() for r in backend.report()]


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if torch.version.cuda is None:
        return "none for this torch, which was built without CUDA"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none found by torch"


def _extra() -> str:
    missing = missing_extra()
    return f"missing {', '.join(missing)}: {INSTALL_EXTRA}" if missing else "complete"


def _demo_data() -> str:
    if missing_extra():
        return "needs the extra [train]"
    from medkd_fast.training.data.dataset import open_dataset
    from medkd_fast.training.errors import WrongUse

    try:
        return str(open_dataset("demo").cases[0].images[0])
    except WrongUse as error:
        return str(error)
