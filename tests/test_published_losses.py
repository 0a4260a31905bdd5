"""The benchmark's published losses compute what the modules compute, and what is measured is every loss."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from operators import assert_close

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import loss_works

from medkd_fast.losses.catalogue import LOSSES

SMALL = {"sp": (5, 12, 18, 9)}


def test_every_loss_is_measured() -> None:
    names = (*loss_works.ON_LOGITS, *loss_works.ON_FEATURES)
    assert sorted(names) == sorted(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_published_form(name: str) -> None:
    student, teacher, target = loss_works.inputs(SMALL.get(name, (2, 9, 20, 12)))
    student, teacher = student.detach().double().requires_grad_(), teacher.double()
    made = loss_works.calls(name, student, teacher, target)
    want, value = made.module(), made.published(*made.args)
    leaves = (student, *made.layers)
    want_gradients, gradients = (torch.autograd.grad(3 * x, leaves) for x in (want, value))
    assert want > 1e-6
    assert_close(value.detach(), want.detach(), 1e-11)
    for gradient, want_gradient in zip(gradients, want_gradients, strict=True):
        assert want_gradient.abs().max() > 0
        assert_close(gradient, want_gradient, 1e-10)
