"""nnU-Net's own commands train and predict with the trainer; what it computes is compared with what it should."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from nnunet_sets import HERE, IGNORE, Trained, labels_with_a_teacher, nnunet, regions_by_the_example

pytest.importorskip("nnunetv2", reason="nnU-Net has an environment of its own: make test-nnunet")

from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from medkd_fast.integrations import nnunet as integration
from medkd_fast.losses import KDLoss

TRAINERS = os.pathsep.join([str(Path(integration.__file__).parent / "nnunet_path"), str(HERE / "trainers")])


@pytest.fixture(scope="session")
def labels_set(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return labels_with_a_teacher(tmp_path_factory.mktemp("labels"))


@pytest.fixture(scope="session")
def regions_set(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return regions_by_the_example(tmp_path_factory.mktemp("regions"))


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.delenv(integration.LOSS, raising=False)
    yield monkeypatch


def trainer(
    trained: Trained, environment: pytest.MonkeyPatch, teacher: Path | None = None
) -> integration.nnUNetTrainerDistill:
    """A trainer in this process, as nnU-Net makes one."""
    for kind in ("raw", "preprocessed", "results"):
        environment.setenv(f"nnUNet_{kind}", str(trained.root / kind))
    environment.setenv("nnUNet_extTrainer", TRAINERS)
    environment.setenv(integration.TEACHER, str(teacher or trained.teacher))
    folder = trained.root / "preprocessed" / trained.name
    plans = json.loads((folder / f"{trained.plans}.json").read_text()) | {"continue_training": False}
    dataset = json.loads((trained.root / "raw" / trained.name / "dataset.json").read_text())
    made = integration.nnUNetTrainerDistill(plans, trained.configuration, 0, dataset, torch.device("cpu"))
    made.initialize()
    return made


def batch(student: integration.nnUNetTrainerDistill) -> dict[str, object]:
    """What nnU-Net's loader gives."""
    student.dataloader_train, student.dataloader_val = student.get_dataloaders()
    return next(student.dataloader_train)


def check_student(trained: Trained, predictions: Path) -> None:
    """A checkpoint of nnU-Net's own, and a prediction on the grid of its image."""
    model = trained.results / f"nnUNetTrainerDistillTiny__{trained.plans}__{trained.configuration}"
    checkpoint = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    assert not [name for name in checkpoint["network_weights"] if not name.startswith(("encoder.", "decoder."))]
    prediction = sitk.ReadImage(str(predictions / "case_0.nii.gz"))
    image = sitk.ReadImage(str(trained.root / "raw" / trained.name / "imagesTs" / "case_0_0000.nii.gz"))
    assert prediction.GetSize() == image.GetSize() and prediction.GetSpacing() == image.GetSpacing()
    assert set(np.unique(sitk.GetArrayFromImage(prediction))) <= {0, 1, 2, 3}


def test_a_teacher_of_other_plans_and_nnunets_own_prediction(labels_set: Trained, tmp_path: Path) -> None:
    said = nnunet(
        labels_set.root,
        *(
            "nnUNetv2_train",
            labels_set.number,
            labels_set.configuration,
            0,
            "-device",
            "cpu",
            "-tr",
            "nnUNetTrainerDistillTiny",
        ),
        trainers=TRAINERS,
        MEDKD_FAST_TEACHER=str(labels_set.teacher),
        MEDKD_FAST_LOSS="kd:0.5:temperature=1 cwd:3",
    )
    assert "distillation kd" in said and "distillation cwd" in said and "teacher: " in said
    # no folder of trainers, no teacher: nnU-Net alone
    nnunet(
        labels_set.root,
        *("nnUNetv2_predict", "-i", labels_set.root / "raw" / labels_set.name / "imagesTs", "-o", tmp_path),
        *("-d", labels_set.number, "-c", labels_set.configuration, "-f", 0, "-tr", "nnUNetTrainerDistillTiny"),
        *("-device", "cpu", "--disable_tta", "-npp", 1, "-nps", 1),
    )
    check_student(labels_set, tmp_path)


