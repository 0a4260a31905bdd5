"""spatial_kl against a formula written here, and its own corners: absent pixels, masks, distant maxima."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from operators import EMULATED, ROUNDING, assert_close, channels_last, over_threads, value_and_gradient

import medkd_fast
from medkd_fast import spatial_kl
from medkd_fast.backend import kernel

SHAPES = [(2, 5, 9, 11), (1, 3, 4, 5, 6), (2, 4, 31), (3, 2, 1, 1), (1, 70, 5, 7), (1, 2, 97, 101)]


def formula(student: torch.Tensor, teacher: torch.Tensor, temperature: float, mask: torch.Tensor | None = None):
    """[B, C], in fp64."""
    rows = []
    for b in range(student.shape[0]):
        counts = slice(None) if mask is None else mask[b].flatten()
        s, t = (F.log_softmax(x[b].flatten(1)[:, counts].double() / temperature, 1) for x in (student, teacher))
        rows.append(temperature**2 * (t.exp() * (t - s)).sum(1))
    return torch.stack(rows)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("masked", "reduction"), [(False, "mean"), (True, "mean"), (True, "sum"), (False, "none")])
def test_equals_the_formula(backend: str, shape: tuple[int, ...], masked: bool, reduction: str) -> None:
    student, teacher = 3 * torch.randn(shape) + 50, 3 * torch.randn(shape) - 20
    mask = torch.rand(shape[0], *shape[2:]) < 0.7 if masked else None
    if mask is not None:
        mask.flatten(1)[:, 0] = True
    upstream = torch.randn(shape[:2] if reduction == "none" else (), dtype=torch.float64)
    value, gradient = value_and_gradient(
        lambda x: spatial_kl(x, teacher, temperature=2.0, mask=mask, reduction=reduction), student, upstream
    )

    def want(x: torch.Tensor) -> torch.Tensor:
        each = formula(x, teacher, 2.0, mask)
        return {"mean": each.mean(), "sum": each.sum(), "none": each}[reduction]

    want_value, want_gradient = value_and_gradient(want, student.double(), upstream)
    assert value.dtype == torch.float32
    assert_close(value, want_value, 1e-5, "value")
    assert_close(gradient, want_gradient, 1e-5, "gradient")


def test_double_precision(fused: str) -> None:
    student, teacher = (torch.randn(2, 3, 19, 23, dtype=torch.float64) for _ in range(2))
    value, gradient = value_and_gradient(lambda x: spatial_kl(x, teacher), student)
    want, want_gradient = value_and_gradient(lambda x: formula(x, teacher, 4.0).mean(), student)
    assert_close(value, want, 1e-13)
    assert_close(gradient, want_gradient, 1e-13)


def test_gradcheck(backend: str) -> None:
    student, teacher = (torch.randn(2, 3, 3, 4, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(2, 3, 4) < 0.7
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: spatial_kl(x, teacher, mask=mask, reduction="none"), student, fast_mode=backend in EMULATED
    )


def test_converged(backend: str) -> None:
    other, teacher = (torch.randn(2, 4, 20, 24, dtype=torch.float64) for _ in range(2))
    s, t = (teacher + 1e-3 * torch.randn_like(teacher)).float(), teacher.float()
    value, gradient = value_and_gradient(lambda x: spatial_kl(x, t), s)
    want, want_gradient = value_and_gradient(lambda x: formula(x, t, 4.0).mean(), s.double())
    scale = formula(other, t, 4.0).mean()
    assert abs(value - want) <= 1e-6 * scale and value >= -1e-6 * scale
    assert_close(gradient, want_gradient, 2e-3)


def test_equal_maps_have_no_loss(fused: str) -> None:
    x = torch.randn(2, 3, 30, 50)
    value, gradient = value_and_gradient(lambda s: spatial_kl(s, x), x)
    assert value == 0 and (gradient == 0).all()


def test_large_values_far_apart(backend: str) -> None:
    """The maxima of the pieces differ by more than exponentials can hold."""
    student, teacher = (1e4 * torch.randn(1, 2, 100, 170) for _ in range(2))
    value, gradient = value_and_gradient(lambda x: spatial_kl(x, teacher, temperature=1.0), student)
    want, want_gradient = value_and_gradient(lambda x: formula(x, teacher, 1.0).mean(), student.double())
    assert_close(value, want, 1e-5)
    assert_close(gradient, want_gradient, 1e-5)


def test_absent_pixels(backend: str) -> None:
    """-inf in both: as if masked. In the student alone: infinitely far. In the teacher alone: counts 0."""
    student, teacher = torch.randn(1, 2, 6, 7), torch.randn(1, 2, 6, 7)
    mask = torch.rand(1, 6, 7) < 0.6
    both = [torch.where(mask, x, -torch.inf) for x in (student, teacher)]
    value, gradient = value_and_gradient(lambda x: spatial_kl(x, both[1]), both[0])
    want, want_gradient = value_and_gradient(lambda x: spatial_kl(x, teacher, mask=mask), student)
    assert_close(value, want, 1e-6)
    assert_close(gradient, want_gradient, 1e-6)
    assert spatial_kl(both[0], teacher) == torch.inf
    assert spatial_kl(student, both[1]).isfinite()
    # also where the teacher's probability underflows, in a piece of the row whose maximum is far below another's
    student, teacher = torch.randn(1, 1, 100, 170), torch.randn(1, 1, 100, 170)
    student[..., 3, 5] = -torch.inf
    teacher[..., 60:, :] += 1e4
    assert spatial_kl(student, teacher, temperature=1.0) == torch.inf
    student, teacher = torch.randn(1, 2, 6, 7), torch.randn(1, 2, 6, 7)
    nowhere = torch.full_like(student, -torch.inf)
    value, gradient = value_and_gradient(lambda x: spatial_kl(x, nowhere), student)
    assert value == 0 and (gradient == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_images_without_a_valid_pixel(backend: str, reduction: str) -> None:
    student, teacher = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5)
    mask = torch.ones(3, 4, 5, dtype=torch.bool)
    mask[1] = False
    student[1] = torch.nan  # and what lies outside the mask may be anything
    value, gradient = value_and_gradient(lambda x: spatial_kl(x, teacher, mask=mask, reduction=reduction), student)
    some = [0, 2]
    want = formula(student[some], teacher[some], 4.0)
    want = {"mean": want.mean(), "sum": want.sum(), "none": torch.stack([want[0], want.new_zeros(2), want[1]])}[
        reduction
    ]
    assert_close(value, want, 1e-5)
    assert (gradient[1] == 0).all() and not gradient.isnan().any()
    value, gradient = value_and_gradient(
        lambda x: spatial_kl(x, teacher, mask=mask & False, reduction=reduction), student
    )
    assert (value == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5)], ids=str)
def test_nothing(backend: str, shape: tuple[int, ...]) -> None:
    value, gradient = value_and_gradient(lambda x: spatial_kl(x, torch.randn(shape)), torch.randn(shape))
    assert value == 0 and gradient.shape == shape


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(backend: str, half: torch.dtype) -> None:
    student, teacher = (4 * torch.randn(2, 3, 16, 20) for _ in range(2))
    upstream = torch.tensor(1024.0)
    for s, t in ((student.to(half), teacher.to(half)), (student.to(half), teacher), (student, teacher.to(half))):
        value, gradient = value_and_gradient(lambda x, t=t: spatial_kl(x, t), s, upstream)
        want, want_gradient = value_and_gradient(lambda x, t=t: formula(x, t, 4.0).mean(), s.double(), upstream)
        assert value.dtype == torch.float32 and gradient.dtype == s.dtype
        assert_close(value, want, 1e-5)
        assert_close(gradient, want_gradient, 1e-5 + 2 * ROUNDING[s.dtype])


@pytest.mark.parametrize("shape", [(2, 5, 9, 11), (1, 20, 4, 5, 6), (1, 34, 37, 41)], ids=str)
def test_layouts(fused: str, shape: tuple[int, ...]) -> None:
    student, teacher = torch.randn(shape), torch.randn(shape)
    wide = torch.randn(*shape[:-1], 2 * shape[-1])
    wide[..., ::2] = student
    want = value_and_gradient(lambda x: spatial_kl(x, teacher), student)
    for s, t in ((channels_last(student), channels_last(teacher)), (student, channels_last(teacher))):
        got = value_and_gradient(lambda x, t=t: spatial_kl(x, t), s)
        assert got[1].stride() == s.stride()
        if fused == "cpp":
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        else:  # tiles of another form
            assert_close(got[0], want[0], 1e-6)
            assert_close(got[1], want[1], 1e-6)
    strided = spatial_kl(wide[..., ::2], teacher)
    if fused == "triton":  # likewise
        assert_close(strided, want[0], 1e-6)
    else:
        assert torch.equal(strided, want[0])


def test_same_bits_for_any_number_of_threads(cpp: str) -> None:
    student, teacher = torch.randn(2, 6, 130, 140), torch.randn(2, 6, 130, 140)
    over_threads(lambda: list(value_and_gradient(lambda x: spatial_kl(x, teacher), student)))


def test_compiles_into_one_graph(fused: str) -> None:
    student, teacher = torch.randn(2, 3, 8, 9), torch.randn(2, 3, 8, 9)
    loss = torch.compile(lambda x: spatial_kl(x, teacher, temperature=2.0), fullgraph=True, backend="aot_eager")
    got = value_and_gradient(loss, student)
    want = value_and_gradient(lambda x: spatial_kl(x, teacher, temperature=2.0), student)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_double_backward_raises(fused: str) -> None:
    student, teacher = torch.randn(1, 2, 4, 4, requires_grad=True), torch.randn(1, 2, 4, 4)
    (gradient,) = torch.autograd.grad(spatial_kl(student, teacher), student, create_graph=True)
    with pytest.raises(RuntimeError, match="spatial_kl: second derivatives"):
        gradient.square().sum().backward()


def test_opcheck(fused: str) -> None:
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5).to(torch.bfloat16)
    mask = torch.rand(2, 4, 5) < 0.7
    for reduction, upstream in (("mean", torch.tensor(2.0)), ("none", torch.randn(2, 3))):
        torch.library.opcheck(kernel("spatial_kl", fused), (student, teacher, mask, 2.0, reduction))
        rows = kernel("spatial_kl", fused)(student, teacher, mask, 2.0, reduction)[1]
        torch.library.opcheck(kernel("spatial_kl_backward", fused), (student, teacher, mask, rows, upstream, 2.0))


def test_bad_arguments(backend: str) -> None:
    x = torch.randn(1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"got spatial sizes \(4, 4\) and \(2, 2\), want equal ones"):
        spatial_kl(x, x[..., :2, :2])
    with pytest.raises(ValueError, match="got 2 and 1 channels, want equal numbers"):
        spatial_kl(x, x[:, :1])
    with pytest.raises(ValueError, match=r"temperature: got 0\.0"):
        spatial_kl(x, x, temperature=0.0)
    with pytest.raises(ValueError, match="teacher requires grad"):
        spatial_kl(x, x.clone().requires_grad_())
    assert medkd_fast.functional.spatial_kl is spatial_kl
