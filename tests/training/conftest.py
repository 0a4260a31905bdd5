"""A small made-up data set on disk in place of patients, and runs that take seconds."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from medkd_fast.training.config import RunConfig
from medkd_fast.training.runs import Plan, fit, plan_run

WIDTHS = [4, 4, 4, 8, 8, 4]
CLASSES = {1: "spleen", 2: "gallbladder", 3: "liver", 4: "aorta"}  # no case has a gallbladder
SIDES = ("train", "train", "train", "validation", "test", "test")


def write_small_data(folder: Path) -> Path:
    """A CSV data set of six patients, 6 slices of 32 x 32 each: bright organs that move a little, noise."""
    folder.mkdir(parents=True, exist_ok=True)
    random, rows = np.random.default_rng(0), []
    for number, side in enumerate(SIDES):
        label = np.zeros((6, 32, 32), np.uint8)
        y, x = random.integers(-2, 3, 2)
        label[:, 8 + y : 20 + y, 4 + x : 14 + x] = 3
        label[:, 10 + y : 18 + y, 20 + x : 28 + x] = 1
        label[:, 24:28, 15 + x : 19 + x] = 4
        level = np.array([0.0, 0.7, 0.0, 0.5, 1.0])[label]
        for name, array in (("image", level + 0.05 * random.random(label.shape)), ("label", label)):
            image = sitk.GetImageFromArray(array.astype(np.float32 if name == "image" else np.uint8))
            image.SetSpacing((1.5, 1.5, 2.0))
            sitk.WriteImage(image, str(folder / f"{name}{number}.nii.gz"))
        rows.append((f"image{number}.nii.gz", f"label{number}.nii.gz", f"case{number}", side))
    (folder / "classes.json").write_text(json.dumps({str(c): name for c, name in CLASSES.items()}))
    with (folder / "small.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "label", "case", "split"), *rows])
    return folder / "small.csv"


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> Path:
    """Prepared volumes of the tests, in a folder of their own."""
    os.environ["MEDKD_FAST_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return Path(os.environ["MEDKD_FAST_CACHE"])


@pytest.fixture(scope="session")
def small_csv(tmp_path_factory) -> str:
    return str(write_small_data(tmp_path_factory.mktemp("small")))


@pytest.fixture(scope="session")
def config(small_csv) -> RunConfig:
    return RunConfig(
        small_csv,
        network_args={"features": WIDTHS},
        preprocessing={"intensity": ["none"]},
        epochs=4,
        steps=6,
        learning_rate=0.02,
        seed=3,
        accelerator="cpu",
    )


@pytest.fixture(scope="session")
def teacher(tmp_path_factory, config) -> Path:
    """The run of a briefly trained teacher of other widths."""
    wider = {"features": [8, 8, 8, 16, 16, 8]}
    return fit(config.resolved(network_args=wider, epochs=1), tmp_path_factory.mktemp("runs") / "teacher")


@pytest.fixture(scope="session")
def plan(config) -> Plan:
    return plan_run(config)
