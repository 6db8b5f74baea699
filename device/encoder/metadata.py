"""The metadata of an encoder file: one JSON object under the key `edgeear`.

Rules of this file:

1. It holds what the inference process needs beside the graph: how a frame becomes the input, the taps with their
   shapes, and the origin of the network. It holds no date and no path, so that the same inputs give the same bytes.
2. A tap may name its gate: a 1-element int64 input of the graph with a default. A gate of 0 switches off the nodes
   behind it. Without gates, ONNX Runtime computes every output of a file, even if it is not fetched.
3. Reading raises `EncoderError` for anything that it does not understand, and no other exception.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeear.errors import FormatError, UsageError
from edgeear.types import U8, Tap

METADATA_KEY = "edgeear"
METADATA_FORMAT = 1
RESIZE = "bilinear"
"""How `device.images.decode` brings an image to the size of a frame: written for other readers, never read."""

Layout = Literal["NCHW", "NHWC"]


@dataclass(frozen=True)
class Problem:
    """A fault of an encoder file, and the remedy."""

    severity: Literal["error", "warning"]
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}"


class EncoderError(FormatError):
    """The file cannot serve as an encoder. `what` names the fault, `remedy` says how to fix it."""

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
    """From a frame `(height, width, 3)` uint8 to the network's input: `(frame - mean) / scale` for each channel.

    Frames, `mean` and `scale` are in RGB order and 8-bit units. `color` and `layout` are what the network takes.
    `device.images.decode` brings an image to the size of a frame.
    """

    height: int
    width: int
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    scale: tuple[float, float, float] = (255.0, 255.0, 255.0)
    layout: Layout = "NCHW"
    color: Literal["RGB", "BGR"] = "RGB"

    def __post_init__(self) -> None:
        if type(self.height) is not int or type(self.width) is not int or min(self.height, self.width) < 1:
            raise UsageError(f"frame size {self.height} x {self.width}: both sides must be at least 1")
        if len(self.mean) != 3 or len(self.scale) != 3:
            raise UsageError(f"mean {self.mean} and scale {self.scale}: give one value for each of 3 channels")
        if not all(map(math.isfinite, (*self.mean, *self.scale))) or 0 in self.scale:
            raise UsageError(f"mean {self.mean} and scale {self.scale} must be finite, and no scale 0")
        if self.layout not in ("NCHW", "NHWC") or self.color not in ("RGB", "BGR"):
            raise UsageError(f"layout {self.layout}, color {self.color}: use NCHW or NHWC, RGB or BGR")

    @property
    def size(self) -> tuple[int, int]:
        """`(height, width)` of a frame."""
        return self.height, self.width

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The shape of one frame in the network's layout."""
        return (3, *self.size) if self.layout == "NCHW" else (*self.size, 3)

    def apply(self, frame: U8, out: NDArray[Any]) -> None:
        """Write `frame` into `out` of `input_shape`. An `out` of uint8 takes the bytes without mean and scale."""
        ordered = self._laid_out(frame)
        # Bytes are put in order before they become four times as many.
        np.copyto(out, ordered if out.dtype == np.uint8 else np.ascontiguousarray(ordered))
        if out.dtype != np.uint8:
            mean, scale = self._moments
            np.subtract(out, mean, out=out, casting="same_kind")
            np.divide(out, scale, out=out, casting="same_kind")

    def channels_first(self, maps: NDArray[Any]) -> NDArray[Any]:
        """An output of the network, maps as `(samples, channels, height, width)`; others are left alone."""
        return maps.transpose(0, 3, 1, 2) if self.layout == "NHWC" and maps.ndim == 4 else maps

    @cached_property
    def _moments(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and scale, shaped to meet one input."""
        mean, scale = (self._laid_out(np.array(v, np.float32)[None, None]) for v in (self.mean, self.scale))
        return mean, scale

    def _laid_out(self, frame: NDArray[Any]) -> NDArray[Any]:
        ordered = frame[..., ::-1] if self.color == "BGR" else frame
        return ordered.transpose(2, 0, 1) if self.layout == "NCHW" else ordered


_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_SAYS = (
    "say words such as '224x224 imagenet' or 'mean=0.5,0.5,0.5 std=0.5,0.5,0.5 BGR NHWC': height x width, mean and std "
    "of the channels R,G,B for pixels in [0, 1], imagenet for its mean and std, unit for [0, 1] as it is"
)


def parse_preprocessing(text: str, height: object, width: object, layout: Layout) -> Preprocessing:
    """The preprocessing that `text` says in words, in any order: `HEIGHTxWIDTH`, `imagenet`, `unit`, `mean=R,G,B`,
    `std=R,G,B`, `RGB` or `BGR`, `NCHW` or `NHWC`. Mean and std are those of pixels in [0, 1], as torchvision has them.
    `height`, `width` and `layout` are the input's own, used where `text` gives none; a size that the file leaves open
    is no number.

    Raises `UsageError` for any other text and for one without a size where the file leaves it open.
    """
    values: dict[str, Any] = {"height": height, "width": width, "layout": layout, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    for word in text.split():
        if word == "imagenet":
            values |= _IMAGENET
        elif named := re.fullmatch(r"(mean|std)=([^,]+),([^,]+),([^,]+)", word):
            values[named[1]] = tuple(_number(part, text) for part in named.groups()[1:])
        elif sides := re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", word):
            values |= {"height": int(sides[1]), "width": int(sides[2])}
        elif word in ("RGB", "BGR"):
            values["color"] = word
        elif word in ("NCHW", "NHWC"):
            values["layout"] = word
        elif word != "unit":
            raise UsageError(f"preprocessing {text!r}: {word!r} is not understood; {_SAYS}")
    if not (isinstance(values["height"], int) and isinstance(values["width"], int)):
        raise UsageError(f"preprocessing {text!r}: the file leaves its input size open; add it, such as 224x224")
    mean, std = (tuple(255 * value for value in values.pop(name)) for name in ("mean", "std"))
    return Preprocessing(mean=mean, scale=std, **values)


def _number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"preprocessing {whole!r}: {text!r} is not a number; {_SAYS}") from None


@dataclass(frozen=True)
class Metadata:
    """`gates` maps a tap to the input that switches it off. `pooling` says how `.mean` and `.std` are computed."""

    preprocessing: Preprocessing
    taps: tuple[Tap, ...]
    gates: Mapping[str, str] = field(default_factory=dict)
    pooling: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)


def write_metadata(metadata: Metadata) -> str:
    """The JSON text. Equal metadata give equal text."""
    taps = [
        {"name": tap.name, "shape": list(tap.shape)}
        | ({"gate": metadata.gates[tap.name]} if tap.name in metadata.gates else {})
        for tap in metadata.taps
    ]
    content = {
        "format": METADATA_FORMAT,
        "preprocessing": asdict(metadata.preprocessing) | {"resize": RESIZE},
        "taps": taps,
        "pooling": dict(metadata.pooling),
        "provenance": dict(metadata.provenance),
    }
    return json.dumps(content, sort_keys=True, allow_nan=False)


def read_metadata(text: str) -> Metadata:
    """Parse the text of `write_metadata`. Raises `EncoderError` for any other text."""
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
    stored.pop("resize", None)
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
