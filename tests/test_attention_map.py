"""attention_map against a formula written here, and its own corners: powers, empty images, masks, magnitudes."""

from __future__ import annotations

import pytest
import torch
from operators import EMULATED, ROUNDING, assert_close, channels_last, over_threads, value_and_gradient

import medkd_fast
from medkd_fast import attention_map
from medkd_fast.backend import kernel

SHAPES = [(2, 5, 9, 11), (1, 3, 4, 5, 6), (2, 4, 31), (3, 2, 1, 1), (1, 70, 5, 7), (1, 2, 97, 101)]


def formula(x: torch.Tensor, power: float = 2.0, mask: torch.Tensor | None = None) -> torch.Tensor:
    """In fp64: energies of the pixels that count over the root of the sum of their squares."""
    maps = []
    for b in range(x.shape[0]):
        counts = torch.ones(x.shape[2:], dtype=torch.bool) if mask is None else mask[b]
        energy = x[b].double()[:, counts].abs().pow(power).sum(0)
        maps.append(torch.zeros(x.shape[2:], dtype=torch.float64).masked_scatter(counts, energy / energy.norm()))
    return torch.stack(maps)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("power", "masked"), [(2.0, False), (2.0, True), (1.0, False), (4.0, True), (2.7, False)])
def test_equals_the_formula(backend: str, shape: tuple[int, ...], power: float, masked: bool) -> None:
    x = torch.randn(shape)
    mask = torch.rand(shape[0], *shape[2:]) < 0.7 if masked else None
    if mask is not None:
        mask.flatten(1)[:, 0] = True
    upstream = torch.randn(shape[0], *shape[2:], dtype=torch.float64)
    value, gradient = value_and_gradient(lambda x: attention_map(x, power=power, mask=mask), x, upstream)
    want, want_gradient = value_and_gradient(lambda x: formula(x, power, mask), x.double(), upstream)
    assert value.dtype == torch.float32
    assert_close(value, want, 1e-6, "value")
    if shape[2:] == (1, 1):  # the map of one pixel is constant: what is left is the rounding of a difference
        assert gradient.abs().max() <= 4 * ROUNDING[torch.float32] * upstream.abs().max() * power / x.abs().min()
    else:
        assert_close(gradient, want_gradient, 1e-5, "gradient")


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 3.0, 4.0])
def test_double_precision(fused: str, power: float) -> None:
    x = torch.randn(2, 3, 19, 23, dtype=torch.float64)
    upstream = torch.randn(2, 19, 23, dtype=torch.float64)
    value, gradient = value_and_gradient(lambda x: attention_map(x, power=power), x, upstream)
    want, want_gradient = value_and_gradient(lambda x: formula(x, power), x, upstream)
    assert value.dtype == torch.float64
    assert_close(value, want, 1e-13)
    assert_close(gradient, want_gradient, 1e-13)


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 4.0])
def test_gradcheck(backend: str, power: float) -> None:
    # away from 0, where the first power has no derivative
    x = (torch.rand(2, 3, 3, 4, dtype=torch.float64) + 0.5) * torch.randn(2, 3, 3, 4).sign()
    mask = torch.rand(2, 3, 4) < 0.7
    x.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: attention_map(x, power=power, mask=mask), x, fast_mode=backend in EMULATED
    )


def test_the_map_has_length_one(backend: str) -> None:
    x = torch.randn(2, 6, 20, 30)
    # N roundings of 2^-24, which add up as a random walk
    assert_close(attention_map(x).flatten(1).double().norm(dim=1), torch.ones(2), 1e-7)
    # what is multiplied by a power of two has the same map, and 1 / that gradient
    upstream = torch.randn(2, 20, 30)
    value, gradient = value_and_gradient(attention_map, x, upstream)
    other, other_gradient = value_and_gradient(attention_map, 1024 * x, upstream)
    assert torch.equal(other, value)
    assert_close(1024 * other_gradient, gradient, 1e-6)


