"""Every fault of a data set is found, named and weighed; a sound one is said to be sound."""

from __future__ import annotations

import gzip
import json
import os
import struct
import warnings

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from small_sets import ORGANS, changed, write, write_csv, write_dicom, write_nnunet

from medkd_fast.cli import main
from medkd_fast.training.data.check import ERROR, WARNING, check
from medkd_fast.training.data.dataset import IGNORE, open_dataset
from medkd_fast.training.data.prepare import plan, prepare, prepare_case
from medkd_fast.training.data.read import Repaired, read_file
from medkd_fast.training.errors import WrongUse


@pytest.fixture
def root(tmp_path, ct, label):
    """A sound data set of 4 cases that a test may spoil."""
    return write_nnunet(tmp_path / "set", ct, label)


def findings(root) -> list[tuple[str, str, str]]:
    return [(f.level, f.case, f.message) for f in check(open_dataset(root)).findings]


def only(root) -> tuple[str, str, str]:
    (found,) = findings(root)
    return found


@pytest.mark.parametrize("layout", ["nnunet", "acdc", "synapse", "dicom"])
def test_sound_data_sets_have_no_errors(layout, sets):
    report = check(open_dataset(sets[layout]))
    assert report.trainable
    # Synapse has no gallbladder and no pancreas here
    assert all("no label shows class" in f.message for f in report.findings)


def test_facts(root, label):
    report = check(open_dataset(root))
    assert report.findings == [] and report.trainable
    facts = report.facts[0]
    assert facts.size == (24, 64, 64) and facts.spacing == pytest.approx((2.5, 5.625, 5.625))
    values = sitk.GetArrayFromImage(label)
    assert facts.voxels == {0: int((values == 0).sum())} | {
        c: int((values == v).sum()) for c, v in enumerate(ORGANS.values(), start=1)
    }


def test_facts_are_in_lps_order(root, ct, label):
    sagittal = [sitk.PermuteAxes(i, [1, 2, 0]) for i in (ct, label)]
    write(sagittal[0], root / "imagesTr" / "ct_000_0000.nii.gz")
    write(sagittal[1], root / "labelsTr" / "ct_000.nii.gz")
    facts = check(open_dataset(root)).facts[0]
    assert facts.size == (24, 64, 64) and facts.spacing == pytest.approx((2.5, 5.625, 5.625))


def test_unreadable_file(root):
    (root / "imagesTr" / "ct_001_0000.nii.gz").write_bytes(b"no image")
    level, case, message = only(root)
    assert (level, case) == (ERROR, "ct_001")
    assert "ct_001_0000.nii.gz cannot be read as an image" in message and "\n" not in message
    with gzip.open(root / "imagesTr" / "ct_001_0000.nii.gz", "wb") as file:
        file.write(b"no image" * 100)
    message = only(root)[2]
    assert "ct_001_0000.nii.gz cannot be read as an image" in message and "\n" not in message


def test_a_file_that_is_called_compressed_and_is_not(root, ct):
    path = root / "imagesTr" / "ct_001_0000.nii.gz"
    path.write_bytes(gzip.decompress(path.read_bytes()))
    assert findings(root) == []
    path.write_bytes(path.read_bytes()[:5000])
    assert "is cut off or damaged" in only(root)[2]


@pytest.mark.parametrize("ending", [".mha", ".mhd"])
def test_a_cut_meta_image_is_not_said_to_be_missing(tmp_path, ct, ending):
    path = write(ct, tmp_path / f"a{ending}")
    voxels = max(tmp_path.iterdir(), key=lambda p: p.stat().st_size)
    voxels.write_bytes(voxels.read_bytes()[:5000])
    with pytest.raises(
        WrongUse, match=rf"a{ending} cannot be read as an image \(it, or the file with its voxels, is cut off"
    ):
        read_file(path)


def not_utf8(path) -> None:
    """Give a file a name in Latin-1, at which SimpleITK ends the process."""
    path.rename(path.with_name(os.fsdecode(b"M\xfcller") + path.name))


