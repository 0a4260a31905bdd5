"""What a step computes: the task loss, deep supervision, the weighted parts, and a teacher that stays as it is."""

from __future__ import annotations

import pytest
import torch
from monai.losses import DiceCELoss

from medkd_fast.training.module import DiceCE, RecordedTeacher, SegmentationModule, mean_dice
from medkd_fast.training.networks import build_network
from medkd_fast.training.runs import build_module, load_run, plan_run


def logits_and_labels(shape=(2, 4, 6, 7)):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator, requires_grad=True)
    return logits, torch.randint(shape[1], (shape[0], 1, *shape[2:]), generator=generator)


@pytest.mark.parametrize("shape", [(2, 4, 6, 7), (1, 3, 4, 5, 6)])
def test_the_task_loss_is_monais_where_nothing_is_ignored(shape):
    logits, label = logits_and_labels(shape)
    ours = DiceCE(shape[1])(logits, label)
    (our_grad,) = torch.autograd.grad(ours, logits)
    theirs = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False, batch=True)(logits, label)
    (their_grad,) = torch.autograd.grad(theirs, logits)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-5, atol=1e-8)


def test_ignored_pixels_are_as_if_they_were_not_there():
    logits, label = logits_and_labels()
    label[:, :, 4:] = 255
    whole = DiceCE(4, ignore_label=255)(logits, label)
    (gradient,) = torch.autograd.grad(whole, logits)
    assert whole.item() == pytest.approx(DiceCE(4)(logits[:, :, :4], label[:, :, :4]).item(), rel=1e-6)
    assert gradient[:, :, 4:].abs().max() == 0 and gradient[:, :, :4].abs().min() > 0
    nothing = DiceCE(4, ignore_label=255)(logits, torch.full_like(label, 255))
    (gradient,) = torch.autograd.grad(nothing, logits)
    assert nothing.isfinite() and gradient.abs().max() == 0


def module_of(network, **more) -> SegmentationModule:
    return SegmentationModule(
        network, total_steps=10, learning_rate=0.01, num_classes=4, dims=2, patch=(32, 32), **more
    )


def test_outputs_at_several_scales_are_all_taught_the_finest_most():
    arguments = {"init_filters": 8, "dsdepth": 3, "norm": "instance"}
    network = build_network("SegResNetDS", arguments, dims=2, in_channels=1, num_classes=4, patch=(32, 32), seed=0)
    module = module_of(network).train()
    image, label = torch.rand(2, 1, 32, 32), torch.randint(4, (2, 1, 32, 32))
    outputs = network(image)
    assert [x.shape[2] for x in outputs] == [32, 16, 8]
    expected = sum(
        weight * DiceCE(4)(x, torch.nn.functional.interpolate(label.float(), x.shape[2:], mode="nearest-exact"))
        for weight, x in zip((1, 0.5, 0.25), outputs, strict=True)
    )
    assert module.losses((image, label))[1]["task"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_loss_is_the_task_and_the_weighted_parts(config, teacher):
    losses = ("cpkd:0.5", "dmd:0.25,feature_weight=0.5", "kd:2,temperature=3")
    run = plan_run(config.resolved(losses=losses, teacher=str(teacher)))
    module, batch = build_module(run).train(), next(iter(run.loader()))
    loss, parts = module.losses(batch)
    assert {k for k in parts if "/" in k} == {"cpkd/channel", "cpkd/pixel", "dmd/features", "dmd/logits", "kd/kl"}
    expected = parts["task"] + 0.5 * (parts["cpkd/channel"] + parts["cpkd/pixel"])
    expected += 0.25 * (0.5 * parts["dmd/features"] + parts["dmd/logits"]) + 2 * parts["kd/kl"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)  # sums of float32 in another order
    assert all(v.item() > 0 and not v.requires_grad for v in parts.values())


def test_the_teacher_answers_unchanged(config, teacher):
    run = plan_run(config.resolved(losses=("cpkd", "dkd"), teacher=str(teacher)))
    module, batch = build_module(run).train(), next(iter(run.loader()))
    (network,) = module.model.teachers
    before = {k: v.clone() for k, v in network.state_dict().items()}
    module.losses(batch)[0].backward()
    assert not network.training and all(p.grad is None for p in network.parameters())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert torch.equal(network(batch[0]), load_run(teacher).network(batch[0]))
    assert not any(k.startswith("model.teacher") for k in module.state_dict())
    learned = {id(p) for group in module.configure_optimizers()["optimizer"].param_groups for p in group["params"]}
    assert learned == {id(p) for p in module.model.parameters()} and len(learned) > len(
        list(module.network.parameters())
    )


def test_students_start_alike_whatever_helps_them(config, teacher):
    alone = build_module(plan_run(config)).network.state_dict()
    helped = build_module(plan_run(config.resolved(losses=("dmd",), teacher=str(teacher)))).network.state_dict()
    assert alone.keys() == helped.keys() and all(torch.equal(alone[k], helped[k]) for k in alone)


def test_recorded_logits_are_what_the_student_learns_from(config, teacher):
    run = plan_run(config.resolved(losses=("kd",), teacher=str(teacher), cache_teacher=True))
    module = build_module(run).train()
    image, label = torch.rand(2, 1, 32, 32), torch.randint(4, (2, 1, 32, 32))
    own = module.network(image).detach()
    (stand_in,) = module.model.teachers
    assert isinstance(stand_in, RecordedTeacher)
    assert module.losses((image, label, own))[1]["kd"].item() == pytest.approx(0, abs=1e-6)
    assert module.losses((image, label, 2 * own))[1]["kd"].item() > 1e-3


def test_dice_of_volumes():
    # overlap, predicted, labelled: class 1 is 0.5 in one volume and not labelled in the other, class 2 is 1 and 0
    counts = torch.tensor([[[9, 2, 3], [9, 4, 3], [9, 4, 3]], [[9, 0, 0], [9, 7, 0], [9, 0, 5]]])
    assert mean_dice(counts) == pytest.approx((0.5 + 0.5) / 2)


def test_a_compiled_network_teaches_the_same(config, teacher, monkeypatch):
    """Through the compiler up to its code generation, which takes a minute; layers are caught in the compiled forward."""
    compiler = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiler(self, backend="aot_eager"))
    found = []
    for wanted in (False, True):
        run = plan_run(config.resolved(losses=("at", "kd"), teacher=str(teacher)))
        module, batch = build_module(run).train(), next(iter(run.loader()))
        module.compile_network(wanted)
        loss = module.losses(batch)[0]
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in module.network.parameters())])
        assert list(module.network.state_dict()) == list(run.network.state_dict())
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-5)
