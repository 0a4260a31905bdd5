"""Checks of what a loss is made with, in the operators' words: who is wrong hears it before the first call."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from medkd_fast.ops import common


def check_number(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"{name}: got {value!r}, want a finite number")


def check_temperature(temperature: Any) -> None:
    check_number(temperature=temperature)
    common.check_temperature(temperature)


def check_power(name: str, power: Any) -> None:
    check_number(**{name: power})
    common.check_power(name, power)


def is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_whole(name: str, value: Any, at_least: int | None = None) -> None:
    if not is_whole(value) or at_least is not None and value < at_least:
        bound = "" if at_least is None else f" of at least {at_least}"
        raise ValueError(f"{name}: got {value!r}, want a whole number{bound}")


def check_flag(name: str, value: Any) -> None:
    if value not in (True, False):
        raise ValueError(f"{name}: got {value!r}, want True or False")
