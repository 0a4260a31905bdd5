"""The distillation losses that a run names, such as `cpkd` or `dmd:0.1,feature_weight=0.5`: on which layers, with which weight."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from medkd_fast.distiller import Distiller, Term
from medkd_fast.layers import find_layers
from medkd_fast.losses.calls import COMPARES, call_of
from medkd_fast.losses.catalogue import LOSSES
from medkd_fast.training.errors import WrongUse
from medkd_fast.training.networks import Layer, Survey, parse_value

#: What a loss weighs where the run does not say. cpkd and dmd were chosen on the demo's CT, on other seeds than it shows;
#: the others are the authors' or a named table's, see docs/losses.md.
DEFAULT_WEIGHTS = {
    "cpkd": 0.3,
    "dmd": 0.1,
    "kd": 1.0,
    "cwd": 3.0,
    "emkd": 1.0,
    "dsd": 1.0,
    "dkd": 1.0,
    "dist": 1.0,
    "sdd": 1.0,
    "boundary_kd": 1.0,
    "fitnet": 100.0,
    "at": 1000.0,
    "skd": 0.5,
    "sp": 3000.0,
    "ifvd": 200.0,
    "ickd": 2.5,
    "cirkd": 1.0,
    "pkd": 10.0,
}
WEIGHT_ON_FEATURES = {"cwd": 50.0}
#: Settings that go with these weights and are not the loss's own defaults.
DEFAULT_SETTINGS = {"kd": {"temperature": 1.0}, "dsd": {"category_weight": 10.0, "pixel_weight": 1000.0}}


@dataclass(frozen=True)
class LossTerm:
    """One distillation loss of a run. None and () are filled in by `resolve`.

    Raises WrongUse for a loss that there is not, and for what its constructor refuses.

    name: of `medkd_fast.losses.available()`. student, teacher: layers; none for what compares the networks' outputs.
    warm_up: steps over which the weight rises from 0. settings: for the loss's constructor.
    """

    name: str
    weight: float | None = None
    student: tuple[str, ...] = ()
    teacher: tuple[str, ...] = ()
    warm_up: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for side in ("student", "teacher"):
            names = getattr(self, side)
            object.__setattr__(self, side, (names,) if isinstance(names, str) else tuple(names))
        if self.name not in LOSSES:
            raise WrongUse(f"unknown distillation loss {self.name!r}: choose from {', '.join(LOSSES)}")
        if self.weight is not None and not (_is_number(self.weight) and 0 < self.weight < float("inf")):
            raise WrongUse(f"the weight of {self.name} must be positive and finite, got {self.weight}")
        if isinstance(self.warm_up, bool) or not isinstance(self.warm_up, int) or self.warm_up < 0:
            raise WrongUse(f"warm_up of {self.name} must be a number of steps >= 0, got {self.warm_up!r}")
        known = [n for n in inspect.signature(LOSSES[self.name]).parameters if n not in _FILLED_IN]
        for setting in self.settings:
            if setting not in known:
                raise WrongUse(
                    f"{self.name} has no setting {setting!r}: choose from weight, student, teacher, warm_up, {', '.join(known)}"
                )
        _check_settings(self)

    def to_dict(self) -> dict[str, Any]:
        """For YAML, without what was not said.

        >>> LossTerm("kd", 0.5).to_dict()
        {'name': 'kd', 'weight': 0.5}
        """
        values = asdict(self) | {"student": list(self.student), "teacher": list(self.teacher)}
        return {k: v for k, v in values.items() if v or k == "name"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | str) -> LossTerm:
        """From a mapping, or from text as on the command line."""
        if isinstance(values, str):
            return parse_loss(values)
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown or "name" not in values:
            raise WrongUse(f"a loss is a mapping of {', '.join(cls.__dataclass_fields__)}, got {dict(values)}")
        return cls(**values)


# what the networks and the data say, not the user
_FILLED_IN = (
    "num_classes",
    "feature_channels",
    "spatial_dims",
    "student_channels",
    "teacher_channels",
    "ignore_index",
    "process_group",
)


def _check_settings(term: LossTerm) -> None:
    """Makes the loss, with classes and channels that stand for what the networks will say: it checks its own settings."""
    stand_in = {"num_classes": 3, "feature_channels": [1], "spatial_dims": 2}
    with torch.random.fork_rng(devices=[]):
        try:
            LOSSES[term.name](**_accepted(term, stand_in))
        except ValueError as error:
            raise WrongUse(f"{term.name}: {error}") from error


def parse_loss(text: str) -> LossTerm:
    """`name[:weight][:key=value,...]`: weight, student, teacher and warm_up are the term's, the others the loss's own.

    A value with commas is a list. Raises WrongUse for what it does not understand.

    >>> parse_loss("cpkd:0.5")
    LossTerm(name='cpkd', weight=0.5, student=(), teacher=(), warm_up=0, settings={})
    >>> parse_loss("dmd:student=upcat_4,upcat_3,temperature=2").student
    ('upcat_4', 'upcat_3')
    """
    name, _, rest = text.partition(":")
    given: dict[str, list[str]] = {}
    key = "weight"
    for part in rest.replace(":", ",").split(",") if rest else []:
        word, equals, value = part.partition("=")
        if equals:
            key = word.strip()
            if key in given:
                raise WrongUse(f"{name}: {key} is given twice: give it once")
        elif not given:
            value = part
        else:  # goes on with the list of the key before
            given[key].append(part)
            continue
        given[key] = [value]
    layers = {side: tuple(v.strip() for v in given.pop(side, [])) for side in ("student", "teacher")}
    values = {k: parse_value(",".join(v)) for k, v in given.items()}
    weight = values.pop("weight", None)
    if weight is not None and not _is_number(weight):
        raise WrongUse(f"the weight of {name} must be a number, got {weight!r}: write {name}:0.5, or {name}:key=value")
    return LossTerm(name, weight, **layers, warm_up=values.pop("warm_up", 0), settings=values)


def check_terms(terms: Sequence[LossTerm]) -> tuple[LossTerm, ...]:
    """Raises WrongUse where the same loss is there twice on the same layers."""
    for i, term in enumerate(terms):
        if any((t.name, t.student, t.teacher) == (term.name, term.student, term.teacher) for t in terms[:i]):
            raise WrongUse(f"the loss {term.name} is given twice: give it once, with its weight")
    return tuple(terms)


def resolve(terms: Sequence[LossTerm], student: Survey, teacher: Survey) -> tuple[LossTerm, ...]:
    """The terms with every weight, layer and setting said.

    A loss on features takes, where no layer is named, the finest decoder layer below the full size and the teacher's of that
    size (of the nearest, where there is none); one on lists of layers takes all decoder layers below the full size.

    Raises WrongUse, with layers to choose from, where there is no such layer or none can be guessed.
    """
    return tuple(_resolved(term, student, teacher) for term in terms)


def describe(term: LossTerm) -> str:
    """A resolved term in words.

    >>> describe(LossTerm("cpkd", 0.3, ("upcat_2",), ("up_layers.1",)))
    'cpkd, weight 0.3, between upcat_2 and up_layers.1'
    >>> describe(LossTerm("kd", 1.0, settings={"temperature": 1.0}))
    'kd, weight 1, between the logits, temperature 1.0'
    """
    where = "between the logits"
    if term.student:
        where = f"between {', '.join(term.student)} and {', '.join(term.teacher) or 'the logits'}"
    return ", ".join([f"{term.name}, weight {term.weight:g}", where, *(f"{k} {v}" for k, v in term.settings.items())])


def make_distiller(
    terms: Sequence[LossTerm],
    *,
    student: nn.Module,
    teacher: nn.Module,
    surveys: tuple[Survey, Survey],
    ignore_index: int | None,
    seed: int,
) -> Distiller:
    """The student with its resolved losses; what these train along (adapters, projectors) is drawn from `seed` alone.

    surveys: of the student and of the teacher. Statistics over a batch are those of all processes' batches.
    """
    found = [made for term in terms for made in _terms(term, *surveys, ignore_index)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return Distiller(teacher, student, found)
        except (ValueError, TypeError) as error:
            raise WrongUse(f"distillation: {error}") from error


def _resolved(term: LossTerm, student: Survey, teacher: Survey) -> LossTerm:
    takes = call_of(LOSSES[term.name])
    students, teachers = term.student, term.teacher
    if students or teachers:
        students = _found(students or teachers, student, "student", term.name)
    elif takes.student_list:
        levels = _below_full_size(student)
        if not levels and takes.needs_lists:
            raise _no_layer(term.name, student, "student")
        if not takes.needs_lists and len(levels) < 2:  # dsd compares pairs of layers, or none
            levels = student.decoder() if len(student.decoder()) > 1 else []
        students = tuple(x.name for x in levels)
    elif COMPARES[term.name] == "features":
        levels = _below_full_size(student)
        if not levels:
            raise _no_layer(term.name, student, "student")
        students = (levels[-1].name,)
    if students and takes.student_list and not takes.teacher_list:
        teachers = ()  # the student's layers learn from the teacher's logits
    elif teachers:
        teachers = _found(teachers, teacher, "teacher", term.name)
    elif students:
        teachers = tuple(_partner(student[name], teacher, term.name) for name in students)
    if teachers and len(students) != len(teachers):
        raise WrongUse(
            f"{term.name} has {len(students)} layers of the student ({', '.join(students)}) and {len(teachers)} of the teacher "
            f"({', '.join(teachers)}): name as many of both"
        )
    weights = DEFAULT_WEIGHTS | (WEIGHT_ON_FEATURES if students else {})
    weight = weights[term.name] if term.weight is None else term.weight
    settings = DEFAULT_SETTINGS.get(term.name, {}) | dict(term.settings)
    return replace(term, weight=float(weight), student=students, teacher=teachers, settings=settings)


def _terms(term: LossTerm, student: Survey, teacher: Survey, ignore_index: int | None) -> list[Term]:
    """A resolved term as the distiller's: one for a list of layers, else one for every pair of layers or for the outputs."""
    known: dict[str, Any] = {
        "num_classes": student.logits[1],
        "spatial_dims": len(student.logits) - 2,
        "feature_channels": [student[name].channels for name in term.student],
        "sync": True,  # without a distributed run it is nothing
    }
    if ignore_index is not None:
        known["ignore_index"] = ignore_index
    common = {"weight": term.weight, "warm_up": term.warm_up}
    if call_of(LOSSES[term.name]).student_list:
        settings = _accepted(term, known)
        lists = {"student_features": term.student, "teacher_features": term.teacher or None}
        return [Term(term.name, **lists, **common, settings=settings)]
    found = []
    for s, t in zip(term.student, term.teacher, strict=True):
        pair = {"student_channels": student[s].channels, "teacher_channels": teacher[t].channels}
        if term.settings.get("channel_weight", 1) == 0:  # cpkd's pixel part needs no adapter, which would learn nothing
            pair = {}
        found.append(Term(term.name, s, t, **common, settings=_accepted(term, known | pair)))
    return found or [Term(term.name, **common, settings=_accepted(term, known))]


