"""Attaches distillation losses to named layers of any teacher and student."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from medkd_fast.layers import Caught, attach, find_layers, unwrapped
from medkd_fast.losses.calls import Call, call_of
from medkd_fast.losses.catalogue import LOSSES, build
from medkd_fast.losses.common import AdaptedLoss, weighted

if TYPE_CHECKING:
    from typing_extensions import Self

#: Names or wildcards of layers.
Layers = str | Sequence[str]


@dataclass(frozen=True)
class Term:
    """A weighted loss between a layer of the student and one of the teacher.

    Args:
        loss: a module called as loss(student, teacher[, target]), such as those of `medkd_fast.losses`; or the name of one of
            them, which is made with `settings` and with the channels, classes and dimensions that the networks have.
        student: name of the layer, as `named_modules()` lists it, or a wildcard that means one layer ("" is the network's
            output). Of a list, tuple or dictionary the finest map is taken.
        teacher: the same of the teacher; without it, the student's name.
        weight: factor of the loss.
        warm_up: over so many steps (runs in training mode) the weight rises linearly to `weight`.
        student_features: for losses that take lists of layers (DMD, DSD, EMKD): names or wildcards, in the order of the list.
        teacher_features: the same of the teacher; without it, the student's names.
        name: in logs; without it, the loss's in `medkd_fast.losses.available()` or its class.
        settings: arguments for a loss given by name.

    >>> Term("cwd", weight=3.0, warm_up=500, settings={"temperature": 2.0}).weight
    3.0
    """

    loss: nn.Module | str
    student: str = ""
    teacher: str | None = None
    weight: float = 1.0
    warm_up: int = 0
    student_features: Layers = ()
    teacher_features: Layers | None = None
    name: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.loss, str) and self.loss not in LOSSES:
            raise ValueError(f"loss: got {self.loss!r}, want a loss or one of {', '.join(sorted(LOSSES))}")
        if not isinstance(self.loss, str | nn.Module):
            raise TypeError(
                f"loss: got {self.loss!r}, want a loss such as DKDLoss(), any nn.Module, or a name such as 'dkd'"
            )
        if self.settings and not isinstance(self.loss, str):
            raise ValueError("settings: go with a loss given by name; this one is made already")
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight: got {self.weight}, want a finite number of at least 0")
        if self.warm_up < 0:
            raise ValueError(f"warm_up: got {self.warm_up}, want a number of steps, 0 for none")


class Distiller(nn.Module):
    """A student with the losses that let it learn from a teacher. Calling it runs the student, and the teacher beside it.

    The teacher runs in eval mode without gradients, under the autocast of the student. It is no submodule: neither
    `parameters()` nor `state_dict()` nor `train()` know it; `to()` moves it. Of several teachers a term is the mean.

    Args:
        teacher: a network, or several. It is called with what the student is called with.
        student: the network to train.
        terms: what to compare.
        example: images that the networks take, for one run without a trace that shows their channels. Needed where student and
            teacher have other numbers of channels and the loss needs an adapter, or where a loss given by name asks for
            numbers that only the networks know ("dmd", "emkd", "ifvd").

    `kd.parameters()` are those of the student and of what losses train along: adapters, projectors. Give them to the optimiser, and
    under DDP wrap the distiller, not the student. Where a trainer calls the student itself, `kd.loss` works as well: the layers
    are caught whenever the student runs in training mode, and `kd.loss` runs the teacher, under the autocast around it.
    Losses are copied: a term may be used again.

    Raises:
        ValueError: a layer that does not exist or a wildcard that means several where one is wanted; or a module that teacher
            and student share.
        TypeError: terms that are no Terms.

    >>> from medkd_fast.losses import CPKDLoss, DKDLoss
    >>> teacher = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))
    >>> student = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    >>> images, labels = torch.rand(2, 1, 16, 16), torch.zeros(2, 16, 16, dtype=torch.long)
    >>> kd = Distiller(teacher, student, [Term(CPKDLoss(), student="1"), Term(DKDLoss(), weight=0.1)], example=images)
    >>> logits = kd(images)
    >>> loss = nn.functional.cross_entropy(logits, labels) + kd.loss(labels)
    >>> sorted(kd.log()), [name for name, _ in kd.named_parameters() if "adapter" in name]
    (['cpkd', 'dkd'], ['losses.0.0.adapter.weight'])
    """

    step: torch.Tensor

    def __init__(
        self,
        teacher: nn.Module | Sequence[nn.Module],
        student: nn.Module,
        terms: Sequence[Term],
        *,
        example: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        # in a tuple, where nn.Module does not look for submodules
        several = isinstance(teacher, nn.ModuleList) or not isinstance(teacher, nn.Module)
        self.teachers: tuple[nn.Module, ...] = tuple(cast(Any, teacher)) if several else (cast(nn.Module, teacher),)
        self.student = student
        self.terms = _checked(terms)
        if not self.terms or not self.teachers:
            raise ValueError(
                f"got {len(self.teachers)} teachers and {len(self.terms)} terms, want at least one of each"
            )
        for network in self.teachers:
            _check_apart(unwrapped(network), unwrapped(student))
        self.names = _names(self.terms)
        self._calls = [_call(term) for term in self.terms]
        self._student_layers = self._layers(student, "student")
        self._teacher_layers = [self._layers(network, "teacher") for network in self.teachers]
        self._of_student = Caught("student")
        self._of_teachers = [Caught("teacher") for _ in self.teachers]
        self._handles: list[RemovableHandle] = []
        weakref.finalize(self, _remove, self._handles).atexit = False
        self._values: dict[str, torch.Tensor] = {}
        if any(term.warm_up for term in self.terms):
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        try:
            self._attach(student, self._student_layers, self._of_student)
            for network, layers, caught in zip(self.teachers, self._teacher_layers, self._of_teachers, strict=True):
                self._attach(network.eval(), layers, caught)
            if example is not None:
                self._dry_run(example)
            self.losses = nn.ModuleList(
                nn.ModuleList(self._make(i, which) for which in range(len(self.teachers)))
                for i in range(len(self.terms))
            )
        except Exception:
            self.close()  # leaves no hooks behind
            raise
        self._clear()
        if isinstance(student, nn.parallel.DistributedDataParallel) and any(True for _ in self.losses.parameters()):
            self.close()
            raise ValueError(
                "the student is in DistributedDataParallel, which does not know the adapters of the losses: give the distiller the "
                "student itself, and DistributedDataParallel the distiller"
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The student's output. In training mode the teacher runs on the same input."""
        self._of_student.in_eval = True
        try:
            output = self.student(*args, **kwargs)
        finally:
            self._of_student.in_eval = False
        if self.training and self._of_student.inputs is not None:  # else it is closed
            self._ask_teachers()
        return output

    def loss(self, target: torch.Tensor | Sequence[torch.Tensor] | None = None) -> torch.Tensor:
        """Σ weight · loss of the student's last run, a scalar.

        target: labels [B, *S] or [B, 1, *S], integers, for losses that take them; of a list (deep supervision) the finest.

        Raises:
            RuntimeError: the student has not run since the last call, or a layer did not run with it.
            ValueError: a layer of the student came without a gradient, or maps that a loss cannot compare.
        """
        if self._of_student.inputs is None:
            raise RuntimeError(
                "the student has not run since the last loss: call the distiller (or, in training mode, the student) with "
                "images first. After close() there is nothing to compare"
            )
        try:
            if not self._of_student.answered:
                self._ask_teachers()
            if target is not None and not isinstance(target, torch.Tensor):
                target = max(target, key=lambda x: math.prod(x.shape[1:]))
            trains = torch.is_grad_enabled() and self._trains()
            values = []
            self._values = {}
            for i, term in enumerate(self.terms):
                results = [self._compare(i, which, target, trains) for which in range(len(self.teachers))]
                value = results[0] if len(results) == 1 else torch.stack(results).mean()
                self._values[self.names[i]] = value.detach()
                values.append(weighted(value, self._weight(term)))
        finally:  # an error leaves nothing that the next step could take for its own
            self._clear()
        return values[0] if len(values) == 1 else torch.stack(values).sum()

    def log(self, parts: bool = False) -> dict[str, torch.Tensor]:
        """The terms of the last loss by name, detached and before their weights; with `parts`, also those of each, "name/part"."""
        values = dict(self._values)
        if parts and values:
            for name, of_term in zip(self.names, self.losses, strict=True):
                found = [getattr(loss, "parts", {}) for loss in cast(nn.ModuleList, of_term)]
                for part in found[0]:
                    values[f"{name}/{part}"] = torch.stack([one[part] for one in found]).mean()
        return values

    def close(self) -> None:
        """Takes the hooks off the networks, which stay as they are; `loss` has nothing to compare any more."""
        _remove(self._handles)
        self._clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """What `to`, `cuda`, `double` and their like call: the teachers go along."""
        for network in self.teachers:
            network._apply(fn)
        super()._apply(fn, recurse)
        return self

    def _layers(self, network: nn.Module, whose: str) -> list[_Layers]:
        return [
            _layers(unwrapped(network), term, call, whose) for term, call in zip(self.terms, self._calls, strict=True)
        ]

    def _attach(self, network: nn.Module, layers: Sequence[_Layers], caught: Caught) -> None:
        names = [name for of_term in layers for name in (of_term.map, *of_term.features)]
        self._handles += attach(unwrapped(network), names, caught)

    def _clear(self) -> None:
        for caught in (self._of_student, *self._of_teachers):
            caught.clear()  # keeps no graph alive

    def _ask_teachers(self) -> None:
        assert self._of_student.inputs is not None
        args, kwargs = self._of_student.inputs
        if self.training and "step" in self._buffers:
            self.step += 1
        with torch.no_grad():
            for network, caught in zip(self.teachers, self._of_teachers, strict=True):
                if any(module.training for module in network.modules()):
                    network.eval()
                caught.in_eval = True  # here alone: who runs a teacher elsewhere has other images
                try:
                    network(*args, **kwargs)
                finally:
                    caught.in_eval = False
        self._of_student.answered = True

    def _weight(self, term: Term) -> float | torch.Tensor:
        """A rising weight is computed on the device: a captured graph and a compiled loss see it rise."""
        return _risen(self.step, term.warm_up, float(term.weight)) if term.warm_up else term.weight

    def _trains(self) -> bool:
        """Whether the student's last run has a graph."""
        if self._of_student.has_graph():
            return True
        if self.training and any(weight.requires_grad for weight in self.student.parameters()):
            raise ValueError(
                "student: its output came without a gradient: it ran last under no_grad; run it with a gradient, or, where none is "
                "wanted, call eval() on the distiller or take the loss under no_grad"
            )
        return False

    def _compare(self, i: int, which: int, target: torch.Tensor | None, trains: bool) -> torch.Tensor:
        call, loss = self._calls[i], cast(nn.ModuleList, self.losses[i])[which]
        student = self._maps(self._of_student, self._student_layers[i], call.student_list)
        teacher = self._maps(self._of_teachers[which], self._teacher_layers[which][i], call.teacher_list)
        if trains and not student[0].requires_grad:
            raise ValueError(
                f"student: the layer {self._student_layers[i].map!r} came without a gradient: it ran under no_grad, its weights "
                "are frozen, or it is inside a reentrant checkpoint, where use_reentrant=False helps"
            )
        labels = (target,) if call.target else ()
        value: torch.Tensor = loss(student[0], teacher[0], *labels, **student[1], **teacher[1])
        return value

    @staticmethod
    def _maps(caught: Caught, layers: _Layers, name: str | None) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
        """The map that is compared, and the list of features under the name that the loss has for it."""
        features = {name: [caught.map(layer) for layer in layers.features]} if name and layers.features else {}
        return caught.map(layers.map), features

    def _dry_run(self, example: torch.Tensor) -> None:
        """Runs every network once; statistics of normalisations and random numbers are afterwards what they were."""
        if example.shape[0] == 1:
            example = torch.cat([example, example])  # one image is too few for batch statistics of a 1×1 map
        for network, caught in zip((self.student, *self.teachers), (self._of_student, *self._of_teachers), strict=True):
            at = next(network.parameters(), example)
            buffers = [buffer.clone() for buffer in network.buffers()]
            caught.in_eval = True
            with torch.no_grad(), torch.random.fork_rng([at.device] if at.device.type == "cuda" else []):
                try:
                    network(example.to(at.device))
                finally:
                    caught.in_eval = False
                    for buffer, before in zip(network.buffers(), buffers, strict=True):
                        buffer.copy_(before)

    def _make(self, i: int, which: int) -> nn.Module:
        """The loss of a term and a teacher, a copy of its own, with an adapter where a dry run showed that it needs one."""
        term, student_layers, teacher_layers = self.terms[i], self._student_layers[i], self._teacher_layers[which][i]
        if isinstance(term.loss, str):
            loss: nn.Module = build(term.loss, **self._settings(term, student_layers, self._of_teachers[which]))
        else:
            group = getattr(term.loss, "process_group", None)  # cannot be copied
            loss = copy.deepcopy(term.loss, {id(group): group})
        if self._of_student.inputs is None:
            return loss.to(next(self.student.parameters(), torch.zeros(())).device)
        student = self._of_student.map(student_layers.map)
        teacher = self._of_teachers[which].map(teacher_layers.map)
        if isinstance(loss, AdaptedLoss) and student.shape[1] != teacher.shape[1]:
            loss.adapt(student.shape[1], teacher.shape[1])
        return loss.to(student)

    def _settings(self, term: Term, layers: _Layers, of_teacher: Caught) -> dict[str, Any]:
        """The settings of a loss given by name: the term's, and what it asks for and only the networks know."""
        assert isinstance(term.loss, str)
        asked = inspect.signature(LOSSES[term.loss]).parameters
        known: dict[str, Callable[[], Any]] = {}
        if self._of_student.inputs is not None:
            known["num_classes"] = lambda: of_teacher.map("").shape[1]
            known["feature_channels"] = lambda: [self._of_student.map(layer).shape[1] for layer in layers.features]
            known["spatial_dims"] = lambda: self._of_student.map("").dim() - 2
        settings = {name: value() for name, value in known.items() if name in asked and name not in term.settings}
        settings |= term.settings
        missing = [n for n, a in asked.items() if a.default is inspect.Parameter.empty and n not in settings]
        if missing:
            raise ValueError(
                f"loss {term.loss!r}: needs {' and '.join(missing)}; give them in the term's settings, or the distiller an "
                "example of the images: example=images"
            )
        return settings


