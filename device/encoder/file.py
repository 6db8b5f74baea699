"""Opening an encoder file: which ONNX image models are accepted, and which taps they have.

Rules of this file:

1. Any ONNX image model with one image input of three channels and at least one usable output is accepted. Outputs of
   rank 2 are pooled taps, of rank 4 spatial taps. An output of rank 3 is read as the tokens of a vision transformer:
   the class token and the mean of the patches are pooled taps. Other outputs are ignored, and `OpenEncoder.notes` names
   them.
2. Hypervectors need pooled taps: a file with spatial ones only also gets their means, as `NAME.mean`.
3. A tap has the name of its output, except where a head's graph needs that name for itself (`_tap_name`).
4. The file's own metadata (metadata.py) is checked against its graph. Without metadata, a frame is scaled to [0, 1],
   and every usable output is a tap.
5. The file is read whole and identified by its SHA-256, with the preprocessing where it was given from outside.
   Weights outside of the file are refused before it is opened.
6. Every fault is an `EncoderError` that names the file, the fault and the remedy.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession

from adaptors.archive import OUTPUT
from adaptors.onnx_bytes import ExternalWeights, ModelError, appended
from device.encoder.metadata import (
    METADATA_KEY,
    EncoderError,
    Layout,
    Metadata,
    Preprocessing,
    Problem,
    parse_preprocessing,
    read_metadata,
    write_metadata,
)
from device.encoder.runtime import ORT_ERRORS, InvalidProtobuf, open_session
from edgeear.errors import UsageError
from edgeear.space import MAX_CHANNELS
from edgeear.types import Tap

_OPENING_ERRORS: tuple[type[Exception], ...] = (
    *ORT_ERRORS,
    ValueError,
    RuntimeError,
)  # ValueError: a name in the file is not UTF-8
_INPUT_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}
_BEFORE_PATCHES = (1, 2, 5)
_OUTPUT_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}


@dataclass(frozen=True)
class Reading:
    """How a tap is read from an output: whole, one or several tokens of it, or the mean over `axes`."""

    tap: Tap
    output: str
    tokens: int | slice | None = None
    axes: tuple[int, ...] = ()

    @property
    def whole(self) -> bool:
        return self.tokens is None and not self.axes

    def read(self, value: NDArray[Any]) -> NDArray[Any]:
        """The tap `(samples, *tap.shape)` in the value of the output, maps with their channels first."""
        part = value if self.tokens is None else value[:, self.tokens]
        return part.mean(self.axes, dtype=np.float32) if self.axes else part


@dataclass(frozen=True)
class OpenEncoder:
    """A file that can serve as an encoder. `metadata` is complete even if the file has none. `readings` says how each
    tap is read, `outputs` holds shape and type of each output that is read, for one frame."""

    session: InferenceSession
    digest: str
    input_name: str
    input_dtype: str
    dynamic_batch: bool
    outputs: dict[str, tuple[tuple[int, ...], str]]
    readings: dict[str, Reading]
    metadata: Metadata
    notes: tuple[Problem, ...]


def open_encoder(path: Path, threads: int, preprocessing: Preprocessing | str | None = None) -> OpenEncoder:
    """Open `path` for `threads` threads. `preprocessing`, or the text of one (`metadata.parse_preprocessing`),
    overrides the file's own.

    Raises `EncoderError` for a file that cannot serve as an encoder, `UsageError` for fewer than 1 thread and for a
    text that says no preprocessing.
    """
    if threads < 1:
        raise UsageError(f"{threads} threads: an encoder needs at least 1")
    try:
        content = _read(path)
        return _opened(content, _session(content, threads), preprocessing)
    except EncoderError as error:
        raise EncoderError(f"{path}: {error.what}", error.remedy) from error.__cause__


def prepared(path: Path, preprocessing: Preprocessing | str) -> bytes:
    """The content of the file `path` with `preprocessing` as its own; its digest is that of the encoder that
    `open_encoder(path, 1, preprocessing)` opens. Raises as `open_encoder`."""
    content, encoder = _read(path), open_encoder(path, 1, preprocessing)
    if hashlib.sha256(content).hexdigest() == encoder.digest:
        return content
    return appended(content, METADATA_KEY, write_metadata(encoder.metadata))


def _opened(content: bytes, session: InferenceSession, wanted: Preprocessing | str | None) -> OpenEncoder:
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    stored = None if text is None else read_metadata(text)
    image = _image_input(session)
    if isinstance(wanted, str):
        wanted = parse_preprocessing(wanted, *_stated(image.shape))
    preprocessing = _preprocessing(image.shape, wanted or (stored.preprocessing if stored else None))
    shapes = _output_shapes(session, image, preprocessing)
    readings, notes = _readings(session, shapes, preprocessing)
    if stored is None:
        metadata = Metadata(preprocessing, ())
        notes += [] if wanted or image.type == "tensor(uint8)" else [_NO_METADATA]
    else:
        readings = _check_against_graph(stored, readings, session)
        metadata = replace(stored, preprocessing=preprocessing)
    if not readings:
        because = "".join(f", {note.what}" for note in notes if note is not _NO_METADATA)
        raise EncoderError(f"encoder without taps{because}", "export it with an output of rank 2 or 4")
    if all(reading.tap.spatial for reading in readings):
        readings += _means(readings)
    readings.sort(key=lambda reading: reading.tap.spatial)
    metadata = replace(metadata, taps=tuple(reading.tap for reading in readings))
    if wanted and (stored is None or preprocessing != stored.preprocessing):
        content = appended(content, METADATA_KEY, write_metadata(metadata))
    return OpenEncoder(
        session=session,
        digest=hashlib.sha256(content).hexdigest(),
        input_name=image.name,
        input_dtype=_INPUT_TYPES[image.type],
        dynamic_batch=not isinstance(image.shape[0], int),
        outputs={
            o.name: (shapes[o.name], _OUTPUT_TYPES[o.type]) for o in session.get_outputs() if o.type in _OUTPUT_TYPES
        },
        readings={reading.tap.name: reading for reading in readings},
        metadata=metadata,
        notes=tuple(notes),
    )


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise EncoderError("not a file", "give the path of an ONNX file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise EncoderError(f"cannot be read ({error.strerror})", "check its permissions and its disk") from error


def _session(content: bytes, threads: int) -> InferenceSession:
    try:
        return open_session(content, threads, unfold=False)
    except ExternalWeights as error:
        remedy = "export it as one file, weights included (torch.onnx.export: external_data=False)"
        raise EncoderError(f"{error}, so a digest does not cover them", remedy) from error
    except _OPENING_ERRORS as error:
        raise _refused(content, error) from error


def _refused(content: bytes, error: Exception) -> EncoderError:
    unreadable = isinstance(error, ModelError | InvalidProtobuf) or "No graph was found" in str(error)
    if unreadable and content[:1] == b"\x08":  # the format version, the first field of an ONNX file
        return EncoderError("truncated or damaged ONNX file", "copy it or export it again")
    if unreadable:
        return EncoderError("not an ONNX file", "give the path of an ONNX file")
    first_line = str(error).strip().partition("\n")[0][:200]
    return EncoderError(f"ONNX Runtime refuses it ({first_line})", "export it with operators that ONNX Runtime knows")


def _image_input(session: InferenceSession) -> Any:
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise EncoderError(f"{len(inputs)} inputs, expected 1", "export it with the image as its only input")
    image = inputs[0]
    if image.type not in _INPUT_TYPES or len(image.shape) != 4:
        what = f"input {image.name} is {image.type} of shape {image.shape}"
        raise EncoderError(what, "export it with an input of rank 4, float or uint8")
    if isinstance(image.shape[0], int) and image.shape[0] != 1:
        raise EncoderError(f"batch fixed to {image.shape[0]}", "export it with batch 1 or with a free batch")
    return image


def _preprocessing(shape: list[Any], wanted: Preprocessing | None) -> Preprocessing:
    """`wanted` if it agrees with the input, or the default for the input's size."""
    layout = _layout(shape, wanted)
    height, width = shape[2:] if layout == "NCHW" else shape[1:3]
    if wanted is None:
        if not isinstance(height, int) or not isinstance(width, int):
            remedy = f"{_SAY} '224x224 imagenet', or export it with a fixed input size"
            raise EncoderError(f"input size {height} x {width} is not fixed", remedy)
        return Preprocessing(height, width, layout=layout)
    for stated, given in ((height, wanted.height), (width, wanted.width)):
        if isinstance(stated, int) and stated != given:
            what = f"input size {height} x {width}, preprocessing says {wanted.height} x {wanted.width}"
            raise EncoderError(what, "make them agree")
    return wanted


