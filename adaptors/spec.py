"""What a head is: its specification and its exact cost.

A head maps the taps of one input to class scores: an *operator* (the adaptor) turns taps into adapted features, a
*reconfigurator* maps those to the classes. This file owns the words of a specification, its validity rules and the
arithmetic of its cost; nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal, get_args

Operator = Literal["linear", "fourier", "mlp", "conv", "depthwise"]
Pool = Literal["average", "max", "gem", "pyramid"]
Normalisation = Literal["standard", "unit"]
Activation = Literal["relu", "hardswish"]
Reconfigurator = Literal["ridge", "linear", "prototypes"]

PROTOTYPE_DIMENSIONS = 1024
MACS_PER_MS = 1.5e6
"""Multiply-accumulates one modest core does in a millisecond on such small operators (conservative)."""
CALL_MS = 0.05
"""Fixed price of one ONNX Runtime call."""

TapShapes = Mapping[str, tuple[int, ...]]


class InvalidSpec(ValueError):
    """A specification that contradicts itself or the encoder's taps; the message names the field."""


@dataclass(frozen=True, order=True)
class HeadSpec:
    """One point of the search space.

    `taps` are pooled taps, concatenated; `spatial` is at most one spatial tap. Operators: `linear` (normalised taps as
    they are), `fourier` (random Fourier hypervector of `width` dimensions, Rahimi & Recht 2007, with the structured
    projection of Yu et al. 2016), `mlp` (bottleneck of `width` units, `depth` layers), `conv` (1x1 convolutions) and
    `depthwise` (depthwise-separable 3x3 convolutions) on the spatial tap, whose pooled result is joined with `taps`.
    For the vector operators a spatial tap is pooled first. `bandwidth` is the Fourier kernel's
    gamma in exp(-gamma |x - y|^2) for inputs of mean squared norm one. `bits` 8 stores matrices as int8 with one scale a row.
    """

    taps: tuple[str, ...]
    operator: Operator = "linear"
    width: int = 0
    depth: int = 1
    bandwidth: float = 0.0
    residual: bool = False
    spatial: str | None = None
    pool: Pool = "average"
    normalisation: Normalisation = "standard"
    activation: Activation = "relu"
    reconfigurator: Reconfigurator = "ridge"
    bits: int = 32

    def __post_init__(self) -> None:
        for name, allowed in _WORDS.items():
            if getattr(self, name) not in allowed:
                raise InvalidSpec(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(map(str, allowed))}")
        if not self.taps and self.spatial is None:
            raise InvalidSpec("a head needs at least one tap: name pooled taps or a spatial tap")
        if self.operator in ("conv", "depthwise") and self.spatial is None:
            raise InvalidSpec(f"operator {self.operator!r} works on a spatial tap, and none is named")
        if self.operator == "linear" and self.width:
            raise InvalidSpec(f"operator 'linear' has no width, got {self.width}")
        if self.operator != "linear" and self.width < 1:
            raise InvalidSpec(f"operator {self.operator!r} needs width >= 1, got {self.width}")
        if self.operator == "fourier" and not self.bandwidth > 0:
            raise InvalidSpec(f"operator 'fourier' needs bandwidth > 0, got {self.bandwidth}")
        if self.depth < 1:
            raise InvalidSpec(f"depth must be at least 1, got {self.depth}")

    @property
    def convolutional(self) -> bool:
        return self.operator in ("conv", "depthwise")

    @property
    def closed_form(self) -> bool:
        """Whether fitting needs no gradient: only the reconfigurator has parameters to learn."""
        return self.operator in ("linear", "fourier") and self.reconfigurator != "linear"

    @property
    def inputs(self) -> tuple[str, ...]:
        """All taps that the head reads."""
        return self.taps if self.spatial is None else (*self.taps, self.spatial)

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "taps": list(self.taps)}

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> HeadSpec:
        """Inverse of `to_dict`; raises InvalidSpec on unknown or missing fields."""
        try:
            values = dict(data)
            taps = values.pop("taps")
            if not isinstance(taps, list | tuple) or not all(isinstance(t, str) for t in taps):
                raise InvalidSpec(f"taps must be a list of names, got {taps!r}")
            return cls(taps=tuple(taps), **values)  # type: ignore[arg-type]
        except (TypeError, KeyError) as error:
            raise InvalidSpec(f"not a head specification: {error}") from error