def test_the_example(regions_set: Trained) -> None:
    check_student(regions_set, regions_set.root / "out")
    (log,) = (regions_set.results / "nnUNetTrainerDistillTiny__nnUNetPlans__3d_fullres" / "fold_0").glob("*log*.txt")
    assert "distillation kd" in log.read_text()


@pytest.mark.parametrize("kind", ["labels", "regions"])
def test_loss_is_nnunets_plus_that_of_every_output(
    kind: str, request: pytest.FixtureRequest, environment: pytest.MonkeyPatch
) -> None:
    trained: Trained = request.getfixturevalue(f"{kind}_set")
    environment.setenv(integration.LOSS, "kd:0.5:temperature=2")
    student = trainer(trained, environment)
    plain = student.loss
    one = batch(student)
    teacher, loss = integration.Teacher(student), integration.Distillation(student)
    data, targets = one["data"], one["target"]
    assert isinstance(data, torch.Tensor) and isinstance(targets, list)
    for target in targets:  # a strip to ignore, wherever the loader has drawn the patch
        target[..., : target.shape[-1] // 4] = IGNORE if kind == "labels" else 0
        if kind == "regions":
            target[:, -1:, ..., : target.shape[-1] // 4] = 1
    outputs = student.network(data)
    assert len(outputs) > 1
    assert loss(outputs, targets) == plain(outputs, targets)  # as long as no teacher has spoken: the validation

    loss.teacher_logits = teacher(data).detach()
    expected = plain(outputs, targets)
    for scale, output, target in zip(plain.weight_factors, outputs, targets, strict=True):
        # of other plans the logits are coarser than the finest output; to coarser outputs they are averaged
        coarser = loss.teacher_logits.shape[2] < output.shape[2]
        mode = {"mode": "bilinear", "align_corners": False} if coarser else {"mode": "area"}
        logits = F.interpolate(loss.teacher_logits, size=output.shape[2:], **mode)
        if kind == "labels":
            p, q = (F.log_softmax(x / 2, 1) for x in (logits, output))
            divergence = (p.exp() * (p - q)).sum(1)
            counts = target[:, 0] != IGNORE
        else:
            p, q = logits / 2, output / 2
            of_heads = torch.sigmoid(p) * (F.logsigmoid(p) - F.logsigmoid(q))
            of_heads = of_heads + torch.sigmoid(-p) * (F.logsigmoid(-p) - F.logsigmoid(-q))
            divergence, counts = of_heads.mean(1), ~target[:, -1].bool()
        assert 0 < counts.sum() < counts.numel()
        expected = expected + 0.5 * scale * 4 * divergence[counts].mean()
    torch.testing.assert_close(loss(outputs, targets), expected, rtol=1e-4, atol=1e-5)


def test_train_step_learns_from_the_teacher(labels_set: Trained, environment: pytest.MonkeyPatch) -> None:
    environment.setenv(integration.LOSS, "kd:10:temperature=1")
    student = trainer(labels_set, environment)
    one = batch(student)
    student.teacher, student.loss = integration.Teacher(student), integration.Distillation(student)
    student.distillation = student.loss
    student.network.train()
    for _ in range(6):
        student.train_step(one)
    seen = [value.item() for value in student.distillation.seen["kd"]]
    assert seen[-1] < 0.9 * seen[0], seen
    assert student.distillation.teacher_logits is None
    assert student.distillation.means()["kd"] == pytest.approx(sum(seen) / 6) and not student.distillation.means()


def test_teacher_of_the_same_plans_is_the_network(regions_set: Trained, environment: pytest.MonkeyPatch) -> None:
    student = trainer(regions_set, environment)
    model = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False)
    model.initialize_from_trained_model_folder(str(regions_set.teacher), (0,), "checkpoint_final.pth")
    data = torch.randn(1, 1, *student.configuration_manager.patch_size)
    torch.testing.assert_close(integration.Teacher(student)(data), model.network.eval()(data), rtol=0, atol=0)


def test_teacher_of_other_plans_sees_its_own_spacing_and_intensities(
    labels_set: Trained, environment: pytest.MonkeyPatch
) -> None:
    """nnU-Net itself, predicting a case from the file, is the witness: its logits at the places that ours are for."""
    student = trainer(labels_set, environment)
    teacher = integration.Teacher(student)
    assert teacher.scale == pytest.approx([0.8, 0.8]) and teacher.intensities is not None
    ours = student.plans_manager.foreground_intensity_properties_per_channel["0"]
    hounsfield = torch.linspace(ours["percentile_00_5"], ours["percentile_99_5"], 64 * 64).reshape(1, 1, 64, 64)
    plans = json.loads((labels_set.teacher / "plans.json").read_text())
    theirs = plans["foreground_intensity_properties_per_channel"]["0"]
    assert theirs["mean"] != ours["mean"]
    expected = (hounsfield.clamp(theirs["percentile_00_5"], theirs["percentile_99_5"]) - theirs["mean"]) / theirs["std"]
    normalised = (hounsfield - ours["mean"]) / ours["std"]
    torch.testing.assert_close(teacher.intensities(normalised), expected, rtol=1e-4, atol=1e-4)

    small = F.interpolate(expected, size=(51, 51), mode="bilinear", align_corners=False)
    steps = np.prod(plans["configurations"]["2d"]["architecture"]["arch_kwargs"]["strides"], axis=0)
    padded = F.pad(small, (0, -51 % int(steps[1]), 0, -51 % int(steps[0])))
    logits = teacher.network(padded)[..., :51, :51]
    torch.testing.assert_close(teacher(normalised), logits, rtol=1e-3, atol=1e-3)


def test_wrong_teacher(
    labels_set: Trained, regions_set: Trained, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    student = trainer(labels_set, environment)
    for named, said in (
        (tmp_path, "no folder of a trained nnU-Net"),
        (labels_set.teacher / "fold_3", "name one of its trained folds: fold_0"),
        (regions_set.teacher, "the student's labels are"),
    ):
        environment.setenv(integration.TEACHER, str(named))
        with pytest.raises(ValueError, match=said):
            integration.Teacher(student)
    environment.delenv(integration.TEACHER)
    with pytest.raises(ValueError, match="MEDKD_FAST_TEACHER is not set"):
        integration.Teacher(student)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kdd", "want a loss or one of"),
        ("kd:heavy", "could not convert"),
        ("kd:1:temperature=hot", "malformed"),
        ("dmd", "compares the networks' outputs"),
        ("dist", "sigmoid heads"),
        ("fitnet:1:student_channels=2,teacher_channels=3", "trains a projection"),
    ],
)
def test_wrong_loss(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        integration.make_loss(integration.parse_terms(text)[0], heads=3, has_regions=True)


def test_a_setting_may_be_a_sequence() -> None:
    (term,) = integration.parse_terms("sdd:2:scales=(1,2,4),temperature=3")
    assert (term.weight, term.settings) == (2.0, {"scales": (1, 2, 4), "temperature": 3})


def test_regions_take_the_losses_of_sigmoid_heads() -> None:
    (term,) = integration.parse_terms("kd:2:temperature=3")
    loss = integration.make_loss(term, heads=2, has_regions=True)
    assert isinstance(loss, KDLoss) and (loss.activation, loss.temperature, term.weight) == ("sigmoid", 3, 2.0)


def test_trainer_with_a_network_of_its_own_keeps_its_name(
    labels_set: Trained, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Then nnU-Net needs the trainer to build the network."""

    class Own(integration.nnUNetTrainerDistill):
        @staticmethod
        def build_network_architecture(*args: object, **kwargs: object) -> torch.nn.Module:
            return nnUNetTrainer.build_network_architecture(*args, **kwargs)

    student = trainer(labels_set, environment)
    student.__class__ = Own
    student.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=False)["trainer_name"] == "Own"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]
