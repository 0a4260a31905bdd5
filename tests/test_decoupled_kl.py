"""decoupled_kl alone: its parts, two classes, labels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from operators import assert_close

from medkd_fast import DecoupledKL, decoupled_kl
from medkd_fast.backend import kernel
from medkd_fast.ops import common


def sample(classes: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (2, classes, 6, 7)
    logits = [3 * torch.randn(shape, dtype=torch.float64) for _ in range(2)]
    return *logits, torch.randint(0, classes, (2, 6, 7))


def published(
    student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor, temperature: float
) -> list[torch.Tensor]:
    """Both parts from probabilities, as the paper's equations 5 and 6 say, at every pixel."""
    own = F.one_hot(target, student.shape[1]).movedim(-1, 1).bool()
    parts = []
    p_s, p_t = (F.softmax(x / temperature, 1) for x in (student, teacher))
    b_s, b_t = (p.masked_fill(~own, 0).sum(1) for p in (p_s, p_t))
    parts.append(b_t * (b_t / b_s).log() + (1 - b_t) * ((1 - b_t) / (1 - b_s)).log())
    q_s, q_t = (p.masked_fill(own, 0) / (1 - b).unsqueeze(1) for p, b in ((p_s, b_s), (p_t, b_t)))
    parts.append((q_t * (q_t / q_s).masked_fill(own, 1).log()).sum(1))
    return [temperature**2 * part for part in parts]


def test_parts_are_the_papers(backend: str) -> None:
    student, teacher, target = sample()
    target_part, nontarget_part = published(student, teacher, target, 3.0)
    got = decoupled_kl(student, teacher, target, target_weight=0.3, nontarget_weight=5.0, temperature=3.0)
    assert isinstance(got, DecoupledKL)
    assert_close(got.target, target_part.mean(), 1e-13)
    assert_close(got.nontarget, nontarget_part.mean(), 1e-13)
    assert_close(got.loss, (0.3 * target_part + 5 * nontarget_part).mean(), 1e-13)
    each = decoupled_kl(student, teacher, target, temperature=3.0, reduction="none")
    assert_close(each.target, target_part, 1e-12)
    assert_close(each.nontarget, nontarget_part, 1e-12)


def test_with_the_teachers_weights_it_is_the_ordinary_kl(backend: str) -> None:
    student, teacher, target = sample()
    p_t = F.softmax(teacher, 1)
    rest = 1 - p_t.gather(1, target.unsqueeze(1)).squeeze(1)
    parts = decoupled_kl(student, teacher, target, temperature=1.0, reduction="none")
    ordinary = (p_t * (F.log_softmax(teacher, 1) - F.log_softmax(student, 1))).sum(1)
    assert_close(parts.target + rest * parts.nontarget, ordinary, 1e-12)


def test_parts_are_detached(backend: str) -> None:
    student, teacher, target = sample()
    result = decoupled_kl(student.requires_grad_(), teacher, target)
    assert result.loss.requires_grad
    assert not result.target.requires_grad and not result.nontarget.requires_grad


def test_a_part_of_weight_zero_has_no_gradient_and_no_infinity(backend: str) -> None:
    student, teacher, target = sample()
    student.requires_grad_()
    only = decoupled_kl(student, teacher, target, target_weight=0.0)
    assert_close(only.loss, only.nontarget, 1e-15)
    only.loss.backward()
    own = student.grad.gather(1, target.unsqueeze(1))
    assert (own == 0).all() and (student.grad != 0).any()
    lacking = student.detach().clone()
    lacking[:, 4] = -torch.inf
    result = decoupled_kl(lacking, teacher, target.clamp(max=3), nontarget_weight=0.0)
    assert result.nontarget == torch.inf and result.loss.isfinite()