def _accepted(term: LossTerm, known: Mapping[str, Any]) -> dict[str, Any]:
    asked = inspect.signature(LOSSES[term.name]).parameters
    return {k: v for k, v in known.items() if k in asked} | dict(term.settings)


def _found(patterns: Sequence[str], network: Survey, whose: str, loss: str) -> tuple[str, ...]:
    """Names of layers for names and wildcards. Raises WrongUse for what gives no map."""
    names: list[str] = []
    for pattern in patterns:
        try:
            names += find_layers(network.network, pattern, f"the layers of the {whose} for {loss}")
        except ValueError as error:
            raise WrongUse(str(error)) from error
    for name in names:
        if name not in network:
            raise _no_layer(loss, network, whose, f"{name!r} gives no map [B, C, *S]")
    return tuple(names)


def _below_full_size(network: Survey) -> list[Layer]:
    """The decoder's layers from coarse to fine without that of the full size, which is next to the logits, if there are others."""
    levels = network.decoder()
    return [x for x in levels if x.size != network.logits[2:]] or levels


def _partner(layer: Layer, teacher: Survey, loss: str) -> str:
    """The teacher's layer for one of the student's: of the same name and size, else the decoder's of the nearest size."""
    if layer.name in teacher and teacher[layer.name].size == layer.size:
        return layer.name
    levels = teacher.decoder()
    if not levels:
        raise _no_layer(loss, teacher, "teacher")
    return min(levels, key=lambda x: max(x.pixels / layer.pixels, layer.pixels / x.pixels)).name


def _no_layer(loss: str, network: Survey, whose: str, why: str = "none could be guessed") -> WrongUse:
    choice = ", ".join(f"{x.name} {list(x.shape[1:])}" for x in network.candidates())
    return WrongUse(
        f"{loss} needs a layer of the {whose}, and {why}: name it, --loss {loss}:student=LAYER,teacher=LAYER; "
        f"layers of the {whose} that give maps: {choice}"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
