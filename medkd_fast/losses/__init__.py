"""Distillation losses as modules: thin compositions of `medkd_fast.functional`, one file a paper.

Each is called `loss(student, teacher, target)` and returns a scalar. The parts of the last call lie, detached and not yet
multiplied by their weights, in `loss.parts`, for logs. `available()` lists them, `build(name, **settings)` makes one.
"""

from medkd_fast.losses.at import ATLoss
from medkd_fast.losses.boundary import BoundaryKDLoss
from medkd_fast.losses.catalogue import available, build
from medkd_fast.losses.cirkd import CIRKDLoss
from medkd_fast.losses.cpkd import CPKDLoss
from medkd_fast.losses.cwd import CWDLoss
from medkd_fast.losses.dist import DISTLoss
from medkd_fast.losses.dkd import DKDLoss
from medkd_fast.losses.dmd import DMDLoss
from medkd_fast.losses.dsd import DSDLoss
from medkd_fast.losses.emkd import EMKDLoss
from medkd_fast.losses.fitnet import FitNetLoss
from medkd_fast.losses.ickd import ICKDLoss
from medkd_fast.losses.ifvd import IFVDLoss
from medkd_fast.losses.kd import KDLoss
from medkd_fast.losses.pkd import PKDLoss
from medkd_fast.losses.sdd import SDDLoss
from medkd_fast.losses.skd import SKDLoss
from medkd_fast.losses.sp import SPLoss

__all__ = [
    "ATLoss",
    "BoundaryKDLoss",
    "CIRKDLoss",
    "CPKDLoss",
    "CWDLoss",
    "DISTLoss",
    "DKDLoss",
    "DMDLoss",
    "DSDLoss",
    "EMKDLoss",
    "FitNetLoss",
    "ICKDLoss",
    "IFVDLoss",
    "KDLoss",
    "PKDLoss",
    "SDDLoss",
    "SKDLoss",
    "SPLoss",
    "available",
    "build",
]
