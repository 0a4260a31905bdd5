"""channel_relation alone: the formulas of its relations and divergences, what they do not see, channels."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from operators import EMULATED, ROUNDING, assert_close, channels_last, compiled, over_threads, value_and_gradient

import medkd_fast
from medkd_fast.backend import kernel
from medkd_fast.ops.channel_relation import channel_relation

RELATIONS = ["cosine", "pearson", "gram", "row", "softmax"]
KINDS = [(relation, "mse") for relation in RELATIONS] + [(relation, "kl") for relation in RELATIONS[:-1]]
every_kind = pytest.mark.parametrize(("relation", "divergence"), KINDS, ids=["-".join(kind) for kind in KINDS])


def sample(shape: tuple[int, ...] = (2, 5, 6, 7), mean: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(shape, dtype=torch.float64) + mean, torch.randn(shape, dtype=torch.float64) + mean


def truth(
    student: torch.Tensor, teacher: torch.Tensor, upstream: torch.Tensor | None = None, **settings
) -> tuple[torch.Tensor, torch.Tensor]:
    with medkd_fast.use_backend("reference"):
        return value_and_gradient(
            lambda s: channel_relation(s, teacher.double(), **settings), student.double(), upstream
        )


def relation_of(x: torch.Tensor, relation: str, temperature: float) -> torch.Tensor:
    """The relation [C, C] of features [C, N], by the formula."""
    products = torch.einsum("ip,jp->ij", x, x)
    if relation == "cosine":
        return torch.stack([torch.cosine_similarity(row, x, dim=1) for row in x])
    if relation == "pearson":
        return torch.corrcoef(x)
    if relation == "gram":
        return products / x.shape[1]
    if relation == "row":
        return torch.stack([row / row.square().sum().sqrt() for row in products])
    p = (x / temperature).exp()
    p = p / p.sum(1, keepdim=True)
    return p @ p.T


@every_kind
def test_value_by_the_formula(backend: str, relation: str, divergence: str) -> None:
    student, teacher = sample()
    keep = torch.rand(2, 6, 7) < 0.7
    for mask in (None, keep):
        want = []
        for i in range(2):
            counts = torch.ones_like(keep[i]) if mask is None else keep[i]
            r_s, r_t = (relation_of(x[i][:, counts], relation, 0.7) for x in (student, teacher))
            if divergence == "mse":
                want.append(((r_s - r_t) ** 2).sum() / 25)
            else:
                want.append(
                    sum(
                        F.kl_div((r_s[c] / 0.7).log_softmax(0), (r_t[c] / 0.7).softmax(0), reduction="sum")
                        for c in range(5)
                    )
                    / 5
                )
        loss = partial(channel_relation, student, teacher, relation=relation, divergence=divergence, temperature=0.7)
        assert_close(loss(mask=mask, reduction="none"), torch.stack(want), 1e-12)
        assert_close(loss(mask=mask), torch.stack(want).mean(), 1e-12)
        assert_close(loss(mask=mask, reduction="sum"), torch.stack(want).sum(), 1e-12)


#: With a mask or without.
SHAPES = [
    ((2, 67, 24, 23), False),
    ((2, 67, 24, 23), True),
    ((1, 14, 8, 12, 10), False),
    ((3, 5, 7, 13), True),
    ((1, 9, 53, 67), False),
    ((1, 9, 53, 67), True),
    ((2, 2, 9, 11), False),
    ((2, 300, 5, 6), True),
    ((70, 3, 4, 5), True),
    ((2, 4, 31), False),
]
#: In an interpreter: as many blocks of channels, and images, as there are kinds of them.
INTERPRETED = {(2, 67, 24, 23): (1, 67, 5, 7), (2, 300, 5, 6): (1, 131, 3, 5), (70, 3, 4, 5): (3, 3, 4, 5)}


@pytest.mark.parametrize(("shape", "masked"), SHAPES, ids=[f"{shape}{' masked' * masked}" for shape, masked in SHAPES])
@every_kind
def test_equals_the_definition(
    fused: str, relation: str, divergence: str, shape: tuple[int, ...], masked: bool
) -> None:
    shape = INTERPRETED.get(shape, shape) if fused == "triton" and not torch.cuda.is_available() else shape
    student, teacher = sample(shape)
    mask = torch.rand(shape[0], *shape[2:]) < 0.8 if masked else None
    reduction = "none" if masked else "mean"
    upstream = torch.randn(shape[:1] if masked else (), dtype=torch.float64)
    settings = {
        "relation": relation,
        "divergence": divergence,
        "temperature": 0.5,
        "mask": mask,
        "reduction": reduction,
    }
    # contract, generic: 1e-5 in fp32
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        s, t = student.to(dtype), teacher.to(dtype)  # rounded before both sides see them
        value, gradient = value_and_gradient(lambda x: channel_relation(x, t, **settings), s, upstream)  # noqa: B023
        want, want_gradient = truth(s, t, upstream, **settings)
        assert value.dtype == dtype
        assert_close(value, want, tolerance, "value")
        assert_close(gradient, want_gradient, tolerance, "gradient")


@pytest.mark.parametrize("shape", [(2, 1, 5, 7), (2, 4, 1, 1)], ids=["one channel", "one pixel"])
@every_kind
def test_one_channel_and_one_pixel(fused: str, relation: str, divergence: str, shape: tuple[int, ...]) -> None:
    student, teacher = (x.float() for x in sample(shape))
    settings = {"relation": relation, "divergence": divergence}
    value, gradient = value_and_gradient(lambda x: channel_relation(x, teacher, **settings), student)
    want, want_gradient = truth(student, teacher, **settings)
    # where the relation does not depend on the features the truth is 0, or the rounding of 1 - 1 over a norm
    assert abs(value - want) <= 1e-5 * want.abs() + 1e-13
    assert (gradient - want_gradient).norm() <= 1e-5 * want_gradient.norm() + 1e-6


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@every_kind
def test_gradcheck(backend: str, relation: str, divergence: str, reduction: str) -> None:
    student, teacher = sample((3, 4, 3, 4))
    mask = torch.rand(3, 3, 4) < 0.7
    mask[1] = False
    settings = {"relation": relation, "divergence": divergence, "temperature": 0.6, "reduction": reduction}
    student.requires_grad_()
    fast = backend in EMULATED
    assert torch.autograd.gradcheck(
        lambda x: channel_relation(x, teacher, mask=mask, **settings), student, fast_mode=fast
    )


@every_kind
def test_converged(fused: str, relation: str, divergence: str) -> None:
    other, teacher = sample((2, 48, 24, 24))
    s, t = (teacher + 1e-3 * torch.randn_like(teacher)).float(), teacher.float()
    settings = {"relation": relation, "divergence": divergence}
    value, gradient = value_and_gradient(lambda x: channel_relation(x, t, **settings), s)
    want, want_gradient = truth(s, t, **settings)
    scale, _ = truth(other.float(), t, **settings)  # the loss of a student that knows nothing
    assert abs(value - want) <= 1e-6 * scale and value >= 0
    assert_close(gradient, want_gradient, 2e-3)


@every_kind
def test_equal_features_have_no_loss(fused: str, relation: str, divergence: str) -> None:
    student, _ = sample((2, 9, 12, 10))
    for x in (student, student.float()):
        value, gradient = value_and_gradient(
            lambda s: channel_relation(s, x, relation=relation, divergence=divergence),  # noqa: B023
            x,
        )
        assert value == 0 and (gradient == 0).all()


@pytest.mark.parametrize("divergence", ["mse", "kl"])
def test_pearson_survives_a_large_mean(fused: str, divergence: str) -> None:
    student, teacher = (x.float() for x in sample((2, 9, 40, 50), 1e3))
    student[:, 3] += 1e4
    settings = {"relation": "pearson", "divergence": divergence}
    mask = torch.rand(2, 40, 50) < 0.7
    for settings["mask"] in (None, mask):
        value, gradient = value_and_gradient(lambda x: channel_relation(x, teacher, **settings), student)
        want, want_gradient = truth(student, teacher, **settings)
        assert_close(value, want, 1e-5)
        assert_close(gradient, want_gradient, 1e-5)


def test_pearson_does_not_see_a_channels_mean_nor_scale(backend: str) -> None:
    student, teacher = sample()
    want = channel_relation(student, teacher, relation="pearson")
    means, scales = 10 * torch.randn(5, 1, 1, dtype=torch.float64), torch.logspace(-3, 3, 5, dtype=torch.float64)
    changed = student * scales.reshape(5, 1, 1) + means
    assert_close(channel_relation(changed, teacher + means, relation="pearson"), want, 1e-9)


@pytest.mark.parametrize("divergence", ["mse", "kl"])
def test_a_constant_channel_correlates_with_nothing(backend: str, divergence: str) -> None:
    student, teacher = (x.float() for x in sample((2, 5, 40, 50)))
    student[:, 2], teacher[0, 4] = 0.1, 1e4 / 3
    settings = {"relation": "pearson", "divergence": divergence}
    value, gradient = value_and_gradient(lambda x: channel_relation(x, teacher, **settings), student)
    want, want_gradient = truth(student, teacher, **settings)
    assert_close(value, want, 1e-5)
    others = [0, 1, 3, 4]
    assert_close(gradient[:, others], want_gradient[:, others], 1e-5)
    # its own gradient is divided by 1e-12
    assert_close(gradient[:, 2], want_gradient[:, 2], 1e-5)


@every_kind
def test_zero_rows(backend: str, relation: str, divergence: str) -> None:
    student, teacher = (x.float() for x in sample((2, 6, 13, 11)))
    student[:, 2] = 0
    teacher[:, 4] = 0
    settings = {"relation": relation, "divergence": divergence}
    value, gradient = value_and_gradient(lambda x: channel_relation(x, teacher, **settings), student)
    want, want_gradient = truth(student, teacher, **settings)
    assert_close(value, want, 1e-5)
    assert_close(gradient[:, 2], want_gradient[:, 2], 1e-5)  # may be divided by 1e-12
    others = [0, 1, 3, 4, 5]
    assert_close(gradient[:, others], want_gradient[:, others], 1e-5)


@pytest.mark.parametrize("scale", [1e4, 1e-4])
@every_kind
def test_huge_and_tiny_features(fused: str, relation: str, divergence: str, scale: float) -> None:
    student, teacher = (scale * x.float() for x in sample((2, 6, 40, 50)))
    # scores that differ by less than what the relation's rounding makes of them
    temperature = scale**2 if relation == "gram" else scale if relation == "softmax" else 1.0
    settings = {"relation": relation, "divergence": divergence, "temperature": temperature}
    value, gradient = value_and_gradient(lambda x: channel_relation(x, teacher, **settings), student)
    want, want_gradient = truth(student, teacher, **settings)
    assert_close(value, want, 1e-5)
    assert_close(gradient, want_gradient, 1e-5)


@pytest.mark.parametrize(("relation", "divergence"), [("softmax", "mse"), ("gram", "kl")])
def test_saturated(fused: str, relation: str, divergence: str) -> None:
    student, teacher = (1e4 * x.float() for x in sample((2, 6, 20, 30)))
    settings = {"relation": relation, "divergence": divergence, "temperature": 1.0}
    value, gradient = value_and_gradient(lambda x: channel_relation(x, teacher, **settings), student)
    want, want_gradient = truth(student, teacher, **settings)
    assert_close(value, want, 1e-5)
    assert_close(gradient, want_gradient, 1e-5)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@every_kind
def test_half_precision(fused: str, half: torch.dtype, relation: str, divergence: str) -> None:
    student, teacher = (x.to(half) for x in sample((2, 9, 32, 48)))
    upstream = torch.tensor(2.0**24 if relation == "softmax" else 2.0**10, dtype=torch.float64)
    settings = {"relation": relation, "divergence": divergence}
    value, gradient = value_and_gradient(lambda x: channel_relation(x, teacher, **settings), student, upstream)
    assert (value.dtype, gradient.dtype) == (torch.float32, half)
    want, want_gradient = truth(student, teacher, upstream, **settings)
    assert_close(value, want, 1e-5)
    # the rounding of the output; fp16's smallest numbers are coarser
    assert_close(gradient, want_gradient, 2 * ROUNDING[half])


@every_kind
def test_masked_pixels_leave_everything(backend: str, relation: str, divergence: str) -> None:
    student, teacher = sample((2, 5, 12, 18))
    keep = (torch.rand(12, 18) < 0.6).expand(2, 12, 18).clone()
    settings = {"relation": relation, "divergence": divergence}
    want, want_gradient = truth(student[:, :, keep[0]], teacher[:, :, keep[0]], **settings)
    away = ~keep.unsqueeze(1)
    poisoned = student.masked_fill(away, torch.nan), teacher.masked_fill(away, torch.inf)
    value, gradient = value_and_gradient(lambda x: channel_relation(x, poisoned[1], mask=keep, **settings), poisoned[0])
    assert_close(value, want, 1e-12)
    assert_close(gradient[:, :, keep[0]], want_gradient, 1e-12)
    assert (gradient[:, :, ~keep[0]] == 0).all()
    # an image without any pixel leaves the mean; none at all: 0
    keep[1] = False
    value, gradient = value_and_gradient(lambda x: channel_relation(x, poisoned[1], mask=keep, **settings), student)
    want, _ = truth(student[:1, :, keep[0]], teacher[:1, :, keep[0]], **settings)
    assert_close(value, want, 1e-12)
    assert (gradient[1] == 0).all() and gradient.isfinite().all()
    keep[0] = False
    for reduction in ("mean", "none"):
        value, gradient = value_and_gradient(
            lambda x: channel_relation(x, poisoned[1], mask=keep, reduction=reduction, **settings),  # noqa: B023
            poisoned[0],
        )
        assert (value == 0).all() and (gradient == 0).all()


@every_kind
def test_layouts_give_the_same_bits(fused: str, relation: str, divergence: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = (x.to(dtype) for x in sample((2, 5, 36, 50)))
        loss = partial(channel_relation, relation=relation, divergence=divergence)
        want, want_gradient = value_and_gradient(lambda x: loss(x, teacher), student)  # noqa: B023
        for s, t in (
            (channels_last(student), channels_last(teacher)),
            (student.transpose(2, 3).contiguous().transpose(2, 3), teacher),
        ):
            value, gradient = value_and_gradient(lambda x: loss(x, t), s)  # noqa: B023
            assert torch.equal(value, want) and torch.equal(gradient, want_gradient)


@every_kind
def test_same_bits_for_any_number_of_threads(cpp: str, relation: str, divergence: str) -> None:
    for shape in ((3, 9, 100, 60), (1, 140, 30, 20)):
        student, teacher = (x.float() for x in sample(shape))
        settings = {"relation": relation, "divergence": divergence, "mask": torch.rand(shape[0], *shape[2:]) < 0.9}
        over_threads(
            lambda: list(value_and_gradient(lambda x: channel_relation(x, teacher, **settings), student))  # noqa: B023
        )


@every_kind
def test_empty_inputs_are_zero(backend: str, relation: str, divergence: str) -> None:
    for shape in ((0, 5, 4, 4), (2, 5, 0, 4)):
        zero = torch.zeros(shape)
        for mask in (None, torch.zeros(shape[0], *shape[2:]) > 0):
            settings = {"relation": relation, "divergence": divergence, "mask": mask}
            value, gradient = value_and_gradient(lambda x: channel_relation(x, zero, **settings), zero)  # noqa: B023
            assert value == 0 and gradient.shape == shape


@pytest.mark.parametrize(("relation", "divergence"), [("pearson", "mse"), ("softmax", "mse"), ("row", "kl")])
def test_upstream_gradients(backend: str, relation: str, divergence: str) -> None:
    student, teacher = sample()
    loss = partial(channel_relation, relation=relation, divergence=divergence)
    _, want = value_and_gradient(lambda x: loss(x, teacher), student)
    leaf = student.clone().requires_grad_()
    value = loss(leaf, teacher)
    for factor in (0.0, 3.0, -0.5):  # a retained graph
        (gradient,) = torch.autograd.grad(factor * value, leaf, retain_graph=True)
        assert_close(gradient, factor * want, 1e-14)
    if backend == "cpp":
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="channel_relation: second derivatives"):
            gradient.sum().backward()


@pytest.mark.parametrize(
    ("relation", "divergence"), [("pearson", "kl"), ("gram", "kl"), ("row", "mse"), ("softmax", "mse")]
)
def test_compiles_into_one_graph(fused: str, relation: str, divergence: str) -> None:
    torch._dynamo.reset()
    student, teacher = sample((2, 5, 12, 18))
    settings = {"relation": relation, "divergence": divergence, "temperature": 0.3, "reduction": "none"}

    def step(x: torch.Tensor) -> torch.Tensor:
        return 2 * channel_relation(x + 1, teacher, **settings).sum()

    want, want_gradient = value_and_gradient(step, student)
    value, gradient = value_and_gradient(compiled(step, fused), student)
    assert_close(value, want, 1e-13)
    assert_close(gradient, want_gradient, 1e-13)


def test_softmax_has_no_kl(backend: str) -> None:
    student, teacher = sample()
    with pytest.raises(
        ValueError, match="got 'kl' with relation='softmax'.*want divergence='mse', or another relation"
    ):
        channel_relation(student, teacher, relation="softmax", divergence="kl")


def test_a_channels_scale_and_the_order_of_pixels_do_not_matter(backend: str) -> None:
    student, teacher = sample()
    want = channel_relation(student, teacher)
    scales = torch.logspace(-3, 3, 5, dtype=torch.float64).reshape(5, 1, 1)
    assert_close(channel_relation(student * scales, teacher / scales), want, 1e-12)
    order = torch.randperm(42)
    shuffled = student.flatten(2)[:, :, order].reshape(student.shape)
    assert_close(channel_relation(shuffled, teacher), want, 1e-12)


def test_rotated(backend: str) -> None:
    # other features, nearly equal relations: the pixels in another order and 1 % of noise
    _, teacher = sample((2, 32, 24, 24))
    shuffled = teacher.flatten(2)[:, :, torch.randperm(576)].reshape(teacher.shape)
    s, t = (shuffled + 0.2 * torch.randn_like(teacher)).float(), teacher.float()
    value, gradient = value_and_gradient(lambda x: channel_relation(x, t), s)
    with medkd_fast.use_backend("reference"):
        want, want_gradient = value_and_gradient(lambda x: channel_relation(x, t.double()), s.double())
    assert 5e-3 < want.sqrt() < 2e-2  # how far the relations are apart
    assert_close(value, want, 1e-3)
    assert_close(gradient, want_gradient, 1e-3)


def test_one_channel_is_always_alike(backend: str) -> None:
    student, teacher = (x.float() for x in sample((2, 1, 6, 7)))
    value, gradient = value_and_gradient(lambda x: channel_relation(x, teacher), student)
    # 1 - 1, to the rounding of a relation
    assert abs(value) <= 1e-13 and gradient.abs().max() <= 1e-6


def test_unequal_channels_raise(backend: str) -> None:
    student, teacher = sample()
    with pytest.raises(
        ValueError, match=r"got 3 and 5 channels, want equal.*1x1 adapter.*Conv2d\(3, 5, kernel_size=1\)"
    ):
        channel_relation(student[:, :3], teacher)


def test_the_teacher_is_not_kept_for_the_backward(fused: str) -> None:
    student, teacher = sample()
    loss = channel_relation(student.requires_grad_(), teacher)
    kept = [x.data_ptr() for x in loss.grad_fn.saved_tensors if x is not None]
    assert student.data_ptr() in kept and teacher.data_ptr() not in kept


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("relation", "divergence"), [("cosine", "mse"), ("pearson", "kl"), ("softmax", "mse")])
def test_opcheck(fused: str, masked: bool, relation: str, divergence: str) -> None:
    student, teacher = sample()
    mask = torch.rand(2, 6, 7) < 0.7 if masked else None
    dtypes = ((student.bfloat16(), teacher.float()), (student, teacher))
    for s, t in dtypes[:1] if fused in EMULATED else dtypes:
        for reduction in ("mean", "none"):
            args = (s, t, mask, relation, divergence, 0.5, reduction)
            torch.library.opcheck(kernel("channel_relation", fused), args)
            value, matrix = kernel("channel_relation", fused)(*args)
            upstream = torch.ones_like(value)
            for layout in (s, s.transpose(2, 3), s.to(memory_format=torch.channels_last)):
                turned = mask.transpose(1, 2).contiguous() if masked and layout.shape != s.shape else mask
                args = (layout, turned, matrix, upstream, relation, 0.5)
                torch.library.opcheck(kernel("channel_relation_backward", fused), args)
