"""Prepared volumes: where voxels lie, what they hold, the way back, and a cache that is neither stale nor torn."""

from __future__ import annotations

import itertools
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from small_sets import ORGANS, changed, write, write_nnunet

from medkd_fast.training.data import prepare as module
from medkd_fast.training.data.cache import digest_of_content
from medkd_fast.training.data.check import check
from medkd_fast.training.data.dataset import Case, Dataset, open_dataset
from medkd_fast.training.data.geometry import Geometry, resample, same_grid
from medkd_fast.training.data.prepare import Preprocessing, plan, prepare, prepare_case, to_source
from medkd_fast.training.errors import WrongUse

KEEP = Preprocessing(dims=3, spacing=(None, None, None), intensity=("window",))


def one(tmp_path: Path, image: sitk.Image, label: sitk.Image | None, **case) -> Dataset:
    """A data set of one case."""
    paths = write(image, tmp_path / "image.nii.gz"), label and write(label, tmp_path / "label.nii.gz")
    values = {0: 0, **{v: c for c, v in enumerate(ORGANS.values(), start=1)}}
    classes = dict(enumerate(ORGANS, start=1))
    cases = (Case("a", "a", (paths[0],), paths[1], **case),)
    return Dataset("one", tmp_path, "csv", cases, classes, ("CT",), label_values=values)


def classes(label: sitk.Image) -> np.ndarray:
    values = sitk.GetArrayFromImage(label)
    return np.select([values == v for v in ORGANS.values()], list(range(1, 7)), 0)


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "PIR", "SAL", "RIP"])
def test_every_orientation_gives_the_same_volume_and_finds_its_way_back(orientation, tmp_path, ct, label):
    stored = [sitk.DICOMOrient(i, orientation) for i in (ct, label)]
    volume = prepare(one(tmp_path, *stored), KEEP)["a"]
    expected = np.clip((sitk.GetArrayFromImage(ct).astype(np.float32) + 175) / 425, 0, 1)
    np.testing.assert_allclose(volume.image[0], expected, atol=1e-6)
    np.testing.assert_array_equal(volume.label[0], classes(label))
    assert volume.spacing == pytest.approx((2.5, 5.625, 5.625))
    back = to_source(volume.label[0], volume)
    assert same_grid(Geometry.of(back), Geometry.of(stored[1])) and back.GetDirection() == stored[1].GetDirection()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back), classes(stored[1]))


def test_an_oblique_volume_keeps_its_place(tmp_path, ct, label):
    turn = sitk.Euler3DTransform()
    turn.SetRotation(0.2, -0.1, 0.3)
    for image in (ct := sitk.Image(ct), label := sitk.Image(label)):
        image.SetDirection(turn.GetMatrix())
    volume = prepare(one(tmp_path, ct, label), replace(KEEP, spacing=(2.5, 4.0, 4.0)))["a"]
    corner = np.array(volume.grid.corners()).mean(0)
    middle = np.array(Geometry.of(ct).corners()).mean(0)
    np.testing.assert_allclose(corner, middle, atol=1e-3)
    back = to_source(volume.label[0], volume)
    agreement = (sitk.GetArrayFromImage(back) == classes(label)).mean()
    assert agreement > 0.98 and same_grid(Geometry.of(back), Geometry.of(label))


def test_the_order_of_axes_is_that_of_orienting():
    rng = np.random.default_rng(0)
    for _ in range(300):  # some have two axes that lie nearest to the same one of the patient's
        turn, triangle = np.linalg.qr(rng.standard_normal((3, 3)))
        image = sitk.Image(3, 4, 5, sitk.sitkUInt8)
        image.SetSpacing((1.5, 2.5, 8.0))
        image.SetDirection((turn * np.sign(np.diag(triangle))).ravel().tolist())
        oriented = sitk.DICOMOrient(image, "LPS")
        source = Geometry.of(image)
        assert source.lps(source.size) == oriented.GetSize()[::-1]
        assert source.lps(source.spacing) == oriented.GetSpacing()[::-1]