def _layout(shape: list[Any], wanted: Preprocessing | None) -> Layout:
    if wanted is None:
        candidates: tuple[Layout, ...] = ("NCHW", "NHWC")
        agreeing = [layout for layout in candidates if shape[layout.index("C")] == 3]
    else:  # a free number of channels agrees with `wanted`
        channels = shape[wanted.layout.index("C")]
        agreeing = [wanted.layout] if channels == 3 or not isinstance(channels, int) else []
    if not agreeing:
        what = f"input shape {shape}, layout {wanted.layout if wanted else 'NCHW or NHWC'}"
        raise EncoderError(what, "an encoder takes 3 channels, second in NCHW, last in NHWC")
    return agreeing[0]


def _readings(
    session: InferenceSession, shapes: dict[str, tuple[int, ...]], preprocessing: Preprocessing
) -> tuple[list[Reading], list[Problem]]:
    """All taps, and a warning for each output that gives none. Raises `EncoderError` for two taps of one name."""
    readings: list[Reading] = []
    notes: list[Problem] = []
    for output in session.get_outputs():
        shape = shapes[output.name]
        found = list(_of_output(output.name, shape, preprocessing)) if output.type in _OUTPUT_TYPES else []
        readings += found
        if not found:
            what = f"output {output.name} is ignored, it is {output.type} of shape {shape} for one frame"
            remedy = (
                f"a tap is float of shape (1, channels) with at most {MAX_CHANNELS} channels, (1, channels, height, "
                "width), or (1, tokens, channels) with the class token first and the patches of the frame last"
            )
            notes.append(Problem("warning", what, remedy))
    names = [reading.tap.name for reading in readings]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        outputs = [reading.output for reading in readings if reading.tap.name == twice[0]]
        raise EncoderError(f"outputs {outputs} are both tap {twice[0]!r}", "rename one of them")
    return readings, notes


