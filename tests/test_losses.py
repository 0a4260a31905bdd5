"""The losses against formulas written here, and as modules: parameters, parts, messages."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from operators import assert_close, value_and_gradient

from medkd_fast.losses import CPKDLoss, DKDLoss, DMDLoss, KDLoss


def maps(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def labels(classes: int, *size: int) -> torch.Tensor:
    target = torch.randint(0, classes, size)
    target[torch.rand(size) < 0.2] = -100
    return target


def mean_over_valid(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return value[target != -100].mean()


def kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Ordinary KL per pixel."""
    log_s, log_t = (F.log_softmax(x / temperature, 1) for x in (student, teacher))
    return temperature**2 * (log_t.exp() * (log_t - log_s)).sum(1)


def tckd(student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor, temperature: float) -> torch.Tensor:
    own = target.clamp(min=0).unsqueeze(1)
    b_s, b_t = (F.softmax(x / temperature, 1).gather(1, own).squeeze(1) for x in (student, teacher))
    return temperature**2 * (b_t * (b_t / b_s).log() + (1 - b_t) * ((1 - b_t) / (1 - b_s)).log())


def nckd(student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL among the classes that are left when the label's logit is cut out."""
    classes = student.shape[1]
    others = torch.stack([torch.tensor([c for c in range(classes) if c != y]) for y in range(classes)])
    index = others[target.clamp(min=0)].movedim(-1, 1)
    return kl(student.gather(1, index), teacher.gather(1, index), temperature)


def cosine_affinity(x: torch.Tensor, dim: int) -> torch.Tensor:
    """dim 1: [B, C, C] between channels; dim 2: [B, N, N] between pixels."""
    rows = x.flatten(2) if dim == 1 else x.flatten(2).transpose(1, 2)
    rows = rows / rows.norm(dim=2, keepdim=True)
    return rows @ rows.transpose(1, 2)


@pytest.mark.parametrize("size", [(6, 7), (3, 4, 5)], ids=["2-D", "3-D"])
def test_kd(composed: str, size: tuple[int, ...]) -> None:
    student, teacher = maps((2, 5, *size), (2, 5, *size))
    target = labels(5, 2, *size)
    loss = KDLoss(temperature=3.0)
    value, gradient = value_and_gradient(lambda x: loss(x, teacher, target), student)
    want, want_gradient = value_and_gradient(lambda x: mean_over_valid(kl(x, teacher, 3.0), target), student)
    assert_close(value, want, 1e-13)
    assert_close(gradient, want_gradient, 1e-13)
    assert loss.parts["kl"] == value and not loss.parts["kl"].requires_grad
    assert_close(loss(student, teacher), kl(student, teacher, 3.0).mean(), 1e-13)


@pytest.mark.parametrize("size", [(6, 7), (3, 4, 5)], ids=["2-D", "3-D"])
def test_dkd(composed: str, size: tuple[int, ...]) -> None:
    student, teacher = maps((2, 5, *size), (2, 5, *size))
    target = labels(5, 2, *size)
    loss = DKDLoss(alpha=0.5, beta=3.0, temperature=2.0)

    def formula(x: torch.Tensor) -> torch.Tensor:
        return mean_over_valid(0.5 * tckd(x, teacher, target, 2.0) + 3 * nckd(x, teacher, target, 2.0), target)

    value, gradient = value_and_gradient(lambda x: loss(x, teacher, target.unsqueeze(1)), student)
    want, want_gradient = value_and_gradient(formula, student)
    assert_close(value, want, 1e-12)
    assert_close(gradient, want_gradient, 1e-12)
    assert_close(loss.parts["target"], mean_over_valid(tckd(student, teacher, target, 2.0), target), 1e-12)
    assert_close(loss.parts["nontarget"], mean_over_valid(nckd(student, teacher, target, 2.0), target), 1e-12)


@pytest.mark.parametrize("size", [(6, 7), (3, 4, 5)], ids=["2-D", "3-D"])
def test_cpkd(composed: str, size: tuple[int, ...]) -> None:
    student, teacher = maps((2, 5, *size), (2, 5, *size))
    loss = CPKDLoss(channel_weight=0.3, pixel_weight=2.0)

    def part(x: torch.Tensor, dim: int) -> torch.Tensor:
        return F.mse_loss(cosine_affinity(x, dim), cosine_affinity(teacher, dim))

    value, gradient = value_and_gradient(lambda x: loss(x, teacher), student)
    want, want_gradient = value_and_gradient(lambda x: 0.3 * part(x, 1) + 2 * part(x, 2), student)
    assert_close(value, want, 1e-12)
    assert_close(gradient, want_gradient, 1e-12)
    assert_close(loss.parts["channel"], part(student, 1), 1e-12)
    assert_close(loss.parts["pixel"], part(student, 2), 1e-12)


def test_cpkd_pools(composed: str) -> None:
    student, teacher = maps((2, 5, 6, 8), (2, 5, 12, 8))
    value, gradient = value_and_gradient(lambda x: CPKDLoss(pool=2)(x, teacher), student)

    def formula(x: torch.Tensor) -> torch.Tensor:
        t = F.avg_pool2d(teacher, (2, 1))  # the larger, along the axis where it is larger
        channel = F.mse_loss(cosine_affinity(x, 1), cosine_affinity(t, 1))
        return channel + F.mse_loss(*(cosine_affinity(F.avg_pool2d(y, 2), 2) for y in (x, t)))

    want, want_gradient = value_and_gradient(formula, student)
    assert_close(value, want, 1e-12)
    assert_close(gradient, want_gradient, 1e-12)
    large, small = maps((2, 5, 12, 8), (2, 5, 6, 8))
    pooled = F.avg_pool2d(large, (2, 1))
    assert_close(CPKDLoss()(large, small), CPKDLoss()(pooled, small), 1e-12)


@pytest.mark.parametrize("size", [(6, 7), (3, 4, 5)], ids=["2-D", "3-D"])
def test_cpkd_with_unequal_channels(composed: str, size: tuple[int, ...]) -> None:
    student, teacher = maps((2, 3, *size), (2, 5, *size))
    with pytest.raises(ValueError, match=r"3 and 5 channels.*CPKDLoss\(student_channels=3, teacher_channels=5\)"):
        CPKDLoss()(student, teacher)
    want = F.mse_loss(cosine_affinity(student, 2), cosine_affinity(teacher, 2))
    assert_close(CPKDLoss(channel_weight=0)(student, teacher), want, 1e-12)

    loss = CPKDLoss(student_channels=3, teacher_channels=5).double()
    assert [tuple(p.shape) for p in loss.parameters()] == [(5, 3, 1)]
    value = loss(student.requires_grad_(), teacher)
    adapted = torch.einsum("oc,bc...->bo...", loss.adapter.weight[:, :, 0], student)
    assert_close(value, want + F.mse_loss(cosine_affinity(adapted, 1), cosine_affinity(teacher, 1)), 1e-12)
    value.backward()
    assert loss.adapter.weight.grad.abs().sum() > 0 and student.grad.abs().sum() > 0
    optimiser = torch.optim.SGD(loss.parameters(), lr=1.0)
    optimiser.step()
    assert loss(student, teacher) < value


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("size", [(8, 12), (4, 8, 4)], ids=["2-D", "3-D"])
def test_dmd(composed: str, size: tuple[int, ...], decoupled: bool) -> None:
    dims, classes = len(size), 5
    student, teacher, coarse, fine = maps(
        (2, classes, *size), (2, classes, *size), (2, 6, *(s // 4 for s in size)), (2, 3, *(s // 2 for s in size))
    )
    target = labels(classes, 2, *size)
    loss = DMDLoss(classes, [6, 3], 2.0, 0.5, temperature=3.0, spatial_dims=dims, decoupled=decoupled).double()
    mode = {2: "bilinear", 3: "trilinear"}[dims]

    def formula(x: torch.Tensor) -> torch.Tensor:
        scales = []
        for project, feature in zip(loss.projectors, (coarse, fine), strict=True):
            logits = torch.einsum("oc,bc...->bo...", project.weight.flatten(1), feature)
            logits = logits + project.bias.view(-1, *[1] * dims)
            logits = F.interpolate(logits, size=size, mode=mode, align_corners=False)
            value = nckd(logits, teacher, target, 3.0) if decoupled else kl(logits, teacher, 3.0)
            scales.append(mean_over_valid(value, target))
        value = 2 * (scales[0] + scales[1]) / 2
        return value + 0.5 * mean_over_valid(tckd(x, teacher, target, 3.0), target) if decoupled else value

    gradients = []
    for function in (lambda: loss(student, teacher, target, features=[coarse, fine]), lambda: formula(student)):
        leaves = [student.requires_grad_(), coarse.requires_grad_(), fine.requires_grad_(), *loss.parameters()]
        value = function()
        gradients.append([value, *torch.autograd.grad(value, leaves, allow_unused=not decoupled)])
    for got, want in zip(*gradients, strict=True):
        if want is None:  # MFD alone has nothing on the logits
            assert got is None and not decoupled
        else:
            assert_close(got, want, 1e-11)
    assert set(loss.parts) == ({"features", "logits"} if decoupled else {"features"})
    assert not any(part.requires_grad for part in loss.parts.values())


@pytest.mark.parametrize("dims", [2, 3])
def test_dmd_transposed_projector(composed: str, dims: int) -> None:
    loss = DMDLoss(3, [8, 6, 4], projector="transposed", spatial_dims=dims)
    features = [torch.randn(2, c, *[2 * 2**i] * dims, requires_grad=True) for i, c in enumerate([8, 6, 4])]
    for project, feature in zip(loss.projectors, features, strict=True):
        assert project(feature).shape == (2, 3, *[8] * dims)
    kinds = [[type(layer).__name__ for layer in project.modules()][1:] for project in loss.projectors]
    transposed, norm = f"ConvTranspose{dims}d", f"InstanceNorm{dims}d"
    assert kinds == [[transposed, norm, "PReLU", transposed], [transposed], []]
    assert loss.projectors[0][0].out_channels == 4
    teacher, target = torch.randn(2, 3, *[16] * dims), labels(3, 2, *[16] * dims)
    loss(torch.randn(2, 3, *[16] * dims), teacher, target, features=features).backward()
    assert all(f.grad.abs().sum() > 0 for f in features)
    with pytest.raises(ValueError, match="wants the coarsest first"):
        DMDLoss(3, [4, 6, 8], projector="transposed", spatial_dims=dims)(
            teacher, teacher, target, features=features[::-1]
        )


def test_dmd_parameters_train_move_and_are_saved(composed: str) -> None:
    loss = DMDLoss(4, [6, 3])
    assert set(loss.state_dict()) == {f"projectors.{i}.{name}" for i in (0, 1) for name in ("weight", "bias")}
    teacher, target = 3 * torch.randn(2, 4, 8, 8), labels(4, 2, 8, 8)
    features = [torch.randn(2, 6, 2, 2), torch.randn(2, 3, 4, 4)]
    optimiser = torch.optim.Adam(loss.parameters(), lr=0.05)
    values = []
    for _ in range(30):
        value = loss(teacher, teacher, target, features=features)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        values.append(value.item())
    assert values[-1] < 0.9 * values[0]
    other = DMDLoss(4, [6, 3])
    other.load_state_dict(loss.state_dict())
    assert loss(teacher, teacher, target, features=features) == other(teacher, teacher, target, features=features)
    moved = loss.to(torch.float64)
    value = moved(teacher.double(), teacher.double(), target, features=[f.double() for f in features])
    assert value.dtype == torch.float64 and math.isfinite(value.item())


def test_all_ignored_is_zero(composed: str) -> None:
    student, teacher = maps((2, 4, 6, 6), (2, 4, 6, 6))
    target = torch.full((2, 6, 6), -100)
    for loss in (KDLoss(), DKDLoss()):
        value, gradient = value_and_gradient(lambda x, loss=loss: loss(x, teacher, target), student)
        assert value == 0 and (gradient == 0).all()


def test_losses_compile(cpp: str) -> None:
    torch._dynamo.reset()
    student, teacher = (x.float() for x in maps((2, 4, 8, 8), (2, 4, 8, 8)))
    target = labels(4, 2, 8, 8)
    dmd = DMDLoss(4, [4])
    for loss, extra in (
        (DKDLoss(), {}),
        (KDLoss(), {}),
        (CPKDLoss(pool=2), {}),
        (CPKDLoss(pixel_weight=0), {}),  # one part of weight 1, which is no product
        (dmd, {"features": [student[..., ::2]]}),
    ):
        want, want_gradient = value_and_gradient(
            lambda x, loss=loss, extra=extra: loss(x, teacher, target, **extra), student
        )
        compiled = torch.compile(loss, fullgraph=True)
        value, gradient = value_and_gradient(
            lambda x, compiled=compiled, extra=extra: compiled(x, teacher, target, **extra), student
        )
        assert_close(value, want, 1e-6)
        assert_close(gradient, want_gradient, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_losses_under_autocast_dtypes(composed: str, dtype: torch.dtype) -> None:
    student, teacher = (100 * x.to(dtype) for x in maps((2, 4, 8, 8), (2, 4, 8, 8)))
    target = labels(4, 2, 8, 8)
    for loss in (DKDLoss(), KDLoss(), CPKDLoss()):
        value, gradient = value_and_gradient(lambda x, loss=loss: loss(x, teacher, target), student)
        want, want_gradient = value_and_gradient(
            lambda x, loss=loss: loss(x, teacher.double(), target), student.double()
        )
        assert value.dtype == torch.float32
        assert_close(value, want, 1e-5)
        assert_close(gradient, want_gradient, 8e-3 if dtype == torch.bfloat16 else 5e-3)


@pytest.mark.parametrize("divergence", ["mse", "kl"])
def test_cpkd_of_correlations(divergence: str) -> None:
    student, teacher = maps((1, 3, 4, 5), (1, 3, 4, 5))
    loss = CPKDLoss(relation="pearson", divergence=divergence, temperature=0.2)
    value = loss(student, teacher)
    for part, rows in (("channel", lambda x: x[0].flatten(1)), ("pixel", lambda x: x[0].flatten(1).T)):
        s, t = (torch.corrcoef(rows(x)) for x in (student, teacher))
        if divergence == "mse":
            want = (s - t).square().mean()
        else:
            want = F.kl_div((s / 0.2).log_softmax(1), (t / 0.2).softmax(1), reduction="batchmean")
        assert_close(loss.parts[part], want, 1e-12)
    assert_close(value, loss.parts["channel"] + loss.parts["pixel"], 1e-12)


def test_messages() -> None:
    x = torch.zeros(1, 3, 4, 4)
    y = torch.zeros(1, 4, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="student_channels and teacher_channels: got 3 and None, want both or neither"):
        CPKDLoss(student_channels=3)
    with pytest.raises(ValueError, match="pool: got 0, want a whole number"):
        CPKDLoss(pool=0)
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 4\) and \(1, 3, 4\), want \[B, C, \*S\]"):
        CPKDLoss()(x, x[..., 0])
    with pytest.raises(ValueError, match="feature_channels: got none"):
        DMDLoss(3, [])
    with pytest.raises(ValueError, match="projector: got 'conv', want 'conv1x1' or 'transposed'"):
        DMDLoss(3, [4], projector="conv")
    with pytest.raises(ValueError, match="num_classes: got 1, want a whole number of at least 2"):
        DMDLoss(1, [4])
    with pytest.raises(ValueError, match="spatial_dims: got 4, want 2 or 3"):
        DMDLoss(3, [4], spatial_dims=4)
    with pytest.warns(UserWarning, match="2 classes: the non-target part on the features is always 0"):
        DMDLoss(2, [4])
    loss = DMDLoss(3, [4, 2])
    with pytest.raises(ValueError, match="features: got none, want 2"):
        loss(x, x, y, features=None)
    with pytest.raises(ValueError, match="features: got 1, want 2"):
        loss(x, x, y, features=[x])
    with pytest.raises(ValueError, match=r"features\[0\]: got shape \(1, 3, 4, 4\), want \[B, 4\] and 2 spatial"):
        loss(x, x, y, features=[x, x])