def test_a_label_whose_direction_is_rounded_is_turned_as_its_image(tmp_path, ct, label):
    # at 45 degrees the fifth decimal of the direction decides which axis counts as the patient's
    for image, angle in ((ct := sitk.Image(ct), np.pi / 4 - 1e-5), (label := sitk.Image(label), np.pi / 4 + 1e-5)):
        turn = sitk.Euler3DTransform()
        turn.SetRotation(angle, 0.0, 0.0)
        image.SetDirection(turn.GetMatrix())
    assert sitk.DICOMOrient(ct, "LPS").GetSize() != sitk.DICOMOrient(label, "LPS").GetSize()
    volume = prepare(one(tmp_path, ct, label), KEEP)["a"]
    assert volume.mask.shape == volume.image.shape
    same = sitk.Image(label)
    same.SetDirection(ct.GetDirection())
    np.testing.assert_array_equal(volume.label[0], classes(sitk.DICOMOrient(same, "LPS")))
    block = one(tmp_path, ct, label, slices=(0, 9))
    assert check(block, progress=False).facts[0].voxels[4] == int(
        (classes(sitk.DICOMOrient(same, "LPS"))[:10] == 4).sum()
    )


@pytest.mark.parametrize("spacing", [(2.5, 8.0, 8.0), (4.0, 9.0, 7.0), (1.3, 3.0, 3.1)])
def test_there_and_back_through_another_spacing(spacing, tmp_path, ct, label):
    volume = prepare(one(tmp_path, ct, label), replace(KEEP, spacing=spacing))["a"]
    assert volume.spacing == pytest.approx(spacing)
    extent = np.array(volume.image.shape[1:]) * spacing - np.array([24, 64, 64]) * [2.5, 5.625, 5.625]
    assert (extent > -1e-6).all() and (extent < spacing).all()  # the smallest grid that covers the source
    assert volume.image.min() >= 0 and volume.image.max() <= 1
    expected = classes(label)
    one_hot = torch.nn.functional.one_hot(volume.label[0], 7).movedim(-1, 0).float()
    for prediction in (volume.label[0], one_hot * 8 - 20):
        back = to_source(prediction, volume)
        found = sitk.GetArrayFromImage(back)
        assert same_grid(Geometry.of(back), Geometry.of(label)) and found.dtype == np.uint8
        liver = 2 * ((found == 4) & (expected == 4)).sum() / ((found == 4).sum() + (expected == 4).sum())
        assert liver > 0.9
        # no edge of the volume is lost: where all of it is one class, all of the source is
    assert (sitk.GetArrayFromImage(to_source(torch.ones_like(volume.label[0]), volume)) == 1).all()
    ones = torch.stack([torch.zeros(volume.image.shape[1:]), torch.ones(volume.image.shape[1:])])
    assert (sitk.GetArrayFromImage(to_source(ones, volume)) == 1).all()


def test_a_block_of_slices_goes_back_to_its_slices(tmp_path, ct, label):
    dataset = one(tmp_path, sitk.DICOMOrient(ct, "RAS"), sitk.DICOMOrient(label, "RAS"), slices=(5, 9))
    volume = prepare(dataset, KEEP)["a"]
    np.testing.assert_array_equal(volume.label[0], classes(label)[5:10])
    back = sitk.GetArrayFromImage(sitk.DICOMOrient(to_source(torch.ones(5, 64, 64, dtype=torch.int64), volume), "LPS"))
    assert back[5:10].all() and not back[:5].any() and not back[10:].any()


def test_predictions_of_another_shape_are_refused(tmp_path, ct, label):
    volume = prepare(one(tmp_path, ct, label), KEEP)["a"]
    with pytest.raises(ValueError, match=r"must be \[D, H, W\] or \[K \+ 1, D, H, W\] of \(24, 64, 64\)"):
        to_source(torch.zeros(24, 64, 63), volume)


def test_a_picture_comes_back_as_a_picture(tmp_path):
    picture = sitk.GetImageFromArray(np.arange(40 * 30, dtype=np.uint8).reshape(40, 30))
    volume = prepare_case(
        write(picture, tmp_path / "p.png"), Preprocessing(size=(20, 15), intensity=("percentile",), spacing=(None,) * 3)
    )
    assert volume.image.shape == (1, 1, 20, 15) and volume.name == "p" and volume.label is None
    back = to_source(torch.ones(1, 20, 15, dtype=torch.int64), volume)
    assert back.GetDimension() == 2 and back.GetSize() == (30, 40)


