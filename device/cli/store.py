"""Commands on a store whose board is stopped: `edgeear store list`, `store merge` and `store forget`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from device.cli.common import PACK, AsJson, EncoderPath, default_encoder, need
from edgeear.errors import UsageError

if TYPE_CHECKING:
    from device.state.maintenance import Changed
    from edgeear.system import Rejected

app = typer.Typer(no_args_is_help=True, help="List, merge or forget what a stopped board has learned.")

StorePath = Annotated[
    Path,
    typer.Argument(
        help="Folder of `learn --store`, `simulate --store` or `Ear.save`. Stop its board first.", show_default=False
    ),
]


class Head(StrEnum):
    """Which head serves a merged domain; see edgeear.merging."""

    refit = "refit"
    first = "first"
    second = "second"


@app.command("list", epilog="Example: `edgeear store list my-board --json`")
def list_store(store: StorePath, as_json: AsJson = False) -> None:
    """Show the domains that serve, with their classes and sizes, and the generations that are kept."""
    from device.state.maintenance import listing

    found = listing(store)
    typer.echo(json.dumps(found, indent=2) if as_json else _listed(found))


@app.command("merge", epilog="Example: `edgeear store merge my-board winter snow`")
def merge_domains(
    store: StorePath,
    first: Annotated[str, typer.Argument(help="The domain that stays.", show_default=False)],
    second: Annotated[str, typer.Argument(help="The domain that becomes a part of it.", show_default=False)],
    head: Annotated[
        Head, typer.Option("--head", help="Refit a head to the sums of both domains, or keep the head of one.")
    ] = Head.refit,
) -> None:
    """Merge two domains that turned out to be the same. Exit code 1 if the result is rejected."""
    if head is Head.refit:
        need(PACK)
    from device.state.maintenance import merge

    _changed(merge(store, first, second, head.value, _now()))


@app.command("forget", epilog="Example: `edgeear store forget my-board winter --class dog --images winter/dog`")
def forget_domain(
    store: StorePath,
    domain: Annotated[str, typer.Argument(help="The domain.", show_default=False)],
    label: Annotated[str | None, typer.Option("--class", help="Forget only this class of it.")] = None,
    images: Annotated[
        Path | None,
        typer.Option("--images", help="Folder with all images learned of the class: then it is forgotten exactly."),
    ] = None,
    encoder: EncoderPath = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask. Only a terminal is asked.")] = False,
) -> None:
    """Forget a domain or a class for good: older generations that know it are removed, too.

    A domain is forgotten exactly. So are the sums of a class with its images at hand; without them, its weight in the
    covariance within classes is left. Either way its domain gets a new head, fitted to the sums that are left.
    """
    if images is not None and label is None:
        raise UsageError("--images are those of a class: name it with --class")
    if label is not None:
        need(PACK)
    if not yes and sys.stdin.isatty():
        what = domain if label is None else f"{label} of {domain}"
        typer.confirm(f"Forget {what} in {store}, in all generations? Nothing brings it back.", abort=True, err=True)
    from device.encoder.session import OnnxEncoder
    from device.state.maintenance import forget

    opened = None if images is None else (images, OnnxEncoder(encoder or default_encoder()))
    _changed(forget(store, domain, label, _now(), opened))


def _listed(found: Mapping[str, Any]) -> str:
    lines = [f"generation {found['live']} serves, {found['confirmed']} is confirmed"]
    for domain in found["domains"]:
        samples = ", ".join(f"{name} {count}" for name, count in domain["samples"].items())
        head = domain["head"].partition(": best ")[0]  # --json has the scores, too
        lines.append(f"{domain['name']}: {samples}; {domain['bytes'] / 1024:.0f} KiB; {head}")
    lines += [f"generation {g['generation']}: {g['note']}" for g in found["generations"]]
    return "\n".join(lines)


def _changed(outcome: Changed | Rejected) -> None:
    """Print the result of a change; exit code 1 if it was rejected."""
    from edgeear.system import Rejected

    if isinstance(outcome, Rejected):
        typer.echo(f"rejected, nothing was changed: {outcome.domain}: " + "; ".join(outcome.reasons), err=True)
        raise typer.Exit(1)
    moved = "".join(f"; {share:.1%} of {name} changed route" for name, share in outcome.replay.items() if share)
    gone = f"; removed generations {', '.join(map(str, outcome.removed))}" if outcome.removed else ""
    serves = f"generation {outcome.generation} serves {', '.join(outcome.domains) or 'no domain'}"
    typer.echo(f"{outcome.what}; {serves}{moved}{gone}")


def _now() -> float:
    return datetime.now(UTC).timestamp()
