"""The distiller: what it computes is what calling the losses by hand computes, in every kind of training step."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from operators import assert_close, in_new_processes
from sources import ROOT
from torch import nn
from torch.utils.checkpoint import checkpoint

from medkd_fast import Distiller, Term, losses
from medkd_fast.losses.calls import COMPARES, call_of
from medkd_fast.losses.catalogue import LOSSES

CLASSES = 4


def only_logits(coarse: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return logits


class Net(nn.Module):
    """Two levels of features and logits, of any width, in 2-D or 3-D; what `give` makes of them is the output.

    recompute: the decoder is checkpointed, reentrant or not.
    """

    def __init__(self, width: int, dims: int = 2, give=only_logits, recompute: bool | None = None):
        super().__init__()
        conv, norm = {2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}[dims]
        self.stem = nn.Sequential(conv(1, width, 3, padding=1), norm(width), nn.ReLU())
        self.decoder = nn.ModuleList([conv(width, 2 * width, 3, stride=2, padding=1), conv(2 * width, width, 1)])
        self.head = conv(width, CLASSES, 1)
        self.give, self.recompute = give, recompute

    def forward(self, images):
        x = self.stem(images)
        coarse = self.run(self.decoder[0], x)
        fine = F.interpolate(self.run(self.decoder[1], coarse), size=x.shape[2:])
        return self.give(coarse, self.head(fine + x))

    def run(self, layer, x):
        def function(x):
            return layer(x).relu()

        return function(x) if self.recompute is None else checkpoint(function, x, use_reentrant=self.recompute)


def pair(teacher_width: int = 6, student_width: int = 6, **settings) -> tuple[Net, Net]:
    torch.manual_seed(2)
    return Net(teacher_width, settings.get("dims", 2)), Net(student_width, **settings)


def batch(dims: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return torch.randn(2, 1, *[8] * dims), torch.randint(0, CLASSES, (2, *[8] * dims))


def caught_by_hand(network: nn.Module, images: torch.Tensor, *layers: str) -> tuple:
    found = {}
    handles = [
        network.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: found.update({name: o}))
        for name in layers
    ]
    output = network(images)
    for handle in handles:
        handle.remove()
    return output, *(found[name] for name in layers)


def asked(teacher: nn.Module, images: torch.Tensor, *layers: str) -> tuple:
    with torch.no_grad():
        return caught_by_hand(teacher.eval(), images, *layers)


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert got.keys() == want.keys() and want
    for name, value in want.items():
        assert_close(got[name], value, tolerance, name)


def terms() -> list[Term]:
    return [
        Term(losses.CPKDLoss(), student="decoder.1", teacher="decoder.1"),
        Term(losses.DKDLoss(), weight=0.1),
        Term("at", student="decoder.0", weight=3.0),
    ]


@pytest.mark.parametrize("dims", [2, 3])
def test_it_is_the_losses_called_by_hand(dims: int) -> None:
    teacher, student = pair(dims=dims)
    by_hand = copy.deepcopy(student)
    images, labels = batch(dims)
    kd = Distiller(teacher, student, terms())
    logits = kd(images)
    value = F.cross_entropy(logits, labels) + kd.loss(labels)
    value.backward()

    want_logits, *features = caught_by_hand(by_hand, images, "decoder.1", "decoder.0")
    t_logits, *t_features = asked(teacher, images, "decoder.1", "decoder.0")
    cpkd = losses.CPKDLoss()(features[0], t_features[0], labels)
    dkd = losses.DKDLoss()(want_logits, t_logits, labels)
    at = losses.ATLoss()(features[1], t_features[1], labels)
    want = F.cross_entropy(want_logits, labels) + cpkd + 0.1 * dkd + 3 * at
    want.backward()
    assert_close(logits, want_logits, 1e-6)
    assert_close(value, want, 1e-6)
    assert_same(gradients(student), gradients(by_hand), 1e-5)
    log = kd.log()
    assert list(log) == ["cpkd", "dkd", "at"] and not any(x.requires_grad for x in log.values())
    for name, x in (("cpkd", cpkd), ("dkd", dkd), ("at", at)):
        assert_close(log[name], x, 1e-6)
    parts = kd.log(parts=True)
    assert set(parts) - set(log) == {"cpkd/channel", "cpkd/pixel", "dkd/target", "dkd/nontarget", "at/attention"}
    assert_close(parts["cpkd/channel"] + parts["cpkd/pixel"], cpkd, 1e-6)


def every_term() -> dict[str, Term]:
    made = {}
    for name in LOSSES:
        layer = {"student": "decoder.1"} if COMPARES[name] == "features" else {}
        call = call_of(LOSSES[name])
        lists = {"student_features": "decoder.*"} if call.student_list else {}
        made[name] = Term(name, weight=0.5, **layer, **lists)
    return made


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_by_name_with_other_channels(name: str) -> None:
    teacher, student = pair(teacher_width=6, student_width=4)
    images, labels = batch()
    kd = Distiller(teacher, student, [every_term()[name]], example=images)
    kd(images)
    value = kd.loss(labels)
    value.backward()

    loss = kd.losses[0][0]
    logits, *features = caught_by_hand(student, images, "decoder.0", "decoder.1")
    t_logits, *t_features = asked(teacher, images, "decoder.0", "decoder.1")
    maps = (features[1], t_features[1]) if COMPARES[name] == "features" else (logits, t_logits)
    lists = {
        "dmd": {"features": features},
        "dsd": {"student_features": features, "teacher_features": t_features},
        "emkd": {"student_features": features, "teacher_features": t_features},
    }
    assert value > 0
    assert_close(value, 0.5 * loss(*maps, labels, **lists.get(name, {})), 1e-5)
    trained = dict(loss.named_parameters())
    assert bool(trained) == (name in ("dmd", "cpkd", "fitnet", "ickd", "pkd"))
    assert all(p.grad.abs().sum() > 0 for p in trained.values())
    assert {id(p) for p in trained.values()} <= {id(p) for p in kd.parameters()}
    if trained:
        want_shape = {"dmd": (CLASSES, 8, 1, 1)}.get(name, (6, 4, 1))
        assert next(iter(trained.values())).shape == want_shape


def test_the_catalogue_says_what_each_loss_compares() -> None:
    assert list(COMPARES) == list(LOSSES)
    assert {entry.name: entry.compares for entry in losses.available()} == COMPARES
    calls = {name: call_of(loss) for name, loss in LOSSES.items()}
    assert all(call.target for call in calls.values())
    assert {name for name, call in calls.items() if call.needs_lists} == {"dmd", "emkd"}
    assert {name for name, call in calls.items() if call.teacher_list} == {"dsd", "emkd"}
    assert {name for name, call in calls.items() if call.student_list} == {"dmd", "dsd", "emkd"}
    assert not call_of(nn.MSELoss).target


def test_a_loss_of_your_own() -> None:
    teacher, student = pair()
    images, _ = batch()
    kd = Distiller(teacher, student, [Term(nn.MSELoss(), student="head"), Term(nn.MSELoss(), "decoder.0", name="mse")])
    logits = kd(images)
    kd.loss()
    assert_close(kd.log()["mseloss"], F.mse_loss(logits, asked(teacher, images)[0]), 1e-6)
    assert set(kd.log()) == {"mseloss", "mse"}


@pytest.mark.parametrize(
    "give",
    [
        lambda coarse, logits: [logits, coarse[:, :CLASSES]],
        lambda coarse, logits: (coarse[:, :CLASSES], logits),
        lambda coarse, logits: {"aux": coarse[:, :CLASSES], "out": logits},
        lambda coarse, logits: {"coarse": coarse[:, :CLASSES], "fine": [logits]},
        lambda coarse, logits: torch.stack([logits, 0 * logits], 1),
    ],
    ids=["list", "tuple", "dict by key", "dict by size", "stacked"],
)
def test_of_several_outputs_the_finest(give) -> None:
    teacher, student = pair(give=give)
    images, labels = batch()
    kd = Distiller(teacher, student, [Term("dkd")])
    output = kd(images)
    value = kd.loss([labels[:, ::2, ::2], labels])
    student.give = only_logits
    assert type(output) is type(give(torch.zeros(2, 4, 1, 1), torch.zeros(2, 4, 1, 1)))
    assert_close(value, losses.DKDLoss()(student(images), asked(teacher, images)[0], labels), 1e-6)


def test_the_mean_of_several_teachers() -> None:
    teacher, student = pair()
    other = Net(5)
    images, labels = batch()
    one, two = ([Term("dkd"), Term(losses.FitNetLoss(), "decoder.0", weight=2.0)] for _ in range(2))
    kd = Distiller([teacher, other], student, one, example=images)
    assert [name for name, _ in kd.losses.named_parameters()] == ["1.1.adapter.weight"]  # 12 channels to 10
    kd(images)
    value = kd.loss(labels)
    log = kd.log(parts=True)
    singles = []
    for which, network in enumerate((teacher, other)):
        with Distiller(network, student, two, example=images) as single:
            if which:
                single.losses[1][0].load_state_dict(kd.losses[1][1].state_dict())
            single(images)
            singles.append((single.loss(labels), single.log()["dkd"], single.log(parts=True)["fitnet/hint"]))
    assert_close(value, (singles[0][0] + singles[1][0]) / 2, 1e-6)
    assert_close(log["dkd"], (singles[0][1] + singles[1][1]) / 2, 1e-6)
    assert_close(log["fitnet/hint"], (singles[0][2] + singles[1][2]) / 2, 1e-6)


def test_a_weight_that_rises() -> None:
    teacher, student = pair()
    images, labels = batch()
    kd = Distiller(teacher, student, [Term("kd", weight=0.5, warm_up=4)])
    student.eval()  # the same output in every step
    shares = []
    for _ in range(6):
        kd(images)
        shares.append((kd.loss(labels) / kd.log()["kd"]).item())
    assert shares == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5])
    again = Distiller(teacher, Net(6), [Term("kd", weight=0.5, warm_up=4)])
    again.load_state_dict(kd.state_dict())
    assert again.step == 6
    kd.eval()
    kd(images)
    kd.loss(labels)
    assert kd.step == 6


def test_the_teacher_is_nobodys_parameter() -> None:
    teacher, student = pair(student_width=4)
    images, labels = batch()
    kd = Distiller(teacher.train(), student, terms(), example=images)
    before = copy.deepcopy(teacher.state_dict())
    its = {id(p) for p in teacher.parameters()}
    assert not its & {id(p) for p in kd.parameters()} and not its & {id(p) for p in kd.state_dict().values()}
    assert {name.split(".")[0] for name in kd.state_dict()} == {"student", "losses"}
    kd.train()
    assert not any(module.training for module in teacher.modules())
    for some in (teacher, teacher.stem[1]):
        some.train()  # somebody else does
        kd(images)
        kd.loss(labels).backward()
        assert_same(teacher.state_dict(), before, 0)
    assert all(p.grad is None for p in teacher.parameters())
    assert next(kd.double().teachers[0].parameters()).dtype == torch.float64
    kd(images.double())
    assert kd.loss(labels).dtype == torch.float64


def test_a_dry_run_leaves_no_trace() -> None:
    teacher, _ = pair()
    student = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, CLASSES, 1))
    images, _ = batch()
    before, state = copy.deepcopy(student.state_dict()), torch.get_rng_state()
    kd = Distiller(teacher, student, [Term("cwd")], example=images)
    assert_same(student.state_dict(), before, 0)
    assert torch.equal(torch.get_rng_state(), state) and student.training
    with pytest.raises(RuntimeError, match="the student has not run since the last loss"):
        kd.loss()


def test_the_terms_may_be_used_again() -> None:
    teacher, student = pair(student_width=4)
    images, labels = batch()
    loss = losses.CPKDLoss()
    both = [Term(loss, "decoder.0"), Term(loss, "decoder.1")]
    kd = Distiller(teacher, student, both, example=images)
    assert loss.adapter is None and kd.names == ["cpkd", "cpkd_2"]
    assert [tuple(p.shape) for p in kd.losses.parameters()] == [(12, 8, 1), (6, 4, 1)]
    kd(images)
    kd.loss(labels).backward()
    assert all(p.grad.abs().sum() > 0 for p in kd.losses.parameters())
    without = Distiller(teacher, student, [Term(losses.CPKDLoss(channel_weight=0), "decoder.0")], example=images)
    assert not list(without.losses.parameters())


def test_a_trainer_that_calls_the_student_itself() -> None:
    teacher, student = pair()
    images, labels = batch()
    kd = Distiller(teacher, student, terms())
    kd(images)
    want = kd.loss(labels)
    student(images)
    assert_close(kd.loss(labels), want, 1e-6)
    student.eval()(images)
    with pytest.raises(RuntimeError, match="has not run since the last loss"):
        kd.loss(labels)
    with torch.no_grad():
        kd.eval()(images)
        assert not kd._of_teachers[0].outputs  # predicting costs no teacher
        assert kd.loss(labels) > 0


def two_students() -> tuple[Net, Net, Net]:
    teacher, student = pair()
    return teacher, student, copy.deepcopy(student)


def skipped(images: torch.Tensor, others: torch.Tensor, labels: torch.Tensor) -> tuple[Net, Net, torch.Tensor]:
    """A step whose loss nobody asks for, and then validation."""
    teacher, student, _ = two_students()
    kd = Distiller(teacher, student, [Term("kd")])
    kd(others)
    kd.eval()
    kd(images)
    return teacher, student, kd.loss(labels)


def asked_by_the_user(
    images: torch.Tensor, others: torch.Tensor, labels: torch.Tensor
) -> tuple[Net, Net, torch.Tensor]:
    teacher, student, _ = two_students()
    kd = Distiller(teacher, student.eval(), [Term("kd")])
    kd(images)
    student.zero_grad()
    with torch.no_grad():
        teacher(others)
    return teacher, student, kd.loss(labels)


def together(images: torch.Tensor, others: torch.Tensor, labels: torch.Tensor) -> tuple[Net, Net, torch.Tensor]:
    """Two students of one teacher."""
    teacher, student, other = two_students()
    first, second = (Distiller(teacher, x.eval(), [Term("kd")]) for x in (student, other))
    first(images)
    second(others)
    return teacher, student, first.loss(labels)


def in_turn(images: torch.Tensor, others: torch.Tensor, labels: torch.Tensor) -> tuple[Net, Net, torch.Tensor]:
    teacher, student, other = two_students()
    first, second = (Distiller(teacher, x, [Term("kd")]) for x in (other, student))
    other(others)
    first.loss(labels)
    student(images)
    return teacher, student, second.loss(labels)


def failed(images: torch.Tensor, others: torch.Tensor, labels: torch.Tensor) -> tuple[Net, Net, torch.Tensor]:
    """A loss that raised."""
    teacher, student, _ = two_students()
    kd = Distiller(teacher, student, [Term("kd")])
    student(others)
    with pytest.raises(TypeError, match="want integer labels"):
        kd.loss(labels.double())
    student(images)
    return teacher, student, kd.loss(labels)


@pytest.mark.parametrize("run", [skipped, asked_by_the_user, together, in_turn, failed])
def test_a_student_is_compared_with_the_teacher_on_its_own_images(run) -> None:
    images, labels = batch()
    teacher, student, value = run(images, torch.randn(2, 1, 8, 8), labels)
    with torch.no_grad():
        assert_close(value, losses.KDLoss()(student(images), teacher(images), labels), 1e-6)


def test_a_student_without_a_graph_is_told() -> None:
    teacher, student = pair()
    images, labels = batch()
    kd = Distiller(teacher, student, [Term("kd")])
    with torch.no_grad():
        kd(images)
    with pytest.raises(ValueError, match="student: its output came without a gradient"):
        kd.loss(labels)
    with torch.no_grad():
        kd(images)
        assert kd.loss(labels) > 0
    kd.eval()
    with torch.no_grad():
        kd(images)
    assert kd.loss(labels) > 0


def test_a_dry_run_of_one_image() -> None:
    """Statistics of a batch take two where a map has one pixel. One that fails leaves those that there were."""

    def network() -> nn.Sequential:
        return nn.Sequential(nn.BatchNorm2d(1), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(1), nn.Conv2d(1, CLASSES, 1))

    student = network()
    Distiller(network(), student, [Term("kd")], example=batch()[0][:1])
    assert student[0].num_batches_tracked == 0
    with pytest.raises(RuntimeError, match="expected input"):
        Distiller(Net(4), nn.Sequential(student[0], nn.Conv2d(2, CLASSES, 1)), [Term("kd")], example=batch()[0])
    assert student[0].num_batches_tracked == 0


@dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor


@pytest.mark.parametrize(
    "give",
    [lambda coarse, logits: Output(logits, logits.sum()), lambda coarse, logits: {"loss": logits.sum()}],
    ids=["a dataclass", "no map"],
)
def test_terms_on_layers_need_no_map_of_the_network(give) -> None:
    teacher, student = pair()
    student.give = teacher.give = give
    kd = Distiller(
        teacher, student, [Term("at", "decoder.0"), Term(losses.IFVDLoss(CLASSES), "decoder.1")], example=batch()[0]
    )
    images, labels = batch()
    kd(images)
    value = kd.loss(labels)
    value.backward()
    assert value > 0 and student.stem[0].weight.grad.abs().sum() > 0


def test_of_equal_outputs_the_first_is_taken_and_told() -> None:
    teacher, student = pair()
    student.give = lambda coarse, logits: [logits, 2 * logits]
    kd = Distiller(teacher, student, [Term("kd")])
    images, labels = batch()
    for times in (1, 0):  # once
        kd(images)
        with warnings.catch_warnings(record=True) as told:
            value = kd.loss(labels)
        assert len(told) == times and all("gave several maps of (2, 4, 8, 8)" in str(x.message) for x in told)
    with torch.no_grad():
        want = losses.KDLoss()(student(images)[0], teacher(images), labels)
    assert_close(value, want, 1e-6)


def test_of_several_labels_the_finest() -> None:
    images, labels = batch()
    teacher, student = pair()
    kd = Distiller(teacher, student, [Term("dkd")])
    kd(images)
    want = kd.loss(labels)
    for several in ([labels[:, ::2], labels], [labels[:, None], labels[:, None, ::2, ::2]]):
        kd(images)
        assert kd.loss(several) == want


def test_stacked_outputs_of_images_by_name() -> None:
    images, labels = batch()
    teacher, student = pair()
    student.give = teacher.give = lambda coarse, logits: torch.stack([logits, logits * 0], 1)
    kd = Distiller(teacher, student, [Term("kd")])
    kd(images)
    want = kd.loss(labels)
    kd(images=images)
    assert kd.loss(labels) == want


def test_hooks_go_with_the_distiller_and_when_it_cannot_be_made() -> None:
    teacher, student = pair()
    kd = Distiller(teacher, student, terms())
    del kd
    gc.collect()
    with pytest.raises(RuntimeError, match="ScriptModules"):
        Distiller(torch.jit.script(nn.Conv2d(1, CLASSES, 1)), student, [Term("kd")])
    for network in (teacher, student):
        for module in network.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks


def test_every_name_of_a_layer() -> None:
    teacher, student = pair()
    student.another = student.decoder[1]
    kd = Distiller(nn.ModuleList([teacher]), student, [Term("at", "another", "decoder.1")])
    images, labels = batch()
    kd(images)
    assert kd.loss(labels) > 0


def test_hooks_go_when_it_closes() -> None:
    teacher, student = pair()
    images, labels = batch()

    def hooks() -> int:
        modules = [*teacher.modules(), *student.modules()]
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)

    with Distiller(teacher, student, terms()) as kd:
        assert hooks() > 0
    assert hooks() == 0
    kd(images)
    with pytest.raises(RuntimeError, match=r"After close\(\) there is nothing to compare"):
        kd.loss(labels)
    with pytest.raises(ValueError):
        Distiller(teacher, student, [Term("emkd", student_features="stem", settings={"num_classes": 1})])
    assert hooks() == 0


def test_gradient_checkpointing() -> None:
    found = []
    for recompute in (None, False):
        teacher, student = pair(recompute=recompute)
        images, labels = batch()
        kd = Distiller(teacher, student, [Term("at", "decoder.0", weight=100.0), Term("dkd")])
        value = F.cross_entropy(kd(images), labels) + kd.loss(labels)
        value.backward()
        assert not kd._of_student.outputs  # what was run again is not caught
        found.append((value, gradients(student)))
    assert_close(found[1][0], found[0][0], 1e-6)
    assert_same(found[1][1], found[0][1], 1e-6)


class InPlace(nn.Module):
    """A convolution that an activation changes, which runs again at the end."""

    def __init__(self, inplace: bool, recompute: bool | None = None, again: bool = False):
        super().__init__()
        self.conv, self.act, self.head = nn.Conv2d(1, 4, 1), nn.ReLU(inplace), nn.Conv2d(4, CLASSES, 1)
        self.recompute, self.again = recompute, again

    def forward(self, images):
        def features(x):
            return self.act(self.conv(x))

        x = features(images) if self.recompute is None else checkpoint(features, images, use_reentrant=self.recompute)
        return self.act(self.head(x)) if self.again else self.head(x)


@pytest.mark.parametrize("recompute", [None, False])
def test_a_layer_that_is_changed_in_place_is_told_once(recompute: bool | None) -> None:
    images, labels = batch()
    changed = InPlace(True, recompute)
    for teacher, student, whose in ((InPlace(False), changed, "student"), (changed, InPlace(False), "teacher")):
        kd = Distiller(teacher, student, [Term("at", "conv"), Term("fitnet", "conv")])
        kd(images)
        with pytest.warns(
            UserWarning, match=f"{whose}: the layer 'conv' gave a tensor that was changed in place"
        ) as told:
            value = kd.loss(labels)
        assert len(told) == 1
        t, s = ((x.conv(images).relu() if x is changed else x.conv(images)) for x in (teacher, student))
        assert_close(value, losses.ATLoss()(s, t.detach()) + losses.FitNetLoss()(s, t.detach()), 1e-6)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kd(images)
            kd.loss(labels).backward()
        kd.close()


def test_a_layer_that_runs_twice_is_told_once() -> None:
    images, labels = batch()
    for teacher, student, whose in (
        (InPlace(False), InPlace(False, again=True), "student"),
        (InPlace(False, again=True), InPlace(False), "teacher"),
    ):
        kd = Distiller(teacher, student, [Term("at", "act")])
        with pytest.warns(UserWarning, match=f"{whose}: the layer 'act' ran more than once") as told:
            kd(images)
        assert len(told) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kd(images)
            kd.loss(labels)
        kd.close()


@pytest.mark.parametrize("of", ["recomputed", "inference mode", "compiled"])
def test_layers_that_there_is_nothing_to_tell_of(of: str) -> None:
    torch._dynamo.reset()
    images, labels = batch()
    teacher, student = InPlace(False), InPlace(False, recompute=False if of == "recomputed" else None)
    if of == "inference mode":
        teacher.forward = torch.inference_mode()(teacher.forward)
    kd = Distiller(teacher, student, [Term("at", "conv"), Term("fitnet", "act"), Term("dkd")])
    if of == "compiled":
        kd.student = torch.compile(student, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*the layer")
        for _ in range(2):
            kd(images)
            kd.loss(labels).backward()
    assert all(p.grad.abs().sum() > 0 for p in student.parameters())


def test_a_layer_without_a_gradient_is_told() -> None:
    teacher, student = pair(recompute=True)
    images, labels = batch()
    kd = Distiller(teacher, student, [Term("at", "decoder.0")])
    kd(images.requires_grad_())
    with pytest.raises(ValueError, match="'decoder.0' came without a gradient.*use_reentrant=False"):
        kd.loss(labels)


def test_mixed_precision_with_a_scaler() -> None:
    teacher, student = pair(student_width=4)
    images, labels = batch()
    kd = Distiller(teacher, student, [Term("cwd", "decoder.1"), Term("dkd", weight=0.1)], example=images)
    optimiser = torch.optim.Adam(kd.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    values = []
    for _ in range(8):
        optimiser.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = kd(images)
            assert kd._of_teachers[0].outputs["decoder.1"].dtype == torch.bfloat16
            value = F.cross_entropy(logits, labels) + kd.loss(labels)
        scaler.scale(value).backward()
        scaler.step(optimiser)
        scaler.update()
        values.append(value.item())
    assert logits.dtype == torch.bfloat16 and value.dtype == torch.float32
    assert values == sorted(values, reverse=True) and values[-1] < 0.9 * values[0]


def test_copies_and_pickles() -> None:
    teacher, student = pair(student_width=4)
    images, labels = batch()
    kd = Distiller(teacher, student, terms(), example=images)
    kd(images)  # what is caught has a graph, which does not copy
    for other in (copy.deepcopy(kd), pickle.loads(pickle.dumps(kd))):
        assert other.student is not student and other.teachers[0] is not teacher
        other(images)
        value = other.loss(labels)
        value.backward()
        assert all(p.grad is None for p in kd.parameters()) and all(p.grad is not None for p in other.parameters())
        other.close()
    assert_close(kd.loss(labels), value, 1e-6)
    kd(images)
    averaged = torch.optim.swa_utils.AveragedModel(student)
    averaged(images)
    assert_close(kd.loss(labels), value, 1e-6)


def test_the_loss_part_compiles_whole(cpp: str) -> None:
    torch._dynamo.reset()
    teacher, student = pair(student_width=4)
    images, labels = batch()
    student.eval()
    some = [every_term()[name] for name in ("cpkd", "dmd", "dsd")]  # each loss compiles in a test of its own
    rising = Term("kd", warm_up=10, name="rising")
    kd = Distiller(teacher, student, [*some, rising], example=images).double()
    images = images.double()
    plain = copy.deepcopy(kd)
    compiled = torch.compile(kd.loss, fullgraph=True, backend="aot_eager")
    for step in range(2):  # the same code serves the second step
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            kd(images)
            value = compiled(labels)
            value.backward()
        plain(images)
        want = plain.loss(labels)
        want.backward()
        assert_close(value, want, 1e-12)
        assert_close(kd.log()["rising"], plain.log()["rising"], 1e-12)
    assert_same(gradients(kd), gradients(plain), 1e-9)


def test_one_term_of_weight_1_has_its_gradient_when_compiled(cpp: str) -> None:
    """By Inductor: aot_eager takes no products with 1 out."""
    torch._dynamo.reset()
    teacher, student = pair()
    images, labels = batch()
    kd = Distiller(teacher, student, [Term("kd")], example=images)
    plain = copy.deepcopy(kd)
    kd(images)
    torch.compile(kd.loss, fullgraph=True)(labels).backward()
    plain(images)
    plain.loss(labels).backward()
    assert_same(gradients(kd), gradients(plain), 1e-5)


def test_a_weight_rises_in_a_step_compiled_whole(cpp: str) -> None:
    torch._dynamo.reset()
    teacher, student = pair(student_width=4)
    images, labels = batch()
    student.eval()
    kd = Distiller(teacher, student, [Term("kd", warm_up=10)], example=images)
    plain = copy.deepcopy(kd)

    def step(kd: Distiller) -> torch.Tensor:
        kd(images)
        return kd.loss(labels)

    compiled = torch.compile(step, backend="aot_eager")
    for _ in range(2):
        compiled(kd).backward()
        step(plain).backward()
        assert_same(gradients(kd), gradients(plain), 1e-5)


def test_a_compiled_student(cpp: str) -> None:
    torch._dynamo.reset()
    teacher, student = pair()
    images, labels = batch()
    plain = Distiller(teacher, copy.deepcopy(student), terms())
    kd = Distiller(teacher, torch.compile(student, backend="aot_eager"), terms())
    for one in (plain, kd):
        one(images)
    value, want = kd.loss(labels), plain.loss(labels)
    assert_close(value, want, 1e-5)
    value.backward()
    want.backward()
    assert_same(gradients(student), gradients(plain.student), 1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_cuda_graph_holds_the_whole_step() -> None:
    teacher, student = (x.cuda() for x in pair(student_width=4))
    images, labels = (x.cuda() for x in batch())
    kd = Distiller(teacher, student, [Term("cwd", "decoder.1"), Term("dkd", weight=0.1, warm_up=5)], example=images)
    student.eval()

    def step() -> torch.Tensor:
        kd.zero_grad(set_to_none=False)
        value = F.cross_entropy(kd(images), labels) + kd.loss(labels)
        value.backward()
        return value

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    kd.step.zero_()
    want = [step().item() for _ in range(3)]
    kd.step.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = step()
    kd.step.zero_()
    got = []
    for _ in range(3):
        graph.replay()
        got.append(value.item())
    assert got == pytest.approx(want, rel=1e-5) and want[0] < want[1] < want[2]


def process(rank: int, folder: str) -> None:
    """One of two processes, each with one image."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    teacher, student = pair(student_width=4)
    student.stem[1] = nn.Identity()  # statistics over a process's own images are no mean
    teacher.stem[1] = nn.Identity()
    images, labels = batch()
    torch.manual_seed(5)
    kd = Distiller(teacher, student, [Term("cpkd", "decoder.1"), Term("dkd", warm_up=4)], example=images)
    found = {"start": copy.deepcopy(kd.state_dict())}
    wrapped = nn.parallel.DistributedDataParallel(kd, static_graph=True)
    other = nn.parallel.DistributedDataParallel(copy.deepcopy(kd.student))
    with pytest.raises(ValueError, match="give the distiller the student itself, and DistributedDataParallel the"):
        Distiller(teacher, other, [Term("cpkd", "decoder.1")], example=images)
    with Distiller(teacher, other, [Term("dkd")]) as kd_inside:
        (other(images).sum() * 0 + kd_inside.loss(labels)).backward()
    optimiser = torch.optim.SGD(kd.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        logits = wrapped(images[rank : rank + 1])
        (F.cross_entropy(logits, labels[rank : rank + 1]) + kd.loss(labels[rank : rank + 1])).backward()
        optimiser.step()
    found["end"] = kd.state_dict()
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path) -> None:
    in_new_processes(
        f"import os, sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        f"import test_distiller; test_distiller.process(int(os.environ['RANK']), {str(tmp_path)!r})"
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_same(first["end"], second["end"], 0)
    teacher, student = pair(student_width=4)
    student.stem[1], teacher.stem[1] = nn.Identity(), nn.Identity()
    images, labels = batch()
    kd = Distiller(teacher, student, [Term("cpkd", "decoder.1"), Term("dkd", warm_up=4)], example=images)
    kd.load_state_dict(first["start"])
    optimiser = torch.optim.SGD(kd.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        (F.cross_entropy(kd(images), labels) + kd.loss(labels)).backward()
        optimiser.step()
    assert_same(first["end"], kd.state_dict(), 1e-5)
    assert (first["end"]["losses.0.0.adapter.weight"] != first["start"]["losses.0.0.adapter.weight"]).any()


def test_messages() -> None:
    teacher, student = pair(student_width=4)
    images, labels = batch()
    with pytest.raises(TypeError, match="use DistributedDataParallel"):
        Distiller(teacher, nn.DataParallel(student), [Term("kd")])
    for make, kind, message in (
        (lambda: Term("ckd"), ValueError, "loss: got 'ckd', want a loss or one of at, boundary_kd"),
        (lambda: Term(F.mse_loss), TypeError, "want a loss such as DKDLoss"),
        (lambda: Term(losses.KDLoss(), settings={"temperature": 2}), ValueError, "this one is made already"),
        (lambda: Term("kd", weight=-1), ValueError, "weight: got -1, want a finite number of at least 0"),
        (lambda: Term("kd", warm_up=-1), ValueError, "warm_up: got -1, want a number of steps"),
        (lambda: Term("dkd"), TypeError, r"terms: got Term, want a list of Terms, such as \[Term\('dkd'\)\]"),
        (lambda: ["dkd"], TypeError, "terms: got 'dkd' among them, want a list of Terms"),
        (list, ValueError, "got 1 teachers and 0 terms, want at least one of each"),
        (
            lambda: [Term("at", "decoder.3")],
            ValueError,
            r"student: there is no layer 'decoder.3'; near it: decoder\.\d",
        ),
        (lambda: [Term("at", "head", "heads")], ValueError, "teacher: there is no layer 'heads'; near it: head"),
        (lambda: [Term("at", "decoder.*")], ValueError, r"'decoder.\*' means 2 layers, decoder.0, decoder.1; want one"),
        (lambda: [Term("kd", student_features="decoder.*")], ValueError, "KDLoss takes no list of layers"),
        (lambda: [Term("emkd")], ValueError, r"EMKDLoss compares lists of layers; .*student_features="),
        (lambda: [Term("ifvd", "head")], ValueError, "loss 'ifvd': needs num_classes; .*example=images"),
        (lambda: [Term(nn.ReLU())], TypeError, "ReLU: forward takes 1 arguments"),
    ):
        with pytest.raises(kind, match=message):
            Distiller(teacher, student, make())
    with pytest.raises(ValueError, match=r"one network; the teacher needs a copy: copy.deepcopy\(student\)"):
        Distiller(student, student, [Term("kd")])
    other = Net(4)
    other.stem = student.stem
    with pytest.raises(ValueError, match=r"share the student's 'stem': .*copy.deepcopy\(teacher\)"):
        Distiller([teacher, other], student, [Term("kd")])
    Distiller([teacher, copy.deepcopy(other)], student, [Term("kd")]).close()
    for shared, fine in ((nn.ReLU(), True), (nn.Dropout(), False)):
        both = (nn.Sequential(nn.Conv2d(1, 2, 1), shared) for _ in range(2))
        if fine:
            Distiller(*both, [Term("kd")]).close()
        else:
            with pytest.raises(ValueError, match="share the student's '1'"):
                Distiller(*both, [Term("kd")])
    kd = Distiller(teacher, student, [Term("cwd", "decoder.0")])
    kd(images)
    with pytest.raises(ValueError, match=r"8 and 12 channels.*Distiller\(..., example=images\)"):
        kd.loss(labels)
    one_class = Distiller(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1), [Term("kd")])
    one_class(images)
    with pytest.raises(ValueError, match=r"got 1 class, want at least 2; .*activation=\"sigmoid\""):
        one_class.loss(labels)
    student.extra = nn.ReLU()
    kd = Distiller(teacher, student, [Term("at", "extra", "head")])
    kd(images)
    with pytest.raises(RuntimeError, match="student: the layer 'extra' did not run with the network"):
        kd.loss(labels)
