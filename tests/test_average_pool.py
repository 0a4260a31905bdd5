"""average_pool against a formula in fp64 written here, and its own corners: masks, borders, windows of any size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from operators import EMULATED, POOLS, ROUNDING, assert_close, channels_last, value_and_gradient

from medkd_fast import average_pool

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def formula(x: torch.Tensor, window: int | tuple[int, ...], mask: torch.Tensor | None) -> torch.Tensor:
    """In fp64, window by window."""
    axes = x.dim() - 2
    steps = (window,) * axes if isinstance(window, int) else window
    mask = torch.ones(x.shape[0], *x.shape[2:], dtype=torch.bool) if mask is None else mask
    numbers = [-(-size // step) for size, step in zip(x.shape[2:], steps, strict=True)]
    pooled = torch.zeros(*x.shape[:2], *numbers, dtype=torch.float64)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in numbers)).reshape(-1, axes).tolist():
        inside = tuple(slice(k * step, (k + 1) * step) for k, step in zip(place, steps, strict=True))
        for image in range(len(x)):
            own = mask[(image, *inside)]
            if own.any():
                pooled[(image, slice(None), *place)] = x[(image, slice(None), *inside)][:, own].double().mean(1)
    return pooled


def check(x: torch.Tensor, window: int | tuple[int, ...], mask: torch.Tensor | None = None) -> torch.Tensor:
    """Compares with the formula, with an upstream gradient in another order of memory. Returns the gradient."""
    got = average_pool(x, window, mask=mask)
    shape = got.pooled.shape
    upstream = torch.randn(shape[::-1]).permute(*reversed(range(len(shape)))).to(got.pooled)
    value, gradient = value_and_gradient(lambda y: average_pool(y, window, mask=mask).pooled, x, upstream)
    truth = x.double()
    want, want_gradient = value_and_gradient(lambda y: formula(y, window, mask), truth, upstream.double())
    assert value.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert gradient.dtype == x.dtype and value.is_contiguous() and torch.equal(value, got.pooled)
    # a float's is a sum of at most 64 before it is divided
    assert_close(value, want, 16 * ROUNDING[value.dtype], "value")
    assert_close(gradient, want_gradient, 4 * ROUNDING[x.dtype], "gradient")
    counts = torch.ones_like(x[:, 0]) if mask is None else mask
    assert torch.equal(got.number, number(counts, window))
    return gradient


def number(mask: torch.Tensor, window: int | tuple[int, ...]) -> torch.Tensor:
    """Of the pixels that count in every window."""
    axes = mask.dim() - 1
    steps = (window,) * axes if isinstance(window, int) else window
    missing = [n for size, step in zip(mask.shape[:0:-1], steps[::-1], strict=True) for n in (0, -size % step)]
    padded = F.pad(mask.int(), missing)
    for axis, step in enumerate(steps, 1):
        padded = padded.unflatten(axis, (-1, step)).sum(axis + 1)
    return padded.int()


@pytest.mark.parametrize(("shape", "window"), POOLS, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_equals_the_formula(backend: str, shape: tuple[int, ...], window: int | tuple[int, ...], masked: bool) -> None:
    x, mask = torch.randn(shape), None
    if masked:
        mask = torch.rand(shape[0], *shape[2:]) < 0.4
        x.masked_fill_(~mask.unsqueeze(1), torch.nan)
    check(x, window, mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [2, (3, 4), (2, 1), (9, 16)], ids=str)
def test_dtypes(backend: str, dtype: torch.dtype, window: int | tuple[int, int]) -> None:
    x = torch.randn(1, 2, 9, 16).to(dtype)
    check(x, window)
    check(x, window, torch.rand(1, 9, 16) < 0.4)


def test_half_precision_does_not_overflow(backend: str) -> None:
    x = torch.full((1, 1, 4, 4), 60000.0, dtype=torch.float16)
    assert (average_pool(x, 2).pooled == x[0, 0, 0, 0].float()).all()


@pytest.mark.parametrize("shape", [(2, 3, 9, 16), (1, 2, 4, 6, 5), (1, 2, 30)], ids=str)
def test_as_pytorch(backend: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    pool = [F.avg_pool1d, F.avg_pool2d, F.avg_pool3d][len(shape) - 3]
    want = value_and_gradient(lambda y: pool(y, 2, ceil_mode=True, count_include_pad=False), x)
    got = value_and_gradient(lambda y: average_pool(y, 2).pooled, x)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, 1e-6)


def test_a_window_without_a_pixel_that_counts(backend: str) -> None:
    x = torch.full((2, 2, 4, 4), torch.nan)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, 0, 3], x[0, :, 0, 3] = True, -2.0
    pooled, counted = average_pool(x, 2, mask=mask)
    upstream = torch.full_like(pooled, 3.0)
    upstream[0, :, 1] = torch.inf
    value, gradient = value_and_gradient(lambda y: average_pool(y, 2, mask=mask).pooled, x, upstream)
    assert counted.tolist() == [[[0, 1], [0, 0]], [[0, 0], [0, 0]]]
    assert pooled[0, :, 0, 1].tolist() == [-2, -2] and (pooled != 0).sum() == 2
    assert torch.equal(value, pooled)
    assert (gradient[0, :, 0, 3] == 3).all() and (gradient != 0).sum() == 2


def test_a_window_longer_than_its_axis(backend: str) -> None:
    x = torch.randn(1, 2, 3, 9)
    assert_close(average_pool(x, 1000).pooled.flatten(), x.mean((2, 3)).flatten(), 1e-6)
    assert torch.equal(average_pool(x, [7, 2]).pooled, average_pool(x, (3, 2)).pooled)


def test_gradcheck(backend: str) -> None:
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 5, 4) < 0.7
    for window in (2, (1, 3)):
        assert torch.autograd.gradcheck(
            lambda y, w=window: average_pool(y, w, mask=mask).pooled, x, fast_mode=backend in EMULATED
        )


@pytest.mark.parametrize("shape", [(2, 3, 64, 80), (1, 1, 5000), (1, 2, 1030, 6), (1, 70, 40, 40)], ids=str)
def test_large(cpp: str, shape: tuple[int, ...]) -> None:
    """More windows in a line, and more pixels in a window, than are taken at a time."""
    x, mask = torch.randn(shape), torch.rand(shape[0], *shape[2:]) < 0.5
    for window in (7, 40, 600):
        window = tuple(min(window, n) for n in shape[2:])
        for y in (x, channels_last(x)) if x.dim() == 4 else (x,):
            check(y, window)
            check(y, window, mask)