def _means(readings: list[Reading]) -> list[Reading]:
    """The spatial taps, averaged over their positions."""
    return [
        Reading(Tap(f"{reading.tap.name}.mean", reading.tap.shape[:1]), reading.output, axes=(2, 3))
        for reading in readings
        if reading.tap.spatial
    ]


def _of_output(name: str, shape: tuple[int, ...], preprocessing: Preprocessing) -> Iterator[Reading]:
    """The taps of one output of `shape` for one frame; none if it cannot be a tap."""
    tap = _tap_name(name)
    if not shape or shape[0] != 1 or 0 in shape:
        return
    if len(shape) == 2 and shape[1] <= MAX_CHANNELS:
        yield Reading(Tap(tap, shape[1:]), name)
    elif len(shape) == 4:
        channels_last = preprocessing.layout == "NHWC"
        yield Reading(Tap(tap, (shape[3], shape[1], shape[2]) if channels_last else shape[1:]), name)
    elif len(shape) == 3 and (first := _first_patch(shape[1], preprocessing.size)):
        yield Reading(Tap(f"{tap}.class", shape[2:]), name, tokens=0)
        yield Reading(Tap(f"{tap}.mean", shape[2:]), name, tokens=slice(first, None), axes=(1,))


def _first_patch(tokens: int, size: tuple[int, int]) -> int | None:
    """How many of a vision transformer's tokens come before the patches: the class token (ViT), a distillation token
    (DeiT) or four registers (DINOv2) more. None if the rest is no grid of square patches of the frame."""
    height, width = size
    grids = {(height // side) * (width // side) for side in range(1, min(size)) if not (height % side or width % side)}
    return next((first for first in _BEFORE_PATCHES if tokens - first in grids - {1, 2, 3}), None)


def _tap_name(output: str) -> str:
    """The output's name without slashes in front, which name the inside of a head's graph, and with characters that
    cannot be printed replaced. A head's own output is named `scores`."""
    name = re.sub(r"\s", "_", "".join(c if c.isprintable() else "_" for c in output)).lstrip("/") or "output"
    return f"encoder.{name}" if name == OUTPUT else name


def _output_shapes(session: InferenceSession, image: Any, preprocessing: Preprocessing) -> dict[str, tuple[int, ...]]:
    """The shapes for one frame: as stated, or measured on a black frame if the file leaves a size open."""
    outputs = session.get_outputs()
    if all(_is_stated(output.shape) for output in outputs):
        return {output.name: (1, *output.shape[1:]) for output in outputs}
    black = np.zeros((1, *preprocessing.input_shape), _INPUT_TYPES[image.type])
    try:
        found = session.run(None, {image.name: black})
    except ORT_ERRORS as error:
        what = f"it fails on a frame of {preprocessing.height} x {preprocessing.width} ({str(error)[:200]})"
        raise EncoderError(what, "check the input size, or export it again") from error
    return {output.name: np.shape(value) for output, value in zip(outputs, found, strict=True)}


def _is_stated(shape: list[Any]) -> bool:
    rows, *sizes = shape or [None]
    return (rows == 1 or isinstance(rows, str)) and all(isinstance(size, int) for size in sizes)


def _check_against_graph(stored: Metadata, readings: list[Reading], session: InferenceSession) -> list[Reading]:
    """The readings of the metadata's taps. Raises `EncoderError` unless all taps and gates are in the graph."""
    known = {reading.output: reading for reading in readings if reading.whole}
    known |= {reading.tap.name: reading for reading in (*_means(readings), *readings)}
    for tap in stored.taps:
        found = known[tap.name].tap.shape if tap.name in known else None
        if found != tap.shape:
            raise EncoderError(
                f"its metadata names tap {tap.name} {tap.shape}, the graph has {found}", "export it again"
            )
    inputs = {value.name for value in session.get_overridable_initializers()}
    missing = sorted(set(stored.gates.values()) - inputs)
    if missing:
        raise EncoderError(f"its metadata names gate {missing[0]}, which the graph lacks", "export it again")
    return [known[tap.name] for tap in stored.taps]


def _stated(shape: list[Any]) -> tuple[Any, Any, Layout]:
    """Height, width and layout of the input; a size that the file leaves open is a name or None."""
    if shape[3] == 3 and shape[1] != 3:
        return shape[1], shape[2], "NHWC"
    return shape[2], shape[3], "NCHW"


_SAY = "say --preprocessing (in a configuration device.preprocessing), such as"
_NO_METADATA = Problem(
    "warning",
    "no preprocessing metadata, so frames are scaled to [0, 1] in RGB",
    f"{_SAY} imagenet, or unit if this is right",
)
