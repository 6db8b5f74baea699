"""Augmentation: a view is a function of its name and the frame's pixels, so equal files have equal views everywhere."""

from __future__ import annotations

import hashlib
import math
import re

import numpy as np
from PIL import Image

from edgeear.errors import UsageError
from edgeear.types import U8


def view(frame: U8, name: str) -> U8:
    """An augmented `frame (height, width, 3)` of the same shape: "plain", "flip", or "crop1" to "crop9999".

    A crop is a random resized crop of 0.6 to 1 of the area, flipped half the time, with brightness and contrast
    changed by up to 20 %. Its seed is the SHA-256 of the name and the pixels.
    Raises `UsageError` for another name, shape or type.
    """
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise UsageError(f"frame of {frame.dtype} {frame.shape}: it must be uint8 (height, width, 3)")
    if name == "plain":
        return frame
    if name == "flip":
        return np.ascontiguousarray(frame[:, ::-1])
    if not re.fullmatch(r"crop[1-9][0-9]{0,3}", name):
        raise UsageError(f"view {name!r} is not one of plain, flip, crop1 to crop9999")
    digest = hashlib.sha256(name.encode() + b"\0" + frame.tobytes()).digest()
    return _crop(frame, np.random.default_rng(int.from_bytes(digest, "big")))


def _crop(frame: U8, rng: np.random.Generator) -> U8:
    height, width = frame.shape[:2]
    area, ratio = rng.uniform(0.6, 1.0), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    wide, tall = width * min(1.0, math.sqrt(area * ratio)), height * min(1.0, math.sqrt(area / ratio))
    left, top = rng.uniform(0, 1) * (width - wide), rng.uniform(0, 1) * (height - tall)
    box = (left, top, min(width, left + wide), min(height, top + tall))
    picture = Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(picture, np.float32)
    if rng.uniform() < 0.5:
        pixels = pixels[:, ::-1]
    contrast, brightness = rng.uniform(0.8, 1.2, size=2).astype(np.float32)
    mean = np.float32(pixels.mean(dtype=np.float64))
    changed = ((pixels - mean) * contrast + mean) * brightness
    jittered: U8 = np.rint(changed.clip(0, 255)).astype(np.uint8)
    return jittered
