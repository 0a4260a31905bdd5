"""Builds the native libraries beside the Python package.

`medkd_fast/_cpu.so` uses nothing but libtorch's stable ABI and is loaded with `torch.ops.load_library`, so one wheel
serves every Python >= 3.10 and torch >= 2.10, on every Linux with glibc 2.28 or newer (csrc/manylinux.cpp). Where there is no C++ compiler the package installs without it, and
`medkd-fast doctor` says why. `medkd_fast/_cuda.so` is made wherever nvcc is, also without a GPU and with a torch that
was built without CUDA; MEDKD_FAST_NO_CUDA=1 leaves it out.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools

# without isolation nothing else looks at what pyproject.toml wants
if int(setuptools.__version__.partition(".")[0]) < 77:
    sys.exit(
        f"medkd_fast: setuptools 77 or newer is needed to build, and {setuptools.__version__} is in this environment:\n"
        '    pip install --upgrade "setuptools>=77"'
    )

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
X86 = platform.machine() in ("x86_64", "AMD64")

try:
    import torch
except ImportError:
    sys.exit(
        "medkd_fast: torch is needed to build and is not in this environment. Install it first and build without "
        'isolation:\n    pip install torch "setuptools>=77"\n    pip install --no-build-isolation "."'
    )

INCLUDES = ["-isystem", str(Path(torch.__file__).parent / "include")]
TORCH_LIBRARIES = Path(torch.__file__).parent / "lib"
# For `make sanitize`: memory errors and undefined behaviour end the process.
SANITIZE = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
if os.environ.get("MEDKD_FAST_SANITIZE") != "1":
    SANITIZE = []
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", *SANITIZE]
# Machine code for A100 and H100 and their kin; the driver makes that for later GPUs from the instructions of 9.0.
ARCHITECTURES = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"]
CUDA_FLAGS = [
    "-std=c++17",
    "-O3",
    "-DUSE_CUDA",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
    "--threads=2",
    "-Xptxas=-v",
]
#: What nvcc says of each kernel's resources; `make cuda-report` reads it.
RESOURCES = re.compile(r"^(ptxas info .*| +\d+ bytes stack frame.*)\n", re.MULTILINE)
# Stable-ABI declarations of torch 2.10, the oldest version that the library runs with.
TORCH_FLAGS = [
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
]
# Loops keep infinities and NaN; they only promise not to look at errno and floating-point traps.
LOOP_FLAGS = ["-fno-math-errno", "-fno-trapping-math"]
EXPORTS = ROOT / "csrc/exports.map"
#: The newest versions of the system's libraries that a wheel for manylinux_2_28 may ask for (PEP 600).
MANYLINUX = "manylinux_2_28"
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
ASKED_FOR = re.compile(r" (GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)$", re.MULTILINE)
INSTRUCTION_SETS = {"portable": []}
if X86:
    INSTRUCTION_SETS["avx2"] = ["-march=x86-64-v3"]
    INSTRUCTION_SETS["avx512"] = ["-march=x86-64-v4", "-mprefer-vector-width=512"]


class BuildError(Exception):
    """Something does not compile or link."""


class Missing(Exception):
    """A library is left out, because the tool that makes it is not here or because that was asked for."""


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    raise Missing("no C++ compiler found (looked for $CXX, c++, g++, clang++); on Debian: apt-get install g++")


def nvcc() -> str:
    """nvcc of $CUDA_HOME or $PATH. Raises Missing, which says where it was looked for."""
    home = os.environ.get("CUDA_HOME")
    found = (shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None) or shutil.which("nvcc")
    if not found:
        raise Missing("no nvcc found (looked in $CUDA_HOME/bin and $PATH)")
    return found


def compile_objects(jobs: list[tuple[Path, list[str]]], directory: Path, headers: Iterable[Path] = ()) -> list[Path]:
    """Runs (source, command) pairs. An object is named after the content of what made it, and is made once.

    That content is the source and the headers beside it, those that all share, and `headers`.
    """
    shared = [*sorted(ROOT.glob("csrc/*.h")), *sorted(ROOT.glob("csrc/math/*.h")), *headers]

    def one(job: tuple[Path, list[str]]) -> Path:
        source, command = job
        content = b"".join(path.read_bytes() for path in [*shared, *sorted(source.parent.glob("*.h"))])
        key = hashlib.sha256(
            content + source.read_bytes() + " ".join([torch.__version__, *command]).encode()
        ).hexdigest()
        target = directory / f"{source.stem}-{key[:16]}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}.o")
            said = run([*command, "-c", str(source), "-o", str(partial)])
            target.with_suffix(".txt").write_text(said)
            sys.stderr.write(re.sub(RESOURCES, "", said))
            os.replace(partial, target)
        return target

    directory.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, jobs))


def cpu_jobs() -> list[tuple[Path, list[str]]]:
    """Sources of the CPU library with their flags beyond FLAGS."""
    sources = [path for path in sorted(ROOT.glob("csrc/cpu/*.cpp")) if path.stem not in ("loops", "isa")]
    isa = ["-DMEDKD_X86"] if X86 else []
    jobs = [
        (ROOT / "csrc/cpu/loops.cpp", [*LOOP_FLAGS, f"-DMEDKD_ISA={name}", *flags])
        for name, flags in INSTRUCTION_SETS.items()
    ]
    jobs += [(path, [*INCLUDES, *TORCH_FLAGS]) for path in sources]
    jobs += [(ROOT / "csrc/schema.cpp", [*INCLUDES, *TORCH_FLAGS, '-DMEDKD_BACKEND="cpp"'])]
    return [*jobs, (ROOT / "csrc/cpu/isa.cpp", isa), (ROOT / "csrc/manylinux.cpp", [])]


def cuda_jobs() -> list[tuple[Path, list[str]]]:
    """Sources of the CUDA library with their flags, for nvcc."""
    flags = [*CUDA_FLAGS, *ARCHITECTURES, *INCLUDES, *TORCH_FLAGS]
    jobs = [(path, flags) for path in sorted(ROOT.glob("csrc/cuda/*.cu"))]
    return [*jobs, (ROOT / "csrc/schema.cpp", [*flags, '-DMEDKD_BACKEND="cuda"'])]


def build_cpu(target: Path, directory: Path) -> str:
    command = [*compiler().split(), *FLAGS]
    objects = compile_objects([(source, [*command, *flags]) for source, flags in cpu_jobs()], directory)
    link = [*compiler().split(), *SANITIZE, "-shared", "-o", str(target), *map(str, objects)]
    link += [f"-L{TORCH_LIBRARIES}", f"-Wl,--no-as-needed,--version-script={EXPORTS}", "-ltorch", "-ltorch_cpu", "-ldl"]
    run(link)
    return f"built with {run([*compiler().split(), '--version']).splitlines()[0]} against torch {torch.__version__}"


def build_cuda(target: Path, directory: Path) -> str:
    if os.environ.get("MEDKD_FAST_NO_CUDA") == "1" or SANITIZE:
        raise Missing("MEDKD_FAST_NO_CUDA=1" if not SANITIZE else "MEDKD_FAST_SANITIZE=1 is for the CPU")
    jobs = [(source, [nvcc(), *flags]) for source, flags in cuda_jobs()]
    jobs += [(path, [*compiler().split(), *FLAGS]) for path in sorted(ROOT.glob("csrc/manylinux*.cpp"))]
    objects = compile_objects(jobs, directory)
    link = [nvcc(), *ARCHITECTURES, "-shared", "-cudart=static", "-o", str(target), *map(str, objects)]
    link += [f"-L{TORCH_LIBRARIES}", f"-Xlinker=--no-as-needed,--version-script={EXPORTS}", "-ltorch", "-ltorch_cpu"]
    run(link)
    release = re.search(r"release [\d.]+", run([nvcc(), "--version"]))
    return f"built with nvcc {release[0] if release else ''} against torch {torch.__version__}"


class BuildNative(build_ext):
    """Makes medkd_fast/_cpu.so and _cuda.so, and medkd_fast/_build.json, which says how or why not."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def run(self) -> None:
        package = ROOT / "medkd_fast" if self.inplace else Path(self.build_lib) / "medkd_fast"
        package.mkdir(parents=True, exist_ok=True)
        report = {}
        for part, build in (("cpu", build_cpu), ("cuda", build_cuda)):
            target = package / f"_{part}.so"
            partial = target.with_suffix(".so.partial")
            try:
                report[part] = build(partial, ROOT / "build" / "objects")
                os.replace(partial, target)
            except Missing as error:
                target.unlink(missing_ok=True)
                report[part] = f"not built: {error}"
            except BuildError as error:
                sys.exit(f"medkd_fast: the {part} library did not compile:\n{error}")
        if report["cpu"].startswith("not built"):
            print(f"warning: medkd_fast: {report['cpu']}. The slower reference backend will serve.", file=sys.stderr)
        (package / "_build.json").write_text(json.dumps(report))

    def get_outputs(self) -> list[str]:
        return [str(path) for path in (Path(self.build_lib) / "medkd_fast").glob("_c*.so")]


