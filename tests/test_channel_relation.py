"""channel_relation alone: the formula, what it does not see, channels."""

from __future__ import annotations

import pytest
import torch
from operators import assert_close, value_and_gradient

import medkd_fast
from medkd_fast.ops.channel_relation import channel_relation


def sample(shape: tuple[int, ...] = (2, 5, 6, 7)) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(shape, dtype=torch.float64) + 0.5, torch.randn(shape, dtype=torch.float64) + 0.5


def test_value_entry_by_entry(backend: str) -> None:
    student, teacher = sample()
    want = []
    for s, t in zip(student.flatten(2), teacher.flatten(2), strict=True):
        entries = [
            (torch.cosine_similarity(s[i], s[j], dim=0) - torch.cosine_similarity(t[i], t[j], dim=0)) ** 2
            for i in range(5)
            for j in range(5)
        ]
        want.append(torch.stack(entries).mean())
    assert_close(channel_relation(student, teacher, reduction="none"), torch.stack(want), 1e-12)
    assert_close(channel_relation(student, teacher), torch.stack(want).mean(), 1e-12)


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


def test_the_teacher_is_not_kept_for_the_backward(cpp: None) -> None:
    student, teacher = sample()
    loss = channel_relation(student.requires_grad_(), teacher)
    kept = [x.data_ptr() for x in loss.grad_fn.saved_tensors if x is not None]
    assert student.data_ptr() in kept and teacher.data_ptr() not in kept


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(cpp: None, masked: bool) -> None:
    student, teacher = sample()
    mask = torch.rand(2, 6, 7) < 0.7 if masked else None
    for s, t in ((student.bfloat16(), teacher.float()), (student, teacher)):
        for reduction in ("mean", "none"):
            args = (s, t, mask, reduction)
            torch.library.opcheck(torch.ops.medkd_fast.channel_relation_cpp, args)
            value, matrix = torch.ops.medkd_fast.channel_relation_cpp(*args)
            upstream = torch.ones_like(value)
            for layout in (s, s.transpose(2, 3), s.to(memory_format=torch.channels_last)):
                turned = mask.transpose(1, 2).contiguous() if masked and layout.shape != s.shape else mask
                args = (layout, turned, matrix, upstream)
                torch.library.opcheck(torch.ops.medkd_fast.channel_relation_backward_cpp, args)
