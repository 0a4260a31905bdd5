"""The folder for `nnUNet_extTrainer`: nnU-Net imports the modules in it, so that nothing but the trainer is here."""

from __future__ import annotations

import os
import shlex
from pathlib import Path


def export_line() -> str:
    """What a shell must be told so that nnU-Net finds the trainer; folders that `nnUNet_extTrainer` has stay in it.

    >>> export_line()  # doctest: +ELLIPSIS
    'export nnUNet_extTrainer=...nnunet_path'
    """
    here = str(Path(__file__).parent)
    others = [
        folder for folder in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if folder not in ("", here)
    ]
    return f"export nnUNet_extTrainer={shlex.quote(os.pathsep.join([*others, here]))}"
