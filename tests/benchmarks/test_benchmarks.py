"""The benchmarks' own code: anchors on cases with a known answer, and the page from a few rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import page, science, tables
from benchmarks.ablation import LEVELS_ALONE, bundled, rounded, unprojected, variants
from benchmarks.anchor_detectors import (
    LinearHead,
    ash,
    class_mahalanobis,
    energy,
    fit_all,
    msp,
    react,
    relative_mahalanobis,
    she,
    vim,
)
from benchmarks.anchor_learners import (
    DeepSLDA,
    FeCAM,
    FineTuning,
    JointRidge,
    Learner,
    NearestClassMean,
    RanPAC,
    Standardised,
)
from benchmarks.anchor_routers import k_means, nearest
from benchmarks.data import CORRUPTIONS, Inputs, corrupted, spectrograms
from edgeear.space import HypervectorSpace, SpacePolicy
from edgeear.types import F32, Tap

TAPS = (Tap("early.mean", (6,)), Tap("late.mean", (10,)))
SPACE = HypervectorSpace(TAPS, SpacePolicy(dimensions=64, levels=12))


def blobs(classes: int, each: int, seed: int, width: int = 10) -> tuple[F32, np.ndarray]:
    """Well separated classes around fixed positive centres."""
    centres = np.random.default_rng(5).uniform(0, 4, (classes, width))
    labels = np.arange(classes).repeat(each)
    noise = np.random.default_rng(seed).normal(0, 0.2, (len(labels), width))
    return np.maximum(centres[labels] + noise, 0).astype(np.float32), labels


def inputs(classes: int, each: int, seed: int) -> tuple[Inputs, np.ndarray]:
    x, labels = blobs(classes, each, seed, 16)
    return Inputs({"early.mean": x[:, :6], "late.mean": x[:, 6:]}, SPACE), labels


# -------------------------------------------------------------------------------------------------- detectors


HEAD = LinearHead(np.eye(2, dtype=np.float32), np.zeros(2, np.float32))


def test_msp_and_energy_are_their_formulas() -> None:
    x = np.array([[0, 0], [np.log(3), 0]], np.float32)
    assert msp(HEAD)(x) == pytest.approx([0.5, 0.25])
    assert energy(HEAD)(x) == pytest.approx([-np.log(2), -np.log(4)])


def test_react_is_energy_below_its_limit_and_flat_above() -> None:
    train = np.linspace(0, 1, 200, dtype=np.float32).reshape(100, 2)
    score, plain = react(HEAD, train), energy(HEAD)
    low, high = np.array([[0.2, 0.1]], np.float32), np.array([[5, 5], [9, 9]], np.float32)
    assert score(low) == pytest.approx(plain(low))
    assert score(high) == pytest.approx([-(0.9 + np.log(2))] * 2, abs=1e-2)


def test_ash_keeps_the_large_features_scaled_by_what_was_cut() -> None:
    head = LinearHead(np.eye(4, dtype=np.float32), np.zeros(4, np.float32))
    x = np.array([[4, 2, 1, 1]], np.float32)
    kept = np.array([[4 * np.exp(8 / 6), 2 * np.exp(8 / 6), 0, 0]], np.float32)
    assert ash(head, 50)(x) == pytest.approx(energy(head)(kept), rel=1e-5)


def test_she_is_minus_the_inner_product_with_the_predicted_class() -> None:
    x = np.array([[2, 0], [4, 0], [0, 3]], np.float32)
    score = she(HEAD, x, np.array([0, 0, 1]))
    assert score(np.array([[1, 0], [0, 2]], np.float32)) == pytest.approx([-3, -6])


def test_vim_grows_with_the_residual_outside_the_principal_subspace() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(0, 3, (200, 2)), rng.normal(0, 0.1, (200, 2))], axis=1).astype(np.float32)
    head = LinearHead(np.eye(2, 4, dtype=np.float32), np.zeros(2, np.float32))
    score = vim(head, x)
    inside, outside = np.array([[1, 1, 0, 0]], np.float32), np.array([[1, 1, 2, 0]], np.float32)
    assert score(outside)[0] > score(inside)[0] + 1


def test_class_mahalanobis_is_relative_to_the_nearest_class_and_rmd_subtracts_the_background() -> None:
    x, labels = blobs(3, 60, 0)
    plain = class_mahalanobis(x, labels)
    middle = x[labels != 2].reshape(2, 60, -1).mean(axis=(0, 1), keepdims=True)[0]
    assert plain(middle)[0] > 5 * plain(x).mean()
    relative = relative_mahalanobis(plain, x)
    assert relative(middle)[0] > relative(x).max()
    assert (relative(x) < plain(x)).all()


def test_every_detector_ranks_a_foreign_blob_above_its_own() -> None:
    train, labels = inputs(3, 40, 0)
    own = inputs(3, 20, 1)[0]
    noise = np.random.default_rng(3).permuted(
        np.concatenate([own.features["late.mean"], own.features["early.mean"]], axis=1), axis=1
    )
    foreign = Inputs({"early.mean": noise[:, :6], "late.mean": noise[:, 6:]}, SPACE)
    for name, fitted in fit_all(train, labels, 0).items():
        assert fitted.bytes > 0
        assert fitted.exemplars == (name == "KNN")
        if name not in ("SHE", "energy", "ReAct", "ASH-S"):  # their scale is the logits', not a distance
            assert np.median(fitted.score(foreign)) > np.quantile(fitted.score(own), 0.8), name


# --------------------------------------------------------------------------------------------------- learners


LEARNERS: dict[str, Callable[[], Learner]] = {
    "ncm": lambda: Standardised(NearestClassMean(4)),
    "slda": lambda: DeepSLDA(4),
    "ranpac": lambda: RanPAC(4, 0, 200),
    "fecam": lambda: FeCAM(),
    "ridge": lambda: JointRidge(4),
    "replay": lambda: FineTuning(4, 0, 60),
    "joint": lambda: FineTuning(4, 0, None),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_learners_tell_classes_apart_that_came_in_two_steps(name: str) -> None:
    x, labels = blobs(4, 400 if name == "replay" else 50, 0)
    learner = LEARNERS[name]()
    for step in ((0, 1), (2, 3)):
        new = np.isin(labels, step)
        learner.learn(x[new], labels[new])
    test, truth = blobs(4, 25, 9)
    assert (learner.predict(test) == truth).mean() > 0.95
    assert learner.bytes > 0


def test_fine_tuning_without_replay_forgets() -> None:
    x, labels = blobs(4, 50, 0)
    learner = FineTuning(4, 0)
    for step in ((0, 1), (2, 3)) * 3:
        new = np.isin(labels, step)
        learner.learn(x[new], labels[new])
    assert (learner.predict(x) == labels)[labels < 2].mean() <= 0.5


def test_slda_and_ranpac_do_not_depend_on_the_order_of_steps() -> None:
    x, labels = blobs(4, 30, 0)
    found = []
    for order in (np.arange(len(x)), np.arange(len(x))[::-1]):
        slda = DeepSLDA(4)
        for part in np.array_split(order, 3):
            slda.learn(x[part], labels[part])
        found.append(slda._solve()[0])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-2, atol=1e-2)


def test_k_means_router_sends_points_to_the_owner_of_the_nearest_centre() -> None:
    left, right = blobs(2, 40, 0)[0], blobs(2, 40, 1)[0] + 9
    route = nearest(*k_means([left, right], 0, centres=2))
    assert (route(left) == 0).all() and (route(right) == 1).all()


# ---------------------------------------------------------------------------------------------- data, ablation


def test_corruptions_change_a_frame_and_keep_its_shape() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for how in CORRUPTIONS:
        changed = corrupted(frame, how, 1, np.random.default_rng(0))
        assert changed.shape == frame.shape and changed.dtype == np.uint8
        assert (changed != frame).mean() > 0.5, how


def test_spectrograms_take_the_sensor_at_the_damaged_end(tmp_path: Path) -> None:
    tone = (1000 * np.sin(np.arange(3 * 2048))).astype(np.int16)
    signals = {
        "1730_B_7_DE12|DE": tone,
        "1730_B_7_DE12|FE": 0 * tone,
        "1730_OR@3_7_FE|FE": tone,
        "1797_Normal|DE": tone,
    }
    np.savez(tmp_path / "recordings.npz", **signals)  # type: ignore[arg-type]
    spectrograms(tmp_path / "recordings.npz", tmp_path / "out")
    files = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png"))
    assert files == [f"{d}/{n:03}.png" for d in ("DE_1730/B7", "FE_1730/OR7") for n in range(3)]


def test_ablated_hypervectors_differ_from_ours_in_one_choice() -> None:
    x, _ = inputs(2, 5, 0)
    np.testing.assert_allclose(bundled(SPACE, x, bound=True, shared=False), x.h, atol=1e-5)
    assert not np.allclose(bundled(SPACE, x, bound=False, shared=False), x.h, atol=1e-2)
    code = unprojected(SPACE, x)
    gram = bundled(SPACE, x, bound=False, shared=False)
    assert code.shape == (10, 12 + 18) and gram.shape == x.h.shape
    for early, late in ((slice(0, 6), slice(6, 16)), (slice(16, 17), slice(17, 18))):  # directions, magnitudes
        np.testing.assert_allclose(code[:, 12:][:, early], SPACE.weights[0] * SPACE.code(x.features)[:, early])
        np.testing.assert_allclose(code[:, 12:][:, late], SPACE.weights[1] * SPACE.code(x.features)[:, late])
    assert np.abs(rounded(x.h, 127) - x.h).max() <= np.abs(x.h).max() / 127


def test_ablations_of_the_bundle_keep_the_level_part_and_those_of_levels_the_bundle() -> None:
    x, _ = inputs(2, 5, 0)
    for name, (choice, encode) in variants().items():
        h = encode(SPACE, x)
        if choice != "levels":
            np.testing.assert_array_equal(h[:, :12], x.h[:, :12], name)
        if choice:
            assert h.shape != x.h.shape or not np.allclose(h[:, 12:], x.h[:, 12:], atol=1e-4), name
    np.testing.assert_array_equal(variants()["no levels"][1](SPACE, x), x.h[:, 12:])
    np.testing.assert_array_equal(variants()[LEVELS_ALONE][1](SPACE, x), x.h[:, :12])


def test_hdff_bundles_directions_of_equal_weight_and_no_levels() -> None:
    x, _ = inputs(2, 5, 0)
    assert x.flat.shape == (10, 64)
    louder = Inputs({t: 7 * f for t, f in x.features.items()}, SPACE)
    np.testing.assert_allclose(louder.flat, x.flat, atol=1e-5)
    alone = [HypervectorSpace([tap], SpacePolicy(64, levels=0)) for tap in TAPS]
    assert len({float(w) for s in alone for w in s.weights}) == 1


# --------------------------------------------------------------------------------------------------- the page


def rows() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for seed in (0, 1):
        for name, good in (("edgeear", 0.9), ("KNN", 0.8), ("MSP", 0.95)):
            row = {"data": "pacs", "setting": "covariate", "known": "a", "unknown": "b", "detector": name, "seed": seed}
            found.append({**row, "auroc": good + 0.02 * seed, "fpr95": 1 - good})
    for name in ("edgeear", "KNN", "MSP"):
        found.append(
            {"data": "pacs", "known": "a", "detector": name, "bytes": 1234, "exemplars": False, "us": 7.0, "seed": 0}
        )
    return found


def test_the_page_holds_means_deviations_and_the_cells_that_ours_loses(tmp_path: Path) -> None:
    files = {"science-detectors": {"machine": "m", "versions": {"numpy": "2"}, "seconds": 3, "rows": rows()}}
    text = page.page(files, tmp_path / "pictures")
    assert "| edgeear | 91.0 ± 1.4 / 10.0 ± 0.0 | 1,234 | 7 | no |" in text
    assert "**Ours loses 2 of 2 columns:** AUROC unseen domain (MSP 96.00 against 91.00)" in text
    assert "KNN 81" not in text.split("**Ours loses")[1].split("\n")[0]
    assert (tmp_path / "pictures" / "detectors.svg").stat().st_size < 200_000


def test_the_page_is_the_same_for_the_same_files(tmp_path: Path) -> None:
    files = {"science-detectors": {"rows": rows()}}
    texts = [page.page(files, tmp_path / name / "pictures") for name in ("a", "b")]
    pictures = [(tmp_path / name / "pictures" / "detectors.svg").read_bytes() for name in ("a", "b")]
    assert texts[0] == texts[1] and pictures[0] == pictures[1]


def test_the_page_shows_what_other_benches_wrote_and_nothing_without_files(tmp_path: Path) -> None:
    other = {"machine": "m", "rows": [{"domains": 8, "ratio": 1.14}], "import_s": 0.08, "nested": {"x": {"y": 2}}}
    text = page.page({"runtime": other}, tmp_path)
    assert "## Run time" in text and "| 8 | 1.14 |" in text and "import_s 0.08" in text and "| x | 2 |" in text
    assert "## " not in page.page({}, tmp_path).split("## Where the figures come from")[0]


def test_ours_ahead_everywhere_is_said_too() -> None:
    assert tables.lost([("AUROC", {"edgeear": 0.9, "other": 0.8}, True)]).startswith("Ours is ahead")


def test_results_are_written_whole_with_short_figures(tmp_path: Path) -> None:
    science.write(tmp_path / "science-x.json", "x", [{"seed": 0, "value": 0.123456789, "list": [1.00000001]}], 2.0)
    found = json.loads((tmp_path / "science-x.json").read_text())
    assert science.rows_of(found) == [{"seed": 0, "value": 0.12346, "list": [1.0]}]
    assert page.read(tmp_path)["science-x"]["rows"] == science.rows_of(found)
    assert [p.name for p in tmp_path.iterdir()] == ["science-x.json"]


def test_every_job_of_every_part_names_a_function() -> None:
    import importlib

    for jobs in science.parts(1).values():
        for job in jobs:
            module, name = job.function.split(":")
            assert callable(getattr(importlib.import_module(f"benchmarks.{module}"), name))
