"""The benchmark's baselines compute what the operators compute; a ratio to something else is worth nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from operators import assert_close, in_one, value_and_gradient

import medkd_fast

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import baselines


@pytest.mark.parametrize("kind", ["published", "plain"])
@pytest.mark.parametrize("low", [None, (4, 6)], ids=["same size", "upsampled"])
def test_pixel_losses(kind: str, low: tuple[int, ...] | None) -> None:
    student = torch.randn(2, 5, *(low or (8, 12)), dtype=torch.float64)
    teacher = torch.randn(2, 5, 8, 12, dtype=torch.float64)
    target = torch.randint(0, 5, (2, 8, 12))
    for name, args in (("decoupled_kl", (teacher, target)), ("class_kl", (teacher,))):
        fused = getattr(medkd_fast, name)
        baseline = getattr(baselines, f"{kind}_{name}")
        want, want_gradient = value_and_gradient(
            lambda x, f=fused, a=args: f(x, *a, temperature=4.0) if len(a) == 1 else f(x, *a, temperature=4.0).loss,
            student,
        )
        value, gradient = value_and_gradient(lambda x, f=baseline, a=args: f(x, *a, temperature=4.0), student)
        assert_close(value, want, 1e-12)
        assert_close(gradient, want_gradient, 1e-12)


@pytest.mark.parametrize("kind", ["published", "plain"])
@pytest.mark.parametrize("name", ["channel_relation", "pixel_relation"])
def test_relations(kind: str, name: str) -> None:
    student, teacher = (torch.randn(2, 5, 6, 7, dtype=torch.float64) for _ in range(2))
    want, want_gradient = value_and_gradient(lambda x: getattr(medkd_fast, name)(x, teacher), student)
    value, gradient = value_and_gradient(lambda x: getattr(baselines, f"{kind}_{name}")(x, teacher), student)
    assert_close(value, want, 1e-12)
    assert_close(gradient, want_gradient, 1e-12)


@pytest.mark.parametrize("kind", ["published", "plain"])
def test_pixel_relation_kl(kind: str) -> None:
    # more pixels than the 512 rows that plain takes at a time
    student, teacher = (torch.randn(2, 3, 24, 23, dtype=torch.float64) for _ in range(2))
    want, want_gradient = value_and_gradient(
        lambda x: medkd_fast.pixel_relation(x, teacher, divergence="kl"), student, torch.tensor(2.0)
    )
    baseline = getattr(baselines, f"{kind}_pixel_relation_kl")
    value, gradient = value_and_gradient(lambda x: baseline(x, teacher), student, torch.tensor(2.0))
    assert_close(value, want, 1e-12)
    assert_close(gradient, want_gradient, 1e-12)


@pytest.mark.parametrize("kind", ["published", "plain"])
@pytest.mark.parametrize("size", [(6, 7), (3, 4, 5)], ids=["2d", "3d"])
def test_standardised_mse(kind: str, size: tuple[int, ...]) -> None:
    student, teacher = (3 * torch.randn(2, 5, *size, dtype=torch.float64) + 1 for _ in range(2))
    want, want_gradient = value_and_gradient(lambda x: medkd_fast.standardised_mse(x, teacher), student)
    baseline = getattr(baselines, f"{kind}_standardised_mse")
    value, gradient = value_and_gradient(lambda x: baseline(x, teacher), student)
    assert_close(value, want, 1e-12)
    assert_close(gradient, want_gradient, 1e-12)


@pytest.mark.parametrize("kind", ["published", "plain"])
def test_attention_map(kind: str) -> None:
    x, upstream = torch.randn(2, 5, 6, 7, dtype=torch.float64), torch.randn(2, 6, 7, dtype=torch.float64)
    want, want_gradient = value_and_gradient(medkd_fast.attention_map, x, upstream)
    value, gradient = value_and_gradient(getattr(baselines, f"{kind}_attention_map"), x, upstream)
    assert_close(value, want, 1e-12)
    assert_close(gradient, want_gradient, 1e-12)


@pytest.mark.parametrize("kind", ["published", "plain"])
@pytest.mark.parametrize("name", ["class_means", "class_similarity"])
@pytest.mark.parametrize("shape", [(2, 5, 6, 7), (1, 3, 4, 5, 6)], ids=str)
def test_by_class(kind: str, name: str, shape: tuple[int, ...]) -> None:
    x, target = torch.randn(shape, dtype=torch.float64), torch.randint(0, 4, (shape[0], *shape[2:]))

    def fused(x: torch.Tensor) -> torch.Tensor:
        return in_one(getattr(medkd_fast, name)(x, target, num_classes=4))

    upstream = torch.randn(fused(x).shape)
    want, want_gradient = value_and_gradient(fused, x, upstream)
    value, gradient = value_and_gradient(lambda x: getattr(baselines, f"{kind}_{name}")(x, target, 4), x, upstream)
    assert_close(value, want, 1e-12)
    assert_close(gradient, want_gradient, 1e-12)


@pytest.mark.parametrize("kind", ["published", "plain"])
@pytest.mark.parametrize("shape", [(3, 5, 6, 7), (1, 3, 4, 5, 6)], ids=str)
def test_importance_and_affinity(kind: str, shape: tuple[int, ...]) -> None:
    student, teacher = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    target = torch.randint(0, 4, (shape[0], *shape[2:]))
    target[1:2].clamp_(max=1)  # an image with two of the classes, and one with a single class
    target[2:3] = 2
    want, want_gradient = value_and_gradient(
        lambda x: sum(medkd_fast.importance_and_affinity(x, teacher, target, num_classes=4)), student
    )
    baseline = getattr(baselines, f"{kind}_importance_and_affinity")
    value, gradient = value_and_gradient(lambda x: baseline(x, teacher, target, 4), student)
    assert_close(value, want, 1e-12)
    assert_close(gradient, want_gradient, 1e-12)


@pytest.mark.parametrize("kind", ["published", "plain"])
@pytest.mark.parametrize("size", [(8, 10), (4, 6, 2)], ids=str)
def test_max_pool(kind: str, size: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    upstream = torch.randn(2, 3, *(n // 2 for n in size), dtype=torch.float64)
    want = value_and_gradient(lambda y: medkd_fast.max_pool(y, 2).pooled, x, upstream)
    got = value_and_gradient(getattr(baselines, f"{kind}_max_pool"), x, upstream)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", ["published", "plain"])
@pytest.mark.parametrize("size", [(8, 10), (4, 6, 2)], ids=str)
def test_average_pool(kind: str, size: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    upstream = torch.randn(2, 3, *(n // 2 for n in size), dtype=torch.float64)
    want = value_and_gradient(lambda y: medkd_fast.average_pool(y, 2).pooled, x, upstream)
    got = value_and_gradient(getattr(baselines, f"{kind}_average_pool"), x, upstream)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, 1e-14)