def test_resampling_keeps_physical_places():
    # a ramp in physical x stays that ramp; a box keeps its volume and centre
    image = sitk.Image(64, 64, 2, sitk.sitkFloat32)
    image.SetSpacing((0.5, 0.75, 3.0))
    image.SetOrigin((10.0, -20.0, 5.0))
    x = 10.0 + 0.5 * np.arange(64)
    ramp = sitk.GetImageFromArray(np.broadcast_to(x, (2, 64, 64)).astype(np.float32))
    ramp.CopyInformation(image)
    for small in (resample(ramp, size=(16, 16)), resample(ramp, spacing=(None, 3.0, 2.0))):
        assert small.GetSpacing() == pytest.approx((2.0, 3.0, 3.0)) and small.GetSize() == (16, 16, 2)
        found = sitk.GetArrayFromImage(small)[0, 8]
        expected = [small.TransformIndexToPhysicalPoint((i, 8, 0))[0] for i in range(16)]
        # away from the border, where smoothing mirrors; 0.01 is 2 % of a source pixel
        np.testing.assert_allclose(found[4:12], expected[4:12], atol=0.01)

    box = np.zeros((2, 64, 64), np.uint8)
    box[:, 16:32, 40:56] = 5
    label = sitk.GetImageFromArray(box)
    label.CopyInformation(image)
    small_box = sitk.GetArrayFromImage(resample(label, size=(16, 16), labels=True))
    expected_box = np.zeros((2, 16, 16), np.uint8)
    expected_box[:, 4:8, 10:14] = 5
    np.testing.assert_array_equal(small_box, expected_box)


@pytest.mark.parametrize("factor", [1.05, 1.5, 4.0])
def test_smoothing_grows_with_the_step(factor):
    # white noise: what is left of its variance falls with the step, and nearly all of it stays where there is hardly one
    noise = np.random.default_rng(0).standard_normal((4, 120, 120)).astype(np.float32)
    smoothed = sitk.GetArrayFromImage(resample(sitk.GetImageFromArray(noise), spacing=(None, None, factor)))
    linear = sitk.GetArrayFromImage(resample(sitk.GetImageFromArray(noise), spacing=(None, None, 1 / 1.05)))
    left = smoothed[..., 5:-5].var() / linear[..., 5:-5].var()
    assert {1.05: 0.85, 1.5: 0.3, 4.0: 0.1}[factor] < left < {1.05: 1.1, 1.5: 0.8, 4.0: 0.3}[factor]


def test_finer_grids_go_on_at_the_edges_and_thin_volumes_pass():
    flat = sitk.Image(5, 5, 1, sitk.sitkFloat32) + 7
    found = sitk.GetArrayFromImage(resample(flat, spacing=(None, 0.3, 0.7)))
    assert found.shape == (1, 17, 8) and (found == 7).all()  # nothing comes in from outside
    assert sitk.GetArrayFromImage(resample(flat, spacing=(None, 9.0, 2.0))).shape == (1, 1, 3)


def test_intensities(tmp_path, ct):
    values = sitk.GetArrayFromImage(ct).astype(np.float64)
    skull_stripped = changed(ct, lambda a: np.where(a < -500, 0, a + 2000).astype(np.int16))
    low, high = np.percentile(values, (10, 90))
    for word, settings, expected in [
        ("window", {"window": (-100, 300)}, (np.clip(values, -100, 300) + 100) / 400),
        ("percentile", {"percentiles": (10, 90)}, (np.clip(values, low, high) - low) / (high - low)),
        ("none", {}, values),
    ]:
        volume = prepare(one(tmp_path, ct, None), replace(KEEP, intensity=(word,), **settings))["a"]
        np.testing.assert_allclose(volume.image[0], expected, rtol=1e-4, atol=1e-4)
    scored = prepare(one(tmp_path, skull_stripped, None), replace(KEEP, intensity=("zscore",)))["a"].image[0]
    body = torch.from_numpy(sitk.GetArrayFromImage(skull_stripped) != 0)
    assert scored[body].mean().abs() < 1e-4 and abs(scored[body].std() - 1) < 1e-3
    assert scored[~body].unique().numel() == 1 and scored[~body][0] < scored[body].min()
    flat = prepare(one(tmp_path, ct * 0, None), replace(KEEP, intensity=("zscore",)))["a"].image
    assert (flat == 0).all()


