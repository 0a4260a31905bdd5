"""max_pool against a formula written here, and its own corners: equal values, values that are no numbers, masks, borders.

A maximum and its gradient are copies of numbers: every comparison is for equality.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from operators import EMULATED, POOLS, value_and_gradient

from medkd_fast import max_pool

DTYPES = [torch.float64, torch.bfloat16, torch.float16]


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Many equal values, and zeros of both signs."""
    return (2 * torch.randn(shape)).round().div(2).to(dtype)


def windows(x: torch.Tensor, window: tuple[int, ...], fill: float | bool) -> torch.Tensor:
    """[B, C, *S] as [B, C, *P, pixels of a window], `fill` behind the border."""
    for axis, step in enumerate(window, 2):
        missing = -x.shape[axis] % step
        x = torch.cat([x, x.new_full((*x.shape[:axis], missing, *x.shape[axis + 1 :]), fill)], axis)
    for axis, step in enumerate(window):
        x = x.unflatten(2 + 2 * axis, (-1, step))
    axes = range(len(window))
    return x.permute(0, 1, *(2 + 2 * a for a in axes), *(3 + 2 * a for a in axes)).flatten(2 + len(window))


def formula(
    x: torch.Tensor, window: int | tuple[int, ...], mask: torch.Tensor | None, upstream: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Maxima, whether any pixel counts, and the gradient."""
    sizes = x.shape[2:]
    steps = (window,) * len(sizes) if isinstance(window, int) else window
    steps = tuple(min(step, size) for step, size in zip(steps, sizes, strict=True))
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.unsqueeze(1).expand_as(x)
    of, counts = windows(x, steps, 0.0), windows(mask, steps, False)
    number = torch.arange(of.shape[-1])
    no_number = counts & of.isnan()
    largest = torch.where(counts & ~no_number, of, -torch.inf).amax(-1, keepdim=True)
    first = torch.where(counts & (of == largest), number, of.shape[-1]).amin(-1)
    place = torch.where(no_number.any(-1), torch.where(no_number, number, -1).amax(-1), first)
    some = counts.any(-1)
    place = torch.where(some, place, 0).unsqueeze(-1)
    value = torch.where(some, of.gather(-1, place).squeeze(-1), 0)
    # where each window's gradient goes, by the windows of the pixels' numbers
    pixel = windows(torch.arange(math.prod(sizes)).reshape(1, 1, *sizes), steps, -1).expand_as(of)
    target = pixel.gather(-1, place).squeeze(-1)
    gradient = torch.zeros_like(x).flatten(2)
    for b, c in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1])).reshape(-1, 2).tolist():
        own = some[b, c]
        gradient[b, c, target[b, c][own]] = upstream[b, c][own]
    return value, some[:, 0], gradient.reshape(x.shape)


def check(x: torch.Tensor, window: int | tuple[int, ...], mask: torch.Tensor | None = None) -> torch.Tensor:
    """Compares with the formula, with an upstream gradient in another order of memory. Returns the gradient."""
    got = max_pool(x, window, mask=mask)
    shape = got.pooled.shape
    upstream = torch.randn(shape[::-1]).to(x.dtype).permute(*reversed(range(len(shape))))
    value, gradient = value_and_gradient(lambda y: max_pool(y, window, mask=mask).pooled, x, upstream)
    want, some, want_gradient = formula(x, window, mask, upstream)
    assert value.dtype == gradient.dtype == x.dtype and value.is_contiguous()
    for name, a, b in (
        ("value", value, want),
        ("without a gradient", got.pooled, want),
        ("gradient", gradient, want_gradient),
    ):
        assert torch.equal(a.isnan(), b.isnan()), f"{name}: other values are no numbers"
        assert torch.equal(a.nan_to_num(0), b.nan_to_num(0)), name
    assert got.counted is None if mask is None else torch.equal(got.counted, some)
    return gradient


@pytest.mark.parametrize(("shape", "window"), POOLS, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_equals_the_formula(backend: str, shape: tuple[int, ...], window: int | tuple[int, ...], masked: bool) -> None:
    x, mask = drawn(shape), None
    if masked:
        mask = torch.rand(shape[0], *shape[2:]) < 0.4
        x.masked_fill_(~mask.unsqueeze(1), torch.nan)
    check(x, window, mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [2, (3, 4), (2, 1)], ids=str)
def test_dtypes(backend: str, dtype: torch.dtype, window: int | tuple[int, int]) -> None:
    x = drawn((1, 2, 6, 16), dtype)
    x[..., ::3] *= 1e-7  # subnormal in float16
    check(x, window)
    check(x, window, torch.rand(1, 6, 16) < 0.4)


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
@pytest.mark.parametrize("window", [2, (3, 4), (9, 8)], ids=str)
def test_what_is_infinite_or_no_number(backend: str, dtype: torch.dtype, window: int | tuple[int, int]) -> None:
    x = drawn((1, 3, 9, 16), dtype)
    for value, share in ((torch.inf, 0.02), (-torch.inf, 0.5), (torch.nan, 0.03), (-torch.nan, 0.03)):
        x[torch.rand(x.shape) < share] = value
    x[0, 0] = -torch.inf
    check(x, window)
    check(x, window, torch.rand(1, 9, 16) < 0.5)


@pytest.mark.parametrize("shape", [(2, 3, 9, 16), (1, 2, 4, 6, 5), (1, 2, 30)], ids=str)
def test_as_pytorch(backend: str, shape: tuple[int, ...]) -> None:
    """Also of several values that are no numbers PyTorch takes the last."""
    x = drawn(shape)
    x[torch.rand(shape) < 0.2] = torch.nan
    pool = [F.max_pool1d, F.max_pool2d, F.max_pool3d][len(shape) - 3]
    want, want_gradient = value_and_gradient(lambda y: pool(y, 2, ceil_mode=True), x)
    value, gradient = value_and_gradient(lambda y: max_pool(y, 2).pooled, x)
    assert torch.equal(value.nan_to_num(9), want.nan_to_num(9)) and torch.equal(gradient, want_gradient)


def test_the_first_of_equal_values(backend: str) -> None:
    x = torch.tensor([[0.0, -0.0, -0.0, 0.0], [0.0, 0.0, 0.0, -0.0]]).reshape(1, 1, 2, 4)
    _, gradient = value_and_gradient(lambda y: max_pool(y, 2).pooled, x)
    assert torch.equal(gradient, torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0]]).reshape(1, 1, 2, 4))
    _, gradient = value_and_gradient(lambda y: max_pool(y, (2, 4)).pooled, x)
    assert gradient[0, 0, 0, 0] == 1 and gradient.sum() == 1


def test_a_window_without_a_pixel_that_counts(backend: str) -> None:
    x = torch.full((2, 2, 4, 4), torch.nan)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, 0, 3], x[0, :, 0, 3] = True, -2.0
    pooled, counted = max_pool(x, 2, mask=mask)
    value, gradient = value_and_gradient(
        lambda y: max_pool(y, 2, mask=mask).pooled, x, torch.full_like(pooled, torch.inf)
    )
    assert counted.tolist() == [[[False, True], [False, False]], [[False, False], [False, False]]]
    assert pooled[0, :, 0, 1].tolist() == [-2, -2] and (pooled != 0).sum() == 2
    assert torch.equal(value, pooled)
    assert (gradient[0, :, 0, 3] == torch.inf).all() and (gradient != 0).sum() == 2


def test_a_window_longer_than_its_axis(backend: str) -> None:
    x = drawn((1, 2, 3, 9))
    check(x, (7, 2))
    assert torch.equal(max_pool(x, 1000).pooled.flatten(), x.amax((2, 3)).flatten())
    assert torch.equal(max_pool(x, [7, 2]).pooled, max_pool(x, (3, 2)).pooled)


def test_gradcheck(backend: str) -> None:
    """Of values far enough apart for a finite difference."""
    x = torch.randperm(2 * 3 * 5 * 4).reshape(2, 3, 5, 4).double().requires_grad_()
    mask = torch.rand(2, 5, 4) < 0.7
    for window in (2, (1, 3)):
        assert torch.autograd.gradcheck(
            lambda y, w=window: max_pool(y, w, mask=mask).pooled, x, fast_mode=backend in EMULATED
        )


@pytest.mark.parametrize("shape", [(2, 3, 64, 80), (1, 1, 5000), (1, 2, 1030, 6)], ids=str)
def test_large(cpp: str, shape: tuple[int, ...]) -> None:
    """More windows in a line than are taken at a time."""
    mask = torch.rand(shape[0], *shape[2:]) < 0.5
    for window in (2, 3, 40):
        check(drawn(shape), window)
        check(drawn(shape), window, mask)
