"""The losses by name: for configurations, and for people who look for one."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from medkd_fast.losses.at import ATLoss
from medkd_fast.losses.boundary import BoundaryKDLoss
from medkd_fast.losses.calls import COMPARES
from medkd_fast.losses.cirkd import CIRKDLoss
from medkd_fast.losses.common import DistillationLoss
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

#: Names in configurations, those of the two papers first, then logits, then features, each by year.
LOSSES: dict[str, type[DistillationLoss]] = {
    "cpkd": CPKDLoss,
    "dmd": DMDLoss,
    "kd": KDLoss,
    "cwd": CWDLoss,
    "emkd": EMKDLoss,
    "dsd": DSDLoss,
    "dkd": DKDLoss,
    "dist": DISTLoss,
    "sdd": SDDLoss,
    "boundary_kd": BoundaryKDLoss,
    "fitnet": FitNetLoss,
    "at": ATLoss,
    "skd": SKDLoss,
    "sp": SPLoss,
    "ifvd": IFVDLoss,
    "ickd": ICKDLoss,
    "cirkd": CIRKDLoss,
    "pkd": PKDLoss,
}


class Entry(NamedTuple):
    """A loss in `available()`: its name for `build`, its class, a line on it, its paper, and what it is made for.

    compares: "logits" or "features", what its first two arguments usually are.
    """

    name: str
    loss: type[DistillationLoss]
    summary: str
    source: str
    compares: str


def available() -> list[Entry]:
    """All losses, each with one line and its paper.

    >>> for entry in available()[:3]:
    ...     print(f"{entry.name:<5}{entry.loss.__name__:<9}{entry.source.split(':')[0]}")
    cpkd CPKDLoss Channel-wise and Pixel-wise Relational Distillation (CPKD)
    dmd  DMDLoss  Decoupled Multi-scale Distillation (DMD)
    kd   KDLoss   Distilling the Knowledge in a Neural Network
    """
    return [
        Entry(name, loss, _first_line(loss.__doc__), _first_line(sys.modules[loss.__module__].__doc__), COMPARES[name])
        for name, loss in LOSSES.items()
    ]


def build(name: str, **settings: Any) -> DistillationLoss:
    """The loss of that name, made with these settings: `build("cwd", temperature=4)` is `CWDLoss(temperature=4)`.

    Raises:
        ValueError: no loss has that name; the message lists those that there are.
        TypeError: a setting that the loss does not have, or one that it needs is missing.

    >>> build("dist", beta=2.0).beta
    2.0
    """
    if name not in LOSSES:
        raise ValueError(f"name: got {name!r}, want one of {', '.join(sorted(LOSSES))}")
    try:
        return LOSSES[name](**settings)
    except TypeError as error:
        raise TypeError(f"build({name!r}): {error}; see help(medkd_fast.losses.{LOSSES[name].__name__})") from None


def _first_line(text: str | None) -> str:
    return (text or "").strip().splitlines()[0]
