"""class_means against a loop over classes written here, and its own corners: absent classes, ignored pixels, labels that are none."""

from __future__ import annotations

import pytest
import torch
from operators import EMULATED, IGNORED, ROUNDING, assert_close, labels, value_and_gradient

from medkd_fast import class_means
from medkd_fast.backend import kernel

#: And the number of classes: more than a block of any backend takes, one, more than there are pixels.
SHAPES = [
    ((2, 5, 9, 11), 4),
    ((1, 3, 4, 5, 6), 1),
    ((2, 4, 31), 20),
    ((3, 2, 1, 1), 3),
    ((1, 70, 5, 7), 3),
    ((1, 6, 37, 31), 40),
    ((1, 2, 37, 61), 9),
]


def formula(x: torch.Tensor, target: torch.Tensor, classes: int, ignore_index: int = IGNORED) -> torch.Tensor:
    """[B, K, C], in fp64: an image and a class after the other."""
    means = x.new_zeros(x.shape[0], classes, x.shape[1], dtype=torch.float64)
    rows = []
    for b in range(x.shape[0]):
        for k in range(classes):
            some = x[b].flatten(1)[:, target[b].flatten() == k].double()
            has = some.shape[1] > 0 and k != ignore_index
            rows.append(some.mean(1) if has else 0 * means[b, k])
    return torch.stack(rows).view_as(means) if rows else means


@pytest.mark.parametrize(("shape", "classes"), SHAPES, ids=str)
@pytest.mark.parametrize("coherent", [False, True], ids=["random", "coherent"])
def test_equals_the_formula(backend: str, shape: tuple[int, ...], classes: int, coherent: bool) -> None:
    x = torch.randn(shape) + 1
    target = labels(shape, classes, coherent, 0.0 if coherent else 0.3)
    upstream = torch.randn(shape[0], classes, shape[1])
    got = class_means(x, target, num_classes=classes)
    value, gradient = value_and_gradient(lambda x: class_means(x, target, num_classes=classes).means, x, upstream)
    want, want_gradient = value_and_gradient(lambda x: formula(x, target, classes), x.double(), upstream)
    assert value.dtype == torch.float32 and got.counts.dtype == torch.int64
    assert torch.equal(got.means, value)
    counts = torch.stack([(target == k).flatten(1).sum(1) for k in range(classes)], 1)
    assert torch.equal(got.counts, counts)
    # a mean is rounded once, and of at most 16 numbers in a row a sum may be in fp32
    assert_close(value, want, 1e-6, "means")
    assert_close(gradient, want_gradient, 1e-6, "gradient")
    assert (value[counts == 0] == 0).all()


def test_double_precision(fused: str) -> None:
    x, target = torch.randn(2, 3, 19, 23, dtype=torch.float64), labels((2, 3, 19, 23), 5, True)
    upstream = torch.randn(2, 5, 3, dtype=torch.float64)
    got = value_and_gradient(lambda x: class_means(x, target, num_classes=5).means, x, upstream)
    want = value_and_gradient(lambda x: formula(x, target, 5), x, upstream)
    assert got[0].dtype == torch.float64
    assert_close(got[0], want[0], 1e-14)
    assert_close(got[1], want[1], 1e-14)


def test_gradcheck(backend: str) -> None:
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    target = labels(x.shape, 3, False)
    assert torch.autograd.gradcheck(
        lambda x: class_means(x, target, num_classes=3).means, x, fast_mode=backend in EMULATED
    )


def test_many_pixels_lose_no_digits(backend: str) -> None:
    """A mean of 1000 + noise over more pixels than a slot has."""
    x = 1000 + torch.randn(1, 2, 50, 60)
    target = labels(x.shape, 2, True, 0.0)
    value = class_means(x, target, num_classes=2).means
    assert_close(value - 1000, formula(x, target, 2) - 1000, 3e-3)  # half a unit of 1000 in fp32 is 3e-5, a mean 0.02


@pytest.mark.parametrize("ignore_index", [0, 2, 255, -100])
def test_what_is_ignored_may_be_anything(backend: str, ignore_index: int) -> None:
    """Also a class's own number may be ignore_index: then it has no pixel."""
    x, target = torch.randn(2, 5, 6, 7), torch.randint(0, 3, (2, 6, 7))
    target[:, 1:4] = target[0, 0, :3] = ignore_index
    upstream = torch.randn(2, 3, 5)

    def run(x: torch.Tensor):
        return class_means(x, target, num_classes=3, ignore_index=ignore_index)

    want = value_and_gradient(lambda x: run(x).means, x, upstream)
    x.masked_fill_((target == ignore_index).unsqueeze(1), torch.nan)
    x[:, :, 2] = torch.inf
    got = value_and_gradient(lambda x: run(x).means, x, upstream)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert (got[1].movedim(1, -1)[target == ignore_index] == 0).all()
    assert_close(got[0], formula(x.nan_to_num(0, 0, 0), target, 3, ignore_index), 1e-6)
    if ignore_index in (0, 2):
        assert (run(x).counts[:, ignore_index] == 0).all() and (got[0][:, ignore_index] == 0).all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(backend: str, half: torch.dtype) -> None:
    x, target = torch.randn(2, 3, 16, 20).to(half), labels((2, 3, 16, 20), 4, True)
    upstream = 1024 * torch.randn(2, 4, 3)
    value, gradient = value_and_gradient(lambda x: class_means(x, target, num_classes=4).means, x, upstream)
    want, want_gradient = value_and_gradient(lambda x: formula(x, target, 4), x.double(), upstream)
    assert value.dtype == torch.float32 and gradient.dtype == half
    assert_close(value, want, 1e-6)
    assert_close(gradient, want_gradient, 2 * ROUNDING[half])


def test_opcheck(fused: str) -> None:
    x, target = torch.randn(2, 3, 4, 5).to(torch.bfloat16), torch.randint(0, 3, (2, 4, 5))
    torch.library.opcheck(kernel("class_means", fused), (x, target, 4, 1))
    counts = kernel("class_means", fused)(x, target, 4, 1)[1]
    torch.library.opcheck(kernel("class_means_backward", fused), (x, target, counts, torch.randn(2, 4, 3), 1))


def test_labels_that_are_none(fused: str) -> None:
    """Where looking at labels would synchronise, no number comes of them. (The public function looks, on CPU tensors.)"""
    x, target = torch.randn(1, 2, 6, 7), torch.randint(0, 3, (1, 6, 7))
    target[0, 3, 2] = 3
    if fused == "cpp":
        with pytest.raises(
            RuntimeError, match=r"class_means: target holds the label 3, want 0 to 2 or ignore_index \(-100\)"
        ):
            class_means(x, target, num_classes=3)
        return
    means, counts = kernel("class_means", fused)(x, target, 3, -100)
    assert means[:, 0].isnan().all() and means[:, 1:].isfinite().all()
    gradient = kernel("class_means_backward", fused)(x, target, counts, torch.randn(1, 3, 2), -100)
    assert gradient[0, :, 3, 2].isnan().all() and gradient.isnan().sum() == 2
