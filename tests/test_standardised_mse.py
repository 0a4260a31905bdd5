"""standardised_mse against a formula written here, and its own corners: constant channels, distant means, processes."""

from __future__ import annotations

import pytest
import torch
from operators import (
    EMULATED,
    ROUNDING,
    assert_close,
    channels_last,
    in_new_processes,
    over_threads,
    value_and_gradient,
)

import medkd_fast
from medkd_fast import standardised_mse
from medkd_fast.backend import kernel

SHAPES = [(2, 5, 9, 11), (1, 3, 4, 5, 6), (2, 4, 31), (3, 2, 1, 1), (1, 70, 5, 7), (40, 3, 2, 3), (1, 2, 97, 101)]
#: Value and gradient are made in fp64 and rounded to fp32 once.
ROUNDED = 2 * ROUNDING[torch.float32]


def standardised(x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """[C, n], in fp64."""
    x = x.double().movedim(1, 0).flatten(1)
    if mask is not None:
        x = x[:, mask.flatten()]
    return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-6)


def formula(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    return (standardised(student, mask) - standardised(teacher, mask)).square().mean()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_equals_the_formula(backend: str, shape: tuple[int, ...], masked: bool) -> None:
    student, teacher = 3 * torch.randn(shape) + 5, 0.1 * torch.randn(shape) - 2
    mask = torch.rand(shape[0], *shape[2:]) < 0.7 if masked else None
    if mask is not None:
        mask.flatten()[:2] = True
    upstream = torch.tensor(-3.0)
    value, gradient = value_and_gradient(lambda x: standardised_mse(x, teacher, mask=mask), student, upstream)
    want, want_gradient = value_and_gradient(lambda x: formula(x, teacher, mask), student.double(), upstream)
    assert value.dtype == torch.float32
    assert_close(value, want, ROUNDED, "value")
    assert_close(gradient, want_gradient, ROUNDED, "gradient")


def test_double_precision(fused: str) -> None:
    student, teacher = (torch.randn(2, 3, 19, 23, dtype=torch.float64) for _ in range(2))
    value, gradient = value_and_gradient(lambda x: standardised_mse(x, teacher), student)
    want, want_gradient = value_and_gradient(lambda x: formula(x, teacher), student)
    assert_close(value, want, 1e-13)
    assert_close(gradient, want_gradient, 1e-13)


def test_gradcheck(backend: str) -> None:
    student, teacher = (torch.randn(2, 3, 3, 4, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(2, 3, 4) < 0.7
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: standardised_mse(x, teacher, mask=mask), student, fast_mode=backend in EMULATED
    )


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_converged(backend: str, mean: float) -> None:
    other, teacher = (torch.randn(2, 4, 20, 24, dtype=torch.float64) for _ in range(2))
    s, t = (mean + teacher + 1e-3 * torch.randn_like(teacher)).float(), (mean + teacher).float()
    value, gradient = value_and_gradient(lambda x: standardised_mse(x, t), s)
    want, want_gradient = value_and_gradient(lambda x: formula(x, t), s.double())
    # sums of squares of a thousand deviations: 1e6 roundings of fp64, relative to the loss of an unrelated student
    scale = formula(other, t)
    assert abs(value - want) <= 1e-9 * scale and value >= -1e-9 * scale
    assert_close(gradient, want_gradient, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_distant_means(backend: str, dtype: torch.dtype) -> None:
    student, teacher = 1e3 + torch.randn(2, 4, 20, 24, dtype=dtype), torch.randn(2, 4, 20, 24, dtype=dtype) - 1e3
    value, gradient = value_and_gradient(lambda x: standardised_mse(x, teacher), student)
    want, want_gradient = value_and_gradient(lambda x: formula(x, teacher), student.double())
    # what a thousand deviations squared leave of fp64
    tolerance = max(1e-8, 2 * ROUNDING[dtype])
    assert_close(value, want, tolerance)
    assert_close(gradient, want_gradient, tolerance)


def test_equal_networks_have_no_loss(fused: str) -> None:
    x = 5 + torch.randn(2, 3, 30, 50)
    value, gradient = value_and_gradient(lambda s: standardised_mse(s, x), x)
    assert value == 0 and (gradient == 0).all()


def test_an_affine_student_has_none_but_for_epsilon(backend: str) -> None:
    teacher = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    # deviations of 1 and 50, each with 1e-6 on top
    assert standardised_mse(50 * teacher - 7, teacher) <= 2e-12
    assert_close(standardised_mse(-2 * teacher, teacher), torch.tensor(4 * 83 / 84, dtype=torch.float64), 1e-5)


@pytest.mark.parametrize("level", [0.0, 0.1, -1000.3, 1e-20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_constant_channels(backend: str, level: float, dtype: torch.dtype) -> None:
    """Of the student, of the teacher, of both. The sums over the pixels are rounded, and must not look like a deviation."""
    student, teacher = torch.randn(2, 4, 37, 41, dtype=dtype), torch.randn(2, 4, 37, 41, dtype=dtype)
    student[:, 0] = teacher[:, 1] = student[:, 2] = teacher[:, 2] = level
    value, gradient = value_and_gradient(lambda x: standardised_mse(x, teacher), student, torch.tensor(2.0))
    number, channels = 2 * 37 * 41, 4
    both = formula(student[:, 3:], teacher[:, 3:])  # the channel that varies in both
    # a mean square of (n - 1) / n where one is constant, up to 1e-6 in the deviation
    assert_close(value, (2 * (number - 1) / number + both) / channels, 1e-5)

    # constant in the student: a small change is divided by 1e-6
    rows = standardised(teacher)
    want = torch.zeros(channels, number, dtype=torch.float64)
    want[0] = -2 * rows[0] / 1e-6
    # in the teacher: the value is A / a², which grows with a only because of the 1e-6
    row = student[:, 1].double().flatten()
    around, deviation = row - row.mean(), row.std()
    want[1] = 2 * around * 1e-6 / (deviation + 1e-6) ** 3
    _, of_both = value_and_gradient(lambda x: formula(x, teacher[:, 3:]), student[:, 3:].double())
    want[3] = of_both.flatten() * number
    want *= 2 / (number * channels)
    got = gradient.movedim(1, 0).flatten(1)
    for c, tolerance in ((0, 1e-6), (1, 1e-6), (3, 1e-6)):
        assert_close(got[c], want[c], tolerance, f"channel {c}")
    assert (got[2] == 0).all()


def test_one_pixel(backend: str) -> None:
    """Nothing varies."""
    value, gradient = value_and_gradient(
        lambda x: standardised_mse(x, torch.randn(1, 3, 1, 1)), torch.randn(1, 3, 1, 1)
    )
    assert value == 0 and (gradient == 0).all()


@pytest.mark.parametrize("size", [1e4, 1e-3, 1e-20, 1e-37])
def test_extreme_sizes(backend: str, size: float) -> None:
    """Squares that fp32 does not have, and deviations below 1e-6."""
    student, teacher = size * torch.randn(2, 3, 9, 8), size * torch.randn(2, 3, 9, 8)
    value, gradient = value_and_gradient(lambda x: standardised_mse(x, teacher), student)
    want, want_gradient = value_and_gradient(lambda x: formula(x, teacher), student.double())
    smallest = torch.finfo(torch.float32).smallest_normal
    assert abs(value - want) <= ROUNDED * want + smallest
    assert ((gradient - want_gradient).abs() <= 1e-6 * want_gradient.abs().max() + smallest).all()


def test_nothing_counts(backend: str) -> None:
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    mask = torch.zeros(2, 4, 5, dtype=torch.bool)
    value, gradient = value_and_gradient(lambda x: standardised_mse(x, teacher, mask=mask), student)
    assert value == 0 and (gradient == 0).all()
    for shape in ((0, 3, 4, 5), (2, 3, 0, 5)):
        value, gradient = value_and_gradient(lambda x, s=shape: standardised_mse(x, torch.randn(s)), torch.randn(shape))
        assert value == 0 and gradient.shape == shape


def test_what_is_masked_may_be_anything(backend: str) -> None:
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    mask = torch.ones(2, 4, 5, dtype=torch.uint8)
    mask[:, 1], mask[1, 2, 3] = 0, 0
    want = value_and_gradient(lambda x: standardised_mse(x, teacher, mask=mask), student)
    student.masked_fill_(mask.unsqueeze(1) == 0, torch.nan)
    teacher.masked_fill_(mask.unsqueeze(1) == 0, torch.inf)
    for s, t in ((student, teacher), (channels_last(student), channels_last(teacher))):
        got = value_and_gradient(lambda x, t=t: standardised_mse(x, t, mask=mask), s)
        assert (got[1].movedim(1, -1)[mask == 0] == 0).all()
        for a, b in zip(got, want, strict=True):
            assert_close(a, b, ROUNDED)


def test_what_is_no_number_shows(backend: str) -> None:
    """Not as a constant channel."""
    for bad in (torch.nan, torch.inf):
        student, teacher = torch.randn(1, 3, 4, 5), torch.randn(1, 3, 4, 5)
        student[0, 1, 2, 3] = bad
        value, gradient = value_and_gradient(lambda x, t=teacher: standardised_mse(x, t), student)
        assert value.isnan() and gradient[:, 1].isnan().all() and gradient[:, ::2].isfinite().all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(backend: str, half: torch.dtype) -> None:
    student, teacher = (4 * torch.randn(2, 3, 16, 20) + 1 for _ in range(2))
    upstream = torch.tensor(1024.0)
    for s, t in ((student.to(half), teacher.to(half)), (student.to(half), teacher), (student, teacher.to(half))):
        value, gradient = value_and_gradient(lambda x, t=t: standardised_mse(x, t), s, upstream)
        want, want_gradient = value_and_gradient(lambda x, t=t: formula(x, t), s.double(), upstream)
        assert value.dtype == torch.float32 and gradient.dtype == s.dtype
        assert_close(value, want, ROUNDED)
        assert_close(gradient, want_gradient, ROUNDED + 2 * ROUNDING[s.dtype])


@pytest.mark.parametrize("shape", [(2, 5, 9, 11), (1, 20, 4, 5, 6), (1, 34, 7, 9)], ids=str)
def test_layouts(fused: str, shape: tuple[int, ...]) -> None:
    student, teacher = torch.randn(shape), torch.randn(shape)
    wide = torch.randn(*shape[:-1], 2 * shape[-1])
    wide[..., ::2] = student
    want = value_and_gradient(lambda x: standardised_mse(x, teacher), student)
    for s, t in (
        (channels_last(student), channels_last(teacher)),
        (student, channels_last(teacher)),
        (channels_last(student), teacher),
        (wide[..., ::2], teacher),
    ):
        got = value_and_gradient(lambda x, t=t: standardised_mse(x, t), s)
        assert got[1].stride() == torch.empty_like(s).stride()
        for a, b in zip(got, want, strict=True):
            assert_close(a, b, ROUNDED)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_cuda_blocks_of_several_tiles(cuda: str, layout: str) -> None:
    """More tiles than blocks that fill a GPU."""
    shape = (70, 70, 2, 3) if layout == "contiguous" else (4200, 2, 1, 2)
    student, teacher = torch.randn(shape), torch.randn(shape)
    if layout == "channels_last":
        student, teacher = channels_last(student), channels_last(teacher)
    assert_close(standardised_mse(student, teacher), formula(student, teacher), ROUNDED)


def test_triton_programs_of_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    if medkd_fast.backend.UNAVAILABLE["triton"]:
        pytest.skip("triton is not here")
    from medkd_fast.kernels import standardised_mse as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    student, teacher = torch.randn(2, 3, 60, 90), torch.randn(2, 3, 60, 90)
    with medkd_fast.use_backend("triton"):
        assert_close(standardised_mse(student, teacher), formula(student, teacher), ROUNDED)


def test_same_bits_for_any_number_of_threads(cpp: str) -> None:
    student, teacher = torch.randn(2, 18, 130, 140), torch.randn(2, 18, 130, 140)
    mask = torch.rand(2, 130, 140) < 0.7
    over_threads(lambda: list(value_and_gradient(lambda x: standardised_mse(x, teacher), student)))
    over_threads(
        lambda: list(value_and_gradient(lambda x: standardised_mse(x, teacher, mask=mask), channels_last(student)))
    )


def test_compiles_into_one_graph(fused: str) -> None:
    student, teacher = torch.randn(2, 3, 8, 9), torch.randn(2, 3, 8, 9)
    loss = torch.compile(lambda x: standardised_mse(x, teacher), fullgraph=True, backend="aot_eager")
    got = value_and_gradient(loss, student)
    want = value_and_gradient(lambda x: standardised_mse(x, teacher), student)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_double_backward_raises(fused: str) -> None:
    student, teacher = torch.randn(1, 2, 4, 4, requires_grad=True), torch.randn(1, 2, 4, 4)
    (gradient,) = torch.autograd.grad(standardised_mse(student, teacher), student, create_graph=True)
    with pytest.raises(RuntimeError, match="standardised_mse: second derivatives"):
        gradient.square().sum().backward()


def test_opcheck(fused: str) -> None:
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5).to(torch.bfloat16)
    mask = torch.rand(2, 4, 5) < 0.7
    torch.library.opcheck(kernel("standardised_mse", fused), (student, teacher, mask))
    sums = kernel("standardised_mse", fused)(student, teacher, mask)
    for single in (True, False):
        torch.library.opcheck(kernel("standardised_mse_terms", fused), (sums, single))
    args = (student, teacher, mask, torch.randn(12, dtype=torch.float64), torch.tensor(2.0))
    torch.library.opcheck(kernel("standardised_mse_backward", fused), args)


PROCESSES = """
import os, pathlib, sys, torch
import torch.distributed as dist
import medkd_fast

rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method="file://" + os.environ["STORE"], rank=rank, world_size=2)
torch.manual_seed(0)
student, teacher = torch.randn(4, 3, 5, 6, dtype=torch.float64), torch.randn(4, 3, 5, 6, dtype=torch.float64)
mask = torch.rand(4, 5, 6) < 0.7

def compare():  # in a function: a graph that lives on keeps the group
    whole = student.clone().requires_grad_()
    want = medkd_fast.standardised_mse(whole, teacher, mask=mask)
    want.backward()
    mine = slice(0, 3) if rank == 0 else slice(3, 4)
    part = student[mine].clone().requires_grad_()
    got = medkd_fast.standardised_mse(part, teacher[mine], mask=mask[mine], process_group=dist.group.WORLD)
    got.backward()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(part.grad / 2, whole.grad[mine], rtol=1e-10, atol=1e-15)  # DDP takes the mean

for name in ("cpp", "reference"):
    with medkd_fast.use_backend(name):
        compare()
dist.destroy_process_group()
if sys.platform == "linux":  # a thread of the group that outlives the interpreter can end the process with SIGABRT
    threads = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in threads), threads
"""


def test_two_processes_are_one_batch(tmp_path) -> None:
    if medkd_fast.backend.UNAVAILABLE["cpp"]:
        pytest.skip("the native library is not here")
    in_new_processes(PROCESSES, STORE=str(tmp_path / "store"))


def test_bad_arguments(backend: str) -> None:
    x = torch.randn(1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"got spatial sizes \(4, 4\) and \(2, 2\), want equal ones"):
        standardised_mse(x, x[..., :2, :2])
    with pytest.raises(ValueError, match="got 2 and 1 channels, want equal numbers"):
        standardised_mse(x, x[:, :1])
    with pytest.raises(ValueError, match=r"mask: got shape \(1, 4\), want \(1, 4, 4\)"):
        standardised_mse(x, x, mask=torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="teacher requires grad"):
        standardised_mse(x, x.clone().requires_grad_())
    assert medkd_fast.functional.standardised_mse is standardised_mse
