"""Progress of long work on stderr: bars on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from adaptors.progress import Progress

if TYPE_CHECKING:
    from rich.progress import TaskID

EVERY = 5.0
"""Seconds between two lines where there is no terminal."""


def silent(phase: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


@contextmanager
def shown(wanted: bool | Progress | None) -> Iterator[Progress]:
    """The function to call with (phase, done, total). `wanted`: True shows it, False does not, None only on a terminal;
    a function of your own is called instead."""
    if callable(wanted):
        yield wanted
    elif wanted is False or (wanted is None and not sys.stderr.isatty()):
        yield silent
    elif sys.stderr.isatty():
        with _bars() as show:
            yield show
    else:
        yield _Lines()


@contextmanager
def _bars() -> Iterator[Progress]:
    """One bar a phase, gone when all is done."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(escape(phase), total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield show


class _Lines:
    """`phase done/total`, when a phase ends and every few seconds."""

    def __init__(self) -> None:
        self._last, self._ended = -EVERY, ""

    def __call__(self, phase: str, done: int, total: int) -> None:
        now, ends = time.monotonic(), done >= total and phase != self._ended
        if not ends and (done >= total or now - self._last < EVERY):
            return
        self._last, self._ended = now, phase if ends else ""
        print(f"{phase} {done}/{total}", file=sys.stderr, flush=True)
