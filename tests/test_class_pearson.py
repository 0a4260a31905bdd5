"""class_pearson against a formula written here, and its own corners: constant classes, ignored pixels, processes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from operators import EMULATED, ROUNDING, assert_close, channels_last, in_new_process, over_threads, value_and_gradient

from medkd_fast import class_pearson
from medkd_fast.backend import kernel

SHAPES = [(2, 5, 9, 11), (1, 3, 4, 5, 6), (2, 4, 31), (3, 2, 1, 2), (1, 70, 5, 7), (1, 6, 97, 101)]


def pearson(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of rows, as the authors have it."""
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    return (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1) + 1e-8)


def formula(student: torch.Tensor, teacher: torch.Tensor, temperature: float, counts: torch.Tensor | None = None):
    """inter and intra, in fp64."""
    s, t = (F.softmax(x.double() / temperature, 1).movedim(1, -1).flatten(0, -2) for x in (student, teacher))  # [n, C]
    if counts is not None:
        s, t = s[counts.flatten()], t[counts.flatten()]
    return 1 - pearson(s, t).mean(), 1 - pearson(s.mT, t.mT).mean()


def loss_of(student: torch.Tensor, teacher: torch.Tensor, temperature: float, counts: torch.Tensor | None = None):
    inter, intra = formula(student, teacher, temperature, counts)
    return temperature**2 * (2 * inter + 0.5 * intra)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ignoring", [False, True], ids=["all", "ignoring"])
def test_equals_the_formula(backend: str, shape: tuple[int, ...], ignoring: bool) -> None:
    student, teacher = 3 * torch.randn(shape) + 20, 3 * torch.randn(shape)
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    if ignoring:
        target[torch.rand(target.shape) < 0.3] = -100
        target.flatten()[:2] = 0
    upstream = torch.tensor(-3.0)

    def got(x: torch.Tensor) -> torch.Tensor:
        return class_pearson(
            x, teacher, inter_weight=2.0, intra_weight=0.5, temperature=1.5, target=target if ignoring else None
        ).loss

    value, gradient = value_and_gradient(got, student, upstream)
    want, want_gradient = value_and_gradient(
        lambda x: loss_of(x, teacher, 1.5, target != -100), student.double(), upstream
    )
    assert value.dtype == torch.float32
    assert_close(value, want, 1e-5, "value")
    assert_close(gradient, want_gradient, 1e-5, "gradient")


def test_parts(backend: str) -> None:
    student, teacher = torch.randn(2, 4, 6, 7, requires_grad=True), torch.randn(2, 4, 6, 7)
    result = class_pearson(student, teacher, inter_weight=2.0, intra_weight=0.5, temperature=3.0)
    inter, intra = formula(student, teacher, 3.0)
    assert_close(result.inter, inter, 1e-5)
    assert_close(result.intra, intra, 1e-5)
    assert_close(result.loss, 9 * (2 * inter + 0.5 * intra), 1e-5)
    assert result.loss.requires_grad and not result.inter.requires_grad and not result.intra.requires_grad


def test_double_precision(fused: str) -> None:
    student, teacher = (torch.randn(2, 3, 19, 23, dtype=torch.float64) for _ in range(2))
    value, gradient = value_and_gradient(lambda x: class_pearson(x, teacher).loss, student)
    want, want_gradient = value_and_gradient(lambda x: sum(formula(x, teacher, 1.0)), student)
    assert_close(value, want, 1e-12)
    assert_close(gradient, want_gradient, 1e-12)


@pytest.mark.parametrize(("classes", "dtype"), [(17, torch.float32), (3, torch.float64)], ids=str)
def test_cuda_blocks_of_several_tiles(cuda: str, classes: int, dtype: torch.dtype) -> None:
    """More tiles of 128 pixels than there are slots for sums."""
    student, teacher = (torch.randn(1, classes, 512, 520, dtype=dtype) for _ in range(2))
    value, gradient = value_and_gradient(lambda x: class_pearson(x, teacher).loss, student)
    want, want_gradient = value_and_gradient(lambda x: sum(formula(x, teacher, 1.0)), student.double())
    assert_close(value, want, 1e-6 if dtype == torch.float32 else 1e-12)
    assert_close(gradient, want_gradient, 1e-5 if dtype == torch.float32 else 1e-10)


def test_gradcheck(backend: str) -> None:
    student, teacher = (torch.randn(2, 3, 3, 4, dtype=torch.float64) for _ in range(2))
    target = torch.randint(-1, 3, (2, 3, 4))
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: class_pearson(x, teacher, target=target, ignore_index=-1, temperature=0.5).loss,
        student,
        fast_mode=backend in EMULATED,
    )


