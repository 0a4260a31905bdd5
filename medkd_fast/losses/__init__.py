"""Distillation losses as modules: thin compositions of `medkd_fast.functional`, one file a paper.

Each is called `loss(student, teacher, target)` and returns a scalar. The parts of the last call lie, detached and not yet
multiplied by their weights, in `loss.parts`, for logs.
"""

from medkd_fast.losses.cpkd import CPKDLoss
from medkd_fast.losses.dkd import DKDLoss
from medkd_fast.losses.dmd import DMDLoss
from medkd_fast.losses.kd import KDLoss

__all__ = ["CPKDLoss", "DKDLoss", "DMDLoss", "KDLoss"]
