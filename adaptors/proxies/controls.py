"""Controls: the baselines that a useful proxy must beat."""

from __future__ import annotations

import hashlib

from adaptors.proxies.probe import Probe


def parameters(probe: Probe) -> float | None:
    """The number of learned parameters."""
    return float(probe.cost.parameters)


def macs(probe: Probe) -> float | None:
    """Multiply-accumulates."""
    return float(probe.cost.macs)


def random(probe: Probe) -> float | None:
    """A number in [0, 1) drawn from the specification and the seed."""
    word = hashlib.sha256(f"{probe.sample.seed}/{probe.spec}".encode()).digest()
    return int.from_bytes(word[:8], "big") / 2.0**64
