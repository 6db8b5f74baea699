"""The search space and its budget, every proxy through the same checks, and the search on data with a known answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from adaptors.cost import cost
from adaptors.fields import TapShapes
from adaptors.halving import halve, merit
from adaptors.proxies import PROXIES, Probe, Sample, kernel_loo
from adaptors.quantise import F32
from adaptors.search import (
    COMBINED,
    DEFAULT_PROXY,
    Scored,
    SearchPolicy,
    balanced,
    cheap_first,
    guarded,
    search,
    single_thread,
)
from adaptors.search_space import BUDGETS, Budget, EmptyBudget, SearchSpace
from adaptors.spec import HeadSpec
from adaptors.train import Trained
from adaptors.transfer import Ranker, family

SHAPES = {"a.mean": (8,), "b.mean": (16,), "m": (6, 5, 5)}
CHANNELS = (32, 16, 24, 40, 80, 112, 192, 320, 1280)
ENCODER: TapShapes = {
    **{f"stage{i}.{kind}": (c,) for i, c in enumerate(CHANNELS) for kind in ("mean", "std")},
    "stage5": (112, 14, 14),
    "stage6": (192, 7, 7),
    "stage7": (320, 7, 7),
}
ANYTHING = Budget(10**9, 10**9, 10**12, 1e9)
HEADS = [
    HeadSpec(("a.mean", "b.mean")),
    HeadSpec(("a.mean",), reconfigurator="prototypes", normalisation="unit"),
    HeadSpec(("b.mean",), "fourier", 128, bandwidth=0.3),
    HeadSpec(("a.mean", "b.mean"), "mlp", 16, depth=2, residual=True, reconfigurator="linear"),
    HeadSpec(("a.mean",), "mlp", 8, activation="hardswish", reconfigurator="prototypes"),
    HeadSpec(("b.mean",), "depthwise", 8, spatial="m", reconfigurator="linear"),
    HeadSpec((), "conv", 8, depth=2, spatial="m", pool="pyramid", reconfigurator="linear"),
]


def labelled(samples: int, seed: int = 0, informative: str = "b.mean") -> tuple[dict[str, F32], NDArray[np.int64]]:
    """Three classes that only the tap `informative` tells apart; the others are noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(samples) % 3
    taps = {t: rng.normal(1, 1, (samples, *s)).astype(np.float32) for t, s in SHAPES.items()}
    for c in range(3):
        taps[informative][labels == c, c : c + 2] += 4
    return taps, labels.astype(np.int64)


def probe(spec: HeadSpec, seed: int = 0, informative: str = "b.mean") -> Probe:
    taps, labels = labelled(60, 0, informative)
    tensors = {t: torch.from_numpy(x) for t, x in taps.items()}
    return Probe(spec, cost(spec, SHAPES, 3), Sample(tensors, torch.from_numpy(labels), 3, seed))


