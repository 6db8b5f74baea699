"""Growing never touches what is there, and only commit, confirm and rollback change what serves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adaptors.archive import HeadArchive
from adaptors.spec import HeadSpec
from edgeear.admission import admit
from edgeear.errors import UsageError
from edgeear.flow import infer
from edgeear.memory import DomainMemory
from edgeear.shift import ShiftState
from edgeear.system import Candidate, Domain, Live, Rejected, System, SystemPolicy, commit, confirm, rollback
from edgeear.types import Features
from tests.support import fakes

SPECS = (
    HeadSpec(("b.mean", "b.std")),
    HeadSpec(("a.mean", "b.mean"), "fourier", 1024, bandwidth=0.3),
    HeadSpec(("b.mean",), "linear", reconfigurator="prototypes", bits=8),
    HeadSpec(("b.mean", "b.std"), "mlp", 8, reconfigurator="linear"),
    HeadSpec((), "depthwise", 16, spatial="b.map", reconfigurator="linear", bits=8),
)


def broken() -> Domain:
    """A domain whose memory is spoilt."""
    good = fakes.domain(5)
    memory = DomainMemory(good.memory.classes, good.memory.counts, good.memory.class_sums * np.nan, good.memory.gram)
    return replace(good, memory=memory)


OFFERS: tuple[Callable[[], Domain], ...] = (
    *(lambda b=b, s=s: fakes.domain(b, spec=s) for b, s in enumerate(SPECS)),
    lambda: fakes.domain(0, n=45, spec=SPECS[1]),  # relearned: the name and the inputs of the first
    lambda: fakes.domain(1, "twin"),  # the inputs of the second under another name
    broken,
)


def fingerprint(system: System) -> str:
    """Hash of all that a system is."""
    sha = hashlib.sha256(repr((system.encoder_digest, system.generation, system.policy, system.names)).encode())
    for d in system.domains:
        arrays = (d.memory.counts, d.memory.class_sums, d.memory.gram, d.codes, d.calibration.values)
        for part in (repr((id(d), d.head.spec, d.head.classes)).encode(), d.head.onnx, *(a.tobytes() for a in arrays)):
            sha.update(part)
    return sha.hexdigest()


class Growth(RuleBasedStateMachine):
    """Any sequence of admissions, commits, confirmations and rollbacks, checked against a model of two slots."""

    fixed: Features = fakes.features(0, 7, seed=99)

    def __init__(self) -> None:
        super().__init__()
        self.live = Live(start := fakes.empty(), start)
        self.candidates: list[Candidate] = []
        self.seen: dict[int, tuple[System, str]] = {}
        self.heads: dict[str, tuple[HeadArchive, bytes]] = {}
        self.engine = fakes.engine()
        self.rejections = 0

    @rule(offer=st.sampled_from(OFFERS))
    def grow(self, offer: Callable[[], Domain]) -> None:
        base, before = self.live, self.live.serving
        domain = offer()
        outcome = admit(before, domain)
        assert self.live is base, "admission alone changes nothing"
        if isinstance(outcome, Rejected):
            assert outcome.domain == domain.name and outcome.reasons
            return
        assert outcome.base is before and outcome.system.generation == before.generation + 1
        assert outcome.system.domain(domain.name) is domain
        kept = [d for d in before.domains if d.name != domain.name]
        assert [d for d in outcome.system.domains if d.name != domain.name] == kept
        self.candidates.append(outcome)

    @precondition(lambda self: self.candidates)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        candidate = data.draw(st.sampled_from(self.candidates))
        before = self.live
        if before.probation:
            with pytest.raises(UsageError, match="on probation"):
                commit(before, candidate)
        elif candidate.base is not before.serving:
            with pytest.raises(UsageError, match="admit again"):
                commit(before, candidate)
        else:
            self.live = commit(before, candidate)
            assert self.live.serving is candidate.system and self.live.confirmed is before.serving
            assert self.live.serving.generation > before.serving.generation
            assert self.live.probation
            undone = rollback(self.live)
            assert undone.serving is before.serving and undone.confirmed is before.confirmed

    @rule()
    def confirm(self) -> None:
        serving = self.live.serving
        self.live = confirm(self.live)
        assert self.live.serving is serving and self.live.confirmed is serving

    @rule()
    def rollback(self) -> None:
        confirmed = self.live.confirmed
        self.live = rollback(self.live)
        assert self.live.serving is confirmed and self.live.confirmed is confirmed

    @invariant()
    def probation_is_the_difference(self) -> None:
        assert self.live.probation == (self.live.serving is not self.live.confirmed)

    @invariant()
    def no_system_ever_changes(self) -> None:
        for system in (self.live.serving, self.live.confirmed, *(c.system for c in self.candidates)):
            self.seen.setdefault(id(system), (system, fingerprint(system)))
        for system, before in self.seen.values():
            assert fingerprint(system) == before

    @invariant()
    def heads_answer_bit_for_bit_as_when_they_came(self) -> None:
        for domain in self.live.serving.domains:
            head = domain.head
            self.heads.setdefault(digest(head), (head, self.engine.scores(head, self.fixed).tobytes()))
        for before, (head, scores) in self.heads.items():
            assert digest(head) == before
            assert self.engine.scores(head, self.fixed).tobytes() == scores

    def teardown(self) -> None:
        fresh = fakes.engine()
        for head, scores in self.heads.values():
            assert fresh.scores(head, self.fixed).tobytes() == scores


def digest(head: HeadArchive) -> str:
    return hashlib.sha256(head.onnx).hexdigest()


TestGrowth = Growth.TestCase
TestGrowth.settings = settings(
    max_examples=30, stateful_step_count=25, suppress_health_check=[HealthCheck.too_slow], deadline=None
)


def test_the_offers_are_what_they_are_said_to_be() -> None:
    """Else the sequences above would be all admissions, or none."""
    system = fakes.empty()
    for offer in OFFERS[:6]:
        outcome = admit(system, offer())
        assert isinstance(outcome, Candidate), outcome
        system = outcome.system
    assert system.names == ("d0", "d1", "d2", "d3", "d4") and system.generation == 6
    assert all(isinstance(admit(system, offer()), Rejected) for offer in OFFERS[6:])


def test_answers_to_old_inputs_survive_growth_bit_for_bit() -> None:
    """Through the whole flow, not only through the heads."""
    engine, shown = fakes.engine(), fakes.frames(0, fakes.CLASSES, fakes.labels_of(12), seed=50)
    system = fakes.empty().grown(fakes.domain(0, spec=SPECS[0]))
    before = [infer(system, engine, ShiftState(), frame)[0] for frame in shown]
    for background in (1, 2, 3, 4):
        system = system.grown(fakes.domain(background, spec=SPECS[background]))
        after = [infer(system, engine, ShiftState(), frame)[0] for frame in shown]
        assert [p.route for p in after] == ["d0"] * 12
        assert [(p.label, p.scores.tobytes()) for p in after] == [(p.label, p.scores.tobytes()) for p in before]


def test_a_candidate_over_an_undone_generation_is_refused() -> None:
    """Its number fits again, but it holds the undone domain and lacks the one that came instead."""
    live = Live(start := fakes.empty(), start)
    undone = admitted(live, fakes.domain(0))
    live = commit(live, undone)
    stale = admitted(live, fakes.domain(1))
    live = rollback(live)
    live = confirm(commit(live, admitted(live, fakes.domain(2))))
    assert stale.system.generation == live.serving.generation + 1
    with pytest.raises(UsageError, match=r"admitted over generation 1 \(d0\), but generation 1 \(d2\) serves"):
        commit(live, stale)


def admitted(live: Live, domain: Domain) -> Candidate:
    outcome = admit(live.serving, domain)
    assert isinstance(outcome, Candidate)
    return outcome


def test_the_same_candidate_can_be_committed_again_after_a_rollback() -> None:
    live = Live(start := fakes.empty(), start)
    candidate = admitted(live, fakes.domain(0))
    again = commit(rollback(commit(live, candidate)), candidate)
    assert again.serving is candidate.system and again.confirmed is start


def test_values_cannot_be_assigned_to() -> None:
    system = fakes.grown(0)
    for value, name in ((system, "domains"), (system.domains[0], "head"), (Live(system, system), "serving")):
        with pytest.raises(FrozenInstanceError):
            setattr(value, name, None)
    with pytest.raises(ValueError, match="read-only"):
        system.domains[0].memory.gram[0, 0] = 1


def test_an_unknown_domain_is_named_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="no domain 'x'; learned so far: d0, d1"):
        fakes.grown(0, 1).domain("x")
    with pytest.raises(UsageError, match="none"):
        fakes.empty().domain("x")


def test_bytes_of_a_domain_count_all_that_is_kept() -> None:
    domain = fakes.domain(0)
    sums, gram = 3 * (256 + fakes.M) * 4, fakes.M * fakes.M * 2
    assert domain.bytes == sums + gram + 40 * fakes.M * 2 + 60 * 4 + len(domain.head.onnx)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            ("alpha", -0.1),
            ("alpha", float("nan")),
            ("max_stolen_share", 1.1),
            ("min_own_share", 2),
            ("abstain_below", -1),
        ),
        *(("contenders", 0), ("codes", 0), ("memory_dimensions", 0)),
    ],
)
def test_policies_that_make_no_sense_are_refused(field: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{field} is {value}"):
        SystemPolicy(**{field: value})  # type: ignore[arg-type]
