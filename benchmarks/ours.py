"""edgeear's own methods as the benchmarks call them: the one place that knows the public functions of the core."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import cast

import numpy as np

from adaptors.archive import HeadArchive
from device.evaluation.data import I64
from edgeear.incremental import Readout as Readout
from edgeear.incremental import readout as readout
from edgeear.memory import DomainMemory, learn, merge, rounded
from edgeear.novelty import calibrate
from edgeear.router import router
from edgeear.system import Domain, SystemPolicy
from edgeear.types import F32

M = SystemPolicy().memory_dimensions
NO_HEAD = cast(HeadArchive, SimpleNamespace(onnx=b""))
"""A domain's bytes without its head are those of memory, calibration and codes."""


@dataclass(frozen=True, eq=False)
class Learned:
    """Detector, memory and calibration of one domain; `novelty` of hypervectors `(samples, D)`."""

    memory: DomainMemory
    novelty: Callable[[F32], F32]
    bytes: int


def learn_domain(h: F32, labels: I64, seed: int, m: int = M) -> Learned:
    """What the flow keeps of a domain, from hypervectors `(samples, D)` and labels of any numbering."""
    m = min(m, h.shape[1])
    names, compact = np.unique(labels, return_inverse=True)
    classes, compact = tuple(str(n) for n in names), compact.astype(np.int64)
    memory = rounded(learn(h, compact, classes, m))
    calibration = calibrate(h, compact, classes, m, seed=seed)
    codes = h[: SystemPolicy().codes, :m].astype(np.float16)
    domain = Domain("measured", NO_HEAD, memory, calibration, codes)
    detect = domain.detector
    return Learned(memory, lambda x: calibration.novelty(detect, x), domain.bytes)


def route_by(memories: Sequence[DomainMemory]) -> Callable[[F32], I64]:
    """Routes `(samples,)` of hypervectors."""
    return router(memories).route


class Incremental:
    exemplars = False

    """The head of all classes seen so far, refitted from the merged memory alone."""

    def __init__(self, m: int) -> None:
        self.m = m
        self.memory: DomainMemory | None = None
        self._readout: Readout | None = None

    def learn(self, h: F32, labels: I64) -> None:
        names, compact = np.unique(labels, return_inverse=True)
        new = learn(h, compact.astype(np.int64), tuple(str(n) for n in names), min(self.m, h.shape[1]))
        self.memory = new if self.memory is None else merge(self.memory, new)
        self._readout = None

    def predict(self, h: F32) -> I64:
        memory = self.known()
        self._readout = self._readout or readout(memory)
        found: I64 = np.array([int(c) for c in memory.classes])[self._readout.scores(h).argmax(axis=1)]
        return found

    def known(self) -> DomainMemory:
        assert self.memory is not None
        return self.memory

    @property
    def bytes(self) -> int:
        """The memory as the store keeps it: float32, half of the symmetric Gram matrix."""
        return self.known().class_sums.nbytes // 2 + self.known().gram.nbytes // 4