@pytest.mark.parametrize("value", [1.0, 0.1, -3e4, 1e9])
def test_a_mask_as_a_channel_is_not_blown_up(value, tmp_path, ct):
    mask = changed(ct, lambda a: np.where(a > 100, value, 0).astype(np.float32))
    found = prepare(one(tmp_path, mask, None), replace(KEEP, intensity=("zscore",)))["a"].image[0]
    expected = torch.from_numpy(np.where(sitk.GetArrayFromImage(ct) > 100, 0.0, -value).astype(np.float32))
    torch.testing.assert_close(found, expected)


def test_small_numbers_are_scored_as_large_ones(tmp_path, ct):
    settings = replace(KEEP, intensity=("zscore",))
    large, small = (
        prepare(one(tmp_path, changed(ct, lambda a, s=scale: ((a + 1100) * s).astype(np.float32)), None), settings)
        for scale in (1.0, 1e-12)  # diffusion in m2/s is about 1e-9
    )
    torch.testing.assert_close(small["a"].image, large["a"].image, rtol=1e-4, atol=1e-4)


def test_plan_takes_medians_and_modalities(tmp_path, ct, label):
    root = write_nnunet(tmp_path / "set", ct, label, channels=2)
    wide = sitk.Image(ct)
    wide.SetSpacing((7.0, 7.0, 5.0))
    for i in (1, 2, 3):
        for c in range(2):
            write(sitk.DICOMOrient(wide, "PIR"), root / "imagesTr" / f"ct_{i:03d}_{c:04d}.nii.gz")
    dataset = open_dataset(root)
    assert plan(dataset, Preprocessing(dims=3)).spacing == pytest.approx((5.0, 7.0, 7.0))
    two = plan(dataset)
    assert two.spacing[0] is None and two.spacing[1:] == pytest.approx((7.0, 7.0))
    assert two.intensity == ("window", "zscore") and plan(dataset, two) == two
    assert plan(dataset, Preprocessing(size=(32, 32))).spacing == (None, None, None)
    third = plan(dataset, Preprocessing(dims=3, size=(32, 32)))
    assert third.spacing == (pytest.approx(5.0), None, None)
    assert plan(dataset, Preprocessing(intensity=("percentile",))).intensity == ("percentile", "percentile")
    with pytest.raises(WrongUse, match=r"one way a channel: .* has 2 channels \(CT, MR\), got 3"):
        plan(dataset, Preprocessing(intensity=("none",) * 3))


def test_a_channel_that_does_not_say_what_it_is(tmp_path, ct):
    assert plan(replace(one(tmp_path, ct, None), channels=("image",))).intensity == ("window",)
    assert plan(replace(one(tmp_path, ct, None), channels=("noNorm",))).intensity == ("none",)
    positive = sitk.Cast(ct + 3000, sitk.sitkInt16)
    assert plan(replace(one(tmp_path, positive, None), channels=("image",))).intensity == ("zscore",)


def test_a_case_with_fewer_channels_than_the_first_is_told(tmp_path, ct):
    # the channels of a CSV file's single column are those of its first case, which may be a colour picture
    dataset = replace(one(tmp_path, ct, None), channels=("image 0", "image 1", "image 2"))
    assert plan(dataset).intensity == ("window", "zscore", "zscore")
    with pytest.raises(WrongUse, match="gives 1 channels, 3 are wanted"):
        prepare(dataset)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dims": 4}, "dims must be 2"),
        ({"spacing": (1.0, 2.0)}, "spacing must be three positive numbers"),
        ({"spacing": (1.0, 2.0, -1.0)}, "spacing must be three positive numbers"),
        ({"size": (0, 4)}, "size must be two numbers >= 1"),
        ({"intensity": ("hu",)}, "intensity must be one of window, percentile, zscore, none, got 'hu'"),
        ({"window": (5, 5)}, "window must be"),
        ({"percentiles": (5, 101)}, "percentiles must be"),
        ({"voxel": 1}, "unknown preprocessing setting 'voxel': choose from dims"),
    ],
)
def test_settings_that_make_no_sense(values, message):
    with pytest.raises(WrongUse, match=message):
        Preprocessing.from_dict(values)


def test_settings_survive_a_plain_dict():
    settings = Preprocessing(dims=3, spacing=(None, 1.5, 1.5), intensity=("window", "zscore"), window=(-100, 200))
    assert Preprocessing.from_dict(settings.to_dict()) == settings
    assert Preprocessing.from_dict({"intensity": "window"}).intensity == ("window",)


