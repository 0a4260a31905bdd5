"""How a loss is called: which maps it compares, whether it takes labels, and by which names it takes lists of layers."""

from __future__ import annotations

import inspect
from typing import NamedTuple

from torch import nn

#: Which loss compares what by its first two arguments: the networks' "logits", or any layers' "features".
COMPARES = {
    "cpkd": "features",
    "dmd": "logits",
    "kd": "logits",
    "cwd": "logits",
    "emkd": "logits",
    "dsd": "logits",
    "dkd": "logits",
    "dist": "logits",
    "sdd": "logits",
    "boundary_kd": "logits",
    "fitnet": "features",
    "at": "features",
    "skd": "features",
    "sp": "features",
    "ifvd": "features",
    "ickd": "features",
    "cirkd": "features",
    "pkd": "features",
}
#: The named arguments that take lists of layers, [B, c, *s] each, and whose layers they are.
LISTS = {"features": "student", "student_features": "student", "teacher_features": "teacher"}


class Call(NamedTuple):
    """loss(student, teacher[, target], **lists)."""

    target: bool  # takes labels
    student_list: str | None  # the name of the argument with the student's layers
    teacher_list: str | None
    needs_lists: bool  # or does without


def call_of(loss: type[nn.Module]) -> Call:
    """How this loss is called, read from the arguments of its `forward`: for those of the catalogue and for your own.

    >>> from medkd_fast.losses import DMDLoss, KDLoss
    >>> call_of(KDLoss).target, call_of(DMDLoss).student_list
    (True, 'features')
    """
    arguments = inspect.signature(loss.forward).parameters
    positional = [a for a in arguments.values() if a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD)][
        1:
    ]  # no self
    if len(positional) < 2:
        raise TypeError(f"{loss.__name__}: forward takes {len(positional)} arguments, want (student, teacher) or more")
    names = {whose: name for name, whose in LISTS.items() if name in arguments}
    return Call(
        target=len(positional) > 2 and positional[2].name not in LISTS,
        student_list=names.get("student"),
        teacher_list=names.get("teacher"),
        needs_lists=any(arguments[name].default is inspect.Parameter.empty for name in names.values()),
    )
