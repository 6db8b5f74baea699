"""What a head costs: its size, its work and its predicted time, all from the specification alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from adaptors.fields import TapShapes
from adaptors.latency import DEFAULT, LatencyModel
from adaptors.spec import HeadSpec, check_taps


@dataclass(frozen=True)
class Cost:
    """Size and work of one head: parameters (learned and fitted), stored bytes, multiply-accumulates, predicted ms."""

    parameters: int
    bytes: int
    macs: int
    latency_ms: float


def cost(spec: HeadSpec, shapes: TapShapes, classes: int, latency: LatencyModel = DEFAULT) -> Cost:
    """Cost of `spec` over taps of the given shapes for a number of classes; raises InvalidSpec on unknown taps.

    Parameters are exact; bytes leave out the description of the graph, a few KiB; MACs leave out elementwise work.
    `latency` is the model of the board."""
    check_taps(spec, shapes)
    plan = spec.plan(shapes, classes)
    matrices = [shape for name, shape in plan.arrays.items() if name.startswith("matrix.")]
    learned, total = sum(map(prod, matrices)), sum(map(prod, plan.arrays.values())) + 2 * plan.width
    size = 4 * total if spec.bits == 32 else 4 * total - 3 * learned + 4 * sum(shape[0] for shape in matrices)
    return Cost(total, size + plan.seeded, plan.macs, latency.ms(plan.work))
