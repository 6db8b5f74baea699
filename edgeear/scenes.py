"""Which frames repeat a scene that was just seen: they are near-copies, and no independent evidence.

Rules of this file:

1. A frame shows a scene when the cosine of its hypervector and that of the scene's first frame reaches a bound. The
   first frame, not the previous one: a slow pan must not stay one scene for ever. A few scenes are remembered, so that
   an outlier within a scene, or a camera that moves back and forth, starts no new scenes.
2. The bound is that of a domain in which different frames look most alike: at most one in a thousand pairs of its own
   labelled scenes may reach it (`likeness`).
3. Labelled frames show one scene when they are linked by cosines that reach a bound (`scenes_of`). A high cosine alone
   proves nothing: the different digits of one hand look as alike as two frames of a street. But copies of a scene come
   one after the other. So the bound is one that neighbours in time reach often, and frames far apart in time do not.
4. Scenes are values: tuples of unit vectors, newest last.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edgeear.types import F32

COORDINATES = 512
"""How many of a hypervector's last coordinates are compared: those are directions; levels differ little."""
ALIKE = 0.97
"""Least bound: below it, two frames are different in any domain."""
COPIES = 0.999
"""Upper limit of a likeness: an exact copy is a repeat in any domain."""
SPARSE = 512
"""The first frames of a class that are compared to see how alike copies and different ones look."""
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


def likeness(codes: NDArray[np.floating], scene: NDArray[np.int64] | None = None) -> float:
    """The cosine that one in a thousand pairs of different frames reaches, of codes `(samples, m)`, at most `COPIES`;
    0 for fewer than two. `scene (samples,)`: one frame of each counts; None: all frames are different."""
    if scene is not None:
        codes = codes[np.unique(scene, return_index=True)[1]]
    units = np.stack([_unit(code) for code in codes.astype(np.float32)]) if len(codes) > 1 else np.zeros((2, 1))
    pairs = (units @ units.T)[np.triu_indices(len(units), 1)]
    return min(float(np.quantile(pairs, 0.999)), COPIES)


def scenes_of(codes: NDArray[np.floating], labels: NDArray[np.int64], alike: float = ALIKE) -> NDArray[np.int64]:
    """The scene of each frame, `(samples,)`, numbered in the order of their first frames; `codes (samples, m)` and
    `labels (samples,)` in the order in which the frames were taken.

    Frames of one scene have one label, and are linked by cosines of at least the bound: the least of `alike`, half as
    far from 1, and so on, that tells copies from different frames in most frames' classes; `COPIES` if none does."""
    units = np.stack([_unit(code) for code in codes.astype(np.float32)])
    members = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    bound = alike
    while bound < COPIES and not _tells_copies([units[at[:SPARSE]] for at in members], bound):
        bound = (1 + bound) / 2
    first = np.arange(len(units))
    for at in members:
        for k, i in enumerate(at):
            linked = first[at[:k]][units[at[:k]] @ units[i] >= min(bound, COPIES)]
            if len(linked):
                first[i] = linked.min()
                first[np.isin(first, linked)] = first[i]
    found: NDArray[np.int64] = np.unique(first, return_inverse=True)[1].astype(np.int64)
    return found


def _tells_copies(classes: list[F32], bound: float) -> bool:
    """Whether in the classes `(samples, m)` of most frames a fifth of the neighbours in time or more, and ten times as
    many as of the frames that lie half of the class apart, reach the bound; those are too few to link a frame in two by
    chance. A class of fewer than four frames cannot tell."""
    votes = 0
    for units in classes:
        n = len(units)
        if n < 4:
            continue
        cosines = units @ units.T
        near = float((np.diagonal(cosines, 1) >= bound).mean())
        far = float((cosines[np.triu_indices(n, (n + 1) // 2)] >= bound).mean())
        votes += n if near >= max(0.2, 10 * far) and far * n <= 0.5 else -n
    return votes > 0


def _unit(code: F32) -> F32:
    unit: F32 = code / max(math.sqrt(code.dot(code)), TINY)
    unit.setflags(write=False)
    return unit
