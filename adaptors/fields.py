"""The fields of a head specification, before any rule of an operator: what operators, plans and graphs read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Pool = Literal["average", "max", "gem", "pyramid"]
Normalisation = Literal["standard", "unit"]
Activation = Literal["relu", "hardswish"]
Reconfigurator = Literal["ridge", "linear", "prototypes"]

TapShapes = Mapping[str, tuple[int, ...]]
Part = tuple[str, Pool | None]
"""A tap of the vector input, and how it is pooled: None for a pooled tap."""


@dataclass(frozen=True, order=True)
class HeadFields:
    """`taps` are pooled taps, concatenated; `spatial` is at most one spatial tap, which `pool` makes a vector.

    `operator` is a row of `adaptors.operators`: its file says what `width`, `depth`, `bandwidth` and `residual` mean.
    `bits` 8 stores matrices as int8 with one scale a row.
    """

    taps: tuple[str, ...]
    operator: str = "linear"
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
