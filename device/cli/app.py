"""The command line: `edgeear COMMAND`. Commands parse, call one function and print.

Rules of this file:

1. Nothing heavy is imported before a command needs it: `--help` answers at once, without the optional packages.
2. A mistake that you can correct gives one line on stderr, `error: value, limit, remedy`, and exit code 2. `--debug`
   shows the traceback. Where a command ran and its answer is no, it ends with code 1; after Ctrl-C with 130.
3. Results go to stdout or to the named file, everything else to stderr.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from device.cli import daemon, encoder, evaluate, learn, operator, simulate, store
from device.redaction import redacted
from edgeear import __version__
from edgeear.errors import EdgeearError


class _Commands(TyperGroup):
    """The help shows a flag as `--quiet`; typer would write `--quiet <bool>`."""

    def get_params(self, ctx: Any) -> list[Any]:
        params = list(super().get_params(ctx))
        commands: list[Any] = [*self.commands.values()]
        while commands:
            command = commands.pop()
            commands += getattr(command, "commands", {}).values()
            for flag in (p for p in (*params, *command.get_params(ctx)) if getattr(p, "is_flag", False)):
                flag.metavar = ""
        return params


app = typer.Typer(
    name="edgeear",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Keep a frozen image classifier useful on an edge board while its input changes.\n\n"
    "Start with `edgeear demo`; then `edgeear learn DIR --store S` on your own photographs DIR/CLASS/*.jpg.",
)
for group in (learn, simulate, evaluate, daemon, operator):
    app.add_typer(group.app)
app.add_typer(encoder.app, name="encoder")
app.add_typer(store.app, name="store")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"edgeear {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The program: runs a command and exits with its code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that are not UTF-8 are printed escaped
    try:
        app(given, prog_name="edgeear")
    except (EdgeearError, ValueError) as error:
        if "--debug" in given or not _expected(error):
            raise
        typer.echo(f"error: {redacted(str(error))}", err=True)
        sys.exit(2)
    sys.exit(0)


def _expected(error: Exception) -> bool:
    """Whether the message is meant for the user. `adaptors` cannot import `edgeear.errors` and has two exceptions of
    its own."""
    from adaptors.search_space import EmptyBudget
    from adaptors.spec import InvalidSpec

    return isinstance(error, EdgeearError | EmptyBudget | InvalidSpec)
