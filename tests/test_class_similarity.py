"""class_similarity against a formula written here, and its own corners: zero features, absent classes, ignored pixels."""

from __future__ import annotations

import pytest
import torch
from operators import EMULATED, IGNORED, ROUNDING, assert_close, labels, value_and_gradient

from medkd_fast import class_similarity
from medkd_fast.backend import kernel

#: And the number of classes.
SHAPES = [
    ((2, 5, 9, 11), 4),
    ((1, 3, 4, 5, 6), 1),
    ((2, 4, 31), 20),
    ((1, 70, 5, 7), 3),
    ((1, 6, 37, 31), 40),
    ((1, 2, 37, 61), 9),
]


def formula(x: torch.Tensor, target: torch.Tensor, classes: int, ignore_index: int = IGNORED) -> torch.Tensor:
    """[B, *S], in fp64: an image and a class after the other, by torch's cosine, whose norms are at least 1e-8 too."""
    images = []
    for b in range(x.shape[0]):
        features, label = x[b].flatten(1).double(), target[b].flatten()
        out = torch.zeros_like(features[0])
        for k in range(classes):
            own = (label == k) & (label != ignore_index)
            some = features[:, own]
            prototype = some.sum(1, keepdim=True) / (own.sum() + 1e-6)
            cosine = (some * prototype).sum(0) / (norm(some) * norm(prototype))
            out = out.masked_scatter(own, cosine)
        images.append(out)
    return torch.stack(images).view(target.shape)


def norm(x: torch.Tensor) -> torch.Tensor:
    return torch.where((x == 0).all(0), 1e-8, x.norm(dim=0).clamp(min=1e-8))


@pytest.mark.parametrize(("shape", "classes"), SHAPES, ids=str)
@pytest.mark.parametrize("coherent", [False, True], ids=["random", "coherent"])
def test_equals_the_formula(backend: str, shape: tuple[int, ...], classes: int, coherent: bool) -> None:
    x = torch.randn(shape) + 0.5
    target = labels(shape, classes, coherent, 0.0 if coherent else 0.3)
    upstream = torch.randn(target.shape)
    value, gradient = value_and_gradient(lambda x: class_similarity(x, target, num_classes=classes), x, upstream)
    want, want_gradient = value_and_gradient(lambda x: formula(x, target, classes), x.double(), upstream)
    assert value.dtype == torch.float32 and value.shape == target.shape
    assert_close(value, want, 1e-6, "value")
    # terms cancel where a class has few pixels, whose cosines hardly depend on them
    assert_close(gradient, want_gradient, 5e-6, "gradient")
    assert (value[target == IGNORED] == 0).all() and (gradient.movedim(1, -1)[target == IGNORED] == 0).all()


def test_double_precision(fused: str) -> None:
    x, target = torch.randn(2, 3, 19, 23, dtype=torch.float64), labels((2, 3, 19, 23), 5, True)
    upstream = torch.randn(target.shape, dtype=torch.float64)
    got = value_and_gradient(lambda x: class_similarity(x, target, num_classes=5), x, upstream)
    want = value_and_gradient(lambda x: formula(x, target, 5), x, upstream)
    assert_close(got[0], want[0], 1e-14)
    assert_close(got[1], want[1], 1e-13)


def test_gradcheck(backend: str) -> None:
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    target = labels(x.shape, 3, False)
    assert torch.autograd.gradcheck(
        lambda x: class_similarity(x, target, num_classes=3), x, fast_mode=backend in EMULATED
    )


def test_a_pixel_alone_is_like_itself(backend: str) -> None:
    """Its cosine is 1 whatever it is: the parts of its gradient cancel."""
    x, target = torch.randn(1, 8, 2, 3), torch.arange(6).reshape(1, 2, 3)
    value, gradient = value_and_gradient(lambda x: class_similarity(x, target, num_classes=6), x)
    assert_close(value, torch.ones(1, 2, 3), 1e-6)
    assert gradient.abs().max() < 1e-5 / x.norm(dim=1).min()


