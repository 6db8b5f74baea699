"""A stem and `depth` blocks of 1x1 convolutions with `width` channels on the spatial tap, pooled and joined with the
pooled taps; `residual` adds the input of each block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from adaptors.fields import HeadFields, Pool
from adaptors.operators.base import Axis, Layers, Operator, T, axis


class Conv(Operator):
    reads_map = True

    def complaint(self, f: HeadFields) -> str | None:
        if f.spatial is None:
            return f"operator {f.operator!r} works on a spatial tap, and none is named"
        return super().complaint(f)

    def axes(self, taps: Sequence[tuple[str, ...]], maps: Sequence[str]) -> list[Axis]:
        inputs = [axis("spatial", *maps), axis("taps", (), *(t for t in taps if len(t) <= 3))]
        size = [axis("width", 16, 32, 64, 96, 128), axis("depth", 1, 2), axis("pool", *get_args(Pool))]
        return [*inputs, *size, axis("residual", False, True), axis("activation", "relu", "hardswish")]

    def build(self, layers: Layers[T], f: HeadFields) -> T:
        x = layers.act(layers.conv(layers.map(), "stem", f.width))
        for i in range(f.depth):
            y = layers.act(layers.conv(self.spread(layers, x, i), f"block{i}", f.width))
            x = layers.add(x, y) if f.residual else y
        return layers.join(layers.pool(x))

    def spread(self, layers: Layers[T], x: T, block: int) -> T:
        """What happens between the pixels before a block."""
        return x