def test_prepare_case_of_a_file_of_channels_and_of_a_series(tmp_path, ct):
    from small_sets import write_dicom_series

    file = write(ct, tmp_path / "a.nii.gz")
    series = write_dicom_series(tmp_path / "series", ct)
    volumes = [prepare_case(p, KEEP) for p in (file, str(file), [file], series, Case("a", "a", (file,)))]
    assert all(torch.equal(v.image, volumes[0].image) for v in volumes)
    assert volumes[3].name == "series" and same_grid(volumes[3].source, volumes[0].source)
    two = prepare_case([file, file], replace(KEEP, intensity=("window", "zscore")))
    assert two.image.shape == (2, 24, 64, 64)
    with pytest.raises(WrongUse, match="gives 2 channels, 1 are wanted"):
        prepare_case([file, file], KEEP)
    with pytest.raises(WrongUse, match="none.nii is not there"):
        prepare_case(tmp_path / "none.nii", KEEP)


# the cache


def entries() -> list[Path]:
    return sorted((Path(os.environ["MEDKD_FAST_CACHE"]) / "volumes").iterdir())


def test_a_volume_is_made_once_and_again_where_something_changed(tmp_path, ct, label, monkeypatch):
    dataset = one(tmp_path, ct, label)
    first = prepare(dataset, KEEP)["a"]
    assert len(entries()) == 1 and first.image.dtype == torch.float32
    with monkeypatch.context() as patch:
        patch.setattr(module, "read_images", lambda case: pytest.fail("read again"))
        again = prepare(dataset, KEEP)["a"]
        # only the time of change is another
        os.utime(dataset.cases[0].images[0], (1, 1))
        renamed = replace(dataset, cases=(replace(dataset.cases[0], name="b", patient="p"),))
        other = prepare(renamed, KEEP)["b"]
    assert torch.equal(first.image, again.image) and torch.equal(first.label, again.label)
    assert (again.spacing, again.grid, again.source) == (first.spacing, first.grid, first.source)
    assert (other.name, other.patient) == ("b", "p")
    again.image.zero_()  # stays in memory
    assert torch.equal(prepare(dataset, KEEP)["a"].image, first.image)

    prepare(dataset, replace(KEEP, window=(0, 100)))
    prepare(replace(dataset, label_values={0: 0, **dict.fromkeys(ORGANS.values(), 1)}), KEEP)
    assert len(entries()) == 3
    write(sitk.Cast(ct + 1, sitk.sitkInt16), dataset.cases[0].images[0])
    changed_ = prepare(dataset, KEEP)["a"]
    assert len(entries()) == 4 and not torch.equal(changed_.image, first.image)


def test_voxels_beside_a_header_count(tmp_path, ct):
    path = write(ct, tmp_path / "case.1.mhd")
    dataset = replace(one(tmp_path, ct, None), cases=(Case("a", "a", (path,)),))
    first = prepare(dataset, KEEP)["a"]
    raw = next(p for p in tmp_path.iterdir() if "raw" in p.name)
    content = bytearray(raw.read_bytes())
    header = path.read_bytes(), path.stat().st_mtime_ns
    write(sitk.Cast(ct + 60, sitk.sitkInt16), path)
    assert raw.read_bytes() != content
    path.write_bytes(header[0])
    os.utime(path, ns=(header[1], header[1]))  # the header is the same to the second
    assert not torch.equal(prepare(dataset, KEEP)["a"].image, first.image)


def test_headers_whose_names_differ_after_a_dot_are_files_of_their_own(tmp_path, ct, label):
    paths = [
        (write(ct + i, tmp_path / f"1.3.6.{i}.mhd"), write(label * (i > 0), tmp_path / f"label.{i}.mhd"))
        for i in range(3)
    ]
    cases = tuple(Case(image.stem, image.stem, (image,), mask) for image, mask in paths)
    volumes = prepare(replace(one(tmp_path, ct, label), cases=cases), KEEP)
    for i, volume in enumerate(volumes.values()):
        expected = np.clip((sitk.GetArrayFromImage(ct) + i + 175.0) / 425, 0, 1)
        np.testing.assert_allclose(volume.image[0], expected, atol=1e-6)
        np.testing.assert_array_equal(volume.label[0], classes(label) * (i > 0))


