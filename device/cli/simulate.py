"""Commands that run boards on one machine: `edgeear demo` and `edgeear simulate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from device.cli.common import (
    LEARN,
    TRAIN,
    Budget,
    EncoderPath,
    Order,
    PreprocessingText,
    ProfilePath,
    Quiet,
    Seed,
    Size,
    check_target,
    chosen_encoder,
    default_encoder,
    dumped,
    names,
    need,
    save,
)
from device.cli.progress import INTERRUPTED, progress
from device.files import escaped
from edgeear.errors import UsageError

if TYPE_CHECKING:
    from device.simulation.simulate import SimulateOptions

DIGITS = {"mlxtend": "demo", "skimage": "demo", "sklearn": "demo"}
DEMO = {**LEARN, "matplotlib": "demo", "jinja2": "demo", **DIGITS}

app = typer.Typer()


@app.command(epilog="Example: `edgeear demo --out demo-report`")
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for report.html and run.json.")] = Path("edgeear-demo"),
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Show a classifier that adapts to three kinds of digits and keeps what it knew; then four boards at a broker.

    Needs no network. The broker is a private mosquitto if installed, else iotcore."""
    need(DEMO)
    from device.simulation.simulate import SimulateOptions

    digits = _digits(seed, quiet)
    _simulated(
        SimulateOptions(
            data=digits,
            report=out / "report.html",
            json=out / "run.json",
            title="edgeear demo: three kinds of digits",
            samples=400,
            specs=150,
            seed=seed,
        ),
        None,
        quiet,
    )
    fleet = {"devices": 4, "broker": "embedded", "teach": 1, "samples": 60, "seed": seed}
    _fleet(digits, default_encoder(), fleet, out / "fleet.json", quiet)
    if not quiet:
        typer.echo("Next, on your own photos in FOLDER/CLASS/: `edgeear learn FOLDER --store my-board`,")
        typer.echo("then `edgeear predict --store my-board FILES`")


