"""What a window of time looked like, as a few figures: the content of one telemetry message.

Rules of this file:

1. A window costs the same however many frames it sees: beyond `KEPT` values of a quantity each further one replaces a
   random one (reservoir sampling, Vitter, "Random Sampling with a Reservoir", 1985, algorithm R).
2. Counts are exact, of the `MAX_DOMAINS` most frequent routes. Quantiles are values that occurred; they leave out what
   is not finite, such as the novelty before anything was learned.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from device.mqtt.fields import MAX_DOMAINS
from edgeear.flow import Prediction

KEPT = 4096


@dataclass
class Reservoir:
    """A sample, uniform over all that was added, of at most `KEPT` values."""

    random: random.Random
    values: list[float] = field(default_factory=list)
    seen: int = 0

    def add(self, value: float) -> None:
        if not math.isfinite(value):
            return
        self.seen += 1
        if len(self.values) < KEPT:
            self.values.append(value)
        elif (place := self.random.randrange(self.seen)) < KEPT:
            self.values[place] = value

    def quantiles(self) -> dict[str, float] | None:
        """p50, p90 and p99, None where nothing was added."""
        if not self.values:
            return None
        p50, p90, p99 = np.quantile(self.values, (0.5, 0.9, 0.99), method="inverted_cdf")
        return {"p50": float(p50), "p90": float(p90), "p99": float(p99)}


@dataclass
class Window:
    """Everything since `started` (seconds)."""

    started: float
    random: random.Random
    frames: int = 0
    ood: int = 0
    abstained: int = 0
    routes: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.novelty, self.latency = Reservoir(self.random), Reservoir(self.random)

    def add(self, prediction: Prediction, seconds: float) -> None:
        """One frame was answered, in `seconds`."""
        self.frames += 1
        self.ood += prediction.ood
        self.novelty.add(prediction.novelty)
        self.latency.add(1e3 * seconds)
        if prediction.route is None:
            self.abstained += 1
        else:
            self.routes[prediction.route] += 1

    def facts(self) -> dict[str, object]:
        """The fields of a telemetry message that a window knows."""
        return {
            "frames": self.frames,
            "ood": self.ood,
            "abstained": self.abstained,
            "routes": dict(self.routes.most_common(MAX_DOMAINS)),
            "novelty": self.novelty.quantiles(),
            "latency_ms": self.latency.quantiles(),
        }
