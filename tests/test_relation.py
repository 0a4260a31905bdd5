"""What channel_relation and pixel_relation have in common: the numerical contract, masks, layouts, autograd, errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
    with_loops_of,
)

import medkd_fast
from medkd_fast.ops.channel_relation import channel_relation
from medkd_fast.ops.pixel_relation import pixel_relation

Loss = Callable[..., torch.Tensor]

LOSSES = {
    "channel_relation": channel_relation,
    "pixel_relation": pixel_relation,
    "pixel_relation kl": partial(pixel_relation, divergence="kl"),
}


@pytest.fixture(params=LOSSES.values(), ids=LOSSES.keys())
def loss(request: pytest.FixtureRequest) -> Loss:
    return request.param


def is_kl(loss: Loss) -> bool:
    return isinstance(loss, partial) and loss.keywords.get("divergence") == "kl"


def sample(shape: tuple[int, ...], mean: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Features with a mean, as after an activation: their cosine similarities lean to one side."""
    return torch.randn(shape, dtype=torch.float64) + mean, torch.randn(shape, dtype=torch.float64) + mean


def truth(loss: Loss, student: torch.Tensor, teacher: torch.Tensor, upstream: torch.Tensor | None = None, **settings):
    with medkd_fast.use_backend("reference"):
        return value_and_gradient(lambda s: loss(s, teacher.double(), **settings), student.double(), upstream)


SHAPES = [
    pytest.param((2, 64, 24, 24), id="2-D"),
    pytest.param((1, 14, 8, 12, 10), id="3-D"),
    pytest.param((3, 5, 7, 13), id="primes"),
    pytest.param((2, 4, 31), id="1-D"),
    pytest.param((1, 3, 1, 2), id="two pixels"),
    pytest.param((2, 2, 9, 11), id="two channels"),
    pytest.param((1, 150, 9, 11), id="many channels"),
    pytest.param((2, 300, 5, 6), id="rows shared out"),
    pytest.param((1, 9, 53, 67), id="several blocks"),
    pytest.param((70, 3, 4, 5), id="many images"),
]


#: For Triton's interpreter: as many blocks of pixels or channels, and images, as there are kinds of them.
SMALLER = {(2, 300, 5, 6): (1, 140, 5, 6), (1, 9, 53, 67): (1, 9, 13, 17), (70, 3, 4, 5): (9, 3, 4, 5)}
SMALLER |= {(2, 5, 36, 50): (2, 5, 10, 14), (2, 5, 4, 6, 10): (2, 5, 4, 6, 3), (2, 9, 32, 48): (2, 9, 8, 12)}
SMALLER |= {(1, 3, 40, 50): (1, 3, 17, 19)}
#: For all pairs of pixels where they are slow; CUDA's tiles are 128 rows and 64 columns.
FEWER_PIXELS = {(1, 9, 53, 67): (1, 9, 17, 19), (2, 5, 36, 50): (2, 5, 10, 14), (2, 9, 32, 48): (2, 9, 12, 16)}
FEWER_PIXELS |= {(1, 3, 40, 50): (1, 3, 17, 19)}


