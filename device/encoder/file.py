"""Opening an encoder file: which ONNX image models are accepted, and which taps they have.

Rules of this file:

1. Any ONNX image model with one image input of three channels and at least one output is accepted. Outputs of rank 2
   are pooled taps, of rank 4 spatial taps. Others are ignored, and `OpenEncoder.notes` names them.
2. The file's own metadata (metadata.py) is checked against its graph. Without metadata, a frame is scaled to [0, 1],
   and every usable output is a tap.
3. The file is read whole and identified by its SHA-256. Weights outside of the file are refused before it is opened.
4. Every fault is an `EncoderError` that names the file, the fault and the remedy.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime import InferenceSession

from adaptors.onnx_bytes import ExternalWeights, ModelError
from device.encoder.metadata import (
    METADATA_KEY,
    EncoderError,
    Layout,
    Metadata,
    Preprocessing,
    Problem,
    read_metadata,
)
from device.encoder.runtime import ORT_ERRORS, InvalidProtobuf, open_session
from edgeear.errors import UsageError
from edgeear.types import Tap

_OPENING_ERRORS: tuple[type[Exception], ...] = (
    *ORT_ERRORS,
    ValueError,
    RuntimeError,
)  # ValueError: a name in the file is not UTF-8
_INPUT_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}
_OUTPUT_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}


@dataclass(frozen=True)
class OpenEncoder:
    """A file that can serve as an encoder. `metadata` is complete even if the file has none."""

    session: InferenceSession
    digest: str
    input_name: str
    input_dtype: str
    dynamic_batch: bool
    output_dtypes: dict[str, str]
    metadata: Metadata
    notes: tuple[Problem, ...]


def open_encoder(path: Path, threads: int, preprocessing: Preprocessing | None = None) -> OpenEncoder:
    """Open `path` for `threads` threads. `preprocessing` overrides the file's own.

    Raises `EncoderError` for a file that cannot serve as an encoder, `UsageError` for fewer than 1 thread.
    """
    if threads < 1:
        raise UsageError(f"{threads} threads: an encoder needs at least 1")
    try:
        content = _read(path)
        return _opened(content, _session(content, threads), preprocessing)
    except EncoderError as error:
        raise EncoderError(f"{path}: {error.what}", error.remedy) from error.__cause__


def _opened(content: bytes, session: InferenceSession, wanted: Preprocessing | None) -> OpenEncoder:
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    stored = None if text is None else read_metadata(text)
    image = _image_input(session)
    preprocessing = _preprocessing(image.shape, wanted or (stored.preprocessing if stored else None))
    taps, notes = _tap_outputs(session, image, preprocessing)
    if stored is None:
        metadata = Metadata(preprocessing, tuple(taps))
        notes += [] if wanted or image.type == "tensor(uint8)" else [_NO_METADATA]
    else:
        _check_against_graph(stored, taps, session)
        metadata = replace(stored, preprocessing=preprocessing)
    if not metadata.taps:
        because = "".join(f", {note.what}" for note in notes)
        raise EncoderError(f"encoder without taps{because}", "export it with an output of rank 2 or 4")
    return OpenEncoder(
        session=session,
        digest=hashlib.sha256(content).hexdigest(),
        input_name=image.name,
        input_dtype=_INPUT_TYPES[image.type],
        dynamic_batch=not isinstance(image.shape[0], int),
        output_dtypes={o.name: _OUTPUT_TYPES[o.type] for o in session.get_outputs() if o.type in _OUTPUT_TYPES},
        metadata=replace(metadata, taps=tuple(sorted(metadata.taps, key=lambda tap: tap.spatial))),
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
            remedy = "pass `preprocessing` with height and width, or export it with a fixed input size"
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


def _tap_outputs(
    session: InferenceSession, image: Any, preprocessing: Preprocessing
) -> tuple[list[Tap], list[Problem]]:
    """All usable outputs as taps, and a warning for each other one."""
    shapes = _output_shapes(session, image, preprocessing)
    taps, notes = [], []
    for output in session.get_outputs():
        shape = shapes[output.name]
        if output.type not in _OUTPUT_TYPES or len(shape) not in (2, 4) or shape[0] != 1 or 0 in shape:
            what = f"output {output.name} is ignored, it is {output.type} of shape {shape} for one frame"
            remedy = "a tap is float of shape (1, channels) or (1, channels, height, width)"
            notes.append(Problem("warning", what, remedy))
        elif preprocessing.layout == "NHWC" and len(shape) == 4:
            taps.append(Tap(output.name, (shape[3], shape[1], shape[2])))
        else:
            taps.append(Tap(output.name, shape[1:]))
    return taps, notes


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


def _check_against_graph(stored: Metadata, taps: list[Tap], session: InferenceSession) -> None:
    """Raise `EncoderError` unless all taps and gates of the metadata are in the graph."""
    shapes = {tap.name: tap.shape for tap in taps}
    for tap in stored.taps:
        if shapes.get(tap.name) != tap.shape:
            what = f"its metadata names tap {tap.name} {tap.shape}, the graph has {shapes.get(tap.name)}"
            raise EncoderError(what, "export it again")
    inputs = {value.name for value in session.get_overridable_initializers()}
    missing = sorted(set(stored.gates.values()) - inputs)
    if missing:
        raise EncoderError(f"its metadata names gate {missing[0]}, which the graph lacks", "export it again")


_NO_METADATA = Problem(
    "warning",
    "no preprocessing metadata, so frames are scaled to [0, 1] in RGB",
    "pass `preprocessing`, or export it with device.encoder.export.export_module",
)
