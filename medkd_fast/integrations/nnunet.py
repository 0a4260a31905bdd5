"""nnU-Net v2: `nnUNetTrainerDistill`, a trainer whose student also learns from a trained nnU-Net.

    eval "$(medkd-fast nnunet-path)"        # tells nnU-Net where the trainer is
    export MEDKD_FAST_TEACHER=$nnUNet_results/Dataset003_Liver/nnUNetTrainer__nnUNetResEncUNetLPlans__3d_fullres
    nnUNetv2_train 3 3d_fullres 0 -tr nnUNetTrainerDistill
    nnUNetv2_predict -d 3 -c 3d_fullres -f 0 -tr nnUNetTrainerDistill -i IN -o OUT

The plans decide what the student is; the teacher can be any trained model of the same labels and channels, also of other
plans. Everything else, augmentation, deep supervision, mixed precision, clipping, is nnU-Net's own.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, autocast, nn

from medkd_fast.distiller import Term
from medkd_fast.losses.calls import call_of
from medkd_fast.losses.catalogue import LOSSES, build
from medkd_fast.losses.common import LINEAR, to_size

TEACHER, LOSS = "MEDKD_FAST_TEACHER", "MEDKD_FAST_LOSS"
#: What `MEDKD_FAST_LOSS` means when it is not set.
DEFAULT_LOSS = "kd:1:temperature=1"
#: Losses that take a softmax over the classes, which the sigmoid heads of regions have not.
SOFTMAX_OVER_CLASSES = ("boundary_kd", "dist", "sdd")
IGNORED = -100


class nnUNetTrainerDistill(nnUNetTrainer):  # nnU-Net's way to write a trainer's name
    """nnU-Net's trainer with distillation losses added to its own.

    MEDKD_FAST_TEACHER is the folder of a trained model, whose fold is the student's (its validation cases the teacher has not
    seen either), or the folder of one of its folds. MEDKD_FAST_LOSS is `name[:weight][:setting=value,...]`, several separated
    by spaces; the names are those of `medkd_fast.losses.available()`. A trainer of your own derives from this one and
    says them in `terms`; together with another trainer it is `class Mine(nnUNetTrainerDistill, nnUNetTrainerDA5)`.

    Every output of the student, with deep supervision several, is compared with the teacher's logits brought to its size, and
    weighs what nnU-Net's own loss gives it. The ignore label counts nowhere. With regions the losses are those of sigmoid heads.

    The checkpoints hold the student alone and name nnU-Net's own trainer, so that `nnUNetv2_predict` needs nothing of this.
    """

    def terms(self) -> list[Term]:
        """The losses and their weights, between the networks' outputs."""
        return parse_terms(os.environ.get(LOSS) or DEFAULT_LOSS)

    def on_train_start(self) -> None:
        if not self.was_initialized:
            self.initialize()
        self.teacher = Teacher(self)
        self.distillation = Distillation(self)
        self.loss = self.distillation
        super().on_train_start()

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        data = batch["data"].to(self.device, non_blocking=True)
        with autocast(self.device.type, enabled=self.device.type == "cuda"), torch.no_grad():
            self.distillation.teacher_logits = self.teacher(data)
        result = super().train_step({**batch, "data": data})
        self.distillation.teacher_logits = None  # the validation's loss is nnU-Net's
        return cast("dict[str, Any]", result)

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        super().on_train_epoch_end(train_outputs)
        for name, value in self.distillation.means().items():
            self.print_to_log_file("distillation", name, np.round(value, decimals=4))

    def save_checkpoint(self, filename: str) -> None:
        super().save_checkpoint(filename)
        if self.local_rank or self.disable_checkpointing:
            return
        if type(self).build_network_architecture is nnUNetTrainer.build_network_architecture:
            checkpoint = torch.load(filename, map_location="cpu", weights_only=False)
            checkpoint["trainer_name"] = nnUNetTrainer.__name__
            torch.save(checkpoint, f"{filename}.partial")
            os.replace(f"{filename}.partial", filename)


