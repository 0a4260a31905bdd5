"""segmentation_scores against distances worked out by hand and against MONAI."""

from __future__ import annotations

import math

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from medpy.metric import binary
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

from medkd_fast.training.metrics import (
    Summary,
    mean_scores,
    segmentation_scores,
    summarise,
    surface,
    surface_distances,
    transunet_scores,
)

NAN = math.nan


def blobs(shape: tuple[int, ...], seed: int, threshold: float = 0.52) -> np.ndarray:
    """Random smooth blobs, touching the border here and there."""
    noise = sitk.GetImageFromArray(np.random.default_rng(seed).random(shape).astype(np.float32))
    return sitk.GetArrayFromImage(sitk.DiscreteGaussian(noise, 2.0)) > threshold


def brute_force(a: np.ndarray, b: np.ndarray, spacing) -> tuple[np.ndarray, np.ndarray]:
    """Directed surface distances over all pairs of points, surfaces found voxel by voxel."""

    def points(mask):
        found = []
        for index in np.argwhere(mask):
            for axis in range(mask.ndim):
                for step in (-1, 1):
                    neighbour = index.copy()
                    neighbour[axis] += step
                    outside = (neighbour < 0).any() or (neighbour >= mask.shape).any()
                    if outside or not mask[tuple(neighbour)]:
                        found.append(tuple(index))
        return np.array(sorted(set(found))) * np.array(spacing)

    distances = np.linalg.norm(points(a)[:, None] - points(b)[None], axis=-1)
    return distances.min(1), distances.min(0)


