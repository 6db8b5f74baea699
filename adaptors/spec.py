"""What a head is: its specification and its cost.

A head maps the taps of one input to class scores: an *operator* (the adaptor) turns taps into adapted features, a
*reconfigurator* maps those to the classes. This file owns the words of a specification, its validity rules and the
arithmetic of its cost; nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from adaptors.latency import LatencyModel

Operator = Literal["linear", "fourier", "mlp", "conv", "depthwise"]
Pool = Literal["average", "max", "gem", "pyramid"]
Normalisation = Literal["standard", "unit"]
Activation = Literal["relu", "hardswish"]
Reconfigurator = Literal["ridge", "linear", "prototypes"]

PROTOTYPE_DIMENSIONS = 1024
PROTOTYPE_SCALE = 16.0
"""Inverse temperature of the cosine similarities to the class prototypes, fixed."""

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
    gamma in exp(-gamma |x - y|^2) for inputs of mean squared norm one. `bits` 8 stores matrices as int8
    with one scale a row.
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
        if len(set(self.inputs)) < len(self.inputs):
            raise InvalidSpec(f"a tap is named twice among {', '.join(self.inputs)}: name each once")
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
    def solved(self) -> bool:
        """Whether ridge regression on fixed codes fits it: the optimum, not where a descent ends."""
        return self.closed_form and self.reconfigurator == "ridge"

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
    """Size and work of one head: parameters (learned and fitted), stored bytes, multiply-accumulates, predicted ms."""

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


def weight_shapes(spec: HeadSpec, shapes: TapShapes, classes: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every array that a head stores; `shift` and `scale` are fitted, the others are learned."""
    vector, w = vector_width(spec, shapes), spec.width
    layers: dict[str, tuple[int, ...]] = {}
    if spec.operator == "mlp":
        layers = {f"layer{i}": (w, w if i else vector) for i in range(spec.depth)}
    elif spec.convolutional:
        assert spec.spatial is not None
        layers = {"stem": (w, shapes[spec.spatial][0], 1, 1)}
        layers |= {f"block{i}": (w, w, 1, 1) for i in range(spec.depth)}
    prototypes = spec.reconfigurator == "prototypes"
    layers["readout"] = (classes, PROTOTYPE_DIMENSIONS if prototypes else adapted_width(spec, shapes))
    stored = {f"matrix.{n}": shape for n, shape in layers.items()}
    if spec.operator == "depthwise":  # these alone have no bias
        stored |= {f"matrix.spread{i}": (w, 1, 3, 3) for i in range(spec.depth)}
    stored |= {f"bias.{n}": shape[:1] for n, shape in layers.items()}
    return stored | {"shift": (vector,), "scale": (vector,)}


def cost(spec: HeadSpec, shapes: TapShapes, classes: int, latency: LatencyModel | None = None) -> Cost:
    """Cost of `spec` over taps of the given shapes for a number of classes; raises InvalidSpec on unknown taps.

    Parameters are exact; bytes leave out the description of the graph, a few KiB; MACs leave out elementwise work.
    `latency` is the model of a board, None the built-in one."""
    from adaptors.latency import DEFAULT  # which counts the work of specifications

    check_taps(spec, shapes)
    stored = weight_shapes(spec, shapes, classes)
    matrices = [shape for name, shape in stored.items() if name.startswith("matrix.")]
    learned, total = sum(map(prod, matrices)), sum(map(prod, stored.values()))
    size = 4 * total if spec.bits == 32 else 4 * total - 3 * learned + 4 * sum(shape[0] for shape in matrices)
    macs, seeded = _operator_work(spec, shapes)
    readout, adapted = prod(stored["matrix.readout"]), adapted_width(spec, shapes)
    if spec.reconfigurator == "prototypes":
        n = next_power_of_two(max(adapted, PROTOTYPE_DIMENSIONS))
        macs, seeded = macs + transform_macs(n, adapted, PROTOTYPE_DIMENSIONS), seeded + adapted
    macs += readout
    return Cost(total, size + seeded, macs, (latency or DEFAULT).predict_ms(spec, shapes, classes))


def transform_macs(n: int, inputs: int, outputs: int) -> int:
    """Work of a Walsh-Hadamard transform whose inputs beyond `inputs` are zero, as two products of matrices.

    The `(a, b)` matrix of the inputs is cut to the rows that matter before, and of the outputs after."""
    _, b = transform_factors(n)
    before, after = -(-inputs // b), -(-outputs // b)
    return before * after * b + min(before, after) * b * b


def transform_factors(n: int) -> tuple[int, int]:
    """(a, b), a <= b, a * b = n: the transform of n numbers is made of one of a and one of b."""
    a: int = 1 << (n.bit_length() - 1) // 2
    return a, n // a


def check_taps(spec: HeadSpec, shapes: TapShapes) -> None:
    """Raises InvalidSpec unless every tap exists and has the rank that the specification gives it."""
    for name, rank in [*((t, 1) for t in spec.taps), *([(spec.spatial, 3)] if spec.spatial else [])]:
        if name not in shapes:
            raise InvalidSpec(f"tap {name!r} is not among the encoder's: {', '.join(shapes)}")
        if len(shapes[name]) != rank:
            raise InvalidSpec(f"tap {name!r} has shape {shapes[name]}, expected {rank} dimension(s)")


def _operator_work(spec: HeadSpec, shapes: TapShapes) -> tuple[int, int]:
    """(MACs, bytes of seeded constants) of the operator alone."""
    vector, w = vector_width(spec, shapes), spec.width
    if spec.operator == "linear":
        return vector, 0
    if spec.operator == "fourier":
        n = next_power_of_two(max(vector, w))
        work = transform_macs(n, vector, n) + transform_macs(n, n, n) + transform_macs(n, n, w)
        return work + w, 2 * n + 2 * w
    if spec.operator == "mlp":
        return vector * w + (spec.depth - 1) * w * w, 0
    assert spec.spatial is not None
    channels, height, width = shapes[spec.spatial]
    block = w * w + (9 * w if spec.operator == "depthwise" else 0)
    return (channels * w + spec.depth * block) * height * width, 0
