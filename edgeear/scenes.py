"""Which frames repeat a scene that was just seen: they are near-copies, and no independent evidence.

Rules of this file:

1. A frame shows a scene when the cosine of its hypervector and that of the scene's first frame reaches a bound. The
   first frame, not the previous one: a slow pan must not stay one scene for ever. A few scenes are remembered, so that
   an outlier within a scene, or a camera that moves back and forth, starts no new scenes.
2. The bound is that of a domain in which different frames look most alike: at most one in a thousand pairs of its own
   labelled frames may reach it (`likeness`).
3. Scenes are values: tuples of unit vectors, newest last.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edgeear.types import F32

COORDINATES = 512
"""How many of a hypervector's last coordinates are compared: those are directions; levels differ little."""
COPIES = 0.999
"""Upper limit of a likeness: an exact copy is a repeat in any domain."""
TINY = 1e-12


def scene_code(h: F32) -> F32:
    """The coordinates of hypervectors `(..., D)` by which scenes are told apart."""
    return h[..., -COORDINATES:]


def repeats(code: F32, scenes: tuple[F32, ...], alike: float) -> bool:
    """Whether the frame of `code (m,)` shows one of `scenes`: cosine at least `alike`."""
    unit = _unit(code) if scenes else code
    return any(float(unit @ scene) >= alike for scene in scenes)


def remember(code: F32, scenes: tuple[F32, ...], most: int) -> tuple[F32, ...]:
    """`scenes` and the new one, without the oldest beyond `most`."""
    return (*scenes, _unit(code))[-most:] if most else ()


def likeness(codes: NDArray[np.floating]) -> float:
    """The cosine that one in a thousand pairs of different frames reaches, of codes `(samples, m)`, at most `COPIES`;
    0 for fewer than two."""
    units = np.stack([_unit(code) for code in codes.astype(np.float32)]) if len(codes) > 1 else np.zeros((2, 1))
    pairs = (units @ units.T)[np.triu_indices(len(units), 1)]
    return min(float(np.quantile(pairs, 0.999)), COPIES)


def _unit(code: F32) -> F32:
    unit: F32 = code / max(math.sqrt(code.dot(code)), TINY)
    unit.setflags(write=False)
    return unit
