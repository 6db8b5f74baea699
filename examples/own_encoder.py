"""Use an encoder of your own: here a colour histogram in numpy. The path of an ONNX file does as well:
Ear("net.onnx")."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgeear import Ear, Tap


class Histogram:
    """An `edgeear.Encoder`: the same frame always gives the same features, and nothing ever trains it."""

    digest = hashlib.sha256(b"histogram 1").hexdigest()  # the identity of its features: change it when they change
    taps = (Tap("colours", (24,)), Tap("rows", (16,)))
    input_size = (64, 64)

    def encode(self, frames: NDArray[np.uint8], taps: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """`frames (n, 64, 64, 3)` to the wanted taps, `(n, channels)` float32 each."""
        bins = [np.histogram(f[..., c], bins=8, range=(0, 256))[0] for f in frames for c in range(3)]
        rows = frames.mean(axis=(2, 3)).reshape(len(frames), 16, 4).std(axis=2)
        found = {"colours": np.sqrt(np.reshape(bins, (len(frames), 24))), "rows": rows}
        return {tap: found[tap].astype(np.float32) for tap in taps}


ear = Ear(Histogram())
print(ear.learn("photos/day"))
print(ear.predict("photo.jpg"))