@app.command(
    epilog="Example: `edgeear simulate --data photos --order photo,sketch --report report.html`; a fleet: "
    "`edgeear simulate --devices 200 --json fleet.json`"
)
def simulate(
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Folder DIR/DOMAIN/CLASS/*.{jpg,png,wav,npy}; default: the digits of the demo."),
    ] = None,
    order: Order = None,
    devices: Annotated[
        int, typer.Option("--devices", min=0, help="A fleet of N daemons at a broker; 0: one board without a broker.")
    ] = 0,
    broker: Annotated[str, typer.Option("--broker", help="Of a fleet: embedded, or HOST[:PORT].")] = "embedded",
    teach: Annotated[int, typer.Option("--teach", min=0, help="Of a fleet: devices that learn, one by one.")] = 0,
    labels: Annotated[
        int | None,
        typer.Option(
            "--labels",
            min=0,
            help="Labels given for one shift, at most; 0: for the first domain only. Default: 200, of a fleet 40.",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option("--samples", min=1, help="Frames of each domain. Default: 250 more than labels, of a fleet 120."),
    ] = None,
    tests: Annotated[int, typer.Option("--tests", min=1, help="Test images of each domain, at most.")] = 200,
    specs: Annotated[
        int | None, typer.Option("--specs", min=1, help="Heads that each search scores. Default: 300, of a fleet 20.")
    ] = None,
    encoder: EncoderPath = None,
    preprocessing: PreprocessingText = None,
    budget: Budget = Size.medium,
    profile: ProfilePath = None,
    seed: Seed = 0,
    report: Annotated[Path, typer.Option("--report", help="The HTML report.")] = Path("edgeear-report.html"),
    json: Annotated[Path | None, typer.Option("--json", help="The run's record, for programs.")] = None,
    store: Annotated[
        Path | None, typer.Option("--store", help="Folder for every generation; a run goes on from what it holds.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Stream your own domains, one after another, through the code that a board runs.

    Each domain's training images pass as frames; a shift is noticed, labels are asked for, a head is searched, trained,
    admitted and put on probation. Test images measure every domain after each step. Ctrl-C ends the run, and the report
    then shows what was done; with `--store` the same command goes on from there.

    With `--devices N` a fleet of N daemons runs at a real broker, in fast time: half of them move to another domain
    midway, an operator commands all, and every message is checked. Ends in 1 where one is missing or wrong.
    """
    need({**(LEARN if encoder is None else TRAIN), **(DIGITS if data is None else {})})
    if devices == 0 and (teach or broker != "embedded"):
        raise UsageError("--broker and --teach are of a fleet: say how many --devices it has")
    encoder = chosen_encoder(encoder, preprocessing)
    folder = data or _digits(seed, quiet)
    if devices:
        chosen = {"samples": samples, "labels": labels, "specs": specs}
        sizes = {name: value for name, value in chosen.items() if value is not None}
        how = {"order": names(order), "devices": devices, "broker": broker, "teach": teach, "seed": seed}
        _fleet(folder, encoder or default_encoder(), {**how, **sizes}, json, quiet)
        return
    from adaptors.search_space import BUDGETS
    from device.evaluation.profile import read_latency
    from device.simulation.simulate import SimulateOptions

    options = SimulateOptions(
        data=folder,
        order=names(order),
        report=report,
        json=json,
        store=store,
        title=f"edgeear simulate: {escaped(folder.name)}",
        labels=200 if labels is None else labels,
        samples=samples,
        tests=tests,
        specs=specs or 300,
        seed=seed,
        budget=BUDGETS[budget],
        latency=read_latency(profile),
    )
    _simulated(options, encoder, quiet)


def _digits(seed: int, quiet: bool) -> Path:
    """The folder of the built-in digits, made if it is missing."""
    from device.files import cache_dir
    from device.images.digits import write_demo_data

    with progress(quiet) as show:
        return write_demo_data(cache_dir(), seed, show)


def _fleet(data: Path, encoder: Path, how: Mapping[str, Any], target: Path | None, quiet: bool) -> None:
    """Run a fleet, write its result and print its table; exit code 1 if anything is wrong."""
    from rich.console import Console

    from device.daemon.learning.worker import ProcessLearner, WorkerPolicy
    from device.encoder.session import OnnxEncoder
    from device.provenance import machine, versions
    from device.simulation.fleet.result import table
    from device.simulation.fleet.run import FleetOptions, run_fleet

    options = FleetOptions(data=data, encoder=encoder, **how)
    if target is not None:
        check_target(target)
    with progress(quiet) as show:
        urgent = WorkerPolicy(specs=options.specs, nice=0, idle=False, spare_core=False)
        learner = ProcessLearner(encoder, urgent, on_progress=lambda phase, *at: show(f"factory: {phase}", *at))
        found = run_fleet(options, OnnxEncoder(encoder), learner, show=show)
    if target is not None:
        save(target, dumped({**found.fields, "machine": machine(), "versions": versions()}))
    if not quiet:
        Console().print(table(found), highlight=False)
    for fault in found.faults:
        typer.echo(f"fault: {fault}", err=True)
    if not found.passed:
        raise typer.Exit(1)


def _simulated(options: SimulateOptions, encoder: Path | None, quiet: bool) -> None:
    """Run a simulation, show its table on stdout and say where the report is; exit code 130 where you stopped it."""
    from rich.console import Console

    from device.encoder.session import OnnxEncoder, notes_of
    from device.simulation.live import LiveView
    from device.simulation.simulate import simulate as run

    path = encoder or default_encoder()
    opened = OnnxEncoder(path)
    for note in notes_of(opened):
        typer.echo(f"warning: {path}: {note}", err=True)
    record = run(options, opened, name=path.name.split(".")[0], quiet=quiet)
    LiveView(Console(), record.domains, 0, clock=lambda: 0.0, quiet=quiet).table(record)
    for what, where in (("report", options.report), ("record", options.json), ("store", options.store)):
        if where is not None:
            typer.echo(f"{what}: {where}")
    if record.stopped_at is not None:
        raise typer.Exit(INTERRUPTED)