def too_new(library: Path) -> list[str]:
    """What `library` asks of the system that manylinux_2_28 does not promise."""
    asked = ASKED_FOR.findall(run(["objdump", "-p", str(library)]))
    return [f"{name}_{version}" for name, version in asked if tuple(map(int, version.split("."))) > NEWEST[name]]


class PythonAgnosticWheel(bdist_wheel):
    """The libraries do not know Python's ABI: the wheel is py3-none-<platform>, the platform what they ask for."""

    def get_tag(self) -> tuple[str, str, str]:
        system = super().get_tag()[2]
        package = Path(self.get_finalized_command("build_ext").build_lib) / "medkd_fast"
        libraries = sorted(package.glob("_c*.so"))
        if not libraries or not system.startswith("linux_"):
            return "py3", "none", system
        if not shutil.which("objdump"):
            print(f"warning: medkd_fast: no objdump found, so the wheel is for {system} only", file=sys.stderr)
            return "py3", "none", system
        if found := [f"{library.name}: {name}" for library in libraries for name in too_new(library)]:
            print(f"warning: medkd_fast: newer than {MANYLINUX} ({', '.join(found)})", file=sys.stderr)
            return "py3", "none", system
        return "py3", "none", system.replace("linux", MANYLINUX)


if __name__ == "__main__":  # a test reads the flags
    native = [] if os.environ.get("MEDKD_FAST_NO_EXT") == "1" else [Extension("medkd_fast._cpu", sources=[])]
    setup(ext_modules=native, cmdclass={"build_ext": BuildNative, "bdist_wheel": PythonAgnosticWheel})