@pytest.mark.parametrize("label", [0, 1])
def test_what_the_student_alone_rules_out_is_infinite_however_unlikely(backend: str, label: int) -> None:
    # e^-500 is 0 in fp32, and not in fp64
    teacher = torch.tensor([[-500.0, 0.0]]).reshape(1, 2, 1, 1)
    student = torch.tensor([[-torch.inf, 0.0]]).reshape(1, 2, 1, 1)
    for dtype in (torch.float32, torch.float64):
        result = decoupled_kl(
            student.to(dtype), teacher.to(dtype), torch.full((1, 1, 1), label), temperature=1.0, nontarget_weight=0.0
        )
        assert result.loss == torch.inf and result.target == torch.inf


def test_two_classes_have_no_nontarget_part(backend: str) -> None:
    student, teacher, target = sample(classes=2)
    result = decoupled_kl(student, teacher, target)
    assert (result.nontarget == 0).all()
    assert_close(result.loss, published(student, teacher, target, 4.0)[0].mean(), 1e-13)


def test_one_class_raises(backend: str) -> None:
    student, teacher, target = sample(classes=1)
    with pytest.raises(ValueError, match=r"got 1 class, want at least 2; a sigmoid head is two classes, \[0, logit\]"):
        decoupled_kl(student, teacher, target)


def test_relative_accuracy_where_both_are_sure(backend: str) -> None:
    # b is 1 to 2^-24 in both networks; the divergence of the small rests is what is learnt from
    teacher = torch.tensor([[20.0, 0.0, -1.0]]).reshape(1, 3, 1, 1)
    student = torch.tensor([[24.0, 0.0, -1.0]]).reshape(1, 3, 1, 1).requires_grad_()
    exact = student.detach().double().requires_grad_()
    target = torch.zeros(1, 1, 1, dtype=torch.long)
    got = decoupled_kl(student, teacher, target, nontarget_weight=0.0, temperature=1.0)
    want = decoupled_kl(exact, teacher.double(), target, nontarget_weight=0.0, temperature=1.0)
    got.loss.backward()
    want.loss.backward()
    if backend == "cpp":
        assert_close(got.target, want.target, 1e-6)
        assert_close(student.grad, exact.grad, 1e-6)
    else:  # the definition in fp32 loses it to 1 - b
        assert abs(got.target - want.target) < 1e-6


@pytest.mark.parametrize("label", [5, -1, 300])
@pytest.mark.parametrize("low", [(6, 7), (3, 4)], ids=["same size", "upsampled"])
def test_label_out_of_range_in_the_operator_itself(fused: str, label: int, low: tuple[int, int]) -> None:
    student, teacher, target = sample()
    target[1, 3, 2] = label
    student = student[:, :, : low[0], : low[1]]
    run = kernel("decoupled_kl", fused)
    if fused == "cpp":
        with pytest.raises(RuntimeError, match=f"target holds the label {label}"):
            run(student, teacher, target, None, 1.0, 1.0, 4.0, -100, "mean", True)
        return
    # a GPU cannot raise without being waited for: the loss is NaN
    for reduction in ("mean", "sum"):
        assert all(x.isnan() for x in run(student, teacher, target, None, 1.0, 1.0, 4.0, -100, reduction, True)[:3])
    values = run(student, teacher, target, None, 1.0, 1.0, 4.0, -100, "none", False)[0]
    assert values.isnan().sum() == 1 and values[1, 3, 2].isnan()
    # what is left out may hold any label
    weight = torch.ones(target.shape, dtype=torch.float64)
    weight[1, 3, 2] = 0
    assert run(student, teacher, target, weight, 1.0, 1.0, 4.0, -100, "mean", True)[0].isfinite()


@pytest.mark.parametrize("label", [5, -1, 300])
def test_label_out_of_range_raises(backend: str, label: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "DEBUG", True)  # on a GPU
    student, teacher, target = sample()
    target[1, 3, 2] = label
    with pytest.raises(ValueError, match=rf"target holds the label {label}, want 0 to 4 or ignore_index \(-100\)"):
        decoupled_kl(student, teacher, target)
    torch._dynamo.reset()
    if backend == "cpp":
        with pytest.raises(RuntimeError, match=f"target holds the label {label}"):
            torch.compile(lambda: decoupled_kl(student, teacher, target).loss)()
