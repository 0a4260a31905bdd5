"""pixel_relation alone: the formula, what it does not see, unequal channels, the cancelling operating point, memory."""

from __future__ import annotations

import pytest
import torch
from operators import assert_close, in_new_process, value_and_gradient

import medkd_fast
from medkd_fast.backend import UNAVAILABLE
from medkd_fast.ops.pixel_relation import pixel_relation


def sample(shape: tuple[int, ...] = (2, 5, 4, 3), teacher_channels: int | None = None) -> list[torch.Tensor]:
    shapes = shape, (shape[0], teacher_channels or shape[1], *shape[2:])
    return [torch.randn(s, dtype=torch.float64) + 0.5 for s in shapes]


def truth(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with medkd_fast.use_backend("reference"):
        return value_and_gradient(lambda x: pixel_relation(x, teacher.double()), student.double())


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


def test_across_images_is_not_there_yet(backend: str) -> None:
    with pytest.raises(NotImplementedError, match=r"across_images=True is not built yet; what there is: .*=False"):
        pixel_relation(*sample(), across_images=True)


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(cpp: None, masked: bool) -> None:
    student, teacher = sample((2, 5, 6, 7), 3)
    mask = torch.rand(2, 6, 7) < 0.7 if masked else None
    for s, t in ((student.bfloat16(), teacher.float()), (student, teacher)):
        for reduction in ("mean", "none"):
            args = (s, t, mask, reduction)
            torch.library.opcheck(torch.ops.medkd_fast.pixel_relation_cpp, args)
            value, matrix = torch.ops.medkd_fast.pixel_relation_cpp(*args)
            upstream = torch.ones_like(value)
            torch.library.opcheck(torch.ops.medkd_fast.pixel_relation_backward_cpp, (s, t, mask, matrix, upstream))


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