def test_the_space_counts_what_it_enumerates_and_repeats_nothing() -> None:
    for shapes in (SHAPES, {"a.mean": (8,)}, {"m": (6, 5, 5)}):
        specs = list(SearchSpace(shapes, 3))
        assert len(specs) == len(SearchSpace(shapes, 3)) == len(set(specs)) > 0
        for spec in specs[:: max(1, len(specs) // 500)]:
            assert cost(spec, shapes, 3).parameters > 0


def test_the_space_of_the_default_encoder_is_large_and_holds_quick_heads() -> None:
    space = SearchSpace(ENCODER, 7)
    assert len(space) >= 50_000
    quick = HeadSpec(("stage8.mean",))
    specs = {s for s in space if s.operator == "linear"}
    assert quick in specs and replace(quick, taps=tuple(t for t in ENCODER if "." in t)) in specs


def test_tap_sets_are_the_last_taps_of_each_kind() -> None:
    shapes: TapShapes = {"x.mean": (2,), "x.std": (2,), "y.mean": (2,), "y.std": (2,), "m": (2, 3, 3)}
    assert SearchSpace(shapes, 2).tap_sets() == [
        ("y.mean",),
        ("y.std",),
        ("x.mean", "y.mean"),
        ("x.std", "y.std"),
        ("y.mean", "y.std"),
        ("x.std", "y.mean", "y.std"),
        ("x.mean", "x.std", "y.mean", "y.std"),
    ]
    assert SearchSpace({"p": (2,), "q": (2,)}, 2).tap_sets() == [("q",), ("p", "q")]


@pytest.mark.parametrize("name", BUDGETS)
def test_samples_are_seeded_different_and_within_the_budget(name: str) -> None:
    space, budget = SearchSpace(ENCODER, 7), BUDGETS[name]
    found = space.sample(200, budget, seed=3)
    specs = [spec for spec, _ in found]
    assert len(set(specs)) == len(specs) == 200
    for spec, price in found:
        assert price == cost(spec, ENCODER, 7)
        assert price.parameters <= budget.parameters and price.bytes <= budget.bytes
        assert price.macs <= budget.macs and price.latency_ms <= budget.latency_ms
    assert specs == [spec for spec, _ in space.sample(200, budget, seed=3)]
    assert specs != [spec for spec, _ in space.sample(200, budget, seed=4)]
    assert len({spec.operator for spec in specs}) >= 3


def test_a_sample_larger_than_the_space_is_the_space() -> None:
    space = SearchSpace({"a.mean": (8,)}, 3)
    assert {spec for spec, _ in space.sample(10**6, ANYTHING, 0)} == set(space)


@pytest.mark.parametrize("field", ["parameters", "bytes", "macs", "latency_ms"])
def test_each_limit_bounds(field: str) -> None:
    price = cost(HEADS[0], SHAPES, 3)
    limit = getattr(price, field)
    assert replace(ANYTHING, **{field: limit}).admits(price)
    assert not replace(ANYTHING, **{field: limit * 0.99}).admits(price)


def test_an_empty_budget_tells_the_smallest_head() -> None:
    space = SearchSpace(SHAPES, 3)
    with pytest.raises(EmptyBudget) as caught:
        space.sample(5, Budget(parameters=1), 0)
    least = min(cost(s, SHAPES, 3).parameters for s in space)
    assert f"smallest has {least} parameters" in str(caught.value) and "parameters=1" in str(caught.value)
    assert space.sample(5, Budget(parameters=least), 0)


@pytest.mark.parametrize("name", PROXIES)
def test_a_proxy_is_seeded_finite_and_leaves_its_input_alone(name: str) -> None:
    proxy, scores = PROXIES[name], []
    for spec in HEADS:
        first = probe(spec)
        before = {t: x.clone() for t, x in first.sample.taps.items()}
        score = proxy(first)
        assert all(torch.equal(x, before[t]) for t, x in first.sample.taps.items())
        assert torch.equal(first.sample.labels, probe(spec).sample.labels)
        assert score == proxy(probe(spec)) == proxy(first)
        if score is not None:
            assert np.isfinite(score)
            scores.append(score)
    assert len(set(scores)) >= 2, "defined for some heads, and tells them apart"


@pytest.mark.parametrize("name", PROXIES)
def test_a_proxy_survives_constant_taps(name: str) -> None:
    for spec in HEADS:
        dead = probe(spec)
        taps = {t: torch.ones_like(x) for t, x in dead.sample.taps.items()}
        score = PROXIES[name](Probe(spec, dead.cost, Sample(taps, dead.sample.labels, 3)))
        assert score is None or isinstance(score, float)


@pytest.mark.parametrize("operator", [HEADS[0], HEADS[1], HEADS[2]], ids=lambda s: s.operator + s.reconfigurator)
def test_spectral_prefers_the_informative_tap(operator: HeadSpec) -> None:
    score = PROXIES["spectral"]
    informative, noise = (score(probe(replace(operator, taps=(t,)))) for t in ("b.mean", "a.mean"))
    assert informative is not None and noise is not None and informative > noise
    swapped = score(probe(replace(operator, taps=("a.mean",)), informative="a.mean"))
    assert swapped is not None and swapped > noise


def test_the_default_proxy_exists() -> None:
    assert DEFAULT_PROXY in (COMBINED, *PROXIES)
    assert SearchPolicy().proxy == DEFAULT_PROXY


@pytest.mark.parametrize("width", [3, 40])
def test_kernel_loo_equals_refitting_without_each_sample(width: int) -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(12, width)), rng.normal(size=(12, 2))
    z, t = x - x.mean(0), y - y.mean(0)
    relative = np.array([0.02, 0.7])
    brute = [left_out_error(x, y, s * np.square(z).sum() / 10) for s in relative]
    for strength, expected in zip(relative, brute, strict=True):
        found = kernel_loo(torch.from_numpy(z @ z.T), torch.from_numpy(t), np.array([strength]))
        assert found == pytest.approx(expected, rel=1e-6)
    best = kernel_loo(torch.from_numpy(z @ z.T), torch.from_numpy(t), relative)
    assert best == pytest.approx(min(brute), rel=1e-6)


def left_out_error(x: NDArray[np.float64], y: NDArray[np.float64], strength: float) -> float:
    """Mean squared error of ridge with an unpenalised intercept, refitted without each sample in turn."""
    errors = []
    for i in range(len(x)):
        rest = np.arange(len(x)) != i
        mean, offset = x[rest].mean(0), y[rest].mean(0)
        z = x[rest] - mean
        weight = np.linalg.solve(z.T @ z + strength * np.eye(x.shape[1]), z.T @ (y[rest] - offset))
        errors.append(np.square((x[i] - mean) @ weight + offset - y[i]))
    return float(np.mean(errors))


def test_controls_rank_by_cost() -> None:
    probes = [probe(spec) for spec in HEADS]
    for name in ("parameters", "macs"):
        assert [PROXIES[name](p) for p in probes] == [float(getattr(p.cost, name)) for p in probes]
    draws = [PROXIES["random"](p) for p in probes]
    assert all(d is not None and 0 <= d < 1 for d in draws)
    assert draws != [PROXIES["random"](probe(spec, seed=1)) for spec in HEADS]


def test_proxies_without_a_meaning_for_vectors_say_so() -> None:
    assert PROXIES["naswot"](probe(HEADS[0])) is None and PROXIES["synflow"](probe(HEADS[0])) is None
    assert PROXIES["naswot"](probe(HEADS[3])) is not None and PROXIES["synflow"](probe(HEADS[3])) is not None


def test_search_is_seeded_sorted_and_within_the_budget() -> None:
    taps, labels = labelled(90)
    space, budget, policy = SearchSpace(SHAPES, 3), Budget(parameters=5000), SearchPolicy(specs=40, samples=45, seed=2)
    result, again = (search(space, budget, taps, labels, policy) for _ in range(2))
    assert result == again and len(result.ranking) == 40
    assert all(budget.admits(s.cost) for s in result.ranking)
    scores = [-np.inf if s.score is None else s.score for s in result.ranking]
    assert scores == sorted(scores, reverse=True) and result.best is result.ranking[0]
    other = search(space, budget, taps, labels, replace(policy, seed=3))
    assert {s.spec for s in other.ranking} != {s.spec for s in result.ranking}


@pytest.mark.parametrize("informative", ["a.mean", "b.mean"])
def test_search_picks_the_informative_tap(informative: str) -> None:
    taps, labels = labelled(90, informative=informative)
    taps = {"x.mean": taps["a.mean"], "y.std": taps["b.mean"]}  # kinds, so that each tap is a set of its own
    wanted = {"a.mean": "x.mean", "b.mean": "y.std"}[informative]
    space = SearchSpace({t: x.shape[1:] for t, x in taps.items()}, 3)
    result = search(space, ANYTHING, taps, labels, SearchPolicy(specs=60, samples=90))
    assert wanted in result.best.spec.taps
    alone = {s.spec.taps: s.score for s in reversed(result.ranking) if s.score is not None}
    other = ("x.mean",) if wanted == "y.std" else ("y.std",)
    assert alone[(wanted,)] > alone[other]


def test_search_tells_its_progress_and_its_reasons() -> None:
    taps, labels = labelled(60)
    calls: list[tuple[str, int, int]] = []
    policy = SearchPolicy(specs=12, samples=30, proxy="spectral")
    result = search(SearchSpace(SHAPES, 3), ANYTHING, taps, labels, policy, lambda *at: calls.append(at))
    assert calls == [("search", i, 20) for i in range(1, 21)]  # all 12, and 8 of them again
    best = result.best
    assert best.score is not None
    for word in (
        best.spec.operator,
        f"{best.score:.4g}",
        "of 12 heads",
        f"{best.cost.parameters} parameters",
        "spectral",
    ):
        assert word in result.explanation


def test_the_finalists_are_scored_again_on_more_samples() -> None:
    taps, labels = labelled(90)
    space, policy = SearchSpace(SHAPES, 3), SearchPolicy(specs=30, samples=15, finalists=5, proxy="spectral")
    once = search(space, ANYTHING, taps, labels, replace(policy, finalists=0))
    twice = search(space, ANYTHING, taps, labels, policy)
    closer = {s.spec: s.score for s in search(space, ANYTHING, taps, labels, replace(policy, samples=90)).ranking}
    assert {s.spec for s in twice.ranking[:5]} == {s.spec for s in once.ranking[:5]}
    assert [s.score for s in twice.ranking[:5]] == [closer[s.spec] for s in twice.ranking[:5]]
    assert twice.ranking[5:] == once.ranking[5:]
    everything = replace(policy, samples=90)  # no more samples than were seen: no second look
    assert (
        search(space, ANYTHING, taps, labels, everything).ranking
        == search(space, ANYTHING, taps, labels, replace(everything, finalists=0)).ranking
    )


def test_combined_the_heads_that_ridge_solves_are_ordered_by_a_closer_look_at_their_error() -> None:
    taps, labels = labelled(90)
    space, policy = SearchSpace(SHAPES, 3), SearchPolicy(specs=40, samples=15, finalists=5)
    calls: list[tuple[str, int, int]] = []
    result = search(space, ANYTHING, taps, labels, policy, lambda *at: calls.append(at))
    assert calls == [("search", done, 45) for done in range(1, 46)]
    once = search(space, ANYTHING, taps, labels, replace(policy, finalists=0))
    solved = [s.spec for s in result.ranking if s.spec.solved]
    assert [s.spec for s in result.ranking if not s.spec.solved] == [s.spec for s in once.ranking if not s.spec.solved]
    assert [s.score for s in result.ranking] == [s.score for s in once.ranking], "places keep their estimates"
    near = {spec: closer_error(spec, taps, labels) for spec in solved[:5]}
    assert solved[:5] == sorted(near, key=lambda s: -near[s])
    far = {s: spectral_of(s, taps, labels, 15) for s in solved}
    assert set(solved[:5]) == set(sorted(solved, key=lambda s: -far[s])[:5])


def spectral_of(spec: HeadSpec, taps: dict[str, F32], labels: NDArray[np.int64], samples: int) -> float:
    index = balanced(labels, samples, 0)
    sample = Sample({t: torch.from_numpy(x[index]) for t, x in taps.items()}, torch.from_numpy(labels[index]), 3)
    score = PROXIES["spectral"](Probe(spec, cost(spec, SHAPES, 3), sample))
    assert score is not None
    return score


def closer_error(spec: HeadSpec, taps: dict[str, F32], labels: NDArray[np.int64]) -> float:
    return spectral_of(spec, taps, labels, 1500)


def test_the_prior_prunes_within_each_family_and_leaves_a_random_draw() -> None:
    taps, labels = labelled(60)
    space, ranker = SearchSpace(SHAPES, 3), Ranker({"int8": 1.0}, ("nowhere",))
    policy = SearchPolicy(specs=40, samples=30, reference=20, finalists=0, ranker=ranker)
    drawn = [spec for spec, _ in space.sample(20_000, ANYTHING, 0)]
    found = {s.spec for s in search(space, ANYTHING, taps, labels, policy).ranking}
    assert set(drawn[:20]) <= found and len(found) == 40
    pruned = found - set(drawn[:20])
    assert {s.bits for s in pruned} == {8}
    assert {family(s) for s in pruned} == {family(s) for s in drawn}


def test_the_best_of_each_of_the_best_families_goes_through_successive_halving() -> None:
    taps, labels = labelled(90)
    space, policy = SearchSpace(SHAPES, 3), SearchPolicy(specs=40, samples=30, halving=4)
    plain = search(space, ANYTHING, taps, labels, replace(policy, halving=0)).ranking
    result = search(space, ANYTHING, taps, labels, policy)
    halved = result.ranking
    names = [family(s.spec) for s in plain]
    pool = [s.spec for i, s in enumerate(plain) if names[i] not in names[:i]][:4]
    assert len(pool) == 4
    winner = pool[halve(pool, taps, labels, 3, 0)[0]]
    assert halved[0].spec == winner and "successive halving" in result.explanation
    assert halved[1:] == tuple(s for s in plain if s.spec != winner)


def test_a_descent_is_judged_a_standard_error_lower() -> None:
    fitted = Trained({}, 0.8, "")
    solved, descended = HeadSpec(("a.mean",)), HeadSpec(("a.mean",), "mlp", 8, reconfigurator="linear")
    assert merit(fitted, solved, 100) == 0.8
    assert merit(fitted, descended, 100) == pytest.approx(0.8 - 0.04)
    assert merit(replace(fitted, validation_accuracy=float("nan")), descended, 100) == 0.0


def test_halving_keeps_the_head_that_learns() -> None:
    taps, labels = labelled(120)
    specs = [HeadSpec((t,), "mlp", 16, reconfigurator="linear") for t in ("a.mean", "b.mean")]
    assert halve(specs, taps, labels, 3, seed=0) == [1, 0] and halve(specs[::-1], taps, labels, 3, seed=0) == [0, 1]
    assert halve(specs[:1], taps, labels, 3, seed=0) == [0]


def test_the_front_holds_what_nothing_better_undercuts() -> None:
    taps, labels = labelled(60)
    found = search(SearchSpace(SHAPES, 3), ANYTHING, taps, labels, SearchPolicy(specs=60, samples=30, finalists=0))
    front = found.front
    assert front[0] is found.best and len(front) > 1

    def beaten(s: Scored, by: Scored) -> bool:
        return (
            known(by) >= known(s)
            and by.cost.bytes <= s.cost.bytes
            and by.cost.latency_ms <= s.cost.latency_ms
            and (by.cost != s.cost or by.score != s.score)
        )

    assert not any(beaten(s, by) for s in front for by in found.ranking)
    for s in found.ranking:
        assert s in front or any(beaten(s, by) or (by.cost, by.score) == (s.cost, s.score) for by in front)


def test_no_guess_stands_above_a_head_whose_error_is_known() -> None:
    values, solved = np.array([0.7, 0.9, 0.8, 0.6]), np.array([False, False, True, True])
    found = guarded(values, solved)
    assert found[2:].tolist() == [0.8, 0.6] and found[0] == 0.7 and 0.79999 < found[1] < 0.8
    assert guarded(values, np.zeros(4, bool)) is values
    taps, labels = labelled(90)
    ranker = Ranker({"mlp/linear": 9.0}, ("nowhere",))  # says that a descent wins by far
    result = search(SearchSpace(SHAPES, 3), ANYTHING, taps, labels, SearchPolicy(specs=60, samples=30, ranker=ranker))
    assert result.best.spec.solved
    assert "mlp" in {s.spec.operator for s in result.ranking[1:30]}


def test_thrift_takes_no_guess_for_what_is_known() -> None:
    price = cost(HEADS[0], SHAPES, 3)
    small = replace(price, bytes=1)
    known_best, known_small = Scored(HEADS[0], price, 0.9), Scored(HEADS[2], replace(price, bytes=2), 0.899)
    guess = Scored(HEADS[3], small, 0.8999)
    assert HEADS[2].solved and not HEADS[3].solved
    assert cheap_first([known_best, guess, known_small], 0.01, "bytes")[0] is known_small
    assert cheap_first([known_best, guess, known_small], 0.0, "bytes")[0] is known_best
    assert cheap_first([guess, known_small], 0.01, "bytes")[0] is guess


def test_an_interrupt_stops_the_scoring() -> None:
    taps, labels = labelled(60)

    def stop(_: str, done: int, _total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(SearchSpace(SHAPES, 3), ANYTHING, taps, labels, SearchPolicy(specs=40, samples=30), stop)


def test_threads_do_not_change_the_result() -> None:
    taps, labels = labelled(60)
    results, before = [], torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(search(SearchSpace(SHAPES, 3), ANYTHING, taps, labels, SearchPolicy(specs=60, samples=30)))
    torch.set_num_threads(before)
    assert results[0] == results[1]


def test_where_the_proxy_is_undefined_the_smallest_head_is_taken() -> None:
    taps, labels = labelled(60)
    only = SearchSpace({"a.mean": (8,)}, 3)
    budget = Budget(parameters=60)  # linear heads only: no activation pattern
    result = search(only, budget, taps, labels, SearchPolicy(specs=9, samples=30, proxy="naswot"))
    assert {s.score for s in result.ranking} == {None} and "undefined" in result.explanation
    assert result.best.cost.parameters == min(s.cost.parameters for s in result.ranking)
    mixed = search(only, ANYTHING, taps, labels, SearchPolicy(specs=30, samples=30, proxy="naswot"))
    defined = [s.score is not None for s in mixed.ranking]
    assert defined == sorted(defined, reverse=True) and any(defined) and not all(defined)


def test_a_tie_goes_to_the_cheaper_head() -> None:
    taps, labels = labelled(60)
    policy = SearchPolicy(specs=40, samples=30, finalists=0)
    space = SearchSpace(SHAPES, 3)
    strict = search(space, ANYTHING, taps, labels, policy)
    loose = search(space, ANYTHING, taps, labels, replace(policy, tie=0.5))
    assert {s.spec for s in loose.ranking} == {s.spec for s in strict.ranking}
    top = known(strict.best)
    allowed = [s for s in strict.ranking if s.score is not None and s.score >= top - 0.5 * abs(top)]
    assert len(allowed) > 1
    assert loose.best.cost.parameters == min(s.cost.parameters for s in allowed) < strict.best.cost.parameters
    assert known(loose.best) >= top - 0.5 * abs(top)


def known(scored: Scored) -> float:
    assert scored.score is not None
    return scored.score


def test_the_sample_is_balanced_and_seeded() -> None:
    labels = np.repeat([0, 1, 2], [50, 5, 20]).astype(np.int64)
    index = balanced(labels, 30, seed=1)
    assert np.bincount(labels[index]).tolist() == [13, 5, 12] and len(set(index.tolist())) == 30
    assert np.array_equal(index, balanced(labels, 30, seed=1))
    assert not np.array_equal(index, balanced(labels, 30, seed=2))
    assert sorted(balanced(labels, 1000, seed=1)) == list(range(75))


def test_scoring_gives_the_threads_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt), single_thread():
        assert torch.get_num_threads() == 1
        raise KeyboardInterrupt
    assert torch.get_num_threads() == before


def test_an_unknown_proxy_is_a_key_error() -> None:
    taps, labels = labelled(30)
    with pytest.raises(KeyError, match="magic"):
        search(SearchSpace(SHAPES, 3), ANYTHING, taps, labels, SearchPolicy(proxy="magic"))
