"""Commands on your own photographs: `edgeear learn` and `edgeear predict`, with what was learned in a store."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from device.cli.common import LEARN, TRAIN, EncoderPath, Quiet, Seed, need
from device.cli.progress import progress
from edgeear.errors import DataError, UsageError

if TYPE_CHECKING:
    from device.api import Ear
    from edgeear.flow import Prediction

app = typer.Typer()

COLUMNS = ("file", "label", "probability", "route", "novelty", "p", "ood", "error")
UNBOUNDED = 1 << 16
"""Columns of a table in a pipe, where no line is wrapped."""
StoreOption = Annotated[
    Path, typer.Option("--store", "-s", help="Folder that keeps what was learned.", show_default=False)
]


@dataclass(frozen=True)
class Row:
    """The result for one picture: an answer or an error. `truth` is the name of its folder, None if it is no file."""

    name: str
    answer: Prediction | None
    error: str = ""
    truth: str | None = None

    def fields(self) -> dict[str, Any]:
        """The values of `COLUMNS`, and all probabilities; None where there is none."""
        if self.answer is None:
            return {**dict.fromkeys(COLUMNS), "file": self.name, "error": self.error, "probabilities": {}}
        a = self.answer
        probability = None if a.label is None else a.probabilities[a.label]
        novelty = a.novelty if a.novelty < float("inf") else None
        values = (self.name, a.label, probability, a.route, novelty, a.p, a.ood, None)
        return {**dict(zip(COLUMNS, values, strict=True)), "probabilities": a.probabilities}


@app.command(
    epilog="Example: `edgeear learn photos/kitchen --store my-board`, then `edgeear predict --store my-board x.jpg`"
)
def learn(
    folder: Annotated[
        Path, typer.Argument(help="`FOLDER/CLASS/*.jpg`, or `FOLDER/DOMAIN/CLASS/*.jpg`.", show_default=False)
    ],
    store: StoreOption,
    name: Annotated[str | None, typer.Option("--name", "-n", help="Name of the domain; default: the folder's.")] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Add the images to domains that are known; others are learned.")
    ] = False,
    encoder: EncoderPath = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Learn your own photographs, one folder per class, and keep the result in a store. The store may be new or known.

    FOLDER/DOMAIN/CLASS/ is learned as several domains (for example one per camera or season), one after another.
    Pictures that cannot be read are left out. Exit code 1 if a domain was rejected, 2 if all are known already.
    """
    need(LEARN if encoder is None else TRAIN)
    from device.api import labelled_folder
    from edgeear.system import Rejected

    parts = labelled_folder(folder, name)
    what = (
        f"{len(parts)} domains: {', '.join(p.name for p in parts)}"
        if len(parts) > 1
        else f"one domain: {parts[0].name}"
    )
    _say(quiet, _printable(f"{folder} is taken for {what}"))
    ear = _ear(store, encoder, seed, new=True)
    rejected, known = False, [part.name for part in parts if part.name in ear.domains]
    if len(known) == len(parts) and not update:
        raise UsageError(
            f"domain {', '.join(map(repr, known))} is known: --update adds images, `edgeear store forget {store} "
            f"{known[0]}` lets you start again" + ("" if len(parts) > 1 else ", --name learns it under another name")
        )
    for part in parts:
        if part.name in known and not update:
            _say(quiet, _printable(f"{part.name} is known and left as it is; --update adds to it"))
            continue
        do = ear.update if part.name in known else ear.learn
        kept = f"{store} keeps {', '.join(ear.domains) or 'nothing yet'}; run the same command again to learn the rest"
        with progress(quiet, _printable(kept)) as show:
            outcome = do(images=part.images, labels=part.labels, name=part.name, skip_bad=True, progress=show)
        if isinstance(outcome, Rejected):
            rejected = True
        elif outcome.images:
            ear.save(store)
        typer.echo(_printable(str(outcome)))
        for warning in part.warnings:
            typer.echo(_printable(f"  warning: {warning}"))
    if rejected:
        _say(quiet, "if a rejected domain is a known one, give its folder with --update --name and the known name")
        raise typer.Exit(1)
    _say(quiet, f"next: edgeear predict --store {store} FILES")


@app.command(epilog="Example: `edgeear predict --store my-board photos/ --csv > answers.csv`")
def predict(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILES",
            help="Pictures or folders. - reads one picture, or names line by line, from stdin.",
            show_default=False,
        ),
    ],
    store: StoreOption,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, with all probabilities.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Comma-separated values with a header.")] = False,
    encoder: EncoderPath = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No accuracy.")] = False,
) -> None:
    """Classify pictures: class, probability, domain, and whether a picture is out of distribution: p at most 0.05.

    If every picture lies in a folder named like a class, the accuracy is printed, too. Exit code 1 if a file could not
    be read; the others are answered.
    """
    if as_json and as_csv:
        raise UsageError("--json and --csv: choose one")
    ear = _ear(store, encoder, 0, new=False)
    rows = []
    show = _json_line if as_json else _csv_line if as_csv else None
    if as_csv:
        typer.echo(_csv(COLUMNS))
    for row in _rows(ear, files):
        rows.append(row)
        if show:
            typer.echo(show(row))
    if show is None:
        _print_table(rows)
        for row in rows:
            _say(not row.error, _printable(f"{row.name}: {row.error}"))
    if not quiet:
        _print_accuracy(rows, ear.classes)
    if any(row.error for row in rows):
        raise typer.Exit(1)


