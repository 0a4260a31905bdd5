"""pixel_affinity: entries, what pixel_relation makes of them, gradient, layouts, sizes around the tiles, errors."""

from __future__ import annotations

import pytest
import torch
from operators import EMULATED, ROUNDING, assert_close, channels_last, compiled, over_threads, value_and_gradient

import medkd_fast
from medkd_fast.backend import kernel
from medkd_fast.ops.pixel_affinity import pixel_affinity
from medkd_fast.ops.pixel_relation import pixel_relation

RELATIONS = ("cosine", "pearson", "gram")


def sample(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64) + 0.5


def truth(x: torch.Tensor, relation: str, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with medkd_fast.use_backend("reference"):
        return value_and_gradient(lambda y: pixel_affinity(y, relation=relation), x.double(), upstream)


def test_entries(backend: str) -> None:
    x = sample((2, 5, 2, 3))
    flat = x.flatten(2)
    cosine, pearson, gram = (pixel_affinity(x, relation=relation) for relation in RELATIONS)
    for b in range(2):
        correlations = torch.corrcoef(flat[b].T)
        assert_close(pearson[b], correlations, 1e-13)
        for i in range(6):
            for j in range(6):
                a, c = flat[b, :, i], flat[b, :, j]
                assert_close(cosine[b, i, j], torch.cosine_similarity(a, c, dim=0), 1e-13)
                assert_close(gram[b, i, j], (a * c).mean(), 1e-13)


@pytest.mark.parametrize("relation", RELATIONS)
def test_pixel_relation_is_the_difference_of_two(backend: str, relation: str) -> None:
    student, teacher = sample((2, 5, 6, 7)), sample((2, 3, 6, 7))
    s, t = (pixel_affinity(x, relation=relation) for x in (student, teacher))
    assert_close(pixel_relation(student, teacher, relation=relation), (s - t).square().mean(), 1e-12)


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize(
    "shape", [(2, 5, 7, 9), (1, 64, 8, 8), (3, 1, 5, 13), (1, 17, 3, 5, 19), (2, 3, 1), (1, 4, 31, 37)], ids=str
)
def test_equals_the_definition(backend: str, relation: str, shape: tuple[int, ...]) -> None:
    if backend == "triton":  # in an interpreter
        shape = {(1, 4, 31, 37): (1, 4, 9, 15)}.get(shape, shape)
    x = sample(shape)
    pixels = x[0, 0].numel()
    upstream = torch.randn(shape[0], pixels, pixels, dtype=torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2.0**-8)):
        rounded = x.to(dtype)
        affinity, gradient = value_and_gradient(lambda y: pixel_affinity(y, relation=relation), rounded, upstream)
        want, want_gradient = truth(rounded, relation, upstream)
        assert affinity.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(affinity, want, min(tolerance, 1e-5), "value")
        if min(shape[1], pixels) > 1 or relation == "gram":
            assert_close(gradient, want_gradient, tolerance, "gradient")
        else:  # entries are 1, -1 or 0 and have no gradient, to the rounding of the sum over the smallest of them
            scale = 1 / rounded.double().abs().min()
            assert (gradient - want_gradient).abs().max() <= 100 * ROUNDING[affinity.dtype] * pixels * scale


@pytest.mark.parametrize("relation", RELATIONS)
def test_gradcheck(backend: str, relation: str) -> None:
    assert torch.autograd.gradcheck(
        lambda x: pixel_affinity(x, relation=relation),
        sample((2, 3, 2, 3)).requires_grad_(),
        fast_mode=backend in EMULATED,
    )


def test_the_matrix_is_symmetric(fused: str) -> None:
    affinity = pixel_affinity(sample((2, 7, 9, 17)).float())
    assert torch.equal(affinity, affinity.mT)


