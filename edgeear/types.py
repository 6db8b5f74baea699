"""Words shared by every room: taps, features, frames and the encoder's contract.

Arrays are float32 and batch-first unless a name says otherwise. A frame is one input as the encoder wants it before
normalisation: `(height, width, 3)` uint8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
Features = Mapping[str, F32]
"""All requested taps of a batch: tap name -> `(samples, *tap.shape)`."""


@dataclass(frozen=True)
class Tap:
    """A named intermediate output of the encoder: pooled `(channels,)` or spatial `(channels, height, width)`."""

    name: str
    shape: tuple[int, ...]

    @property
    def spatial(self) -> bool:
        return len(self.shape) == 3

    @property
    def channels(self) -> int:
        return self.shape[0]


class Encoder(Protocol):
    """A frozen network: the same frame always gives the same features."""

    @property
    def digest(self) -> str:
        """SHA-256 of the ONNX file, lower-case hex: the identity of every feature computed by it."""

    @property
    def taps(self) -> tuple[Tap, ...]:
        """All taps, pooled ones first, in the file's order."""

    @property
    def input_size(self) -> tuple[int, int]:
        """`(height, width)` of a frame."""

    def encode(self, frames: U8, taps: Sequence[str]) -> dict[str, F32]:
        """Features of `frames (samples, height, width, 3)` for the named taps; nothing else is computed or copied."""
