"""pixel_relation alone: the formula, what it does not see, unequal channels, the cancelling operating point, memory."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from operators import (
    EMULATED,
    ROUNDING,
    assert_close,
    channels_last,
    compiled,
    in_new_process,
    over_threads,
    value_and_gradient,
)

import medkd_fast
from medkd_fast.backend import UNAVAILABLE
from medkd_fast.ops.max_pool import max_pool
from medkd_fast.ops.pixel_relation import pixel_relation


def sample(shape: tuple[int, ...] = (2, 5, 4, 3), teacher_channels: int | None = None) -> list[torch.Tensor]:
    shapes = shape, (shape[0], teacher_channels or shape[1], *shape[2:])
    return [torch.randn(s, dtype=torch.float64) + 0.5 for s in shapes]


def truth(student: torch.Tensor, teacher: torch.Tensor, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with medkd_fast.use_backend("reference"):
        return value_and_gradient(lambda x: pixel_relation(x, teacher.double(), **settings), student.double())


def test_value_entry_by_entry(backend: str) -> None:
    student, teacher = sample()
    want = []
    for s, t in zip(student.flatten(2), teacher.flatten(2), strict=True):
        entries = [
            (torch.cosine_similarity(s[:, i], s[:, j], dim=0) - torch.cosine_similarity(t[:, i], t[:, j], dim=0)) ** 2
            for i in range(12)
            for j in range(12)
        ]
        want.append(torch.stack(entries).mean())
    assert_close(pixel_relation(student, teacher, reduction="none"), torch.stack(want), 1e-12)
    assert_close(pixel_relation(student, teacher), torch.stack(want).mean(), 1e-12)


def test_a_pixels_scale_and_rotations_of_the_channels_do_not_matter(backend: str) -> None:
    student, teacher = sample()
    want = pixel_relation(student, teacher)
    scales = torch.logspace(-3, 3, 12, dtype=torch.float64).reshape(4, 3)
    assert_close(pixel_relation(student * scales, teacher / scales), want, 1e-12)
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    assert_close(pixel_relation(torch.einsum("dc,bchw->bdhw", rotation, student), teacher), want, 1e-12)


@pytest.mark.parametrize(("channels", "noise"), [(64, 0.06), (5, 0.02)])
def test_rotated(backend: str, channels: int, noise: float) -> None:
    # other features, nearly equal relations: the C x C form cancels here
    _, teacher = sample((2, channels, 24, 24))
    rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0]
    rotated = torch.einsum("dc,bchw->bdhw", rotation, teacher)
    s, t = (rotated + noise * torch.randn_like(teacher)).float(), teacher.float()
    value, gradient = value_and_gradient(lambda x: pixel_relation(x, t), s)
    want, want_gradient = truth(s, t)
    assert 5e-3 < want.sqrt() < 2e-2  # how far the relations are apart
    assert_close(value, want, 1e-3)
    assert_close(gradient, want_gradient, 1e-3)


@pytest.mark.parametrize(("student_channels", "teacher_channels"), [(4, 9), (9, 4), (1, 2), (2, 1), (7, 150)])
def test_unequal_channels(backend: str, student_channels: int, teacher_channels: int) -> None:
    student, teacher = sample((2, student_channels, 11, 13), teacher_channels)
    for s, t, tolerance in ((student.float(), teacher.float(), 1e-5), (student, teacher, 1e-13)):
        value, gradient = value_and_gradient(lambda x: pixel_relation(x, t), s)  # noqa: B023
        want, want_gradient = truth(s, t)
        assert_close(value, want, tolerance)
        if student_channels > 1:
            assert_close(gradient, want_gradient, tolerance)
        else:  # pixels are 1 or -1 and have no gradient, to the rounding of 1 / the smallest of them
            assert gradient.abs().max() <= 1e-3


def test_a_channel_of_zeros_changes_nothing(backend: str) -> None:
    student, teacher = sample()
    wider = torch.cat([teacher, torch.zeros_like(teacher[:, :2])], 1)
    assert_close(pixel_relation(student, wider), pixel_relation(student, teacher), 1e-14)


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(fused: str, masked: bool) -> None:
    student, teacher = sample((2, 5, 6, 7), 3)
    mask = torch.rand(2, 6, 7) < 0.7 if masked else None
    dtypes = ((student.bfloat16(), teacher.float()), (student, teacher))
    for s, t in dtypes[:1] if fused in EMULATED else dtypes:
        for reduction, across in (("mean", False), ("none", True)):
            check_operator("pixel_relation", fused, (s, t, mask), ("pearson", across, reduction))
            check_operator("pixel_relation_kl", fused, (s, t, mask), ("cosine", 0.1, across, reduction))


def check_operator(name: str, backend: str, tensors: tuple, settings: tuple) -> None:
    forward, backward = (getattr(torch.ops.medkd_fast, f"{name}_{way}{backend}") for way in ("", "backward_"))
    torch.library.opcheck(forward, (*tensors, *settings))
    value, kept = forward(*tensors, *settings)
    torch.library.opcheck(backward, (*tensors, kept, torch.ones_like(value), *settings))


def test_memory_does_not_grow_with_the_pairs_of_pixels() -> None:
    # 110,592 pixels: one N x N matrix in fp32 is 49 GB. The gradient alone is 14 MB
    script = """