@pytest.mark.parametrize("size", [1e-3, 1e4])
def test_size_does_not_matter(backend: str, size: float) -> None:
    x, target = torch.randn(2, 5, 6, 7), labels((2, 5, 6, 7), 3, True)
    upstream = torch.randn(target.shape)
    value, gradient = value_and_gradient(lambda x: class_similarity(x, target, num_classes=3), size * x, upstream)
    want, want_gradient = value_and_gradient(lambda x: formula(x, target, 3), (size * x).double(), upstream)
    assert_close(value, want, 1e-6)
    assert_close(gradient, want_gradient, 5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_features(backend: str, dtype: torch.dtype) -> None:
    """A pixel of 0 has cosine 0, and its gradient divides by 1e-8; a class of such pixels likewise."""
    x, target = torch.randn(2, 3, 4, 5, dtype=dtype), torch.zeros(2, 4, 5, dtype=torch.long)
    target[:, 2:] = 1
    x[:, :, 0, :2] = x[:, :, 2:] = 0
    upstream = torch.randn(2, 4, 5, dtype=torch.float64)
    value, gradient = value_and_gradient(lambda x: class_similarity(x, target, num_classes=2), x, upstream)
    assert (value[:, 0, :2] == 0).all() and (value[:, 2:] == 0).all()
    want, want_gradient = value_and_gradient(lambda x: formula(x, target, 2), x.double(), upstream)
    assert_close(value, want, 1e-6)
    assert torch.equal(gradient[:, :, 2:], torch.zeros_like(gradient[:, :, 2:]))
    zero = torch.zeros_like(gradient, dtype=torch.bool)
    zero[:, :, 0, :2] = True
    for some in (zero, ~zero):  # of other sizes
        assert_close(gradient[some], want_gradient[some], 5e-6)


@pytest.mark.parametrize("ignore_index", [0, 2, 255, -100])
def test_what_is_ignored_may_be_anything(backend: str, ignore_index: int) -> None:
    x, target = torch.randn(2, 5, 6, 7), torch.randint(0, 3, (2, 6, 7))
    target[:, 1:4] = target[0, 0, :3] = ignore_index
    upstream = torch.randn(2, 6, 7)
    ignored = target == ignore_index

    def run(x: torch.Tensor) -> torch.Tensor:
        return class_similarity(x, target, num_classes=3, ignore_index=ignore_index)

    want = value_and_gradient(run, x, upstream)
    x.masked_fill_(ignored.unsqueeze(1), torch.nan)
    x[:, :, 2], upstream[ignored] = torch.inf, torch.nan
    got = value_and_gradient(run, x, upstream)
    if backend != "reference":  # plain PyTorch multiplies what arrives by 0
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert (got[1].movedim(1, -1)[ignored] == 0).all()
    assert torch.equal(got[0], want[0]) and (got[0][ignored] == 0).all()
    assert_close(got[0], formula(x.nan_to_num(0, 0, 0), target, 3, ignore_index), 1e-6)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(backend: str, half: torch.dtype) -> None:
    x, target = torch.randn(2, 3, 16, 20).to(half), labels((2, 3, 16, 20), 4, True)
    upstream = 1024 * torch.randn(target.shape)
    value, gradient = value_and_gradient(lambda x: class_similarity(x, target, num_classes=4), x, upstream)
    want, want_gradient = value_and_gradient(lambda x: formula(x, target, 4), x.double(), upstream)
    assert value.dtype == torch.float32 and gradient.dtype == half
    assert_close(value, want, 1e-6)
    assert_close(gradient, want_gradient, 5e-6 + 2 * ROUNDING[half])


def test_opcheck(fused: str) -> None:
    x, target = torch.randn(2, 3, 4, 5).to(torch.bfloat16), torch.randint(0, 3, (2, 4, 5))
    torch.library.opcheck(kernel("class_similarity", fused), (x, target, 4, 1))
    similarity, *rest = kernel("class_similarity", fused)(x, target, 4, 1)
    args = (x, target, similarity, *rest, torch.randn(2, 4, 5), 1)
    torch.library.opcheck(kernel("class_similarity_backward", fused), args)


def test_labels_that_are_none(fused: str) -> None:
    """Where looking at labels would synchronise, no number comes of them. (The public function looks, on CPU tensors.)"""
    x, target = torch.randn(1, 2, 6, 7), torch.randint(0, 3, (1, 6, 7))
    target[0, 3, 2] = -1
    if fused == "cpp":
        with pytest.raises(
            RuntimeError, match="class_similarity: target holds the label -1, want 0 to 2 or ignore_index"
        ):
            class_similarity(x, target, num_classes=3)
        return
    similarity, *rest = kernel("class_similarity", fused)(x, target, 3, -100)
    none = (target == 0) | (target == -1)
    assert similarity[none].isnan().all() and similarity[~none].isfinite().all()
    upstream = torch.randn(1, 6, 7)
    gradient = kernel("class_similarity_backward", fused)(x, target, similarity, *rest, upstream, -100)
    assert gradient.movedim(1, -1)[none].isnan().all() and gradient.movedim(1, -1)[~none].isfinite().all()
