"""What an encoder file says about itself: one JSON object under the metadata key `edgeear`.

Rules of this file:

1. It states everything that the inference process must know beside the graph: how a frame becomes the
   input, the taps with their shapes, and where the network comes from. It names no date and no path, so
   that the same inputs give the same bytes.
2. A tap may name its gate: a 1-element int64 input of the graph with a default. Fed with 0 it switches
   off the nodes behind it, because ONNX Runtime computes every output of a file, also those that nobody
   fetches.
3. Reading refuses what it does not understand: `EncoderError`, never another exception.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from edgeear.errors import FormatError, UsageError
from edgeear.types import Tap

METADATA_KEY = "edgeear"
METADATA_FORMAT = 1

Layout = Literal["NCHW", "NHWC"]


@dataclass(frozen=True)
class Problem:
    """Something wrong with an encoder file, and what to do about it."""

    severity: Literal["error", "warning"]
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}"


class EncoderError(FormatError):
    """The file cannot serve as an encoder. `what` names the fault, `remedy` the way out."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what, remedy)
        self.what, self.remedy = what, remedy

    def __str__(self) -> str:
        return str(self.problem)

    @property
    def problem(self) -> Problem:
        return Problem("error", self.what, self.remedy)


@dataclass(frozen=True)
class Preprocessing:
    """From a frame to the input: `(frame - mean) / scale` for each channel, in 8-bit units, then `layout`.

    Frames, `mean` and `scale` are in RGB order; a network that wants another says so in `color`. An input of
    type uint8 takes the frame's bytes as they are. `resize` tells a source how to bring an image to the size
    of a frame.
    """

    height: int
    width: int
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    scale: tuple[float, float, float] = (255.0, 255.0, 255.0)
    layout: Layout = "NCHW"
    color: Literal["RGB", "BGR"] = "RGB"
    resize: str = "bilinear"

    def __post_init__(self) -> None:
        if type(self.height) is not int or type(self.width) is not int or min(self.height, self.width) < 1:
            raise UsageError(f"frame size {self.height} x {self.width}: both sides must be at least 1")
        if len(self.mean) != 3 or len(self.scale) != 3:
            raise UsageError(f"mean {self.mean} and scale {self.scale}: give one value for each of 3 channels")
        if not all(map(math.isfinite, (*self.mean, *self.scale))) or 0 in self.scale:
            raise UsageError(f"mean {self.mean} and scale {self.scale} must be finite, and no scale 0")
        if self.layout not in ("NCHW", "NHWC") or self.color not in ("RGB", "BGR"):
            raise UsageError(f"layout {self.layout}, color {self.color}: use NCHW or NHWC, RGB or BGR")


@dataclass(frozen=True)
class Metadata:
    """`gates` maps a tap to the input that switches it off; `pooling` states what `.mean` and `.std` mean."""

    preprocessing: Preprocessing
    taps: tuple[Tap, ...]
    gates: Mapping[str, str] = field(default_factory=dict)
    pooling: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)


def write_metadata(metadata: Metadata) -> str:
    """The JSON text; equal metadata give equal text."""
    taps = [
        {"name": tap.name, "shape": list(tap.shape)}
        | ({"gate": metadata.gates[tap.name]} if tap.name in metadata.gates else {})
        for tap in metadata.taps
    ]
    content = {
        "format": METADATA_FORMAT,
        "preprocessing": asdict(metadata.preprocessing),
        "taps": taps,
        "pooling": dict(metadata.pooling),
        "provenance": dict(metadata.provenance),
    }
    return json.dumps(content, sort_keys=True, allow_nan=False)


def read_metadata(text: str) -> Metadata:
    """Parse what `write_metadata` wrote. Raises `EncoderError` for anything else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged("not JSON") from error
    version = content.get("format") if isinstance(content, dict) else None
    if type(version) is not int or version < 1:
        raise _damaged("no format version")
    if version > METADATA_FORMAT:
        what = f"{METADATA_KEY} metadata of format {version}, this program reads up to {METADATA_FORMAT}"
        raise EncoderError(what, "update edgeear")
    try:
        return Metadata(
            preprocessing=_preprocessing(dict(content["preprocessing"])),
            taps=tuple(_tap(tap) for tap in content["taps"]),
            gates={tap["name"]: str(tap["gate"]) for tap in content["taps"] if "gate" in tap},
            pooling=dict(content.get("pooling", {})),
            provenance=dict(content.get("provenance", {})),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _damaged(f"{type(error).__name__}: {error}") from error


def _preprocessing(stored: dict[str, Any]) -> Preprocessing:
    mean, scale = _triple(stored.pop("mean")), _triple(stored.pop("scale"))
    return Preprocessing(mean=mean, scale=scale, **stored)


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = map(float, values)
    return red, green, blue


def _tap(stored: dict[str, Any]) -> Tap:
    name, shape = stored["name"], tuple(stored["shape"])
    if not isinstance(name, str) or len(shape) not in (1, 3) or any(type(size) is not int for size in shape):
        raise ValueError(f"tap {name!r} of shape {shape}")
    return Tap(name, shape)


def _damaged(why: str) -> EncoderError:
    return EncoderError(f"its {METADATA_KEY} metadata is damaged ({why})", "export it again")