class Teacher:
    """The logits of a trained nnU-Net on the student's batches: called with [B, C, *S], gives [B, heads, *S].

    Of other plans the teacher may know other intensities and another voxel spacing: images are brought to those, logits back.
    """

    def __init__(self, student: nnUNetTrainer) -> None:
        folder, fold = teacher_folder(os.environ.get(TEACHER), student.fold)
        model = nnUNetPredictor(device=student.device, perform_everything_on_device=student.device.type == "cuda")
        model.initialize_from_trained_model_folder(str(folder), (fold,), "checkpoint_final.pth")
        self.network = model.network.to(student.device).eval().requires_grad_(False)
        ours, theirs = student.configuration_manager, model.configuration_manager
        check_same("labels", student.label_manager.label_dict, model.label_manager.label_dict)
        check_same("channel_names", _channels(student.dataset_json), _channels(model.dataset_json))
        check_same("number of dimensions", len(ours.patch_size), len(theirs.patch_size))
        check_same("order of the axes", student.plans_manager.transpose_forward, model.plans_manager.transpose_forward)
        if theirs.previous_stage_name is not None:
            raise ValueError(
                f"{TEACHER}: {folder} is the second stage of a cascade; want a model that sees images alone"
            )
        self.channels = len(_channels(model.dataset_json))  # a student of a cascade has more
        self.scale = [a / b for a, b in zip(ours.spacing, theirs.spacing, strict=True)]
        self.multiple = np.prod(theirs.pool_op_kernel_sizes, axis=0).tolist()
        self.intensities = intensity_change(student.plans_manager, ours, model.plans_manager, theirs)
        student.print_to_log_file(f"teacher: {folder}, fold {fold}, spacing {list(theirs.spacing)}")

    def __call__(self, data: Tensor) -> Tensor:
        """[B, C, *S] of the student's plans -> logits [B, heads, *S], or, where the spacings differ, of another size."""
        images = data[:, : self.channels]
        if self.intensities is not None:
            images = self.intensities(images)
        size = images.shape[2:]
        theirs = [max(1, round(n * scale)) for n, scale in zip(size, self.scale, strict=True)]
        if theirs != list(size):
            images = F.interpolate(images, size=theirs, mode=LINEAR[len(size)], align_corners=False)
        missing = [-n % multiple for n, multiple in zip(theirs, self.multiple, strict=True)]
        padding = [n for m in reversed(missing) for n in (0, m)]  # after the image; F.pad begins with the last axis
        logits = self.network(F.pad(images, padding))
        inside = (..., *map(slice, theirs))
        return cast(Tensor, logits[inside])


class Distillation(nn.Module):
    """nnU-Net's loss plus, while the teacher's logits are known, weight · distillation loss of every output."""

    def __init__(self, student: nnUNetTrainer) -> None:
        super().__init__()
        labels = student.label_manager
        self.nnunet = student.loss
        self.scales = getattr(self.nnunet, "weight_factors", (1.0,))
        self.has_regions, self.ignore_label = labels.has_regions, labels.ignore_label
        self.terms = student.terms()
        heads = labels.num_segmentation_heads
        self.losses = nn.ModuleList(make_loss(term, heads, labels.has_regions) for term in self.terms)
        self.losses.to(student.device)
        names = [term.name or type(loss).__name__ for term, loss in zip(self.terms, self.losses, strict=True)]
        self.names = [name if names.count(name) == 1 else f"{name} {i + 1}" for i, name in enumerate(names)]
        self.teacher_logits: Tensor | None = None
        self.seen: defaultdict[str, list[Tensor]] = defaultdict(list)

    def forward(self, output: Any, target: Any) -> Tensor:
        total: Tensor = self.nnunet(output, target)
        if self.teacher_logits is None:
            return total
        outputs, targets = (output, target) if isinstance(output, (list, tuple)) else ((output,), (target,))
        for name, term, loss in zip(self.names, self.terms, self.losses, strict=True):
            value = sum(
                scale * self.compare(loss, maps, labels)
                for scale, maps, labels in zip(self.scales, outputs, targets, strict=True)
                if scale
            )
            total = total + term.weight * value
            self.seen[name].append(cast(Tensor, value).detach())
        return total

    def compare(self, loss: nn.Module, student: Tensor, target: Tensor) -> Tensor:
        assert self.teacher_logits is not None
        teacher = to_size(self.teacher_logits, student.shape[2:])
        labels = (self.labels(target),) if call_of(type(loss)).target else ()
        return cast(Tensor, loss(student, teacher, *labels))

    def labels(self, target: Tensor) -> Tensor:
        """[B, 1, *S] as the losses take labels. Of regions, which have no one label, only what is to be ignored."""
        if not self.has_regions:
            target = target.long()
            return target if self.ignore_label is None else torch.where(target == self.ignore_label, IGNORED, target)
        if self.ignore_label is None:
            return torch.zeros_like(target[:, :1], dtype=torch.long)
        return torch.where(target[:, -1:] > 0, IGNORED, 0)

    def means(self) -> dict[str, float]:
        """The losses of the epoch, before their weights."""
        means = {name: torch.stack(values).mean().item() for name, values in self.seen.items()}
        self.seen.clear()
        return means


def parse_terms(text: str) -> list[Term]:
    """`name[:weight][:setting=value,...]`, several separated by spaces.

    >>> parse_terms("kd:0.5:temperature=2 cpkd")[0].settings
    {'temperature': 2}
    """
    terms = []
    for word in text.split():
        name, *rest = word.split(":")
        settings: dict[str, Any] = {}
        weight = 1.0
        try:
            for part in rest:
                if "=" in part:
                    pairs = (pair.split("=") for pair in re.split(r",(?=\w+=)", part))  # values have commas too
                    settings |= {key: ast.literal_eval(value) for key, value in pairs}
                else:
                    weight = float(part)
            terms.append(Term(name, weight=weight, name=name, settings=settings))
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"{LOSS}: got {word!r}, want name[:weight][:setting=value,...]: {error}") from error
    return terms


