"""What a training step costs and how much of it are the distillation losses, fused against the reference backend."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medkd_fast import use_backend
from medkd_fast.distiller import Distiller
from medkd_fast.layers import finest
from medkd_fast.training.module import SegmentationModule

FUSED, REFERENCE = "auto", "reference"
FUSED_STEPS = 5


class StepCost(NamedTuple):
    """Medians of one backend. step_ms: a whole optimiser step, in ms. loss_ms: the distillation losses in it, forward and backward."""

    step_ms: float
    loss_ms: float

    @property
    def share(self) -> float:
        """The losses' part of the step, in [0, 1]."""
        return self.loss_ms / self.step_ms


def step_costs(module: SegmentationModule, batch: Sequence[Tensor], *, rounds: int) -> dict[str, StepCost]:
    """Time steps on one real batch for each backend, in turns, so that a busy moment hits both.

    A round is `FUSED_STEPS` fused steps and one reference step, which can take many times as long.

    A step is the student's forward, the teacher's forward, all losses, the backward and the optimiser. Without a teacher there
    is no distillation loss (0 ms) and no second backend. The module trains on while it is timed: give it a copy.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0)
    distiller = module.model if isinstance(module.model, Distiller) else None
    turn = [FUSED] * FUSED_STEPS + ([] if distiller is None else [REFERENCE])
    times: dict[str, list[tuple[float, float]]] = {b: [] for b in turn}
    module.train()
    with use_backend(FUSED):
        _step(module, batch, optimizer)  # warms up
    for backend in turn * rounds:
        with use_backend(backend):
            step = _milliseconds(lambda: _step(module, batch, optimizer))
            loss = 0.0 if distiller is None else _loss_milliseconds(distiller, batch)
        times[backend].append((step, loss))
    return {
        b: StepCost(statistics.median(s for s, _ in t), statistics.median(d for _, d in t)) for b, t in times.items()
    }


def _step(module: SegmentationModule, batch: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    module.losses(batch)[0].backward()
    optimizer.step()


def _loss_milliseconds(distiller: Distiller, batch: Sequence[Tensor]) -> float:
    """The distillation losses alone on the batch's real outputs: forward, and backward down to the student's layers."""
    image, label = batch[:2]
    compared: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
            compared[name] = finest(output, image.dim())

        return hook

    names = {name for term in distiller.terms for name in (term.student, *term.student_features)}
    handles = [distiller.student.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    distiller(image)
    for handle in handles:
        handle.remove()
    learns = [*compared.values(), *distiller.losses.parameters()]
    return _milliseconds(lambda: torch.autograd.grad(distiller.loss(label), learns, allow_unused=True))


def _milliseconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3
