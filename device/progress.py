"""Progress of long work on stderr: bars on a terminal, a line every few seconds in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from adaptors.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

PERIOD_S = 5.0
"""Seconds between two lines in a pipe."""


@contextmanager
def shown(
    wanted: bool | Progress | None, *, console: Console | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Progress]:
    """Show the progress of the work inside; gives the function to call with (phase, done, total).

    `wanted`: True shows it, False does not, None shows it on a terminal only; a function of yours is called instead.
    `clock` gives seconds."""
    if callable(wanted):
        yield wanted
        return
    if wanted is False or (wanted is None and not sys.stderr.isatty()):
        yield lambda *_: None
        return
    from rich.console import Console

    console = console or Console(stderr=True)
    if console.is_terminal:
        with _bars(console) as show:
            yield show
    else:
        yield _lines(console, clock)


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    """One bar a phase, which disappear at the end."""
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(escape(_printable(phase)), total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield show


def _lines(console: Console, clock: Callable[[], float]) -> Progress:
    """A line at the first call, then for the first call after each `PERIOD_S`, and for the end of a phase with a line.
    A phase of one step is only named, when it starts."""
    due, told = clock(), ""

    def show(phase: str, done: int, total: int) -> None:
        nonlocal due, told
        ended = done >= total
        if ended and (total <= 1 or phase != told):
            return
        if ended or clock() >= due:
            due, told = clock() + PERIOD_S, "" if ended else phase
            console.out(_printable(phase) + (f": {done} of {total}" if total > 1 else ""), highlight=False)

    return show


def _printable(phase: str) -> str:
    """Folder names are part of a phase: nothing in them may move the cursor or fail to print."""
    return "".join(char if char.isprintable() else "\ufffd" for char in phase)
