"""Everything learned, as one immutable value, and the only ways to get from one generation to the next.

1. A `System` never changes; growing makes a new one that shares the old domains object for object, so old heads are
   bit-identical by construction.
2. Only `admit` (admission.py) makes a `Candidate`, and forgetting.py, which adds nothing; only `commit` makes it live,
   on probation; `confirm` makes it permanent; `rollback` undoes it. Nothing else changes what serves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from adaptors.archive import HeadArchive
from edgeear.errors import UsageError
from edgeear.memory import DomainMemory
from edgeear.novelty import Calibration, Detector, detector
from edgeear.router import Router, router
from edgeear.shift import ShiftPolicy
from edgeear.space import HypervectorSpace
from edgeear.types import F32, Features

HYPERVECTOR = "hypervector"
"""Pseudo-tap: the first m coordinates of the hypervector, which heads may read like any pooled tap."""
DIGEST = 16
"""Characters that tell one learned image from another, kept so that none is counted twice."""
TEMPERATURE = {True: 0.12, False: 1.0}
"""Temperature of a head that has none in its record, by whether ridge regression solved it: scores near 0 or 1, or
logits."""


@dataclass(frozen=True)
class SystemPolicy:
    """Rates and bounds that hold for a whole system.

    `alpha`: false-OOD rate of a verdict. `memory_dimensions`: m of the second-order memory. `contenders`: how many of
    the router's best domains are asked for a verdict. `codes`: calibration codes kept of a domain for replay.
    `max_stolen_share`: largest share of an old domain's codes that a new domain may take. `min_own_share`: least share
    of its own codes that a new domain must win. `recognise`: how many standard deviations the novelties of samples may
    lie too high, taken together, for them to be a known domain's. `mixture`: margin of the router (log odds) under
    which two domains that both explain an input both answer (0: never). `abstain_below`: conformal p under which no
    head serves (0: always serve)."""

    alpha: float = 0.05
    memory_dimensions: int = 256
    contenders: int = 2
    codes: int = 96
    max_stolen_share: float = 0.10
    min_own_share: float = 0.5
    recognise: float = 3.0
    mixture: float = 3.0
    abstain_below: float = 0.0
    shift: ShiftPolicy = field(default_factory=ShiftPolicy)

    def __post_init__(self) -> None:
        for name in ("alpha", "max_stolen_share", "min_own_share", "abstain_below"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}: it must lie in [0, 1]")
        for name in ("recognise", "mixture"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name} is {getattr(self, name)}: it must be at least 0")
        for name in ("memory_dimensions", "contenders", "codes"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}: it must be at least 1")


@dataclass(frozen=True, eq=False)
class Domain:
    """One learned domain: its head, its memory, its calibration and the codes `(codes, m)` float16 kept for replay.

    `growth` is the JSON-able record of how it was grown: figures for reports, and the `temperature`. `likeness`: how
    alike two different frames of it are at most, a cosine (scenes.py)."""

    name: str
    head: HeadArchive
    memory: DomainMemory
    calibration: Calibration
    codes: NDArray[np.float16]
    growth: Mapping[str, object] = field(default_factory=dict)
    likeness: float = 0.0

    @cached_property
    def detector(self) -> Detector:
        return detector(self.memory)

    @property
    def temperature(self) -> float:
        """What makes the head's scores probabilities (adaptors/temperature.py): fitted where samples were held out."""
        fitted = self.growth.get("temperature")
        return fitted if isinstance(fitted, float) and fitted > 0 else TEMPERATURE[self.head.spec.solved]

    @property
    def seen(self) -> dict[str, str]:
        """Class -> the digests of its images, joined, `DIGEST` characters each; only where they were recorded."""
        found = self.growth.get("seen")
        return {str(label): str(digests) for label, digests in found.items()} if isinstance(found, Mapping) else {}

    @property
    def bytes(self) -> int:
        """Bytes kept of this domain, head included."""
        memory = self.memory.class_sums.nbytes // 2 + self.memory.gram.nbytes // 4
        seen = sum(map(len, self.seen.values()))
        return memory + seen + self.codes.nbytes + self.calibration.values.nbytes + len(self.head.onnx)


