"""What an operator is: the adaptor of a head, said once for the torch module, the ONNX graph and the plan of its cost.

An operator is built from the layers that a `Layers` offers: `adaptors.modules` computes them by torch,
`adaptors.graph` lays them out as ONNX nodes, `adaptors.plan` counts them. No file here imports torch or onnx.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from adaptors.fields import HeadFields
from adaptors.graph import HeadGraph
from adaptors.plan import Plan, Shape

T = TypeVar("T")
Axis = tuple[tuple[str, ...], list[tuple[object, ...]]]
"""Fields set together, and the values they may take together."""


class Layers(Protocol[T]):
    """The layers that operators are made of; `name` names the learned arrays, `width` is the number of outputs.

    `vector` is the normalised vector input, of mean squared norm one: the pooled taps, and the pooled spatial tap of an
    operator that does not read maps. `scaled` is the same with mean square one a channel, `map` the spatial tap.
    `spread` is a depthwise 3x3 convolution without bias, `conv` a 1x1 convolution. The specification says how to `act`
    and `pool`. `join` appends `scaled` to a vector, if the head reads pooled taps."""

    def vector(self) -> T: ...
    def scaled(self) -> T: ...
    def map(self) -> T: ...
    def dense(self, x: T, name: str, width: int) -> T: ...
    def conv(self, x: T, name: str, width: int) -> T: ...
    def spread(self, x: T, name: str) -> T: ...
    def act(self, x: T) -> T: ...
    def add(self, x: T, y: T) -> T: ...
    def pool(self, x: T) -> T: ...
    def join(self, x: T) -> T: ...


class Tensors(Layers[Any], Protocol):
    """The layers on torch tensors. `scrambled` is the orthonormal transform of `x`, filled up to `n` numbers and
    multiplied by the seeded signs of `label`; `phase` are `width` seeded phases in [0, 2 pi)."""

    def scrambled(self, x: Any, label: str, n: int) -> Any: ...
    def phase(self, width: int) -> Any: ...


def axis(field: str, *choices: object) -> Axis:
    return (field,), [(choice,) for choice in choices]


class Operator:
    """One operator; subclasses say what differs.

    `learned`: it has layers that need gradient descent. `reads_map`: it works on the spatial tap as it is; for other
    operators the spatial tap is pooled into the vector input first."""

    learned = True
    reads_map = False

    def complaint(self, f: HeadFields) -> str | None:
        """Why the fields make no head; None if they do."""
        return f"operator {f.operator!r} needs width >= 1, got {f.width}" if f.width < 1 else None

    def axes(self, taps: Sequence[tuple[str, ...]], maps: Sequence[str]) -> list[Axis]:
        """The axes of the search space that are the operator's own, for sets of pooled taps and for spatial taps.

        No two points may be the same head. Operators with equal axes are drawn as one family."""
        raise NotImplementedError

    def build(self, layers: Layers[T], f: HeadFields) -> T:
        """The adapted features, layer by layer."""
        raise NotImplementedError

    def module(self, tensors: Tensors, f: HeadFields) -> Any:
        """`build` on torch tensors `(samples, ...)`. An operator that needs more overrides these three."""
        return self.build(tensors, f)

    def graph(self, graph: HeadGraph, f: HeadFields) -> str:
        """`build` as ONNX nodes."""
        return self.build(graph, f)

    def plan(self, plan: Plan, f: HeadFields) -> Shape:
        """`build` on shapes."""
        return self.build(plan, f)

    def kernel(self, gram: Any, f: HeadFields) -> Any:
        """Inner products of the adapted features from those of the vector input, where nothing is
        learned; `gram (samples, samples)` stays as it is."""
        return gram

    def random_features(self, f: HeadFields) -> float:
        """How many random features stand behind `kernel`; infinity where it is exact."""
        return float("inf")

    def terms(self, f: HeadFields) -> dict[str, float]:
        """Fields that only this operator has, as numbers of order one, for `adaptors.transfer`."""
        return {}
