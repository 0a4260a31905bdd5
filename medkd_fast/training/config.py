"""All that decides a run's numbers besides the data and the machine; YAML in and out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from medkd_fast.training.data.settings import Preprocessing
from medkd_fast.training.distillation import LossTerm, check_terms
from medkd_fast.training.errors import WrongUse
from medkd_fast.training.files import write_atomically

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}  # in Lightning's words
SEEDS = 2**32  # what numpy takes
_WHOLE = ("epochs", "steps", "batch_size", "num_nodes")


@dataclass(frozen=True)
class RunConfig:
    """The configuration of a run.

    data, layout: for `open_dataset`. network, network_args: for `build_network`.
    preprocessing: what was asked for, as a mapping; in a run's folder and in `Trained` a `Preprocessing` with every choice
        made. patch: spatial size of what is trained on; None is chosen from the volumes.
    fractions, split_seed: how patients are shared out, where the data set brings no split; None takes the teacher's, else
        0.7, 0.1, 0.2 and 0. The seed is not the run's: runs with several seeds are tested on the same patients.
    An epoch is `steps` optimiser steps of `batch_size` slices or patches a process. patience: epochs without a better
        validation Dice before training stops. precision: "32", "bf16" or "fp16".
    teacher: a run's folder or a checkpoint. losses: none without a teacher. cache_teacher: take the teacher's logits of the
        unaugmented volumes from disk. teacher_sha256: filled in by `fit`; another teacher is another run.
    workers: processes that draw the batches; they do not change them.
    devices, num_nodes, strategy, accelerator: for Lightning's Trainer.
    """

    data: str
    layout: str | None = None
    network: str = "BasicUNet"
    network_args: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing | Mapping[str, Any] = field(default_factory=dict)
    patch: tuple[int, ...] | None = None
    fractions: tuple[float, float, float] | None = None
    split_seed: int | None = None
    epochs: int = 100
    steps: int = 50
    batch_size: int = 4
    learning_rate: float = 3e-3
    patience: int | None = None
    seed: int = 0
    precision: str = "32"
    compile: bool = False
    teacher: str | None = None
    teacher_sha256: str | None = None
    losses: tuple[LossTerm, ...] = ()
    cache_teacher: bool = False
    workers: int = 0
    devices: int = 1
    num_nodes: int = 1
    strategy: str = "auto"
    accelerator: str = "auto"

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            want = _TYPES.get(f.type)
            if want and (not isinstance(value, want) or (isinstance(value, bool) and bool not in want)):
                raise WrongUse(f"{f.name} must be {_words(want)}, got {value!r}")
            if f.type in ("str", "str | None") and value is not None:
                _set(self, f.name, str(value))  # 32 is a number in YAML
        for name in _WHOLE:
            if getattr(self, name) < 1:
                raise WrongUse(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.workers < 0:
            raise WrongUse(f"workers must be >= 0, got {self.workers}")
        if self.devices < 1 and self.devices != -1:
            raise WrongUse(f"devices must be >= 1, or -1 for all, got {self.devices}")
        if not 0 <= self.learning_rate < float("inf"):
            raise WrongUse(f"learning_rate must be a finite number >= 0, got {self.learning_rate}")
        if self.patience is not None and self.patience < 1:
            raise WrongUse(f"patience must be >= 1 epoch, got {self.patience}; leave it out to train to the end")
        if self.precision not in PRECISIONS:
            raise WrongUse(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        for name in ("seed", "split_seed"):
            if not 0 <= (getattr(self, name) or 0) < SEEDS:
                raise WrongUse(f"{name} must be >= 0 and < {SEEDS}, got {getattr(self, name)}")
        _set(self, "patch", _tuple("patch", self.patch, (2, 3), int))
        _set(self, "fractions", _tuple("fractions", self.fractions, (3,), (int, float)))
        if isinstance(self.preprocessing, Mapping):
            _check_preprocessing(self.preprocessing)
        _set(
            self, "losses", check_terms([t if isinstance(t, LossTerm) else LossTerm.from_dict(t) for t in self.losses])
        )
        if bool(self.losses) != bool(self.teacher):
            raise WrongUse("distillation losses need a teacher, and a teacher needs a loss: give both")
        if self.cache_teacher and not self.teacher:
            raise WrongUse("cache_teacher needs a teacher: it is for distillation")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for YAML and checkpoints."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        preprocessing = self.preprocessing
        values["preprocessing"] = (
            preprocessing.to_dict() if isinstance(preprocessing, Preprocessing) else dict(preprocessing)
        )
        values["network_args"] = dict(self.network_args)
        values["losses"] = [term.to_dict() for term in self.losses]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Raises WrongUse for a setting that there is not.

        >>> config = RunConfig("demo", teacher="runs/teacher", losses=["cpkd:0.5"], patch=[64, 64])
        >>> RunConfig.from_dict(config.to_dict()) == config
        True
        """
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise WrongUse(f"unknown setting {unknown[0]!r}: choose from {', '.join(known)}")
        if not values.get("data"):
            raise WrongUse("no data set: give a folder, a CSV file, or a built-in data set such as demo")
        return cls(**values)

    def resolved(self, **changes: Any) -> RunConfig:
        """A copy with the choices that the data, the networks and the teacher have made."""
        return replace(self, **changes)


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, such as the config.yaml of a run. Raises WrongUse where it is none."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WrongUse(f"the configuration {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise WrongUse(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise WrongUse(f"{path} must hold settings, one `name: value` a line, got {type(values).__name__}")
    return values


def write_yaml(path: Path, config: RunConfig) -> None:
    text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of which the later ones win; those of the preprocessing one by one.

    >>> merged({"seed": 1, "preprocessing": {"dims": 3}}, {"preprocessing": {"size": [9, 9]}})
    {'seed': 1, 'preprocessing': {'dims': 3, 'size': [9, 9]}}
    """
    result: dict[str, Any] = {}
    for layer in layers:
        inner = {**result.get("preprocessing", {}), **(layer.get("preprocessing") or {})}
        result |= layer
        if inner:
            result["preprocessing"] = inner
    return result


_TYPES: dict[Any, tuple[type, ...]] = {
    "str": (str, int),  # the precision 32 and names that are a number
    "str | None": (str, int, type(None)),
    "int": (int,),
    "int | None": (int, type(None)),
    "float": (float, int),
    "bool": (bool,),
    "Mapping[str, Any]": (Mapping,),
    "Preprocessing | Mapping[str, Any]": (Preprocessing, Mapping),
    "tuple[LossTerm, ...]": (list, tuple),
}


def _words(types: Sequence[type]) -> str:
    names = {
        "str": "text",
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "NoneType": "nothing",
    }
    return " or ".join(names.get(t.__name__, t.__name__.lower()) for t in types)


def _check_preprocessing(values: Mapping[str, Any]) -> None:
    """Raises WrongUse for what is no number, or not as many as there must be; `Preprocessing` looks at the rest."""
    for name, (count, kind) in _NUMBERS.items():
        value = values.get(name)
        if value is None:
            continue
        given = value if isinstance(value, (list, tuple)) else (value,)
        if len(given) != count or not all(isinstance(v, kind) and not isinstance(v, bool) for v in given):
            what = "whole numbers" if kind is int else "numbers"
            raise WrongUse(f"{name} must be {count} {what}, got {value!r}")
    words = values.get("intensity")
    if words is not None and not all(
        isinstance(w, str) for w in (words if isinstance(words, (list, tuple)) else [words])
    ):
        raise WrongUse(f"intensity must be one word a channel, got {words!r}")


_NUMBERS: dict[str, tuple[int, Any]] = {
    "spacing": (3, (int, float, type(None))),
    "size": (2, int),
    "window": (2, (int, float)),
    "percentiles": (2, (int, float)),
}


def _tuple(name: str, value: Any, lengths: tuple[int, ...], kind: Any) -> tuple | None:
    if value is None:
        return None
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if len(values) not in lengths or not all(
        isinstance(v, kind) and not isinstance(v, bool) and v >= 0 for v in values
    ):
        numbers = "whole numbers" if kind is int else "numbers"
        raise WrongUse(f"{name} must be {' or '.join(map(str, lengths))} {numbers} >= 0, got {value!r}")
    return values


def _set(config: RunConfig, name: str, value: Any) -> None:
    object.__setattr__(config, name, value)
