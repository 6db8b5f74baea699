"""Commands that measure: `edgeear eval`, `profile`, `bench runtime`, `bench nas`, `bench ood`."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from device.cli.common import (
    LEARN,
    PACK,
    TRAIN,
    Budget,
    Data,
    EncoderPath,
    Json,
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
    today,
)
from device.cli.progress import progress
from edgeear.errors import UsageError

app = typer.Typer()
bench = typer.Typer(no_args_is_help=True, help="Measure run time, search or novelty, and write one JSON object.")
app.add_typer(bench, name="bench")


KEPT = "the features computed so far are cached, and the same command continues from there"


class Prefer(StrEnum):
    """Which of several heads with nearly the same estimate is picked; see adaptors.search."""

    best = "best"
    fastest = "fastest"
    smallest = "smallest"


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
    preprocessing: PreprocessingText = None,
    budget: Budget = Size.medium,
    profile: ProfilePath = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Run the continual protocol on a folder of domains: learn each in turn, measure all after each."""
    need(LEARN if encoder is None else TRAIN)
    check_target(json)
    with progress(quiet, KEPT) as show:
        from device.evaluation.profile import read_latency
        from device.evaluation.protocol import evaluate as run
        from device.evaluation.run import EvalOptions

        options = EvalOptions(
            data=data,
            order=names(order),
            shots=shots,
            seed=seed,
            spatial=spatial,
            encoder=chosen_encoder(encoder, preprocessing),
            budget=budget.value,
            specs=specs,
            prefer=prefer.value,
            halving=halving,
            classes_per_step=classes_per_step,
            date=today(),
            latency=read_latency(profile),
        )
        result = run(options, show)
    save(json, result.to_json())
    _warn(result.warnings)
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
    """Measure how long heads take on this board, so that the search can predict their latency. Takes a minute, once."""
    need(PACK)
    from device.encoder.session import OnnxEncoder, head_shapes
    from device.evaluation.profile import profile, to_json
    from device.files import cache_dir

    target = json or cache_dir() / "profile.json"
    check_target(target)
    shapes = head_shapes(OnnxEncoder(encoder or default_encoder()))
    with progress(quiet) as show:
        found = profile(shapes, heads, seed, on_progress=show)
    save(target, to_json(found))
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
    """Compare the time of the whole path of a frame with that of the encoder alone, in a fresh process."""
    need(LEARN if encoder is None else TRAIN)
    from device.evaluation.runtime import bench_runtime as run

    check_target(json)
    save(json, dumped(run(encoder or default_encoder(), _numbers(domains), batch, threads)))
    typer.echo(str(json))


@bench.command("nas", epilog="Example: `edgeear bench nas --data PACS --domain sketch --json nas.json`")
def bench_nas(
    data: Data,
    domain: Annotated[str, typer.Option("--domain", help="The domain to train the heads on.", show_default=False)],
    json: Json,
    heads: Annotated[int, typer.Option("--heads", min=4, help="Random heads to train.")] = 120,
    tables: Annotated[
        Path | None,
        typer.Option("--tables", help="Folder of tables heads-DOMAIN.json. Reads this domain's table, or makes it."),
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
    """Train random heads and compare every training-free proxy, and the search, with their accuracies.

    With `--tables` the combination of proxies is learned from the tables of the other domains in that folder."""
    need(LEARN if encoder is None else TRAIN)
    from adaptors.latency import DEFAULT
    from adaptors.search_space import BUDGETS
    from device.evaluation.nas_run import NasOptions, run
    from device.evaluation.profile import read_latency

    check_target(json)
    latency = read_latency(profile) or DEFAULT
    options = NasOptions(
        data, domain, heads, tables, only_table, fidelity, specs, encoder, BUDGETS[budget], latency, seed, today()
    )
    with progress(quiet, KEPT) as show:
        result = run(options, show)
    save(json, dumped(result))
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
    need({**(LEARN if encoder is None else TRAIN), "sklearn": "bench", "scipy": "bench"})
    from device.evaluation.ood import OodOptions
    from device.evaluation.ood import bench_ood as run

    check_target(json)
    options = OodOptions(data=data, order=names(order), shots=shots, seed=seed, encoder=encoder, date=today())
    with progress(quiet, KEPT) as show:
        result = run(options, show)
    save(json, result.to_json())
    _warn(result.warnings)
    typer.echo(str(json))


def _warn(warnings: Sequence[str]) -> None:
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)


def _numbers(text: str) -> tuple[int, ...]:
    words = names(text) or ()
    if not words or not all(word.isdecimal() and int(word) for word in words):
        raise UsageError(f"--domains {text!r}: give whole numbers from 1, by commas, such as 1,8,64")
    return tuple(int(word) for word in words)
