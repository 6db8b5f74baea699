"""The set of head specifications over an encoder's taps, and the budget that bounds it.

The space is a product of small choices, indexed by one integer, so that it is counted, sampled and enumerated without
being held in memory. Simple specs (pooled taps, linear) are part of it, so a search never misses them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np

from adaptors.cost import Cost, cost
from adaptors.fields import TapShapes
from adaptors.latency import DEFAULT, LatencyModel
from adaptors.operators import OPERATORS
from adaptors.operators.base import Axis, axis
from adaptors.spec import HeadSpec

Family = list[Axis]


@dataclass(frozen=True)
class Budget:
    """Upper limits of one head; all of them are checked before any proxy is computed."""

    parameters: int = 100_000
    bytes: int = 512 * 1024
    macs: int = 20_000_000
    latency_ms: float = 10.0

    def admits(self, c: Cost) -> bool:
        return (
            c.parameters <= self.parameters
            and c.bytes <= self.bytes
            and c.macs <= self.macs
            and c.latency_ms <= self.latency_ms
        )


BUDGETS = {
    "small": Budget(parameters=20_000, bytes=96 * 1024, macs=2_000_000, latency_ms=2.0),
    "medium": Budget(),
    "large": Budget(parameters=1_000_000, bytes=4 * 1024 * 1024, macs=100_000_000, latency_ms=50.0),
}


class EmptyBudget(ValueError):
    """No specification fits the budget; the message names the smallest head there is."""


@dataclass(frozen=True)
class SearchSpace:
    """All specifications over the given taps, for a number of classes; `latency` predicts for the board."""

    shapes: TapShapes
    classes: int
    latency: LatencyModel = DEFAULT

    def cost(self, spec: HeadSpec) -> Cost:
        return cost(spec, self.shapes, self.classes, self.latency)

    def tap_sets(self) -> list[tuple[str, ...]]:
        """The last k pooled taps for every k, and the same for each kind (`.mean`, `.std`) alone."""
        pooled = [t for t, s in self.shapes.items() if len(s) == 1]
        kinds = {t.rpartition(".")[2] for t in pooled if "." in t}
        groups = [pooled, *([t for t in pooled if t.endswith("." + k)] for k in sorted(kinds) if len(kinds) > 1)]
        sets = {tuple(g[-k:]) for g in groups for k in range(1, len(g) + 1)}
        return sorted(sets, key=lambda s: (len(s), s))

    def _families(self) -> list[Family]:
        """The space is the union of the families' products. Operators with equal axes share a family."""
        spatial = [t for t, s in self.shapes.items() if len(s) == 3]
        taps = self.tap_sets()
        rest = [axis("normalisation", "standard", "unit"), axis("bits", 32, 8)]
        families: list[tuple[list[str], Family]] = []
        for name, operator in OPERATORS.items():
            readout = axis("reconfigurator", "linear" if operator.learned else "ridge", "prototypes")
            axes = [*operator.axes(taps, spatial), readout, *rest]
            if alike := [names for names, known in families if known == axes]:
                alike[0].append(name)
            else:
                families.append(([name], axes))
        return [[axis("operator", *names), *axes] for names, axes in families]

    def __iter__(self) -> Iterator[HeadSpec]:
        for family in self._families():
            for values in product(*(choices for _, choices in family)):
                yield _spec(family, values)

    def __len__(self) -> int:
        return sum(_size(f) for f in self._families())

    def sample(self, n: int, budget: Budget, seed: int) -> list[tuple[HeadSpec, Cost]]:
        """Up to `n` different specs within the budget, in a seeded order, families in equal shares.

        Raises EmptyBudget when nothing in the whole space fits."""
        rng = np.random.default_rng(seed)
        queues = [self._draw(f, rng, budget) for f in self._families() if _size(f)]
        found: dict[HeadSpec, Cost] = {}
        while queues and len(found) < n:
            for queue in list(queues):
                item = next(queue, None)
                if item is None:
                    queues.remove(queue)
                elif len(found) < n:
                    found.setdefault(*item)
        if not found:
            raise EmptyBudget(self._advice(budget))
        return list(found.items())

    def _draw(self, family: Family, rng: np.random.Generator, budget: Budget) -> Iterator[tuple[HeadSpec, Cost]]:
        sizes = [len(c) for _, c in family]
        for index in rng.permutation(_size(family)):
            places = np.unravel_index(int(index), sizes)
            spec = _spec(family, tuple(c[int(i)] for (_, c), i in zip(family, places, strict=True)))
            price = self.cost(spec)
            if budget.admits(price):
                yield spec, price

    def _advice(self, budget: Budget) -> str:
        least = min((self.cost(s) for s in self), key=lambda c: (c.parameters, c.macs))
        return (
            f"no head fits {budget}; the smallest has {least.parameters} parameters, {least.bytes} bytes, "
            f"{least.macs} MACs and {least.latency_ms:.2f} ms: raise the limits to at least these"
        )


def _spec(family: Family, values: tuple[tuple[object, ...], ...]) -> HeadSpec:
    fields: dict[str, object] = {}
    for (names, _), chosen in zip(family, values, strict=True):
        fields.update(zip(names, chosen, strict=True))
    return HeadSpec(**fields)  # type: ignore[arg-type]


def _size(family: Family) -> int:
    return prod(len(choices) for _, choices in family)
