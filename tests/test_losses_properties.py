"""What every loss does: dimensions, ignored pixels, half precision, absent classes, other sizes and channels, compilation."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from operators import assert_close, value_and_gradient
from torch import nn

from medkd_fast import losses
from medkd_fast.losses.catalogue import LOSSES

CLASSES = 4


def layers(x: torch.Tensor) -> list[torch.Tensor]:
    """Three maps that all depend on x: itself and two of fewer channels."""
    return [x, x[:, :2], x[:, 1:]]


class Case(NamedTuple):
    """How a loss is made for 4 classes or channels, and what it takes beside student, teacher and target."""

    make: Callable[[int], nn.Module]  # of the number of spatial dimensions
    extra: Callable[[torch.Tensor, torch.Tensor], dict] = lambda student, teacher: {}
    resizes: str = "teacher"  # to the size of the "teacher" (linear), or to a "common" one (average)
    adapts: bool = False  # takes student_channels and teacher_channels


def layered(student: torch.Tensor, teacher: torch.Tensor) -> dict:
    return {"student_features": layers(student), "teacher_features": layers(teacher)}


CASES = {
    "cpkd": Case(lambda dims: losses.CPKDLoss(pool=2), resizes="common", adapts=True),
    "cpkd kl": Case(lambda dims: losses.CPKDLoss(relation="pearson", divergence="kl"), resizes="common"),
    "dmd": Case(lambda dims: losses.DMDLoss(4, [4], spatial_dims=dims), lambda s, t: {"features": [s]}),
    "dmd enhanced": Case(
        lambda dims: losses.DMDLoss(4, [4], spatial_dims=dims, logit_term="enhanced_spatial"),
        lambda s, t: {"features": [s]},
    ),
    "kd": Case(lambda dims: losses.KDLoss()),
    "kd sigmoid": Case(lambda dims: losses.KDLoss(activation="sigmoid")),
    "cwd": Case(lambda dims: losses.CWDLoss(), adapts=True),
    "cwd sigmoid": Case(lambda dims: losses.CWDLoss(activation="sigmoid")),
    "emkd": Case(lambda dims: losses.EMKDLoss(4), layered, resizes=""),
    "dsd": Case(lambda dims: losses.DSDLoss(pixel_weight=100.0), layered, resizes="common"),
    "dkd": Case(lambda dims: losses.DKDLoss()),
    "dkd sigmoid": Case(lambda dims: losses.DKDLoss(activation="sigmoid")),
    "dist": Case(lambda dims: losses.DISTLoss()),
    "sdd": Case(lambda dims: losses.SDDLoss(), resizes=""),
    "sdd kd": Case(lambda dims: losses.SDDLoss(base="kd"), resizes=""),
    "boundary_kd": Case(lambda dims: losses.BoundaryKDLoss()),
    "fitnet": Case(lambda dims: losses.FitNetLoss(), adapts=True),
    "at": Case(lambda dims: losses.ATLoss(), resizes="common"),
    "at of power 4": Case(lambda dims: losses.ATLoss(4, reduction="sum"), resizes="common"),
    "skd": Case(lambda dims: losses.SKDLoss(), resizes="common"),
    "skd detached": Case(lambda dims: losses.SKDLoss(detach_norm=True), resizes="common"),
    "sp": Case(lambda dims: losses.SPLoss(), resizes=""),
    "ifvd": Case(lambda dims: losses.IFVDLoss(4), resizes="common"),
    "ickd": Case(lambda dims: losses.ICKDLoss(), resizes="common", adapts=True),
    "cirkd": Case(lambda dims: losses.CIRKDLoss(), resizes="common"),
    "pkd": Case(lambda dims: losses.PKDLoss(), adapts=True),
}
EVERY = pytest.mark.parametrize("name", CASES)
SIZE = (8, 6)


def made(name: str, dims: int = 2) -> nn.Module:
    torch.manual_seed(1)
    return CASES[name].make(dims).double()


def call(name: str, loss: nn.Module, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor | None):
    return loss(student, teacher, target, **CASES[name].extra(student, teacher))


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    student, teacher = ((2 * torch.randn(2, CLASSES, *SIZE, dtype=torch.float64)).to(dtype) for _ in range(2))
    target = torch.zeros(2, *SIZE, dtype=torch.long)
    target[:, 1:4, 1:4], target[:, 4:, 2:], target[1, :2, 4:] = 1, 2, 3  # class 3 is absent in the first image
    return student, teacher, target


def run(name: str, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor | None, dims: int = 2):
    loss = made(name, dims)
    return value_and_gradient(lambda x: call(name, loss, x, teacher, target), student)


def test_every_loss_has_a_case() -> None:
    assert {name.split()[0] for name in CASES} == set(LOSSES)
    assert {type(CASES[name].make(2)) for name in LOSSES} == set(LOSSES.values())


@EVERY
def test_a_volume_of_one_slice_is_its_image(composed: str, name: str) -> None:
    student, teacher, target = inputs()
    want, want_gradient = run(name, student, teacher, target)
    value, gradient = run(name, student.unsqueeze(2), teacher.unsqueeze(2), target.unsqueeze(1), dims=3)
    assert_close(value, want, 1e-10)
    assert_close(gradient.squeeze(2), want_gradient, 1e-10)


@EVERY
def test_ignored_pixels_do_not_matter(composed: str, name: str) -> None:
    student, teacher, target = inputs()
    target[0, 2:4, :3], target[1, -1, -1] = -100, -100
    ignored = (target == -100).unsqueeze(1).expand_as(student)
    want, want_gradient = run(name, student, teacher, target)
    assert want.isfinite() and want > 0 and (want_gradient[ignored] == 0).all()
    assert want_gradient.abs().max() > 0
    for filling in (1e4, float("nan")):
        student[ignored], teacher[ignored] = filling, -filling
        value, gradient = run(name, student, teacher, target.unsqueeze(1).to(torch.int16))
        if name.startswith("dmd"):  # its features go through an interpolation, which has no mask
            assert filling != 1e4 or value == want
            continue
        assert_close(value, want, 1e-12)
        assert_close(gradient, want_gradient, 1e-12)


#: Losses of classes that exclude each other: they take one label a pixel.
ONE_LABEL = ("dmd", "emkd", "ifvd", "sdd", "boundary_kd", "dist")


@EVERY
def test_labels_of_classes_that_do_not_exclude_each_other(composed: str, name: str) -> None:
    student, teacher, target = inputs()
    heads = torch.randint(0, 2, (2, CLASSES, *SIZE))
    heads[0, :, 2:4, :3] = -100
    if name.split()[0] in ONE_LABEL or name in ("kd", "dkd"):
        with pytest.raises(
            ValueError, match=r"got shape \(2, 4, 8, 6\), want one label a pixel.*argmax.*activation=\"sigmoid\""
        ):
            run(name, student, teacher, heads)
        return
    target[0, 2:4, :3] = -100
    want, want_gradient = run(name, student, teacher, target)
    if "sigmoid" not in name:
        heads[1, 0, 4] = -100  # of one class alone: the pixel counts
        heads = heads[:, :3]  # features have other channels
    value, gradient = run(name, student, teacher, heads.to(torch.int16))
    assert_close(value, want, 1e-12)
    assert_close(gradient, want_gradient, 1e-12)
    with pytest.raises(TypeError, match="target: got torch.float64, want integer labels"):
        run(name, student, teacher, heads.double())


@EVERY
@pytest.mark.parametrize("make", [lambda x: [x], lambda x: (x, x), lambda x: {"out": x}], ids=["list", "tuple", "dict"])
def test_several_outputs_in_place_of_one_are_told(name: str, make: Callable) -> None:
    student, teacher, target = inputs()
    extra = CASES[name].extra(student, teacher)
    key = "'out'" if isinstance(make(0), dict) else 0
    for whose, pair in (("student", (make(student), teacher)), ("teacher", (student, make(teacher)))):
        got = f"{whose}: got {type(make(0)).__name__}"
        with pytest.raises(TypeError, match=rf"{got}, .*\(deep supervision\) take one, such as {whose}\[{key}\]"):
            made(name)(*pair, target, **extra)


@EVERY
def test_a_teacher_under_inference_mode(composed: str, name: str) -> None:
    student, teacher, target = inputs(torch.float32)
    loss = made(name).float()
    want, want_gradient = value_and_gradient(lambda x: call(name, loss, x, teacher, target), student)
    with torch.inference_mode():
        teacher, target = teacher.clone(), target.clone()
    value, gradient = value_and_gradient(lambda x: call(name, loss, x, teacher, target), student)
    assert_close(value, want, 0)
    assert_close(gradient, want_gradient, 0)


@EVERY
def test_without_a_valid_pixel_it_is_zero(composed: str, name: str) -> None:
    student, teacher, target = inputs()
    value, gradient = run(name, student, teacher, torch.full_like(target, -100))
    assert value == 0 and (gradient == 0).all()


@pytest.mark.parametrize("make", [losses.CPKDLoss, losses.PKDLoss, losses.ICKDLoss])
def test_an_adapter_is_compiled_for_maps_of_any_size(cpp: str, make: Callable[..., nn.Module]) -> None:
    torch._dynamo.reset()
    loss = make(student_channels=4, teacher_channels=6)
    compiled = torch.compile(lambda x, y: loss(x, y), fullgraph=True, dynamic=True)
    for size in ((8, 8), (6, 10)):
        student, teacher = torch.randn(2, 4, *size), torch.randn(2, 6, *size)
        want, want_gradient = value_and_gradient(lambda x, y=teacher: loss(x, y), student)
        value, gradient = value_and_gradient(lambda x, y=teacher: compiled(x, y), student)
        assert_close(value, want, 1e-5)
        assert_close(gradient, want_gradient, 1e-4)


@EVERY
def test_a_batch_without_images_is_zero(composed: str, name: str) -> None:
    student, teacher, target = (x[:0] for x in inputs())
    value, gradient = run(name, student, teacher, target)
    assert value == 0 and gradient.shape == student.shape


WITH_LABELS = {
    "ifvd": lambda x, y, target: losses.IFVDLoss(160)(x, y, target),
    "emkd": lambda x, y, target: losses.EMKDLoss(160)(x, y, target, [x], [y]),
    "dkd": lambda x, y, target: losses.DKDLoss()(x, y, target),
    "dist": lambda x, y, target: losses.DISTLoss()(x, y, target),
    "sdd": lambda x, y, target: losses.SDDLoss()(x, y, target),
    "boundary_kd": lambda x, y, target: losses.BoundaryKDLoss()(x, y, target),
    "skd": lambda x, y, target: losses.SKDLoss()(x, y, target),
    "dmd": lambda x, y, target: losses.DMDLoss(160, [160], logit_term="enhanced_spatial")(x, y, target, features=[x]),
}


@pytest.mark.parametrize("name", WITH_LABELS)
def test_unsigned_labels_are_not_taken_for_negative_ones(composed: str, name: str) -> None:
    """As an unsigned type of 8 bits -100, the default of ignore_index, is 156."""
    (x, y), target = torch.randn(2, 1, 160, 4, 4), torch.tensor([3, 156]).repeat(1, 4, 2)

    def value(target: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)  # for what has weights of its own
        return WITH_LABELS[name](x, y, target)

    assert torch.equal(value(target.to(torch.uint8)), value(target))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(composed: str, name: str, dtype: torch.dtype) -> None:
    student, teacher, target = inputs()
    student, teacher = ((200 * torch.rand_like(x) - 100).to(dtype) for x in (student, teacher))
    loss, wide = made(name).float(), made(name)
    upstream = torch.tensor(256.0)  # as a gradient scaler does
    value, gradient = value_and_gradient(lambda x: call(name, loss, x, teacher, target), student, upstream)
    want, want_gradient = value_and_gradient(
        lambda x: call(name, wide, x, teacher.double(), target), student.double(), upstream
    )
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert_close(value, want, 1e-4)
    # rounding to the type; an fp16 gradient is at least 2^-24 apart
    floor = 2.0**-24 if dtype == torch.float16 else 0.0
    difference = (gradient.double() - want_gradient).norm()
    assert (
        difference
        <= (8e-3 if dtype == torch.bfloat16 else 2e-3) * want_gradient.norm() + floor * student.numel() ** 0.5
    )


@EVERY
@pytest.mark.parametrize(
    ("own", "of_teacher"), [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)], ids=str
)
def test_networks_of_unlike_types(composed: str, name: str, own: torch.dtype, of_teacher: torch.dtype) -> None:
    student, teacher, target = inputs()
    student, teacher = student.to(own), teacher.to(of_teacher)
    loss = made(name).float()
    value, gradient = value_and_gradient(lambda x: call(name, loss, x, teacher, target), student)
    want, want_gradient = run(name, student.double(), teacher.double(), target)
    assert gradient.dtype == own
    assert_close(value, want, 1e-4)
    assert (gradient.double() - want_gradient).norm() <= (
        8e-3 if own == torch.bfloat16 else 1e-4
    ) * want_gradient.norm()


@EVERY
def test_a_smaller_student(composed: str, name: str) -> None:
    _, teacher, target = inputs()
    student = torch.randn(2, CLASSES, 4, 6, dtype=torch.float64)
    case, loss = CASES[name], made(name)
    value, gradient = value_and_gradient(lambda x: call(name, loss, x, teacher, target), student)
    assert value.isfinite() and gradient.abs().max() > 0

    def up(x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, size=SIZE, mode="bilinear", align_corners=False)

    if case.resizes == "teacher":
        extra = case.extra(student, teacher)  # dmd: a feature stays at its size
        want, want_gradient = value_and_gradient(lambda x: loss(up(x), teacher, target, **extra), student)
        if not extra:
            assert_close(gradient, want_gradient, 1e-10)
        assert_close(value, want, 1e-10)
    elif case.resizes == "common":
        small = target[:, ::2]
        want, want_gradient = value_and_gradient(
            lambda x: call(name, loss, x, F.avg_pool2d(teacher, (2, 1)), small), student
        )
        assert_close(gradient, want_gradient, 1e-10)
        assert_close(value, want, 1e-10)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.resizes])
def test_a_larger_student(cpp: str, name: str) -> None:
    _, teacher, target = inputs()
    student, case, loss = torch.randn(2, CLASSES, 2 * SIZE[0], SIZE[1], dtype=torch.float64), CASES[name], made(name)
    if case.resizes == "teacher" and name.startswith(("kd", "dkd", "boundary", "dmd")) and name != "dmd enhanced":
        with pytest.raises(ValueError, match=r"student: got spatial shape \(16, 6\), want at most the teacher's"):
            call(name, loss, student, teacher, target)
    elif name != "dmd enhanced":
        want = call(name, loss, F.avg_pool2d(student, (2, 1)), teacher, target)
        assert_close(call(name, loss, student, teacher, target), want, 1e-10)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.adapts])
def test_other_channels(composed: str, name: str) -> None:
    _, teacher, target = inputs()
    student = torch.randn(2, 3, *SIZE, dtype=torch.float64, requires_grad=True)
    kind = type(CASES[name].make(2))
    with pytest.raises(
        ValueError, match=rf"3 and 4 channels.*{kind.__name__}\(student_channels=3, teacher_channels=4\)"
    ):
        kind()(student, teacher, target)
    with pytest.raises(ValueError, match="student_channels and teacher_channels: got 3 and None, want both or neither"):
        kind(student_channels=3)
    loss = kind(student_channels=3, teacher_channels=4).double()
    value = loss(student, teacher, target)
    value.backward()
    weight = next(loss.parameters())
    assert weight.shape == (4, 3, 1) and weight.grad.abs().max() > 0 and student.grad.abs().max() > 0
    torch.optim.SGD(loss.parameters(), lr=1e-3).step()
    assert loss(student, teacher, target) < value


@EVERY
def test_it_compiles_whole(cpp: str, name: str) -> None:
    torch._dynamo.reset()
    student, teacher, target = (x.float() if x.is_floating_point() else x for x in inputs())
    loss = made(name).float()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want, want_gradient = value_and_gradient(lambda x: call(name, loss, x, teacher, target), student)
    value, gradient = value_and_gradient(lambda x: call(name, compiled, x, teacher, target), student)
    assert_close(value, want, 1e-5)
    assert_close(gradient, want_gradient, 1e-5)


@EVERY
def test_under_autocast(cpp: str, name: str) -> None:
    # products in bfloat16 would be off by 1e-2
    student, teacher, target = (x.float() if x.is_floating_point() else x for x in inputs())
    loss = made(name).float()
    if name.startswith("dmd"):
        loss = losses.DMDLoss(4, [4], feature_weight=0.0, logit_term=loss.logit_term)  # a projector is the network's
    want, want_gradient = value_and_gradient(lambda x: call(name, loss, x, teacher, target), student)

    def autocast(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return call(name, loss, x, teacher, target)

    value, gradient = value_and_gradient(autocast, student)
    assert_close(value, want, 1e-6)
    assert_close(gradient, want_gradient, 1e-6)


@EVERY
def test_the_parts_are_for_logs(composed: str, name: str) -> None:
    student, teacher, target = inputs()
    loss = made(name)
    assert loss.parts == {} and "parts" not in repr(loss)
    call(name, loss, student.requires_grad_(), teacher, target)
    assert loss.parts and not any(part.requires_grad or part.dim() for part in loss.parts.values())
    with pytest.raises(ValueError, match="teacher requires grad, and the loss gives it none"):
        call(name, loss, student, teacher.requires_grad_(), target)


def test_the_catalogue() -> None:
    entries = losses.available()
    assert [entry.name for entry in entries] == list(LOSSES)
    assert {entry.loss.__name__ for entry in entries} == {name for name in losses.__all__ if name.endswith("Loss")}
    for entry in entries:
        assert entry.summary.endswith(".") and len(entry.summary) > 30
        assert ":" in entry.source and (entry.name == "boundary_kd" or re.search(r"\b(20[0-2]\d)\b", entry.source))
    loss = losses.build("cwd", temperature=2.0)
    assert isinstance(loss, losses.CWDLoss) and loss.temperature == 2.0
    assert repr(loss).startswith("CWDLoss(temperature=2.0, ignore_index=-100")
    with pytest.raises(ValueError, match="name: got 'cvd', want one of at, boundary_kd, cirkd"):
        losses.build("cvd")
    with pytest.raises(TypeError, match=r"build\('cwd'\): .*unexpected keyword argument 'tau'; see help"):
        losses.build("cwd", tau=4)


# by the type of a setting, then by its name
WRONG = {
    "float": ("hot", None, True, math.nan, math.inf),
    "int": ("hot", 1.5, True),
    "int | Sequence[int]": ("hot", 1.5, True, [2, 0], [1, 1.5], []),
    "int | Sequence[int] | None": ("hot", 1.5, True, [2, 0], [1, 1.5], []),
    "str": ("cosin", 1, None),
    "bool": ("hot", 2, None),
    "Sequence[int]": ("hot", 1, [1, 1.5], [1, 0], [2], []),
    "temperature": (0, -1.0),
    "p": (0.5,),
    "pool": (0,),
    "radius": (0,),
    "num_classes": (0,),
    "spatial_dims": (0, 4),
}
# what a layer has, of which torch makes convolutions, and torch's groups
NOT_CHECKED = ("student_channels", "teacher_channels", "feature_channels", "process_group")


@pytest.mark.parametrize("name", LOSSES)
def test_wrong_settings_are_told_when_the_loss_is_made(name: str) -> None:
    needed = {"num_classes": 3, "feature_channels": [4]}
    parameters = inspect.signature(LOSSES[name]).parameters
    needed = {key: value for key, value in needed.items() if key in parameters}
    losses.build(name, **needed)
    for key, parameter in parameters.items():
        if key not in NOT_CHECKED:
            for value in (*WRONG[parameter.annotation], *WRONG.get(key, ())):
                with pytest.raises(ValueError, match=f"^{key}: got {re.escape(repr(value))}, want "):
                    losses.build(name, **{**needed, key: value})


def test_messages() -> None:
    x, y = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long)
    for make, message in (
        (lambda: losses.KDLoss(activation="relu"), "activation: got 'relu', want 'softmax', or 'sigmoid'"),
        (lambda: losses.SKDLoss(pool=0), "pool: got 0, want a whole number"),
        (
            lambda: losses.SKDLoss(pool=1.5),
            "pool: got 1.5, want a whole number of at least 1, one for each axis, or None",
        ),
        (lambda: losses.KDLoss(temperature="hot"), "temperature: got 'hot', want a finite number"),
        (lambda: losses.DISTLoss(temperature=0), "temperature: got 0, want a number above 0"),
        (lambda: losses.CPKDLoss(relation="cosin"), "relation: got 'cosin', want one of cosine, pearson, gram"),
        (lambda: losses.CPKDLoss(relation="row"), "relation: got 'row', want one of cosine, pearson, gram"),
        (lambda: losses.CPKDLoss(divergence="l1"), "divergence: got 'l1', want one of mse, kl"),
        (
            lambda: losses.CPKDLoss(pixel_weight=0, relation="softmax", divergence="kl"),
            "divergence: got 'kl' with relation='softmax', want 'mse'",
        ),
        (lambda: losses.ATLoss(p=0.5), "p: got 0.5, want a finite number of at least 1"),
        (lambda: losses.ATLoss(reduction="none"), "reduction: got 'none', want 'mean' or 'sum'"),
        (lambda: losses.IFVDLoss(0), "num_classes: got 0, want a whole number of at least 1"),
        (lambda: losses.EMKDLoss(1), "num_classes: got 1, want a whole number of at least 2"),
        (lambda: losses.SDDLoss(base="ce"), "base: got 'ce', want 'dkd' or 'kd'"),
        (lambda: losses.SDDLoss(scales=(2, 4)), r"scales: got \(2, 4\), want whole numbers, the first 1"),
        (lambda: losses.BoundaryKDLoss(radius=0), "radius: got 0, want a whole number"),
        (lambda: losses.DMDLoss(3, [4], logit_term="kl"), "logit_term: got 'kl', want 'target' or 'enhanced_spatial'"),
        (lambda: losses.CWDLoss()(x, x[:1]), r"\(2, 3, 4, 4\) and \(1, 3, 4, 4\), want \[B, C, \*S\] with the same B"),
        (lambda: losses.ATLoss()(x, x, y[0]), r"target: got shape \(4, 4\), want \[B, \*S\]"),
        (lambda: losses.DSDLoss()(x, x, student_features=[x], teacher_features=[x]), "got 1 and 1 layers.*at least 2"),
        (lambda: losses.EMKDLoss(3)(x, x, y, [x], []), "got 1 and 0 layers, want the same number"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    for loss in (losses.KDLoss(activation="sigmoid"), losses.DKDLoss(activation="sigmoid")):
        with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) and \(1, 3, 4, 4\), want \[B, C, \*S\] with the same B"):
            loss(x, x[:1], y)
        with pytest.raises(ValueError, match="got 3 and 2 classes, want the same classes"):
            loss(x, x[:, :2], y)
        for target in (y.expand(2, 2, 2, 4, 4)[0], y[..., :3], y[:1]):
            with pytest.raises(
                ValueError, match=rf"{re.escape(str(tuple(target.shape)))}, want \(2, 3, 4, 4\), or one for"
            ):
                loss(x, x, target)
        with pytest.raises(TypeError, match="target: got torch.float32, want integer labels"):
            loss(x, x, y.float())
    with pytest.raises(
        ValueError, match=r"target: got shape \(2, 2, 4, 4\), want 3 channels as the logits have, or one"
    ):
        losses.CWDLoss(activation="sigmoid")(x, x, y.expand(2, 2, 4, 4))
    for loss in (losses.IFVDLoss(3), losses.SDDLoss(), losses.BoundaryKDLoss()):
        with pytest.raises(TypeError, match="target: got NoneType, want labels"):
            loss(x, x, None)
    with pytest.raises(TypeError, match="target: got torch.float32, want integer labels"):
        losses.ATLoss()(x, x, y.float())