@torch.library.custom_op("medkd_fast::risen", mutates_args=())
def _risen(step: torch.Tensor, warm_up: int, weight: float) -> torch.Tensor:
    """The weight of a term so many steps after it began to rise; an operator, because the backward of a compiled step would compute
    it again, from a number of steps that has gone on since."""
    return torch.clamp(step / warm_up, max=1) * weight


@_risen.register_fake
def _(step: torch.Tensor, warm_up: int, weight: float) -> torch.Tensor:
    return step.new_empty((), dtype=torch.get_default_dtype())


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _checked(terms: Sequence[Term]) -> tuple[Term, ...]:
    if not isinstance(terms, Iterable):
        raise TypeError(f"terms: got {type(terms).__name__}, want a list of Terms, such as [Term('dkd')]")
    found = tuple(terms)
    for term in found:
        if not isinstance(term, Term):
            raise TypeError(f"terms: got {term!r} among them, want a list of Terms, such as [Term('dkd')]")
    return found


def _changes_with_its_mode(module: nn.Module) -> bool:
    """Whether something in it may: what has parameters or buffers, and a dropout."""
    dropout = any(isinstance(x, nn.modules.dropout._DropoutNd) for x in module.modules())
    return dropout or next(itertools.chain(module.parameters(), module.buffers()), None) is not None