@pytest.mark.parametrize("temperature", [1.0, 8.0])
def test_converged(backend: str, temperature: float) -> None:
    other, teacher = (torch.randn(2, 5, 20, 24, dtype=torch.float64) for _ in range(2))
    s, t = (teacher + 1e-3 * torch.randn_like(teacher)).float(), teacher.float()
    value, gradient = value_and_gradient(lambda x: class_pearson(x, t, temperature=temperature).loss, s)
    want, want_gradient = value_and_gradient(lambda x: temperature**2 * sum(formula(x, t, temperature)), s.double())
    scale = temperature**2 * sum(formula(other, t, temperature))
    assert abs(value - want) <= 1e-6 * scale
    # 1 - correlation: the gradient is what two nearly equal vectors differ by
    assert_close(gradient, want_gradient, 2e-3)


def test_constant_classes_and_pixels(backend: str) -> None:
    """A class of the same probability everywhere and a pixel without a preference have correlation 0 and finite gradients."""
    student, teacher = torch.randn(1, 3, 4, 5), torch.randn(1, 3, 4, 5)
    student[..., 0] = teacher[..., 1] = 0.0
    value, gradient = value_and_gradient(lambda x: class_pearson(x, teacher).loss, student)
    assert_close(value, sum(formula(student, teacher, 1.0)), 1e-5)
    assert gradient.isfinite().all()
    same = torch.zeros(1, 3, 4, 5)
    value, gradient = value_and_gradient(lambda x: class_pearson(x, same).loss, same)
    assert value == 2 and (gradient == 0).all()


@pytest.mark.parametrize("size", [1e4, 1e-3])
def test_saturated_and_flat(backend: str, size: float) -> None:
    student, teacher = size * torch.randn(2, 4, 9, 8), size * torch.randn(2, 4, 9, 8)
    value, gradient = value_and_gradient(lambda x: class_pearson(x, teacher).loss, student)
    want, want_gradient = value_and_gradient(lambda x: sum(formula(x, teacher, 1.0)), student.double())
    assert_close(value, want, 1e-4)
    assert gradient.isfinite().all()
    if size > 1:  # probabilities are 0 or 1, or too far from it for fp32
        assert (gradient - want_gradient).abs().max() <= 1e-6
    else:  # probabilities within 1e-3 of 1/4 are rounded to 1e-7 of 1
        assert_close(gradient, want_gradient, 2e-3)


def test_nothing_counts(backend: str) -> None:
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    target = torch.full((2, 4, 5), -100)
    value, gradient = value_and_gradient(lambda x: class_pearson(x, teacher, target=target).loss, student)
    assert value == 0 and (gradient == 0).all()
    for shape in ((0, 3, 4, 5), (2, 3, 0, 5)):
        value, gradient = value_and_gradient(
            lambda x, s=shape: class_pearson(x, torch.randn(s)).loss, torch.randn(shape)
        )
        assert value == 0 and gradient.shape == shape


def test_what_is_ignored_may_be_anything(backend: str) -> None:
    student, teacher = torch.randn(1, 3, 4, 5), torch.randn(1, 3, 4, 5)
    target = torch.zeros(1, 4, 5, dtype=torch.uint8)
    target[0, 0] = 255
    want = value_and_gradient(lambda x: class_pearson(x, teacher, target=target, ignore_index=255).loss, student)
    student[:, :, 0], teacher[:, :, 0] = torch.nan, torch.inf
    got = value_and_gradient(lambda x: class_pearson(x, teacher, target=target, ignore_index=255).loss, student)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(backend: str, half: torch.dtype) -> None:
    student, teacher = (100 * torch.rand(2, 3, 16, 20) for _ in range(2))
    upstream = torch.tensor(1024.0)
    for s, t in ((student.to(half), teacher.to(half)), (student.to(half), teacher), (student, teacher.to(half))):
        value, gradient = value_and_gradient(lambda x, t=t: class_pearson(x, t, temperature=9.0).loss, s, upstream)
        want, want_gradient = value_and_gradient(lambda x, t=t: 81 * sum(formula(x, t, 9.0)), s.double(), upstream)
        assert value.dtype == torch.float32 and gradient.dtype == s.dtype
        assert_close(value, want, 1e-5)
        assert_close(gradient, want_gradient, 1e-5 + 2 * ROUNDING[s.dtype])


