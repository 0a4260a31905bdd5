"""The demo's CT and labels made small, and written in every layout."""

from __future__ import annotations

import json
import locale
import zlib
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from medkd_fast.training.data.layouts.builtin import DEMO_LABELS, demo

ORGANS = {"spleen": 1, "right kidney": 2, "left kidney": 3, "liver": 5, "stomach": 6, "aorta": 8}


def small_ct() -> tuple[sitk.Image, sitk.Image]:
    """24 slices of 64 x 64 in Hounsfield units and their labels, in LPS order: 5.6 x 5.6 x 2.5 mm."""
    case = demo().cases[0]
    image, label = (sitk.DICOMOrient(sitk.ReadImage(str(p)), "LPS") for p in (case.images[0], case.label))
    image, label = (sitk.Shrink(i[:, :, 14:38], [8, 8, 1]) for i in (image, label))
    values = sitk.GetArrayFromImage(label)
    classes = np.select([values == v for v in DEMO_LABELS], list(DEMO_LABELS.values()), 0).astype(np.uint8)
    classes[(classes == 4) | (classes == 7)] = 0
    small = sitk.GetImageFromArray(classes)
    small.CopyInformation(label)
    return sitk.Cast(image, sitk.sitkInt16), small


def changed(image: sitk.Image, function) -> sitk.Image:
    """The image with `function` of its array."""
    found = sitk.GetImageFromArray(function(sitk.GetArrayFromImage(image)))
    found.CopyInformation(image)
    return found


