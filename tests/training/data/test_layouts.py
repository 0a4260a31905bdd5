"""Every layout: recognised, its cases, patients, classes, channels and split, and the same voxels in the prepared volumes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from small_sets import ORGANS, changed, write, write_acdc, write_csv, write_dicom, write_nnunet, write_synapse

from medkd_fast.training.data.dataset import IGNORE, open_dataset
from medkd_fast.training.data.layouts import recognise, synapse
from medkd_fast.training.data.prepare import Preprocessing, plan, prepare
from medkd_fast.training.data.sampling import train_loader
from medkd_fast.training.data.split import Split, split_by_patient
from medkd_fast.training.errors import WrongUse

LAYOUTS = ["nnunet", "decathlon", "acdc", "synapse", "csv", "dicom"]
CLASSES = dict(enumerate(ORGANS, start=1))  # the ids of ORGANS have gaps


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_recognised(layout, sets):
    assert recognise(sets[layout]) == layout
    assert open_dataset(sets[layout]) == open_dataset(str(sets[layout]), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dims", [2, 3])
def test_the_voxels_of_every_layout_arrive(layout, dims, sets, ct, label, tmp_path):
    dataset = open_dataset(sets[layout])
    settings = Preprocessing(dims=dims)
    volumes = prepare(dataset, settings)
    assert list(volumes) == [c.name for c in dataset.cases]
    name = dataset.labelled[0].name
    volume = volumes[name]
    values = sitk.GetArrayFromImage(label)
    if layout == "acdc":
        expected = np.select([values == 5, values == 1, values == 8], [1, 2, 3], 0)
    elif layout == "synapse":
        expected = values[4:10]
    else:
        expected = np.select([values == v for v in ORGANS.values()], list(range(1, 7)), 0)
    # the median spacing is that of every case: nothing is resampled
    assert torch.equal(volume.label[0], torch.from_numpy(expected.astype(np.int64)))
    assert volume.image.shape == (len(dataset.channels), *expected.shape)
    assert volume.spacing == ((1.0, 1.0, 1.0) if layout == "synapse" else pytest.approx((2.5, 5.625, 5.625)))

    air, liver = (
        volume.image[0][volume.label[0] == 0].min(),
        volume.image[0][expected == (5 if layout == "synapse" else 4)],
    )
    if layout != "acdc":
        assert air == 0 and 0.4 < liver.mean() < 0.8  # contrast-enhanced liver in the abdominal window
    patch = (32, 48) if dims == 2 else (8, 32, 48)
    split = split_by_patient(dataset, fractions=(0.5, 0.25, 0.25))
    loader = train_loader(
        volumes,
        split.train,
        dims=dims,
        patch=patch,
        batch_size=2,
        steps=3,
        seed=0,
        num_classes=len(dataset.classes) + 1,
    )
    for image, target in loader:
        assert image.shape == (2, len(dataset.channels), *patch) and target.shape == (2, 1, *patch)
        assert image.dtype == torch.float32 and target.dtype == torch.int64
        assert image.isfinite().all() and 0 <= target.min() and target.max() <= len(dataset.classes)


def test_nnunet(sets):
    dataset = open_dataset(sets["nnunet"])
    assert dataset.classes == CLASSES and dataset.channels == ("CT",) and dataset.split is None
    assert [c.name for c in dataset.cases] == ["ct_000", "ct_001", "ct_002", "ct_003"]
    assert plan(dataset).intensity == ("window",)


def test_nnunet_with_two_channels_another_ending_an_ignore_label_and_a_test_set(tmp_path, ct, label):
    ignored = changed(label, lambda a: np.where(a == 8, 9, a).astype(np.uint8))
    labels = {"background": 0, **ORGANS, "ignore": 9}
    root = write_nnunet(tmp_path / "set", ct, ignored, channels=2, ending=".nrrd", labels=labels, test=1)
    dataset = open_dataset(root)
    assert dataset.channels == ("CT", "MR") and dataset.ignore_label == IGNORE
    assert dataset.split == Split(("ct_000", "ct_001", "ct_002", "ct_003"), test=("ct_004",))
    assert split_by_patient(dataset).test == ("ct_004",)
    volume = prepare(dataset, names=["ct_001"])["ct_001"]
    assert volume.image.shape[0] == 2 and plan(dataset).intensity == ("window", "zscore")
    # channel 1 is channel 0 plus 50, then on another scale
    assert np.corrcoef(volume.image[0, :, 20:40].flatten(), volume.image[1, :, 20:40].flatten())[0, 1] > 0.5
    assert (volume.label == IGNORE).sum() == (sitk.GetArrayFromImage(ignored) == 9).sum()
    assert not (volume.label == 6).any()


def test_nnunet_version_1_and_files_named_in_the_json(tmp_path, ct, label):
    root = write_nnunet(tmp_path / "set", ct, label)
    old = {"modality": {"0": "CT"}, "labels": {"0": "background"} | {str(v): k for k, v in ORGANS.items()}}
    old["training"] = [{"image": "./imagesTr/ct_000.nii.gz", "label": "./labelsTr/ct_000.nii.gz"}]
    (root / "dataset.json").write_text(json.dumps(old))
    assert recognise(root) == "nnunet" and open_dataset(root).classes == CLASSES
    listed = {"here": {"images": ["imagesTr/ct_002_0000.nii.gz"], "label": "labelsTr/ct_002.nii.gz"}}
    new = {"channel_names": {"0": "CT"}, "labels": {"background": 0, **ORGANS}, "dataset": listed}
    (root / "dataset.json").write_text(json.dumps(new))
    (case,) = open_dataset(root).cases
    assert (case.name, case.label) == ("here", root / "labelsTr" / "ct_002.nii.gz")


def test_nnunet_with_names_of_acdc_keeps_patients_together(tmp_path, ct, label):
    root = write_nnunet(tmp_path / "set", ct, label, cases=2)
    for folder, end in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        for i, frame in enumerate(("01", "12")):
            (root / folder / f"ct_{i:03d}{end}").rename(root / folder / f"patient007_frame{frame}{end}")
    assert {c.patient for c in open_dataset(root).cases} == {"patient007"} and len(open_dataset(root).cases) == 2


def test_nnunet_channels_with_a_gap(tmp_path, ct, label):
    root = write_nnunet(tmp_path / "set", ct, label, channels=2)
    (root / "imagesTr" / "ct_001_0001.nii.gz").rename(root / "imagesTr" / "ct_001_0002.nii.gz")
    with pytest.raises(
        WrongUse, match="case ct_001 has the channels 0000, 0002: they are counted from 0000 without gaps"
    ):
        open_dataset(root)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"background": 0, "tumour": [1, 2], "core": 2}, r"'tumour' is a region of the values \[1, 2\]"),
        ({"background": 0, "liver": 1.5}, "'liver' must be a whole number >= 0, got 1.5"),
        ({"background": 0, "liver": 1, "spleen": 1}, "the value 1 is both 'liver' and 'spleen'"),
        ({"background": 0}, "no label besides the background"),
        ({"liver": 0, "background": 1, "tumour": 2}, "the background must be 0, got 1"),
        ({"0": "background", "1": "kidney", "2": "kidney"}, "two values are called 'kidney'"),
    ],
)
def test_nnunet_labels_that_are_not_supported(labels, message, tmp_path):
    info = {"channel_names": {"0": "CT"}, "labels": labels}
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(WrongUse, match=message):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"channel_names": {"CT": "0"}}, r"needs channel_names, numbers with their names, .* got {'CT': '0'}"),
        ({"channel_names": ["CT"]}, r"needs channel_names, numbers with their names, .* got \['CT'\]"),
        ({"dataset": [{"images": ["a"], "label": "b"}]}, "dataset must hold the files of every case by its name"),
        ({"dataset": {"a": {"image": "a", "label": "b"}}}, "dataset must hold the files of every case by its name"),
        ({"dataset": {"a": {"images": "a_0000.nii.gz"}}}, "dataset must hold the files of every case by its name"),
        ({"dataset": {"a": {"images": ["a"], "label": 1}}}, "dataset must hold the files of every case by its name"),
    ],
)
def test_nnunet_tables_of_another_form(values, message, tmp_path):
    info = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, **values}
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(WrongUse, match=message):
        open_dataset(tmp_path)


def test_decathlon(sets, tmp_path, ct, label):
    from small_sets import write_decathlon

    dataset = open_dataset(sets["decathlon"])
    assert dataset.name == "Liver" and dataset.classes == CLASSES
    assert [c.name for c in dataset.cases if c.label is None] == ["liver_9"]
    many = open_dataset(write_decathlon(tmp_path / "many", ct, label, channels=2, cases=1))
    assert many.channels == ("CT", "MR")
    assert prepare(many, names=["liver_0"])["liver_0"].image.shape == (2, 24, 64, 64)


def test_acdc_keeps_the_frames_of_a_patient_together(sets, tmp_path, ct, label):
    dataset = open_dataset(sets["acdc"])
    assert len(dataset.cases) == 8 and dataset.cases[0].name == "patient001_frame01"
    assert list(dataset.classes.values()) == ["right ventricle", "myocardium", "left ventricle"]
    split = split_by_patient(dataset, seed=3, fractions=(0.5, 0.25, 0.25))
    sides = [{n[:10] for n in side} for side in (split.train, split.validation, split.test)]
    assert [len(s) for s in sides] == [2, 1, 1] and len(set.union(*sides)) == 4

    official = open_dataset(write_acdc(tmp_path / "a", ct, label, folders=("training", "testing"), subfolders=False))
    assert len(official.cases) == 16 and official.split is not None
    assert {n[:10] for n in official.split.test} == {f"patient{i:03d}" for i in (5, 6, 7, 8)}
    drawn = split_by_patient(official)
    assert drawn.test == official.split.test and len(drawn.validation) == 2


def test_synapse(sets, tmp_path, ct, label, monkeypatch):
    dataset = open_dataset(sets["synapse"])
    assert [c.name for c in dataset.cases] == ["case0005", "case0006", "case0001"]
    assert dataset.split == Split(("case0005", "case0006"), test=("case0001",))
    assert dataset.classes[1] == "aorta" and "voxels" in dataset.notes[0]
    volume = prepare(dataset, names=["case0001"])["case0001"]
    assert volume.image.shape == (1, 8, 64, 64) and volume.spacing == (1, 1, 1)
    image = np.clip((sitk.GetArrayFromImage(ct)[:8] + 125) / 400, 0, 1)
    assert np.allclose(volume.image[0], image, atol=1e-6)  # windowed there already: left as it is

    plain = write_synapse(tmp_path / "set", ct, label, lists=False)
    assert [c.name for c in open_dataset(plain).cases] == ["case0005", "case0006", "case0007", "case0001"]
    (plain / "train_npz" / "case0006_slice007.npz").unlink()
    assert any("case0006: 5 slices numbered 4 to 9, some are missing" in n for n in open_dataset(plain).notes)

    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(WrongUse, match="needs h5py: run `pip install h5py`"):
        synapse._h5(plain / "test_vol_h5" / "case0001.npy.h5")


def test_csv(sets, tmp_path, ct, label):
    dataset = open_dataset(sets["csv"])
    assert dataset.channels == ("ct", "t1") and dataset.cases[2].patient == "patient 2"
    assert dataset.split == Split(("s0", "s1"), ("s2",), ("s3",)) == split_by_patient(dataset)
    table = sets["csv"].read_text().replace("masks/s3.mha", "")
    for folder in ("scans", "masks"):
        table = table.replace(f"{folder}/", f"{sets['csv'].parent}/{folder}/")
    (tmp_path / "less.csv").write_text(table)
    assert open_dataset(tmp_path / "less.csv").split == Split(("s0", "s1"), ("s2",))  # no label, no side
    (tmp_path / "test.csv").write_text(table.replace(",train", ",").replace(",val", ","))
    assert open_dataset(tmp_path / "test.csv").split is None  # no side is left
    (tmp_path / "test.csv").write_text(table.replace(",train", ",").replace(",val", ",test"))
    assert open_dataset(tmp_path / "test.csv").split == Split((), test=("s2",))
    # no classes.json: the values in the labels are the classes
    assert dataset.classes == {i: f"label {v}" for i, v in enumerate(ORGANS.values(), start=1)}
    named = write_csv(tmp_path / "set", ct, label)
    (named.parent / "classes.json").write_text(json.dumps({"5": "liver", "1": "spleen"}))
    assert open_dataset(named).classes == {1: "spleen", 2: "liver"}


def test_csv_of_pictures(tmp_path, ct, label):
    for i in range(3):
        picture = sitk.Cast(sitk.IntensityWindowing(ct[:, :, 4 + i], -175, 250, 0, 255), sitk.sitkUInt8)
        write(sitk.Compose(picture, picture, 255 - picture), tmp_path / f"p{i}.png")
        write(changed(label[:, :, 4 + i], lambda a: (255 * (a == 5)).astype(np.uint8)), tmp_path / f"p{i}_mask.png")
    table = tmp_path / "set.csv"
    table.write_text("\ufeffimage,label\n" + "".join(f"p{i}.png,p{i}_mask.png\n" for i in range(3)), encoding="utf-8")
    dataset = open_dataset(table)
    assert dataset.classes == {1: "label 255"} and dataset.channels == ("image 0", "image 1", "image 2")
    volume = prepare(dataset)["p1"]
    assert volume.image.shape == (3, 1, 64, 64) and volume.flat
    assert torch.equal(volume.label[0, 0], torch.from_numpy((sitk.GetArrayFromImage(label)[5] == 5).astype(np.int64)))
    assert np.corrcoef(volume.image[0].flatten(), volume.image[2].flatten())[0, 1] < -0.4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("picture,mask\na,b\n", "must name the columns image and label"),
        ("image,label\n", "lists no case"),
        ("image,label\n,b\n", "line 2 .* has no file in the column image"),
        ("image,label,split\na.nii,b.nii,holdout\n", "split must be train, validation or test, got 'holdout'"),
        ("image,label,split\na,b,train\nc,d,\ne,,\nf,g,\n", "no split for the labels in its lines 3, 5: write train"),
        ("image,label\na.nii,b.nii\nc.nii,d.nii\n", "b.nii is not there"),
    ],
)
def test_csv_that_cannot_be_used(text, message, tmp_path):
    (tmp_path / "set.csv").write_text(text)
    with pytest.raises(WrongUse, match=message):
        open_dataset(tmp_path / "set.csv")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_csv_in_another_encoding(encoding, tmp_path):
    (tmp_path / "set.csv").write_text("image,label,patient\na.nii,b.nii,M\u00fcller\n", encoding=encoding)
    with pytest.raises(WrongUse, match=r"set.csv cannot be read as a table \(.*\): save it as CSV in UTF-8"):
        open_dataset(tmp_path / "set.csv")


def test_a_csv_whose_labels_cannot_be_read_says_why(tmp_path, ct, label):
    table = write_csv(tmp_path / "set", ct, label)
    first, *others = sorted((tmp_path / "set" / "masks").iterdir())
    write(sitk.Compose(label, label, label), first)
    assert open_dataset(table).classes[1] == "label 1"  # the others tell
    for path in others:
        path.unlink()
    with pytest.raises(WrongUse, match=f"the label {first} has 3 channels: one is wanted"):
        open_dataset(table)


def test_dicom(sets, ct, tmp_path):
    dataset = open_dataset(sets["dicom"])
    assert [c.name for c in dataset.cases] == [f"subject{i}_abdomen" for i in range(4)]
    assert dataset.cases[1].patient == "subject1" and dataset.channels == ("CT",)
    volume = prepare(dataset, names=["subject2_abdomen"])["subject2_abdomen"]
    expected = (np.clip(sitk.GetArrayFromImage(ct).astype(np.float32) + 2, -175, 250) + 175) / 425
    np.testing.assert_allclose(volume.image[0], expected, atol=1e-5)  # the files' names are not in slice order
    mr = open_dataset(write_dicom(tmp_path / "mr", ct, sitk.Cast(ct > 100, sitk.sitkUInt8), cases=1, modality="MR"))
    assert mr.channels == ("MR",) and plan(mr).intensity == ("zscore",)


def test_dicom_files_called_by_their_uid_and_a_list_of_them(sets, tmp_path):
    root = shutil.copytree(sets["dicom"], tmp_path / "set")
    for i, file in enumerate(sorted(root.glob("subject*/abdomen/*.dcm"))):
        file.rename(file.with_name(f"1.2.826.0.1.3680043.2.1125.{i}"))
    file = root / "subject0" / "abdomen" / "1.2.826.0.1.3680043.2.1125.0"
    for folder in (root, file.parent):
        (folder / "DICOMDIR").write_bytes(file.read_bytes()[:200])
    dataset = open_dataset(root)
    assert [c.name for c in dataset.cases] == [f"subject{i}_abdomen" for i in range(4)] and dataset.channels == ("CT",)
    found, before = (
        prepare(d, names=["subject0_abdomen"])["subject0_abdomen"] for d in (dataset, open_dataset(sets["dicom"]))
    )
    assert torch.equal(found.image, before.image)


def test_dicom_labels_inside_and_several(tmp_path, ct, label):
    from small_sets import write_dicom_series

    folder = write_dicom_series(tmp_path / "set" / "a", ct)
    assert open_dataset(tmp_path / "set").cases[0].label is None
    inside = write(label, folder / "organs.nii.gz")
    assert open_dataset(tmp_path / "set").cases[0].label == inside
    write(label, tmp_path / "set" / "a.nii.gz")
    with pytest.raises(WrongUse, match="has several labels"):
        open_dataset(tmp_path / "set")


@pytest.mark.parametrize("layout", ["acdc", "dicom"])
def test_linked_folders_are_followed_and_none_counts_twice(layout, sets, tmp_path):
    names = [c.name for c in open_dataset(sets[layout]).cases]
    shutil.copytree(sets[layout], tmp_path / "elsewhere")
    root = shutil.copytree(sets[layout], tmp_path / "set")
    last = max(p for p in root.iterdir() if p.is_dir())
    shutil.rmtree(last)
    last.symlink_to(tmp_path / "elsewhere" / last.name)
    first = min(p for p in root.iterdir() if p.is_dir())
    (root / "again").symlink_to(first)
    (first / "round").symlink_to(root)
    cases = open_dataset(root).cases
    assert [c.name for c in cases] == names and cases[-1].patient == last.name
    assert all(c.label is not None and c.label.is_file() for c in cases)


def test_what_is_no_data_set(tmp_path):
    with pytest.raises(
        WrongUse, match=r"no data at .*nowhere: give a folder, a CSV file or a built-in .*\(demo, mni152\)"
    ):
        open_dataset(tmp_path / "nowhere")
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(WrongUse, match="is in no layout that is known .*name it with --layout"):
        open_dataset(tmp_path)
    (tmp_path / "set.csv").write_text("image,label\n")
    with pytest.raises(WrongUse, match=rf"known .*: try {tmp_path / 'set.csv'}$"):
        open_dataset(tmp_path)
    with pytest.raises(WrongUse, match="unknown layout 'bids': choose from nnunet"):
        open_dataset(tmp_path, "bids")
    for layout in LAYOUTS:
        with pytest.raises(WrongUse):
            open_dataset(tmp_path, layout)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(WrongUse, match="cannot be read as JSON"):
        open_dataset(tmp_path)


def test_the_values_of_labels_are_read_once(sets, monkeypatch):
    from medkd_fast.training.data.layouts import common

    first = open_dataset(sets["csv"])
    monkeypatch.setattr(common, "read_label", lambda case: pytest.fail("read again"))
    assert open_dataset(sets["csv"]) == first
    assert os.listdir(os.environ["MEDKD_FAST_CACHE"])


def test_values_that_cannot_be_kept_are_told(sets, tmp_path, monkeypatch):
    (tmp_path / "values").touch()  # as where the disk is full: there can be no folder of that name
    monkeypatch.setenv("MEDKD_FAST_CACHE", str(tmp_path))
    with pytest.raises(WrongUse, match=r"the cache .*values cannot be written \(.*\): set MEDKD_FAST_CACHE"):
        open_dataset(sets["csv"])


def test_values_that_were_kept_and_cannot_be_read_are_read_again(sets):
    first = open_dataset(sets["csv"])
    (note,) = (Path(os.environ["MEDKD_FAST_CACHE"]) / "values").iterdir()  # of the same label four times
    for damaged in ("", "[1, 2"):
        note.write_text(damaged)
        assert open_dataset(sets["csv"]) == first and json.loads(note.read_text()) == [0, *ORGANS.values()]