@pytest.mark.parametrize("shape", [(2, 5, 9, 11), (1, 20, 4, 5, 6)], ids=str)
def test_layouts(fused: str, shape: tuple[int, ...]) -> None:
    student, teacher = torch.randn(shape), torch.randn(shape)
    want = value_and_gradient(lambda x: class_pearson(x, teacher).loss, student)
    for s, t in ((channels_last(student), channels_last(teacher)), (student, channels_last(teacher))):
        got = value_and_gradient(lambda x, t=t: class_pearson(x, t).loss, s)
        assert got[1].stride() == s.stride()
        if fused == "cpp" or (fused == "triton" and not torch.cuda.is_available()):
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        else:  # a thread of a GPU has other pixels or classes
            assert_close(got[0], want[0], 1e-6)
            assert_close(got[1], want[1], 1e-6)


def test_same_bits_for_any_number_of_threads(cpp: str) -> None:
    student, teacher = torch.randn(2, 6, 130, 140), torch.randn(2, 6, 130, 140)
    over_threads(lambda: list(value_and_gradient(lambda x: class_pearson(x, teacher).loss, student)))


def test_compiles_into_one_graph(fused: str) -> None:
    student, teacher = torch.randn(2, 3, 8, 9), torch.randn(2, 3, 8, 9)
    loss = torch.compile(lambda x: class_pearson(x, teacher).loss, fullgraph=True, backend="aot_eager")
    got = value_and_gradient(loss, student)
    want = value_and_gradient(lambda x: class_pearson(x, teacher).loss, student)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_double_backward_raises(fused: str) -> None:
    student, teacher = torch.randn(1, 2, 4, 4, requires_grad=True), torch.randn(1, 2, 4, 4)
    (gradient,) = torch.autograd.grad(class_pearson(student, teacher).loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="class_pearson: second derivatives"):
        gradient.square().sum().backward()


def test_opcheck(fused: str) -> None:
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5).to(torch.bfloat16)
    target = torch.randint(0, 3, (2, 4, 5))
    torch.library.opcheck(kernel("class_pearson", fused), (student, teacher, target, 2.0, 1))
    sums = kernel("class_pearson", fused)(student, teacher, target, 2.0, 1)
    for single in (True, False):
        torch.library.opcheck(kernel("class_pearson_terms", fused), (sums, 1.0, 2.0, 3.0, single))
    args = (student, teacher, target, torch.randn(13, dtype=torch.float64), torch.tensor(2.0), 2.0, 1)
    torch.library.opcheck(kernel("class_pearson_backward", fused), args)


PROCESSES = """
import sys, torch
import torch.distributed as dist
import torch.multiprocessing as mp
import medkd_fast

def one(rank, path, name):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 3, 5, 6, dtype=torch.float64), torch.randn(4, 3, 5, 6, dtype=torch.float64)
    with medkd_fast.use_backend(name):
        whole = student.clone().requires_grad_()
        want = medkd_fast.class_pearson(whole, teacher).loss
        want.backward()
        mine = slice(0, 3) if rank == 0 else slice(3, 4)
        part = student[mine].clone().requires_grad_()
        got = medkd_fast.class_pearson(part, teacher[mine], process_group=dist.group.WORLD).loss
        got.backward()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(part.grad / 2, whole.grad[mine], rtol=1e-10, atol=1e-15)  # DDP takes the mean
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(one, args=sys.argv[1:3], nprocs=2)
    print("equal")
"""


@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_two_processes_are_one_batch(name: str, tmp_path) -> None:
    script = tmp_path / "processes.py"
    script.write_text(PROCESSES)
    run = f"import runpy, sys; sys.argv = ['', {str(tmp_path / 'store')!r}, {name!r}]; sys.path.insert(0, {str(tmp_path)!r})"
    assert in_new_process(f"{run}; runpy.run_path({str(script)!r}, run_name='__main__')").strip() == "equal"


def test_bad_arguments(backend: str) -> None:
    x = torch.randn(1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"got spatial shapes \(4, 4\) and \(2, 2\), want equal ones"):
        class_pearson(x, x[..., :2, :2])
    with pytest.raises(ValueError, match="got 2 and 1 classes, want the same"):
        class_pearson(x, x[:, :1])
    with pytest.raises(ValueError, match=r"got 1 class, want at least 2; .*activation=\"sigmoid\""):
        class_pearson(x[:, :1], x[:, :1])
    with pytest.raises(ValueError, match=r"temperature: got 0\.0"):
        class_pearson(x, x, temperature=0.0)
    with pytest.raises(ValueError, match="teacher requires grad"):
        class_pearson(x, x.clone().requires_grad_())
