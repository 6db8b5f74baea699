"""Depthwise-separable 3x3 convolutions: `conv` with a depthwise convolution before each block."""

from __future__ import annotations

from adaptors.operators.base import Layers, T
from adaptors.operators.conv import Conv


class Depthwise(Conv):
    def spread(self, layers: Layers[T], x: T, block: int) -> T:
        return layers.spread(x, f"spread{block}")
