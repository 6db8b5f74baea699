"""Scenes: what counts as a near-copy, and how alike the different frames of a domain are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgeear.scenes import COPIES, likeness, remember, repeats, scenes_of

vectors = arrays(np.float32, (6, 4), elements=st.floats(-10, 10, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3))


@given(vectors, st.floats(0.1, 100), st.integers(1, 6))
def test_scale_does_not_matter_and_only_the_latest_are_remembered(codes: np.ndarray, scale: float, most: int) -> None:
    kept: tuple[np.ndarray, ...] = ()
    for code in codes:
        kept = remember(code, kept, most)
    assert len(kept) == most
    for i, code in enumerate(codes):
        if np.any(code) and i >= 6 - most:
            assert repeats((code * scale).astype(np.float32), kept, 0.9999)


def test_the_bound_is_a_cosine() -> None:
    kept = remember(np.array([2, 0], np.float32), (), 4)
    at_60_degrees = np.array([0.5, 0.75**0.5], np.float32)
    assert repeats(at_60_degrees, kept, 0.499) and not repeats(at_60_degrees, kept, 0.501)
    assert not repeats(at_60_degrees, (), 0.0)
    assert not repeats(np.zeros(2, np.float32), kept, 0.1)


def test_scenes_do_not_alias_the_frame() -> None:
    code = np.array([1, 0], np.float32)
    kept = remember(code, (), 4)
    code[:] = 7
    np.testing.assert_array_equal(kept[0], [1, 0])
    with pytest.raises(ValueError, match="read-only"):
        kept[0][0] = 2


@given(vectors)
def test_likeness_is_order_free_and_at_most_that_of_copies(codes: np.ndarray) -> None:
    assert -1 <= likeness(codes) <= COPIES
    assert likeness(codes) == pytest.approx(likeness(codes[::-1]), abs=1e-6)


def test_likeness_is_what_one_pair_in_a_thousand_reaches() -> None:
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(128, 64)).astype(np.float16)
    kept = [remember(c.astype(np.float32), (), 1) for c in codes]
    bound = likeness(codes)
    reached = np.mean([repeats(codes[i].astype(np.float32), kept[j], bound) for i in range(128) for j in range(i)])
    assert 0.0005 < reached <= 0.0015
    assert likeness(np.ones((5, 3), np.float32)) == COPIES
    assert likeness(codes[:1]) == likeness(codes[:0]) == 0


def shown(scenes: int, times: int, spread: float, seed: int = 0) -> np.ndarray:
    """Frames `(scenes * times, 64)`: each scene `times` times in a row with a little noise; `spread` is how much the
    scenes differ."""
    rng = np.random.default_rng(seed)
    each = 1 + spread * rng.normal(size=(scenes, 64))
    return (np.repeat(each, times, axis=0) + 0.02 * spread * rng.normal(size=(scenes * times, 64))).astype(np.float32)


@pytest.mark.parametrize("spread", [1.0, 0.1])
@pytest.mark.parametrize("times", [2, 4, 8])
def test_frames_in_a_row_that_are_alike_are_one_scene(times: int, spread: float) -> None:
    """However alike the scenes of the domain look."""
    labels = np.repeat(np.arange(40) // 4 % 2, times)
    scene = scenes_of(shown(40, times, spread), labels)
    np.testing.assert_array_equal(scene, np.repeat(np.arange(40), times))


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("spread", [1.0, 0.1, 0.05])
def test_frames_that_are_alike_whenever_they_were_taken_are_different_scenes(spread: float, blocks: bool) -> None:
    """Class by class or in turn: classes whose different frames look alike are no near-copies."""
    labels = np.arange(60) // 20 if blocks else np.arange(60) % 3
    rng = np.random.default_rng(1)
    codes = rng.normal(size=(3, 64))[labels] + spread * rng.normal(size=(60, 64))
    assert len(set(scenes_of(codes.astype(np.float32), labels).tolist())) == 60


def test_exact_copies_are_one_scene_in_any_order_but_not_across_classes() -> None:
    codes = np.random.default_rng(0).normal(size=(10, 16)).astype(np.float32)
    labels = np.zeros(20, np.int64)
    assert scenes_of(np.concatenate([codes, codes]), labels).tolist() == [*range(10), *range(10)]
    labels[10:] = 1
    assert len(set(scenes_of(np.concatenate([codes, codes]), labels).tolist())) == 20


def test_likeness_counts_a_scene_once() -> None:
    codes, scene = shown(30, 4, 1.0), np.repeat(np.arange(30), 4)
    assert likeness(codes) == COPIES or likeness(codes) > 0.99
    assert likeness(codes, scene) == likeness(codes[::4]) < 0.9
