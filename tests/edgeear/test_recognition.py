"""What is known is recognised as a whole, and what is new is not, however quiet it looks frame by frame."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeear.novelty import Calibration
from edgeear.recognition import excess, recognise
from edgeear.types import F32
from tests.support import fakes


def seen(background: int, n: int = 60, seed: int = 8) -> F32:
    return fakes.space().encode(fakes.features(background, n, seed))


@pytest.mark.parametrize("background", [0, 1, 2])
def test_a_domain_that_comes_back_is_recognised(background: int) -> None:
    found = recognise(fakes.grown(0, 1, 2), seen(background))
    assert found is not None and found.domain == f"d{background}"
    assert found.routed > 0.95 and found.excess < 3


@pytest.mark.parametrize("background", [3, 4, 5])
def test_a_new_domain_is_not(background: int) -> None:
    assert recognise(fakes.grown(0, 1, 2), seen(background)) is None


def test_before_anything_is_learned_everything_is_new() -> None:
    assert recognise(fakes.empty(), seen(0)) is None


def test_a_mixture_of_two_known_domains_is_no_domain() -> None:
    halves = np.concatenate([seen(0, 30), seen(1, 30)])
    assert recognise(fakes.grown(0, 1, mixture=0.0, recognise=1e9), halves) is None


def test_the_limit_is_the_policys() -> None:
    h = seen(1)
    found = recognise(fakes.grown(0, 1), h)
    assert found is not None and found.excess > 0
    assert recognise(fakes.grown(0, 1, recognise=found.excess), h) == found
    assert recognise(fakes.grown(0, 1, recognise=found.excess * 0.99), h) is None


def calibration(values: F32) -> Calibration:
    return Calibration(0.0, 1.0, 0.0, 1.0, values)


def test_a_slight_rise_of_all_shows_where_no_frame_is_foreign() -> None:
    values, shown = np.random.default_rng(0).normal(size=(2, 150)).astype(np.float32)
    known = calibration(values)
    risen = np.minimum(shown + np.float32(0.8), np.sort(values)[-9])
    assert not (known.p_values(risen)[0] <= 0.05).any()
    assert excess(known, shown) < 3 < excess(known, risen)


@given(st.integers(0, 2**31), st.integers(5, 60), st.integers(1, 60))
def test_the_excess_is_that_of_counting_pairs(seed: int, n: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    values, novelty = (rng.integers(0, 9, size).astype(np.float32) for size in (n, k))
    wins = sum(float(v > c) + float(v == c) / 2 for v in novelty for c in values)
    expected = (wins - n * k / 2) / np.sqrt(n * k * (n + k + 1) / 12)
    assert excess(calibration(values), novelty) == pytest.approx(expected, abs=1e-9)


def test_the_excess_of_a_known_domain_is_about_standard_normal() -> None:
    rng = np.random.default_rng(1)
    found = np.array([excess(calibration(v[:80]), v[80:]) for v in rng.normal(size=(800, 120)).astype(np.float32)])
    assert abs(found.mean()) < 0.15 and abs(found.std() - 1) < 0.1
