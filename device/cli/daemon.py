"""Commands of a board in the field: `edgeear init`, `doctor`, `run` and `asyncapi`."""

from __future__ import annotations

import json
import logging
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from device.cli.common import DEFAULT_CONFIG, AsJson, ConfigPath, existing

if TYPE_CHECKING:
    from device.daemon.assemble import Running
    from device.daemon.finding import Finding

app = typer.Typer()


@app.command(epilog="Example: `edgeear init`, edit edgeear.toml, `edgeear doctor`, `edgeear run`")
def init(
    config: Annotated[Path, typer.Option("--config", "-c", help="The file to write.")] = DEFAULT_CONFIG,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a commented configuration file with every setting and its default."""
    from device.daemon.config.init import write_config

    write_config(config, force)
    typer.echo(f"{config}: edit it, then `edgeear doctor --config {config}`")


@app.command(epilog="Example: `edgeear doctor --config edgeear.toml`")
def doctor(config: ConfigPath = None, as_json: AsJson = False) -> None:
    """Check this board before it goes into the field: machine, clock, encoder, store, broker, permissions.

    Exit code 1 if anything will not work, 0 otherwise; warnings do not count."""
    from device.daemon.config.doctor import diagnose, exit_code
    from device.daemon.config.settings import load_config

    path = existing(config)
    findings = diagnose(load_config(path), path)
    if as_json:
        typer.echo(json.dumps([_finding(f) for f in findings], indent=2))
    else:
        _print_findings(findings)
    raise typer.Exit(exit_code(findings))


@app.command(epilog="Example: `edgeear run --config /etc/edgeear/edgeear.toml`")
def run(
    config: ConfigPath = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Log warnings only.")] = False,
) -> None:
    """Run the board's daemon: predict, learn and answer commands until SIGTERM or Ctrl-C.

    Settings also come from the environment, EDGEEAR_SECTION__KEY, such as EDGEEAR_MQTT__HOST."""
    from device.daemon.assemble import run as serve
    from device.daemon.config.settings import load_config
    from device.redaction import RedactedFormatter

    level = logging.WARNING if quiet else logging.INFO
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(RedactedFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    settings = load_config(existing(config))
    stop, asked = threading.Event(), queue.SimpleQueue[int]()
    running: list[Running] = []

    def ready(now: Running) -> None:
        running.append(now)
        where = f"; metrics on 127.0.0.1:{now.metrics_port}" if now.metrics_port else ""
        logging.getLogger("edgeear").info("%s/%s serves%s", settings.device.site, settings.device.name, where)

    def end() -> None:
        asked.get()
        stop.set()
        for r in running:
            r.daemon.wake.set()

    # A handler interrupts the loop anywhere, also inside the lock of the event that it waits on: only a SimpleQueue is
    # safe to use there, and another thread does the rest.
    threading.Thread(target=end, name="edgeear-end", daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: asked.put(number))
    serve(settings, stop, ready)


@app.command(epilog="Example: `edgeear asyncapi > asyncapi.json`")
def asyncapi() -> None:
    """Print the AsyncAPI 3 document of all topics and messages."""
    from device.mqtt.asyncapi import dumped

    typer.echo(dumped(), nl=False)


def _finding(finding: Finding) -> dict[str, str]:
    return {"check": finding.check, "verdict": finding.verdict, "text": finding.text, "remedy": finding.remedy or ""}


def _print_findings(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "warning": "yellow", "problem": "red"}
    table = Table(box=None, pad_edge=False)
    for name in ("check", "verdict", "found", "remedy"):
        table.add_column(name, overflow="fold")
    for f in findings:
        table.add_row(f.check, Text(f.verdict, style=colours[f.verdict]), Text(f.text), Text(f.remedy or ""))
    Console().print(table, highlight=False)
