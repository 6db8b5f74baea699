"""Adaptation without labels: it adapts where the new domain is the old one seen differently, and refuses what its own
test cannot vouch for. Features are synthetic: classes are clusters, a domain is an affine change of them."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from adaptors import selftrain
from adaptors.search import SearchPolicy
from adaptors.spec import HeadSpec
from adaptors.train import TrainPolicy
from device.board.board import Board, BoardPolicy
from device.board.events import BoardEvent
from device.simulation.simulate import FIRST_LABELS, GroundTruth
from edgeear import flow
from edgeear.errors import UsageError
from edgeear.learned import learned
from edgeear.memory import I64
from edgeear.samples import AdaptPolicy, Samples
from edgeear.space import HypervectorSpace, SpacePolicy
from edgeear.system import Candidate, Live, Rejected, System, SystemPolicy
from edgeear.types import F32, Features, Tap
from edgeear.unlabelled import UnlabelledPolicy, adapt_unlabelled, label_frames
from tests.support import fakes

SHIFT = 5.0
"""Size of the change of a domain; classes are 2 apart."""
CLASSES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu")
WIDTH, N, M = 160, 350, 96
POLICY = UnlabelledPolicy()
QUICK = AdaptPolicy(search=SearchPolicy(specs=6), train=TrainPolicy(epochs=5), spatial=False)
ENGINE = fakes.engine()


def world(seed: int, *, domain: int = 0, classes: int = 7, n: int = N) -> tuple[Features, I64]:
    """Clusters of the classes; domain 0 as they are, others scaled and moved. `seed` draws the samples only."""
    centres = np.random.default_rng(1).normal(0, 0.8, (7, WIDTH))
    rng = np.random.default_rng([seed, 2])
    y = np.arange(n) % classes
    x = centres[y] + rng.normal(0, 1.0, (n, WIDTH))
    if domain:
        change = np.random.default_rng([domain, 3])
        x = x * change.uniform(0.6, 1.5, WIDTH) + change.normal(0, SHIFT, WIDTH)
    return taps(x), y.astype(np.int64)


def taps(x: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Features:
    half = WIDTH // 2
    return {"a": x[:, :half].astype(np.float32), "b": x[:, half:].astype(np.float32)}


@lru_cache(maxsize=1)
def known() -> System:
    """A system that has learned domain 0 with labels."""
    space = HypervectorSpace([Tap("a", (WIDTH // 2,)), Tap("b", (WIDTH // 2,))], SpacePolicy(dimensions=1024, levels=0))
    empty = System("e" * 64, space, SystemPolicy(memory_dimensions=M))
    features, y = world(0)
    h = space.encode(features)
    samples = Samples("home", [features], y, CLASSES)
    return empty.grown(learned(empty, "home", h, y, CLASSES, fakes.head(samples, HeadSpec(("a", "b"))), {}, 0))


def accuracy(system: System, features: Features, y: I64) -> float:
    h = system.space.encode(features)
    route = flow.judge(system, h).route
    said = []
    for i, k in enumerate(route):
        head = system.domains[int(k)].head
        given_taps = {**{t: x[i : i + 1] for t, x in features.items()}, "hypervector": h[i : i + 1, :M]}
        said.append(head.classes[int(ENGINE.scores(head, given_taps)[0].argmax())])
    return float(np.mean([s == CLASSES[c] for s, c in zip(said, y, strict=True)]))


def tried(features: Features, policy: UnlabelledPolicy = POLICY) -> Candidate | Rejected:
    return adapt_unlabelled(known(), ENGINE, "away", [features], policy, QUICK, 0)


def reasons(features: Features, policy: UnlabelledPolicy = POLICY) -> str:
    outcome = tried(features, policy)
    assert isinstance(outcome, Rejected)
    return "; ".join(outcome.reasons)


@pytest.mark.parametrize("domain", [1, 2, 3])
def test_an_affine_change_of_the_known_domain_is_adapted_to(domain: int) -> None:
    features, _ = world(1, domain=domain)
    fresh, y = world(2, domain=domain)
    outcome = tried(features)
    assert isinstance(outcome, Candidate), outcome
    before, after = accuracy(known(), fresh, y), accuracy(outcome.system, fresh, y)
    assert after > 0.95 and after > before + 0.1
    growth = outcome.system.domain("away").growth
    record = growth["label_free"]
    assert isinstance(record, dict) and record["sources"] == ("home",) and record["frames"] == N
    assert min(record["agreement"], record["reverse"], record["diversity"]) > 0.5
    assert str(growth["explanation"]).startswith("label-free") and growth["validation_accuracy"] is None
    assert outcome.system.domains[0] is known().domains[0]


def test_what_was_adapted_to_without_labels_helps_with_the_next_domain() -> None:
    first = tried(world(1, domain=1)[0])
    assert isinstance(first, Candidate)
    features, y = world(4, domain=2)
    found = label_frames(first.system, ENGINE, features, known().space.encode(features), POLICY, 0)
    assert found.trust.sources == ("home", "away")
    assert (found.labels == y).mean() > 0.95


def test_noise_is_refused() -> None:
    rng = np.random.default_rng(5)
    noise = taps(rng.normal(0, 1.5, (N, WIDTH)) + rng.normal(0, 2.0, WIDTH))
    assert "label-free: class structure" in reasons(noise)


def test_other_classes_are_mostly_refused() -> None:
    """No label-free test can promise this: unseen classes may lie where moved known ones would."""
    passed = []
    for seed in range(8):
        centres = np.random.default_rng([seed, 77]).normal(0, 0.8, (7, WIDTH))
        rng = np.random.default_rng(seed)
        features = taps(centres[rng.integers(7, size=N)] + 3 + rng.normal(0, 1.0, (N, WIDTH)))
        found = label_frames(known(), ENGINE, features, known().space.encode(features), POLICY, 0)
        passed += [] if found.trust.doubts(POLICY) else [seed]
    assert len(passed) <= 1, passed


def test_a_stream_of_one_class_is_refused() -> None:
    assert "label-free: class structure" in reasons(world(7, domain=1, classes=1)[0])


def test_familiar_frames_are_left_to_the_heads_that_know_them() -> None:
    assert "share of foreign frames" in reasons(world(8)[0])


@pytest.mark.parametrize("n", [60, 130])
def test_the_number_of_frames_is_bounded(n: int) -> None:
    assert f"{n} unlabelled frames" in reasons(world(1, domain=1, n=n)[0], UnlabelledPolicy(frames=100, limit=120))


def test_the_first_domain_needs_labels() -> None:
    nothing = replace(known(), domains=())
    outcome = adapt_unlabelled(nothing, ENGINE, "first", [world(0)[0]], POLICY, QUICK, 0)
    assert isinstance(outcome, Rejected) and "first domain needs labels" in outcome.reasons[0]


def test_a_policy_that_cannot_hold_is_refused() -> None:
    with pytest.raises(UsageError, match="frames is 10"):
        UnlabelledPolicy(frames=10)


def test_propagation_mends_what_the_teacher_gets_wrong() -> None:
    features, y = world(3, n=200)
    x = np.concatenate([features["a"], features["b"]], axis=1)
    rng = np.random.default_rng(0)
    scores = selftrain.standardised(np.eye(7, dtype=np.float32)[y] + rng.normal(0, 0.6, (200, 7)))
    policy = selftrain.SelfTrainPolicy()
    labels = selftrain.self_label(selftrain.neighbour_graph(x, policy.neighbours), scores, policy)
    assert (scores.argmax(axis=1) == y).mean() < 0.8
    assert (labels == y).mean() > 0.98


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(2, 30), st.integers(2, 6)), elements=st.floats(0, 1, width=32)),
    st.floats(0, 1),
)
def test_balancing_keeps_rows_shares_and_narrows_the_classes(shares: F32, strength: float) -> None:
    start = selftrain.balanced(shares, 0)
    out = selftrain.balanced(start, strength)
    assert np.allclose(out.sum(axis=1), 1, atol=1e-4) and (out >= 0).all()
    uniform = np.full_like(start, 1 / start.shape[1])
    assert np.allclose(selftrain.balanced(uniform, strength), uniform, atol=1e-5)


@pytest.mark.parametrize(("counts", "share"), [((5, 5, 5, 5), 1.0), ((20, 0, 0, 0), 0.25), ((10, 10, 0, 0), 0.5)])
def test_diversity_is_the_share_of_classes_that_are_effectively_there(counts: tuple[int, ...], share: float) -> None:
    labels = np.repeat(np.arange(4), counts)
    assert selftrain.class_diversity(labels, 4) == pytest.approx(share, abs=1e-3)


def test_the_neighbour_graph_is_symmetric_and_has_no_loops() -> None:
    x = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    graph = selftrain.neighbour_graph(x, 5)
    assert np.allclose(graph, graph.T, atol=1e-6) and (np.diag(graph) == 0).all()
    assert (graph > 0).sum(axis=1).min() >= 1


class Silent:
    """A labeller who labels the first domain, and then is gone."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.gone = False

    def label(self, at: object) -> list[str | None]:
        assert isinstance(at, list)
        return [None if self.gone else self.seen[n - 1] for n in at]

    def domain(self, at: object) -> str:
        return "second" if self.gone else "first"


