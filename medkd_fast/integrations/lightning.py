"""PyTorch Lightning: distillation as a callback, for any LightningModule as it is.

    trainer = Trainer(callbacks=[DistillationCallback(teacher, [Term("dkd", weight=0.1)])])
    trainer.fit(module, loader)

The callback adds its loss to what `training_step` returns. Adapters train with the module's first optimiser; they are saved in
the callback's part of a checkpoint, so that the module's part loads anywhere.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from medkd_fast.distiller import Distiller, Term

if TYPE_CHECKING or "lightning.pytorch" not in sys.modules:
    from pytorch_lightning import LightningModule, Trainer, callbacks
    from pytorch_lightning.callbacks import Callback
else:  # the same library under its other name; a trainer takes callbacks of its own alone
    from lightning.pytorch import LightningModule, Trainer, callbacks
    from lightning.pytorch.callbacks import Callback

#: Callbacks that copy the module when they are set up; Lightning has them from 2.6 on.
AVERAGES = getattr(callbacks, "WeightAveraging", ())
#: Under this name what trains with the module is a submodule of it, so that it is moved, wrapped and optimised.
SUBMODULE = "medkd_fast_companions"
#: Keys of a batch that hold its labels.
LABEL_KEYS = ("label", "labels", "target", "mask")
#: What may be wrong where a network is not found.
TOO_LATE = (
    "one that the module's setup or configure_model makes is made too late, after the callbacks are set up: make it in __init__, "
    "or call configure_model before the fit"
)


class DistillationCallback(Callback):
    """Distils into a LightningModule's network whatever its `training_step` returns: a loss, or a dictionary with "loss".

    Args:
        teacher: a network that takes what the student takes, or several.
        terms: as for `medkd_fast.Distiller`; layers are named from the student network on.
        student: name of the network in the module; without it, the one child that has parameters. "" is the module itself, where
            `training_step` calls it.
        target: takes the batch and gives labels, integers [B, *S] or [B, 1, *S]; without it, the second of a tuple or list, or
            the "label", "labels", "target" or "mask" of a dictionary.
        example: images for the dry run that adapters need (see `Distiller`); without it, the module's `example_input_array`.

    Every term is logged as `kd/<name>`.

    Raises, when the fit begins:
        ValueError: the student cannot be told, or a layer does not exist, or the module optimises by hand, or has no
            optimiser for the adapters, or a WeightAveraging that stands before copies the module without them.

    >>> callback = DistillationCallback(nn.Conv2d(1, 3, 1), [Term("dkd", weight=0.1)], student="network")
    >>> callback.state_dict()
    {}
    """

    def __init__(
        self,
        teacher: nn.Module | Sequence[nn.Module],
        terms: Sequence[Term],
        *,
        student: str | None = None,
        target: Callable[[Any], torch.Tensor | None] | None = None,
        example: torch.Tensor | None = None,
    ) -> None:
        self.teacher = teacher
        self.terms = terms
        self.student = student
        self.target = labels_of if target is None else target
        self.example = example
        self.distiller: Distiller | None = None
        self._undo = ExitStack()
        self._state: dict[str, torch.Tensor] = {}
        self._trained: weakref.ref[LightningModule] | None = None  # whose the state is; None where it was loaded

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise ValueError(
                "the module optimises by hand, where a callback adds no loss; use medkd_fast.Distiller in it"
            )
        if hasattr(pl_module, SUBMODULE):
            raise ValueError(
                f"the module has a {SUBMODULE} already, made by another DistillationCallback of this trainer; give one callback all "
                "terms and teachers"
            )
        example = pl_module.example_input_array if self.example is None else self.example
        self.distiller = Distiller(
            self.teacher,
            _student(pl_module, self.student),
            self.terms,
            example=example if isinstance(example, torch.Tensor) else None,
        )
        self._undo.callback(self.distiller.close)
        if any(True for _ in self.distiller.losses.parameters()):
            _check_after(trainer, self)
        pl_module.add_module(SUBMODULE, _Companions(self.distiller))
        self._undo.callback(delattr, pl_module, SUBMODULE)
        self._undo.callback(pl_module.register_state_dict_post_hook(_leave_out).remove)
        self._undo.callback(pl_module.register_load_state_dict_post_hook(_not_missing).remove)
        own = vars(pl_module).get("training_step")  # beside that of its class: the user's, or a compiled one
        pl_module.training_step = self._with_distillation(pl_module)  # type: ignore[method-assign]
        if own is None:
            self._undo.callback(delattr, pl_module, "training_step")
        else:
            self._undo.callback(setattr, pl_module, "training_step", own)
        if self._trained is not None and self._trained() is not pl_module:
            self._state = {}
        if self._state:
            self.load_state_dict(self._state)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What `configure_optimizers` did not take, because it named its parameters, goes to the first optimiser."""
        assert self.distiller is not None
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        taken = {id(p) for group in groups for p in group["params"]}
        left = [p for p in self.distiller.losses.parameters() if id(p) not in taken]
        if left and not groups:
            raise ValueError(
                "configure_optimizers: got no optimiser, and the terms have adapters, which train; return one there, or compare "
                "layers of as many channels as the teacher's"
            )
        if left:
            groups[0]["params"] += left

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave(pl_module)  # there Lightning calls no teardown

    def _leave(self, pl_module: LightningModule) -> None:
        """The module is again what it was before the fit, however far `setup` came."""
        if self.distiller is not None:
            self._state, self._trained = self.state_dict(), weakref.ref(pl_module)
            self.distiller = None
        self._undo.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_trained": None}  # a weak reference cannot be pickled

    def state_dict(self) -> dict[str, Any]:
        """Adapters, projectors and the step of the warm-up."""
        if self.distiller is None:
            return dict(self._state)
        return {name: x for name, x in self.distiller.state_dict().items() if not name.startswith("student.")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state, self._trained = dict(state_dict), None
        if self.distiller is not None:
            self.distiller.load_state_dict(self._state, strict=False)  # the student's come with the module

    def _with_distillation(self, pl_module: LightningModule) -> Callable[..., Any]:
        training_step = pl_module.training_step

        @functools.wraps(training_step)
        def step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            output = training_step(batch, *args, **kwargs)
            if output is None:  # the module skips this batch
                return None
            assert self.distiller is not None
            loss = self.distiller.loss(self.target(batch))
            pl_module.log_dict({f"kd/{name}": value for name, value in self.distiller.log().items()})
            if isinstance(output, Mapping):
                return {**output, "loss": output["loss"] + loss}
            return output + loss

        return step


class _Companions(nn.Module):
    """What of a distiller goes with the module: the adapters and the step of the warm-up; the teachers are moved along.

    The student is not in it: that may be the module which this becomes a submodule of.
    """

    def __init__(self, distiller: Distiller) -> None:
        super().__init__()
        self.losses = distiller.losses
        self._buffers = distiller._buffers  # the same dictionary: a move puts new tensors into it
        self._teachers = distiller.teachers

    def _apply(self, fn: Any, recurse: bool = True) -> _Companions:
        for network in self._teachers:
            network._apply(fn)
        super()._apply(fn, recurse)
        return self


def labels_of(batch: Any) -> torch.Tensor:
    """The labels of a batch: the second of a tuple or list, or by one of `LABEL_KEYS`.

    >>> labels_of({"image": torch.zeros(1), "label": torch.ones(1)})
    tensor([1.])
    """
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    else:
        found = batch[1] if isinstance(batch, Sequence) and len(batch) > 1 else None
    if not isinstance(found, torch.Tensor):
        keys = f" with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
        raise TypeError(
            f"the labels of a batch: got {type(batch).__name__}{keys}; pass target=, a function that takes the batch and gives "
            "labels [B, *S], or None where no term needs them"
        )
    return found


def _student(pl_module: LightningModule, name: str | None) -> nn.Module:
    if name is not None:
        try:
            return pl_module.get_submodule(name)
        except AttributeError as error:
            found = ", ".join(name for name, _ in pl_module.named_children())
            raise ValueError(f"student: there is no {name!r} among {found or 'no children'}; {TOO_LATE}") from error
    children = [name for name, child in pl_module.named_children() if any(True for _ in child.parameters())]
    if len(children) != 1:
        raise ValueError(
            f"student: the module has {len(children)} children with parameters ({', '.join(children) or 'none'}); "
            + ('name the network to distil into: student="network"' if children else TOO_LATE)
        )
    return pl_module.get_submodule(children[0])


def _check_after(trainer: Trainer, callback: Callback) -> None:
    found: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    before = next((other for other in found[: found.index(callback)] if isinstance(other, AVERAGES)), None)
    if before is not None:
        raise ValueError(
            f"callbacks: {type(before).__name__} stands before the DistillationCallback and has copied the module without the "
            "adapters, which it would average too; put it behind"
        )


def _leave_out(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    for name in [name for name in state_dict if name.startswith(f"{prefix}{SUBMODULE}.")]:
        del state_dict[name]


def _not_missing(module: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if f"{SUBMODULE}." not in name]