def _ear(store: Path, encoder: Path | None, seed: int, new: bool) -> Ear:
    from device.api import Ear
    from device.state.store import CURRENT

    if store.exists() and not store.is_dir():
        raise UsageError(f"{store} is a file: give the folder of a store")
    ear = Ear.load(store, encoder or "default", seed=seed) if (store / CURRENT).is_file() else None
    if ear is not None and (new or ear.domains):
        return ear
    if not new:
        raise UsageError(f"{store} holds nothing learned: run `edgeear learn FOLDER --store {store}` first")
    if store.is_dir() and any(store.iterdir()):
        raise UsageError(f"{store} holds other files: give a new or empty folder, or one that was learned to")
    return Ear(encoder or "default", seed=seed)


def _rows(ear: Ear, files: Sequence[str]) -> Iterator[Row]:
    for name, picture in _pictures(files):
        truth = Path(name).parent.name if isinstance(picture, Path) else None
        try:
            yield Row(name, ear.predict(picture), truth=truth)
        except DataError as error:
            yield Row(name, None, str(error).removeprefix("bytes: ").removeprefix(f"{name}: "), truth)


def _pictures(files: Sequence[str]) -> Iterator[tuple[str, Path | bytes]]:
    """Names and pictures: of the arguments, of the folders among them, and of stdin."""
    from device.images.decode import SUFFIXES

    for name in files:
        if name == "-":
            content = sys.stdin.buffer.read()
            try:
                names = content.decode().splitlines()
            except UnicodeDecodeError:  # no format of pictures is text
                yield "-", content
                continue
            if "-" in names:
                raise UsageError("a name '-' on stdin: write ./- for a file of that name")
            names = [n for n in names if n.strip()]
            if not names:
                raise DataError("stdin is empty: give a picture, or names of pictures line by line")
            yield from _pictures(names)
        elif Path(name).is_dir():
            found = sorted(p for p in Path(name).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not found:
                raise DataError(f"{name} holds no picture ({', '.join(SUFFIXES)}): give another folder")
            yield from ((str(p), p) for p in found)
        else:
            yield name, Path(name)


def _json_line(row: Row) -> str:
    return json.dumps(row.fields())


def _csv_line(row: Row) -> str:
    from device.operator.screen import printable

    fields = row.fields()
    return _csv(["" if fields[c] is None else printable(str(fields[c])) for c in COLUMNS])


def _csv(values: Sequence[Any]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="").writerow(values)
    return out.getvalue()


def _print_table(rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from device.operator.screen import printable

    table = Table(box=None, pad_edge=False)
    for name in ("file", "label", "probability", "route", "p", ""):
        table.add_column(name, overflow="fold")
    answered = [(row.name, row.answer) for row in rows if row.answer is not None]
    for name, a in answered:
        probability = "" if a.label is None else f"{a.probabilities[a.label]:.0%}"
        cells = (name, a.label or "no answer", probability, a.route or "", f"{a.p:.2g}")
        table.add_row(
            *(Text(printable(cell)) for cell in cells), Text("out of distribution" if a.ood else "", style="yellow")
        )
    if answered:
        Console(width=None if sys.stdout.isatty() else UNBOUNDED).print(table, highlight=False)


def _print_accuracy(rows: Sequence[Row], classes: Sequence[str]) -> None:
    """On stderr, if all pictures lie in folders named like classes; if only some do, why there is none."""
    answered = [row for row in rows if row.answer is not None]
    unknown = sorted({str(row.truth) for row in answered if row.truth not in classes})
    if not answered or unknown:
        if any(row.truth in classes for row in answered):
            _say(False, _printable(f"no accuracy: no class was learned that is called {', '.join(unknown)}"))
        return
    right, n = sum(row.answer is not None and row.answer.label == row.truth for row in answered), len(answered)
    few = "; fewer than 30 pictures: a rough figure" if n < 30 else ""
    _say(False, f"accuracy by the names of the folders: {right} of {n} ({right / n:.1%}){few}")


def _printable(text: str) -> str:
    """Lines without control codes."""
    from device.operator.screen import printable

    return "\n".join(printable(line) for line in text.split("\n"))


def _say(quiet: bool, text: str) -> None:
    if not quiet:
        typer.echo(text, err=True)
