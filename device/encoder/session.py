"""The encoder of the inference process: an ONNX file behind `edgeear.types.Encoder`, and its health check.

Rules of this file:

1. Frames go through the network one at a time, whatever the batch: the same frame always gives the same bits, and
   memory does not grow with the batch. On one thread, batches would not be faster.
2. Only the named taps are fetched. Gated taps that are not named are not computed.
3. Features that are not finite are never returned: `DataError` names the tap.
4. `check_encoder` runs the file on test frames and reports all problems. It never raises.
5. A board imports this file, so it needs numpy and ONNX Runtime only.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnxruntime import IOBinding

from device.encoder.file import Reading, open_encoder
from device.encoder.metadata import EncoderError, Metadata, Preprocessing, Problem
from device.encoder.runtime import ORT_ERRORS
from edgeear.errors import DataError, UsageError
from edgeear.types import F32, U8, Encoder, Tap

__all__ = ["EncoderError", "Metadata", "OnnxEncoder", "Preprocessing", "Problem", "check_encoder", "pooled_taps"]

Severity = Literal["error", "warning"]

_OFF = np.zeros(1, np.int64)
_RUN_ERRORS: tuple[type[Exception], ...] = (
    *ORT_ERRORS,
    RuntimeError,
)  # a run with bound memory raises RuntimeError itself
_SAME = 1e-3  # relative: far above rounding, far below the effect of batch statistics
_BEFORE_SOFTMAX = "export the features that the classifier reads, or the scores before the softmax"
_EVAL = "export it in evaluation mode: no dropout, no batch statistics"


@dataclass(frozen=True, eq=False)
class _Lane:
    """The memory of one run for one choice of taps, bound to the session once. The network reads `image` and writes
    into `flat`, each tap at its slice in `places`. `converted` holds the features that are read from outputs of another
    type, layout or shape: how, from which memory, and to where."""

    names: tuple[str, ...]
    image: NDArray[Any]
    flat: F32
    places: tuple[tuple[str, slice, tuple[int, ...]], ...]
    binding: IOBinding
    converted: tuple[tuple[Reading, NDArray[Any], F32], ...]


class OnnxEncoder:
    """A frozen network in an ONNX file, run by `threads` threads that never spin.

    Raises `EncoderError` if the file cannot serve as an encoder, `UsageError` for fewer than 1 thread. `preprocessing`
    overrides the file's own, and is needed if the file does not fix its input size; it may be the text of one, such as
    "224x224 imagenet" (`device.encoder.metadata.parse_preprocessing`).
    """

    def __init__(self, path: str | Path, threads: int = 1, *, preprocessing: Preprocessing | str | None = None) -> None:
        self._file = open_encoder(Path(path), threads, preprocessing)
        self._taps = {tap.name: tap for tap in self._file.metadata.taps}
        self._idle: deque[_Lane] = deque(maxlen=1)
        self._asked: tuple[str, ...] = ()  # the taps of the last call, which are known to exist

    @property
    def digest(self) -> str:
        """SHA-256 of the ONNX file, with the preprocessing where it was given from outside; lower-case hex."""
        return self._file.digest

    @property
    def taps(self) -> tuple[Tap, ...]:
        """All taps, pooled ones first, in the file's order."""
        return self._file.metadata.taps

    @property
    def input_size(self) -> tuple[int, int]:
        """`(height, width)` of a frame."""
        return self.preprocessing.size

    @property
    def preprocessing(self) -> Preprocessing:
        """How a frame becomes the network's input."""
        return self._file.metadata.preprocessing

    @property
    def metadata(self) -> Metadata:
        """The file's metadata, completed by what its graph says."""
        return self._file.metadata

    @property
    def notes(self) -> tuple[Problem, ...]:
        """Warnings from opening the file: ignored outputs, missing metadata."""
        return self._file.notes

    def encode(self, frames: U8, taps: Sequence[str]) -> dict[str, F32]:
        """Features of `frames (samples, height, width, 3)` uint8: tap name -> `(samples, *tap.shape)`.

        Raises `UsageError` for frames of another type or shape and for unknown taps, `DataError` for features
        that are not finite.
        """
        names = self._asked if taps is self._asked else self._known(taps)
        self._check_frames(frames)
        if not names:
            return {}
        features, surely_finite = self._features(frames, names)
        broken = [] if surely_finite else [name for name in names if not np.isfinite(features[name]).all()]
        if broken:
            raise DataError(f"tap {broken[0]} holds NaN or infinity: check the file with check_encoder")
        return features

    def _features(self, frames: U8, names: tuple[str, ...]) -> tuple[dict[str, F32], bool]:
        """The result of `encode`, and whether it is certainly finite."""
        lane = self._lane(names)
        block = np.empty((len(frames), len(lane.flat)), np.float32)
        flat = block.reshape(-1)
        with np.errstate(over="ignore", invalid="ignore"):
            for row, frame in zip(block, frames, strict=True):
                self.preprocessing.apply(frame, lane.image[0])
                row[:] = self._run(lane)
            # One dot product is cheaper than a mask. NaN and infinity show in it; so may a huge finite value.
            surely_finite = math.isfinite(flat.dot(flat))
        self._idle.append(lane)
        if len(frames) == 1:
            features = {name: flat[columns].reshape(1, *shape) for name, columns, shape in lane.places}
        else:
            features = {
                name: np.ascontiguousarray(block[:, columns]).reshape(len(block), *shape)
                for name, columns, shape in lane.places
            }
        return features, surely_finite

    def _run(self, lane: _Lane) -> F32:
        """All features of the frame in `lane.image`, concatenated, in memory that the next run overwrites."""
        try:
            self._file.session.run_with_iobinding(lane.binding)
        except _RUN_ERRORS as error:
            what = f"ONNX Runtime fails on a frame of {self.input_size} ({str(error)[:200]})"
            raise EncoderError(what, "check the file with check_encoder, or export it again") from error
        for reading, found, feature in lane.converted:
            np.copyto(feature, reading.read(found), casting="same_kind")
        return lane.flat

    def _lane(self, names: tuple[str, ...]) -> _Lane:
        """An idle lane for these taps or a new one. Each lane is used by one thread at a time."""
        try:
            lane = self._idle.pop()
        except IndexError:
            return self._new_lane(names)
        return lane if lane.names == names else self._new_lane(names)

    def _new_lane(self, names: tuple[str, ...]) -> _Lane:
        shapes = [self._taps[name].shape for name in names]
        ends = np.cumsum([math.prod(shape) for shape in shapes]).tolist()
        columns = [slice(*ends) for ends in zip([0, *ends], ends, strict=False)]
        image, flat = self._scratch(1), np.empty(ends[-1], np.float32)
        features = [flat[column].reshape(1, *shape) for column, shape in zip(columns, shapes, strict=True)]
        found = self._outputs(names, features)
        binding, readings = self._file.session.io_binding(), [self._file.readings[name] for name in names]
        for name, array in {self._file.input_name: image, **self._closed_gates(names)}.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in found.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        converted = [
            (reading, self.preprocessing.channels_first(found[reading.output]), feature)
            for reading, feature in zip(readings, features, strict=True)
            if found[reading.output] is not feature
        ]
        return _Lane(names, image, flat, tuple(zip(names, columns, shapes, strict=True)), binding, tuple(converted))

    def _outputs(self, names: Sequence[str], features: Sequence[F32]) -> dict[str, NDArray[Any]]:
        """The memory that the network writes each output to: the feature itself, or an array of the output's own."""
        found: dict[str, NDArray[Any]] = {}
        for name, feature in zip(names, features, strict=True):
            reading = self._file.readings[name]
            shape, dtype = self._file.outputs[reading.output]
            if reading.whole and dtype == "float32" and shape == feature.shape:
                found[reading.output] = feature
            else:
                found.setdefault(reading.output, np.empty(shape, dtype))
        return found

    def _closed_gates(self, names: tuple[str, ...]) -> dict[str, Any]:
        gates = self._file.metadata.gates
        opened = {gates[name] for name in names if name in gates}
        return {gate: _OFF for gate in gates.values() if gate not in opened}

    def _known(self, taps: Sequence[str]) -> tuple[str, ...]:
        names = tuple(dict.fromkeys([taps] if isinstance(taps, str) else taps))
        unknown = [name for name in names if name not in self._taps]
        if unknown:
            raise UsageError(f"unknown taps {unknown}: this encoder has {', '.join(self._taps)}")
        if names == taps:
            self._asked = taps
            return taps
        return names

    def _check_frames(self, frames: U8) -> None:
        expected = f"uint8 of shape (samples, {self.preprocessing.height}, {self.preprocessing.width}, 3)"
        if not isinstance(frames, np.ndarray):
            raise UsageError(f"frames are {type(frames).__name__}, expected an array, {expected}")
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (*self.input_size, 3):
            raise UsageError(f"frames are {frames.dtype} of shape {frames.shape}, expected {expected}")

    def _scratch(self, rows: int) -> NDArray[Any]:
        return np.empty((rows, *self.preprocessing.input_shape), self._file.input_dtype)


