"""One process at a time trains in a run's folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from medkd_fast.training.errors import WrongUse

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder and hold a lock in it; the system gives it back when the process dies, however that is.

    Raises WrongUse where another process holds it, and where the folder cannot be written. Where the file system knows no
    locks there is none.
    """
    file = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = file.open("w")
    except OSError as error:
        raise WrongUse(f"{folder} cannot be written ({error.strerror}): choose another --out") from error
    with opened:
        if fcntl and not _taken(opened.fileno(), file):
            raise WrongUse(f"another process trains in {folder}: wait until it has ended, or choose another --out")
        try:
            yield
        finally:
            with suppress(OSError):  # what stays is in nobody's way
                file.unlink()


def _taken(descriptor: int, file: Path) -> bool:
    """Whether the lock could be taken, and its file is still the one in the folder."""
    try:
        # unlike flock's, it is not held on by workers that outlive a killed run
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except (BlockingIOError, PermissionError, FileNotFoundError):
        return False
    except OSError:
        return True
