"""The one door: thefts, duplicates and broken domains stay outside, with figures that can be recomputed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgeear.admission import admit, replay
from edgeear.memory import DomainMemory, learn, merge
from edgeear.router import router
from edgeear.system import Candidate, Domain, Rejected, System
from edgeear.types import F32
from tests.support import fakes


def admitted(outcome: Candidate | Rejected) -> Candidate:
    assert isinstance(outcome, Candidate), outcome
    return outcome


def rejected(outcome: Candidate | Rejected) -> Rejected:
    assert isinstance(outcome, Rejected)
    return outcome


def remembered(name: str, h: F32) -> Domain:
    """A domain that learned these hypervectors."""
    memory = learn(h, fakes.labels_of(len(h)), fakes.CLASSES, fakes.M)
    return replace(fakes.domain(0), name=name, memory=memory, codes=h[:40, : fakes.M].astype(np.float16))


def thief() -> Domain:
    """A domain of two kinds of input: a few new ones among fresh ones of domain 0."""
    new, old = (fakes.space().encode(fakes.features(b, seed=5)) for b in (3, 0))
    return remembered("thief", np.concatenate([new[:10], old[:50]]))


def share_taken(system: System, domain: Domain) -> float:
    """Directly: the share of codes of the first domain that it wins now and loses once `domain` is there."""
    codes = system.domains[0].codes.astype(np.float32)
    before = router([d.memory for d in system.domains])
    after = router([*(d.memory for d in system.domains), domain.memory])
    pairs = zip(before.scores(codes), after.scores(codes), strict=True)
    return float(np.mean([b.argmax() == 0 and a.argmax() != 0 for b, a in pairs]))


def test_the_first_domain_has_nothing_to_replay() -> None:
    candidate = admitted(admit(fakes.empty(), fakes.domain(0)))
    assert candidate.replay == {}
    assert candidate.system.names == ("d0",) and candidate.system.generation == 1


def test_distinct_domains_are_admitted_and_take_nothing() -> None:
    base = fakes.grown(0, 1)
    candidate = admitted(admit(base, fakes.domain(2)))
    assert candidate.base is base
    assert candidate.system.names == ("d0", "d1", "d2")
    assert candidate.replay == {"d0": 0.0, "d1": 0.0}


def test_a_thief_is_rejected_with_both_names_and_the_figures() -> None:
    system = fakes.grown(0)
    share = share_taken(system, thief())
    assert 0.1 < share < 1
    outcome = rejected(admit(system, thief()))
    assert outcome.domain == "thief"
    assert f"takes {share:.1%} of the inputs of 'd0', at most 10.0% allowed" in outcome.reasons[0]


def test_the_limit_of_theft_is_inclusive() -> None:
    share = share_taken(fakes.grown(0), thief())
    candidate = admitted(admit(fakes.grown(0, max_stolen_share=share), thief()))
    assert candidate.replay == {"d0": share}
    rejected(admit(fakes.grown(0, max_stolen_share=share - 1e-6), thief()))


def test_replay_equals_a_direct_computation() -> None:
    old = fakes.grown(0, 1)
    assert replay(old, old.grown(thief()))["d0"] == pytest.approx(share_taken(old, thief()))
    assert replay(old, old) == {"d0": 0.0, "d1": 0.0}


def test_codes_that_never_were_the_domains_own_are_not_counted_as_lost() -> None:
    foreign = replace(fakes.domain(0), codes=fakes.domain(1).codes)
    old = fakes.empty().grown(foreign).grown(fakes.domain(1))
    assert replay(old, old.grown(fakes.domain(2, "d2")))["d0"] == 0.0


def test_the_same_domain_under_another_name_is_no_new_domain() -> None:
    outcome = rejected(admit(fakes.grown(0, 1), replace(fakes.domain(0), name="again")))
    assert outcome.domain == "again"
    assert any("wins only 0.0% of its own inputs" in r and "not a new domain" in r for r in outcome.reasons)
    assert any("'d0' wins 100.0%" in r and "update 'd0' with these samples" in r for r in outcome.reasons)


def test_fresh_samples_of_an_old_domain_are_no_new_domain() -> None:
    fresh = remembered("fresh", fakes.space().encode(fakes.features(0, seed=9)))
    assert rejected(admit(fakes.grown(0, 1), fresh)).domain == "fresh"


def test_the_least_share_of_own_inputs_is_the_policys() -> None:
    lenient = fakes.grown(0, 1, min_own_share=0.0, max_stolen_share=1.0)
    assert admitted(admit(lenient, replace(fakes.domain(0), name="again"))).system.names == ("d0", "d1", "again")


@pytest.mark.parametrize(("dimensions", "m"), [(256 + fakes.M, 16), (128, fakes.M)])
def test_a_memory_of_another_size_is_rejected(dimensions: int, m: int) -> None:
    h = np.random.default_rng(0).normal(size=(20, dimensions)).astype(np.float32)
    memory = learn(h, fakes.labels_of(20), fakes.CLASSES, m)
    other = replace(fakes.domain(1), memory=memory, codes=h[:, :m].astype(np.float16))
    (reason,) = rejected(admit(fakes.grown(0), other)).reasons
    assert str((dimensions, m)) in reason and str((256 + fakes.M, fakes.M)) in reason


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["class sums", "gram", "codes"])
def test_nothing_infinite_gets_in(where: str, value: float) -> None:
    domain = fakes.domain(1)
    sums, gram, codes = domain.memory.class_sums.copy(), domain.memory.gram.copy(), domain.codes.copy()
    for what, array in (("class sums", sums), ("gram", gram), ("codes", codes)):
        array[1, 2] = value if what == where else array[1, 2]
    broken = replace(domain, memory=DomainMemory(fakes.CLASSES, domain.memory.counts, sums, gram), codes=codes)
    for system in (fakes.empty(), fakes.grown(0)):
        assert rejected(admit(system, broken)).reasons == (f"{where} of 'd1' hold NaN or infinity",)


def test_what_cannot_be_detected_or_replayed_is_rejected() -> None:
    domain = fakes.domain(1)
    nothing = learn(np.zeros((0, 256), np.float32), np.zeros(0, np.int64), fakes.CLASSES, fakes.M)
    cases = {
        "holds no sample": replace(domain, memory=nothing),
        "no calibration codes": replace(domain, codes=domain.codes[:0]),
        "expected (codes, 32)": replace(domain, codes=domain.codes[:, :20]),
    }
    for reason, broken in cases.items():
        assert reason in " ".join(rejected(admit(fakes.grown(0), broken)).reasons)


def test_every_misfit_is_named_at_once() -> None:
    nothing = learn(np.zeros((0, 64), np.float32), np.zeros(0, np.int64), fakes.CLASSES, 8)
    empty = replace(fakes.domain(1), memory=nothing, codes=np.zeros((0, 9), np.float16))
    assert len(rejected(admit(fakes.grown(0), empty)).reasons) == 4


def test_a_relearned_domain_takes_the_place_of_the_old_one() -> None:
    old = fakes.grown(0, 1, 2)
    more = fakes.space().encode(fakes.features(1, seed=3))
    memory = merge(fakes.domain(1).memory, learn(more, fakes.labels_of(60), fakes.CLASSES, fakes.M))
    relearned = replace(fakes.domain(1), memory=memory)
    new = admitted(admit(old, relearned)).system
    assert new.names == old.names and new.generation == old.generation + 1
    assert new.domain("d1") is relearned
    assert new.domains[0] is old.domains[0] and new.domains[2] is old.domains[2]


def test_a_name_cannot_be_taken_over_by_another_domain() -> None:
    impostor = replace(fakes.domain(4), name="d1")
    outcome = rejected(admit(fakes.grown(0, 1, 2), impostor))
    assert "of the inputs of 'd1'" in outcome.reasons[0]