def write(image: sitk.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return path


def write_nnunet(root: Path, ct, label, *, cases=4, channels=1, ending=".nii.gz", labels=None, test=0) -> Path:
    for i in range(cases + test):
        folder = "Tr" if i < cases else "Ts"
        for c in range(channels):
            scaled = sitk.Cast(ct + 50 * c + i, sitk.sitkInt16)
            write(scaled, root / f"images{folder}" / f"ct_{i:03d}_{c:04d}{ending}")
        write(label, root / f"labels{folder}" / f"ct_{i:03d}{ending}")
    info = {
        "channel_names": {str(c): ("CT", "MR")[c] for c in range(channels)},
        "labels": labels or {"background": 0, **ORGANS},
        "numTraining": cases,
        "file_ending": ending,
    }
    (root / "dataset.json").write_text(json.dumps(info))
    return root


def write_decathlon(root: Path, ct, label, *, cases=4, channels=1) -> Path:
    listed = []
    for i in range(cases):
        stack = [sitk.Cast(ct + 50 * c + i, sitk.sitkInt16) for c in range(channels)]
        write(sitk.JoinSeries(stack) if channels > 1 else stack[0], root / "imagesTr" / f"liver_{i}.nii.gz")
        write(label, root / "labelsTr" / f"liver_{i}.nii.gz")
        listed.append({"image": f"./imagesTr/liver_{i}.nii.gz", "label": f"./labelsTr/liver_{i}.nii.gz"})
    write(ct, root / "imagesTs" / "liver_9.nii.gz")
    info = {
        "name": "Liver",
        "modality": {str(c): ("CT", "MR")[c] for c in range(channels)},
        "labels": {"0": "background"} | {str(v): k for k, v in ORGANS.items()},
        "training": listed,
        "test": ["./imagesTs/liver_9.nii.gz"],
    }
    (root / "dataset.json").write_text(json.dumps(info))
    return root


def write_acdc(root: Path, ct, label, *, folders=("",), subfolders=True) -> Path:
    # three classes, as there
    heart = changed(label, lambda a: np.select([a == 5, a == 1, a == 8], [1, 2, 3], 0).astype(np.uint8))
    number = 0
    for folder in folders:
        for _ in range(4):
            number += 1
            patient = f"patient{number:03d}"
            place = root / folder / (patient if subfolders else "")
            for frame in (1, 12):
                write(ct + number + frame, place / f"{patient}_frame{frame:02d}.nii.gz")
                write(heart, place / f"{patient}_frame{frame:02d}_gt.nii.gz")
            write(sitk.JoinSeries([ct, ct]), place / f"{patient}_4d.nii.gz")
    return root


def write_synapse(root: Path, ct, label, *, lists=True) -> Path:
    import h5py

    image = np.clip((sitk.GetArrayFromImage(ct) + 125) / 400, 0, 1).astype(np.float32)
    organs = sitk.GetArrayFromImage(label)
    names = []
    for n in (5, 6, 7):
        for z in range(4, 10):
            (root / "train_npz").mkdir(parents=True, exist_ok=True)
            names.append(f"case{n:04d}_slice{z:03d}")
            shown = organs[z].astype(np.float32)  # float, as there
            np.savez(root / "train_npz" / f"{names[-1]}.npz", image=image[z] * (1 - n / 1000), label=shown)
    (root / "test_vol_h5").mkdir()
    with h5py.File(root / "test_vol_h5" / "case0001.npy.h5", "w") as file:
        file["image"], file["label"] = image[:8], organs[:8].astype(np.float32)
    if lists:
        folder = root / "lists" / "lists_Synapse"
        folder.mkdir(parents=True)
        (folder / "train.txt").write_text("\n".join(names[:12]) + "\n")  # case0007 is left out
        (folder / "test_vol.txt").write_text("case0001\n")
    return root


def write_csv(root: Path, ct, label, *, cases=4) -> Path:
    lines = ["image_ct,image_t1,label,patient,split"]
    for i in range(cases):
        write(ct + i, root / "scans" / f"s{i}.nrrd")
        write(sitk.Cast(ct * 2 + 5000, sitk.sitkInt16), root / "scans" / f"t{i}.nrrd")
        write(label, root / "masks" / f"s{i}.mha")
        side = ("train", "train", "val", "test")[i % 4]
        lines.append(f"scans/s{i}.nrrd,scans/t{i}.nrrd,masks/s{i}.mha,patient {i},{side}")
    (root / "set.csv").write_text("\n".join(lines) + "\n")
    return root / "set.csv"


def write_dicom_series(folder: Path, image: sitk.Image, *, modality="CT", drop=()) -> Path:
    """One file a slice, written in an order that is not that of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    direction = image.GetDirection()
    cosines = "\\".join(str(direction[i]) for i in (0, 3, 6, 1, 4, 7))
    for z in range(image.GetSize()[2]):
        if z in drop:
            continue
        slice_ = image[:, :, z]
        position = image.TransformIndexToPhysicalPoint((0, 0, z))
        tags = {
            "0008|0060": modality,
            "0020|000d": "1.2.826.0.1.3680043.2.1125.1",
            "0020|000e": f"1.2.826.0.1.3680043.2.1125.1.{zlib.crc32(str(folder).encode())}",
            "0008|0018": f"1.2.826.0.1.3680043.2.1125.1.{zlib.crc32(str(folder).encode())}.{z + 1}",
            "0008|0008": "DERIVED\\SECONDARY",
            "0020|0032": "\\".join(str(p) for p in position),
            "0020|0037": cosines,
            "0020|0013": str(z + 1),
            "0028|1052": "0",
            "0028|1053": "1",
        }
        for key, value in tags.items():
            slice_.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{(z * 7) % 24:03d}.dcm"))
        before = locale.setlocale(
            locale.LC_ALL
        )  # SimpleITK leaves the locale C, by which torch.compile reads its files
        writer.Execute(slice_)
        locale.setlocale(locale.LC_ALL, before)
    return folder


def write_dicom(root: Path, ct, label, *, cases=4, modality="CT") -> Path:
    for i in range(cases):
        write_dicom_series(root / f"subject{i}" / "abdomen", ct + i, modality=modality)
        write(label, root / f"subject{i}" / "abdomen.nii.gz")
    (root / "classes.json").write_text(json.dumps({str(v): k for k, v in ORGANS.items()}))
    return root


WRITERS = {
    "nnunet": write_nnunet,
    "decathlon": write_decathlon,
    "acdc": write_acdc,
    "synapse": write_synapse,
    "csv": write_csv,
    "dicom": write_dicom,
}