@pytest.mark.parametrize("allowed", [True, False])
def test_a_board_without_labels_tries_without_only_where_its_policy_says_so(allowed: bool) -> None:
    labeller, events = Silent(), list[BoardEvent]()
    gate = (
        UnlabelledPolicy(frames=40, foreign=0, agreement=-1, confidence=-1, diversity=0, structure=-9)
        if allowed
        else None
    )
    policy = BoardPolicy(labels=40, memory=60, probation=20, adapt=fakes.QUICK, unlabelled=gate)
    start = fakes.empty()
    board = Board(Live(start, start), fakes.FakeEncoder(), labeller, lambda: 0.0, policy, on_event=events.append)
    for background, count in ((0, 80), (1, 150)):
        labeller.gone = background == 1
        labels = fakes.labels_of(count)
        for frame, label in zip(fakes.frames(background, fakes.CLASSES, labels, 3), labels, strict=True):
            labeller.seen.append(fakes.CLASSES[int(label)])
            board.step(frame)
    said = " ".join(f"{e.kind}: {e.text}" for e in events)
    assert ("no labels came" in said) == allowed
    assert ("second: label-free" in said) == allowed
    assert ("refused: 0 labels" in said) != allowed
    assert board.system.names == (("first", "second") if allowed else ("first",))


def test_a_budget_of_no_labels_still_labels_the_first_domain() -> None:
    truth = GroundTruth(0)
    truth.seen = [("d", "c")] * 300
    first, second = truth.label(range(1, 301)), truth.label(range(1, 301))
    assert sum(x is not None for x in first) == FIRST_LABELS and second == [None] * 300
