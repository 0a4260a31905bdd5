"""The wheel and the sdist as a user gets them: what is in them, where they load, what a build from them makes.

The objects of this checkout are taken, which is why nothing is compiled anew.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from sources import ROOT

OBJECTS = ROOT / "build" / "objects"
pytestmark = pytest.mark.skipif(
    not OBJECTS.is_dir(), reason="nothing was compiled in this checkout: pip install --no-build-isolation --editable ."
)


def run(*command: object, cwd: Path, **environment: str) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def build(kind: str, source: Path, out: Path, **environment: str) -> Path:
    run(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", out, source, cwd=out, **environment)
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made of the files that git knows: what else lies about must not be needed."""
    source = tmp_path_factory.mktemp("checkout")
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the unpacked sdist, with the objects that this checkout has compiled."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    (source / "build").mkdir()
    (source / "build" / "objects").symlink_to(OBJECTS)
    # no second run of nvcc where this checkout was installed without
    without = {} if (ROOT / "medkd_fast" / "_cuda.so").exists() else {"MEDKD_FAST_NO_CUDA": "1"}
    return build("wheel", source, tmp_path_factory.mktemp("wheel"), **without)


def version() -> str:
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert found
    return found[1]


def test_sdist_holds_every_source(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    tracked = run("git", "ls-files", "csrc", "medkd_fast", "tests", cwd=ROOT).splitlines()
    assert {name for name in tracked if (ROOT / name).exists()} <= held
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"} <= held


def test_wheel_holds_the_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "medkd_fast").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert {"medkd_fast/_cpu.so", "medkd_fast/py.typed", "medkd_fast/_build.json"} <= set(names)
    assert ("medkd_fast/_cuda.so" in names) == (ROOT / "medkd_fast" / "_cuda.so").exists()
    assert not [name for name in names if name.startswith(("tests/", "bench/", "docs/"))]


def test_wheel_is_for_every_python_and_old_systems(wheel: Path) -> None:
    assert wheel.name == f"medkd_fast-{version()}-py3-none-manylinux_2_28_{os.uname().machine}.whl"
    said = json.loads(run(sys.executable, "-m", "auditwheel", "show", "--json", wheel, cwd=wheel.parent))
    found = re.match(r"manylinux_2_(\d+)_", said["sym_tag"])
    assert found and int(found[1]) <= 28, said["versioned_symbols"]
    # libtorch is there before the library is loaded, wherever torch is
    assert set(said["external_libs"]) <= {"libtorch.so", "libtorch_cpu.so"}
    assert not said["unsupported_isa"]


def test_wheel_loads_where_it_is_unpacked(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import torch, medkd_fast; medkd_fast.set_backend('cpp'); x = torch.randn(2, 3, 5, 7);"
        "print(medkd_fast.__file__, medkd_fast.__version__, medkd_fast.class_kl(x, x).item())"
    )
    place, found, loss = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path)).split()
    assert Path(place).parent.parent == tmp_path
    assert (found, float(loss)) == (version(), 0.0)


def test_wheel_without_a_compiler_is_pure(sdist: Path, tmp_path: Path) -> None:
    unpacked, out = tmp_path / "unpacked", tmp_path / "out"
    out.mkdir()
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    made = build("wheel", source, out, MEDKD_FAST_NO_EXT="1")
    assert made.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(made).namelist() if name.endswith(".so")]