import resource, torch
from medkd_fast.ops.pixel_relation import pixel_relation
student, teacher = torch.randn(2, 1, 32, 48, 48, 48)
student.requires_grad_()
pixel_relation(student[..., :9, :9], teacher[..., :9, :9]).backward()
student.grad = None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pixel_relation(student, teacher).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    if UNAVAILABLE["cpp"]:
        pytest.skip(f"cpp is not here: {UNAVAILABLE['cpp']}")
    assert float(in_new_process(script)) <= 32  # megabytes; the memory of the small call before counts once


RELATIONS = ("cosine", "pearson", "gram")


def rows_of(x: torch.Tensor, relation: str) -> torch.Tensor:
    """[C, N] with a pixel's row in each column, by the words of the docstring."""
    if relation == "gram":
        return x / x.shape[0] ** 0.5
    if relation == "pearson":
        x = x - x.mean(0)
    return x / x.norm(dim=0).clamp_min(1e-12)


def pair_value(
    s: list[torch.Tensor], t: list[torch.Tensor], relation: str, divergence: str, temperature: float
) -> torch.Tensor:
    """The value of one pair of images [C, N], a row of the relation matrix after another."""
    (s_a, s_b), (t_a, t_b) = ([rows_of(x, relation) for x in pair] for pair in (s, t))
    total = torch.zeros((), dtype=torch.float64)
    for i in range(s_a.shape[1]):
        row_s, row_t = s_a[:, i] @ s_b, t_a[:, i] @ t_b
        if divergence == "mse":
            total = total + ((row_s - row_t) ** 2).mean()
        else:
            p, q = (row_t / temperature).softmax(0), (row_s / temperature).softmax(0)
            total = total + (p * (p / q).log()).sum()
    return total / s_a.shape[1]


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("divergence", ["mse", "kl"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_value_row_by_row(backend: str, relation: str, divergence: str, masked: bool) -> None:
    student, teacher = sample((2, 5, 4, 3), 3)
    keep = torch.rand(2, 12) < (0.6 if masked else 2)
    s, t = ([x[b].flatten(1)[:, keep[b]] for b in range(2)] for x in (student, teacher))
    want = torch.stack(
        [
            torch.stack([pair_value([s[a], s[b]], [t[a], t[b]], relation, divergence, 0.5) for b in range(2)])
            for a in range(2)
        ]
    )
    settings = {"relation": relation, "divergence": divergence, "temperature": 0.5}
    if masked:
        settings["mask"] = keep.reshape(2, 4, 3)
    assert_close(pixel_relation(student, teacher, reduction="none", **settings), want.diagonal(), 1e-12)
    assert_close(pixel_relation(student, teacher, **settings), want.diagonal().mean(), 1e-12)
    settings["across_images"] = True
    assert_close(pixel_relation(student, teacher, reduction="none", **settings), want, 1e-12)
    assert_close(pixel_relation(student, teacher, **settings), want.mean(), 1e-12)
    assert_close(pixel_relation(student, teacher, reduction="sum", **settings), want.sum(), 1e-12)


def test_temperature_default(backend: str) -> None:
    student, teacher = sample()
    want = pixel_relation(student, teacher, divergence="kl", temperature=0.1)
    assert torch.equal(pixel_relation(student, teacher, divergence="kl"), want)


# 0.01 and gram: maxima found along the way. There rows are one-hot, and what is left is the rounding of logits of 100
@pytest.mark.parametrize(
    ("relation", "divergence", "temperature", "tolerance"),
    [
        ("cosine", "mse", 1.0, 1e-5),
        ("pearson", "mse", 1.0, 1e-5),
        ("gram", "mse", 1.0, 1e-5),
        ("cosine", "kl", 0.05, 1e-5),
        ("cosine", "kl", 0.1, 1e-5),
        ("cosine", "kl", 1.0, 1e-5),
        ("pearson", "kl", 0.1, 1e-5),
        ("gram", "kl", 0.5, 1e-5),
        ("cosine", "kl", 0.01, 1e-4),
    ],
)
@pytest.mark.parametrize("across_images", [False, True], ids=["each", "across"])
@pytest.mark.parametrize(
    ("shape", "teacher_channels"), [((3, 5, 7, 11), 9), ((2, 3, 3, 5, 13), 3), ((2, 1, 9, 2), 2)], ids=str
)
def test_equals_the_definition(
    backend: str, relation, divergence, temperature, tolerance, across_images, shape, teacher_channels
) -> None:
    student, teacher = (x.float() for x in sample(shape, teacher_channels))
    mask = torch.rand(shape[0], *shape[2:]) < 0.8
    for reduction, masked in (
        [("mean", mask), ("none", None)] if backend in EMULATED else product(("mean", "sum", "none"), (None, mask))
    ):
        settings = {
            "relation": relation,
            "divergence": divergence,
            "temperature": temperature,
            "across_images": across_images,
            "reduction": reduction,
            "mask": masked,
        }
        size = shape[:1] * (1 + across_images) if reduction == "none" else ()
        upstream = torch.randn(size, dtype=torch.float64)
        value, gradient = value_and_gradient(
            lambda x: pixel_relation(x, teacher, **settings),  # noqa: B023
            student,
            upstream,
        )
        with medkd_fast.use_backend("reference"):
            want, want_gradient = value_and_gradient(
                lambda x: pixel_relation(x, teacher.double(), **settings),  # noqa: B023
                student.double(),
                upstream,
            )
        assert_close(value, want, tolerance, "value")
        if shape[1] > 1 or relation == "gram":
            assert_close(gradient, want_gradient, tolerance, "gradient")
        else:  # one channel: pixels are 1 or -1, or 0, and have no gradient, to the rounding of 1 / the smallest
            assert (gradient - want_gradient).abs().max() <= 1e-3


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("divergence", ["mse", "kl"])
@pytest.mark.parametrize("across_images", [False, True], ids=["each", "across"])
@pytest.mark.parametrize("temperature", [0.01, 0.5])
def test_gradcheck(backend: str, relation: str, divergence: str, across_images: bool, temperature: float) -> None:
    student, teacher = sample((2, 4, 3, 2), 3)
    mask = torch.tensor([[1, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 1]]).reshape(2, 3, 2)
    settings = {"relation": relation, "divergence": divergence, "temperature": temperature, "mask": mask}
    # the second derivative grows as 1 / temperature², and with it the error of the difference quotient
    assert torch.autograd.gradcheck(
        lambda x: pixel_relation(x, teacher, across_images=across_images, reduction="none", **settings),
        student.requires_grad_(),
        rtol=1e-3 if temperature > 0.1 else 1e-2,
        atol=1e-5 if temperature > 0.1 else 1e-3,
        fast_mode=backend in EMULATED,
    )


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("divergence", ["mse", "kl"])
@pytest.mark.parametrize("across_images", [False, True], ids=["each", "across"])
def test_converged_variants(backend: str, relation: str, divergence: str, across_images: bool) -> None:
    other, teacher = sample((2, 32, 15, 16))
    s, t = (teacher + 1e-3 * torch.randn_like(teacher)).float(), teacher.float()
    for temperature in (0.1, 0.5):
        settings = {
            "relation": relation,
            "divergence": divergence,
            "temperature": temperature,
            "across_images": across_images,
        }
        value, gradient = value_and_gradient(lambda x: pixel_relation(x, t, **settings), s)  # noqa: B023
        with medkd_fast.use_backend("reference"):
            want, want_gradient = value_and_gradient(
                lambda x: pixel_relation(x, t.double(), **settings),  # noqa: B023
                s.double(),
            )
            scale = pixel_relation(other, teacher, **settings)
        assert abs(value - want) <= 1e-6 * scale and value >= -1e-6 * scale
        # the definition subtracts relations that it has rounded to fp32
        assert_close(gradient, want_gradient, 2e-3 if backend == "cpp" else 1e-2)


@pytest.mark.parametrize("temperature", [0.01, 0.05, 0.1, 1.0])
def test_opposed_and_zero_pixels(backend: str, temperature: float) -> None:
    student, teacher = (x.float() for x in sample((2, 6, 13, 11)))
    student[:, :, 3:8] *= -1
    teacher[:, :, 5:] = -teacher[:, :, :8].flip(2)
    student[0, :, 0] = 0
    teacher[1, :, 2:4] = 0
    settings = {"divergence": "kl", "temperature": temperature}
    value, gradient = value_and_gradient(lambda x: pixel_relation(x, teacher, **settings), student)
    with medkd_fast.use_backend("reference"):
        want, want_gradient = value_and_gradient(
            lambda x: pixel_relation(x, teacher.double(), **settings), student.double()
        )
    tolerance = 1e-5 if temperature > 0.01 else 1e-4  # logits of 100 round to 1e-5
    assert_close(value, want, tolerance)
    # a zero pixel has its gradient divided by 1e-12; the others' must not drown in it
    zero = (student == 0).all(1, keepdim=True).expand_as(student)
    assert_close(gradient[~zero], want_gradient[~zero], tolerance)
    assert_close(gradient[zero], want_gradient[zero], tolerance)


def test_pixels_of_equal_channels_are_zero_rows_for_pearson(backend: str) -> None:
    student, teacher = (x.float() for x in sample((1, 7, 5, 6)))
    student[..., 2, :] = torch.rand(6) * 10
    for divergence in ("mse", "kl"):
        settings = {"relation": "pearson", "divergence": divergence}
        with medkd_fast.use_backend("reference"):
            centred = student.double() - student.double().mean(1, keepdim=True)
            centred[..., 2, :] = 0
            want = pixel_relation(centred, teacher.double(), **settings)
        assert_close(pixel_relation(student, teacher, **settings), want, 1e-6)
        # a large mean takes nothing but the digits that the features do not have
        shifted = (student.double() + 1000).float()
        with medkd_fast.use_backend("reference"):
            want = pixel_relation(shifted.double(), teacher.double(), **settings)
        assert_close(pixel_relation(shifted, teacher, **settings), want, 1e-5)


@pytest.mark.parametrize("relation", ["cosine", "pearson"])
@pytest.mark.parametrize("channels", [20, 70])  # normalised where they are multiplied, and before
def test_pixels_and_channels_of_many_sizes(backend: str, channels: int, relation: str) -> None:
    sizes = torch.logspace(-4, 0, channels)[:, None, None] * torch.logspace(-14, 4, 30).view(5, 6)
    student, teacher = torch.randn(2, 1, channels, 5, 6) * sizes
    value, gradient = value_and_gradient(lambda x: pixel_relation(x, teacher, relation=relation), student)
    want, want_gradient = truth(student, teacher, relation=relation)
    assert_close(value, want, 1e-6)
    # that of a pixel grows as the pixel shrinks
    unit = want_gradient.norm(dim=1, keepdim=True)
    assert_close(gradient / unit, want_gradient / unit, 1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has the blocks that its shared memory allows")
@pytest.mark.parametrize("divergence", ["mse", "kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [64, 80])
@pytest.mark.parametrize("shape", [(16, 20), (15, 17)], ids=["full blocks", "not full"])
def test_the_blocks_of_a_gpu_with_much_shared_memory(
    monkeypatch: pytest.MonkeyPatch, divergence: str, dtype: torch.dtype, channels: int, shape: tuple[int, int]
) -> None:
    if UNAVAILABLE["triton"]:
        pytest.skip(UNAVAILABLE["triton"])
    from medkd_fast.kernels import pixel_relation as of_mse
    from medkd_fast.kernels import pixel_relation_kl as of_kl

    monkeypatch.setattr(of_mse, "roomy", lambda kibibytes=160: True)
    monkeypatch.setattr(of_kl, "roomy", lambda kibibytes=160: True)
    student, teacher = (torch.randn(1, channels, *shape).to(dtype) for _ in range(2))
    settings = {"divergence": divergence, "temperature": 0.1}
    with medkd_fast.use_backend("triton"):
        got = value_and_gradient(lambda s: pixel_relation(s, teacher, **settings), student)
    value, gradient = truth(student, teacher, **settings)
    assert_close(got[0], value, 1e-5, "value")
    assert_close(got[1], gradient, 1e-5 + (ROUNDING[dtype] if dtype == torch.bfloat16 else 0), "gradient")


@pytest.mark.parametrize("size", [30, 1e4])
def test_gram_of_large_features(backend: str, size: float) -> None:
    # logits of 10^4 or 10^9, and rows that are one-hot: their maxima, not the sums, decide. 10^4 rounds by 10^4 * 6e-8;
    # 10^9 by 60, an exponent that must not appear in a probability
    student, teacher = (size * x.float() for x in sample((2, 8, 6, 7)))
    settings = {"relation": "gram", "divergence": "kl", "temperature": 0.1}
    value, gradient = value_and_gradient(lambda x: pixel_relation(x, teacher, **settings), student)
    with medkd_fast.use_backend("reference"):
        want, want_gradient = value_and_gradient(
            lambda x: pixel_relation(x, teacher.double(), **settings), student.double()
        )
    assert want > 100
    assert_close(value, want, 1e-4)
    assert_close(gradient, want_gradient, 5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_far_below_those_of_columns_that_do_not_count(backend: str, dtype: torch.dtype) -> None:
    # pixels of two images are opposed, so their logits are -1000; a column behind the last pixel has a 0
    student = torch.tensor([1.0, -1.0], dtype=dtype).reshape(2, 1, 1, 1).expand(2, 3, 2, 2)
    settings = {"divergence": "kl", "temperature": 1e-3, "across_images": True}
    value, gradient = value_and_gradient(lambda x: pixel_relation(x, student.flip(2), **settings), student)
    assert abs(value) < 1e-6
    assert gradient.abs().max() < 1e-2  # 1e-3 of the temperature, and rounding


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("divergence", ["mse", "kl"])
def test_across_one_image_is_not_across(backend: str, relation: str, divergence: str) -> None:
    student, teacher = sample((1, 5, 9, 8))
    settings = {"relation": relation, "divergence": divergence}
    want, want_gradient = value_and_gradient(lambda x: pixel_relation(x, teacher, **settings), student)
    value, gradient = value_and_gradient(lambda x: pixel_relation(x, teacher, across_images=True, **settings), student)
    assert_close(value, want, 1e-13)
    assert_close(gradient, want_gradient, 1e-13)


def test_across_images_joins_their_pixels_for_mse(backend: str) -> None:
    student, teacher = sample((3, 5, 4, 7))
    joined = [x.transpose(0, 1).reshape(1, 5, -1) for x in (student, teacher)]
    want = pixel_relation(*joined)
    assert_close(pixel_relation(student, teacher, across_images=True), want, 1e-12)


@pytest.mark.parametrize("divergence", ["mse", "kl"])
def test_across_images_leaves_masked_pixels_and_empty_images_out(backend: str, divergence: str) -> None:
    student, teacher = sample((3, 5, 8, 9))
    mask = torch.rand(3, 8, 9) < 0.6
    mask[1] = False
    kept = [0, 2]
    settings = {"divergence": divergence, "across_images": True}
    with medkd_fast.use_backend("reference"):
        want, want_gradient = value_and_gradient(
            lambda x: pixel_relation(x, teacher[kept], mask=mask[kept], **settings), student[kept]
        )
    away = ~mask.unsqueeze(1)
    poisoned = student.masked_fill(away, torch.nan), teacher.masked_fill(away, torch.inf)
    value, gradient = value_and_gradient(lambda x: pixel_relation(x, poisoned[1], mask=mask, **settings), poisoned[0])
    assert_close(value, want, 1e-13)
    assert_close(gradient[kept], want_gradient, 1e-13)
    assert (gradient.masked_select(away) == 0).all()
    each = pixel_relation(student, teacher, mask=mask, reduction="none", **settings)
    assert each.shape == (3, 3) and (each[1] == 0).all() and (each[:, 1] == 0).all()
    assert_close(each.sum() / 4, want, 1e-13)
    nothing = torch.zeros_like(mask)
    for reduction in ("mean", "sum", "none"):
        value, gradient = value_and_gradient(
            lambda x: pixel_relation(x, teacher, mask=nothing, reduction=reduction, **settings),  # noqa: B023
            student,
        )
        assert (value == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize(("relation", "temperature"), [("cosine", 0.005), ("gram", 0.001), ("cosine", 0.1)])
def test_across_images_that_are_opposed_behind_a_masked_beginning(
    backend: str, relation: str, temperature: float
) -> None:
    """The first columns that a row meets do not count, and the logits of those that do lie far below 0."""
    direction = F.normalize(torch.randn(4), dim=0).view(1, 4, 1)
    opposed = torch.cat([direction, -direction]).expand(2, 4, 160)
    student, teacher = (opposed + 0.05 * torch.randn(2, 4, 160) for _ in range(2))
    mask = (torch.arange(160) >= 130).expand(2, 160)
    settings = {
        "relation": relation,
        "temperature": temperature,
        "divergence": "kl",
        "across_images": True,
        "mask": mask,
    }
    value, gradient = value_and_gradient(lambda x: pixel_relation(x, teacher, reduction="none", **settings), student)
    with medkd_fast.use_backend("reference"):
        want, want_gradient = value_and_gradient(
            lambda x: pixel_relation(x, teacher.double(), reduction="none", **settings), student.double()
        )
    assert (want > 0.1 * want.max()).all()
    assert_close(value, want, 1e-4)  # logits of 200 with fp32's rounding
    assert_close(gradient, want_gradient, 1e-4)


@pytest.mark.parametrize("divergence", ["mse", "kl"])
def test_half_precision_of_more_channels_than_a_block_takes(fused: str, divergence: str) -> None:
    student, teacher = (x.bfloat16() for x in sample((1, 160, 5, 13)))
    value, gradient = value_and_gradient(lambda x: pixel_relation(x, teacher, divergence=divergence), student)
    with medkd_fast.use_backend("reference"):
        want, want_gradient = value_and_gradient(
            lambda x: pixel_relation(x, teacher.double(), divergence=divergence), student.double()
        )
    assert_close(value, want, 1e-5)
    assert_close(gradient, want_gradient, ROUNDING[torch.bfloat16])


@pytest.mark.parametrize("divergence", ["mse", "kl"])
@pytest.mark.parametrize("relation", RELATIONS)
def test_same_bits_for_any_number_of_threads_and_layout(cpp: str, divergence: str, relation: str) -> None:
    student, teacher = (x.float() for x in sample((3, 9, 50, 13)))
    mask = torch.rand(3, 50, 13) < 0.9
    settings = {"divergence": divergence, "relation": relation, "mask": mask, "across_images": True}
    over_threads(lambda: list(value_and_gradient(lambda x: pixel_relation(x, teacher, **settings), student)))
    want, want_gradient = value_and_gradient(lambda x: pixel_relation(x, teacher, **settings), student)
    value, gradient = value_and_gradient(lambda x: pixel_relation(x, teacher, **settings), channels_last(student))
    assert torch.equal(value, want) and torch.equal(gradient, want_gradient)


@pytest.mark.parametrize("divergence", ["mse", "kl"])
def test_across_images_compiles_into_one_graph(fused: str, divergence: str) -> None:
    torch._dynamo.reset()
    student, teacher = sample((2, 5, 6, 9))

    def step(x: torch.Tensor) -> torch.Tensor:
        settings = {"divergence": divergence, "relation": "pearson", "across_images": True}
        return pixel_relation(x, teacher, reduction="none", **settings).sum()

    want, want_gradient = value_and_gradient(step, student)
    value, gradient = value_and_gradient(compiled(step, fused), student)
    assert_close(value, want, 1e-13)
    assert_close(gradient, want_gradient, 1e-13)


def test_memory_of_kl_does_not_grow_with_the_pairs_of_pixels() -> None:
    # features of 2 MB; one N x N matrix of an image in fp32 is 64 MB
    script = """
import resource, torch
from medkd_fast.ops.pixel_relation import pixel_relation
student, teacher = torch.randn(2, 2, 64, 64, 64)
student.requires_grad_()
pixel_relation(student[..., :9, :9], teacher[..., :9, :9], divergence="kl").backward()
student.grad = None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pixel_relation(student, teacher, divergence="kl").backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    if UNAVAILABLE["cpp"]:
        pytest.skip(f"cpp is not here: {UNAVAILABLE['cpp']}")
    assert float(in_new_process(script)) <= 16  # megabytes


@pytest.mark.parametrize("divergence", ["mse", "kl"])
@pytest.mark.parametrize("across_images", [False, True], ids=["each", "across"])
@pytest.mark.parametrize(
    ("size", "window", "masked"), [((9, 12), 2, False), ((4, 6, 5), (2, 3, 1), True), ((40,), 7, True)], ids=str
)
def test_pool(
    backend: str, divergence: str, across_images: bool, size: tuple[int, ...], window: int, masked: bool
) -> None:
    """max_pool of both maps, and then the relation."""
    student, teacher = torch.randn(2, 5, *size), torch.randn(2, 3, *size)
    mask = None
    if masked:
        mask = torch.rand(2, *size) < 0.3
        mask[0] = False
        student.movedim(1, -1)[~mask] = torch.nan
    settings = {"divergence": divergence, "across_images": across_images}

    def pooled_first(x: torch.Tensor) -> torch.Tensor:
        (x, left), (y, _) = (max_pool(each, window, mask=mask) for each in (x, teacher))
        return pixel_relation(x, y, mask=left, **settings)

    def fused(x: torch.Tensor) -> torch.Tensor:
        return pixel_relation(x, teacher, mask=mask, pool=window, **settings)

    for got, want in zip(value_and_gradient(fused, student), value_and_gradient(pooled_first, student), strict=True):
        assert torch.equal(got, want) and got.isfinite().all()
    assert torch.equal(fused(student), fused(student.requires_grad_()).detach())


def test_bad_pool(backend: str) -> None:
    x = torch.randn(1, 2, 4, 4)
    with pytest.raises(ValueError, match="pool: got 0, want a whole number of at least 1, or 2 of them"):
        pixel_relation(x, x, pool=0)


def test_pool_compiles_into_one_graph(fused: str) -> None:
    x, y = torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 8)
    function = compiled(lambda x: pixel_relation(x, y, pool=2), fused)
    want = value_and_gradient(lambda x: pixel_relation(x, y, pool=2), x)
    assert all(torch.equal(a, b) for a, b in zip(value_and_gradient(function, x), want, strict=True))
