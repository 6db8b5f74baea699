"""How long a head takes: its work, counted by kind (`adaptors.plan`), times the price of each kind on a board.

A model has one price a kind, none negative: more work is never predicted to take less time. Without a profile of the
board the built-in prices hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from adaptors.plan import UNITS, Work


class InvalidModel(ValueError):
    """Invalid prices: a kind is missing, unknown, negative or not finite; the message names it."""


@dataclass(frozen=True)
class LatencyModel:
    """Microseconds that one unit of every kind of work takes; raises InvalidModel for invalid prices."""

    prices: Mapping[str, float]

    def __post_init__(self) -> None:
        if odd := sorted(set(self.prices) ^ set(UNITS)):
            raise InvalidModel(f"prices must be given for exactly {', '.join(UNITS)}; missing or unknown: {odd}")
        for kind, price in self.prices.items():
            if isinstance(price, bool) or not isinstance(price, int | float) or not (isfinite(price) and price >= 0):
                raise InvalidModel(f"the price of {kind!r} is {price!r}: it must be a finite number from 0")

    def ms(self, work: Work) -> float:
        """Milliseconds of one call on one input and one thread."""
        return sum(amount * self.prices[kind] for kind, amount in work.items()) / 1e3


def fit(works: Sequence[Work], ms: NDArray[np.float64], default: LatencyModel) -> LatencyModel:
    """The prices of least squared relative error for measured times `ms (heads,)`, none of them negative.

    A kind of work that no head has keeps its price of `default`. Needs scipy (the `learn` extra)."""
    from scipy.optimize import nnls

    kinds = [kind for kind in UNITS if any(w[kind] for w in works)]
    amounts = np.array([[w[kind] for kind in kinds] for w in works], np.float64)
    largest = amounts.max(axis=0)
    prices = nnls(amounts / largest / ms[:, None], np.ones(len(ms)))[0] * 1e3 / largest
    return LatencyModel({**default.prices, **dict(zip(kinds, prices.tolist(), strict=True))})


DEFAULT = LatencyModel(
    {
        "call": 12,
        "tap": 3,
        "node": 1.8,
        "view": 4.2,
        "element": 0.0011,
        "gemm": 0.00025,
        "conv": 7e-05,
        "depthwise": 0.00014,
        "hadamard": 7e-05,
        "hardswish": 0.0006,
        "cosine": 0.008,
        "power": 0.0013,
        "average": 0.00075,
        "max": 0.00075,
        "pyramid": 0.00065,
        "reorder": 0.00045,
    }
)
"""The prices without a profile: four times what one core of a server (x86-64, AVX-512, 2.6 GHz) takes. Products then
run at the rate of a small board's core, 10^10 multiply-accumulates a second."""
