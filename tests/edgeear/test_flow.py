"""The flow as a whole, with the real search and real heads on frames of synthetic domains."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptors.search import SearchPolicy
from adaptors.search_space import Budget, EmptyBudget
from adaptors.spec import HeadSpec
from adaptors.train import TrainPolicy
from device.encoder.engine import OrtEngine
from edgeear.errors import DataError, UsageError
from edgeear.flow import Prediction, adapt, infer, install, judge
from edgeear.memory import learn
from edgeear.metrics import auroc
from edgeear.samples import AdaptPolicy, Samples
from edgeear.shift import Shift, ShiftPolicy, ShiftState, observe
from edgeear.system import HYPERVECTOR, Candidate, Rejected, System
from edgeear.types import F32, U8
from tests.support import fakes

SPATIAL = HeadSpec(("b.mean",), "conv", 16, spatial="b.map", reconfigurator="linear")


def shown(background: int, n: int, seed: int = 50) -> U8:
    return fakes.frames(background, fakes.CLASSES, fakes.labels_of(n), seed)


def encoded(background: int, n: int, seed: int = 50) -> F32:
    return fakes.space().encode(fakes.features(background, n, seed))


def one(system: System, frame: U8, engine: OrtEngine | None = None) -> Prediction:
    return infer(system, engine or fakes.engine(), ShiftState(), frame)[0]


def admitted(outcome: Candidate | Rejected) -> Candidate:
    assert isinstance(outcome, Candidate), outcome
    return outcome


def accuracy(system: System, background: int, classes: tuple[str, ...] = fakes.CLASSES) -> float:
    """Share of fresh frames of a domain that get their class, through the whole flow."""
    labels, engine = fakes.labels_of(30, len(classes)), fakes.engine()
    frames = fakes.frames(background, classes, labels, seed=70)
    truth = [classes[i] for i in labels]
    return float(np.mean([one(system, f, engine).label == t for f, t in zip(frames, truth, strict=True)]))


# infer


def test_before_the_first_domain_everything_is_foreign() -> None:
    engine, encoder, state = spied()
    for frame in shown(0, 100):
        prediction, after, shift = infer(fakes.empty(), engine, state, frame)
        assert (prediction.label, prediction.route, prediction.ood, prediction.p) == (None, None, True, 0.0)
        assert len(prediction.scores) == 0 and prediction.novelty == np.inf
        assert after == state and shift is None
    assert encoder.asked == [], "the encoder need not run for that"


def spied() -> tuple[OrtEngine, fakes.FakeEncoder, ShiftState]:
    encoder = fakes.FakeEncoder()
    return OrtEngine(encoder), encoder, ShiftState()


def test_a_known_input_gets_label_route_and_verdict() -> None:
    system, engine = fakes.grown(0, 1, 2), fakes.engine()
    for background in (0, 1, 2):
        predictions = [one(system, frame, engine) for frame in shown(background, 30)]
        assert [p.route for p in predictions] == [f"d{background}"] * 30
        assert [p.label for p in predictions] == list(fakes.CLASSES) * 10
        assert all(p.scores.shape == (3,) and p.label == fakes.CLASSES[p.scores.argmax()] for p in predictions)
        assert np.mean([p.ood for p in predictions]) <= 0.2
        assert all(p.ood == (p.p <= 0.05) for p in predictions)


def test_an_unknown_input_is_foreign_and_served_all_the_same() -> None:
    for frame in shown(5, 10):
        prediction = one(fakes.grown(0, 1), frame)
        assert prediction.ood and prediction.p == pytest.approx(1 / 61)
        assert prediction.label in fakes.CLASSES and prediction.route in ("d0", "d1")


def test_below_the_abstention_limit_no_head_serves() -> None:
    system = fakes.grown(0, 1, abstain_below=0.02)
    foreign, known = one(system, shown(5, 1)[0]), one(system, shown(0, 1)[0])
    assert (foreign.label, foreign.route, len(foreign.scores)) == (None, None, 0)
    assert foreign.ood and foreign.p == pytest.approx(1 / 61) and np.isfinite(foreign.novelty)
    assert (known.label, known.route) == ("rows", "d0")


def stream(system: System, frames: U8, state: ShiftState) -> tuple[ShiftState, list[Shift]]:
    engine, shifts = fakes.engine(), []
    for frame in frames:
        _, state, shift = infer(system, engine, state, frame)
        shifts += [shift] if shift else []
    return state, shifts


def test_an_unknown_stream_leads_to_a_shift_with_its_onset() -> None:
    every_frame = ShiftPolicy(false_alarm_rate=1e-3, scenes=0)
    system = fakes.grown(0, 1, shift=every_frame)
    state, shifts = stream(system, np.concatenate([shown(0, 60), shown(1, 60)]), ShiftState())
    assert not shifts and state.samples == 120
    state, shifts = stream(system, shown(5, 60), state)
    assert shifts and 120 < shifts[0].at < 150
    assert abs(shifts[0].onset - 120) <= 10
    assert [s.at for s in shifts] == list(range(shifts[0].at, 181)), "repeated until the caller restarts the state"
    _, again = stream(system, shown(5, 1), state)
    _, restarted = stream(system, shown(5, 1), state.restart())
    assert again and not restarted


def test_copies_of_one_foreign_frame_are_one_sample_and_each_is_ood() -> None:
    """One scene is no shift however long it lasts; bursts of several scenes are, at a frame that begins one."""
    system, foreign, engine, state = fakes.grown(0, 1), shown(5, 40), fakes.engine(), ShiftState()
    for frame in np.repeat(foreign[:1], 100, axis=0):
        prediction, state, shift = infer(system, engine, state, frame)
        assert prediction.ood and shift is None
    assert len(state.scenes) == 1 and state.samples == 100
    _, shifts = stream(system, np.repeat(foreign, 5, axis=0), ShiftState())
    assert shifts and shifts[0].at % 5 == 1


def test_the_shift_test_takes_the_conditional_p_value() -> None:
    """Only that one may be multiplied over time: the other promises more than one calibration set can."""
    system, frame = fakes.grown(0, 1), shown(5, 1)
    verdict = judge(system, encoded(5, 1))
    _, state, _ = infer(system, fakes.engine(), ShiftState(), frame[0])
    assert verdict.p[0] < verdict.conditional_p[0]
    assert state == observe(ShiftState(), float(verdict.conditional_p[0]), system.policy.shift)[0]


def test_spatial_taps_are_computed_only_when_a_head_reads_one() -> None:
    pooled = tuple(t.name for t in fakes.POOLED)
    engine, encoder, _ = spied()
    one(fakes.grown(0, 1), shown(0, 1)[0], engine)
    assert encoder.asked == [pooled]
    spatial = fakes.grown(0).grown(fakes.domain(1, spec=SPATIAL))
    for background in (0, 1):
        prediction = one(spatial, shown(background, 1)[0], engine)
        assert prediction.route == f"d{background}"
        assert encoder.asked[-1] == (*pooled, "b.map")


def test_a_head_may_read_the_hypervector() -> None:
    given = fakes.samples(0)
    h = fakes.space().encode(given.views[0])[:, : fakes.M]
    seen = replace(given, views=[{**given.views[0], HYPERVECTOR: h}])
    head = fakes.head(seen, HeadSpec((HYPERVECTOR, "b.mean")))
    engine, encoder, _ = spied()
    system = fakes.empty().grown(replace(fakes.domain(0), head=head))
    frame = shown(0, 1)
    expected = engine.scores(head, {**encoder.encode(frame, ["b.mean"]), HYPERVECTOR: encoded(0, 1)[:, : fakes.M]})
    np.testing.assert_allclose(one(system, frame[0], engine).scores, expected[0], rtol=1e-4, atol=1e-5)
    assert HYPERVECTOR not in encoder.asked[-1]


# judge


def halfway(n: int = 40) -> F32:
    """Hypervectors between three domains, where contenders differ."""
    mixed = (encoded(0, n) + encoded(1, n, 51) + 0.9 * encoded(2, n, 52)) / 3
    return mixed.astype(np.float32)


@given(st.integers(1, 6))
def test_only_the_contenders_are_asked(contenders: int) -> None:
    system = fakes.grown(0, 1, 2, 3, contenders=contenders)
    h = np.concatenate([halfway(), encoded(0, 20), encoded(5, 20)])
    verdict = judge(system, h)
    own = np.stack([d.calibration.novelty(d.detector, h) for d in system.domains], axis=1)
    p = np.stack([d.calibration.p_values(own[:, k])[0] for k, d in enumerate(system.domains)], axis=1)
    c = np.stack([d.calibration.p_values(own[:, k])[1] for k, d in enumerate(system.domains)], axis=1)
    for i, scores in enumerate(system.router.scores(h)):
        asked = sorted(range(4), key=lambda k: -scores[k])[:contenders]
        assert verdict.route[i] == asked[0]
        assert verdict.p[i] == max(p[i, asked]) and verdict.conditional_p[i] == max(c[i, asked])
        assert verdict.novelty[i] == pytest.approx(min(own[i, asked]), rel=1e-4)
    np.testing.assert_array_equal(verdict.ood, verdict.p <= np.float32(0.05))


def test_many_inputs_are_judged_as_each_alone() -> None:
    system, h = fakes.grown(0, 1, 2, 3), halfway()
    together = judge(system, h)
    for i in range(len(h)):
        alone = judge(system, h[i : i + 1])
        assert alone.novelty[0] == pytest.approx(together.novelty[i], rel=1e-4)
        for name in ("route", "p", "conditional_p", "ood", "second"):
            assert getattr(alone, name)[0] == getattr(together, name)[i]


def test_more_contenders_can_only_make_an_input_more_familiar() -> None:
    alone, all_four = (judge(fakes.grown(0, 1, 2, 3, contenders=n), halfway()) for n in (1, 4))
    assert (all_four.novelty <= alone.novelty).all() and (all_four.novelty < alone.novelty).any()
    assert (all_four.p >= alone.p).all() and (all_four.conditional_p >= alone.conditional_p).all()


def test_unknown_inputs_are_more_novel_than_known_ones() -> None:
    system = fakes.grown(0, 1, 2)
    known = judge(system, np.concatenate([encoded(b, 60) for b in (0, 1, 2)]))
    for background in (3, 4, 5):
        unknown = judge(system, encoded(background, 60))
        assert auroc(known.novelty, unknown.novelty) > 0.95
        assert unknown.ood.mean() >= 0.9
    assert known.ood.mean() <= 0.15


def test_a_batch_is_judged_like_its_frames() -> None:
    system, frames = fakes.grown(0, 1), np.concatenate([shown(0, 4), shown(5, 4)])
    batch = judge(system, np.concatenate([encoded(0, 4), encoded(5, 4)]))
    for i, frame in enumerate(frames):
        single = one(system, frame)
        assert single.route == f"d{batch.route[i]}"
        assert single.p == batch.p[i] and single.novelty == pytest.approx(float(batch.novelty[i]), rel=1e-3)


# adapt


def test_domain_after_domain_is_learned_and_none_is_forgotten() -> None:
    system = fakes.empty()
    for background in (0, 1, 2):
        candidate = admitted(adapt(system, fakes.samples(background), fakes.QUICK, seed=1))
        assert candidate.base is system
        system = candidate.system
        assert min(accuracy(system, b) for b in range(background + 1)) >= 0.95
    assert system.names == ("d0", "d1", "d2") and system.generation == 3


def test_what_is_kept_of_a_domain() -> None:
    given = fakes.samples(0)
    domain = admitted(adapt(fakes.empty(codes=17), given, fakes.QUICK, seed=1)).system.domain("d0")
    h = fakes.space().encode(given.views[0])
    direct = learn(h, given.labels, given.classes, fakes.M)
    np.testing.assert_array_equal(domain.memory.counts, direct.counts)
    np.testing.assert_allclose(domain.memory.class_sums, direct.class_sums, rtol=1e-5)
    np.testing.assert_allclose(domain.memory.gram, direct.gram, rtol=1e-5)
    assert domain.codes.shape == (17, fakes.M) and domain.codes.dtype == np.float16
    every = {row.tobytes() for row in h[:, : fakes.M].astype(np.float16)}
    assert len({row.tobytes() for row in domain.codes} & every) == 17
    assert domain.head.classes == fakes.CLASSES


def test_the_record_of_a_growth_is_plain_json() -> None:
    domain = admitted(adapt(fakes.empty(), fakes.samples(0), fakes.QUICK, seed=1)).system.domain("d0")
    growth = json.loads(json.dumps(dict(domain.growth), allow_nan=False))
    assert growth["specs_scored"] == 12 == len(growth["candidates"])
    assert [c["chosen"] for c in growth["candidates"]] == [True] + [False] * 11
    assert growth["bytes"] == len(domain.head.onnx)
    assert HeadSpec.from_dict(growth["spec"]) == domain.head.spec
    assert 0.9 <= growth["validation_accuracy"] <= 1


def test_phases_are_reported_in_order() -> None:
    heard: list[tuple[str, int, int]] = []
    admitted(adapt(fakes.empty(), fakes.samples(0), fakes.QUICK, 1, lambda *step: heard.append(step)))
    phases = {name: list(steps) for name, steps in groupby(heard, key=lambda step: step[0])}
    assert [name for name, _ in groupby(heard, key=lambda step: step[0])] == ["search", "train", "memory"]
    assert phases["search"] == [("search", i, 12) for i in range(1, 13)]
    for steps in phases.values():
        assert steps[-1][1] == steps[-1][2]


def test_a_seed_fixes_everything() -> None:
    a, b = (admitted(adapt(fakes.empty(), fakes.samples(0), fakes.QUICK, seed=3)).system.domain("d0") for _ in range(2))
    assert a.head.digest == b.head.digest and a.head.onnx == b.head.onnx
    assert a.codes.tobytes() == b.codes.tobytes() and a.memory.gram.tobytes() == b.memory.gram.tobytes()
    assert a.calibration.values.tobytes() == b.calibration.values.tobytes()
    assert dict(a.growth) == dict(b.growth)
    other = admitted(adapt(fakes.empty(), fakes.samples(0), fakes.QUICK, seed=4)).system.domain("d0")
    assert other.codes.tobytes() != a.codes.tobytes()
    assert other.calibration.values.tobytes() != a.calibration.values.tobytes()


def test_the_seed_goes_before_the_seeds_in_policies() -> None:
    """Else a head would be packed with other seeded constants than it was fitted with."""
    heads = []
    for inner in (1, 9):
        policy = replace(
            fakes.QUICK, search=SearchPolicy(specs=12, seed=inner), train=TrainPolicy(seed=inner, epochs=12)
        )
        heads.append(admitted(adapt(fakes.empty(), fakes.samples(0), policy, seed=1)).system.domain("d0").head)
    assert heads[0].digest == heads[1].digest


def test_a_domain_with_entirely_new_classes() -> None:
    classes = ("checks", "all")
    given = fakes.samples(1, classes=classes)
    system = admitted(adapt(fakes.grown(0), given, fakes.QUICK, seed=1)).system
    assert system.domain("d1").head.classes == classes
    assert accuracy(system, 1, classes) >= 0.95 and accuracy(system, 0) >= 0.95


@pytest.mark.parametrize("counts", [(20, 20, 1), (2, 2, 1), (30, 0, 30), (12,)])
def test_classes_of_few_samples(counts: tuple[int, ...]) -> None:
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int64)
    classes = fakes.CLASSES[: len(counts)]
    seen = fakes.FakeEncoder().encode(fakes.frames(0, classes, labels, 0), [t.name for t in fakes.TAPS])
    system = admitted(adapt(fakes.empty(), Samples("few", [seen], labels, classes), fakes.QUICK, seed=1)).system
    served = [one(system, frame).label for frame in fakes.frames(0, classes, labels, 0)]
    right = [label == classes[i] for label, i in zip(served, labels, strict=True)]
    assert np.mean(right) >= 0.9
    assert system.domain("few").memory.counts.tolist() == list(counts)


def test_two_views_train_one_head_and_only_the_plain_one_is_remembered() -> None:
    plain = fakes.samples(0)
    twice = replace(plain, views=[plain.views[0], fakes.features(0, 60, seed=8)])
    domain = admitted(adapt(fakes.empty(), twice, fakes.QUICK, seed=1)).system.domain("d0")
    alone = admitted(adapt(fakes.empty(), plain, fakes.QUICK, seed=1)).system.domain("d0")
    assert domain.memory.n == 60 and domain.memory.gram.tobytes() == alone.memory.gram.tobytes()
    assert domain.head.digest != alone.head.digest


def test_a_domain_that_is_not_new_is_rejected_after_the_search() -> None:
    outcome = adapt(fakes.grown(0, 1), fakes.samples(0, name="again"), fakes.QUICK, seed=1)
    assert isinstance(outcome, Rejected) and outcome.domain == "again"


def cut(n: int) -> Samples:
    given = fakes.samples(0)
    return replace(given, views=[{t: x[:n] for t, x in given.views[0].items()}], labels=given.labels[:n])


def spoilt(tap: str, value: float, view: int) -> Samples:
    given = fakes.samples(0)
    views = [{t: x.copy() for t, x in given.views[0].items()} for _ in range(2)]
    views[view][tap][[3, 5]] = value
    return replace(given, views=views)


UNUSABLE: dict[str, tuple[Callable[[], Samples], type[Exception], str]] = {
    "empty": (lambda: cut(0), DataError, "'d0' has 0 labelled samples, at least 5"),
    "too few": (lambda: cut(4), DataError, "'d0' has 4 labelled samples, at least 5"),
    "nan": (lambda: spoilt("a.std", np.nan, 0), DataError, "tap a.std has NaN or infinite features in 2 of 60"),
    "infinite": (lambda: spoilt("b.map", np.inf, 0), DataError, "tap b.map has NaN or infinite features in 2 of 60"),
    "nan in a view": (lambda: spoilt("b.std", np.nan, 1), DataError, "tap b.std has NaN"),
    "label too large": (lambda: replace(cut(9), classes=("a", "b")), UsageError, "from 0 to 2.*the 2 classes"),
    "negative label": (lambda: replace(cut(9), labels=fakes.labels_of(9) - 1), UsageError, "from -1 to 1"),
    "float labels": (lambda: replace(cut(9), labels=np.zeros(9)), UsageError, "float64 labels"),  # type: ignore[arg-type]
    "repeated class": (lambda: replace(cut(9), classes=("a", "b", "a")), UsageError, "distinct"),
    "more labels": (lambda: replace(cut(9), labels=fakes.labels_of(8)), UsageError, "with 8 samples"),
    "no view": (lambda: replace(cut(9), views=[]), UsageError, "at least one"),
    "unlike views": (lambda: replace(cut(9), views=[cut(9).views[0], {}]), UsageError, "all alike"),
    "missing tap": (lambda: replace(cut(9), views=[{"a.mean": np.ones((9, 12), np.float32)}]), UsageError, "a.std"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_samples_are_refused_before_the_search(case: str) -> None:
    make, error, message = UNUSABLE[case]
    heard: list[str] = []
    with pytest.raises(error, match=message):
        adapt(fakes.empty(), make(), fakes.QUICK, 1, lambda phase, *_: heard.append(phase))
    assert heard == []


def test_five_samples_are_enough() -> None:
    assert admitted(adapt(fakes.empty(), cut(5), fakes.QUICK, seed=1)).system.domain("d0").memory.n == 5


def test_a_budget_that_nothing_fits() -> None:
    nothing = replace(fakes.QUICK, budget=Budget(parameters=3))
    with pytest.raises(EmptyBudget, match=r"parameters=3.*smallest has \d+ parameters"):
        adapt(fakes.empty(), fakes.samples(0), nothing, seed=1)


def test_the_budget_bounds_the_head() -> None:
    small = AdaptPolicy(Budget(parameters=120), SearchPolicy(specs=12))
    domain = admitted(adapt(fakes.empty(), fakes.samples(0), small, seed=1)).system.domain("d0")
    assert domain.head.cost().parameters <= 120


def test_without_spatial_taps_no_head_reads_one() -> None:
    operators: dict[bool, set[object]] = {}
    for spatial in (False, True):
        policy = replace(fakes.QUICK, spatial=spatial, train=TrainPolicy(epochs=2))
        growth = admitted(adapt(fakes.empty(), fakes.samples(0), policy, seed=1)).system.domain("d0").growth
        candidates = growth["candidates"]
        assert isinstance(candidates, list)
        operators[spatial] = {c["operator"] for c in candidates}
    assert not operators[False] & {"conv", "depthwise"} and operators[True] & {"conv", "depthwise"}


# install


def test_a_domain_learned_elsewhere_is_installed() -> None:
    theirs = admitted(adapt(fakes.empty(), fakes.samples(1), fakes.QUICK, seed=1)).system
    ours = fakes.grown(0)
    candidate = admitted(install(ours, theirs.domain("d1"), theirs.encoder_digest, theirs.space.digest))
    assert candidate.base is ours and candidate.system.domain("d1") is theirs.domain("d1")
    assert accuracy(candidate.system, 1) >= 0.95


@pytest.mark.parametrize("what", ["encoder", "space"])
def test_a_domain_of_another_board_is_refused_with_both_digests(what: str) -> None:
    system = fakes.grown(0)
    digests = {"encoder": system.encoder_digest, "space": system.space.digest}
    ours, theirs = digests[what], "0123456789abcdef" * 4
    digests[what] = theirs
    outcome = install(system, fakes.domain(1), digests["encoder"], digests["space"])
    assert isinstance(outcome, Rejected) and outcome.domain == "d1"
    (reason,) = outcome.reasons
    assert what in reason and theirs[:12] in reason and ours[:12] in reason


def test_an_installed_domain_passes_the_same_door() -> None:
    system = fakes.grown(0, 1)
    twin = replace(fakes.domain(0), name="twin", growth=MappingProxyType({}))
    assert isinstance(install(system, twin, system.encoder_digest, system.space.digest), Rejected)
