"""Which backend runs, and what happens where the native library is missing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import cuda_report
import pytest
import torch
from operators import in_new_process

import medkd_fast
from medkd_fast import backend

ROOT = Path(__file__).parent.parent


def test_forcing_and_restoring() -> None:
    assert backend.choose("class_kl", "cpu", 1) == ("cpp" if not backend.UNAVAILABLE["cpp"] else "reference")
    with medkd_fast.use_backend("reference"):
        assert backend.choose("class_kl", "cpu", 1) == "reference"
        with pytest.raises(RuntimeError, match="inner"), medkd_fast.use_backend("auto"):
            raise RuntimeError("inner")
        assert backend.choose("class_kl", "cpu", 1) == "reference"
    with pytest.raises(ValueError, match="backend: got 'gpu', want one of auto, cpp, cuda, triton, reference"):
        medkd_fast.set_backend("gpu")


def test_forcing_a_backend_on_a_device_without_it(cpp: str) -> None:
    with pytest.raises(
        RuntimeError, match="'cpp' is forced and has no kernel for cuda tensors; fused kernels exist for cpu, cuda"
    ):
        backend.choose("class_kl", "cuda", 1)


def test_small_work_on_a_gpu_goes_where_launches_cost_least(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "triton"):
        monkeypatch.setitem(backend.UNAVAILABLE, name, "")
    monkeypatch.setattr(backend, "_has_machine_code", lambda gpu: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    few, many = backend.HOST_BOUND, backend.HOST_BOUND + 1
    assert (backend.choose("class_kl", "cuda", few), backend.choose("class_kl", "cuda", many)) == ("cuda", "triton")
    # 64 multiply-adds for each number take twice as long as reading them
    assert backend.choose("pixel_relation", "cuda", few // 2, 64) == "cuda"
    assert backend.choose("pixel_relation", "cuda", few // 2 + 1, 64) == "triton"
    assert backend.choose("class_kl", "cuda", many, cuda_first=True) == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert {(r.backend, r.why) for r in backend.report() if r.device_type == "cuda"} == {
        ("triton", "cuda where there is little to do")
    }
    monkeypatch.setattr(backend, "_has_machine_code", lambda gpu: False)
    assert backend.choose("class_kl", "cuda", few) == "triton"
    assert backend.choose("class_kl", "cuda", many, cuda_first=True) == "triton"
    monkeypatch.setattr(backend, "_has_machine_code", lambda gpu: True)
    monkeypatch.setitem(backend.UNAVAILABLE, "cuda", "not built")
    assert backend.choose("class_kl", "cuda", few) == "triton"


@pytest.mark.parametrize(
    ("capability", "there"),
    [((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((10, 0), False), ((12, 0), False)],
)
def test_machine_code(capability: tuple[int, int], there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", {0: (7, 0), 1: capability}.get)
    assert backend._has_machine_code.__wrapped__(1) == there


def test_a_library_that_the_driver_is_too_old_for() -> None:
    built = "built with nvcc release 13.0 against torch 2.13.0"
    assert backend._too_new(built, 12080) == (
        "medkd_fast/_cuda.so is built with nvcc release 13.0 against torch 2.13.0, and the driver is for CUDA 12.8: want a "
        "driver for CUDA 13, or a build with nvcc 12"
    )
    # an older minor version of the same major one will do; without a driver or a report nothing is known
    assert not any(backend._too_new(built, driver) for driver in (13000, 14010, None))
    assert not backend._too_new("", 12080)


def test_falling_back_warns_once(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setattr(backend, "_warned", set())
    monkeypatch.setitem(backend.UNAVAILABLE, "cpp", "the library was not built: no compiler")
    x = torch.zeros(1, 2, 3, 3)
    for _ in range(3):
        assert medkd_fast.class_kl(x, x) == 0
    messages = [str(w.message) for w in recwarn]
    assert messages == [
        "medkd_fast.class_kl runs on the slower reference backend: the library was not built: no compiler"
    ]
    with pytest.raises(RuntimeError, match="'cpp' cannot run here: the library was not built: no compiler.*doctor"):
        medkd_fast.set_backend("cpp")
    assert {(row.backend, row.why) for row in backend.report() if row.device_type == "cpu"} == {
        ("reference", "the library was not built: no compiler")
    }


def test_a_source_tree_is_told_from_an_installation_without_libraries(tmp_path: Path) -> None:
    without = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    shutil.copytree(ROOT / "medkd_fast", tmp_path / "medkd_fast", ignore=without)
    script = (
        f"import os; os.chdir({str(tmp_path)!r})\nfrom medkd_fast import backend; print(backend.UNAVAILABLE['cpp'])"
    )
    why = in_new_process(script)
    assert "not built (MEDKD_FAST_NO_EXT=1)" in why
    (tmp_path / "setup.py").touch()
    why = in_new_process(script)
    assert f"this is the source in {tmp_path}" in why and "--editable" in why and "NO_EXT" not in why


def test_a_reason_that_two_backends_share_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("triton", "cuda"):
        monkeypatch.setitem(backend.UNAVAILABLE, name, "built without CUDA")
    assert {row.why for row in backend.report() if row.device_type == "cuda"} == {"built without CUDA"}


def test_environment_variable() -> None:
    script = "from medkd_fast import backend; print(backend.choose('decoupled_kl', 'cpu', 1))"
    assert in_new_process(script, MEDKD_FAST_BACKEND="reference").strip() == "reference"
    with pytest.raises(AssertionError, match="backend: got 'fast', want one of"):
        in_new_process(script, MEDKD_FAST_BACKEND="fast")


def test_importing_the_package_imports_no_training_package_and_no_compiler() -> None:
    script = "import sys, medkd_fast, medkd_fast.losses; print(' '.join(sorted(sys.modules)))"
    loaded = set(in_new_process(script).split())
    assert not loaded & {
        "monai",
        "pytorch_lightning",
        "SimpleITK",
        "matplotlib",
        "typer",
        "rich",
        "medkd_fast.training",
        "torch._dynamo",  # as long again as torch itself
    }


def test_every_operator_has_its_rooms() -> None:
    schema = (ROOT / "csrc/schema.cpp").read_text()
    for operator in backend.OPERATORS:
        for room in ("csrc/cpu/{}.cpp", "medkd_fast/ops/{}.py", "medkd_fast/reference/{}.py", "tests/test_{}.py"):
            assert (ROOT / room.format(operator)).exists(), room.format(operator)
        assert f'"{operator}_" MEDKD_BACKEND "(' in schema
        assert callable(getattr(medkd_fast, operator))


def test_the_library_uses_the_stable_abi_alone(cpp: str) -> None:
    library = str(ROOT / "medkd_fast/_cpu.so")
    wanted = subprocess.run(["nm", "-D", "-u", library], capture_output=True, text=True, check=True).stdout
    assert "aoti_torch_call_dispatcher" in wanted or "torch_call_dispatcher" in wanted
    # functions of at::, c10:: and torch:: by their mangled names, and Python's own
    assert not re.findall(r"\b_ZN[KR]*(?:2at|3c10|5torch)\d\w*|\b_?Py\w+", wanted)


def test_the_cuda_library_needs_what_every_torch_with_cuda_exports() -> None:
    library = ROOT / "medkd_fast/_cuda.so"
    if not library.exists():
        pytest.skip(
            "medkd_fast/_cuda.so is not built: " + json.loads((ROOT / "medkd_fast/_build.json").read_text())["cuda"]
        )
    listing = subprocess.run(["nm", "-D", "-u", str(library)], capture_output=True, text=True, check=True).stdout
    unversioned = {line.split()[-1] for line in listing.splitlines() if "@" not in line}
    # what has no version is torch's: its C functions alone, those that a torch without CUDA lacks being in libtorch_cuda
    torch_s = {name for name in unversioned if re.match(r"(aoti_)?torch_", name)}
    assert "aoti_torch_get_current_cuda_stream" in torch_s
    assert unversioned - torch_s <= {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
    torch_exports = subprocess.run(
        ["nm", "-D", "--defined-only", str(Path(torch.__file__).parent / "lib/libtorch_cpu.so")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    exported = {line.split()[-1] for line in torch_exports.splitlines()}
    assert torch_s - exported <= {"aoti_torch_get_current_cuda_stream"}
    # static cudart, and nothing that the driver brings: a machine without a GPU can load it
    needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert "libtorch.so" in needed and not re.search(r"libcuda|libcudart", needed)


def test_no_cuda_kernel_spills_registers() -> None:
    if not (ROOT / "medkd_fast/_cuda.so").exists():
        pytest.skip("medkd_fast/_cuda.so is not built")
    if not (ROOT / "build/objects").exists():
        pytest.skip("medkd_fast/_cuda.so was not built here, and compiling it takes minutes")
    found = cuda_report.kernels()
    assert {kernel.target for kernel in found} == {"sm_80", "sm_90"}
    assert not [kernel for kernel in found if kernel.stack or kernel.spilled]


def build_wheel(tmp_path: Path, **environment: str) -> Path:
    for name in ("csrc", "medkd_fast"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
        )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    script = (
        f"import os; os.chdir({str(tmp_path)!r})\nfrom setuptools import build_meta; print(build_meta.build_wheel('.'))"
    )
    in_new_process(script, **environment)
    return next(tmp_path.glob("*.whl"))


def test_without_a_compiler_the_package_installs_and_says_so(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, PATH="/nonexistent", CXX="", CUDA_HOME="")
    names = zipfile.ZipFile(wheel).namelist()
    assert not any(name.endswith(".so") for name in names)
    report = json.loads(zipfile.ZipFile(wheel).read("medkd_fast/_build.json"))
    assert report["cpu"].startswith("not built: no C++ compiler found (looked for $CXX, c++, g++, clang++)")
    assert report["cuda"] == "not built: no nvcc found (looked in $CUDA_HOME/bin and $PATH)"


def test_a_setuptools_that_is_too_old_is_named(tmp_path: Path) -> None:
    (tmp_path / "setuptools.py").write_text('__version__ = "76.1.0"')
    done = subprocess.run(
        [sys.executable, str(ROOT / "setup.py"), "--version"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "setuptools 77 or newer is needed to build, and 76.1.0 is in this environment" in done.stderr


def test_pure_python_wheel(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, MEDKD_FAST_NO_EXT="1")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(wheel).namelist())


def test_wheel_with_the_library(tmp_path: Path, cpp: str) -> None:
    (tmp_path / "build").mkdir()
    objects = ROOT / "build" / "objects"
    if objects.exists():  # what is compiled already need not be again
        shutil.copytree(objects, tmp_path / "build" / "objects")
    # no second run of nvcc where this checkout was installed without
    without = {} if (ROOT / "medkd_fast/_cuda.so").exists() else {"MEDKD_FAST_NO_CUDA": "1"}
    wheel = build_wheel(tmp_path, **without)
    assert re.search(r"-py3-none-(manylinux_2_28|linux)_\w+\.whl$", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert "medkd_fast/_cpu.so" in names
    assert ("medkd_fast/_cuda.so" in names) == (ROOT / "medkd_fast/_cuda.so").exists()
