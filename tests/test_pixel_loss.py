"""What decoupled_kl and class_kl have in common: the frame that loads, upsamples, weighs, reduces and scales."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from operators import (
    EMULATED,
    ROUNDING,
    assert_close,
    channels_last,
    compiled,
    over_threads,
    value_and_gradient,
    where_it_runs,
    with_loops_of,
)

import medkd_fast
from medkd_fast.backend import INTERPRETED, kernel
from medkd_fast.functional import class_kl, decoupled_kl

Loss = Callable[..., torch.Tensor]


def _decoupled(student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor, **settings: object) -> torch.Tensor:
    return decoupled_kl(student, teacher, target, target_weight=0.7, nontarget_weight=2.0, **settings).loss


def _class(student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor, **settings: object) -> torch.Tensor:
    return class_kl(student, teacher, target=target, **settings)


@pytest.fixture(params=[_decoupled, _class], ids=["decoupled_kl", "class_kl"])
def loss(request: pytest.FixtureRequest) -> Loss:
    return request.param


def sample(
    shape: tuple[int, ...], low: tuple[int, ...] | None = None, spread: float = 3.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    student = spread * torch.randn(*shape[:2], *(low or shape[2:]), dtype=torch.float64)
    teacher = spread * torch.randn(shape, dtype=torch.float64)
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    target[torch.rand(target.shape) < 0.2] = -100
    return student, teacher, target


def truth(loss: Loss, student: torch.Tensor, *args: torch.Tensor, upstream: torch.Tensor | None = None, **settings):
    with medkd_fast.use_backend("reference"):
        doubles = [a.double() if a.is_floating_point() else a for a in args]
        return value_and_gradient(lambda s: loss(s, *doubles, **settings), student.double(), upstream)


SHAPES = [
    pytest.param((2, 9, 32, 48), None, id="2-D"),
    pytest.param((1, 14, 8, 16, 24), None, id="3-D"),
    pytest.param((3, 5, 7, 13), None, id="primes"),
    pytest.param((1, 3, 1, 1), None, id="one pixel"),
    pytest.param((2, 4, 31), None, id="1-D"),
    pytest.param((2, 150, 5, 11), None, id="many classes"),
    pytest.param((2, 9, 32, 64), (8, 16), id="2-D from a quarter"),
    pytest.param((2, 4, 12, 16, 20), (6, 4, 5), id="3-D from less"),
    pytest.param((2, 5, 17, 29), (5, 11), id="2-D odd ratios"),
    pytest.param((1, 3, 19, 7), (19, 1), id="one axis from one pixel"),
    pytest.param((2, 3, 37), (9,), id="1-D from less"),
    pytest.param((1, 40, 9, 500), (3, 125), id="lines longer than a tile"),
    # on a GPU the student's rows are in shared memory, and with more classes the sums along them too
    pytest.param((1, 13, 9, 70), (5, 20), id="13 classes from less"),
    pytest.param((1, 21, 6, 40), (3, 10), id="21 classes from less"),
    # 9 strips of a GPU's blocks, some of which begin at a pixel of the student's
    pytest.param((60, 2, 60, 4), (20, 2), id="a third"),
]


@pytest.mark.parametrize(("shape", "low"), SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_the_definition(loss: Loss, backend: str, shape, low, reduction: str) -> None:
    if backend == "triton" and INTERPRETED and reduction == "sum" and low is not None:
        pytest.skip("slow in the interpreter; the mean is this sum divided")
    student, teacher, target = sample(shape, low)
    weight = torch.rand(target.shape)
    upstream = torch.randn(target.shape[::-1] if reduction == "none" else (), dtype=torch.float64)
    upstream = upstream.permute(tuple(reversed(range(upstream.dim()))))  # not contiguous
    settings = {"temperature": 2.5, "reduction": reduction, "weight": weight}
    # the inputs are rounded before both sides see them
    s, t = student.float(), teacher.float()
    value, gradient = value_and_gradient(lambda x: loss(x, t, target, **settings), s, upstream)
    want, want_gradient = truth(loss, s, t, target, upstream=upstream, **settings)
    assert value.dtype == torch.float32
    # contract, generic: 1e-5; a few ulp more per class come from fp32 exponentials
    assert_close(value, want, 1e-5, "value")
    assert_close(gradient, want_gradient, 1e-5, "gradient")


def test_half_precision_of_a_student_that_stands_for_many_pixels(loss: Loss, backend: str) -> None:
    """The sum of their gradients is more than float16 holds, their mean is not."""
    student, teacher = torch.tensor([6e3, -6e3]).view(1, 2, 1, 1).half(), torch.zeros(1, 2, 9, 12)
    teacher[:, 1] = 1e5
    target = torch.zeros(1, 9, 12, dtype=torch.long)
    settings = {"temperature": 1000.0}
    value, gradient = value_and_gradient(lambda x: loss(x, teacher, target, **settings), student)
    want, want_gradient = truth(loss, student, teacher, target, **settings)
    assert gradient.dtype == torch.float16
    assert 9 * 12 * want_gradient.abs().max() > torch.finfo(torch.float16).max
    assert_close(value, want, 1e-5)
    assert_close(gradient, want_gradient, ROUNDING[torch.float16])


@pytest.mark.parametrize("low", [None, (6, 9)], ids=["same size", "upsampled"])
def test_double_precision(loss: Loss, fused: str, low) -> None:
    student, teacher, target = sample((2, 5, 12, 18), low)
    value, gradient = value_and_gradient(lambda x: loss(x, teacher, target), student)
    want, want_gradient = truth(loss, student, teacher, target)
    assert value.dtype == torch.float64
    assert_close(value, want, 1e-14, "value")
    assert_close(gradient, want_gradient, 1e-14, "gradient")


@pytest.mark.parametrize("low", [None, (2, 2)], ids=["same size", "upsampled"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(loss: Loss, backend: str, low, reduction: str) -> None:
    student, teacher, target = sample((2, 4, 3, 4), low, spread=1.0)
    weight = torch.rand(target.shape, dtype=torch.float64)
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: loss(x, teacher, target, weight=weight, reduction=reduction),
        student,
        check_undefined_grad=False,
        fast_mode=backend in EMULATED,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("low", [None, (8, 12)], ids=["same size", "upsampled"])
def test_half_precision_is_no_worse_than_plain_pytorch(loss: Loss, fused: str, dtype: torch.dtype, low) -> None:
    student, teacher, target = (x.to(dtype) if x.is_floating_point() else x for x in sample((2, 9, 32, 48), low))
    value, gradient = value_and_gradient(lambda x: loss(x, teacher, target), student)
    assert (value.dtype, gradient.dtype) == (torch.float32, dtype)
    want, want_gradient = truth(loss, student, teacher, target)
    with medkd_fast.use_backend("reference"):
        plain, _ = value_and_gradient(lambda x: loss(x, teacher.float(), target), student.float())
    plain_error = abs(plain.item() - want.item()) / want.item()
    assert_close(value, want, 2 * plain_error + ROUNDING[torch.float32], "value")
    # rounded once when it is saved and once when it is scaled, each to half an ulp at most
    assert_close(gradient, want_gradient, 2 * ROUNDING[dtype], "gradient")


def test_student_and_teacher_of_different_dtype(loss: Loss, backend: str) -> None:
    student, teacher, target = sample((2, 5, 9, 11))
    student, teacher = student.bfloat16(), teacher.half()
    value, gradient = value_and_gradient(lambda x: loss(x, teacher, target), student)
    want, want_gradient = truth(loss, student, teacher, target)
    assert_close(value, want, 1e-6)
    assert_close(gradient, want_gradient, 2 * ROUNDING[torch.bfloat16])


@pytest.mark.parametrize("shape", [(2, 5, 12, 18), (2, 5, 4, 6, 10)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_give_the_same_bits(loss: Loss, backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    student, teacher, target = sample(shape)
    student, teacher = student.to(dtype), teacher.to(dtype)
    want, want_gradient = value_and_gradient(lambda x: loss(x, teacher, target), student)
    value, gradient = value_and_gradient(lambda x: loss(x, channels_last(teacher), target), channels_last(student))
    # torch's own sums go in another order for another layout
    tolerance = 0.0 if backend == "cpp" else 4 * ROUNDING[dtype]
    assert_close(value, want, tolerance)
    assert_close(gradient, want_gradient, tolerance)
    if backend == "cpp":
        assert gradient.stride() == channels_last(student).stride()
    # a crop has no single stride from pixel to pixel, and an expanded teacher has stride 0 over images
    large = torch.nn.functional.pad(student, [3, 2] * (student.dim() - 2))
    inner = (slice(None), slice(None), *[slice(3, -2)] * (student.dim() - 2))
    value, gradient = value_and_gradient(lambda x: loss(x[inner], teacher, target), large)
    assert_close(value, want, tolerance)
    assert_close(gradient[inner], want_gradient, tolerance)
    # dense, but not in the order of its dimensions
    turned = student.transpose(2, 3).contiguous().transpose(2, 3)
    value, gradient = value_and_gradient(lambda x: loss(x, teacher, target), turned)
    assert_close(value, want, tolerance)
    assert_close(gradient, want_gradient, tolerance)
    one = teacher[:1].expand_as(teacher)
    assert torch.equal(loss(student, one, target), loss(student, one.contiguous(), target))


@pytest.mark.parametrize("classes", [2, 5, 7, 9, 12, 16, 21, 32, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_numbers_of_classes_and_layouts(loss: Loss, fused: str, classes: int, dtype: torch.dtype) -> None:
    def offset(x: torch.Tensor) -> torch.Tensor:  # its storage begins in the middle of 16 bytes
        return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].copy_(x.reshape(-1)).reshape(x.shape)

    # two images, of which neither fills a block, and a size that packs of pixels fit
    student, teacher, target = sample((2, classes, 17, 20))
    student, teacher = student.to(dtype), teacher.to(dtype)
    want, want_gradient = truth(loss, student, teacher, target)
    layouts = {
        "contiguous": (student, teacher),
        "channels_last": (channels_last(student), channels_last(teacher)),
        "teacher channels_last": (student, channels_last(teacher)),
        "student channels_last": (channels_last(student), teacher),
        "offset": (offset(student), offset(teacher)),
        "one offset": (student, offset(teacher)),
    }
    for name, (s, t) in layouts.items():
        value, gradient = value_and_gradient(lambda x: loss(x, t, target), s)  # noqa: B023
        assert_close(value, want, 1e-6, name)
        assert_close(gradient, want_gradient, 1e-5 if dtype == torch.float32 else 2 * ROUNDING[dtype], name)


def test_more_classes_than_shared_memory_holds(loss: Loss, fused: str) -> None:
    student, teacher, target = sample((1, 400, 6, 9), (3, 4))
    want, want_gradient = truth(loss, student.float(), teacher.float(), target)
    value, gradient = value_and_gradient(lambda x: loss(x, teacher.float(), target), student.float())
    assert_close(value, want, 1e-6)
    assert_close(gradient, want_gradient, 1e-5)


def test_upsampled_channels_last_student(loss: Loss, backend: str) -> None:
    student, teacher, target = sample((2, 5, 16, 24), (4, 8))
    want, want_gradient = value_and_gradient(lambda x: loss(x, teacher, target), student)
    value, gradient = value_and_gradient(lambda x: loss(x, channels_last(teacher), target), channels_last(student))
    assert_close(value, want, 1e-15)
    assert_close(gradient, want_gradient, 1e-15)


def test_the_inputs_are_not_written_to(loss: Loss, backend: str) -> None:
    student, teacher, target = sample((2, 5, 12, 18))
    copies = [x.clone() for x in (student, teacher, target)]
    value_and_gradient(lambda x: loss(x, teacher, target), student)
    leaf = student.clone().requires_grad_()
    loss(leaf, teacher, target).backward()
    for x, copy in zip((leaf.detach(), teacher, target), copies, strict=True):
        assert torch.equal(x, copy)


def test_ignored_pixels_and_weight_zero_leave_everything(loss: Loss, backend: str) -> None:
    student, teacher, target = sample((2, 5, 12, 18))
    target[target == -100] = 0
    away = torch.rand(target.shape) < 0.3
    keep = ~away
    poisoned = [x.clone() for x in (student, teacher)]
    for x in poisoned:
        x.transpose(0, 1)[:, away] = torch.nan
    picked = [x.transpose(0, 1)[:, keep].unsqueeze(0) for x in (student, teacher)]
    want, want_gradient = truth(loss, *picked, target[keep].unsqueeze(0))

    ignored = target.masked_fill(away, 255).to(torch.uint8)
    by_label = value_and_gradient(lambda x: loss(x, poisoned[1], ignored, ignore_index=255), poisoned[0])
    by_weight = value_and_gradient(lambda x: loss(x, poisoned[1], target, weight=keep.double()), poisoned[0])
    for value, gradient in (by_label, by_weight):
        assert_close(value, want, 1e-14)
        assert_close(gradient.transpose(0, 1)[:, keep], want_gradient[0], 1e-14)
        assert (gradient.transpose(0, 1)[:, away] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("low", [None, (6, 9)], ids=["same size", "upsampled"])
def test_nothing_valid_is_zero(loss: Loss, backend: str, reduction: str, low) -> None:
    student, teacher, target = sample((2, 5, 12, 18), low)
    value, gradient = value_and_gradient(
        lambda x: loss(x, teacher, torch.full_like(target, -100), reduction=reduction), student
    )
    assert (value == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("shape", [(0, 5, 4, 4), (2, 5, 0, 4)], ids=["no images", "no pixels"])
@pytest.mark.parametrize("low", [4, 2], ids=["same size", "upsampled"])
def test_empty_inputs_are_zero(loss: Loss, backend: str, shape: tuple[int, ...], low: int) -> None:
    student, teacher = torch.zeros(*shape[:3], low), torch.zeros(shape)
    target = torch.zeros(shape[0], *shape[2:], dtype=torch.long)
    value, gradient = value_and_gradient(lambda x: loss(x, teacher, target), student)
    assert value == 0 and gradient.shape == student.shape


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_target_dtypes_and_shapes(loss: Loss, backend: str, dtype: torch.dtype) -> None:
    student, teacher, target = sample((2, 5, 7, 9))
    target[target == -100] = 100
    want = loss(student, teacher, target, ignore_index=100)
    assert torch.equal(loss(student, teacher, target.to(dtype), ignore_index=100), want)
    assert torch.equal(loss(student, teacher, target.unsqueeze(1).to(dtype), ignore_index=100), want)
    transposed = target.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(loss(student, teacher, transposed, ignore_index=100), want)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("spread", [1e4, 1e12])
def test_saturated_logits(loss: Loss, backend: str, temperature: float, spread: float) -> None:
    student, teacher, target = sample((2, 5, 7, 9), spread=spread)
    s, t = student.float(), teacher.float()
    value, gradient = value_and_gradient(lambda x: loss(x, t, target, temperature=temperature), s)
    want, want_gradient = truth(loss, s, t, target, temperature=temperature)
    assert_close(value, want, 1e-5)
    # probabilities are 0 or 1 but at near ties, where a shifted logit is exact to 2^-24 of its size
    assert_close(gradient, want_gradient, 1e-3)


def test_converged(loss: Loss, backend: str) -> None:
    student, teacher, target = sample((2, 9, 32, 48))
    s, t = (teacher + 1e-3 * torch.randn_like(teacher)).float(), teacher.float()
    value, gradient = value_and_gradient(lambda x: loss(x, t, target), s)
    want, want_gradient = truth(loss, s, t, target)
    scale, _ = truth(loss, student.float(), t, target)  # the loss of a student that knows nothing
    assert abs(value - want) <= 1e-6 * scale and value >= -1e-6 * scale
    assert_close(gradient, want_gradient, 2e-3)


@pytest.mark.parametrize("low", [None, (3, 9)], ids=["same size", "upsampled"])
def test_class_absent_in_both_networks_does_not_count(loss: Loss, backend: str, low) -> None:
    student, teacher, target = sample((2, 5, 7, 9), low)
    target[target == 4] = 3
    want, want_gradient = truth(loss, student[:, :4], teacher[:, :4], target)
    absent = [torch.cat([x[:, :4], torch.full_like(x[:, :1], -torch.inf)], 1) for x in (student, teacher)]
    value, gradient = value_and_gradient(lambda x: loss(x, absent[1], target), absent[0])
    assert_close(value, want, 1e-14)
    assert_close(gradient[:, :4], want_gradient, 1e-14)
    assert (gradient[:, 4] == 0).all()


def test_class_absent_in_one_network(loss: Loss, backend: str) -> None:
    student, teacher, target = sample((1, 4, 3, 3))
    target = target.clamp(0, 2)
    without = teacher.clone()
    without[:, 3] = -torch.inf
    far = teacher.clone()
    far[:, 3] = -1e6
    # absent in the teacher is the limit of a probability going to 0
    assert_close(loss(student, without, target), loss(student, far, target), 1e-12)
    lacking = student.clone()
    lacking[:, 3] = -torch.inf
    assert loss(lacking, teacher, target) == torch.inf


def test_teacher_without_any_class_but_the_label(loss: Loss, backend: str) -> None:
    student, teacher, target = sample((1, 2, 5, 7))
    target[:] = 1
    lacking = teacher.masked_fill(torch.tensor([True, loss is _class]).view(1, 2, 1, 1), -torch.inf)
    value, gradient = value_and_gradient(lambda x: loss(x, lacking, target), student)
    # nothing to match among the other classes: with the two parts of decoupled_kl, only the label's remains
    if loss is _class:
        assert value == 0 and (gradient == 0).all()
    else:
        want = 0.7 * 16 * F.softplus(-(student[:, 1] - student[:, 0]) / 4)
        assert_close(value, want.mean(), 1e-14)
        assert_close(gradient[:, 1], -0.7 * 4 / 35 * torch.sigmoid(-(student[:, 1] - student[:, 0]) / 4), 1e-14)
        assert_close(gradient[:, 0], -gradient[:, 1], 1e-14)


def test_student_without_any_class_but_the_label(loss: Loss, backend: str) -> None:
    student, teacher, target = sample((1, 2, 5, 7))
    target[:] = 1
    student[:, 0] = -torch.inf
    assert loss(student, teacher, target) == torch.inf


def test_upstream_gradients(loss: Loss, backend: str) -> None:
    student, teacher, target = sample((2, 5, 7, 9))
    _, want = value_and_gradient(lambda x: loss(x, teacher, target), student)
    _, doubled = value_and_gradient(lambda x: 2 * loss(x, teacher, target), student)
    assert_close(doubled, 2 * want, 1e-15)
    leaf = student.clone().requires_grad_()
    value = loss(leaf, teacher, target)
    for factor in (0.0, 3.0, -0.5):  # a retained graph, whose saved gradient is spent after the first
        (gradient,) = torch.autograd.grad(factor * value, leaf, retain_graph=True)
        assert_close(gradient, factor * want, 1e-15)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, leaf)
        torch.autograd.grad(value, leaf)


def test_gradient_passes_through_what_made_the_student(loss: Loss, backend: str) -> None:
    student, teacher, target = sample((2, 5, 7, 9))
    _, want = value_and_gradient(lambda x: loss(x, teacher, target), 3 * student)
    _, gradient = value_and_gradient(lambda x: loss(3 * x, teacher, target), student)
    assert_close(gradient, 3 * want, 1e-15)


def test_no_gradient_wanted(loss: Loss, backend: str) -> None:
    student, teacher, target = sample((2, 5, 7, 9))
    want, _ = truth(loss, student, teacher, target)
    assert not loss(student, teacher, target).requires_grad
    student.requires_grad_()
    with torch.no_grad():
        value = loss(student, teacher, target)
    assert not value.requires_grad
    assert_close(value, want, 1e-14)


def test_double_backward_raises(loss: Loss, fused: str) -> None:
    student, teacher, target = sample((2, 5, 7, 9))
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(student, teacher, target), student, create_graph=True)
    with pytest.raises(RuntimeError, match=r"_kl: second derivatives .*use_backend\('reference'\)"):
        gradient.square().sum().backward()


def test_double_backward_of_the_reference(loss: Loss) -> None:
    student, teacher, target = sample((1, 3, 2, 2), spread=1.0)
    student.requires_grad_()
    with medkd_fast.use_backend("reference"):
        assert torch.autograd.gradgradcheck(lambda x: loss(x, teacher, target), student)


def test_same_bits_every_time(loss: Loss, fused: str) -> None:
    for low in (None, (5, 8)):
        student, teacher, target = sample((2, 3, 20, 32), low)
        s, t = student.float(), teacher.float()
        first, second = (value_and_gradient(lambda x: loss(x, t, target), s) for _ in range(2))  # noqa: B023
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_same_bits_for_any_number_of_threads(loss: Loss, cpp: str) -> None:
    for low in (None, (25, 40)):
        student, teacher, target = sample((3, 9, 100, 160), low)
        s, t = student.float(), teacher.float()
        over_threads(lambda: list(value_and_gradient(lambda x: loss(x, t, target), s)))  # noqa: B023


@pytest.mark.parametrize("low", [None, (6, 9)], ids=["same size", "upsampled"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_into_one_graph(loss: Loss, backend: str, low, reduction: str) -> None:
    if backend == "reference" and low is not None:
        pytest.skip("torch.compile of torch's own interpolation is slow, and torch's to test")
    torch._dynamo.reset()
    student, teacher, target = sample((2, 5, 12, 18), low)
    weight = torch.rand(target.shape, dtype=torch.float64)

    def step(x: torch.Tensor) -> torch.Tensor:
        return 2 * loss(x + 1, teacher, target, weight=weight, reduction=reduction).sum()

    want, want_gradient = value_and_gradient(step, student)
    value, gradient = value_and_gradient(compiled(step, backend), student)
    assert_close(value, want, 1e-14)
    assert_close(gradient, want_gradient, 1e-14)


def test_compiles_for_changing_sizes(loss: Loss, fused: str) -> None:
    torch._dynamo.reset()
    call = compiled(lambda x, t, y: loss(x, t, y), fused, dynamic=True)
    for size in (5, 6, 9):
        student, teacher, target = sample((2, 3, size, size + 1))
        value, gradient = value_and_gradient(lambda x: call(x, teacher, target), student)  # noqa: B023
        want, want_gradient = truth(loss, student, teacher, target)
        assert_close(value, want, 1e-14)
        assert_close(gradient, want_gradient, 1e-14)


def test_under_autocast(loss: Loss, backend: str) -> None:
    student, teacher, target = (x.float() if x.is_floating_point() else x for x in sample((2, 5, 12, 18)))
    convolution = torch.nn.Conv2d(5, 5, 1)
    with torch.autocast(student.device.type, dtype=torch.bfloat16):
        logits = convolution(student)
        assert logits.dtype == torch.bfloat16
        value = loss(logits, teacher, target)
    value.backward()
    want, want_gradient = truth(loss, logits.detach(), teacher, target)
    assert_close(value, want, 1e-6)
    # the bias's gradient is the gradient of the logits summed over pixels, here in bf16
    assert_close(convolution.bias.grad, want_gradient.sum((0, 2, 3)), 0.1)


@pytest.mark.parametrize("instruction_set", ["portable", "avx2", "avx512"])
def test_every_build_of_the_loops(instruction_set: str) -> None:
    script = """
