"""class_kl alone: its relation to torch's own losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from operators import assert_close, value_and_gradient

from medkd_fast import class_kl


def sample() -> tuple[torch.Tensor, torch.Tensor]:
    student, teacher = (3 * torch.randn(2, 5, 6, 7, dtype=torch.float64) for _ in range(2))
    return student, teacher


def torch_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float, reduction: str) -> torch.Tensor:
    logs = [F.log_softmax(x / temperature, 1) for x in (student, teacher)]
    return F.kl_div(*logs, log_target=True, reduction=reduction)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")  # that is the factor that is tested
def test_factors_to_torch(backend: str) -> None:
    student, teacher = sample()
    temperature, pixels, classes = 3.0, 42, 5
    got, gradient = value_and_gradient(lambda x: class_kl(x, teacher, temperature=temperature), student)
    mean, mean_gradient = value_and_gradient(lambda x: torch_kl(x, teacher, temperature, "mean"), student)
    assert_close(mean, got / (classes * temperature**2), 1e-13)
    assert_close(mean_gradient, gradient / (classes * temperature**2), 1e-13)
    batchmean = torch_kl(student, teacher, temperature, "batchmean")
    assert_close(batchmean, got * pixels / temperature**2, 1e-13)


def test_gradient_is_the_difference_of_probabilities(backend: str) -> None:
    student, teacher = sample()
    _, gradient = value_and_gradient(lambda x: class_kl(x, teacher, temperature=2.0, reduction="sum"), student)
    assert_close(gradient, 2.0 * (F.softmax(student / 2, 1) - F.softmax(teacher / 2, 1)), 1e-13)


def test_one_class_is_refused(backend: str) -> None:
    student, teacher = sample()
    with pytest.raises(ValueError, match=r"got 1 class, want at least 2; .*activation=\"sigmoid\""):
        class_kl(student[:, :1], teacher[:, :1])


def test_target_only_says_what_to_leave_out(backend: str) -> None:
    student, teacher = sample()
    target = torch.full((2, 6, 7), 77)
    assert torch.equal(class_kl(student, teacher, target=target), class_kl(student, teacher))
    target[0] = -100
    assert_close(class_kl(student, teacher, target=target), class_kl(student[1:], teacher[1:]), 1e-14)
