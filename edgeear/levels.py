"""The level part of a hypervector: how strongly the middle of the encoder responds, magnitudes kept.

Rules of this file:

1. A direction drops the strength of a response, and many domains differ in strength: on PACS the directions of the
   middle stages do not separate cartoons from paintings, their levels do. So levels are coordinates of their own.
2. Every tap has its own coordinates, in proportion to its channels: a seeded Hadamard projection of its features as
   they are.
3. Levels come first in a hypervector. They are read with second-order memory, which does not depend on their scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adaptors.hadamard import fwht, permutation, signs
from edgeear.types import F32, Tap

SCALE = np.float32(0.01)
"""Small, so that levels barely change the direction of a whole hypervector, which angles and scenes compare."""


def projection(taps: Sequence[Tap], m: int, seed: int) -> F32:
    """`(all channels, m)`: features of the taps side by side to levels; block-diagonal, columns of length `SCALE`.

    Columns that no tap has are zero."""
    out, row, column = np.zeros((sum(t.channels for t in taps), m), np.float32), 0, 0
    for tap, width in zip(taps, shares([t.channels for t in taps], m), strict=True):
        out[row : row + tap.channels, column : column + width] = SCALE * _block(tap, width, seed)
        row, column = row + tap.channels, column + width
    out.setflags(write=False)
    return out


def shares(channels: Sequence[int], m: int) -> list[int]:
    """How many of `m` coordinates each tap gets: in proportion to its channels, and at most these.

    >>> shares([4, 8, 20], 16)
    [2, 4, 10]
    """
    total = max(sum(channels), m)
    return [m * c // total for c in channels]


def _block(tap: Tap, width: int, seed: int) -> F32:
    """`(channels, width)` with orthogonal columns where the tap has a power of two of channels, else nearly so."""
    n = 1 << (tap.channels - 1).bit_length()
    place = permutation(seed, f"level/{tap.name}", n)
    basis = fwht(np.eye(n, dtype=np.float32))[place[: tap.channels], :width]
    block: F32 = basis * signs(seed, f"level/{tap.name}", tap.channels)[:, None] * np.float32((n / tap.channels) ** 0.5)
    return block
