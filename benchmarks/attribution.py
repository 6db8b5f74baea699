"""Sensor shift or new content? Corrupted photographs against classes never shown.

A job is one seed: two classes are held out, and each kind of frame comes in batches of a size. The threshold of the
core was picked on photographs of this data set, test images among them, and checked on training images with other
classes held out; so what is measured here flatters it somewhat.
"""

from __future__ import annotations

import numpy as np

from benchmarks.data import Inputs, seeded, whole
from benchmarks.detection import Row
from benchmarks.ours import learn_domain
from edgeear.attribution import attribute
from edgeear.types import F32

SIZES = (1, 8, 32)
BATCHES = 6


def attribution(seed: int) -> list[Row]:
    """Rows {frames, batch, sensor}: the share of batches that are called a sensor shift, and the taps' displacement."""
    data = seeded("pacs", seed)
    photo, rng = data.domains[0], np.random.default_rng([seed, 3])
    held = rng.permutation(len(data.classes))[:2]
    shown = ~np.isin(photo.train_labels, held)
    memory = learn_domain(photo.train.take(shown).h, photo.train_labels[shown], seed).memory
    space = photo.train.space
    rows = []
    for name, h in _frames(seed, photo.test, photo.test_labels, held).items():
        for size in SIZES:
            batches = [rng.permutation(len(h))[:size] for _ in range(BATCHES)]
            found = [attribute(space, memory, h[rows]) for rows in batches]
            rows.append(
                {
                    "frames": name,
                    "content": name == "unseen classes",
                    "batch": size,
                    "seed": seed,
                    "sensor": float(np.mean([a.kind == "sensor shift" for a in found])),
                    "displacement": np.mean([a.displacement for a in found], axis=0).tolist(),
                    "taps": list(found[0].taps),
                }
            )
    return rows


def _frames(seed: int, test: Inputs, labels: np.ndarray, held: np.ndarray) -> dict[str, F32]:
    space = test.space
    frames = {"unseen classes": test.take(np.isin(labels, held)).h}
    for d in whole("corrupted").domains:
        known = Inputs(d.test.features, space).take(~np.isin(d.test_labels, held))
        frames[d.name] = known.h
    return frames
