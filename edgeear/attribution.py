"""What a shift is about: which taps moved, and whether that looks like a worse sensor or like new content.

Rules of this file:

1. A tap's part of a hypervector is read by unbinding all roles at once: bundling is a linear map of the code, and its
   least-squares inverse (conjugate gradients, Hestenes & Stiefel, 1952) has less cross-talk than unbinding one role.
2. What is compared are means, of the new frames and of the known classes, so that no image has to be kept: the
   displacement of a tap is the distance to the nearest mean, over the spread of the class means of that tap.
3. A sensor moves shallow taps far more than classes differ there; new content moves deep taps, and shallow ones only as
   far as classes do. This is a hint for the operator; only labels can decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from adaptors.hadamard import fwht
from edgeear.errors import DataError
from edgeear.memory import DomainMemory
from edgeear.space import HypervectorSpace
from edgeear.types import F32

STEPS = 60
"""Steps of conjugate gradients: enough for codes that fill most of the dimensions."""
RIDGE = 1e-4
"""Relative to the mean squared weight of a slot: spaces with more code coordinates than dimensions stay solvable."""
TINY = 1e-9

Kind = Literal["sensor shift", "new content"]


@dataclass(frozen=True, eq=False)
class Attribution:
    """`displacement (taps,)` of the new frames' mean in each tap, 1 = as far as classes lie from their common mean
    (in the units of the code where only one class is known). `threshold` was picked on PACS photographs, corrupted or
    of unseen classes."""

    taps: tuple[str, ...]
    displacement: F32
    threshold: float = 1.2

    @property
    def ratio(self) -> float:
        """Mean displacement of the shallow half of the taps over that of the deep half."""
        half = len(self.taps) // 2
        shallow, deep = self.displacement[:half], self.displacement[half:]
        return float(shallow.mean() / max(float(deep.mean()), TINY)) if half else 0.0

    @property
    def kind(self) -> Kind:
        """`sensor shift` where the shallow taps moved by more than `threshold` times what the deep ones did."""
        return "sensor shift" if self.ratio > self.threshold else "new content"


def attribute(space: HypervectorSpace, memory: DomainMemory, h: F32) -> Attribution:
    """Which taps of the frames with hypervectors `h (samples, D)` left the domain of `memory`.

    Raises `DataError` without a frame, or for a memory without a sample.
    """
    if len(h) == 0 or memory.n == 0:
        raise DataError(f"{len(h)} frames against {memory.n} samples in memory: both need at least 1")
    present = memory.counts > 0
    means = memory.class_sums[present] / memory.counts[present, None]
    centre = means.mean(axis=0)
    stacked = np.vstack([h.mean(axis=0, dtype=np.float64), centre, means]) - centre
    code = unbundle(space, stacked.astype(np.float32))
    displacement = []
    for part in _parts(space, code):
        spread = float(np.sqrt(np.square(part[2:]).sum(axis=1).mean())) if len(means) > 1 else 1.0
        nearest = float(np.sqrt(np.square(part[:1] - part[1:]).sum(axis=1).min()))
        displacement.append(nearest / max(spread, TINY))
    return Attribution(tuple(t.name for t in space.taps), np.array(displacement, np.float32))


def unbundle(space: HypervectorSpace, h: F32, steps: int = STEPS) -> F32:
    """Codes `(samples, codes)` whose bundle is nearest to `h (samples, D)`: all taps' directions, then magnitudes."""
    ridge = RIDGE * float(np.square(space.weights).mean())
    residual = _unbind(space, h[:, space.policy.levels :])
    code, direction = np.zeros_like(residual), residual.copy()
    power = np.square(residual).sum(axis=1, keepdims=True)
    for _ in range(steps):
        image = _unbind(space, _bundle(space, direction)) + ridge * direction
        length = power / np.maximum((direction * image).sum(axis=1, keepdims=True), TINY * TINY)
        code += length * direction
        residual -= length * image
        before, power = power, np.square(residual).sum(axis=1, keepdims=True)
        direction = residual + power / np.maximum(before, TINY * TINY) * direction
    return code


def _bundle(space: HypervectorSpace, code: F32) -> F32:
    """The bundle of codes, without a level part."""
    slots = np.zeros((len(code), len(space.roles) * space.policy.dimensions), np.float32)
    slots[:, space.index] = code * space.sign
    turned = fwht(slots.reshape(len(code), len(space.roles), space.policy.dimensions))
    out: F32 = np.einsum("nsd,sd->nd", turned, space.roles * space.weights[:, None])
    return out


def _unbind(space: HypervectorSpace, h: F32) -> F32:
    """The transpose of `_bundle`."""
    bound = h[:, None, :] * (space.roles * space.weights[:, None])
    out: F32 = fwht(bound).reshape(len(h), -1)[:, space.index] * space.sign
    return out


def _parts(space: HypervectorSpace, code: F32) -> list[F32]:
    """Each tap's direction and magnitude `(samples, channels + 1)`."""
    parts, start, end = [], 0, sum(t.channels for t in space.taps)
    for number, tap in enumerate(space.taps):
        magnitude = code[:, end + number : end + number + 1]
        parts.append(np.concatenate([code[:, start : start + tap.channels], magnitude], axis=1))
        start += tap.channels
    return parts