@pytest.mark.parametrize(
    ("power", "size"), [(1.0, 1e30), (1.0, 1e-30), (2.0, 3e18), (2.0, 1e-15), (3.0, 1e-10), (4.0, 1e9), (4.0, 1e-8)]
)
def test_extreme_magnitudes(backend: str, power: float, size: float) -> None:
    """Energies that float32 holds, where slopes over norms, taken one after another, would leave its range."""
    x = (size * (torch.rand(1, 3, 7, 9, dtype=torch.float64) + 0.5)).float()
    upstream = 1e-3 * torch.randn(1, 7, 9, dtype=torch.float64)
    value, gradient = value_and_gradient(lambda x: attention_map(x, power=power), x, upstream)
    want, want_gradient = value_and_gradient(lambda x: formula(x, power), x.double(), upstream)
    assert_close(value, want, 1e-6)
    # plain PyTorch makes the gradient of the energies first, with fewer bits where that is below the normal numbers
    largest = want_gradient.abs().max()
    assert_close(gradient / largest, want_gradient / largest, 1e-3 if backend == "reference" else 1e-6)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_features_of_zero(backend: str, power: float) -> None:
    """An image of zeros has a map of zeros and no gradient; a zero among others has none either."""
    x = torch.randn(3, 4, 5, 6)
    x[1] = 0
    x[0, :, 2] = 0
    x[2, 1] = -0.0
    upstream = torch.randn(3, 5, 6)
    value, gradient = value_and_gradient(lambda x: attention_map(x, power=power), x, upstream)
    others = [0, 2]
    want, want_gradient = value_and_gradient(lambda x: formula(x, power), x[others].double(), upstream[others])
    assert (value[1] == 0).all() and (gradient[1] == 0).all()
    assert_close(value[others], want, 1e-6)
    assert_close(gradient[others], want_gradient, 1e-5)
    assert (gradient[x == 0] == 0).all()


@pytest.mark.parametrize("power", [1.0, 2.0, 2.5])
def test_outside_the_mask(backend: str, power: float) -> None:
    """What lies there may be anything: the map is 0 and so is the gradient. The mask may be integers, [B, 1, *S] too."""
    x = torch.randn(3, 5, 6, 7)
    mask = torch.rand(3, 6, 7) < 0.6
    mask[1] = False
    upstream = torch.randn(3, 6, 7)
    some = [0, 2]
    want, want_gradient = value_and_gradient(lambda x: formula(x, power, mask[some]), x[some].double(), upstream[some])
    x.movedim(1, -1)[~mask] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.0, torch.nan])
    for given in (mask, mask.unsqueeze(1).to(torch.uint8)):
        for y in (x, channels_last(x)):
            value, gradient = value_and_gradient(lambda x, m=given: attention_map(x, power=power, mask=m), y, upstream)
            assert_close(value[some], want, 1e-6)
            assert_close(gradient[some], want_gradient, 1e-5)
            assert (value[~mask] == 0).all() and (gradient.movedim(1, -1)[~mask] == 0).all()


def test_no_number_stays_none(backend: str) -> None:
    x = torch.randn(2, 3, 4, 5)
    x[1, 2, 3, 4] = torch.nan
    value = attention_map(x)
    assert value[0].isfinite().all() and value[1].isnan().all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 0, 3, 5)], ids=str)
def test_nothing(backend: str, shape: tuple[int, ...]) -> None:
    value, gradient = value_and_gradient(attention_map, torch.randn(shape))
    assert value.shape == (shape[0], *shape[2:]) and gradient.shape == shape
    assert (value == 0).all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_half_precision(backend: str, half: torch.dtype, power: float) -> None:
    x = torch.randn(2, 3, 16, 20).to(half)
    mask = torch.rand(2, 16, 20) < 0.7
    upstream = 64 * torch.randn(2, 16, 20)
    for y in (x, channels_last(x)):
        value, gradient = value_and_gradient(lambda x: attention_map(x, power=power, mask=mask), y, upstream)
        want, want_gradient = value_and_gradient(lambda x: formula(x, power, mask), y.double(), upstream)
        assert value.dtype == torch.float32 and gradient.dtype == half and gradient.stride() == y.stride()
        assert_close(value, want, 1e-6)
        assert_close(gradient, want_gradient, 1e-5 + 2 * ROUNDING[half])


