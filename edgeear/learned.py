"""What is kept of a domain beside its head: sums, calibration, codes for replay. Samples are not kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from adaptors.archive import HeadArchive
from edgeear.memory import I64, learn, rounded
from edgeear.novelty import calibrate
from edgeear.scenes import likeness, scene_code, scenes_of
from edgeear.system import Domain, System
from edgeear.types import F32


def learned(
    system: System,
    name: str,
    h: F32,
    labels: I64,
    classes: Sequence[str],
    head: HeadArchive,
    growth: Mapping[str, object],
    seed: int,
) -> Domain:
    """The domain `name` of the hypervectors `h (samples, D)` with `labels (samples,)`, indices into `classes`, in
    the order in which the samples were taken.

    Raises what `learn` and `calibrate` raise.
    """
    m, alike = system.policy.memory_dimensions, system.policy.shift.alike
    memory = rounded(learn(h, labels, classes, m))
    calibration = calibrate(h, labels, classes, m, seed=seed, alike=alike)
    kept = np.random.default_rng(seed).permutation(len(h))[: system.policy.codes]
    codes, scene = scene_code(h), scenes_of(scene_code(h), labels, alike)
    kept_codes, apart = h[kept, :m].astype(np.float16), likeness(codes[kept], scene[kept])
    return Domain(name, head, memory, calibration, kept_codes, growth, apart)
