"""What holds for every operator under all that autograd can do."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from operators import assert_close, value_and_gradient
from torch.utils.checkpoint import checkpoint

import medkd_fast as m

Function = Callable[..., torch.Tensor]
#: operator(student, teacher, labels, mask, weight)
OPERATORS: dict[str, Function] = {
    "decoupled_kl": lambda s, t, y, mask, w: m.decoupled_kl(s, t, y, weight=w).loss,
    "class_kl": lambda s, t, y, mask, w: m.class_kl(s, t, target=y, weight=w),
    "spatial_kl": lambda s, t, y, mask, w: m.spatial_kl(s, t, mask=mask),
    "class_pearson": lambda s, t, y, mask, w: m.class_pearson(s, t, target=y).loss,
    "channel_gram": lambda s, t, y, mask, w: m.channel_gram(s, mask=mask),
    "channel_relation": lambda s, t, y, mask, w: m.channel_relation(s, t, relation="gram", mask=mask),
    "pixel_affinity": lambda s, t, y, mask, w: (m.pixel_affinity(s) - m.pixel_affinity(t)).square(),
    "pixel_relation": lambda s, t, y, mask, w: m.pixel_relation(s, t, relation="gram", mask=mask, pool=2),
    "pixel_relation kl": lambda s, t, y, mask, w: m.pixel_relation(s, t, divergence="kl", mask=mask),
    "attention_map": lambda s, t, y, mask, w: m.attention_map(s, mask=mask) * m.attention_map(t, mask=mask),
    "class_means": lambda s, t, y, mask, w: m.class_means(s, y, num_classes=3).means,
    "importance_and_affinity": lambda s, t, y, mask, w: sum(m.importance_and_affinity(s, t, y, num_classes=3)),
    "class_similarity": lambda s, t, y, mask, w: m.class_similarity(s, y, num_classes=3),
    "standardised_mse": lambda s, t, y, mask, w: m.standardised_mse(s, t, mask=mask),
    "max_pool": lambda s, t, y, mask, w: m.max_pool(s, 2, mask=mask).pooled,
    "average_pool": lambda s, t, y, mask, w: m.average_pool(s, 2, mask=mask).pooled,
}


EVERY = pytest.mark.parametrize("name", OPERATORS)


def others() -> tuple[torch.Tensor, ...]:
    """Teacher, labels, mask and weight."""
    torch.manual_seed(1)
    target = torch.randint(0, 3, (2, 4, 6))
    return torch.randn(2, 3, 4, 6), target, target > 0, torch.rand(2, 4, 6)


def of_student(name: str) -> Function:
    """The sum of an operator's results, in weights that tell them apart, as a function of the student."""
    arguments = others()

    def function(x: torch.Tensor) -> torch.Tensor:
        result = OPERATORS[name](x, *arguments)
        return (result * torch.arange(1, result.numel() + 1).view(result.shape)).sum()

    return function


@EVERY
def test_tensors_of_inference_mode_are_taken_as_others_are(backend: str, name: str) -> None:
    student = torch.randn(2, 3, 4, 6)
    want, want_gradient = value_and_gradient(lambda x: OPERATORS[name](x, *others()), student)
    with torch.inference_mode():
        inferred = others()
    value, gradient = value_and_gradient(lambda x: OPERATORS[name](x, *inferred), student)
    assert_close(value, want, 0)
    assert_close(gradient, want_gradient, 0)
    with torch.inference_mode():
        assert_close(OPERATORS[name](student, *inferred), want, 1e-6)


@EVERY
@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_a_checkpoint(backend: str, name: str, reentrant: bool) -> None:
    student, function = torch.randn(2, 3, 4, 6), of_student(name)
    want = value_and_gradient(function, student)
    got = value_and_gradient(lambda x: checkpoint(function, x, use_reentrant=reentrant), student)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, 0)


@EVERY
def test_derivatives_in_forward_mode_are_refused(fused: str, name: str) -> None:
    student, function = torch.randn(2, 3, 4, 6), of_student(name)
    with pytest.raises(RuntimeError, match="forward mode|setup_context"):
        torch.func.jvp(function, (student,), (torch.ones_like(student),))
    with pytest.raises(RuntimeError, match="forward mode|jvp"), torch.autograd.forward_ad.dual_level():
        function(torch.autograd.forward_ad.make_dual(student, torch.ones_like(student)))


@EVERY
def test_second_derivatives_are_refused(fused: str, name: str) -> None:
    """Those for the student, and those for what the loss is multiplied by."""
    student, function = torch.randn(2, 3, 4, 6, requires_grad=True), of_student(name)
    factor = torch.tensor(2.0, requires_grad=True)
    for of in (student, factor):
        (gradient,) = torch.autograd.grad(factor * function(student), student, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives are not there in the fused backends"):
            torch.autograd.grad(gradient.sum() + of.sum(), of)


@EVERY
def test_a_gradient_may_be_changed_in_place(backend: str, name: str) -> None:
    """And the graph used again."""
    student, function = torch.randn(2, 3, 4, 6, requires_grad=True), of_student(name)
    value = function(student)
    (first,) = torch.autograd.grad(value, student, retain_graph=True)
    want = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(value, student, retain_graph=True)
    assert_close(second, want, 1e-6)


@EVERY
@pytest.mark.parametrize("compiled", [False, True])
def test_derivatives_of_torch_func_are_refused(cpp: str, name: str, compiled: bool) -> None:
    torch._dynamo.reset()
    gradient = torch.func.grad(of_student(name))
    if compiled:
        gradient = torch.compile(lambda x, f=gradient: f(x), backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"derivatives of torch.func|torch.func|setup_context"):
        gradient(torch.randn(2, 3, 4, 6))


@EVERY
def test_shapes_without_memory(name: str) -> None:
    """Meta tensors, which the definitions take."""
    student, function = torch.randn(2, 3, 4, 6), OPERATORS[name]
    want = function(student, *others())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are no tensors of a device with kernels
        got = function(student.to("meta"), *(x.to("meta") for x in others()))
    assert got.shape == want.shape and got.dtype == want.dtype