@pytest.mark.parametrize("shape", [(2, 5, 9, 11), (1, 20, 4, 5, 6), (1, 67, 17, 21), (1, 131, 3, 5)], ids=str)
def test_layouts(fused: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    upstream = torch.randn(shape[0], *shape[2:])
    want = value_and_gradient(attention_map, x, upstream)
    # the order of the sum over channels is another in tiles of another form
    tolerance = 0.0 if fused == "cpp" else 1e-6
    every_second = torch.stack([x, x], -1).flatten(-2)[..., ::2]
    crop = torch.nn.functional.pad(x, [2, 1] * (x.dim() - 2))[(..., *[slice(2, -1)] * (x.dim() - 2))]
    images_inside = x.movedim(0, -1).contiguous().movedim(-1, 0)
    for y in (channels_last(x), every_second, crop, images_inside, torch.stack([x, x], 1).flatten(1, 2)[:, ::2][:, :1]):
        if y.shape != x.shape:  # one channel, whose strides say nothing
            continue
        assert torch.equal(y, x)
        leaf = y.detach().requires_grad_()
        value = attention_map(leaf)
        (gradient,) = torch.autograd.grad(value, leaf, upstream)
        assert gradient.stride() == torch.empty_like(y).stride()
        assert_close(value, want[0], tolerance)
        assert_close(gradient, want[1], tolerance)


def test_gradients_that_arrive_in_any_layout(backend: str) -> None:
    x = torch.randn(2, 4, 6, 8)
    want = value_and_gradient(lambda x: attention_map(x).sum(), x)[1]
    leaf = x.clone().requires_grad_()
    for upstream in (torch.ones(()).expand(2, 6, 8), torch.ones(2, 8, 6).mT, torch.ones(2, 6, 16)[..., ::2]):
        (gradient,) = torch.autograd.grad(attention_map(leaf), leaf, upstream)
        assert_close(gradient, want, 1e-6)
    turned = torch.randn(2, 8, 6).mT
    (gradient,) = torch.autograd.grad(attention_map(leaf), leaf, turned)
    assert_close(gradient, value_and_gradient(formula, x.double(), turned)[1], 1e-5)


def test_more_tiles_than_slots_for_sums(fused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fused == "triton":
        monkeypatch.setattr("medkd_fast.kernels.attention_map.MOST_SLOTS", 3)
    shape = (2, 3, 43, 97) if fused == "triton" else (1, 1, 1030, 1030)
    x, upstream = torch.randn(shape), torch.randn(shape[0], *shape[2:])
    value, gradient = value_and_gradient(attention_map, x, upstream)
    want, want_gradient = value_and_gradient(formula, x.double(), upstream)
    assert_close(value, want, 1e-6)
    assert_close(gradient, want_gradient, 1e-5)


def test_same_bits_for_any_number_of_threads(cpp: str) -> None:
    x, upstream = torch.randn(2, 65, 130, 140), torch.randn(2, 130, 140)
    over_threads(lambda: list(value_and_gradient(attention_map, x, upstream)))


def test_compiles_into_one_graph(fused: str) -> None:
    x, upstream = torch.randn(2, 3, 8, 9), torch.randn(2, 8, 9)
    function = torch.compile(lambda x: attention_map(x, power=1.0), fullgraph=True, backend="aot_eager")
    got = value_and_gradient(function, x, upstream)
    want = value_and_gradient(lambda x: attention_map(x, power=1.0), x, upstream)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_double_backward_raises(fused: str) -> None:
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(attention_map(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_map: second derivatives"):
        gradient.square().sum().backward()


def test_opcheck(fused: str) -> None:
    for x in (torch.randn(2, 3, 4, 5), channels_last(torch.randn(2, 3, 4, 5).to(torch.bfloat16))):
        for mask in (None, torch.rand(2, 4, 5) < 0.7):
            torch.library.opcheck(kernel("attention_map", fused), (x, mask, 2.0))
            result, norms = kernel("attention_map", fused)(x, mask, 2.0)
            arguments = (x, mask, result, norms, torch.randn(2, 4, 5), 2.0)
            torch.library.opcheck(kernel("attention_map_backward", fused), arguments)


def test_bad_arguments(backend: str) -> None:
    x = torch.randn(1, 2, 4, 4)
    for power in (0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"power: got {power}, want a finite number of at least 1"):
            attention_map(x, power=power)
    with pytest.raises(ValueError, match=r"x: got shape \(2, 4\), want \[B, C, \*S\]"):
        attention_map(x[0, :, 0])
    with pytest.raises(TypeError, match=r"x: got torch\.int64"):
        attention_map(x.long())
    with pytest.raises(ValueError, match=r"mask: got shape \(1, 3, 4\), want \(1, 4, 4\) or \(1, 1, 4, 4\)"):
        attention_map(x, mask=torch.ones(1, 3, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask: got torch.float32, want booleans"):
        attention_map(x, mask=torch.ones(1, 4, 4))
    assert medkd_fast.functional.attention_map is attention_map