def pooled_taps(encoder: Encoder) -> tuple[Tap, ...]:
    """The taps that hypervectors bundle: all pooled ones but the class scores of the encoder's own task, which are used
    only where there is nothing else."""
    pooled = tuple(tap for tap in encoder.taps if not tap.spatial)
    return tuple(tap for tap in pooled if tap.name != "logits") or pooled


def notes_of(encoder: Encoder) -> tuple[str, ...]:
    """Warnings about the encoder's file; none where it has no file."""
    return tuple(map(str, getattr(encoder, "notes", ())))


def head_shapes(encoder: Encoder) -> dict[str, tuple[int, ...]]:
    """The taps that heads may read, with their shapes: `pooled_taps` and the spatial ones."""
    return {tap.name: tap.shape for tap in (*pooled_taps(encoder), *(t for t in encoder.taps if t.spatial))}


def check_encoder(path: str | Path, *, preprocessing: Preprocessing | str | None = None) -> tuple[Problem, ...]:
    """All problems of an encoder file, errors first. Empty for a sound file."""
    try:
        encoder = OnnxEncoder(path, preprocessing=preprocessing)
        problems = [*encoder.notes, *_probe(encoder)]
    except UsageError as error:
        return (Problem("error", f"{path}: {error}", "correct the preprocessing"),)
    except EncoderError as error:
        return (error.problem,)
    return tuple(sorted(problems, key=lambda problem: problem.severity))


