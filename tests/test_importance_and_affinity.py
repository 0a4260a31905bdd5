"""importance_and_affinity against attention maps and class means of the definition, gradients of both numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from operators import EMULATED, IGNORED, ROUNDING, assert_close, labels, value_and_gradient

from medkd_fast import attention_map, class_means, importance_and_affinity, use_backend
from medkd_fast.backend import kernel

#: The student's shape, the teacher's channels, and classes.
SHAPES = [
    ((2, 5, 9, 11), 5, 4),
    ((1, 3, 4, 5, 6), 7, 2),
    ((3, 4, 31), 2, 20),
    ((1, 70, 5, 7), 40, 3),
    ((2, 2, 37, 61), 1, 9),
    ((2, 3, 6, 5), 3, 1),
]


def both(
    student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor, classes: int, power: float = 4.0
) -> torch.Tensor:
    return torch.stack(importance_and_affinity(student, teacher, target, num_classes=classes, power=power))


def formula(
    student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor, classes: int, power: float = 4.0
) -> torch.Tensor:
    """Image by image and pair by pair, in fp64."""
    student, teacher = student.double(), teacher.double()
    with use_backend("reference"):
        maps = [attention_map(x, power=power, mask=target != IGNORED) for x in (student, teacher)]
        means = [class_means(x, target, num_classes=classes).means for x in (student, teacher)]
    images = [image for image in range(len(target)) if (target[image] != IGNORED).any()]
    importance = sum((maps[0][i] - maps[1][i]).square().sum() for i in images) / max(len(images), 1)
    affinities = []
    for i in images:
        there = [k for k in range(classes) if (target[i] == k).any()]
        cosines = [
            torch.stack([F.cosine_similarity(x[i, a], x[i, b], 0) for a in there for b in there if a != b])
            for x in means
            if len(there) > 1
        ]
        if cosines:
            affinities.append((cosines[0] - cosines[1]).square().mean())
    affinity = torch.stack(affinities).mean() if affinities else 0 * importance
    return torch.stack([importance, affinity])


@pytest.mark.parametrize(("shape", "others", "classes"), SHAPES, ids=str)
@pytest.mark.parametrize(("power", "coherent"), [(2.0, False), (4.0, True), (1.0, True), (2.7, False)])
def test_equals_the_formula(
    backend: str, shape: tuple[int, ...], others: int, classes: int, power: float, coherent: bool
) -> None:
    student, target = torch.randn(shape), labels(shape, classes, coherent)
    teacher = torch.randn(shape[0], others, *shape[2:])
    if shape[0] == 3:
        target[0] = IGNORED
        target[1][target[1] != IGNORED] = 7  # no pair of classes
    upstream = torch.tensor([0.3, -0.7])
    want, want_gradient = value_and_gradient(
        lambda x: formula(x, teacher, target, classes, power), student.double(), upstream
    )
    for x in (student, teacher):
        x.movedim(1, -1)[target == IGNORED] = torch.nan
    for y in (student, student.movedim(1, -1).contiguous().movedim(-1, 1)):  # channels outside, and inside
        value, gradient = value_and_gradient(lambda x: both(x, teacher, target, classes, power), y, upstream)
        assert value.dtype == torch.float32
        assert_close(value, want, 1e-6, "values")
        assert_close(gradient, want_gradient, 1e-5, "gradient")
        assert (gradient.movedim(1, -1)[target == IGNORED] == 0).all()


TYPES = [
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16),
    (torch.float32, torch.float64),
    (torch.float64, torch.float16),
]


@pytest.mark.parametrize(("dtype", "of_teacher"), TYPES, ids=str)
def test_types(backend: str, dtype: torch.dtype, of_teacher: torch.dtype) -> None:
    student, teacher = torch.randn(2, 3, 16, 20).to(dtype), torch.randn(2, 4, 16, 20).to(of_teacher)
    target, upstream = labels(student.shape, 4, True), torch.tensor([0.3, 0.7])
    want, want_gradient = value_and_gradient(lambda x: formula(x, teacher, target, 4), student.double(), upstream)
    value, gradient = value_and_gradient(lambda x: both(x, teacher, target, 4), student, upstream)
    twice = torch.float64 in (dtype, of_teacher)
    assert gradient.dtype == dtype and value.dtype == (torch.float64 if twice else torch.float32)
    assert_close(value, want, 1e-13 if twice else 1e-6)
    assert_close(gradient, want_gradient, (1e-13 if twice else 1e-5) + 2 * ROUNDING[dtype])


def test_gradcheck(backend: str) -> None:
    student = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    teacher, target = torch.randn(2, 2, 3, 4, dtype=torch.float64), labels(student.shape, 3, False)
    assert torch.autograd.gradcheck(lambda x: both(x, teacher, target, 3), student, fast_mode=backend in EMULATED)


@pytest.mark.parametrize("part", ["importance", "affinity"])
def test_one_number_alone(backend: str, part: str) -> None:
    student, teacher = torch.randn(2, 5, 9, 11), torch.randn(2, 5, 9, 11)
    target, index = labels(student.shape, 4, False), ["importance", "affinity"].index(part)
    want = value_and_gradient(lambda x: formula(x, teacher, target, 4)[index], student.double())
    got = value_and_gradient(
        lambda x: getattr(importance_and_affinity(x, teacher, target, num_classes=4), part), student
    )
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, 1e-5)


def test_equal_networks(backend: str) -> None:
    x, target = torch.randn(2, 5, 9, 11), labels((2, 5, 9, 11), 4, False)
    value, gradient = value_and_gradient(lambda y: both(y, x, target, 4), x)
    assert (value == 0).all() and (gradient == 0).all()


def test_nothing_to_compare(backend: str) -> None:
    """Features that are all 0: the map and every cosine of such a network are 0."""
    zeros, ones, target = torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 4, 4), torch.arange(16).view(1, 4, 4) % 2
    value, gradient = value_and_gradient(lambda x: both(x, zeros, target, 2), zeros)
    assert (value == 0).all() and (gradient == 0).all()
    value, gradient = value_and_gradient(lambda x: both(x, ones, target, 2), zeros)
    assert_close(value, torch.ones(2), 1e-6)
    assert gradient.isfinite().all()
    assert both(zeros, ones, torch.zeros_like(target), 2)[1] == 0  # one class alone is no pair, whatever its mean


def test_a_class_without_features(backend: str) -> None:
    """Its cosine with others is 0 in one network; with itself it is no pair, of 0 in one network and 1 in the other."""
    student, teacher, target = torch.randn(2, 5, 9, 11), torch.randn(2, 5, 9, 11), labels((2, 5, 9, 11), 4, False)
    student.movedim(1, -1)[target == 2] = 0
    assert_close(both(student, teacher, target, 4), formula(student, teacher, target, 4), 1e-6)


def test_scaled_losses(backend: str) -> None:
    """What a gradient scaler multiplies by is in the upstream: a gradient in half precision neither overflows nor vanishes."""
    student, teacher = torch.randn(2, 5, 9, 11), torch.randn(2, 5, 9, 11)
    target, scale = labels(student.shape, 4, False), torch.full((2,), 2.0**10)
    want = value_and_gradient(lambda x: both(x, teacher, target, 4), student.half().float(), scale)[1]
    got = value_and_gradient(lambda x: both(x, teacher, target, 4), student.half(), scale)[1]
    assert_close(got, want, 1e-3)


def test_opcheck(fused: str) -> None:
    student, teacher = torch.randn(2, 3, 4, 5).to(torch.bfloat16), torch.randn(2, 4, 4, 5)
    arguments = (student, teacher, torch.randint(0, 3, (2, 4, 5)), 4, 2.0, 1)
    torch.library.opcheck(kernel("importance_and_affinity", fused), arguments)
    _, _, *state = kernel("importance_and_affinity", fused)(*arguments)
    arguments = (student, arguments[2], *state, torch.tensor(0.3), torch.tensor(0.7), 2.0, 1)
    torch.library.opcheck(kernel("importance_and_affinity_backward", fused), arguments)


def test_labels_that_are_none(fused: str) -> None:
    student, teacher, target = torch.randn(1, 2, 6, 7), torch.randn(1, 2, 6, 7), torch.randint(0, 3, (1, 6, 7))
    target[0, 3, 2] = 3
    if fused == "cpp":
        with pytest.raises(RuntimeError, match="importance_and_affinity: target holds the label 3, want 0 to 2"):
            importance_and_affinity(student, teacher, target, num_classes=3)
        return
    _, affinity, *state = kernel("importance_and_affinity", fused)(student, teacher, target, 3, 2.0, -100)
    assert affinity.isnan()
    one = torch.tensor(1.0)
    gradient = kernel("importance_and_affinity_backward", fused)(student, target, *state, one, one, 2.0, -100)
    assert gradient[0, :, 3, 2].isnan().all()


def test_bad_arguments(backend: str) -> None:
    x, target = torch.randn(1, 2, 4, 4), torch.zeros(1, 4, 4).long()
    with pytest.raises(ValueError, match="power: got 0.5, want a finite number of at least 1"):
        importance_and_affinity(x, x, target, num_classes=1, power=0.5)
    with pytest.raises(ValueError, match=r"got spatial sizes \(4, 4\) and \(4, 3\), want equal ones"):
        importance_and_affinity(x, x[..., :3], target, num_classes=1)
    with pytest.raises(ValueError, match="teacher requires grad"):
        importance_and_affinity(x, x.clone().requires_grad_(), target, num_classes=1)
