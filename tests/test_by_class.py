"""What holds for class_means, class_similarity and importance_and_affinity: layouts, labels, threads, compilers, bad arguments."""

from __future__ import annotations

import pytest
import torch
from operators import EMULATED, IGNORED, assert_close, channels_last, compiled, labels, over_threads, value_and_gradient

import medkd_fast
from medkd_fast.ops import common


class ByClass:
    """One of them: its result for a class, for a pixel, or for the layer and another one, whose pixels lie elsewhere."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, x: torch.Tensor, target: torch.Tensor, classes: int) -> torch.Tensor:
        if self.name == "importance_and_affinity":
            other = x.detach().roll(1, -1)
            return torch.stack(medkd_fast.importance_and_affinity(x, other, target, num_classes=classes))
        result = getattr(medkd_fast, self.name)(x, target, num_classes=classes)
        return result if self.name == "class_similarity" else result.means

    def shape(self, x: tuple[int, ...], classes: int) -> tuple[int, ...]:
        if self.name == "importance_and_affinity":
            return (2,)
        return (x[0], *x[2:]) if self.name == "class_similarity" else (x[0], classes, x[1])


@pytest.fixture(params=["class_means", "class_similarity", "importance_and_affinity"])
def by_class(request: pytest.FixtureRequest) -> ByClass:
    return ByClass(request.param)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_label_types(fused: str, by_class: ByClass, dtype: torch.dtype) -> None:
    x, target = torch.randn(1, 3, 5, 7), torch.randint(0, 4, (1, 1, 5, 7))
    assert torch.equal(by_class(x, target.to(dtype), 4), by_class(x, target, 4))


def test_nothing(backend: str, by_class: ByClass) -> None:
    x, target = torch.full((2, 3, 4, 5), torch.nan), torch.full((2, 4, 5), IGNORED)
    value, gradient = value_and_gradient(lambda x: by_class(x, target, 2), x)
    assert (value == 0).all() and (gradient == 0).all()
    for shape in ((0, 3, 4, 5), (2, 3, 0, 5)):
        target = torch.zeros(shape[0], *shape[2:], dtype=torch.long)
        value, gradient = value_and_gradient(lambda x, y=target: by_class(x, y, 2), torch.randn(shape))
        assert value.shape == by_class.shape(shape, 2) and (value == 0).all() and gradient.shape == shape


@pytest.mark.parametrize("shape", [(2, 5, 9, 11), (1, 20, 4, 5, 6), (1, 34, 23, 29)], ids=str)
def test_layouts(fused: str, by_class: ByClass, shape: tuple[int, ...]) -> None:
    x, target = torch.randn(shape), labels(shape, 4, False)
    wide = torch.randn(*shape[:-1], 2 * shape[-1])
    wide[..., ::2] = x
    upstream = torch.randn(by_class.shape(shape, 4))
    want = value_and_gradient(lambda x: by_class(x, target, 4), x, upstream)
    got = value_and_gradient(lambda x: by_class(x, target, 4), channels_last(x), upstream)
    assert got[1].stride() == channels_last(x).stride()
    if fused in EMULATED:  # tiles of another form: numbers are added in another order
        assert_close(got[0], want[0], 1e-6)
        assert_close(got[1], want[1], 5e-6)
    elif by_class.name == "importance_and_affinity":  # of the map's gradient other sums of products are rounded once
        assert torch.equal(got[0], want[0])
        assert_close(got[1], want[1], 1e-7)
    else:
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for other in (wide[..., ::2], x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert_close(by_class(other, target, 4), want[0], 1e-6)


def test_same_bits_for_any_number_of_threads(cpp: str, by_class: ByClass) -> None:
    x, target = torch.randn(2, 20, 130, 140), labels((2, 20, 130, 140), 7, False)
    over_threads(lambda: list(value_and_gradient(lambda x: by_class(x, target, 7), x)))


def test_compiles_into_one_graph(fused: str, by_class: ByClass) -> None:
    x, target = torch.randn(2, 3, 8, 9), labels((2, 3, 8, 9), 4, False)
    function = compiled(lambda x: by_class(x, target, 4), fused)
    got = value_and_gradient(function, x)
    want = value_and_gradient(lambda x: by_class(x, target, 4), x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_double_backward_raises(fused: str, by_class: ByClass) -> None:
    x, target = torch.randn(1, 2, 4, 4, requires_grad=True), torch.zeros(1, 4, 4, dtype=torch.long)
    (gradient,) = torch.autograd.grad(by_class(x, target, 1).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{by_class.name}: second derivatives"):
        gradient.square().sum().backward()


def test_bad_arguments(backend: str, by_class: ByClass, monkeypatch: pytest.MonkeyPatch) -> None:
    x, target = torch.randn(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="num_classes: got 0, want at least 1"):
        by_class(x, target, 0)
    with pytest.raises(ValueError, match=r"target: got shape \(1, 4, 3\), want \(1, 4, 4\)"):
        by_class(x, target[..., :3], 2)
    with pytest.raises(TypeError, match="target: got torch.float32, want integer labels"):
        by_class(x, target.float(), 2)
    with pytest.raises(TypeError, match="(x|student): got torch.int64"):
        by_class(x.long(), target, 2)
    monkeypatch.setattr(common, "DEBUG", True)  # on a GPU
    with pytest.raises((ValueError, RuntimeError), match="target holds the label -1, want 0 to 1 or ignore_index"):
        by_class(x, target - 1, 2)