def test_names_that_are_not_utf8(root, capsys):
    not_utf8(root / "imagesTr" / "ct_001_0000.nii.gz")
    not_utf8(root / "labelsTr" / "ct_001.nii.gz")
    assert main(["data", str(root)]) == 1
    lines = capsys.readouterr().out.splitlines()
    image = root / "imagesTr" / "M\\xfcllerct_001_0000.nii.gz"
    assert f"error: M\\xfcllerct_001: the name {image} is not UTF-8: rename it" in lines
    dataset = open_dataset(root)
    assert len(check(dataset).facts) == 4 and len(findings(root)) == 1  # the others are read
    with pytest.raises(WrongUse, match="is not UTF-8: rename it"):
        prepare(dataset)
    with pytest.raises(WrongUse, match="is not UTF-8: rename it"):
        prepare_case(next(p for p in (root / "imagesTr").iterdir() if "ller" in p.name), plan(open_dataset("demo")))


def test_names_in_a_series_that_are_not_utf8(tmp_path, ct, label):
    root = write_dicom(tmp_path / "set", ct, label)
    not_utf8(root / "subject0" / "abdomen" / "000.dcm")
    not_utf8(root / "subject1" / "abdomen.nii.gz")
    (root / "subject1" / "abdomen").rename(root / "subject1" / os.fsdecode(b"M\xfcllerabdomen"))
    first, second = (message for level, _, message in findings(root) if level == ERROR)
    assert first == f"the name {root / 'subject0' / 'abdomen' / 'M'}\\xfcller000.dcm is not UTF-8: rename it"
    assert second == f"the name {root / 'subject1' / 'M'}\\xfcllerabdomen is not UTF-8: rename it"


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_files_that_are_cut_off(ending, tmp_path, ct, label):
    root = write_nnunet(tmp_path / "set", ct, label, ending=ending)
    path = root / "labelsTr" / f"ct_002{ending}"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    level, case, message = only(root)
    assert (level, case) == (ERROR, "ct_002") and path.name in message
    with pytest.raises(WrongUse, match=path.name):
        prepare(open_dataset(root))


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_endings_in_capitals(ending, tmp_path, ct):
    path = write(ct, tmp_path / f"a{ending}").rename(tmp_path / f"a{ending.upper()}")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_file(path)), sitk.GetArrayFromImage(ct))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])  # which ITK reads as if it were whole
    with pytest.raises(WrongUse, match=f"a{ending.upper()} is cut off or damaged"):
        read_file(path)


def test_missing_label_and_missing_file(tmp_path, root, ct, label):
    (root / "labelsTr" / "ct_003.nii.gz").unlink()
    assert only(root) == (WARNING, "ct_003", "no label: not trained on")
    table = write_csv(tmp_path / "csv", ct, label)
    (tmp_path / "csv" / "masks" / "s1.mha").unlink()
    level, case, message = only(table)
    assert (level, case) == (ERROR, "s1") and message.endswith("s1.mha is not there")


def test_a_label_that_is_called_otherwise_than_its_image(root):
    labels = root / "labelsTr"
    (labels / "ct_003.nii.gz").rename(labels / "ct_3.nii.gz")
    assert findings(root) == [
        (WARNING, "ct_003", "no label: not trained on"),
        (WARNING, "", f"the label {labels / 'ct_3.nii.gz'} belongs to no image: call it as its image, without _0000"),
    ]


def test_other_grid(root, label):
    moved = sitk.Image(label)
    moved.SetOrigin([o + 3.0 for o in label.GetOrigin()])
    write(moved, root / "labelsTr" / "ct_001.nii.gz")
    level, case, message = only(root)
    assert (level, case) == (ERROR, "ct_001") and "lie on different grids: resample the label" in message
    with pytest.raises(WrongUse, match="case ct_001: .* lie on different grids"):
        prepare(open_dataset(root))
    # rounding of a header is no fault
    moved.SetOrigin([o + 0.01 for o in label.GetOrigin()])
    write(moved, root / "labelsTr" / "ct_001.nii.gz")
    assert findings(root) == []


