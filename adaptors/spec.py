"""What a head is: its specification and the rules that make one valid.

A head maps the taps of one input to class scores: an *operator* (the adaptor, see `adaptors.operators`) turns taps into
adapted features, a *reconfigurator* maps those to the classes. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import get_args

from adaptors.fields import Activation, HeadFields, Normalisation, Part, Pool, Reconfigurator, TapShapes
from adaptors.hadamard import next_power_of_two
from adaptors.operators import OPERATORS
from adaptors.operators.base import Operator
from adaptors.plan import Plan, Shape

PROTOTYPE_DIMENSIONS = 1024
PROTOTYPE_SCALE = 16.0
"""Inverse temperature of the cosine similarities to the class prototypes, fixed."""


class InvalidSpec(ValueError):
    """A specification that contradicts itself or the encoder's taps; the message names the field."""


@dataclass(frozen=True, order=True)
class HeadSpec(HeadFields):
    """One point of the search space; raises InvalidSpec where the fields make no head."""

    def __post_init__(self) -> None:
        for name, allowed in _WORDS.items():
            if getattr(self, name) not in allowed:
                raise InvalidSpec(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(map(str, allowed))}")
        if not self.taps and self.spatial is None:
            raise InvalidSpec("a head needs at least one tap: name pooled taps or a spatial tap")
        if len(set(self.inputs)) < len(self.inputs):
            raise InvalidSpec(f"a tap is named twice among {', '.join(self.inputs)}: name each once")
        if complaint := self.row.complaint(self):
            raise InvalidSpec(complaint)
        if self.depth < 1:
            raise InvalidSpec(f"depth must be at least 1, got {self.depth}")

    @property
    def row(self) -> Operator:
        """What the operator says of itself."""
        return OPERATORS[self.operator]

    @property
    def convolutional(self) -> bool:
        """Whether the operator reads the spatial tap as a map."""
        return self.row.reads_map

    @property
    def closed_form(self) -> bool:
        """Whether fitting needs no gradient: only the reconfigurator has parameters to learn."""
        return not self.row.learned and self.reconfigurator != "linear"

    @property
    def solved(self) -> bool:
        """Whether ridge regression on fixed codes fits it: the optimum, not where a descent ends."""
        return self.closed_form and self.reconfigurator == "ridge"

    @property
    def inputs(self) -> tuple[str, ...]:
        """All taps that the head reads."""
        return self.taps if self.spatial is None else (*self.taps, self.spatial)

    @property
    def parts(self) -> list[Part]:
        """The taps of the vector input, each with how it is pooled."""
        pooled: list[Part] = [] if self.spatial is None or self.convolutional else [(self.spatial, self.pool)]
        return [*((t, None) for t in self.taps), *pooled]

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

    def adapted_width(self, shapes: TapShapes) -> int:
        """Width of the adapted features that the reconfigurator reads."""
        return self.row.plan(Plan(self, self.parts, shapes), self)[0]

    def plan(self, shapes: TapShapes, classes: int) -> Plan:
        """All that the head computes on one input; taps must exist (see `check_taps`)."""
        plan = Plan(self, self.parts, shapes)
        code = self.row.plan(plan, self)
        if self.reconfigurator == "prototypes":
            adapted, n = code[0], next_power_of_two(max(code[0], PROTOTYPE_DIMENSIONS))
            plan.count(node=1, element=adapted)  # the signs
            plan.lay_out(adapted, n)
            plan.transform(adapted, PROTOTYPE_DIMENSIONS, n)
            plan.lay_out(PROTOTYPE_DIMENSIONS, n)
            plan.count(node=3, element=2 * PROTOTYPE_DIMENSIONS)  # to unit length
            plan.seeded += adapted
            code = (PROTOTYPE_DIMENSIONS,)
        plan.dense(code, "readout", classes)
        return plan


_WORDS: dict[str, Collection[object]] = {
    "operator": OPERATORS,
    "pool": get_args(Pool),
    "normalisation": get_args(Normalisation),
    "activation": get_args(Activation),
    "reconfigurator": get_args(Reconfigurator),
    "bits": (32, 8),
}


def weight_shapes(spec: HeadSpec, shapes: TapShapes, classes: int) -> dict[str, Shape]:
    """Name -> shape of every array that a head stores; `shift` and `scale` are fitted, the others are learned."""
    plan = spec.plan(shapes, classes)
    return plan.arrays | {"shift": (plan.width,), "scale": (plan.width,)}


def check_taps(spec: HeadSpec, shapes: TapShapes) -> None:
    """Raises InvalidSpec unless every tap exists and has the rank that the specification gives it."""
    for name, rank in [*((t, 1) for t in spec.taps), *([(spec.spatial, 3)] if spec.spatial else [])]:
        if name not in shapes:
            raise InvalidSpec(f"tap {name!r} is not among the encoder's: {', '.join(shapes)}")
        if len(shapes[name]) != rank:
            raise InvalidSpec(f"tap {name!r} has shape {shapes[name]}, expected {rank} dimension(s)")
