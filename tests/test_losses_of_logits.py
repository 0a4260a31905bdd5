"""The losses on logits against formulas written here, in fp64: value, gradient, parts."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from operators import assert_close, value_and_gradient

from medkd_fast.losses import BoundaryKDLoss, CWDLoss, DISTLoss, DKDLoss, DMDLoss, DSDLoss, EMKDLoss, KDLoss, SDDLoss

SIZES = pytest.mark.parametrize("size", [(6, 7), (3, 4, 5)], ids=["2-D", "3-D"])
Loss = Callable[[torch.Tensor], torch.Tensor]


def logits(*size: int, classes: int = 4) -> list[torch.Tensor]:
    return [2 * torch.randn(2, classes, *size, dtype=torch.float64) for _ in range(2)]


def labels(classes: int, *size: int) -> torch.Tensor:
    target = torch.randint(0, classes, size)
    target[torch.rand(size) < 0.2] = -100
    return target


def check(loss: Loss, formula: Loss, student: torch.Tensor, tolerance: float = 1e-12) -> None:
    upstream = torch.tensor(3.0)
    value, gradient = value_and_gradient(loss, student, upstream)
    want, want_gradient = value_and_gradient(formula, student, upstream)
    assert want.abs() > 1e-6 and want_gradient.abs().max() > 1e-9, "the case is empty"
    assert_close(value, want, tolerance, "value")
    assert_close(gradient, want_gradient, tolerance, "gradient")


def bernoulli_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    p_s, p_t = torch.sigmoid(student / temperature), torch.sigmoid(teacher / temperature)
    return p_t * (p_t / p_s).log() + (1 - p_t) * ((1 - p_t) / (1 - p_s)).log()


@SIZES
def test_sigmoid_heads(composed: str, size: tuple[int, ...]) -> None:
    student, teacher = logits(*size)
    shared, own = labels(2, 2, *size), labels(2, 2, 4, *size)
    one_channel = KDLoss(temperature=3.0, activation="sigmoid")(student[:, :1], teacher[:, :1])
    assert_close(one_channel, 9 * bernoulli_kl(student[:, :1], teacher[:, :1], 3.0).mean(), 1e-12)
    for target, counts in ((own, own != -100), (shared, (shared != -100).unsqueeze(1).expand_as(own))):

        def formula(x: torch.Tensor, counts: torch.Tensor = counts) -> torch.Tensor:
            return 9 * bernoulli_kl(x, teacher, 3.0)[counts].mean()

        kd = KDLoss(temperature=3.0, activation="sigmoid")
        check(lambda x, t=target, kd=kd: kd(x, teacher, t), formula, student)
        dkd = DKDLoss(alpha=2.0, temperature=3.0, activation="sigmoid")
        check(lambda x, t=target, dkd=dkd: dkd(x, teacher, t), lambda x, f=formula: 2 * f(x), student)
        assert dkd.parts["nontarget"] == 0
    cwd = CWDLoss(temperature=3.0, activation="sigmoid")
    check(lambda x: cwd(x, teacher), lambda x: 9 * bernoulli_kl(x, teacher, 3.0).sum() / 8, student)
    counts = (shared != -100).unsqueeze(1)
    check(lambda x: cwd(x, teacher, shared), lambda x: 9 * (bernoulli_kl(x, teacher, 3.0) * counts).sum() / 8, student)
    own[:, 0] = -100  # two of eight maps leave the mean
    counts = own != -100
    check(lambda x: cwd(x, teacher, own), lambda x: 9 * (bernoulli_kl(x, teacher, 3.0) * counts).sum() / 6, student)


@pytest.mark.parametrize(
    "loss",
    [
        KDLoss(),
        DKDLoss(),
        DISTLoss(),
        SDDLoss(base="kd"),
        BoundaryKDLoss(),
        EMKDLoss(2),
    ],
)
def test_one_class_is_refused(loss: Loss) -> None:
    student, teacher = logits(6, 7, classes=1)
    extra = ([student], [teacher]) if isinstance(loss, EMKDLoss) else ()
    with pytest.raises(ValueError, match=r"got 1 class, want at least 2; .*activation=\"sigmoid\""):
        loss(student, teacher, torch.zeros(2, 6, 7, dtype=torch.long), *extra)


@SIZES
def test_cwd(composed: str, size: tuple[int, ...]) -> None:
    student, teacher = logits(*size)
    target = labels(4, 2, *size)

    def formula(x: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        total = 0
        for image, channel in itertools.product(range(2), range(4)):
            rows = [y[image, channel] for y in (x, teacher)]
            s, t = (row.flatten() if target is None else row[target[image] != -100] for row in rows)
            total = total + F.kl_div((s / 3).log_softmax(0), (t / 3).softmax(0), reduction="sum")
        return 9 * total / 8

    loss = CWDLoss(temperature=3.0)
    check(lambda x: loss(x, teacher), formula, student)
    check(lambda x: loss(x, teacher, target), lambda x: formula(x, target), student)
    assert_close(loss.parts["kl"], formula(student, target), 1e-12)


@SIZES
def test_dist(composed: str, size: tuple[int, ...]) -> None:
    student, teacher = logits(*size)
    target = labels(4, 2, *size)

    def correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
        return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)).mean()

    def parts(x: torch.Tensor, target: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        s, t = ((y / 3).softmax(1).movedim(1, -1).flatten(0, -2) for y in (x, teacher))
        if target is not None:
            s, t = (p[target.flatten() != -100] for p in (s, t))
        return 1 - correlation(s, t), 1 - correlation(s.T, t.T)

    loss = DISTLoss(beta=0.5, gamma=2.0, temperature=3.0)
    for labels_or_none in (None, target):

        def formula(x: torch.Tensor, y: torch.Tensor | None = labels_or_none) -> torch.Tensor:
            inter, intra = parts(x, y)
            return 9 * (0.5 * inter + 2 * intra)

        check(lambda x, y=labels_or_none: loss(x, teacher, y), formula, student, 1e-10)
    inter, intra = parts(student, target)
    assert_close(loss.parts["inter"], inter, 1e-12)
    assert_close(loss.parts["intra"], intra, 1e-12)


@pytest.mark.parametrize("dense", [False, True], ids=["image label", "dense label"])
@pytest.mark.parametrize("base", ["dkd", "kd"])
@pytest.mark.parametrize("dims", [2, 3])
def test_sdd(composed: str, dims: int, base: str, dense: bool) -> None:
    size = (8, 4, 12)[:dims]
    student, teacher = logits(*size)
    target = labels(4, 2, *size) if dense else torch.tensor([1, 3])
    if dense:
        target[1, 0:2, 0:1] = -100  # a whole region of the finest scale
    weights = []

    def formula(x: torch.Tensor) -> torch.Tensor:
        weights.clear()
        total, count = 0, 0
        for image, scale in itertools.product(range(2), (1, 2, 4)):
            for place in itertools.product(range(scale), repeat=dims):
                box = tuple(slice(i * n // scale, (i + 1) * n // scale) for i, n in zip(place, size, strict=True))
                inside = target[image][box] != -100 if dense else torch.ones_like(x[image, 0][box], dtype=torch.bool)
                if not inside.any():
                    continue
                label = target[image][box][inside].mode().values if dense else target[image]
                s, t = (y[image][(slice(None), *box)][:, inside].mean(1) for y in (x, teacher))
                right = t.argmax() == label
                if scale == 1:
                    verdict = right
                p_s, p_t = (s / 4).softmax(0), (t / 4).softmax(0)
                if base == "kd":
                    value = (p_t * (p_t / p_s).log()).sum()
                else:
                    others = torch.arange(4) != label
                    b_s, b_t, n_s, n_t = p_s[label], p_t[label], p_s[others], p_t[others]
                    q_s, q_t = n_s / n_s.sum(), n_t / n_t.sum()
                    value = b_t * (b_t / b_s).log() + (1 - b_t) * ((1 - b_t) / (1 - b_s)).log()
                    value = value + 8 * (q_t * (q_t / q_s).log()).sum()
                weights.append(1 if right == verdict else 2)
                total, count = total + 16 * value * weights[-1], count + 1
        return total / count

    loss = SDDLoss(base=base)
    check(lambda x: loss(x, teacher, target), formula, student)
    assert set(weights) == {1, 2}, "the case needs regions of both weights"
    assert set(loss.parts) == ({"kl"} if base == "kd" else {"target", "nontarget"})


@SIZES
def test_boundary_kd(composed: str, size: tuple[int, ...]) -> None:
    student, teacher = logits(*size, classes=3)
    target = torch.zeros(2, *size, dtype=torch.long)
    target[:, :2, :2], target[1, -1, -1] = 1, 2
    target[0, 1, 2], target[0, -1, -2:] = -100, -100  # beside the boundary, and alone in class 0

    def edge() -> torch.Tensor:
        found = torch.zeros_like(target, dtype=torch.bool)
        for place in itertools.product(*(range(n) for n in target.shape)):
            for step in itertools.product((-1, 0, 1), repeat=len(size)):
                other = (place[0], *(a + b for a, b in zip(place[1:], step, strict=True)))
                if all(0 <= a < n for a, n in zip(other, target.shape, strict=True)):
                    pair = {target[place].item(), target[other].item()}
                    found[place] |= len(pair) == 2 and -100 not in pair
        return found

    def formula(x: torch.Tensor) -> torch.Tensor:
        p_s, p_t = (x / 2).softmax(1), (teacher / 2).softmax(1)
        return 4 * (p_t * (p_t / p_s).log()).sum(1)[edge()].mean()

    assert 0 < edge().float().mean() < 0.7
    loss = BoundaryKDLoss(temperature=2.0)
    check(lambda x: loss(x, teacher, target.unsqueeze(1)), formula, student)
    value, gradient = value_and_gradient(lambda x: loss(x, teacher, torch.zeros_like(target)), student)
    assert value == 0 and (gradient == 0).all()


@SIZES
def test_dmd_enhanced_spatial(composed: str, size: tuple[int, ...]) -> None:
    student, teacher = logits(*size)
    target = labels(4, 2, *size)
    loss = DMDLoss(4, [4], feature_weight=0.0, spatial_dims=len(size), logit_term="enhanced_spatial")

    def formula(x: torch.Tensor) -> torch.Tensor:
        total = 0
        for image, channel in itertools.product(range(2), range(4)):
            counts = target[image] != -100
            s, t = ((y[image, channel][counts] / 4).softmax(0) for y in (x, teacher))
            own = (target[image][counts] == channel).double()
            total = total - (((t + own) ** 1.2 - own) * s.log()).sum()
        return total / 8

    check(lambda x: loss(x, teacher, target, features=[x]), formula, student)
    assert_close(loss.parts["logits"], formula(student), 1e-12)


def test_dmd_enhanced_spatial_keeps_small_probabilities() -> None:
    # a probability of 1e-6: in fp32 1 + p keeps one digit of it
    size = (1000, 1000)
    teacher, target = torch.zeros(1, 2, *size), torch.zeros(1, *size, dtype=torch.long)
    with pytest.warns(UserWarning, match="2 classes"):
        loss = DMDLoss(2, [2], feature_weight=0.0, logit_term="enhanced_spatial")
    value = loss(torch.zeros(1, 2, *size), teacher, target, features=[teacher])
    p = torch.tensor(1e-6, dtype=torch.float64)
    want = -1e6 * p.log() * (((1 + p) ** 1.2 - 1) + p**1.2) / 2
    assert_close(value, want, 1e-5)


@SIZES
@pytest.mark.parametrize("pool", [None, 2])
def test_dsd(composed: str, size: tuple[int, ...], pool: int | None) -> None:
    student, teacher = logits(*size)
    layers = [torch.randn(2, c, *size, dtype=torch.float64) for c in (3, 5, 3, 6, 2, 3)]
    average = {2: F.avg_pool2d, 3: F.avg_pool3d}[len(size)]

    def similarity(x: torch.Tensor) -> torch.Tensor:
        x = x if pool is None else average(x, pool, ceil_mode=True, count_include_pad=False)
        p = (x.flatten(2) / 4).softmax(2)
        return p @ p.mT

    def residuals(features: list[torch.Tensor]) -> list[torch.Tensor]:
        maps = [F.normalize(f.square().mean(1).flatten(1)) for f in features]
        return [F.normalize(b - a) for a, b in itertools.combinations(maps, 2)]

    def parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        of_s, of_t = residuals([x, *layers[:3]]), residuals([teacher, *layers[3:]])
        pixel = sum((a - b).square().mean() for a, b in zip(of_s, of_t, strict=True)) / 6
        return (similarity(x) - similarity(teacher)).square().mean(), pixel

    loss = DSDLoss(category_weight=10.0, pixel_weight=0.5, pool=pool)

    def call(x: torch.Tensor) -> torch.Tensor:
        return loss(x, teacher, student_features=[x, *layers[:3]], teacher_features=[teacher, *layers[3:]])

    check(call, lambda x: 10 * parts(x)[0] + 0.5 * parts(x)[1], student)
    for part, want in zip(("category", "pixel"), parts(student), strict=True):
        assert_close(loss.parts[part], want, 1e-12)


def region_cosines(x: torch.Tensor, target: torch.Tensor, classes: int) -> dict[tuple[int, int], torch.Tensor]:
    """Of one image [C, *S]: the cosine between the means of every two classes that are there."""
    means = {c: x[:, target == c].mean(1) for c in range(classes) if (target == c).any()}
    return {pair: F.cosine_similarity(means[pair[0]], means[pair[1]], 0) for pair in itertools.combinations(means, 2)}


@pytest.mark.parametrize("classes", [2, 4])
@SIZES
def test_emkd(composed: str, size: tuple[int, ...], classes: int) -> None:
    student, teacher = logits(*size, classes=classes)
    low_s, low_t = (torch.randn(2, c, *size, dtype=torch.float64) for c in (3, 5))
    target = labels(classes, 2, *size)
    if classes == 4:
        target[0][target[0] == 2] = 1  # a class that is absent in one image

    def attention(x: torch.Tensor) -> torch.Tensor:
        x = x.pow(4).mean(1) * (target != -100)
        return F.normalize(x.flatten(1))

    def parts(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        p_s, p_t = (x / 4).softmax(1), (teacher / 4).softmax(1)
        prediction = 16 * (p_t * (p_t / p_s).log()).sum(1)[target != -100].mean()
        importance, region = 0, 0
        for s, t in ((x, teacher), (low_s, low_t)):
            importance = importance + (attention(s) - attention(t)).square().sum(1).mean()
            for image in range(2):
                of_s, of_t = (region_cosines(y[image], target[image], classes) for y in (s, t))
                region = region + torch.stack([(of_s[k] - of_t[k]).square() for k in of_s]).mean() / 2
        return prediction, importance, region

    loss = EMKDLoss(classes)

    def call(x: torch.Tensor) -> torch.Tensor:
        return loss(x, teacher, target, student_features=[x, low_s], teacher_features=[teacher, low_t])

    check(call, lambda x: torch.stack(parts(x)) @ torch.tensor([0.1, 0.9, 0.9], dtype=torch.float64), student)
    for part, want in zip(("prediction", "importance", "region"), parts(student), strict=True):
        assert_close(loss.parts[part], want, 1e-12)