def test_label_out_of_range_and_not_whole(root, label):
    write(changed(label, lambda a: np.where(a == 8, 40, a)), root / "labelsTr" / "ct_000.nii.gz")
    level, case, message = only(root)
    assert (level, case) == (ERROR, "ct_000")
    assert "holds 40, which the data set does not name: its labels are 0, 1, 2, 3, 5, 6, 8" in message
    with pytest.raises(WrongUse, match="of case ct_000 holds 40"):
        prepare(open_dataset(root))
    write(changed(label, lambda a: a.astype(np.float32) * 0.5), root / "labelsTr" / "ct_000.nii.gz")
    parts = "0.5 (not whole), 1.5 (not whole), 2.5 (not whole), 4"
    assert f"holds {parts}, which" in only(root)[2]
    write(changed(label, lambda a: a.astype(np.float64) * (1 - 1e-10)), root / "labelsTr" / "ct_000.nii.gz")
    assert "holds 0.9999999999 (not whole), 1.9999999998 (not whole)," in only(root)[2]
    # whole numbers of any type are fine
    for kind in (sitk.sitkFloat64, sitk.sitkInt16, sitk.sitkUInt64):
        write(sitk.Cast(label, kind), root / "labelsTr" / "ct_000.nii.gz")
        assert findings(root) == []


def test_ignored_voxels_are_counted(tmp_path, ct, label):
    root = write_nnunet(tmp_path / "i", ct, label, labels={"background": 0, **ORGANS, "ignore": 8} | {"aorta": 9})
    report = check(open_dataset(root))
    assert report.facts[0].voxels[IGNORE] == (sitk.GetArrayFromImage(label) == 8).sum()
    assert [f.message for f in report.findings] == ["no label shows class 6 (aorta): it is in no score"]


def test_wrong_number_of_channels_and_channels_apart(tmp_path, ct, label):
    root = write_nnunet(tmp_path / "set", ct, label, channels=2)
    (root / "imagesTr" / "ct_000_0001.nii.gz").unlink()
    moved = sitk.Image(ct)
    moved.SetSpacing((5.0, 5.0, 2.5))
    write(moved, root / "imagesTr" / "ct_001_0001.nii.gz")
    first, second = findings(root)
    assert first == (ERROR, "ct_000", "1 channels, where the data set has 2 (CT, MR)")
    assert second[:2] == (ERROR, "ct_001") and "channel 1 (64 x 64 x 24 voxels of 5 x 5 x 2.5 mm" in second[2]
    with pytest.raises(WrongUse, match="gives 1 channels, 2 are wanted"):
        prepare(open_dataset(root))


