"""Weight-only int8: one scale a row (symmetric), for every learned matrix. Normalisation and biases stay float32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]

_LEAST = 127 * np.finfo(np.float32).tiny
"""Rows below this count as zero: their scale would lose precision or vanish."""


def quantise_rows(weight: F32) -> tuple[NDArray[np.int8], F32]:
    """`(rows, ...)` to int8 of the same shape and scales `(rows,)`, with weight ~ int8 * scale."""
    peak = np.abs(weight.reshape(len(weight), -1)).max(1)
    scale = np.where(peak > _LEAST, peak / 127.0, 1.0).astype(np.float32)
    rounded = np.rint(weight / scale.reshape(-1, *[1] * (weight.ndim - 1)))
    return np.clip(rounded, -127, 127).astype(np.int8), scale


def dequantised(weights: dict[str, F32], bits: int) -> dict[str, F32]:
    """The weights as a head of `bits` bits sees them: unchanged for 32, rounded to the int8 grid for 8."""
    if bits == 32:
        return weights
    out = dict(weights)
    for name, value in weights.items():
        if name.startswith("matrix."):
            q, scale = quantise_rows(value)
            out[name] = q.astype(np.float32) * scale.reshape(-1, *[1] * (value.ndim - 1))
    return out
