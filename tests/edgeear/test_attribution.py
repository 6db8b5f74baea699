"""Attribution on a synthetic space: which taps moved, and what that is called."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeear.attribution import Attribution, attribute, unbundle
from edgeear.errors import DataError
from edgeear.memory import DomainMemory, learn
from edgeear.space import HypervectorSpace, SpacePolicy
from edgeear.types import F32, Tap

TAPS = tuple(Tap(f"tap{i}", (12,)) for i in range(4))
SPACE = HypervectorSpace(TAPS, SpacePolicy(dimensions=256))
CLASSES = 4


def features(label: int, n: int, seed: int, moved: tuple[int, ...] = ()) -> dict[str, F32]:
    """Images of a class: deep taps (2, 3) hold the class, shallow ones (0, 1) next to nothing of it; `moved` taps are
    replaced by something foreign."""
    rng = np.random.default_rng(seed)
    found = {}
    for i, tap in enumerate(TAPS):
        base = np.abs(np.random.default_rng(100 + i).normal(size=12))
        own = np.abs(np.random.default_rng(1000 * label + i).normal(size=12))
        mean = base + (1.0 if i >= 2 else 0.1) * own
        if i in moved:
            mean = 2 * np.abs(np.random.default_rng(7 + i).normal(size=12))
        found[tap.name] = (mean + 0.05 * rng.normal(size=(n, 12))).astype(np.float32)
    return found


def memory() -> DomainMemory:
    h = np.concatenate([SPACE.encode(features(c, 20, c)) for c in range(CLASSES)])
    return learn(h, np.repeat(np.arange(CLASSES), 20), [str(c) for c in range(CLASSES)], 16)


@given(st.integers(0, 10_000))
def test_unbundling_inverts_bundling_where_there_are_dimensions_enough(seed: int) -> None:
    code = SPACE.code(features(seed, 3, seed))
    found = unbundle(SPACE, SPACE.encode(features(seed, 3, seed)))
    assert np.linalg.norm(found - code) < 0.01 * np.linalg.norm(code)


def test_foreign_shallow_taps_are_a_sensor_shift() -> None:
    known = memory()
    found = attribute(SPACE, known, SPACE.encode(features(1, 20, 50, moved=(0, 1))))
    assert found.kind == "sensor shift"
    assert found.taps == ("tap0", "tap1", "tap2", "tap3")
    assert found.displacement[:2].min() > 3 * found.displacement[2:].max()


def test_a_class_never_seen_is_new_content() -> None:
    found = attribute(SPACE, memory(), SPACE.encode(features(77, 20, 50, moved=(2, 3))))
    assert found.kind == "new content"
    assert found.displacement[2:].min() > 1


def test_one_known_class_gives_finite_displacements() -> None:
    h = SPACE.encode(features(0, 9, 0))
    found = attribute(SPACE, learn(h, np.zeros(9, np.int64), ["only"], 16), SPACE.encode(features(0, 9, 1, moved=(0,))))
    assert np.isfinite(found.displacement).all() and found.displacement.argmax() == 0


def test_a_space_of_one_tap_has_no_shallow_half() -> None:
    assert Attribution(("only",), np.ones(1, np.float32)).kind == "new content"


@pytest.mark.parametrize(("frames", "samples"), [(0, 5), (5, 0)])
def test_nothing_to_compare_is_refused(frames: int, samples: int) -> None:
    h = SPACE.encode(features(0, 5, 0))
    known = learn(h[:samples], np.zeros(samples, np.int64), ["a"], 4)
    with pytest.raises(DataError, match="at least 1"):
        attribute(SPACE, known, h[:frames])
