"""Progress of every command, and what Ctrl-C says."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from adaptors.progress import Progress
from device.progress import shown

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells expect."""


@contextmanager
def progress(
    quiet: bool, kept: str = "", *, console: Console | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Progress]:
    """Show the progress of the work inside, unless `quiet`; gives the function to call with (phase, done, total).

    Ctrl-C inside ends the command with code 130 and one line, which says what is `kept`. `clock` gives seconds.
    """
    try:
        with shown(not quiet, console=console, clock=clock) as show:
            yield show
    except KeyboardInterrupt:
        typer.echo("; ".join(("stopped", *filter(None, [kept]))), err=True)
        raise typer.Exit(INTERRUPTED) from None