@pytest.mark.parametrize("shape", [(2, 5, 9, 11), (2, 5, 3, 4, 7)], ids=["2-D", "3-D"])
def test_layouts_give_the_same_bits(fused: str, shape: tuple[int, ...]) -> None:
    x = sample(shape).float()
    upstream = torch.randn(2, x[0, 0].numel(), x[0, 0].numel())
    want, want_gradient = value_and_gradient(pixel_affinity, x, upstream)
    for other in (channels_last(x), x.transpose(2, 3).contiguous().transpose(2, 3)):
        value, gradient = value_and_gradient(pixel_affinity, other, upstream.mT.contiguous().mT)
        if fused == "triton" and torch.cuda.is_available():  # a thread of a GPU has other channels of a pixel
            assert_close(value, want, 1e-6)
            assert_close(gradient, want_gradient, 1e-6)
        else:
            assert torch.equal(value, want) and torch.equal(gradient, want_gradient)
        assert gradient.stride() == other.stride()


def test_same_bits_for_any_number_of_threads(cpp: str) -> None:
    x = sample((2, 9, 30, 31)).float()
    upstream = torch.randn(2, 930, 930)
    over_threads(lambda: list(value_and_gradient(pixel_affinity, x, upstream)))


def test_zero_pixels_and_no_pixels(backend: str) -> None:
    x = sample((1, 4, 3, 3)).float()
    x[..., 1] = 0
    affinity, gradient = value_and_gradient(pixel_affinity, x)
    want, want_gradient = truth(x, "cosine", torch.ones(1, 9, 9))
    assert (affinity[0, 1] == 0).all()
    assert_close(affinity, want, 1e-6)
    zero = (x == 0).all(1, keepdim=True).expand_as(x)  # whose gradient is divided by 1e-12
    for where in (zero, ~zero):
        assert_close(gradient[where], want_gradient[where], 1e-5)
    for shape in ((0, 3, 2, 2), (2, 3, 0, 2)):
        empty, gradient = value_and_gradient(pixel_affinity, torch.zeros(shape))
        assert empty.shape == (shape[0], shape[2] * 2, shape[2] * 2) and gradient.shape == shape


def test_double_backward_raises(fused: str) -> None:
    x = sample((1, 3, 2, 2)).requires_grad_()
    (gradient,) = torch.autograd.grad(pixel_affinity(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="pixel_affinity: second derivatives"):
        gradient.sum().backward()


def test_opcheck(fused: str) -> None:
    for x in (sample((2, 3, 4, 5)), sample((1, 3, 5)).bfloat16()):
        pixels = x[0, 0].numel()
        upstream = torch.ones(x.shape[0], pixels, pixels, dtype=torch.promote_types(x.dtype, torch.float32))
        torch.library.opcheck(kernel("pixel_affinity", fused), (x, "pearson"))
        torch.library.opcheck(kernel("pixel_affinity_backward", fused), (x, upstream, "pearson"))


def test_compiles_into_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    x = sample((2, 3, 4, 5))

    def step(y: torch.Tensor) -> torch.Tensor:
        return pixel_affinity(y + 1).square().sum()

    want, want_gradient = value_and_gradient(step, x)
    value, gradient = value_and_gradient(compiled(step, backend), x)
    assert_close(value, want, 1e-13)
    assert_close(gradient, want_gradient, 1e-13)


def test_bad_arguments(backend: str) -> None:
    x = torch.randn(2, 4, 3, 5)
    with pytest.raises(ValueError, match=r"relation: got 'row', want one of cosine, pearson, gram"):
        pixel_affinity(x, relation="row")
    with pytest.raises(ValueError, match=r"x: got shape \(2, 4\), want \[B, C, \*S\]"):
        pixel_affinity(x[:, :, 0, 0])
    with pytest.raises(ValueError, match=r"x: got shape \(2, 0, 3, 5\), want at least one channel"):
        pixel_affinity(x[:, :0])
    with pytest.raises(TypeError, match=r"x: got torch\.int64, want a tensor of float32"):
        pixel_affinity(x.long())
    with pytest.raises(TypeError, match=r"x: got ndarray, want a tensor"):
        pixel_affinity(x.cpu().numpy())
