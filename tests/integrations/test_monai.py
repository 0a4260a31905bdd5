"""The MONAI side with MONAI itself: its networks, trainer, losses and tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from monai.data import MetaTensor
from monai.engines import SupervisedTrainer
from monai.losses import DeepSupervisionLoss, DiceCELoss
from monai.networks import one_hot
from monai.networks.nets import BasicUNet, BasicUNetPlusPlus, DynUNet
from operators import assert_close
from torch import nn

from medkd_fast import Distiller, Term, functional, losses
from medkd_fast.integrations.monai import MonaiLoss, as_labels, distillation_step

pytestmark = pytest.mark.filterwarnings("ignore:.*`torch.jit.*is deprecated.*")  # MONAI's own
CLASSES = 4


def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, CLASSES, 8, 6), torch.randn(3, CLASSES, 8, 6), torch.randint(0, CLASSES, (3, 1, 8, 6))


def test_targets_as_monai_has_them() -> None:
    student, teacher, target = logits()
    want = losses.DKDLoss()(student, teacher, target)
    for given in (target, target.float(), MetaTensor(target.float()), one_hot(target, CLASSES)):
        assert_close(MonaiLoss(losses.DKDLoss())(MetaTensor(student), teacher, given), want, 1e-7)
    labels = as_labels(one_hot(target, CLASSES), include_background=False)
    assert type(labels) is torch.Tensor and labels.shape == (3, 8, 6)
    assert torch.equal(labels == -100, target[:, 0] == 0) and torch.equal(labels[labels > 0], target[:, 0][labels > 0])
    nothing = one_hot(target, CLASSES)
    nothing[0, :, 2] = 0  # no class at all: ignored
    assert (as_labels(nothing)[0, 2] == -100).all() and (as_labels(nothing) == -100).sum() == 6


def test_without_background() -> None:
    student, teacher, target = logits()
    loss = MonaiLoss(losses.KDLoss(), include_background=False)
    per_pixel = functional.class_kl(student, teacher, temperature=4.0, reduction="none")
    assert_close(loss(student, teacher, target), per_pixel[target[:, 0] > 0].mean(), 1e-6)


def test_sigmoid_heads() -> None:
    student, teacher, _ = logits()
    target = torch.randint(0, 2, student.shape)  # regions that overlap
    one = losses.KDLoss(activation="sigmoid")
    assert_close(MonaiLoss(one, sigmoid=True)(student, teacher, target.float()), one(student, teacher), 1e-6)
    without = MonaiLoss(one, sigmoid=True, include_background=False)(student, teacher, target)
    assert_close(without, one(student[:, 1:], teacher[:, 1:]), 1e-6)
    cwd = losses.CWDLoss(activation="sigmoid")
    assert_close(MonaiLoss(cwd, sigmoid=True)(student, teacher, target.float()), cwd(student, teacher), 1e-6)
    without = MonaiLoss(cwd, sigmoid=True, include_background=False)(student, teacher, target)
    assert_close(without, cwd(student[:, 1:], teacher[:, 1:]), 1e-6)
    with pytest.raises(ValueError, match="want one label a pixel"):
        MonaiLoss(losses.IFVDLoss(CLASSES), sigmoid=True)(student, teacher, target)


@pytest.mark.parametrize("include_background", [True, False])
def test_a_step_of_sigmoid_heads(include_background: bool) -> None:
    teacher, student = networks()
    data = batches()[:1]
    image, label = data[0]["image"], one_hot(data[0]["label"], CLASSES)
    data[0]["label"] = label
    cwd = losses.CWDLoss(activation="sigmoid")
    terms = [Term(cwd), Term("cpkd", "upcat_2"), Term("fitnet", "upcat_2")]
    kd = Distiller(teacher, student, terms, example=image)
    with torch.no_grad():
        s, t = copy.deepcopy(student)(image).as_tensor(), teacher(image).as_tensor()
    classes = slice(None) if include_background else slice(1, None)
    want = cwd(s[:, classes], t[:, classes])
    settings = {"include_background": include_background, "sigmoid": True}
    output = trained(kd, data, student, DiceCELoss(sigmoid=True), **settings).state.output[0]
    assert float(output["kd/cwd"]) == pytest.approx(want.item(), rel=1e-4)
    assert float(output["kd/cpkd"]) > 0 and float(output["kd/fitnet"]) > 0


@pytest.mark.parametrize("loss", [losses.DKDLoss(), losses.CWDLoss()], ids=["dkd", "cwd"])
def test_reductions(loss: nn.Module) -> None:
    student, teacher, target = logits()
    each = torch.stack([loss(student[i : i + 1], teacher[i : i + 1], target[i : i + 1]) for i in range(3)])
    assert_close(MonaiLoss(loss, reduction="none")(student, teacher, target), each, 1e-6)
    assert_close(MonaiLoss(loss, reduction="sum")(student, teacher, target), each.sum(), 1e-6)
    assert_close(MonaiLoss(loss)(student, teacher, target), each.mean(), 1e-6)  # as many pixels in every image


def networks(dims: int = 2) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    teacher, student = (
        BasicUNet(spatial_dims=dims, in_channels=1, out_channels=CLASSES, features=(w, w, w, 2 * w, 2 * w, w))
        for w in (6, 4)
    )
    return teacher, student


def batches(dims: int = 2) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(2)
    size = [32] * dims
    return [
        {
            "image": MetaTensor(torch.randn(2, 1, *size)),
            "label": MetaTensor(torch.randint(0, CLASSES, (2, 1, *size)).float()),
        }
        for _ in range(3)
    ]


def trained(kd: Distiller, data: list[dict], network: nn.Module, loss: nn.Module, **settings) -> SupervisedTrainer:
    words = {name: settings.pop(name) for name in ("include_background", "sigmoid") if name in settings}
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=data,
        network=network,
        optimizer=torch.optim.SGD(kd.parameters(), lr=0.05),
        loss_function=loss,
        iteration_update=distillation_step(kd, **words),
        **settings,
    )
    trainer.run()
    return trainer


@pytest.mark.parametrize(("dims", "decollate"), [(2, True), (2, False), (3, True)])
def test_a_supervised_trainer(dims: int, decollate: bool) -> None:
    teacher, student = networks(dims)
    data = batches(dims)[: 4 - dims]
    terms = [Term("cpkd", "upcat_2", weight=0.5), Term("dkd", weight=0.1)]
    kd = Distiller(teacher, student, terms, example=data[0]["image"])
    by_hand = copy.deepcopy(kd)
    task = DiceCELoss(to_onehot_y=True, softmax=True)
    trainer = trained(kd, data, student, task, include_background=False, decollate=decollate)

    optimiser = torch.optim.SGD(by_hand.parameters(), lr=0.05)
    for batch in data:
        image, label = (batch[key].as_tensor() for key in ("image", "label"))
        optimiser.zero_grad()
        labels = label.long()
        labels[labels == 0] = -100
        loss = task(by_hand(image), label) + by_hand.loss(labels)
        loss.backward()
        optimiser.step()
    loss = loss.detach()
    for name, p in by_hand.state_dict().items():
        assert_close(kd.state_dict()[name], p, 1e-5, name)
    output = trainer.state.output[0] if decollate else trainer.state.output
    assert float(output["loss"]) == pytest.approx(loss.item(), rel=1e-5)
    for name, value in by_hand.log().items():
        assert float(output[f"kd/{name}"]) == pytest.approx(value.item(), rel=1e-4)
    assert trainer.loss_function is task


@pytest.mark.parametrize("kind", ["list", "stacked"])
def test_deep_supervision(kind: str) -> None:
    """A list from BasicUNetPlusPlus, [B, outputs, C, *S] from DynUNet: the finest is compared, the task has them all."""
    torch.manual_seed(3)
    data = batches()
    if kind == "list":
        teacher, student = (
            BasicUNetPlusPlus(2, 1, CLASSES, features=(w, w, w, w, w, w), deep_supervision=True) for w in (6, 4)
        )
        task: nn.Module = DeepSupervisionLoss(DiceCELoss(to_onehot_y=True, softmax=True))
    else:
        teacher, student = (
            DynUNet(
                2, 1, CLASSES, kernel_size=[3] * 4, strides=[1, 2, 2, 2], upsample_kernel_size=[2] * 3, filters=[w] * 4,
                deep_supervision=True, deep_supr_num=1,
            )
            for w in (6, 4)
        )  # fmt: skip

        class Unstacked(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.loss = DeepSupervisionLoss(DiceCELoss(to_onehot_y=True, softmax=True))

            def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
                return self.loss(list(prediction.unbind(1)), target)

        task = Unstacked()
    kd = Distiller(teacher, student, [Term("dkd")])
    image, label = (data[0][key].as_tensor() for key in ("image", "label"))
    with torch.no_grad():
        output = copy.deepcopy(student)(image)
        s, t = (x[0] if kind == "list" else (x[:, 0] if x.dim() == 5 else x) for x in (output, teacher.eval()(image)))
        want = losses.DKDLoss()(s, t, label.long())
    trainer = trained(kd, data[:1], student, task)
    assert float(trainer.state.output[0]["kd/dkd"]) == pytest.approx(want.item(), rel=1e-4)


def test_accumulated_gradients() -> None:
    teacher, student = networks()
    kd = Distiller(teacher, student, [Term("dkd", weight=0.1)])
    by_hand = copy.deepcopy(kd)
    task, data = DiceCELoss(to_onehot_y=True, softmax=True), batches()[:2]
    trained(kd, data, kd, task, accumulation_steps=2)
    for batch in data:
        image, label = (batch[key].as_tensor() for key in ("image", "label"))
        ((task(by_hand(image), label) + by_hand.loss(label.long())) / 2).backward()
    torch.optim.SGD(by_hand.parameters(), lr=0.05).step()
    for name, p in by_hand.state_dict().items():
        assert_close(kd.state_dict()[name], p, 1e-5, name)


def test_messages() -> None:
    *_, target = logits()
    with pytest.raises(ValueError, match="'avg' is not a valid LossReduction"):
        MonaiLoss(losses.KDLoss(), reduction="avg")
    with pytest.raises(ValueError, match=r"target: got shape \(8, 6\), want labels \[B, 1, \*S\] or one-hot"):
        as_labels(target[0, 0])
    one_class = torch.randn(3, 1, 8, 6)
    with pytest.raises(
        ValueError, match=r"got shape \(2, 8, 6\) with logits of \(2, 3, 8, 6\), .* make target.unsqueeze\(1\)"
    ):
        MonaiLoss(losses.KDLoss())(torch.zeros(2, 3, 8, 6), torch.zeros(2, 3, 8, 6), torch.zeros(2, 8, 6))
    with pytest.raises(ValueError, match=r"got 1 class, want at least 2; .*activation=\"sigmoid\""):
        MonaiLoss(losses.KDLoss())(one_class, one_class, target)
