"""class_means against a loop over classes written here, and its own corners: absent classes, ignored pixels, labels that are none."""

from __future__ import annotations

import pytest
import torch
from operators import EMULATED, ROUNDING, assert_close, channels_last, over_threads, value_and_gradient

import medkd_fast
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
IGNORED = -100


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


def labels(shape: tuple[int, ...], classes: int, coherent: bool, ignored: float = 0.3) -> torch.Tensor:
    """Random ones, or bands of equal ones."""
    target = torch.randint(0, classes, (shape[0], *shape[2:]))
    if coherent:
        target = target.flatten(1).sort(1).values.view_as(target)
    return target.masked_fill(torch.rand(target.shape) < ignored, IGNORED)


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


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_label_types(fused: str, dtype: torch.dtype) -> None:
    x = torch.randn(1, 3, 5, 7)
    target = torch.randint(0, 4, (1, 1, 5, 7))
    want = class_means(x, target, num_classes=4)
    got = class_means(x, target.to(dtype), num_classes=4)
    assert torch.equal(got.means, want.means) and torch.equal(got.counts, want.counts)


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


def test_nothing(backend: str) -> None:
    x, target = torch.full((2, 3, 4, 5), torch.nan), torch.full((2, 4, 5), IGNORED)
    value, gradient = value_and_gradient(lambda x: class_means(x, target, num_classes=2).means, x)
    assert (value == 0).all() and (gradient == 0).all()
    for shape in ((0, 3, 4, 5), (2, 3, 0, 5)):
        target = torch.zeros(shape[0], *shape[2:], dtype=torch.long)
        value, gradient = value_and_gradient(
            lambda x, y=target: class_means(x, y, num_classes=2).means, torch.randn(shape)
        )
        assert value.shape == (shape[0], 2, 3) and (value == 0).all() and gradient.shape == shape


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(backend: str, half: torch.dtype) -> None:
    x, target = torch.randn(2, 3, 16, 20).to(half), labels((2, 3, 16, 20), 4, True)
    upstream = 1024 * torch.randn(2, 4, 3)
    value, gradient = value_and_gradient(lambda x: class_means(x, target, num_classes=4).means, x, upstream)
    want, want_gradient = value_and_gradient(lambda x: formula(x, target, 4), x.double(), upstream)
    assert value.dtype == torch.float32 and gradient.dtype == half
    assert_close(value, want, 1e-6)
    assert_close(gradient, want_gradient, 2 * ROUNDING[half])


@pytest.mark.parametrize("shape", [(2, 5, 9, 11), (1, 20, 4, 5, 6), (1, 34, 23, 29)], ids=str)
def test_layouts(fused: str, shape: tuple[int, ...]) -> None:
    x, target = torch.randn(shape), labels(shape, 4, False)
    wide = torch.randn(*shape[:-1], 2 * shape[-1])
    wide[..., ::2] = x
    upstream = torch.randn(shape[0], 4, shape[1])
    want = value_and_gradient(lambda x: class_means(x, target, num_classes=4).means, x, upstream)
    got = value_and_gradient(lambda x: class_means(x, target, num_classes=4).means, channels_last(x), upstream)
    assert got[1].stride() == channels_last(x).stride()
    assert torch.equal(got[1], want[1])
    if fused == "triton":  # tiles of another form
        assert_close(got[0], want[0], 1e-6)
    else:
        assert torch.equal(got[0], want[0])
    for other in (wide[..., ::2], x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert_close(class_means(other, target, num_classes=4).means, want[0], 1e-6)


def test_same_bits_for_any_number_of_threads(cpp: str) -> None:
    x, target = torch.randn(2, 20, 130, 140), labels((2, 20, 130, 140), 7, False)
    over_threads(lambda: list(value_and_gradient(lambda x: class_means(x, target, num_classes=7).means, x)))


def test_compiles_into_one_graph(fused: str) -> None:
    x, target = torch.randn(2, 3, 8, 9), labels((2, 3, 8, 9), 4, False)
    function = torch.compile(lambda x: class_means(x, target, num_classes=4).means, fullgraph=True, backend="aot_eager")
    got = value_and_gradient(function, x)
    want = value_and_gradient(lambda x: class_means(x, target, num_classes=4).means, x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_double_backward_raises(fused: str) -> None:
    x, target = torch.randn(1, 2, 4, 4, requires_grad=True), torch.zeros(1, 4, 4, dtype=torch.long)
    means = class_means(x, target, num_classes=1).means
    (gradient,) = torch.autograd.grad(means.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="class_means: second derivatives"):
        gradient.square().sum().backward()


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


def test_bad_arguments(backend: str) -> None:
    x, target = torch.randn(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="num_classes: got 0, want at least 1"):
        class_means(x, target, num_classes=0)
    with pytest.raises(ValueError, match=r"target: got shape \(1, 4, 3\), want \(1, 4, 4\)"):
        class_means(x, target[..., :3], num_classes=2)
    with pytest.raises(TypeError, match="target: got torch.float32, want integer labels"):
        class_means(x, target.float(), num_classes=2)
    with pytest.raises(TypeError, match="x: got torch.int64"):
        class_means(x.long(), target, num_classes=2)
    with pytest.raises((ValueError, RuntimeError), match="target holds the label -1, want 0 to 1 or ignore_index"):
        class_means(x, target - 1, num_classes=2)
    assert medkd_fast.functional.class_means is class_means