def _check_apart(teacher: nn.Module, student: nn.Module) -> None:
    """No module of the teacher is the student's, too, unless it is the same in train and in eval mode, as an activation is."""
    if teacher is student:
        raise ValueError("teacher and student are one network; the teacher needs a copy: copy.deepcopy(student)")
    its = set(teacher.modules())
    for name, module in student.named_modules():
        if module in its and _changes_with_its_mode(module):
            shared = f"the student's {name!r}" if name else "all of the student"
            raise ValueError(
                f"teacher and student share {shared}: it would be in eval mode with the teacher, and a batch norm in it would run "
                "twice; give a copy of the teacher: copy.deepcopy(teacher)"
            )


@dataclass(frozen=True)
class _Layers:
    """The layers of a term in one network: the one that is compared, and those of its list."""

    map: str
    features: tuple[str, ...]


def _layers(network: nn.Module, term: Term, call: Call, whose: str) -> _Layers:
    name, features = term.student, term.student_features
    if whose == "teacher":
        name = name if term.teacher is None else term.teacher
        features = features if term.teacher_features is None else term.teacher_features
        features = features if call.teacher_list else ()
    found = find_layers(network, name, whose)
    if len(found) > 1:
        raise ValueError(
            f"{whose}: {name!r} means {len(found)} layers, {', '.join(found[:4])}{', ...' * (len(found) > 4)}; want one. "
            "Losses that take lists have them in student_features and teacher_features; for others write a term for each"
        )
    patterns = (features,) if isinstance(features, str) else features
    return _Layers(found[0], tuple(layer for pattern in patterns for layer in find_layers(network, pattern, whose)))


def _call(term: Term) -> Call:
    loss = LOSSES[term.loss] if isinstance(term.loss, str) else type(term.loss)
    call = call_of(loss)
    if call.needs_lists and not term.student_features:
        raise ValueError(
            f"{loss.__name__} compares lists of layers; name them in its term: student_features=..., and "
            "teacher_features=... where the teacher's names differ"
        )
    if term.student_features and not call.student_list:
        raise ValueError(f"{loss.__name__} takes no list of layers; name one layer: student=..., and teacher=...")
    return call


def _names(terms: Sequence[Term]) -> list[str]:
    """The terms' names in logs; the second of one name has a 2 behind it, and so on."""
    of_class: dict[type, str] = {loss: name for name, loss in LOSSES.items()}
    names: list[str] = []
    for term in terms:
        loss = term.loss
        default = loss if isinstance(loss, str) else of_class.get(type(loss), type(loss).__name__.lower())
        name, number = term.name or default, 2
        while name in names:
            name, number = f"{term.name or default}_{number}", number + 1
        names.append(name)
    return names
