"""More samples of a known domain: its calibration grows by scenes, and by none of its own near-copies."""

from __future__ import annotations

import numpy as np
import pytest

from edgeear.system import Candidate
from edgeear.updating import update_domain
from tests.support import fakes


@pytest.mark.parametrize("times", [1, 3])
def test_a_scene_of_an_update_counts_once(times: int) -> None:
    frames = np.repeat(fakes.frames(0, fakes.CLASSES, fakes.labels_of(60), 4), times, axis=0)
    labels = np.repeat(fakes.labels_of(60), times)
    system = fakes.grown(0)
    features = fakes.FakeEncoder().encode(frames, system.wanted_taps)
    outcome = update_domain(system, fakes.engine(), "d0", features, labels, fakes.CLASSES, seed=0)
    assert isinstance(outcome, Candidate)
    before, after = system.domain("d0"), outcome.system.domain("d0")
    added = len(after.calibration.values) - len(before.calibration.values)
    assert added == 60 if times == 1 else 30 <= added <= 60  # among copies, frames that are alike count as one scene
    assert after.memory.n == before.memory.n + 60 * times
    assert not set(before.calibration.values).difference(after.calibration.values)