def make_loss(term: Term, heads: int, has_regions: bool) -> nn.Module:
    """The loss of a term between two networks' outputs."""
    kind = LOSSES[term.loss] if isinstance(term.loss, str) else type(term.loss)
    name = term.loss if isinstance(term.loss, str) else kind.__name__
    if term.student or term.teacher or term.warm_up or call_of(kind).needs_lists:
        raise ValueError(
            f"{name}: nnUNetTrainerDistill compares the networks' outputs, with a constant weight; use another loss"
        )
    loss = term.loss if isinstance(term.loss, nn.Module) else _built(term.loss, term.settings, heads, has_regions)
    if any(True for _ in loss.parameters()):
        raise ValueError(f"{name}: trains a projection, which nnU-Net's optimiser does not know; use another loss")
    return loss


def _built(name: str, settings: Mapping[str, Any], heads: int, has_regions: bool) -> nn.Module:
    """The loss of that name, with what nnU-Net's labels say."""
    if has_regions and name in SOFTMAX_OVER_CLASSES:
        raise ValueError(
            f"{name}: takes a softmax over the classes, and regions have sigmoid heads; use kd, dkd or cwd"
        )
    asked = inspect.signature(LOSSES[name]).parameters
    known: dict[str, Any] = {"num_classes": heads, "ignore_index": IGNORED}
    if has_regions:
        known["activation"] = "sigmoid"
    return build(name, **{key: value for key, value in known.items() if key in asked} | dict(settings))


def teacher_folder(named: str | None, fold: int | str) -> tuple[Path, int | str]:
    """The folder of the trained model and its fold."""
    if not named:
        raise ValueError(
            f"{TEACHER} is not set: export {TEACHER}=$nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION, the folder of a "
            "trained model, or one of its fold_... folders"
        )
    folder = Path(named)
    if folder.name.startswith("fold_"):
        folder, number = folder.parent, folder.name.removeprefix("fold_")
        fold = int(number) if number.isdigit() else number
    if not (folder / "plans.json").is_file() or not (folder / "dataset.json").is_file():
        raise ValueError(f"{TEACHER}: {named} is no folder of a trained nnU-Net: it has no plans.json and dataset.json")
    if not (folder / f"fold_{fold}" / "checkpoint_final.pth").is_file():
        trained = sorted(path.parent.name for path in folder.glob("fold_*/checkpoint_final.pth"))
        raise ValueError(
            f"{TEACHER}: {folder} has no fold_{fold}/checkpoint_final.pth; "
            + (
                f"name one of its trained folds: {', '.join(trained)}"
                if trained
                else "no fold of it is trained to the end"
            )
        )
    return folder, fold


def check_same(what: str, ours: Any, theirs: Any) -> None:
    if ours != theirs:
        raise ValueError(f"{TEACHER}: the student's {what} are {ours}, the teacher's {theirs}; want the same")


def intensity_change(
    our_plans: PlansManager, ours: ConfigurationManager, their_plans: PlansManager, theirs: ConfigurationManager
) -> Any:
    """What makes the teacher's intensities of the student's, [B, C, *S] -> the same; None where they are equal.

    CT values can be had back from what nnU-Net makes of them, up to its clipping; those normalised image by image cannot.
    """
    changes = []
    for channel, (our_scheme, their_scheme) in enumerate(
        zip(ours.normalization_schemes, theirs.normalization_schemes, strict=True)
    ):
        known = ("CTNormalization", "NoNormalization")
        masks = ours.use_mask_for_norm[channel], theirs.use_mask_for_norm[channel]
        if our_scheme in known and their_scheme in known:
            changes.append((_affine(our_plans, our_scheme, channel), _affine(their_plans, their_scheme, channel)))
        elif our_scheme == their_scheme and masks[0] == masks[1]:
            changes.append(((0.0, 1.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0)))
        else:
            raise ValueError(
                f"{TEACHER}: channel {channel} is normalised by {our_scheme} for the student and by {their_scheme} for the "
                "teacher, and one cannot be had from the other; train one of them with the other's normalisation"
            )
    if all(our == their for our, their in changes):
        return None

    def change(images: Tensor) -> Tensor:
        out = []
        for image, (our, their) in zip(images.unbind(1), changes, strict=True):
            if our != their:
                values = image * our[1] + our[0]
                if their[2] < their[3]:
                    values = values.clamp(their[2], their[3])
                image = (values - their[0]) / their[1]
            out.append(image)
        return torch.stack(out, 1)

    return change


def _affine(plans: PlansManager, scheme: str, channel: int) -> tuple[float, float, float, float]:
    """(shift, scale, lowest, highest) of a normalisation; no limits where lowest is not below highest."""
    if scheme == "NoNormalization":
        return 0.0, 1.0, 0.0, 0.0
    of = plans.foreground_intensity_properties_per_channel[str(channel)]
    return of["mean"], max(of["std"], 1e-8), of["percentile_00_5"], of["percentile_99_5"]


def _channels(dataset: dict[str, Any]) -> dict[str, str]:
    return cast("dict[str, str]", dataset.get("channel_names") or dataset.get("modality") or {})