def _probe(encoder: OnnxEncoder) -> list[Problem]:
    """Run two different frames; report taps that are constant, unstable or not finite."""
    first, second = _probe_frames(*encoder.input_size)
    names = tuple(tap.name for tap in encoder.taps)
    once, again, other = (encoder._features(frame[None], names)[0] for frame in (first, first, second))
    broken = [name for name in names if not np.isfinite([once[name], other[name]]).all()]
    sound = [name for name in names if name not in broken]
    unstable = [name for name in sound if not np.array_equal(once[name], again[name])]
    constant = [name for name in sound if np.array_equal(once[name], other[name])]
    problems = _listed(broken, "error", "NaN or infinity on a sound frame", "check weights and preprocessing")
    problems += _listed(unstable, "error", "another result for the same frame", _EVAL)
    severity: Severity = "error" if len(constant) == len(sound) else "warning"
    problems += _listed(constant, severity, "the same features for two different frames", "check its weights")
    scores = [n for n in sound if once[n].ndim == 2 and _probabilities(once[n]) and _probabilities(other[n])]
    problems += _listed(scores, "warning", "class probabilities, which say little of a frame", _BEFORE_SOFTMAX)
    return problems + ([] if unstable or broken else _batch_dependence(encoder, first, second, once))


def _probabilities(values: F32) -> bool:
    return values.shape[1] > 1 and bool(values.min() >= 0) and abs(float(values.sum()) - 1) < 1e-3


def _listed(names: list[str], severity: Severity, what: str, remedy: str) -> list[Problem]:
    return [Problem(severity, f"tap {', '.join(names)}: {what}", remedy)] if names else []


def _batch_dependence(encoder: OnnxEncoder, first: U8, second: U8, alone: Mapping[str, F32]) -> list[Problem]:
    """Taps whose features depend on the other frame of the batch, as with batch statistics."""
    if not encoder._file.dynamic_batch:
        return []
    names = list(alone)
    images = encoder._scratch(2)
    for frame, image in zip((first, second), images, strict=True):
        encoder.preprocessing.apply(frame, image)
    try:
        readings = [encoder._file.readings[name] for name in names]
        outputs = list(dict.fromkeys(reading.output for reading in readings))
        found = dict(zip(outputs, encoder._file.session.run(outputs, {encoder._file.input_name: images}), strict=True))
    except ORT_ERRORS:
        return []  # only single frames are needed
    dependent = [
        reading.tap.name
        for reading in readings
        if len(value := encoder.preprocessing.channels_first(found[reading.output])) == 2
        and not _close(reading.read(value[:1]), alone[reading.tap.name])
    ]
    return _listed(dependent, "error", "features depend on the other frames of the batch", _EVAL)


def _close(value: F32, reference: F32) -> bool:
    return bool(np.abs(value - reference).max() <= _SAME * (1 + np.abs(reference).max()))


def _probe_frames(height: int, width: int) -> tuple[U8, U8]:
    """A colour ramp and noise: different in mean, contrast and texture."""
    ramp = np.linspace(0, 255, height * width * 3).reshape(height, width, 3).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return ramp, noise
