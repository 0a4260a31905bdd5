"""Files that are whole or absent: written under another name, then moved into place."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import math
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medkd_fast.training.errors import WrongUse

CANNOT_WRITE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),  # something else is in the way
}


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path beside `path` (same suffixes), then move it over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(where: Path) -> Iterator[None]:
    """Raises WrongUse in place of the system's errors that say that something at `where` cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise WrongUse(f"{where} cannot be written ({error.strerror}): make room or choose another --out") from error


def check_writable(folder: Path) -> None:
    """Make a folder. Raises WrongUse where that, or a file in it, cannot be made."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def write_json(path: Path, value: Any) -> None:
    """Strict JSON: a nan or an infinity, which JSON lacks, becomes null or the word "inf"."""
    text = json.dumps(_strict(value), indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda p: p.write_text(text))


def read_json(path: Path) -> Any:
    """Raises WrongUse where there is no such file, or it is damaged."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise WrongUse(f"{path} cannot be read ({error.strerror}): bring it back, or choose another folder") from error
    except ValueError as error:
        raise WrongUse(f"{path} is damaged ({error}): bring it back, or choose another folder") from error


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows of equal keys; the keys of the first are the header."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


def quoted(path: Path | str) -> str:
    """A path as it stands in a command, to be copied from a message: with quotes where it has spaces.

    >>> quoted(Path("my runs/a")), quoted("runs/a")
    ("'my runs/a'", 'runs/a')
    """
    return shlex.quote(str(path))


def slug(text: str) -> str:
    """A text as a part of a file's name, which everything else than letters, digits and "_.=-" is not.

    >>> slug("Abdomen/CT: all parts"), slug("cpkd:0.5,temperature=2")
    ('Abdomen-CT-all-parts', 'cpkd-0.5-temperature=2')
    """
    return re.sub(r"[^\w.=-]+", "-", text)


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _strict(v) for k, v in value.items()}
    if hasattr(value, "_asdict"):
        return _strict(value._asdict())
    if isinstance(value, (list, tuple)):
        return [_strict(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value
