"""channel_gram: values by the formulas, gradients for any upstream, what it shares with channel_relation."""

from __future__ import annotations

import pytest
import torch
from operators import (
    EMULATED,
    ROUNDING,
    assert_close,
    channels_last,
    compiled,
    over_threads,
    value_and_gradient,
    where_it_runs,
)

import medkd_fast
from medkd_fast.backend import kernel
from medkd_fast.ops.channel_gram import channel_gram
from medkd_fast.ops.channel_relation import channel_relation

RELATIONS = ["cosine", "pearson", "gram", "row", "softmax"]
every_relation = pytest.mark.parametrize("relation", RELATIONS)


def sample(shape: tuple[int, ...] = (2, 5, 6, 7), mean: float = 0.5) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64) + mean


def truth(x: torch.Tensor, upstream: torch.Tensor | None = None, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    with medkd_fast.use_backend("reference"):
        return value_and_gradient(lambda y: channel_gram(y, **settings), x.double(), upstream)


def by_formula(x: torch.Tensor, relation: str, temperature: float) -> torch.Tensor:
    """The relation [C, C] of features [C, N]."""
    products = torch.einsum("ip,jp->ij", x, x)
    if relation == "cosine":
        return torch.cosine_similarity(x.unsqueeze(0), x.unsqueeze(1), dim=2)
    if relation == "pearson":
        return torch.corrcoef(x)
    if relation == "gram":
        return products / x.shape[1]
    if relation == "row":
        return products / torch.linalg.vector_norm(products, dim=1, keepdim=True)
    p = (x / temperature).softmax(1)
    return p @ p.T


@every_relation
def test_value_by_the_formula(backend: str, relation: str) -> None:
    x = sample()
    keep = torch.rand(2, 6, 7) < 0.7
    settings = {"relation": relation, "temperature": 0.7 if relation == "softmax" else None}
    want = torch.stack([by_formula(image.flatten(1), relation, 0.7) for image in x])
    got = channel_gram(x, **settings)
    assert_close(got, want, 1e-13)
    if backend != "reference":  # whose products are as symmetric as the machine's BLAS makes them
        assert torch.equal(got, got.mT) == (relation != "row")
    want = torch.stack([by_formula(image[:, counts], relation, 0.7) for image, counts in zip(x, keep, strict=True)])
    poisoned = x.masked_fill(~keep.unsqueeze(1), torch.nan)
    for mask in (keep, keep.unsqueeze(1).long()):
        assert_close(channel_gram(poisoned, mask=mask, **settings), want, 1e-13)


def test_softmax_at_temperature_one(backend: str) -> None:
    x = sample()
    want = torch.stack([by_formula(image.flatten(1), "softmax", 1.0) for image in x])
    assert_close(channel_gram(x, relation="softmax"), want, 1e-13)


SHAPES = [
    (2, 67, 24, 23),
    (1, 14, 8, 12, 10),
    (3, 5, 7, 13),
    (1, 9, 53, 67),
    (2, 2, 9, 11),
    (2, 300, 5, 6),
    (70, 3, 4, 5),
    (2, 4, 31),
]
#: In an interpreter: as many blocks of channels, and images, as there are kinds of them.
INTERPRETED = {(2, 67, 24, 23): (1, 67, 5, 7), (2, 300, 5, 6): (1, 131, 3, 5), (70, 3, 4, 5): (3, 3, 4, 5)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_relation
def test_equals_the_definition(fused: str, relation: str, shape: tuple[int, ...]) -> None:
    shape = INTERPRETED.get(shape, shape) if fused == "triton" and not torch.cuda.is_available() else shape
    x = sample(shape)
    mask = torch.rand(shape[0], *shape[2:]) < 0.8
    upstream = torch.randn(shape[0], shape[1], shape[1], dtype=torch.float64)  # not symmetric
    settings = {"relation": relation, "mask": mask}
    # contract, generic: 1e-5 in fp32
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        features = x.to(dtype)
        got, gradient = value_and_gradient(lambda y: channel_gram(y, **settings), features, upstream.to(dtype))
        want, want_gradient = truth(features, upstream.to(dtype), **settings)
        assert got.dtype == dtype
        assert_close(got, want, tolerance, "value")
        assert_close(gradient, want_gradient, tolerance, "gradient")


@pytest.mark.parametrize("shape", [(2, 1, 5, 7), (2, 4, 1, 1)], ids=["one channel", "one pixel"])
@every_relation
def test_one_channel_and_one_pixel(fused: str, relation: str, shape: tuple[int, ...]) -> None:
    x = sample(shape).float()
    upstream = torch.randn(2, shape[1], shape[1])
    got, gradient = value_and_gradient(lambda y: channel_gram(y, relation=relation), x, upstream)
    want, want_gradient = truth(x, upstream, relation=relation)
    assert_close(got, want, 1e-6)
    # where the relation does not depend on the features, what remains is the rounding of 1 - 1 over a norm
    assert (gradient - want_gradient).norm() <= 1e-5 * want_gradient.norm() + 1e-5


@every_relation
def test_gradcheck(backend: str, relation: str) -> None:
    x = sample((3, 4, 3, 4)).requires_grad_()
    mask = torch.rand(3, 3, 4) < 0.7
    mask[1] = False
    temperature = 0.6 if relation == "softmax" else None
    assert torch.autograd.gradcheck(
        lambda y: channel_gram(y, relation=relation, temperature=temperature, mask=mask),
        x,
        fast_mode=backend in EMULATED,
    )


@every_relation
def test_channel_relation_compares_it(backend: str, relation: str) -> None:
    student, teacher = sample(), sample()
    for divergence in ("mse", "kl") if relation != "softmax" else ("mse",):
        want, want_gradient = value_and_gradient(
            lambda x, d=divergence: channel_relation(x, teacher, relation=relation, divergence=d, temperature=1.0),
            student,
        )

        def composed(x: torch.Tensor, d: str = divergence) -> torch.Tensor:
            r_s, r_t = (channel_gram(y, relation=relation) for y in (x, teacher))
            if d == "mse":
                return (r_s - r_t).square().mean()
            return torch.nn.functional.kl_div(r_s.log_softmax(2), r_t.softmax(2), reduction="sum") / (2 * 5)

        value, gradient = value_and_gradient(composed, student)
        assert_close(value, want, 1e-12)
        assert_close(gradient, want_gradient, 1e-12)


def test_pearson_survives_a_large_mean(backend: str) -> None:
    x = sample((2, 9, 40, 50), 1e3).float()
    upstream = torch.randn(2, 9, 9)
    got, gradient = value_and_gradient(lambda y: channel_gram(y, relation="pearson"), x, upstream)
    want, want_gradient = truth(x, upstream, relation="pearson")
    assert_close(got, want, 1e-5)
    assert_close(gradient, want_gradient, 1e-5)


@every_relation
def test_zero_rows(backend: str, relation: str) -> None:
    x = sample((2, 6, 13, 11)).float()
    x[:, 2] = 0
    upstream = torch.randn(2, 6, 6)
    got, gradient = value_and_gradient(lambda y: channel_gram(y, relation=relation), x, upstream)
    want, want_gradient = truth(x, upstream, relation=relation)
    assert_close(got, want, 1e-6)
    others = [0, 1, 3, 4, 5]
    assert_close(gradient[:, 2], want_gradient[:, 2], 1e-5)  # may be divided by 1e-12
    assert_close(gradient[:, others], want_gradient[:, others], 1e-5)


@every_relation
def test_no_pixel_that_counts(backend: str, relation: str) -> None:
    x = torch.full((2, 3, 4, 5), torch.nan)
    mask = torch.zeros(2, 4, 5, dtype=torch.bool)
    got, gradient = value_and_gradient(lambda y: channel_gram(y, relation=relation, mask=mask), x)
    assert (got == 0).all() and (gradient == 0).all()
    for shape in ((0, 3, 4, 5), (2, 3, 0, 5)):
        got, gradient = value_and_gradient(lambda y: channel_gram(y, relation=relation), torch.zeros(shape))
        assert got.shape == (shape[0], 3, 3) and (got == 0).all() and gradient.shape == shape


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@every_relation
def test_half_precision(fused: str, half: torch.dtype, relation: str) -> None:
    x = sample((2, 9, 32, 48)).to(half)
    upstream = torch.randn(2, 9, 9)
    if relation == "softmax":
        upstream = 2.0**20 * upstream  # or fp16 cannot hold the gradient
    got, gradient = value_and_gradient(lambda y: channel_gram(y, relation=relation), x, upstream)
    want, want_gradient = truth(x, upstream, relation=relation)
    assert (got.dtype, gradient.dtype) == (torch.float32, half)
    assert_close(got, want, 1e-6)
    assert_close(gradient, want_gradient, 2 * ROUNDING[half])


@every_relation
def test_layouts_give_the_same_bits(fused: str, relation: str) -> None:
    x, upstream = sample((2, 5, 36, 50)).float(), torch.randn(2, 5, 5)
    want, want_gradient = value_and_gradient(lambda y: channel_gram(y, relation=relation), x, upstream)
    for layout in (channels_last(x), x.transpose(2, 3).contiguous().transpose(2, 3)):
        got, gradient = value_and_gradient(lambda y: channel_gram(y, relation=relation), layout, upstream.mT.clone().mT)
        assert torch.equal(got, want) and torch.equal(gradient, want_gradient)
        assert gradient.stride() == layout.stride()


@every_relation
def test_same_bits_for_any_number_of_threads(cpp: str, relation: str) -> None:
    for shape in ((3, 9, 100, 60), (1, 140, 30, 20)):
        x, upstream = sample(shape).float(), torch.randn(shape[0], shape[1], shape[1])
        over_threads(
            lambda: list(value_and_gradient(lambda y: channel_gram(y, relation=relation), x, upstream))  # noqa: B023
        )


@pytest.mark.parametrize("relation", ["row", "softmax"])
def test_upstream_gradients(backend: str, relation: str) -> None:
    x = sample()
    _, want = value_and_gradient(lambda y: channel_gram(y, relation=relation), x)
    leaf = x.clone().requires_grad_()
    total = channel_gram(leaf, relation=relation).sum()  # an upstream of stride 0
    for factor in (0.0, 3.0):  # a retained graph
        (gradient,) = torch.autograd.grad(factor * total, leaf, retain_graph=True)
        assert_close(gradient, factor * want, 1e-14)
    with torch.no_grad():
        assert not channel_gram(leaf, relation=relation).requires_grad
    if backend == "cpp":
        (gradient,) = torch.autograd.grad(total, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=r"channel_gram: second derivatives .*use_backend\('reference'\)"):
            gradient.sum().backward()


@every_relation
def test_opcheck(fused: str, relation: str) -> None:
    for x, mask in ((sample(), None), (sample().bfloat16(), torch.rand(2, 6, 7) < 0.7)):
        args = (x, mask, relation, 0.5)
        torch.library.opcheck(kernel("channel_gram", fused), args)
        matrix, state = kernel("channel_gram", fused)(*args)
        args = (channels_last(x), mask, matrix, state, torch.randn_like(matrix), relation, 0.5)
        torch.library.opcheck(kernel("channel_gram_backward", fused), args)


@pytest.mark.parametrize("relation", ["cosine", "softmax"])
def test_compiles_into_one_graph(backend: str, relation: str) -> None:
    torch._dynamo.reset()
    x, mask = sample((2, 5, 12, 18)), torch.rand(2, 12, 18) < 0.7

    def step(y: torch.Tensor) -> torch.Tensor:
        return channel_gram(y + 1, relation=relation, mask=mask).square().sum()

    want, want_gradient = value_and_gradient(step, x)
    value, gradient = value_and_gradient(compiled(step, backend), x)
    assert_close(value, want, 1e-13)
    assert_close(gradient, want_gradient, 1e-13)


BAD = [
    ({"relation": "dot"}, ValueError, r"relation: got 'dot', want one of cosine, pearson, gram, row, softmax"),
    ({"temperature": 2.0}, ValueError, r"temperature: got 2\.0 with relation='cosine', which has none; leave it out"),
    ({"relation": "softmax", "temperature": 0.0}, ValueError, r"temperature: got 0\.0, want a number above 0"),
    ({"mask": torch.ones(2, 5) > 0}, ValueError, r"mask: got shape \(2, 5\), want \(2, 6, 7\) or"),
    ({"mask": torch.ones(2, 6, 7)}, TypeError, r"mask: got torch\.float32, want booleans"),
    (
        {"mask": torch.ones(2, 6, 7, device="meta") > 0},
        ValueError,
        r"mask: got device meta, want c(pu|uda:0), where the features",
    ),
    ({"x": torch.ones(2, 6, 7).long()}, TypeError, r"x: got torch\.int64, want a tensor of float32"),
    ({"x": [1.0]}, TypeError, r"x: got list, want a tensor"),
    ({"x": torch.ones(2, 6)}, ValueError, r"x: got shape \(2, 6\), want \[B, C, \*S\]"),
    ({"x": torch.ones(2, 0, 6)}, ValueError, r"x: got shape \(2, 0, 6\), want at least one channel"),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD, ids=[row[2][:30] for row in BAD])
def test_bad_arguments(backend: str, settings, error, message) -> None:
    with pytest.raises(error, match=message):
        channel_gram(**{"x": sample(), **where_it_runs(settings)})
