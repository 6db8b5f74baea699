"""A bottleneck of `depth` dense layers of `width` units on the vector input; `residual` adds the input of each later
layer."""

from __future__ import annotations

from collections.abc import Sequence

from adaptors.fields import HeadFields
from adaptors.operators.base import Axis, Layers, Operator, T, axis


class Mlp(Operator):
    def axes(self, taps: Sequence[tuple[str, ...]], maps: Sequence[str]) -> list[Axis]:
        layers: Axis = (("depth", "residual"), [(1, False), (2, False), (2, True)])
        return [axis("taps", *taps), axis("width", 8, 16, 32, 64), layers, axis("activation", "relu", "hardswish")]

    def build(self, layers: Layers[T], f: HeadFields) -> T:
        x = layers.scaled()
        for i in range(f.depth):
            y = layers.act(layers.dense(x, f"layer{i}", f.width))
            x = layers.add(x, y) if f.residual and i else y
        return x
