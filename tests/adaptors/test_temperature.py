"""Temperatures: the one that scores were drawn with is found, and the first class never changes."""

from __future__ import annotations

import numpy as np
import pytest

from adaptors.temperature import fit_temperature, probabilities


def drawn(temperature: float, n: int = 4000, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and labels drawn from their softmax at `temperature`."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(n, classes)).astype(np.float32) * np.float32(2 * temperature)
    shares = probabilities(scores, temperature).astype(np.float64).cumsum(axis=1)
    return scores, (rng.uniform(size=(n, 1)) > shares / shares[:, -1:]).sum(axis=1)


@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0, 16.0])
def test_the_temperature_that_labels_were_drawn_with_is_found(temperature: float) -> None:
    assert fit_temperature(*drawn(temperature)) == pytest.approx(temperature, rel=0.12)


def test_probabilities_add_up_and_keep_the_order() -> None:
    scores, _ = drawn(1.0, 50)
    for temperature in (1e-3, 0.1, 1.0, 1e3):
        shares = probabilities(scores, temperature)
        assert np.allclose(shares.sum(axis=1), 1, atol=1e-5) and np.isfinite(shares).all()
        assert (shares.argmax(axis=1) == scores.argmax(axis=1)).all()


def test_a_few_right_answers_do_not_make_certain() -> None:
    labels = np.arange(10) % 2
    scores = np.eye(2, dtype=np.float32)[labels]
    few, many = (fit_temperature(np.tile(scores, (k, 1)), np.tile(labels, k)) for k in (1, 100))
    assert few is not None and many is not None and few > many
    assert probabilities(scores[:1], few).max() == pytest.approx(1 - 1 / 12, abs=0.01)


def test_nothing_to_fit_gives_none() -> None:
    assert fit_temperature(np.zeros((0, 3), np.float32), np.zeros(0, np.int64)) is None
    assert fit_temperature(np.zeros((4, 1), np.float32), np.zeros(4, np.int64)) is None