def test_what_a_look_into_a_folder_leaves_there_does_not_count(tmp_path, ct):
    from small_sets import write_dicom_series

    folder = write_dicom_series(tmp_path / "series", ct)
    digests = [digest_of_content(folder, tmp_path)]
    for name in (".DS_Store", "notes.txt"):
        (folder / name).write_text("seen")
        digests.append(digest_of_content(folder, tmp_path))
    assert digests[0] == digests[1] != digests[2]


def test_a_torn_entry_is_made_again(tmp_path, ct, label):
    dataset = one(tmp_path, ct, label)
    first = prepare(dataset, KEEP)["a"]
    whole = first.image.clone()
    del first
    file = entries()[0] / "image.npy"
    for spoil in (
        lambda: file.write_bytes(file.read_bytes()[:500]),
        lambda: (file.parent / "facts.json").write_text("{"),
    ):
        spoil()
        assert torch.equal(prepare(dataset, KEEP)["a"].image, whole)


def test_notes_that_a_power_cut_has_emptied_are_written_anew(tmp_path, ct, label):
    root = write_nnunet(tmp_path / "set", ct, label, cases=2)
    first = {n: v.image.clone() for n, v in prepare(open_dataset(root), KEEP).items()}
    for note in (Path(os.environ["MEDKD_FAST_CACHE"]) / "digests").iterdir():
        note.write_text("")
    again = prepare(open_dataset(root), KEEP)
    assert all(torch.equal(again[n].image, image) for n, image in first.items()) and len(entries()) == 2


def test_two_processes_fill_one_cache(tmp_path, ct, label):
    root = write_nnunet(tmp_path / "set", ct, label, cases=3)
    code = (
        "import sys; from medkd_fast.training.data.dataset import open_dataset;"
        "from medkd_fast.training.data.prepare import prepare, Preprocessing;"
        "print('ready', flush=True); sys.stdin.readline();"
        "v = prepare(open_dataset(sys.argv[1]), Preprocessing(dims=3));"
        "print(*(x.image.double().sum().item() + x.label.sum().item() for x in v.values()))"
    )
    command = [sys.executable, "-c", code, str(root)]
    workers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"  # both have imported: now they run at once
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    found = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0] and found[0] == found[1] and len(found[0].split()) == 3
    assert len(entries()) == 3 and not any(p.name.startswith(".") for p in entries())  # nothing is left lying about


def test_who_comes_second_keeps_what_is_there(tmp_path):
    from medkd_fast.training.data.cache import load, store

    store(tmp_path / "k", {"image": np.zeros(3)}, {"n": 1})
    store(tmp_path / "k", {"image": np.ones(3)}, {"n": 2})
    arrays, facts = load(tmp_path / "k")
    assert facts == {"n": 1} and not arrays["image"].any()
    assert [p.name for p in tmp_path.iterdir()] == ["k"]
    assert load(tmp_path / "none") is None


def test_what_is_mapped_holds_no_file_open(tmp_path, ct, label):
    # a process may often have 1024 of them, and a data set more cases
    prepare(one(tmp_path, ct, label), KEEP)
    before = len(os.listdir("/proc/self/fd"))
    volumes = [prepare(one(tmp_path, ct, label), KEEP)["a"] for _ in range(3)]
    assert len(os.listdir("/proc/self/fd")) == before and torch.equal(volumes[0].label[0], torch.tensor(classes(label)))


def test_arrays_of_any_layout_come_back_as_they_were(tmp_path):
    from medkd_fast.training.data.cache import load, store

    counted = np.arange(24.0).reshape(2, 3, 4)
    arrays = {"rows": counted, "columns": np.asfortranarray(counted), "some": counted[:, ::2].T, "one": np.array(5.0)}
    store(tmp_path / "k", arrays | {"bytes": np.arange(7, dtype=np.uint8), "none": np.zeros((0, 3))}, {})
    found, _ = load(tmp_path / "k")
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)
    assert found["bytes"].tolist() == list(range(7)) and found["none"].shape == (0, 3)


def test_reading_takes_nothing_away_and_storing_replaces_what_is_torn(tmp_path):
    """Another process may be done with an entry between a look that finds none and what follows from it."""
    from medkd_fast.training.data.cache import load, store

    (tmp_path / "k").mkdir()
    (tmp_path / "k" / "image.npy").write_bytes(b"half")
    assert load(tmp_path / "k") is None and (tmp_path / "k" / "image.npy").exists()
    store(tmp_path / "k", {"image": np.arange(6.0).reshape(2, 3)}, {"n": 1})
    arrays, facts = load(tmp_path / "k")
    assert facts == {"n": 1} and arrays["image"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_cache_that_cannot_be_written(tmp_path, ct, label):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WrongUse, match="cannot be written .*: set MEDKD_FAST_CACHE to a folder with space"):
        prepare(one(tmp_path, ct, label), KEEP, cache=tmp_path / "file")