def one_hot(mask: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(mask)[None, None].float()


def test_shifted_square_by_hand():
    # a 3 x 3 square moved by 2 columns of 0.5 mm: each surface has 8 pixels
    label = np.zeros((6, 9), np.int64)
    label[1:4, 1:4] = 7
    prediction = np.roll(label, 2, axis=1)
    scores = segmentation_scores(prediction, label, spacing=(3.0, 0.5), classes=[7])[7]
    assert scores.dice == pytest.approx(2 * 3 / 18)
    # prediction columns 3, 4, 5 to label columns 1, 2, 3: the shared column 3 gives 0 (3 pixels), column 5 gives 1.0
    # (3 pixels), the two pixels of column 4 give 0.5; the same the other way round
    assert scores.assd == pytest.approx((3 * 0 + 2 * 0.5 + 3 * 1.0) / 8)
    assert scores.hd95 == pytest.approx(1.0)


def test_the_two_definitions_by_hand():
    # 20 label pixels in a row, the prediction is the first alone: 0..19 mm one way, 0 the other
    label = np.zeros((3, 22), np.uint8)
    label[1, 1:21] = 1
    prediction = np.zeros_like(label)
    prediction[1, 1] = 1
    both = [
        segmentation_scores(prediction, label, spacing=(1, 1), classes=[1], definition=d)[1] for d in ("max", "pooled")
    ]
    # linear percentile of 0..19: 0.95 * 19; of {0, 0..19}: position 0.95 * 20 = 19 in 21 sorted values, value 18
    assert [s.hd95 for s in both] == pytest.approx([18.05, 18.0])
    assert [s.assd for s in both] == pytest.approx([190 / 21, 190 / 21])
    # the larger direction counts whichever way round the two volumes come
    turned = segmentation_scores(label, prediction, spacing=(1, 1), classes=[1])[1]
    assert turned[:3] == pytest.approx(both[0][:3])


def test_anisotropic_spacing_is_in_array_order():
    label = np.zeros((8, 8, 8), np.uint8)
    label[2, 2, 2] = 1
    for axis, expected in enumerate((4 * 2.5, 4 * 0.7, 4 * 0.9)):
        prediction = np.roll(label, 4, axis=axis)
        scores = segmentation_scores(prediction, label, spacing=(2.5, 0.7, 0.9), classes=[1])[1]
        assert scores[:3] == pytest.approx((0.0, expected, expected), rel=1e-6)  # SimpleITK's map is float32


def test_surface_is_the_mask_minus_its_6_connected_erosion():
    cube = np.zeros((7, 7, 7), bool)
    cube[1:6, 1:6, 1:6] = True
    assert surface(cube).sum() == 5**3 - 3**3
    plus = cube.copy()
    plus[1, 1, 1] = False  # a corner lost: diagonal neighbours stay inside
    assert not surface(plus)[2, 2, 2]
    full = np.ones((4, 4, 4), bool)  # outside the volume is background
    assert surface(full).sum() == 4**3 - 2**3


@pytest.mark.parametrize(
    ("shape", "spacing"), [((9, 13, 11), (2.5, 0.7, 1.1)), ((17, 19), (0.8, 1.7)), ((1, 7, 5), (5.0, 1.0, 1.0))]
)
def test_surface_distances_equal_brute_force(shape, spacing):
    rng = np.random.default_rng(5)
    a, b = rng.random(shape) > 0.6, rng.random(shape) > 0.8
    expected = brute_force(a, b, spacing)
    for mine, theirs in zip(surface_distances(a, b, spacing), expected, strict=True):
        np.testing.assert_allclose(np.sort(mine), np.sort(theirs), rtol=1e-6, atol=1e-6)  # float32 maps
    scores = [
        segmentation_scores(a.astype(int), b.astype(int), spacing=spacing, classes=[1], definition=d)[1]
        for d in ("max", "pooled")
    ]
    assert scores[0].hd95 == pytest.approx(max(np.percentile(d, 95) for d in expected), rel=1e-6)
    assert scores[1].hd95 == pytest.approx(np.percentile(np.concatenate(expected), 95), rel=1e-6)
    assert scores[0].assd == pytest.approx(np.concatenate(expected).mean(), rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI calling itself
@pytest.mark.parametrize(
    ("shape", "spacing"), [((20, 31, 29), (2.5, 0.8, 1.3)), ((12, 16, 16), (1, 1, 1)), ((40, 37), (0.7, 2.0))]
)
def test_equals_monai(shape, spacing):
    a, b = blobs(shape, 1), blobs(shape, 2)
    assert a[0].any() and b.any()  # touches the border
    scores = segmentation_scores(a.astype(np.int16), b.astype(np.int16), spacing=spacing, classes=[1])[1]
    spacing = [float(s) for s in spacing]
    hd95 = compute_hausdorff_distance(one_hot(a), one_hot(b), include_background=True, percentile=95, spacing=spacing)
    assd = compute_average_surface_distance(
        one_hot(a), one_hot(b), include_background=True, symmetric=True, spacing=spacing
    )
    assert scores.hd95 == pytest.approx(hd95.item(), rel=1e-5)
    assert scores.assd == pytest.approx(assd.item(), rel=1e-5)


def test_identical_masks_and_masks_that_fill_the_volume():
    for mask in (np.ones((3, 4, 5), int), np.ones((1, 1, 1), int), blobs((8, 9, 10), 3, 0.5).astype(int)):
        assert segmentation_scores(mask, mask, spacing=(1, 2, 3), classes=[1])[1] == (1.0, 0.0, 0.0, "valid")


def test_empty_policies():
    one, none = np.zeros((3, 4, 12), int), np.zeros((3, 4, 12), int)
    one[1, 1, 1] = 1
    diagonal = math.hypot(3 * 2.0, 4 * 2.0, 12 * 2.0)
    for empty, distance in (("nan", NAN), ("inf", math.inf), ("diagonal", diagonal)):
        for prediction, label, outcome in ((one, none, "false"), (none, one, "missed")):
            scores = segmentation_scores(prediction, label, spacing=(2, 2, 2), classes=[1], empty=empty)[1]
            assert scores[:3] == pytest.approx((0.0, distance, distance), nan_ok=True)
            assert scores.outcome == outcome
        both = segmentation_scores(none, none, spacing=(2, 2, 2), classes=[1], empty=empty)[1]
        assert all(math.isnan(v) for v in both[:3]) and both.outcome == "absent"


def test_several_classes_and_tensors():
    label = torch.zeros(2, 6, 6, dtype=torch.int64)
    label[:, :3], label[:, 4:] = 1, 3
    prediction = label.clone()
    prediction[:, 4:] = 2
    scores = segmentation_scores(prediction, label, spacing=(1, 1, 1), classes=(1, 2, 3, 4))
    assert list(scores) == [1, 2, 3, 4]
    assert scores[1] == (1.0, 0.0, 0.0, "valid")
    assert scores[2].dice == scores[3].dice == 0.0
    assert math.isnan(scores[4].dice)


def test_summarise_counts_and_means():
    label = np.zeros((2, 5, 5), int)
    label[:, 1:3, 1:3] = 1
    none, wide = np.zeros_like(label), np.zeros_like(label)
    wide[:, 1:3, 1:4] = 1
    cases = [(label, label), (wide, label), (none, label), (label, none), (none, none)]

    def found(**options):
        return summarise(segmentation_scores(p, y, spacing=(1, 1, 1), classes=[1, 2], **options) for p, y in cases)

    one, two = found()[1], found()[2]
    # dice 1, 2*8/20 and 0 (missed); the false one and the empty one are in no mean
    assert one.dice == pytest.approx((1 + 0.8 + 0) / 3)
    # the added column is 1 mm away: 4 of the 12 surface voxels one way, none the other: 95th percentile 1
    assert one.hd95 == pytest.approx((0 + 1) / 2)
    assert one.assd == pytest.approx((0 + 4 / 20) / 2)
    assert one[3:] == (2, 1, 1)
    assert two == pytest.approx(Summary(NAN, NAN, NAN, 0, 0, 0), nan_ok=True)
    assert found(empty="inf")[1].hd95 == math.inf
    assert mean_scores(found()) == pytest.approx(one)


def as_transunet(prediction: np.ndarray, label: np.ndarray) -> tuple[float, float]:
    """Dice and HD95 of one mask as the script works them out, by medpy."""
    if prediction.any() and label.any():
        return binary.dc(prediction, label), binary.hd95(prediction, label)
    return (1, 0) if prediction.any() else (0, 0)


def test_the_protocol_of_transunet_equals_medpy_with_the_scripts_rule():
    rng = np.random.default_rng(1)
    volumes = []
    for seed in range(3):
        label = blobs((9, 21, 17), seed) + 2 * blobs((9, 21, 17), seed + 10, 0.53) * rng.integers(0, 2)
        prediction = np.roll(label, (1, 2, 0), (0, 1, 2))
        prediction[prediction == 3] = 4  # 3 is missed, 4 is false, 5 is absent
        volumes.append((prediction, label))
    assert {3} < set(np.unique([label for _, label in volumes]))
    classes = [1, 2, 3, 4, 5]
    expected = np.array([[as_transunet(p == c, y == c) for c in classes] for p, y in volumes])  # [volume, class, 2]
    cases = [transunet_scores(p, y, classes=classes) for p, y in volumes]
    mine = np.array([[case[c][:2] for c in classes] for case in cases])
    np.testing.assert_allclose(mine, expected, rtol=1e-6)
    summaries = summarise(cases, every_volume=True)
    np.testing.assert_allclose([s[:2] for s in summaries.values()], expected.mean(0), rtol=1e-6)
    np.testing.assert_allclose(mean_scores(summaries)[:2], expected.mean((0, 1)), rtol=1e-6)
    assert math.isnan(mean_scores(summaries).assd)


def test_the_protocol_of_transunet_by_hand():
    label, none = np.zeros((1, 3, 22), int), np.zeros((1, 3, 22), int)
    label[0, 1, 1:21] = 1
    prediction = np.zeros_like(label)
    prediction[0, 1, 1] = 1
    cases = [transunet_scores(p, y, classes=[1]) for p, y in ((prediction, label), (none, label), (label, none))]
    assert [c[1][:2] for c in cases] == [(pytest.approx(2 / 21), pytest.approx(18.0)), (0, 0), (1, 0)]
    found = summarise(cases, every_volume=True)[1]
    assert found[:2] == pytest.approx(((2 / 21 + 0 + 1) / 3, 18 / 3))
    assert found[3:] == (1, 1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spacing": (1, 1)}, "spacing must give 3 values"),
        ({"spacing": (1, 0, 1)}, "positive"),
        ({"spacing": (1, NAN, 1)}, "positive"),
        ({"definition": "mean"}, r"definition must be one of \('max', 'pooled'\), got 'mean'"),
        ({"empty": "zero"}, "empty must be one of"),
        ({"prediction": np.zeros((2, 2, 3), int)}, "one shape"),
        ({"prediction": np.zeros((2, 2, 2))}, "prediction must hold integer class values, got float64"),
        ({"label": torch.zeros(2, 2, 2)}, "label must hold integer"),
        ({"prediction": np.zeros(4, int), "label": np.zeros(4, int)}, r"\[Z, Y, X\] or \[Y, X\]"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {"prediction": np.zeros((2, 2, 2), int), "label": np.zeros((2, 2, 2), int), "spacing": (1, 1, 1)}
    arguments |= change
    with pytest.raises(ValueError, match=message):
        segmentation_scores(**arguments, classes=[1])