def sized(loss: Loss, backend: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that the backend takes no seconds for."""
    if backend == "triton" and backend in EMULATED:
        return SMALLER.get(shape, shape)
    return FEWER_PIXELS.get(shape, shape) if is_kl(loss) and backend in (*EMULATED, "reference") else shape


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("masked", "reduction"),
    [(False, "mean"), (True, "sum"), (True, "none")],
    ids=["whole-mean", "masked-sum", "masked-none"],
)
def test_equals_the_definition(loss: Loss, backend: str, shape, reduction: str, masked: bool) -> None:
    shape = sized(loss, backend, shape)
    student, teacher = (x.float() for x in sample(shape))  # rounded before both sides see them
    mask = torch.rand(shape[0], *shape[2:]) < 0.8 if masked and shape[3:] != (2,) else None
    upstream = torch.randn(shape[:1] if reduction == "none" else (), dtype=torch.float64)
    settings = {"mask": mask, "reduction": reduction}
    value, gradient = value_and_gradient(lambda x: loss(x, teacher, **settings), student, upstream)
    want, want_gradient = truth(loss, student, teacher, upstream, **settings)
    assert value.dtype == torch.float32
    # contract, generic: 1e-5
    assert_close(value, want, 1e-5, "value")
    assert_close(gradient, want_gradient, 1e-5, "gradient")


@pytest.mark.parametrize("shape", [(2, 7, 12, 18), (1, 140, 9, 10), (1, 3, 40, 50)], ids=str)
def test_double_precision(loss: Loss, fused: str, shape: tuple[int, ...]) -> None:
    student, teacher = sample(sized(loss, fused, shape))
    value, gradient = value_and_gradient(lambda x: loss(x, teacher), student)
    want, want_gradient = truth(loss, student, teacher)
    assert value.dtype == torch.float64
    # a few hundred roundings of 1e-16 in sums that cancel tenfold
    assert_close(value, want, 1e-13, "value")
    assert_close(gradient, want_gradient, 1e-13, "gradient")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(loss: Loss, backend: str, reduction: str) -> None:
    student, teacher = sample((3, 4, 3, 4))
    mask = torch.rand(3, 3, 4) < 0.7
    mask[1] = False
    student.requires_grad_()
    fast = backend in EMULATED
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher, mask=mask, reduction=reduction), student, fast_mode=fast)


@pytest.mark.parametrize("shape", [(2, 64, 24, 24), (3, 5, 17, 13)], ids=str)
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_converged(loss: Loss, backend: str, shape: tuple[int, ...], mean: float) -> None:
    other, teacher = sample(shape, mean)
    s, t = (teacher + 1e-3 * torch.randn_like(teacher)).float(), teacher.float()
    value, gradient = value_and_gradient(lambda x: loss(x, t), s)
    want, want_gradient = truth(loss, s, t)
    scale, _ = truth(loss, other.float(), t)  # the loss of a student that knows nothing
    assert abs(value - want) <= 1e-6 * scale and value >= -1e-6 * scale
    # the definition subtracts relations that it has rounded to fp32
    assert_close(gradient, want_gradient, 2e-3 if backend == "cpp" else 1e-2)


def test_equal_features_have_no_loss(loss: Loss, backend: str) -> None:
    student, _ = sample((2, 9, 12, 10))
    for x in (student, student.float()):
        value, gradient = value_and_gradient(lambda s: loss(s, x), x)  # noqa: B023
        # torch's softmax has a sum near 1
        limit = 1e-6 if backend == "reference" and is_kl(loss) else 0
        assert value == 0 and (gradient.abs() <= limit).all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse_than_plain_pytorch(loss: Loss, fused: str, half: torch.dtype) -> None:
    student, teacher = (x.to(half) for x in sample(sized(loss, fused, (2, 9, 32, 48))))
    # fp16 cannot hold the gradient of a mean over pairs of pixels: scaled up, as a gradient scaler does
    upstream = torch.tensor(2.0**16, dtype=torch.float64)
    value, gradient = value_and_gradient(lambda x: loss(x, teacher), student, upstream)
    assert (value.dtype, gradient.dtype) == (torch.float32, half)
    want, want_gradient = truth(loss, student, teacher, upstream)
    with medkd_fast.use_backend("reference"):
        plain, plain_gradient = value_and_gradient(lambda x: loss(x, teacher.float()), student.float(), upstream)
    # a single number may come out right by luck: then 1e-6, a tenth of what the contract grants fp32
    error = abs(plain.item() - want.item()) / want.item()
    assert_close(value, want, max(2 * error + ROUNDING[torch.float32], 1e-6), "value")
    error = ((plain_gradient - want_gradient).norm() / want_gradient.norm()).item()
    assert_close(gradient, want_gradient, 2 * error + ROUNDING[half], "gradient")


def test_student_and_teacher_of_different_dtype(loss: Loss, backend: str) -> None:
    student, teacher = sample((2, 5, 9, 11))
    for s, t, limit in (
        (student.bfloat16(), teacher.half(), ROUNDING[torch.bfloat16]),
        (student.float(), teacher, ROUNDING[torch.float32]),
        (student, teacher.float(), 1e-13),
    ):
        value, gradient = value_and_gradient(lambda x: loss(x, t), s)  # noqa: B023
        want, want_gradient = truth(loss, s, t)
        assert value.dtype == (torch.float64 if torch.float64 in (s.dtype, t.dtype) else torch.float32)
        assert gradient.dtype == s.dtype
        assert_close(value, want, 1e-6 if value.dtype == torch.float32 else 1e-13)
        assert_close(gradient, want_gradient, 2 * limit)


@pytest.mark.parametrize("scale", [1e4, 1e-6, 1e-13, 1e-20])
def test_huge_and_tiny_features(loss: Loss, backend: str, scale: float) -> None:
    # 1e-13: below 1e-12 for a pixel, above it for a channel. 1e-20: far below for both, so the loss is tiny too
    student, teacher = (scale * x.float() for x in sample((2, 6, 20, 25)))
    value, gradient = value_and_gradient(lambda x: loss(x, teacher), student)
    want, want_gradient = truth(loss, student, teacher)
    if is_kl(loss) and scale == 1e-20:  # all rows are nearly uniform, and so far apart
        assert abs(value) <= 1e-6 and want <= 1e-15
        return
    # squares of 1e-20 are subnormal, rounded to 1e-5 of themselves
    tolerance = 1e-4 if scale == 1e-20 else 1e-5
    assert_close(value, want, tolerance)
    assert_close(gradient, want_gradient, tolerance)


def test_zero_rows(loss: Loss, backend: str) -> None:
    student, teacher = (x.float() for x in sample((2, 6, 13, 11)))
    student[:, 2] = 0
    student[0, :, 3:5] = 0
    teacher[:, 4] = 0
    teacher[1, :, 7:] = 0
    value, gradient = value_and_gradient(lambda x: loss(x, teacher), student)
    want, want_gradient = truth(loss, student, teacher)
    assert_close(value, want, 1e-5)
    assert_close(gradient, want_gradient, 1e-5)
    # a zero row has its gradient divided by 1e-12; the others' must not drown in it
    ordinary = want_gradient.abs() < 1e3
    assert 0 < ordinary.sum() < ordinary.numel()
    assert_close(gradient[ordinary], want_gradient[ordinary], 1e-5)


def test_rows_shorter_than_the_least_norm_in_double(loss: Loss, fused: str) -> None:
    student, teacher = sample((2, 6, 5, 7))
    for x in (student, teacher):
        x[:, 2] *= 1e-14  # of their norms at least 1e-12 counts
        x[0, :, 3:5] *= 1e-13
    value, gradient = value_and_gradient(lambda x: loss(x, teacher), student)
    want, want_gradient = truth(loss, student, teacher)
    assert_close(value, want, 1e-12)
    assert_close(gradient, want_gradient, 1e-12)


def test_all_zero(loss: Loss, backend: str) -> None:
    zero = torch.zeros(2, 3, 4, 5)
    value, gradient = value_and_gradient(lambda x: loss(x, zero), zero)
    assert value == 0 and (gradient == 0).all()


def test_one_channel_and_one_pixel(loss: Loss, backend: str) -> None:
    for shape in ((2, 1, 5, 7), (2, 4, 1, 1)):
        student, teacher = (x.float() for x in sample(shape, 0.0))
        value, gradient = value_and_gradient(lambda x: loss(x, teacher), student)  # noqa: B023
        want, want_gradient = truth(loss, student, teacher)
        assert abs(value - want) <= 1e-6  # relations are 1 or -1 where there is one direction
        # there the gradient is 0: what cancels has the size of 1 / norm, and the smallest number here is above 1e-3
        assert (gradient - want_gradient).abs().max() <= 1e-3


@pytest.mark.parametrize("shape", [(2, 5, 36, 50), (2, 5, 4, 6, 10)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_give_the_same_bits(loss: Loss, backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    shape = sized(loss, backend, shape)
    student, teacher = (x.to(dtype) for x in sample(shape))
    want, want_gradient = value_and_gradient(lambda x: loss(x, teacher), student)
    # torch's own sums go in another order for another layout
    tolerance = 0.0 if backend == "cpp" else 1e-5 if dtype == torch.float32 else 4 * ROUNDING[dtype]
    value, gradient = value_and_gradient(lambda x: loss(x, channels_last(teacher)), channels_last(student))
    assert_close(value, want, tolerance)
    assert_close(gradient, want_gradient, tolerance)
    if backend == "cpp":
        assert gradient.stride() == channels_last(student).stride()
    # dense, but with no single stride from pixel to pixel
    swapped = student.transpose(2, 3).contiguous().transpose(2, 3)
    value, gradient = value_and_gradient(lambda x: loss(x, teacher), swapped)
    assert_close(value, want, tolerance)
    assert_close(gradient, want_gradient, tolerance)
    large = torch.nn.functional.pad(student, [3, 2] * (student.dim() - 2))
    inner = (slice(None), slice(None), *[slice(3, -2)] * (student.dim() - 2))
    value, gradient = value_and_gradient(lambda x: loss(x[inner], teacher), large)
    assert_close(value, want, tolerance)
    assert_close(gradient[inner], want_gradient, tolerance)
    one = teacher[:1].expand_as(teacher)
    assert torch.equal(loss(student, one), loss(student, one.contiguous()))


def test_the_inputs_are_not_written_to(loss: Loss, backend: str) -> None:
    student, teacher = sample((2, 5, 12, 18))
    copies = [x.clone() for x in (student, teacher)]
    leaf = student.requires_grad_()
    loss(leaf, teacher).backward()
    for x, copy in zip((leaf.detach(), teacher), copies, strict=True):
        assert torch.equal(x, copy)


def test_masked_pixels_leave_everything(loss: Loss, backend: str) -> None:
    student, teacher = sample((1, 5, 12, 18))
    keep = torch.rand(1, 12, 18) < 0.6
    want, want_gradient = truth(loss, student[:, :, keep[0]], teacher[:, :, keep[0]])
    away = ~keep.unsqueeze(1)
    poisoned = student.masked_fill(away, torch.nan), teacher.masked_fill(away, torch.inf)
    for mask in (keep, keep.unsqueeze(1), keep.long(), 3 * keep.to(torch.uint8)):
        value, gradient = value_and_gradient(lambda x: loss(x, poisoned[1], mask=mask), poisoned[0])  # noqa: B023
        assert_close(value, want, 1e-13)
        assert_close(gradient[:, :, keep[0]], want_gradient, 1e-13)
        assert (gradient[:, :, ~keep[0]] == 0).all()
    transposed = keep.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(loss(student, teacher, mask=transposed), loss(student, teacher, mask=keep))
    assert torch.equal(loss(student, teacher, mask=torch.ones_like(keep)), loss(student, teacher))


def test_an_image_without_pixels_leaves_the_mean(loss: Loss, backend: str) -> None:
    student, teacher = sample((3, 5, 8, 9))
    mask = torch.rand(3, 8, 9) < 0.6
    mask[1] = False
    kept = [0, 2]
    want, want_gradient = truth(loss, student[kept], teacher[kept], mask=mask[kept])
    value, gradient = value_and_gradient(lambda x: loss(x, teacher, mask=mask), student)
    assert_close(value, want, 1e-13)
    assert_close(gradient[kept], want_gradient, 1e-13)
    assert (gradient[1] == 0).all()
    each = loss(student, teacher, mask=mask, reduction="none")
    assert each.shape == (3,) and each[1] == 0
    assert_close(each.sum() / 2, want, 1e-13)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_valid_is_zero(loss: Loss, backend: str, reduction: str) -> None:
    student, teacher = sample((2, 5, 12, 18))
    mask = torch.zeros(2, 12, 18, dtype=torch.bool)
    value, gradient = value_and_gradient(lambda x: loss(x, teacher, mask=mask, reduction=reduction), student)
    assert (value == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("shape", [(0, 5, 4, 4), (2, 5, 0, 4)], ids=["no images", "no pixels"])
def test_empty_inputs_are_zero(loss: Loss, backend: str, shape: tuple[int, ...]) -> None:
    student, teacher = torch.zeros(shape), torch.zeros(shape)
    value, gradient = value_and_gradient(lambda x: loss(x, teacher), student)
    assert value == 0 and gradient.shape == shape


def test_upstream_gradients(loss: Loss, backend: str) -> None:
    student, teacher = sample((2, 5, 7, 9))
    _, want = value_and_gradient(lambda x: loss(x, teacher), student)
    _, doubled = value_and_gradient(lambda x: 2 * loss(x, teacher), student)
    assert_close(doubled, 2 * want, 1e-14)
    leaf = student.clone().requires_grad_()
    value = loss(leaf, teacher)
    for factor in (0.0, 3.0, -0.5):  # a retained graph
        (gradient,) = torch.autograd.grad(factor * value, leaf, retain_graph=True)
        assert_close(gradient, factor * want, 1e-14)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, leaf)
        torch.autograd.grad(value, leaf)


def test_upstream_gradient_of_stride_zero(loss: Loss, backend: str) -> None:
    student, teacher = sample((3, 5, 7, 9))
    _, want = value_and_gradient(lambda x: loss(x, teacher, reduction="sum"), student)
    _, gradient = value_and_gradient(lambda x: loss(x, teacher, reduction="none").sum(), student)
    assert_close(gradient, want, 1e-14)


def test_gradient_passes_through_what_made_the_student(loss: Loss, backend: str) -> None:
    student, teacher = sample((2, 5, 7, 9))
    _, want = value_and_gradient(lambda x: loss(x, teacher), 3 * student)
    _, gradient = value_and_gradient(lambda x: loss(3 * x, teacher), student)
    assert_close(gradient, 3 * want, 1e-14)


def test_no_gradient_wanted(loss: Loss, backend: str) -> None:
    student, teacher = sample((2, 5, 7, 9))
    want, _ = truth(loss, student, teacher)
    assert not loss(student, teacher).requires_grad
    student.requires_grad_()
    with torch.no_grad():
        value = loss(student, teacher)
    assert not value.requires_grad
    assert_close(value, want, 1e-14)


def test_double_backward_raises(loss: Loss, fused: str) -> None:
    student, teacher = sample((2, 5, 7, 9))
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(student, teacher), student, create_graph=True)
    with pytest.raises(RuntimeError, match=r"_relation: second derivatives .*use_backend\('reference'\)"):
        gradient.square().sum().backward()


def test_double_backward_of_the_reference(loss: Loss) -> None:
    student, teacher = sample((1, 3, 2, 2))
    student.requires_grad_()
    with medkd_fast.use_backend("reference"):
        assert torch.autograd.gradgradcheck(lambda x: loss(x, teacher), student)


@pytest.mark.parametrize("shape", [(3, 9, 100, 60), (1, 64, 50, 40), (2, 150, 30, 20)], ids=str)
def test_same_bits_for_any_number_of_threads(loss: Loss, cpp: str, shape: tuple[int, ...]) -> None:
    student, teacher = (x.float() for x in sample(shape))
    mask = torch.rand(shape[0], *shape[2:]) < 0.9
    over_threads(lambda: list(value_and_gradient(lambda x: loss(x, teacher, mask=mask), student)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_into_one_graph(loss: Loss, backend: str, reduction: str) -> None:
    torch._dynamo.reset()
    student, teacher = sample((2, 5, 12, 18))
    mask = torch.rand(2, 12, 18) < 0.7

    def step(x: torch.Tensor) -> torch.Tensor:
        return 2 * loss(x + 1, teacher, mask=mask, reduction=reduction).sum()

    want, want_gradient = value_and_gradient(step, student)
    value, gradient = value_and_gradient(compiled(step, backend), student)
    assert_close(value, want, 1e-13)
    assert_close(gradient, want_gradient, 1e-13)


def test_compiles_for_changing_sizes(loss: Loss, fused: str) -> None:
    torch._dynamo.reset()
    call = compiled(lambda x, t: loss(x, t), fused, dynamic=True)
    for size in (5, 6, 9):
        student, teacher = sample((2, 3, size, size + 1))
        value, gradient = value_and_gradient(lambda x: call(x, teacher), student)  # noqa: B023
        want, want_gradient = truth(loss, student, teacher)
        assert_close(value, want, 1e-13)
        assert_close(gradient, want_gradient, 1e-13)


def test_under_autocast(loss: Loss, backend: str) -> None:
    student, teacher = (x.float() for x in sample((2, 5, 12, 18)))
    convolution = torch.nn.Conv2d(5, 5, 1)
    with torch.autocast(student.device.type, dtype=torch.bfloat16):
        features = convolution(student)
        assert features.dtype == torch.bfloat16
        value = loss(features, teacher)
    value.backward()
    want, want_gradient = truth(loss, features.detach(), teacher)
    assert_close(value, want, 1e-6)
    # the bias's gradient is the gradient of the features summed over pixels, here in bf16
    assert_close(convolution.bias.grad, want_gradient.sum((0, 2, 3)), 0.1)


@pytest.mark.parametrize("instruction_set", ["portable", "avx2", "avx512"])
def test_every_build_of_the_loops(instruction_set: str) -> None:
    script = """
import torch, medkd_fast
from medkd_fast.ops.channel_relation import channel_relation
from medkd_fast.ops.pixel_relation import pixel_relation
generator = torch.Generator().manual_seed(0)
# channels that are no multiple of any register block
for channels in (*range(1, 15), 33):
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-3), (torch.float16, 1e-3)):
        for loss in (channel_relation, pixel_relation):
            if channels == 1 and loss is channel_relation:
                continue  # 0 for any features
            student, teacher = (torch.randn(2, channels, 19, 23, generator=generator).to(dtype) + 1 for _ in range(2))
            student.requires_grad_()
            exact = student.detach().double().requires_grad_()
            value = loss(student, teacher)
            (2.0**16 * value).backward()
            with medkd_fast.use_backend("reference"):
                want = loss(exact, teacher.double())
            (2.0**16 * want).backward()
            assert abs(value.item() / want.item() - 1) < 1e-5, (loss, channels, dtype, value, want)
            if channels > 1:  # one channel: pixels are 1 or -1 and have no gradient
                error = ((student.grad.double() - exact.grad).norm() / exact.grad.norm()).item()
                assert error < limit, (loss, channels, dtype, error)