def test_a_full_disk_leaves_no_half_volume(tmp_path, ct, label):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # or the kernel would end the process
    dataset = one(tmp_path, ct, label)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with pytest.raises(
            WrongUse, match=r"\(\d+ requested and \d+ written: is the disk full\?\): set MEDKD_FAST_CACHE"
        ):
            prepare(dataset, KEEP)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert entries() == []


def test_the_default_cache(monkeypatch, tmp_path):
    from medkd_fast.training.data.cache import default_cache

    assert default_cache() == tmp_path / "cache"
    monkeypatch.delenv("MEDKD_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "medkd_fast"


def test_blocks_of_one_volume_are_read_together(tmp_path, ct, label, monkeypatch):
    dataset = one(tmp_path, ct, label)
    blocks = tuple(replace(dataset.cases[0], name=f"b{a}", slices=(a, a + 3)) for a in (0, 4, 8))
    calls = itertools.count()
    read = module.read_images
    monkeypatch.setattr(module, "read_images", lambda case: (next(calls), read(case))[1])
    volumes = prepare(replace(dataset, cases=blocks), KEEP)
    assert next(calls) == 1
    np.testing.assert_array_equal(torch.cat([v.label[0] for v in volumes.values()]), classes(label)[:12])


@pytest.mark.parametrize("factor", [2, 4, 0.5, 3])
def test_labels_stay_where_they_are_when_the_grid_changes(factor):
    """Also where every new voxel lies between two old ones: by nearest neighbours they move by half a voxel."""
    z, y, x = np.mgrid[:40, :40, :40]
    ball = ((z - 19.3) ** 2 + (y - 20.1) ** 2 + (x - 18.6) ** 2 < 12**2).astype(np.uint8)
    label = sitk.GetImageFromArray(ball)
    found = resample(label, spacing=(factor,) * 3, labels=True)

    def middle(image):
        places = np.argwhere(sitk.GetArrayFromImage(image) == 1).mean(0)
        return np.array(image.TransformContinuousIndexToPhysicalPoint(places[::-1].tolist()))

    assert set(np.unique(sitk.GetArrayFromImage(found))) == {0, 1}
    assert np.abs(middle(found) - middle(label)).max() < 0.1 * factor
    assert (sitk.GetArrayFromImage(found) == 1).sum() * factor**3 == pytest.approx(ball.sum(), rel=0.06)


@pytest.mark.parametrize("spacing", [(2.0, 1.1, 4.0), (0.6, 3.0, 3.0), (None, 2.5, 0.5)])
def test_labels_are_those_with_the_largest_share_and_small_ones_cost_little(spacing, monkeypatch):
    label = np.zeros((31, 60, 50), np.uint8)
    for c, place in enumerate([(0, 0, 0), (20, 50, 40), (12, 20, 7), (13, 24, 11), (30, 59, 49)], start=1):
        label[tuple(slice(p, p + 10) for p in place)] = 10 * c
    label[5, 30:40, 30] = 255  # a line
    image = sitk.GetImageFromArray(label)
    image.SetSpacing((1.0, 0.9, 1.4))
    shares = [resample(sitk.Cast(image == v, sitk.sitkFloat32), spacing=spacing) for v in np.unique(label).tolist()]
    smoothed, smooth = [], sitk.RecursiveGaussian
    monkeypatch.setattr(
        sitk, "RecursiveGaussian", lambda i, **how: (smoothed.append(i.GetNumberOfPixels()), smooth(i, **how))[1]
    )
    found = resample(image, spacing=spacing, labels=True)
    expected = np.unique(label)[np.argmax([sitk.GetArrayFromImage(s) for s in shares], 0)]
    np.testing.assert_array_equal(sitk.GetArrayFromImage(found), expected)
    assert Geometry.of(found) == Geometry.of(shares[0])
    # along an axis: the whole for the background, parts for the others
    assert 0 < sum(smoothed) < 2.5 * label.size * len(smoothed) / len(shares)
