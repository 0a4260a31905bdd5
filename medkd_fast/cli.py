"""`medkd-fast`: the demo, training, distillation and evaluation from the command line, and what this machine can run.

Heavy imports happen inside the commands, so that `--help` answers at once and a missing extra can be named.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

try:
    import typer
except ModuleNotFoundError:
    sys.exit("SEE main")

if TYPE_CHECKING:
    from medkd_fast.training.runs import RunConfig
