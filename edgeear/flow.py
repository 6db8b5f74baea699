"""The whole flow of edgeear; read this file first.

    infer(system, frame)     encode -> hypervector -> route -> verdict -> predict -> observe -> maybe a Shift
    adapt(system, samples)   budget -> rank search space -> train the winner -> learn memory -> admit
    install(system, domain)  compatible? -> admit

A candidate becomes live through `commit`, permanent through `confirm`, undone through `rollback` (system.py). All of it
is pure: no clock, no disk, no network; the seed is an argument and progress is a callback.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from adaptors.progress import Progress
from adaptors.temperature import probabilities
from edgeear.admission import admit
from edgeear.errors import UsageError
from edgeear.learned import learned
from edgeear.mixture import answer, second_route
from edgeear.router import by_domain
from edgeear.samples import AdaptPolicy, Samples
from edgeear.scenes import scene_code
from edgeear.shift import Shift, ShiftState, observe
from edgeear.system import HYPERVECTOR, Candidate, Domain, Engine, Rejected, System
from edgeear.types import F32, U8


@dataclass(frozen=True, eq=False)
class Judgement:
    """Route and verdict of a batch; arrays `(samples,)`. `conditional_p` is what the shift test takes; the domain
    `second` answers, too, unless it is -1 (mixture.py)."""

    route: NDArray[np.int64]
    novelty: F32
    p: F32
    conditional_p: F32
    ood: NDArray[np.bool_]
    second: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Prediction:
    """Answer for one frame.

    `label`: the class, `route`: the domain whose head answered; None when no head serves (no domain yet, or abstained).
    `novelty`: how far the frame is from its nearest domain, larger is further; `p` in (0, 1]: its conformal p-value;
    `ood`: whether p is at or below the policy's alpha. `scores (classes,)` are the head's for `classes`, those of the
    route first, then of others where two heads answered; their `temperature` is None where they are probabilities
    already. `code (D,)`: the hypervector."""

    label: str | None
    scores: F32 = field(repr=False)
    route: str | None
    novelty: float
    p: float
    ood: bool
    code: F32 | None = field(default=None, repr=False)
    classes: tuple[str, ...] = field(default=(), repr=False)
    temperature: float | None = field(default=None, repr=False)

    @property
    def probabilities(self) -> dict[str, float]:
        """Class -> probability, the most probable first; empty when no head serves. They add up to 1.

        The temperature is fitted on samples that the head was not fitted to (adaptors/temperature.py); where two heads
        answered, these are their mean shares (mixture.py)."""
        shares = self.scores if self.temperature is None else probabilities(self.scores[None], self.temperature)[0]
        order = np.argsort(-shares, kind="stable")
        return {self.classes[k]: float(shares[k]) for k in order} if self.classes else {}

    def __str__(self) -> str:
        foreign = f"p {self.p:.2g}, " + ("out of distribution" if self.ood else "in distribution")
        if self.label is None:
            return f"no answer ({foreign})"
        return f"{self.label} {self.probabilities[self.label]:.0%} (domain {self.route}, {foreign})"


def judge(system: System, h: F32) -> Judgement:
    """Route hypervectors `(samples, D)` and say how well the best contenders explain them."""
    scores = system.router.scores(h)
    contenders = np.argsort(-scores, axis=1)[:, : system.policy.contenders]
    novelty, p, conditional = (np.empty(contenders.shape, np.float32) for _ in range(3))
    for k, asked in by_domain(contenders):
        domain = system.domains[k]
        novelty[asked] = own = domain.calibration.novelty(domain.detector, h[asked[0]])
        p[asked], conditional[asked] = domain.calibration.p_values(own)
    best_p, second = p.max(axis=1), second_route(contenders, scores, p, system)
    return Judgement(
        contenders[:, 0], novelty.min(axis=1), best_p, conditional.max(axis=1), best_p <= system.policy.alpha, second
    )


def infer(system: System, engine: Engine, state: ShiftState, frame: U8) -> tuple[Prediction, ShiftState, Shift | None]:
    """One step of the stream. Before the first domain is learned everything is out of distribution."""
    return infer_features(system, engine, state, engine.encode(frame, system.wanted_taps) if system.domains else {})


def infer_features(
    system: System, engine: Engine, state: ShiftState, features: dict[str, F32]
) -> tuple[Prediction, ShiftState, Shift | None]:
    """`infer` of a frame whose `system.wanted_taps` are encoded already, batch of one."""
    if not system.domains:
        return Prediction(None, np.zeros(0, np.float32), None, float("inf"), 0.0, True), state, None
    h = system.space.encode(features)
    verdict = judge(system, h)
    p_value = float(verdict.conditional_p[0])
    state, shift = observe(state, p_value, system.policy.shift, scene_code(h[0]), system.likeness)
    facts = (float(verdict.novelty[0]), float(verdict.p[0]), bool(verdict.ood[0]), h[0])
    if verdict.p[0] < system.policy.abstain_below:
        return Prediction(None, np.zeros(0, np.float32), None, *facts), state, shift
    domain = system.domains[int(verdict.route[0])]
    features[HYPERVECTOR] = h[:, : system.policy.memory_dimensions]
    second = int(verdict.second[0])
    classes, scores = answer(system, engine, features, int(verdict.route[0]), second)
    label, temperature = classes[int(scores[0].argmax())], domain.temperature if second < 0 else None
    return Prediction(label, scores[0], domain.name, *facts, classes, temperature), state, shift


def adapt(
    system: System, samples: Samples, policy: AdaptPolicy, seed: int, on_progress: Progress = lambda *_: None
) -> Candidate | Rejected:
    """Grow a head for a new domain. Needs torch (the `learn` extra). Raises EmptyBudget when no head fits, DataError or
    UsageError for unusable samples, all before anything is trained."""
    from edgeear.growth import check, grow_head

    check(samples)
    h = system.space.encode(samples.views[0])
    head, growth = grow_head(samples, policy, seed, on_progress)
    on_progress("memory", 0, 1)
    domain = learned(system, samples.name, h, samples.labels, samples.classes, head, growth, seed)
    on_progress("memory", 1, 1)
    return admit(system, domain)


def install(system: System, domain: Domain, encoder_digest: str, space_digest: str) -> Candidate | Rejected:
    """Admit a domain learned elsewhere, if it was learned on the same encoder and in the same hypervector space."""
    for what, theirs, ours in (
        ("encoder", encoder_digest, system.encoder_digest),
        ("hypervector space", space_digest, system.space.digest),
    ):
        if theirs != ours:
            return Rejected(domain.name, (f"made for {what} {theirs[:12]}, this board has {ours[:12]}",))
    if domain.head.spec.inputs and not domain.head.classes:
        raise UsageError(f"domain {domain.name!r} has a head without classes")
    return admit(system, domain)