"""
    with_loops_of(instruction_set, script)


BAD = [
    (lambda s, t: (s, t.requires_grad_()), {}, ValueError, r"teacher requires grad.*teacher\.detach\(\)"),
    (lambda s, t: (s.long(), t), {}, TypeError, r"student: got torch\.int64, want a tensor of float32"),
    (lambda s, t: (s, t.cpu().numpy()), {}, TypeError, r"teacher: got ndarray, want a tensor"),
    (lambda s, t: (s[:, :, 0, 0], t), {}, ValueError, r"student: got shape \(2, 4\), want \[B, C, \*S\]"),
    (lambda s, t: (s[:1], t), {}, ValueError, r"\(1, 4, 3, 5\) and \(2, 4, 3, 5\).*same number of images"),
    (lambda s, t: (s[:, :, :2], t), {}, ValueError, r"sizes \(2, 5\) and \(3, 5\), want equal ones; average-pool the"),
    (lambda s, t: (s, t.to("meta")), {}, ValueError, r"teacher: got device meta, want the student's, c(pu|uda:0)"),
    (
        lambda s, t: (s[:, :0], t[:, :0]),
        {},
        ValueError,
        r"student: got shape \(2, 0, 3, 5\), want at least one channel",
    ),
    (lambda s, t: (s, t), {"mask": torch.ones(2, 5) > 0}, ValueError, r"mask: got shape \(2, 5\), want \(2, 3, 5\) or"),
    (lambda s, t: (s, t), {"mask": torch.ones(2, 3, 5)}, TypeError, r"mask: got torch\.float32, want booleans"),
    (lambda s, t: (s, t), {"reduction": "avg"}, ValueError, r"reduction: got 'avg', want one of mean, sum, none"),
    (lambda s, t: (s, t), {"relation": "dot"}, ValueError, r"relation: got 'dot', want one of cosine, pearson, gram"),
    (lambda s, t: (s, t), {"divergence": "l1"}, ValueError, r"divergence: got 'l1', want one of mse, kl"),
    (lambda s, t: (s, t), {"temperature": 0.0}, ValueError, r"temperature: got 0\.0, want a number above 0"),
]


@pytest.mark.parametrize(("change", "settings", "error", "message"), BAD, ids=[row[3][:30] for row in BAD])
def test_bad_arguments(loss: Loss, backend: str, change, settings, error, message) -> None:
    student, teacher = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    with pytest.raises(error, match=message):
        loss(*change(student, teacher), **where_it_runs(settings))
