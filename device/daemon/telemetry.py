"""The frames of a time window as figures for one telemetry message.

Rules of this file:

1. Memory is bounded: beyond `KEPT` values of a quantity each further one replaces a random one (reservoir sampling,
   Vitter, "Random Sampling with a Reservoir", 1985, algorithm R).
2. Counts are exact; routes are those of the `MAX_DOMAINS` most frequent domains. Quantiles are values that occurred.
   They leave out values that are not finite, such as the novelty before anything was learned.
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
    """A uniform sample of all values that were added, of at most `KEPT`."""

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
        """p50, p90 and p99; None where no finite value was added."""
        if not self.values:
            return None
        p50, p90, p99 = np.quantile(self.values, (0.5, 0.9, 0.99), method="inverted_cdf")
        return {"p50": float(p50), "p90": float(p90), "p99": float(p99)}


@dataclass
class Window:
    """The frames since `started`, in seconds."""

    started: float
    random: random.Random
    frames: int = 0
    ood: int = 0
    abstained: int = 0
    routes: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.novelty, self.latency = Reservoir(self.random), Reservoir(self.random)

    def add(self, prediction: Prediction, seconds: float) -> None:
        """Add a frame that was answered in `seconds`."""
        self.frames += 1
        self.ood += prediction.ood
        self.novelty.add(prediction.novelty)
        self.latency.add(1e3 * seconds)
        if prediction.route is None:
            self.abstained += 1
        else:
            self.routes[prediction.route] += 1

    def facts(self) -> dict[str, object]:
        """The fields of telemetry that describe the frames."""
        return {
            "frames": self.frames,
            "ood": self.ood,
            "abstained": self.abstained,
            "routes": dict(self.routes.most_common(MAX_DOMAINS)),
            "novelty": self.novelty.quantiles(),
            "latency_ms": self.latency.quantiles(),
        }
