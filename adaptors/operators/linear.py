"""The normalised taps as they are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import get_args

from adaptors.fields import HeadFields, Pool
from adaptors.operators.base import Axis, Layers, Operator, T, axis
from adaptors.plan import Plan, Shape


class Linear(Operator):
    learned = False

    def complaint(self, f: HeadFields) -> str | None:
        return f"operator 'linear' has no width, got {f.width}" if f.width else None

    def axes(self, taps: Sequence[tuple[str, ...]], maps: Sequence[str]) -> list[Axis]:
        return [axis("taps", *taps), (("spatial", "pool"), [(None, "average"), *product(maps, get_args(Pool))])]

    def build(self, layers: Layers[T], f: HeadFields) -> T:
        return layers.vector()

    def plan(self, plan: Plan, f: HeadFields) -> Shape:
        plan.macs += plan.width  # the normalisation, which is all there is
        return plan.vector()