import torch, medkd_fast
generator = torch.Generator().manual_seed(0)
for low in ((37, 53), (9, 20)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        student = (3 * torch.randn(2, 9, *low, generator=generator)).to(dtype).requires_grad_()
        teacher = (3 * torch.randn(2, 9, 37, 53, generator=generator)).to(dtype)
        target = torch.randint(0, 9, (2, 37, 53), generator=generator)
        exact = student.detach().double().requires_grad_()
        loss = medkd_fast.decoupled_kl(student, teacher, target).loss + medkd_fast.class_kl(student, teacher)
        loss.backward()
        with medkd_fast.use_backend("reference"):
            args = exact, teacher.double()
            want = medkd_fast.decoupled_kl(*args, target).loss + medkd_fast.class_kl(*args)
        want.backward()
        error = ((student.grad.double() - exact.grad).norm() / exact.grad.norm()).item()
        limit = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
        assert abs(loss.item() / want.item() - 1) < 1e-6, (loss, want)
        assert error < limit, (dtype, error)
"""
    with_loops_of(instruction_set, script)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(fused: str, dtype: torch.dtype) -> None:
    student, teacher, target = (x.to(dtype) if x.is_floating_point() else x for x in sample((2, 5, 6, 7)))
    weight = torch.rand(target.shape)
    for reduction in ("mean", "none"):
        for need_gradient in (True, False):
            torch.library.opcheck(
                kernel("decoupled_kl", fused),
                (student, teacher, target, weight, 1.0, 2.0, 4.0, -100, reduction, need_gradient),
            )
            torch.library.opcheck(
                kernel("class_kl", fused),
                (student, teacher, target, None, 4.0, -100, reduction, need_gradient),
            )
    torch.library.opcheck(kernel("scale_gradient", fused), (student, torch.tensor(2.0), torch.tensor(0.5)))


BAD = [
    (lambda s, t, y: (s, t.requires_grad_(), y), {}, ValueError, r"teacher requires grad.*teacher\.detach\(\)"),
    (lambda s, t, y: (s.long(), t, y), {}, TypeError, r"student: got torch\.int64, want a tensor of float32"),
    (lambda s, t, y: (s.cpu().numpy(), t, y), {}, TypeError, r"student: got ndarray, want a tensor"),
    (lambda s, t, y: (s[:, :, 0, 0], t, y), {}, ValueError, r"student: got shape \(2, 4\), want \[B, C, \*S\]"),
    (lambda s, t, y: (s[:1], t, y), {}, ValueError, r"\(1, 4, 3, 5\) and \(2, 4, 3, 5\).*same number of images"),
    (lambda s, t, y: (s[:, :2], t, y), {}, ValueError, r"got 2 and 4 classes, want the same"),
    (lambda s, t, y: (s, t[:, :, :2], y[:, :2]), {}, ValueError, r"student: got spatial shape \(3, 5\).*pool it first"),
    (
        lambda s, t, y: (s, t.to("meta"), y),
        {},
        ValueError,
        r"teacher: got device meta, want the student's, c(pu|uda:0)",
    ),
    (lambda s, t, y: (s, t, y[:, 1:]), {}, ValueError, r"target: got shape \(2, 2, 5\), want \(2, 3, 5\) or"),
    (lambda s, t, y: (s, t, y.float()), {}, TypeError, r"target: got torch\.float32, want integer labels.*\.long\(\)"),
    (lambda s, t, y: (s, t, y), {"temperature": 0.0}, ValueError, r"temperature: got 0\.0, want a number above 0"),
    (lambda s, t, y: (s, t, y), {"reduction": "avg"}, ValueError, r"reduction: got 'avg', want one of mean, sum, none"),
    (lambda s, t, y: (s, t, y), {"weight": torch.ones(2, 5)}, ValueError, r"weight: got shape \(2, 5\), want"),
    (
        lambda s, t, y: (s, t, y),
        {"weight": torch.ones(2, 3, 5, requires_grad=True)},
        ValueError,
        "weight requires grad",
    ),
]


@pytest.mark.parametrize(("change", "settings", "error", "message"), BAD, ids=[row[3][:30] for row in BAD])
def test_bad_arguments(loss: Loss, backend: str, change, settings, error, message) -> None:
    student, teacher = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    target = torch.randint(0, 4, (2, 3, 5))
    with pytest.raises(error, match=message):
        loss(*change(student, teacher, target), **where_it_runs(settings))
