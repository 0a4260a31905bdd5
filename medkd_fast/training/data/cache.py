"""Prepared volumes on disk: one folder a volume, whole or absent, named after the content that it was made from."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medkd_fast.training.errors import WrongUse
from medkd_fast.training.files import write_atomically

VARIABLE = "MEDKD_FAST_CACHE"
DIGEST = re.compile(r"[0-9a-f]{32}")


def default_cache() -> Path:
    """The folder that MEDKD_FAST_CACHE names, else medkd_fast in the user's cache folder."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medkd_fast"


def digest_of_content(path: Path, cache: Path) -> str:
    """Digest of a file's bytes, or of the names and bytes of a folder's files, hidden ones apart, or of a header with its voxels.

    They are read once: the digest is remembered for their paths, sizes and times of change.
    """
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))  # no .DS_Store
    elif path.suffix.lower() in (".mhd", ".nhdr", ".hdr"):  # a header; its voxels lie beside it
        # by all of the header's name: one that is a UID has dots
        files = sorted(p for p in path.parent.iterdir() if p.name.startswith(f"{path.stem}."))
    stats = [(str(f.resolve()), (s := f.stat()).st_size, s.st_mtime_ns) for f in files]
    note = cache / "digests" / digest(json.dumps(stats))
    try:
        if DIGEST.fullmatch(known := note.read_text()):  # a power cut may leave an empty file
            return known
    except (OSError, ValueError):
        pass
    found = digest(json.dumps([(f.name if len(files) > 1 else "", _of_bytes(f)) for f in files]))
    try:
        write_atomically(note, lambda p: p.write_text(found))
    except OSError as error:
        raise not_writable(cache, error) from error
    return found


def digest(text: str) -> str:
    """32 hexadecimal digits of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def store(folder: Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    """Write arrays and facts into `folder` at once. Where another process was first, its folder stays: it holds the same."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise not_writable(folder.parent, error) from error
    try:
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array)
        (temporary / "facts.json").write_text(json.dumps(facts))
        temporary.chmod(0o755)  # mkdtemp's folders are private
        try:
            os.rename(temporary, folder)
        except OSError:
            if load(folder) is None:  # what is there is torn
                shutil.rmtree(folder, ignore_errors=True)
                os.rename(temporary, folder)
    except OSError as error:
        raise not_writable(folder.parent, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """Arrays, mapped into memory (what is written to them stays there), and facts; None where nothing whole is there."""
    try:
        facts = json.loads((folder / "facts.json").read_text())
        return {p.stem: _mapped(p) for p in sorted(folder.glob("*.npy"))}, facts
    except (OSError, ValueError, EOFError):
        return None


def _mapped(path: Path) -> np.ndarray:
    """An array in a file, copy-on-write. numpy's own maps keep their files open, and a process may often have 1024 of these."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, by_column, dtype = np.lib.format.read_array_header_1_0(file)
        start = file.tell()
    content = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8).numpy()
    return content[start:].view(dtype).reshape(shape, order="F" if by_column else "C")


def not_writable(folder: Path, error: OSError) -> WrongUse:
    """What to raise where the cache cannot be written."""
    reason = error.strerror or f"{error}: is the disk full?"  # numpy counts what it could write, and says no more
    return WrongUse(f"the cache {folder} cannot be written ({reason}): set {VARIABLE} to a folder with space")


def _of_bytes(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()
