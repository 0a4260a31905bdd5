"""Losses by name: how they are written, which layers they take where none is named, and every one of them at work."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from medkd_fast.losses.catalogue import LOSSES
from medkd_fast.training.distillation import (
    DEFAULT_WEIGHTS,
    LossTerm,
    check_terms,
    make_distiller,
    parse_loss,
    resolve,
)
from medkd_fast.training.errors import WrongUse
from medkd_fast.training.networks import build_network, check_network

CLASSES = 4
STUDENTS = {
    2: ("BasicUNet", {"features": [4, 6, 8, 10, 12, 5]}, 32),
    3: ("UNet", {"channels": [4, 6, 8], "strides": [2, 2]}, 16),
}


@lru_cache
def network(name: str, arguments: str, dims: int, size: int):
    patch = (size,) * dims
    made = build_network(name, eval(arguments), dims=dims, in_channels=1, num_classes=CLASSES, patch=patch, seed=1)
    return made, check_network(made, name, (2, 1, *patch), CLASSES)


def student(dims: int = 2):
    name, arguments, size = STUDENTS[dims]
    return network(name, repr(arguments), dims, size)


def teacher(dims: int = 2):
    return network("SegResNet", "{}", dims, STUDENTS[dims][2])


def resolved(text: str, dims: int = 2) -> LossTerm:
    return resolve([parse_loss(text)], student(dims)[1], teacher(dims)[1])[0]


def test_how_losses_are_written():
    assert parse_loss("kd") == LossTerm("kd")
    assert parse_loss("cpkd:0.5") == LossTerm("cpkd", 0.5)
    assert parse_loss("dmd:feature_weight=0.5") == LossTerm("dmd", settings={"feature_weight": 0.5})
    assert parse_loss("sdd:2,scales=1,2,4,base=kd") == LossTerm("sdd", 2, settings={"scales": [1, 2, 4], "base": "kd"})
    assert parse_loss("sdd:2:base=kd") == LossTerm("sdd", 2, settings={"base": "kd"})
    term = parse_loss("at:weight=9,student=up.1,up.10,teacher=a,b,warm_up=100,p=4")
    assert term == LossTerm("at", 9, ("up.1", "up.10"), ("a", "b"), 100, {"p": 4})
    for t in (term, LossTerm("kd")):
        assert LossTerm.from_dict(t.to_dict()) == t
    assert LossTerm.from_dict("cpkd:0.5") == LossTerm("cpkd", 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mse", "unknown distillation loss 'mse': choose from cpkd, dmd, kd"),
        ("kd:x", "the weight of kd must be a number, got 'x'"),
        ("kd:-1", "the weight of kd must be positive and finite, got -1"),
        ("kd:0", "the weight of kd must be positive"),
        ("kd:1,2", "the weight of kd must be a number"),
        (
            "kd:temprature=2",
            "kd has no setting 'temprature': choose from weight, student, teacher, warm_up, temperature",
        ),
        ("dmd:num_classes=2", "dmd has no setting 'num_classes'"),
        ("kd:warm_up=-1", "warm_up of kd must be a number of steps"),
        ("kd:temperature=1,temperature=2", "temperature is given twice"),
        ("kd:temperature=-1", "kd: temperature: got -1, want a number above 0"),
        ("kd:temperature=hot", "kd: temperature: got 'hot', want a finite number"),
        ("dist:temperature=0", "dist: temperature: got 0, want a number above 0"),
        ("cpkd:relation=cosin", "cpkd: relation: got 'cosin', want one of cosine, pearson, gram"),
        ("skd:pool=1.5", "skd: pool: got 1.5, want a whole number"),
        ("dmd:projector=conv", "dmd: projector: got 'conv', want 'conv1x1' or 'transposed'"),
        ("sdd:scales=1", "sdd: scales: got 1, want whole numbers"),
    ],
)
def test_losses_that_are_written_wrongly(text, message):
    with pytest.raises(WrongUse, match=re.escape(message)):
        parse_loss(text)


def test_a_loss_twice_is_a_mistake_but_not_on_other_layers():
    with pytest.raises(WrongUse, match="the loss kd is given twice"):
        check_terms([LossTerm("kd"), LossTerm("kd", 2.0)])
    check_terms([LossTerm("at", student=("a",)), LossTerm("at", student=("b",))])


def test_default_weights_are_those_that_the_page_of_the_losses_names():
    page = (Path(__file__).parents[2] / "docs" / "losses.md").read_text(encoding="utf-8")
    assert set(DEFAULT_WEIGHTS) == set(LOSSES)
    for name, loss in LOSSES.items():
        (section,) = re.findall(rf"\n## {loss.__name__}\n(.*?)(?=\n## |\Z)", page, flags=re.DOTALL)
        (line,) = re.findall(r"\* \*Weight\*: (.*)", section)
        if name != "boundary_kd":  # which has KD's
            assert f"{DEFAULT_WEIGHTS[name]:g}" in re.findall(r"[\d.]*\d", line), (name, line)


def test_layers_where_none_is_named():
    assert resolved("kd") == LossTerm("kd", 1.0, settings={"temperature": 1.0})
    assert resolved("cpkd") == LossTerm("cpkd", 0.3, ("upcat_2",), ("up_layers.1",))
    assert resolved("dmd").student == ("upcat_4", "upcat_3", "upcat_2") and resolved("dmd").teacher == ()
    # the teacher has no layer of an eighth of the size: the nearest is a quarter
    assert resolved("emkd").teacher == ("up_layers.0", "up_layers.0", "up_layers.1")
    assert resolved("cwd") == LossTerm("cwd", 3.0)
    assert resolved("cwd:student=upcat_1") == LossTerm("cwd", 50.0, ("upcat_1",), ("up_layers.2",))
    assert resolved("cwd:7,student=upcat_1").weight == 7.0
    assert resolved("at:student=upcat_*").student == ("upcat_4", "upcat_3", "upcat_2", "upcat_1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("at:student=upcat_9", "there is no layer 'upcat_9'; near it: upcat_"),
        ("at:student=upcat_1,teacher=nothing", "the layers of the teacher for at: there is no layer 'nothing'"),
        (
            "at:student=upcat_1,upcat_2,teacher=up_layers.1",
            "at has 2 layers of the student (upcat_1, upcat_2) and 1 of the",
        ),
    ],
)
def test_layers_that_do_not_exist(text, message):
    with pytest.raises(WrongUse, match=re.escape(message)):
        resolved(text)


def test_where_no_layer_can_be_guessed_the_message_names_some():
    flat = network("HighResNet", "{}", 2, 32)[1]
    with pytest.raises(WrongUse, match=r"cpkd needs a layer of the student.*--loss cpkd:student=LAYER.*blocks.\d"):
        resolve([LossTerm("cpkd")], flat, teacher()[1])
    with pytest.raises(WrongUse, match="dmd needs a layer of the student"):
        resolve([LossTerm("dmd")], flat, teacher()[1])
    with pytest.raises(WrongUse, match="at needs a layer of the teacher"):
        resolve([LossTerm("at")], student()[1], flat)
    assert resolve([LossTerm("at", teacher=("blocks.5",), student=("upcat_2",))], student()[1], flat)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_teaches_another_architecture(name, dims):
    (net, seen), (its_teacher, its_seen) = student(dims), teacher(dims)
    terms = resolve([LossTerm(name)], seen, its_seen)
    kd = make_distiller(terms, student=net, teacher=its_teacher, surveys=(seen, its_seen), ignore_index=255, seed=0)
    with kd:
        generator = torch.Generator().manual_seed(0)
        image = torch.rand(2, 1, *seen.logits[2:], generator=generator)
        label = torch.randint(CLASSES, (2, 1, *seen.logits[2:]), generator=generator)
        label[:, :, :3] = 255
        net.zero_grad()
        kd.train()
        kd(image)
        kd.loss(label).backward()
        grads = {k: p.grad for k, p in net.named_parameters() if p.grad is not None}
        assert grads and all(g.isfinite().all() for g in grads.values())
        assert sum(g.abs().sum().item() for g in grads.values()) > 0
        assert all(p.grad is not None for p in kd.losses.parameters())  # or a distributed run would wait for it


@pytest.mark.parametrize("name", ["kd", "cwd", "dkd", "dist", "sdd", "dsd"])
def test_ignored_pixels_do_not_count(name):
    (net, seen), (its_teacher, its_seen) = student(), teacher()
    terms = resolve([LossTerm(name, settings={"pixel_weight": 0} if name == "dsd" else {})], seen, its_seen)
    image = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    label = torch.zeros(2, 1, 32, 32, dtype=torch.int64)
    label[:, :, 16:] = 255
    values = []
    for shift in (0.0, 100.0):
        noise = shift * (label == 255) * torch.rand(2, CLASSES, 32, 32)
        handle = net.register_forward_hook(lambda m, i, o, noise=noise: o + noise)
        with make_distiller(
            terms, student=net, teacher=its_teacher, surveys=(seen, its_seen), ignore_index=255, seed=0
        ) as kd:
            kd(image)
            kd.loss(label)
            values.append(kd.log()[name].item())
        handle.remove()
    assert values[1] == pytest.approx(values[0], rel=1e-5)


def test_what_a_loss_trains_along_comes_from_the_seed():
    (net, seen), (its_teacher, its_seen) = student(), teacher()
    terms = resolve([LossTerm("fitnet"), LossTerm("dmd")], seen, its_seen)
    made = []
    for _ in range(2):
        kd = make_distiller(
            terms, student=net, teacher=its_teacher, surveys=(seen, its_seen), ignore_index=None, seed=7
        )
        made.append([p.clone() for p in kd.losses.parameters()])
        kd.close()
        torch.rand(3)
    assert len(made[0]) == 1 + 2 * 3 and all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_what_the_distiller_refuses_is_a_clear_error():
    net, seen = student()
    terms = resolve([parse_loss("kd")], seen, seen)
    with pytest.raises(WrongUse, match="distillation: teacher and student are one network"):
        make_distiller(terms, student=net, teacher=net, surveys=(seen, seen), ignore_index=None, seed=0)


def test_writing_a_loss_down_draws_no_random_number():
    state = torch.get_rng_state()
    parse_loss("dmd")  # which has projectors with weights
    assert torch.equal(torch.get_rng_state(), state)
