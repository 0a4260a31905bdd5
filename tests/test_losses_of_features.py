"""The losses on features against formulas written here, in fp64: value, gradient, parts."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from operators import assert_close
from test_losses_of_logits import SIZES, check, labels

from medkd_fast.losses import ATLoss, CIRKDLoss, FitNetLoss, ICKDLoss, IFVDLoss, PKDLoss, SKDLoss, SPLoss

MASKED = pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])


def features(*size: int, channels: tuple[int, int] = (4, 4)) -> list[torch.Tensor]:
    return [torch.randn(2, c, *size, dtype=torch.float64) + 0.3 for c in channels]


def pixels(x: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
    """Of one image [C, *S], the pixels that count: [C, V]."""
    return x.flatten(1) if target is None else x[:, target != -100]


@SIZES
@pytest.mark.parametrize("detach_norm", [False, True])
@pytest.mark.parametrize("each_axis", [False, True])
def test_skd(composed: str, size: tuple[int, ...], detach_norm: bool, each_axis: bool) -> None:
    window = (2, 3, 1)[: len(size)] if each_axis else 2
    student, teacher = features(*size, channels=(4, 6))
    pool = {2: F.max_pool2d, 3: F.max_pool3d}[len(size)]

    def affinity(x: torch.Tensor) -> torch.Tensor:
        x = pool(x, window, ceil_mode=True).flatten(2)
        norm = x.norm(dim=1, keepdim=True)
        x = x / ((norm + 1e-8).detach() if detach_norm else norm)
        return x.mT @ x

    loss = SKDLoss(pool=window, detach_norm=detach_norm)
    check(lambda x: loss(x, teacher), lambda x: F.mse_loss(affinity(x), affinity(teacher)), student)


@SIZES
def test_skd_leaves_pixels_out_before_pooling(composed: str, size: tuple[int, ...]) -> None:
    student, teacher = features(*size)
    target = labels(3, 2, *size)
    target[0, :2, :2] = -100  # whole windows
    corners = list(itertools.product(*(range(0, n, 2) for n in size)))

    def affinity(x: torch.Tensor, image: int) -> torch.Tensor:
        columns = []
        for corner in corners:
            box = tuple(slice(c, c + 2) for c in corner)
            inside = target[image][box] != -100
            if inside.any():
                columns.append(x[image][(slice(None), *box)][:, inside].amax(1))
        s = F.normalize(torch.stack(columns, 1), dim=0)
        return s.T @ s

    def formula(x: torch.Tensor) -> torch.Tensor:
        return sum(F.mse_loss(affinity(x, image), affinity(teacher, image)) for image in range(2)) / 2

    check(lambda x: SKDLoss()(x, teacher, target), formula, student)


@SIZES
@MASKED
def test_cirkd(composed: str, size: tuple[int, ...], masked: bool) -> None:
    student, teacher = features(*size, channels=(4, 6))
    target = labels(3, 2, *size) if masked else None

    def formula(x: torch.Tensor) -> torch.Tensor:
        s, t = (
            [F.normalize(pixels(y[i], None if target is None else target[i]), dim=0) for i in range(2)]
            for y in (x, teacher)
        )
        total = 0
        for a, b in itertools.product(range(2), repeat=2):
            log_s, p_t = (s[a].T @ s[b] / 0.1).log_softmax(1), (t[a].T @ t[b] / 0.1).softmax(1)
            total = total + F.kl_div(log_s, p_t, reduction="batchmean")
        return total / 4

    check(lambda x: CIRKDLoss()(x, teacher, target), formula, student)


def test_cirkd_pools(composed: str) -> None:
    student, teacher = features(6, 8)
    pooled = F.avg_pool2d(student, 2), F.avg_pool2d(teacher, 2)
    assert_close(CIRKDLoss(pool=2)(student, teacher), CIRKDLoss()(*pooled), 1e-12)
    assert_close(CIRKDLoss(pool=(2, 2))(student, teacher), CIRKDLoss()(*pooled), 1e-12)


@SIZES
@MASKED
def test_ickd(composed: str, size: tuple[int, ...], masked: bool) -> None:
    student, teacher = features(*size)
    target = labels(3, 2, *size) if masked else None

    def formula(x: torch.Tensor) -> torch.Tensor:
        total = 0
        for image in range(2):
            s, t = (pixels(y[image], None if target is None else target[image]) for y in (x, teacher))
            total = total + (F.normalize(s @ s.T, dim=1) - F.normalize(t @ t.T, dim=1)).square().sum()
        return total / (2 * 4)

    check(lambda x: ICKDLoss()(x, teacher, target), formula, student)


@SIZES
def test_ickd_embedding(composed: str, size: tuple[int, ...]) -> None:
    student, teacher = features(*size, channels=(3, 4))
    loss = ICKDLoss(student_channels=3, teacher_channels=4).double()
    assert [name for name, _ in loss.named_parameters()] == ["adapter.0.weight", "adapter.1.weight", "adapter.1.bias"]

    def formula(x: torch.Tensor) -> torch.Tensor:
        x = torch.einsum("oc,bcn->bon", loss.adapter[0].weight[:, :, 0], x.flatten(2))
        mean, variance = x.mean((0, 2), keepdim=True), x.var((0, 2), correction=0, keepdim=True)
        x = (x - mean) / (variance + 1e-5).sqrt()
        t = teacher.flatten(2)
        return (F.normalize(x @ x.mT, dim=2) - F.normalize(t @ t.mT, dim=2)).square().sum() / 8

    check(lambda x: loss(x, teacher), formula, student, 1e-11)


@SIZES
@MASKED
@pytest.mark.parametrize("p", [1, 2, 4])
def test_at(composed: str, size: tuple[int, ...], masked: bool, p: int) -> None:
    student, teacher = features(*size, channels=(4, 6))
    target = labels(3, 2, *size) if masked else None

    def difference(x: torch.Tensor, image: int) -> torch.Tensor:
        rows = (pixels(y[image], None if target is None else target[image]) for y in (x, teacher))
        s, t = (F.normalize(row.abs().pow(p).mean(0), dim=0) for row in rows)
        return (s - t).square()

    def mean(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([difference(x, 0), difference(x, 1)]).mean()

    def total(x: torch.Tensor) -> torch.Tensor:
        return (difference(x, 0).sum() + difference(x, 1).sum()) / 2

    check(lambda x: ATLoss(p)(x, teacher, target), mean, student)
    check(lambda x: ATLoss(p, reduction="sum")(x, teacher, target), total, student)


@SIZES
@MASKED
@pytest.mark.parametrize("channels", [(4, 4), (4, 6)], ids=["", "unequal"])
def test_sp(composed: str, size: tuple[int, ...], masked: bool, channels: tuple[int, int]) -> None:
    student, teacher = (torch.randn(5, c, *size, dtype=torch.float64) for c in channels)
    target = labels(3, 5, *size) if masked else None

    def similarity(x: torch.Tensor) -> torch.Tensor:
        if target is not None:
            x = x * (target != -100).unsqueeze(1)
        return F.normalize(x.flatten(1) @ x.flatten(1).T, dim=1)

    check(lambda x: SPLoss()(x, teacher, target), lambda x: F.mse_loss(similarity(x), similarity(teacher)), student)


def test_sp_of_one_image(composed: str) -> None:
    student, teacher = (torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=r) for r in (True, False))
    with pytest.warns(UserWarning, match="SPLoss of one image is 0: it compares the images of a batch"):
        loss = SPLoss()(student, teacher)
    loss.backward()
    assert loss < 1e-15 and student.grad.abs().max() < 1e-15


@SIZES
@MASKED
def test_ifvd(composed: str, size: tuple[int, ...], masked: bool) -> None:
    student, teacher = features(*size, channels=(4, 6))
    target = labels(3, 2, *size) if masked else torch.randint(0, 3, (2, *size))  # the fourth class is absent

    def closeness(x: torch.Tensor) -> torch.Tensor:
        values = []
        for image, c in itertools.product(range(2), range(4)):
            own = x[image][:, target[image] == c]
            prototype = own.sum(1) / (own.shape[1] + 1e-6)
            values.append(F.cosine_similarity(own, prototype.unsqueeze(1).expand_as(own), 0))
        return torch.cat(values)

    def formula(x: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(closeness(x), closeness(teacher))

    loss = IFVDLoss(num_classes=4)
    check(lambda x: loss(x, teacher, target), formula, student)
    with pytest.raises((ValueError, RuntimeError), match="target holds the label 2, want 0 to 1 or ignore_index"):
        IFVDLoss(num_classes=2)(student, teacher, target)


@SIZES
@MASKED
def test_pkd(composed: str, size: tuple[int, ...], masked: bool) -> None:
    student, teacher = (5 + torch.randn(2, 4, *size, dtype=torch.float64) for _ in range(2))
    target = labels(3, 2, *size) if masked else None

    def standardised(x: torch.Tensor) -> torch.Tensor:
        columns = [pixels(x[image], None if target is None else target[image]) for image in range(2)]
        x = torch.cat(columns, 1)
        return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-6)

    def formula(x: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(standardised(x), standardised(teacher)) / 2

    check(lambda x: PKDLoss()(x, teacher, target), formula, student)


def test_pkd_of_a_constant_channel(composed: str) -> None:
    student, teacher = (torch.randn(2, 2, 4, 4, dtype=torch.float64) for _ in range(2))
    student[:, 0], teacher[:, 1] = 3.0, -2.0
    student.requires_grad_()
    loss = PKDLoss()(student, teacher)
    loss.backward()
    # each channel standardises to 0 in one network and to a mean square of (n - 1) / n in the other
    assert_close(loss.detach(), torch.tensor(0.5 * 31 / 32, dtype=torch.float64), 1e-5)
    assert student.grad.isfinite().all()


@SIZES
@MASKED
def test_fitnet(composed: str, size: tuple[int, ...], masked: bool) -> None:
    student, teacher = features(*size, channels=(3, 5))
    target = labels(3, 2, *size) if masked else None
    loss = FitNetLoss(student_channels=3, teacher_channels=5).double()

    def formula(x: torch.Tensor) -> torch.Tensor:
        x = torch.einsum("oc,bc...->bo...", loss.adapter.weight[:, :, 0], x)
        squared = (x - teacher).square()
        return squared.mean() if target is None else squared.movedim(1, -1)[target != -100].mean()

    check(lambda x: loss(x, teacher, target), formula, student)


def pool(x: torch.Tensor) -> torch.Tensor:
    return {4: F.max_pool2d, 5: F.max_pool3d}[x.dim()](x, 2, ceil_mode=True)