def bend(path) -> None:
    """Shear the axes in a NIfTI header by a hundredth, as some converters do."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    affine = np.array(struct.unpack_from("<12f", content, 280)).reshape(3, 4)
    affine[:, 1] += 0.01 * affine[:, 0]
    struct.pack_into("<12f", content, 280, *affine.ravel())
    struct.pack_into("<2h", content, 252, 0, 1)
    path.write_bytes(gzip.compress(bytes(content)))


def test_bent_directions_are_repaired_with_a_warning(root, ct):
    paths = [root / "imagesTr" / "ct_000_0000.nii.gz", root / "labelsTr" / "ct_000.nii.gz"]
    for path in paths:
        bend(path)
        with pytest.raises(RuntimeError, match="orthonormal"):
            sitk.ReadImage(str(path))  # what ITK makes of it
    report = check(open_dataset(root))
    assert report.trainable and [f.level for f in report.findings] == [WARNING] * 2
    assert all("are not at right angles: read with the nearest direction that is" in f.message for f in report.findings)
    assert [str(p) in f.message for p, f in zip(paths, report.findings, strict=True)] == [True, True]
    with pytest.warns(Repaired):
        image = read_file(paths[0])
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(ct))
    assert image.GetSpacing() == pytest.approx(ct.GetSpacing(), rel=1e-3)
    assert image.GetOrigin() == pytest.approx(ct.GetOrigin(), abs=1e-3)
    direction = np.array(image.GetDirection()).reshape(3, 3)
    np.testing.assert_allclose(direction, np.eye(3), atol=0.006)  # half of the shear on either axis
    np.testing.assert_allclose(direction.T @ direction, np.eye(3), atol=1e-6)
    with pytest.warns(Repaired):
        volume = prepare(open_dataset(root), names=["ct_000"])["ct_000"]
    assert volume.image.shape == (1, 24, 64, 64)


def test_commands_show_repairs_in_one_line(tmp_path, ct, monkeypatch, capsys):
    from medkd_fast.training import demo

    path = write(ct, tmp_path / "bent.nii.gz")
    bend(path)

    def reads_and_warns(*arguments, **options):
        read_file(path)
        warnings.warn("of a library", DeprecationWarning, stacklevel=1)

    monkeypatch.setattr(demo, "run_demo", reads_and_warns)
    assert main(["demo"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert (
        lines[0] == f"medkd-fast: the axes of {path} are not at right angles: read with the nearest direction that is"
    )
    assert "DeprecationWarning: of a library" in lines[1]


def test_bent_directions_of_other_formats(tmp_path, ct):
    path = write(ct, tmp_path / "bent.mha")
    content = path.read_bytes()
    matrix = b"TransformMatrix = 1 0 0 0 1 0 0 0 1"
    assert matrix in content
    path.write_bytes(content.replace(matrix, b"TransformMatrix = 1 0 0 0.02 1 0 0 0 1"))
    with pytest.warns(Repaired, match="bent.mha are not at right angles"):
        direction = np.array(read_file(path).GetDirection()).reshape(3, 3)
    np.testing.assert_allclose(direction.T @ direction, np.eye(3), atol=1e-6)


def test_values_that_are_no_numbers_constant_images_and_empty_labels(tmp_path, ct, label):
    root = write_nnunet(tmp_path / "set", ct, label, ending=".nrrd")  # ITK reads nan in NIfTI files as 0
    holes = changed(ct, lambda a: np.where(a > 200, np.nan, a.astype(np.float32)))
    write(holes, root / "imagesTr" / "ct_000_0000.nrrd")
    write(ct * 0, root / "imagesTr" / "ct_001_0000.nrrd")
    write(label * 0, root / "labelsTr" / "ct_002.nrrd")
    assert findings(root) == [
        (WARNING, "ct_000", "the image holds values that are not finite: they are taken as 0"),
        (WARNING, "ct_001", "channel 0 holds the one value 0"),
        (WARNING, "ct_002", "the label holds background alone"),
    ]
    volumes = prepare(open_dataset(root))
    assert all(v.image.isfinite().all() for v in volumes.values())
    assert volumes["ct_000"].image[0][torch.from_numpy(sitk.GetArrayFromImage(ct) > 200)].unique().tolist() == [
        pytest.approx(175 / 425)
    ]


def test_a_channel_that_is_a_mask(tmp_path, ct, label):
    root = write_nnunet(tmp_path / "set", ct, label, channels=2)
    write(sitk.Cast(ct > 100, sitk.sitkUInt8) * 7, root / "imagesTr" / "ct_002_0001.nii.gz")
    message = "channel 1 holds 0 and 7 alone, as a mask does: a channel called noNorm keeps its values"
    assert only(root) == (WARNING, "ct_002", message)
    info = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps({**info, "channel_names": {"0": "CT", "1": "noNorm"}}))
    assert findings(root) == []


def test_names_and_images_that_come_twice(tmp_path, root, ct, label):
    image = root / "imagesTr" / "ct_000_0000.nii.gz"
    (root / "imagesTr" / "ct_002_0000.nii.gz").write_bytes(image.read_bytes())
    assert only(root) == (WARNING, "ct_000", "the same image as ct_002")
    table = write_csv(tmp_path / "csv", ct, label)
    text = table.read_text().splitlines()
    table.write_text("\n".join([*text, text[1].replace("train", "test")]) + "\n")
    found = findings(table)
    assert (ERROR, "s0", "2 cases have this name: every case needs one of its own") in found
    assert (WARNING, "", "patient patient 0 is on two sides of the split that the data set gives") in found
    with pytest.raises(WrongUse, match="set: s0: 2 cases have this name: every case needs one of its own"):
        prepare(open_dataset(table))


def test_a_test_case_that_is_called_as_a_training_case_is_prepared_for_nobody(tmp_path, ct, label):
    root = write_nnunet(tmp_path / "set", ct, label, test=1)
    for folder, end in (("imagesTs", "_0000.nii.gz"), ("labelsTs", ".nii.gz")):
        (root / folder / f"ct_004{end}").rename(root / folder / f"ct_000{end}")
    dataset = open_dataset(root)
    for names in (["ct_001"], dataset.split.test, None):  # the one that is asked for may have its name once
        with pytest.raises(WrongUse, match="set: ct_000: 2 cases have this name: every case needs one of its own"):
            prepare(dataset, names=names)


def test_nothing_to_learn_from_and_too_few_patients(tmp_path, ct, label):
    few = write_nnunet(tmp_path / "few", ct, label, cases=2)
    assert only(few) == (
        ERROR,
        "",
        "few has 2 labelled patients to split over 3 sides: at least 3 are needed, or fewer sides, such as --fractions 1,0,0",
    )
    for path in (few / "labelsTr").iterdir():
        path.unlink()
    assert findings(few)[-1] == (ERROR, "", "no case has a label: there is nothing to learn from")


def test_slices_missing_from_a_series(tmp_path, ct, label):
    from small_sets import write_dicom_series

    root = write_dicom(tmp_path / "set", ct, label)
    for file in (root / "subject1" / "abdomen").iterdir():
        file.unlink()
    write_dicom_series(root / "subject1" / "abdomen", ct, drop=(9, 10))
    found = findings(root)
    assert found[0][:2] == (WARNING, "subject1_abdomen")
    assert "2.5 mm apart, but 7.5 mm between slices 8 and 9" in found[0][2]
    assert found[1][0] == ERROR and "different grids" in found[1][2]  # the label has the missing slices


def test_two_series_in_one_folder(tmp_path, ct, label):
    root = write_dicom(tmp_path / "set", ct, label)
    for file in (root / "subject0" / "abdomen").iterdir():
        file.rename(root / "subject1" / "abdomen" / f"other_{file.name}")
    report = check(open_dataset(root))
    assert [f.message.split(" holds ")[1] for f in report.findings if f.level == ERROR] == [
        "2 DICOM series: one folder must hold one series"
    ]


def test_the_command_prints_and_says_by_its_exit_code(root, capsys):
    assert main(["data", str(root)]) == 0
    page = capsys.readouterr().out
    for words in ("layout nnunet, 4 cases of 4 patients, channels CT", "24 64 64", "2.5 5.62 5.62", "liver", "ready"):
        assert words in page
    (root / "imagesTr" / "ct_001_0000.nii.gz").write_bytes(b"no image")
    assert main(["data", str(root), "--layout", "nnunet"]) == 1
    page = capsys.readouterr().out
    assert "error: ct_001: " in page and "1 error: not to be trained on until that is mended" in page
    assert main(["data", str(root), "--layout", "bids"]) == 2
    assert "unknown layout 'bids'" in capsys.readouterr().err


def test_the_command_has_help_with_an_example(capsys):
    assert main(["data", "-h"]) == 0
    assert "Example: medkd-fast data demo" in capsys.readouterr().out


def test_labels_of_the_command_are_not_taken_for_markup(tmp_path, ct, label, capsys):
    root = write_nnunet(tmp_path / "s", ct, label, labels={"background": 0, **ORGANS, "[bold]cyst[/bold]": 9})
    info = json.loads((root / "dataset.json").read_text())
    assert "[bold]cyst[/bold]" in info["labels"]
    assert main(["data", str(root)]) == 0
    page = capsys.readouterr().out
    assert page.count("[bold]cyst[/bold]") == 2  # in the table and in the warning
