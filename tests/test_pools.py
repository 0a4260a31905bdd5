"""What holds for max_pool and for average_pool: layouts, masks, threads, compilers, bad arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from operators import assert_close, channels_last, compiled, over_threads, value_and_gradient, with_loops_of

import medkd_fast
from medkd_fast.backend import kernel

Pool = Callable[..., Any]


@pytest.fixture(params=["max_pool", "average_pool"])
def pool(request: pytest.FixtureRequest) -> Pool:
    return getattr(medkd_fast, request.param)


@pytest.mark.parametrize(("shape", "window"), [((2, 5, 7, 9), 2), ((1, 9, 3, 4, 5), 2), ((1, 34, 4, 7), 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(fused: str, pool: Pool, shape: tuple[int, ...], window: int, dtype: torch.dtype) -> None:
    x, mask = torch.randn(shape).to(dtype), torch.rand(shape[0], *shape[2:]) < 0.5
    wide = torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)
    wide[..., ::2] = x
    layouts = [
        channels_last(x),
        channels_last(torch.cat([x, x], 1))[:, shape[1] :],
        wide[..., ::2],
        x.movedim(0, -1).contiguous().movedim(-1, 0),
        x.mT.contiguous().mT,
        F.pad(x, [1, 2] * (x.dim() - 2))[(..., *[slice(1, -2)] * (x.dim() - 2))],
    ]
    for some, others in ((None, layouts), (mask, layouts[:3])):
        pooled = pool(x, window, mask=some).pooled
        upstream = torch.randn(pooled.shape[::-1]).permute(*reversed(range(pooled.dim()))).to(pooled)
        want = value_and_gradient(lambda y, m=some: pool(y, window, mask=m).pooled, x, upstream)
        for y in others:
            value, gradient = value_and_gradient(lambda z, m=some: pool(z, window, mask=m).pooled, y, upstream)
            assert value.is_contiguous() and gradient.stride() == torch.empty_like(y).stride()
            assert_close(value, want[0], 1e-6)
            assert torch.equal(gradient, want[1])


def test_masks_of_any_kind(backend: str, pool: Pool) -> None:
    x, mask = torch.randn(2, 3, 5, 6), torch.rand(2, 5, 6) < 0.5
    want = pool(x, 2, mask=mask)
    for same in (mask.long() * 3, mask.unsqueeze(1), mask.mT.contiguous().mT):
        assert all(torch.equal(a, b) for a, b in zip(pool(x, 2, mask=same), want, strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5)], ids=str)
def test_nothing(backend: str, pool: Pool, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    mask = torch.ones(shape[0], *shape[2:], dtype=torch.bool)
    pooled, counted = pool(x, 2, mask=mask)
    pooled.sum().backward()
    size = [-(-n // min(2, max(n, 1))) for n in shape[2:]]
    assert pooled.shape == (*shape[:2], *size) and x.grad.shape == shape
    assert counted.shape == (shape[0], *size)
    if pool is medkd_fast.average_pool:
        assert counted.sum() == mask.numel()


def test_same_bits_for_any_number_of_threads(cpp: str, pool: Pool) -> None:
    x, mask = torch.randn(2, 9, 130, 140), torch.rand(2, 130, 140) < 0.9
    for y in (x, channels_last(x)):
        over_threads(lambda y=y: list(value_and_gradient(lambda z: pool(z, 2, mask=mask).pooled, y)))


@pytest.mark.parametrize("instruction_set", ["portable", "avx2", "avx512"])
def test_every_build_of_the_loops(instruction_set: str) -> None:
    script = """
import torch, medkd_fast
from operators import value_and_gradient
# lines of windows that are no multiple of a vector's lanes
for width in (*range(1, 20), 33, 50, 67, 96):
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)):
        for window in ((2, 2), (1, 2), (3, 2), (3, 3)):
            x = torch.randn(2, 3, 5, width).to(dtype)
            for pool in (medkd_fast.max_pool, medkd_fast.average_pool):
                pooled = lambda y: pool(y, window).pooled
                upstream = torch.randn(pooled(x).shape)
                value, gradient = value_and_gradient(pooled, x, upstream)
                with medkd_fast.use_backend("reference"):
                    want, want_gradient = value_and_gradient(pooled, x, upstream)
                assert torch.allclose(value.double(), want.double(), limit, limit), (pool, width, dtype, window)
                assert torch.allclose(gradient.double(), want_gradient.double(), limit, limit), (pool, width, dtype, window)
"""
    with_loops_of(instruction_set, script)


def test_compiles_into_one_graph(fused: str, pool: Pool) -> None:
    x, mask = torch.randn(2, 3, 8, 9), torch.rand(2, 8, 9) < 0.5
    compiled_pool = compiled(lambda y: pool(y, 2, mask=mask), fused)
    assert torch.equal(compiled_pool(x)[1], pool(x, 2, mask=mask)[1])
    got = value_and_gradient(lambda y: compiled_pool(y).pooled, x)
    plain = value_and_gradient(lambda y: pool(y, 2, mask=mask).pooled, x)
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


def test_under_autocast(backend: str, pool: Pool) -> None:
    x = torch.randn(1, 2, 4, 6)
    want = pool(x, 2).pooled
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        pooled = pool(x, 2).pooled
    assert pooled.dtype == torch.float32 and torch.equal(pooled, want)


def test_double_backward_raises(fused: str, pool: Pool) -> None:
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(pool(x, 2).pooled.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{pool.__name__}: second derivatives"):
        gradient.square().sum().backward()


def test_opcheck(fused: str, pool: Pool) -> None:
    x, mask = torch.randn(2, 3, 5, 6), torch.rand(2, 5, 6) < 0.7
    forward, backward = (kernel(name, fused) for name in (pool.__name__, f"{pool.__name__}_backward"))
    for y, some in ((x, mask), (channels_last(x), None)):
        torch.library.opcheck(forward, (y, some, [2, 3]))
        pooled, kept = forward(y, some, [2, 3])
        saved = (kept,) if pool is medkd_fast.max_pool else (some, kept)
        torch.library.opcheck(backward, (y, *saved, torch.randn_like(pooled), [2, 3]))


def test_bad_arguments(backend: str, pool: Pool) -> None:
    x = torch.randn(1, 2, 4, 4)
    with pytest.raises(ValueError, match="window: got 0, want a whole number of at least 1"):
        pool(x, 0)
    with pytest.raises(ValueError, match=r"window: got \(2, 2, 2\), want a whole number of at least 1, or 2 of them"):
        pool(x, (2, 2, 2))
    with pytest.raises(ValueError, match="want one to three spatial dimensions"):
        pool(torch.randn(1, 2, 2, 2, 2, 2), 2)
    with pytest.raises(ValueError, match=r"mask: got shape \(1, 3, 4\), want \(1, 4, 4\)"):
        pool(x, 2, mask=torch.ones(1, 3, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"x: got torch\.int64"):
        pool(x.long(), 2)


def test_a_window_that_16_bits_do_not_number(backend: str) -> None:
    with pytest.raises(ValueError, match="window: got 182, 33124 pixels, want at most 32767"):
        medkd_fast.max_pool(torch.randn(1, 1, 182, 182), 182)
