"""New classes of a known domain, without exemplars: the head is refitted from the domain's sums alone.

Ridge regression onto one-hot targets needs the Gram matrix, the class sums and the counts, which a memory holds. So a
head fitted after any number of merged steps is the head that all their samples at once would give. The strength is
chosen by generalised cross-validation (Golub, Heath, Wahba, 1979), which needs no more than those sums either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adaptors.archive import HeadArchive, pack
from adaptors.cost import cost
from adaptors.spec import HeadSpec
from edgeear.errors import DataError, UsageError
from edgeear.memory import F64, DomainMemory
from edgeear.system import HYPERVECTOR
from edgeear.types import F32

STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Ridge strengths tried, relative to the mean squared norm of the centred codes."""


@dataclass(frozen=True, eq=False)
class Readout:
    """A linear map of the first m coordinates of a hypervector: `(h - shift) @ weight.T + bias`.

    `weight (classes, m)`, `bias (classes,)`, `shift (m,)`; `strength` is the one that cross-validation chose."""

    weight: F32
    bias: F32
    shift: F32
    strength: float

    def scores(self, h: F32) -> F32:
        """Class scores `(samples, classes)` of hypervectors `(samples, D)`."""
        centred: F32 = h[:, : len(self.shift)] - self.shift
        out: F32 = centred @ self.weight.T + self.bias
        return out

    def weights(self) -> dict[str, F32]:
        """The arrays of a head with the specification `head_spec()`."""
        scale = np.ones_like(self.shift)
        return {"matrix.readout": self.weight, "bias.readout": self.bias, "shift": self.shift, "scale": scale}


def head_spec() -> HeadSpec:
    """The head that reads the first m coordinates of the hypervector linearly."""
    return HeadSpec((HYPERVECTOR,), operator="linear", normalisation="standard", reconfigurator="ridge")


def readout(memory: DomainMemory, strengths: Sequence[float] = STRENGTHS) -> Readout:
    """Ridge regression onto the one-hot classes of `memory`, for the strength of least cross-validation score.

    Raises `DataError` for a memory of fewer than 2 samples, `UsageError` for strengths that are not above 0.
    """
    if memory.n < 2:
        raise DataError(f"{memory.n} samples in memory: a readout needs at least 2")
    if not strengths or min(strengths) <= 0:
        raise UsageError(f"strengths are {list(strengths)}: give at least one, each above 0")
    n, mean, share = memory.n, memory.mean, memory.counts / memory.n
    values, vectors = np.linalg.eigh(memory.gram - n * np.outer(mean, mean))
    values = np.maximum(values, 0.0)
    right = vectors.T @ (memory.class_sums[:, : memory.m] - memory.counts[:, None] * mean).T
    unit = max(float(values.sum()) / n, 1e-12)
    target = float((memory.counts * (1 - share)).sum())
    losses = [_cross_validation(values, right, target, n, s * unit) for s in strengths]
    strength = strengths[int(np.argmin(losses))]
    weight = (vectors @ (right / (values + strength * unit)[:, None])).T
    return Readout(
        np.ascontiguousarray(weight, np.float32), share.astype(np.float32), mean.astype(np.float32), strength
    )


def left_out(memory: DomainMemory, fitted: Readout, h: F32, labels: NDArray[np.int64]) -> F32:
    """Scores `(samples, classes)` that the readout would give to `h (samples, D)`, which are in `memory`, had each been
    left out: residuals are r / (1 - h_ii), as in adaptors/train.py. `labels (samples,)` index the memory's classes."""
    n, mean = memory.n, memory.mean
    scatter = memory.gram - n * np.outer(mean, mean)
    unit = max(float(np.trace(scatter)) / n, 1e-12)
    centred = h[:, : memory.m].astype(np.float64) - mean
    solved = np.linalg.solve(scatter + fitted.strength * unit * np.eye(memory.m), centred.T).T
    hat = np.clip((centred * solved).sum(axis=1) + 1 / n, 0, 1 - 1e-6)
    targets = np.eye(len(memory.classes))[labels]
    out: F32 = (targets - (targets - fitted.scores(h)) / (1 - hat)[:, None]).astype(np.float32)
    return out


def refit(memory: DomainMemory, seed: int = 0) -> tuple[HeadArchive, dict[str, object]]:
    """The head of `memory` by `readout`, and the JSON-able record of how it was made. Needs onnx (the `learn` extra).

    Raises `DataError` for a memory of fewer than 2 samples."""
    fitted, shapes = readout(memory), {HYPERVECTOR: (memory.m,)}
    head = pack(head_spec(), shapes, memory.classes, fitted.weights(), seed)
    price = cost(head_spec(), shapes, len(memory.classes))
    return head, {
        "spec": head_spec().to_dict(),
        "explanation": f"linear head, fitted to the sums of {memory.n} samples of {len(memory.classes)} classes",
        "parameters": price.parameters,
        "bytes": len(head.onnx),
        "macs": price.macs,
        "latency_ms_predicted": price.latency_ms,
        "specs_scored": 1,
        "validation_accuracy": None,
        "chosen_by": f"ridge strength {fitted.strength:g} by generalised cross-validation",
    }


def _cross_validation(values: F64, right: F64, target: float, n: int, ridge: float) -> float:
    """Squared residuals over the squared degrees of freedom left; `target` is the centred targets' squared norm."""
    shrunk = values + ridge
    power = np.square(right).sum(axis=1)
    residual = target - float((power * (2 / shrunk - values / shrunk**2)).sum())
    free = n - 1 - float((values / shrunk).sum())
    return max(residual, 0.0) / max(free, 1e-9) ** 2
