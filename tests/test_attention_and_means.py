"""attention_and_means against attention_map and class_means of the definition, gradients of both together."""

from __future__ import annotations

import pytest
import torch
from operators import EMULATED, IGNORED, ROUNDING, assert_close, in_one, labels, value_and_gradient

from medkd_fast import attention_and_means, attention_map, class_means, use_backend
from medkd_fast.backend import kernel

SHAPES = [((2, 5, 9, 11), 4), ((1, 3, 4, 5, 6), 1), ((2, 4, 31), 20), ((1, 70, 5, 7), 3), ((2, 2, 37, 61), 9)]


def both(x: torch.Tensor, target: torch.Tensor, classes: int, power: float) -> torch.Tensor:
    """Map and means side by side, [B, N + K · C]."""
    return in_one(attention_and_means(x, target, num_classes=classes, power=power))


def apart(x: torch.Tensor, target: torch.Tensor, classes: int, power: float) -> torch.Tensor:
    with use_backend("reference"):
        result = attention_map(x.double(), power=power, mask=target != IGNORED)
        means, _ = class_means(x.double(), target, num_classes=classes)
    return torch.cat([result.flatten(1), means.flatten(1)], 1)


@pytest.mark.parametrize(("shape", "classes"), SHAPES, ids=str)
@pytest.mark.parametrize(("power", "coherent"), [(2.0, False), (4.0, True), (1.0, True), (2.7, False)])
def test_equals_the_operators(backend: str, shape: tuple[int, ...], classes: int, power: float, coherent: bool) -> None:
    x, target = torch.randn(shape), labels(shape, classes, coherent, 0.3)
    upstream = torch.randn(shape[0], target[0].numel() + classes * shape[1])
    want, want_gradient = value_and_gradient(lambda x: apart(x, target, classes, power), x.double(), upstream)
    x.movedim(1, -1)[target == IGNORED] = torch.nan
    for y in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):  # channels outside, and inside
        value, gradient = value_and_gradient(lambda x: both(x, target, classes, power), y, upstream)
        assert value.dtype == torch.float32
        assert_close(value, want, 1e-6, "values")
        assert_close(gradient, want_gradient, 1e-5, "gradient")
        assert (gradient.movedim(1, -1)[target == IGNORED] == 0).all()
    counts = torch.stack([(target == k).flatten(1).sum(1) for k in range(classes)], 1)
    assert torch.equal(attention_and_means(x, target, num_classes=classes, power=power).counts, counts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_types(backend: str, dtype: torch.dtype) -> None:
    shape = (2, 3, 16, 20)
    x, target = torch.randn(shape).to(dtype), labels(shape, 4, True)
    upstream = torch.randn(2, 16 * 20 + 4 * 3).double()
    want, want_gradient = value_and_gradient(lambda x: apart(x, target, 4, 2.0), x.double(), upstream)
    value, gradient = value_and_gradient(lambda x: both(x, target, 4, 2.0), x, upstream)
    assert gradient.dtype == dtype and value.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert_close(value, want, 1e-13 if dtype == torch.float64 else 1e-6)
    assert_close(gradient, want_gradient, 1e-13 if dtype == torch.float64 else 1e-5 + 2 * ROUNDING[dtype])


def test_gradcheck(backend: str) -> None:
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    target = labels(x.shape, 3, False)
    assert torch.autograd.gradcheck(lambda x: both(x, target, 3, 4.0), x, fast_mode=backend in EMULATED)


def test_one_gradient_alone(backend: str) -> None:
    """What asks for the map or the means only gives the features the gradient of that operator."""
    x, target = torch.randn(2, 5, 9, 11), labels((2, 5, 9, 11), 4, False)
    want = value_and_gradient(lambda x: attention_map(x, mask=target != IGNORED), x)[1]
    got = value_and_gradient(lambda x: attention_and_means(x, target, num_classes=4).map, x)[1]
    assert_close(got, want, 1e-6)
    want = value_and_gradient(lambda x: class_means(x, target, num_classes=4).means, x)[1]
    got = value_and_gradient(lambda x: attention_and_means(x, target, num_classes=4).means, x)[1]
    assert_close(got, want, 1e-6)


def test_opcheck(fused: str) -> None:
    x, target = torch.randn(2, 3, 4, 5).to(torch.bfloat16), torch.randint(0, 3, (2, 4, 5))
    torch.library.opcheck(kernel("attention_and_means", fused), (x, target, 4, 2.0, 1))
    result, norms, _, counts = kernel("attention_and_means", fused)(x, target, 4, 2.0, 1)
    arguments = (x, target, result, norms, counts, torch.randn(2, 4, 5), torch.randn(2, 4, 3), 2.0, 1)
    torch.library.opcheck(kernel("attention_and_means_backward", fused), arguments)


def test_labels_that_are_none(fused: str) -> None:
    x, target = torch.randn(1, 2, 6, 7), torch.randint(0, 3, (1, 6, 7))
    target[0, 3, 2] = 3
    if fused == "cpp":
        with pytest.raises(RuntimeError, match="attention_and_means: target holds the label 3, want 0 to 2"):
            attention_and_means(x, target, num_classes=3)
        return
    result, norms, means, counts = kernel("attention_and_means", fused)(x, target, 3, 2.0, -100)
    assert means[:, 0].isnan().all() and means[:, 1:].isfinite().all()
    upstream = torch.randn(1, 6, 7), torch.randn(1, 3, 2)
    gradient = kernel("attention_and_means_backward", fused)(x, target, result, norms, counts, *upstream, 2.0, -100)
    assert gradient[0, :, 3, 2].isnan().all() and gradient.isnan().sum() == 2


def test_bad_power(backend: str) -> None:
    with pytest.raises(ValueError, match="power: got 0.5, want a finite number of at least 1"):
        attention_and_means(torch.randn(1, 2, 4, 4), torch.zeros(1, 4, 4).long(), num_classes=1, power=0.5)
