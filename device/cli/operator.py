"""Commands of a board's operator, over MQTT: `edgeear watch`, `send`, `requests` and `label`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from device.cli.common import ConfigPath, existing
from edgeear.errors import UsageError

if TYPE_CHECKING:
    from device.mqtt.messages import Response
    from device.operator.client import BrokerAddress

app = typer.Typer()

Broker = Annotated[
    str | None,
    typer.Option(
        "--broker",
        "-b",
        help="HOST or HOST:PORT; default: from the configuration. Another host gets no user and password.",
    ),
]
Ca = Annotated[
    Path | None,
    typer.Option("--ca", help="PEM file of the authority that signed the broker's certificate; turns TLS on."),
]
Cert = Annotated[Path | None, typer.Option("--cert", help="PEM file of the operator's certificate.")]
Key = Annotated[Path | None, typer.Option("--key", help="PEM file of its key.")]
Site = Annotated[str, typer.Option("--site", "-s", help="The site; + for all.")]


@app.command(epilog="Example: `edgeear watch --broker plant.example:8883 --ca ca.pem --cert me.pem --key me.key`")
def watch(
    broker: Broker = None,
    site: Site = "+",
    config: ConfigPath = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    seconds: Annotated[float | None, typer.Option("--seconds", min=0.1, help="Stop after this many seconds.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for programs.")] = False,
) -> None:
    """Watch a fleet: one row per board, with its latest event. Stop with Ctrl-C."""
    from device.operator.watching import follow

    follow(_address(broker, config, ca, cert, key), site, seconds, as_json)


BoardName = Annotated[str, typer.Argument(help="SITE/DEVICE.", show_default=False)]
Wait = Annotated[float, typer.Option("--wait", min=0.1, max=86_400, help="Seconds to wait for the answer.")]


class _Send(TyperCommand):
    """Its help ends with all commands, from their models, which are imported only when the help is shown."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from device.mqtt.messages import COMMANDS

        rows = (f"{name} {row.usage()}".strip() + f": {row.help()}" for name, row in COMMANDS.items())
        self.epilog = "\n\n".join(("Commands, fields in brackets are optional:", *rows, EXAMPLE))
        super().format_help(ctx, formatter)


EXAMPLE = "Example: `edgeear send plant/cam-1 forget domain=winter`"


@app.command(cls=_Send, epilog=EXAMPLE)
def send(
    board: BoardName,
    command: Annotated[str, typer.Argument(help="One of the commands listed below.")],
    fields: Annotated[
        list[str] | None,
        typer.Argument(help="Fields of the command, NAME=VALUE. A value is JSON, else text; @FILE sends a picture."),
    ] = None,
    broker: Broker = None,
    config: ConfigPath = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    wait: Wait = 10.0,
    identity: Annotated[
        str | None, typer.Option("--id", help="Command id: a command with the same id is applied once.")
    ] = None,
) -> None:
    """Send a command to a board and print its response as JSON. Exit code 1 if it was refused or failed."""
    from device.mqtt.topics import RESPONSE, topic_of
    from device.operator.client import Operator
    from device.operator.labelling import named
    from device.operator.watching import command_of

    site, device = named(board)
    asked = command_of(command, fields or [], identity)
    with Operator(_address(broker, config, ca, cert, key), (topic_of(site, device, RESPONSE),)) as us:
        _answer(us.ask(site, device, asked, wait))


@app.command(
    epilog="Example: `edgeear requests plant/cam-1 --out frames`, sort them into frames/CLASS/, `edgeear label`"
)
def requests(
    board: BoardName,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures.", show_default=False)],
    broker: Broker = None,
    config: ConfigPath = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    seconds: Annotated[float | None, typer.Option("--seconds", min=0.1, help="Stop after this many seconds.")] = None,
    count: Annotated[int | None, typer.Option("--count", min=1, help="Stop after this many pictures.")] = None,
) -> None:
    """Save the frames that a board wants labelled, until Ctrl-C. Between two calls for the same folder the broker keeps
    frames for up to a day, so call it once before the board asks for labels."""
    from device.operator.labelling import collect

    def saved(path: Path) -> None:
        typer.echo(path)

    total = collect(_address(broker, config, ca, cert, key), board, out, seconds=seconds, count=count, saved=saved)
    typer.echo(f"{total} pictures in {out}: sort them into {out}/CLASS/, then `edgeear label`", err=True)


@app.command(epilog="Example: `edgeear label plant/cam-1 --from frames --domain winter`")
def label(
    board: BoardName,
    folder: Annotated[Path, typer.Option("--from", "-f", help="Folder of `edgeear requests`, sorted.")],
    domain: Annotated[str | None, typer.Option("--domain", "-d", help="Name of the new domain.")] = None,
    broker: Broker = None,
    config: ConfigPath = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    wait: Wait = 10.0,
) -> None:
    """Send labels: each picture in DIR/CLASS/ is of that class. Exit code 1 if the board refused them."""
    from device.mqtt.topics import RESPONSE, topic_of
    from device.operator.client import Operator
    from device.operator.labelling import named
    from device.operator.labelling import send as send_labels

    topic = topic_of(*named(board), RESPONSE)
    with Operator(_address(broker, config, ca, cert, key), (topic,)) as us:
        response, found = send_labels(us, board, folder, domain, wait)
    if found.waiting or found.stale:
        told = f"{found.waiting} pictures are in no class, {found.stale} are of earlier sessions and count no more"
        typer.echo(told, err=True)
    _answer(response)


def _answer(response: Response) -> None:
    """Print a board's response and exit: code 0 if it is ok, 1 otherwise."""
    from device.operator.screen import dumped

    typer.echo(dumped(response.model_dump(mode="json"), indent=2))
    raise typer.Exit(0 if response.outcome == "ok" else 1)


def _address(
    broker: str | None, config: Path | None, ca: Path | None, cert: Path | None, key: Path | None
) -> BrokerAddress:
    """The broker's address: the options override the configuration. Its password is for its own host alone."""
    from device.daemon.config.settings import load_config
    from device.mqtt.link import TlsFiles
    from device.operator.client import BrokerAddress

    if (cert is None) != (key is None) or (cert is not None and ca is None):
        raise UsageError("--cert, --key and --ca: a certificate needs its key and the broker's authority, give all")
    mqtt = load_config(existing(config)).mqtt
    own = TlsFiles(mqtt.ca, mqtt.cert, mqtt.key) if mqtt.secure else None
    tls = TlsFiles(ca, cert, key) if ca else own
    host, port = (mqtt.host, mqtt.port) if broker is None else _host_and_port(broker, 8883 if tls else 1883)
    if host.lower() != mqtt.host.lower():
        return BrokerAddress(host, port, tls=tls)
    password = None if mqtt.password is None else mqtt.password.get_secret_value()
    return BrokerAddress(host, port, mqtt.username, password, tls)


def _host_and_port(broker: str, usual: int) -> tuple[str, int]:
    """HOST, HOST:PORT or [IPV6]:PORT, or an IPv6 address alone."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]\s]+))(?::([0-9]{1,5}))?", broker)
    if match is None and ":" in broker.partition(":")[2] and re.fullmatch(r"[0-9A-Fa-f:.]+", broker):
        return broker, usual
    if match is None or not 0 < int(match[3] or usual) < 65536:
        raise UsageError(f"--broker {broker!r}: give HOST or HOST:PORT, a port from 1 to 65535")
    return match[1] or match[2], int(match[3] or usual)
