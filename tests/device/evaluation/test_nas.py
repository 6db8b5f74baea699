"""Tables of trained heads and the bench over them, on data small enough to train in a second."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from adaptors.proxies import PROXIES
from adaptors.search import COMBINED
from adaptors.search_space import BUDGETS, SearchSpace
from adaptors.spec import HeadSpec
from device.evaluation import nas_table
from device.evaluation.nas import bench_nas, fidelity, make_truth
from device.evaluation.nas_run import NasOptions, read_table, run
from device.evaluation.nas_table import CHEAP, FULL, Images, Truth, draw, examples, from_json, measure, to_json
from edgeear.errors import DataError, UsageError
from tests.adaptors.test_search import SHAPES, labelled
from tests.support.fakes import FakeEncoder

BUDGET = BUDGETS["medium"]


def images(domain: str = "here", seed: int = 0) -> Images:
    taps, labels = labelled(60, seed)
    test, test_labels = labelled(30, seed + 50)
    return Images([taps, taps], labels, test, test_labels, 3, f"{domain} {seed}")


def truth(tmp_path: Path, domain: str = "here", seed: int = 0, heads: int = 12) -> Truth:
    space = SearchSpace(SHAPES, 3)
    return make_truth(
        domain,
        images(domain, seed),
        "encoder",
        space,
        BUDGET,
        tmp_path / "cache",
        heads=heads,
        seeds=(0, 1),
        samples=30,
    )


def test_a_head_is_trained_once_for_a_regime_and_a_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = draw(SearchSpace(SHAPES, 3), BUDGET, "here", 4)
    trained: list[tuple[HeadSpec, int]] = []
    honest = nas_table.trained_accuracy

    def counted(spec: HeadSpec, own: Images, regime: nas_table.Regime, seed: int) -> float:
        trained.append((spec, seed))
        return honest(spec, own, regime, seed)

    monkeypatch.setattr(nas_table, "trained_accuracy", counted)
    first = measure(specs, images(), CHEAP, (0, 1), tmp_path)
    assert trained == [(s, seed) for s in specs for seed in (0, 1)]
    assert np.array_equal(measure(specs, images(), CHEAP, (0, 1), tmp_path), first) and len(trained) == 8
    measure(specs[:1], images(), FULL, (0,), tmp_path)
    measure(specs[:1], images(seed=1), CHEAP, (0,), tmp_path)
    assert len(trained) == 10, "another regime and other images are other heads"
    assert ((first >= 0) & (first <= 1)).all() and np.ptp(first) > 0


def test_domains_draw_different_heads_and_the_same_ones_again() -> None:
    space = SearchSpace(SHAPES, 3)
    assert draw(space, BUDGET, "a", 20) == draw(space, BUDGET, "a", 20) != draw(space, BUDGET, "b", 20)


def test_a_table_comes_back_from_its_file(tmp_path: Path) -> None:
    made = truth(tmp_path)
    text = json.dumps(to_json(made))
    again = from_json(json.loads(text))
    assert (again.specs, again.regime, again.domain, again.encoder) == (made.specs, CHEAP, "here", "encoder")
    np.testing.assert_allclose(again.accuracy, made.accuracy, atol=1e-5)
    assert set(again.scores) == set(PROXIES)
    for name in PROXIES:
        np.testing.assert_allclose(again.scores[name], made.scores[name], rtol=1e-4)
    assert [e.domain for e in examples(again)] == ["here", "here"]
    assert json.dumps(to_json(again)) == text


@pytest.mark.parametrize("damage", ["specs", "accuracy", "regime", "scores", "domain"])
def test_a_damaged_table_says_so(tmp_path: Path, damage: str) -> None:
    content = to_json(truth(tmp_path, heads=4))
    with pytest.raises(DataError, match="make it again"):
        from_json({k: v for k, v in content.items() if k != damage})
    with pytest.raises(DataError, match="make it again"):
        from_json({**content, "specs": {"taps": [["a.mean"]], "operator": ["magic"]}})
    path = tmp_path / "heads-here.json"
    path.write_text("{")
    with pytest.raises(DataError, match=r"heads-here\.json"):
        read_table(path, FakeEncoder())


def test_a_table_of_another_encoder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "heads-here.json"
    path.write_text(json.dumps(to_json(truth(tmp_path, heads=4))))
    with pytest.raises(DataError, match="is of encoder encoder"):
        read_table(path, FakeEncoder())


def test_the_bench_learns_from_other_domains_and_reports_every_score(tmp_path: Path) -> None:
    own, others = truth(tmp_path, heads=16), [truth(tmp_path, "there", 1), truth(tmp_path, "yonder", 2)]
    space = SearchSpace(SHAPES, 3)
    found = bench_nas(own, others, images(), space, BUDGET, tmp_path / "cache", seeds=(0,), specs=24)
    assert found["learned_on"] == ["there", "yonder"] and found["default_proxy"] == COMBINED
    assert {p["name"] for p in found["proxies"]} == {COMBINED, "family", *PROXIES}
    by_name = {p["name"]: p for p in found["proxies"]}
    assert by_name["parameters"]["defined"] == 16 and 0 < by_name["naswot"]["defined"] < 16
    assert (
        -1 <= by_name[COMBINED]["kendall_tau"] <= 1 and by_name[COMBINED]["picked_accuracy"] <= found["best_accuracy"]
    )
    assert found["mean_accuracy"] < found["random_of_8_accuracy"] <= found["best_accuracy"]
    searches = {s["search"]: s for s in found["searches"]}
    assert set(searches) == {"default", "quick", "halving", "least latency_ms", "least bytes"}
    assert searches["least bytes"]["cost"]["bytes"] <= searches["default"]["cost"]["bytes"]
    assert searches["least latency_ms"]["cost"]["latency_ms"] <= searches["default"]["cost"]["latency_ms"]
    assert json.loads(json.dumps(found)) == found


def test_fidelity_compares_the_regime_with_full_training(tmp_path: Path) -> None:
    own = truth(tmp_path)
    found = fidelity("here", own, images(), tmp_path / "cache", 8, lambda *_: None)
    full = measure(own.specs[:8], images(), FULL, (0, 1), tmp_path / "cache").mean(axis=1)
    assert found["accuracy"] == full.tolist() and found["heads"] == 8
    same = replace(own, accuracy=np.repeat(full, 1)[:, None], specs=own.specs[:8])
    assert fidelity("here", same, images(), tmp_path / "cache", 8, lambda *_: None)["kendall_tau"] == pytest.approx(1)


def test_a_table_needs_a_folder(tmp_path: Path) -> None:
    from adaptors.latency import DEFAULT

    options = NasOptions(tmp_path, "here", 4, None, True, 0, 10, None, BUDGET, DEFAULT, 0, None)
    with pytest.raises(UsageError, match="--tables"):
        run(options, lambda *_: None)