_WORDS: dict[str, tuple[object, ...]] = {
    "operator": get_args(Operator),
    "pool": get_args(Pool),
    "normalisation": get_args(Normalisation),
    "activation": get_args(Activation),
    "reconfigurator": get_args(Reconfigurator),
    "bits": (32, 8),
}


@dataclass(frozen=True)
class Cost:
    """Exact size and work of one head: learned parameters, stored bytes, multiply-accumulates, predicted milliseconds."""

    parameters: int
    bytes: int
    macs: int
    latency_ms: float


def next_power_of_two(n: int) -> int:
    return 1 << max(n - 1, 1).bit_length()


def pooled_width(channels: int, pool: Pool) -> int:
    return channels * (4 if pool == "pyramid" else 1)


def vector_width(spec: HeadSpec, shapes: TapShapes) -> int:
    """Width of the normalised vector input: all pooled taps, and the pooled spatial tap of a vector operator."""
    width = sum(shapes[t][0] for t in spec.taps)
    if spec.spatial is not None and not spec.convolutional:
        width += pooled_width(shapes[spec.spatial][0], spec.pool)
    return width


def adapted_width(spec: HeadSpec, shapes: TapShapes) -> int:
    """Width of the adapted features that the reconfigurator reads."""
    vector = vector_width(spec, shapes)
    if spec.operator == "linear":
        return vector
    if spec.convolutional:
        return pooled_width(spec.width, spec.pool) + vector
    return spec.width


def cost(spec: HeadSpec, shapes: TapShapes, classes: int) -> Cost:
    """Exact cost of `spec` over taps of the given shapes for a number of classes; raises InvalidSpec on unknown taps."""
    check_taps(spec, shapes)
    vector, adapted = vector_width(spec, shapes), adapted_width(spec, shapes)
    matrix, other, macs, fixed = _operator_cost(spec, shapes, vector)
    readout = PROTOTYPE_DIMENSIONS if spec.reconfigurator == "prototypes" else adapted
    if spec.reconfigurator == "prototypes":
        padded = next_power_of_two(max(adapted, PROTOTYPE_DIMENSIONS))
        macs, fixed = macs + _hadamard_macs(padded), fixed + padded
    matrix, other, macs = matrix + readout * classes, other + classes + 2 * vector, macs + readout * classes
    rows = classes + (spec.width * (1 + spec.depth) if spec.operator in ("mlp", "conv", "depthwise") else 0)
    stored = 4 * other + (4 * matrix if spec.bits == 32 else matrix + 4 * rows) + fixed
    return Cost(matrix + other, stored, macs, CALL_MS + macs / MACS_PER_MS)


def check_taps(spec: HeadSpec, shapes: TapShapes) -> None:
    """Raises InvalidSpec unless every tap exists and has the rank that the specification gives it."""
    for name, rank in [*((t, 1) for t in spec.taps), *([(spec.spatial, 3)] if spec.spatial else [])]:
        if name not in shapes:
            raise InvalidSpec(f"tap {name!r} is not among the encoder's: {', '.join(shapes)}")
        if len(shapes[name]) != rank:
            raise InvalidSpec(f"tap {name!r} has shape {shapes[name]}, expected {rank} dimension(s)")


def _hadamard_macs(n: int) -> int:
    a = 1 << (n.bit_length() // 2)
    return n * (a + n // a)


def _operator_cost(spec: HeadSpec, shapes: TapShapes, vector: int) -> tuple[int, int, int, int]:
    """(matrix parameters, other parameters, MACs, bytes of seeded constants) of the operator alone."""
    w = spec.width
    if spec.operator == "linear":
        return 0, 0, vector, 0
    if spec.operator == "fourier":
        padded = next_power_of_two(max(vector, w))
        return 0, 0, 3 * _hadamard_macs(padded) + w, 3 * padded + 4 * w
    if spec.operator == "mlp":
        matrix = vector * w + (spec.depth - 1) * w * w
        return matrix, spec.depth * w, matrix, 0
    assert spec.spatial is not None
    channels, height, width = shapes[spec.spatial]
    block = w * w + (9 * w if spec.operator == "depthwise" else 0)
    matrix = channels * w + spec.depth * block
    return matrix, w * (1 + spec.depth), matrix * height * width, 0
