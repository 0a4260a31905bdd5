"""A progress bar for whatever turns out to take more than two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
PATIENCE = 2.0  # seconds


def track(items: Iterable[T], what: str, *, show: bool = True) -> Iterator[T]:
    """Yield the items; once two seconds have gone by, a bar on standard error says how far it is.

    Where standard error is no terminal, one line at that moment says what is going on.

    >>> list(track([1, 2, 3], "counting"))
    [1, 2, 3]
    """
    start, total = time.monotonic(), len(items) if isinstance(items, Sized) else None
    bar = task = None
    try:
        for done, item in enumerate(items):
            if show and bar is None and time.monotonic() - start > PATIENCE:
                if not sys.stderr.isatty():
                    print(f"{what}: {done}" + (f" of {total}" if total else ""), file=sys.stderr, flush=True)
                    show = False
                else:
                    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
                    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
                    task = bar.add_task(what, total=total, completed=done)
                    bar.start()
            yield item
            if bar is not None and task is not None:
                bar.advance(task)
    finally:
        if bar is not None:
            bar.stop()
