"""What the distiller adds to a training step of the demo's student over the same losses called by hand.

A step: the student and the teacher run on four slices of 128², two losses, backward, optimiser. Interleaved, each first in
every other round.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable

import clock
import pytest
import torch
from monai.losses import DiceCELoss
from monai.networks.nets import BasicUNet

from medkd_fast import Distiller, Term
from medkd_fast.losses import CPKDLoss, DKDLoss

CLASSES, LEVEL, ROUNDS = 9, "upcat_2", 30
TASK = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False, batch=True)


def network(*widths: int) -> BasicUNet:
    return BasicUNet(spatial_dims=2, in_channels=1, out_channels=CLASSES, features=widths)


def with_distiller(teacher: BasicUNet, student: BasicUNet, images: torch.Tensor, labels: torch.Tensor) -> clock.Step:
    terms = [Term("cpkd", student=LEVEL, weight=0.3), Term("dkd", weight=0.02)]
    kd = Distiller(teacher, student, terms, example=images)
    optimiser = torch.optim.AdamW(kd.parameters(), lr=1e-3)

    def step() -> None:
        optimiser.zero_grad()
        (TASK(kd(images), labels) + kd.loss(labels)).backward()
        optimiser.step()

    return step


def by_hand(teacher: BasicUNet, student: BasicUNet, images: torch.Tensor, labels: torch.Tensor) -> clock.Step:
    found: dict[str, torch.Tensor] = {}
    for name, one in (("teacher", teacher), ("student", student)):
        one.get_submodule(LEVEL).register_forward_hook(lambda _, __, y, name=name: found.update({name: y}))
    with torch.no_grad():
        teacher(images), student(images)
    relations, decoupled = CPKDLoss(student_channels=8, teacher_channels=16), DKDLoss()
    optimiser = torch.optim.AdamW([*student.parameters(), *relations.parameters()], lr=1e-3)

    def step() -> None:
        optimiser.zero_grad()
        logits = student(images)
        with torch.no_grad():
            wanted = teacher(images)
        loss = 0.3 * relations(found["student"], found["teacher"], labels) + 0.02 * decoupled(logits, wanted, labels)
        (TASK(logits, labels) + loss).backward()
        optimiser.step()

    return step


def test_distiller(benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    teacher, student = network(16, 16, 32, 64, 128, 16).eval(), network(4, 8, 16, 32, 32, 4)
    images, labels = torch.rand(4, 1, 128, 128), torch.randint(0, CLASSES, (4, 1, 128, 128))
    run: dict[str, Callable[[], float]] = {}
    for make in (with_distiller, by_hand):
        run[make.__name__] = clock.cpu([make(copy.deepcopy(teacher), copy.deepcopy(student), images, labels)])
    times: dict[str, list[float]] = {name: [] for name in run}

    def one_round() -> None:
        for name in sorted(run, reverse=len(times["by_hand"]) % 2 == 1):
            times[name].append(run[name]())

    benchmark.pedantic(one_round, rounds=ROUNDS, iterations=1)
    ratios = [a / b for a, b in zip(times["with_distiller"], times["by_hand"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    with capsys.disabled():
        print(
            f"\na step with the distiller: {statistics.median(times['with_distiller']) * 1e3:.1f} ms, by hand "
            f"{statistics.median(times['by_hand']) * 1e3:.1f} ms; ratio {statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})"
        )