@dataclass(frozen=True, eq=False)
class System:
    """One generation: the encoder it belongs to, the hypervector space, and the domains in the order learned."""

    encoder_digest: str
    space: HypervectorSpace
    policy: SystemPolicy = field(default_factory=SystemPolicy)
    domains: tuple[Domain, ...] = ()
    generation: int = 0

    @cached_property
    def router(self) -> Router:
        return router([d.memory for d in self.domains])

    @cached_property
    def wanted_taps(self) -> tuple[str, ...]:
        """Encoder taps that one frame needs: the space's, then those that only heads read."""
        pooled = tuple(t.name for t in self.space.taps)
        return (*pooled, *sorted({t for d in self.domains for t in self.taps_for(d)}.difference(pooled)))

    @cached_property
    def likeness(self) -> float:
        """The largest of the domains' likenesses, 0 without any: from there two frames may show one scene."""
        return max((d.likeness for d in self.domains), default=0.0)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(d.name for d in self.domains)

    def domain(self, name: str) -> Domain:
        """The domain called `name`; raises UsageError naming those there are."""
        for d in self.domains:
            if d.name == name:
                return d
        raise UsageError(f"no domain {name!r}; learned so far: {', '.join(self.names) or 'none'}")

    def grown(self, domain: Domain) -> System:
        """The next generation, with `domain` added, or put in the place of the one with its name."""
        if domain.name in self.names:
            kept = tuple(domain if d.name == domain.name else d for d in self.domains)
        else:
            kept = (*self.domains, domain)
        return replace(self, domains=kept, generation=self.generation + 1)

    def without(self, name: str) -> System:
        """The next generation, without the domain called `name`; raises UsageError where there is none."""
        gone = self.domain(name)
        return replace(self, domains=tuple(d for d in self.domains if d is not gone), generation=self.generation + 1)

    def taps_for(self, domain: Domain) -> tuple[str, ...]:
        """Encoder taps that the head of `domain` reads."""
        return tuple(t for t in domain.head.spec.inputs if t != HYPERVECTOR)


class Engine(Protocol):
    """What the flow needs of the machine: the frozen encoder and the heads, as pure functions."""

    def encode(self, frame: NDArray[np.uint8], taps: tuple[str, ...]) -> dict[str, F32]:
        """Features of one frame `(height, width, 3)`, batch of one."""

    def scores(self, head: HeadArchive, features: Features) -> F32:
        """Class scores `(samples, classes)` of a head."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A system that passed admission over `base`; `replay` maps each old domain to the share of its codes that changed
    route."""

    base: System
    system: System
    replay: Mapping[str, float]

    def recorded(self, name: str, **record: object) -> Candidate:
        """The same candidate, with `record` added to how its domain `name` was grown."""
        domains = [replace(d, growth={**d.growth, **record}) if d.name == name else d for d in self.system.domains]
        return replace(self, system=replace(self.system, domains=tuple(domains)))

    def renamed(self, old: str, new: str) -> Candidate:
        """The same candidate, whose domain `old` is called `new`."""
        domains = tuple(replace(d, name=new) if d.name == old else d for d in self.system.domains)
        replay = {new if name == old else name: share for name, share in self.replay.items()}
        return Candidate(self.base, replace(self.system, domains=domains), replay)


@dataclass(frozen=True)
class Rejected:
    """Why a domain was not admitted; the live system is untouched. `twin`: the known domain that it may be, which could
    be updated with its samples instead; None where nothing says so."""

    domain: str
    reasons: tuple[str, ...]
    twin: str | None = None

    def __str__(self) -> str:
        return f"{self.domain!r} was rejected, nothing was changed: " + "; ".join(self.reasons)


@dataclass(frozen=True)
class Recognised:
    """Samples that a known domain explains: there is nothing to grow. `excess` is how far their novelties lie above its
    own as a whole, in standard deviations, `routed` the share of them that the router gives to it."""

    domain: str
    excess: float
    routed: float


@dataclass(frozen=True, eq=False)
class Live:
    """The serving generation and the confirmed one to fall back to; they differ exactly during probation."""

    serving: System
    confirmed: System

    @property
    def probation(self) -> bool:
        return self.serving is not self.confirmed


def commit(live: Live, candidate: Candidate) -> Live:
    """Make an admitted candidate serve, on probation. Refused while another one is on probation, or if it was admitted
    against a generation that no longer serves."""
    if live.probation:
        raise UsageError(f"generation {live.serving.generation} is on probation: confirm it or roll back first")
    if candidate.base is not live.serving:  # numbers repeat after a rollback, so they prove nothing
        raise UsageError(
            f"candidate was admitted over {_named(candidate.base)}, but {_named(live.serving)} serves: admit again"
        )
    return Live(candidate.system, live.confirmed)


def _named(system: System) -> str:
    return f"generation {system.generation} ({', '.join(system.names) or 'no domain'})"


def confirm(live: Live) -> Live:
    """End probation: the serving generation becomes the one to fall back to."""
    return Live(live.serving, live.serving)


def rollback(live: Live) -> Live:
    """Serve the confirmed generation again."""
    return Live(live.confirmed, live.confirmed)
