"""Commands of the encoder: `edgeear encoder export`, `encoder check` and `encoder prepare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from device.cli.common import AsJson, PreprocessingText, default_encoder, save

app = typer.Typer(no_args_is_help=True, help="Export the default encoder, or check your own ONNX file.")


@app.command("export", epilog="Example: `edgeear encoder export --output encoder.onnx`")
def export(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Copy it there; default: the cache.")] = None,
) -> None:
    """Make the default encoder (EfficientNet-Lite0 with its taps) and print its path."""
    path = default_encoder()
    if output is not None:
        save(output, path.read_bytes())
        path = output
    typer.echo(str(path))


@app.command("check", epilog="Example: `edgeear encoder check my-network.onnx`")
def check(
    path: Annotated[Path, typer.Argument(help="An ONNX file.", show_default=False)],
    preprocessing: PreprocessingText = None,
    as_json: AsJson = False,
) -> None:
    """Check whether an ONNX file can serve as the encoder; name each problem and its remedy."""
    from device.encoder.session import check_encoder

    problems = check_encoder(path, preprocessing=preprocessing)
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


@app.command(
    "prepare", epilog="Example: `edgeear encoder prepare net.onnx '224x224 imagenet' --output my-encoder.onnx`"
)
def prepare(
    path: Annotated[Path, typer.Argument(help="An ONNX file.", show_default=False)],
    preprocessing: Annotated[str, typer.Argument(help="As --preprocessing of other commands.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new file.", show_default=False)],
) -> None:
    """Write a copy of an ONNX file that says how frames become its input, so that nobody has to say it again."""
    from device.encoder.file import prepared

    save(output, prepared(path, preprocessing))
    typer.echo(str(output))
