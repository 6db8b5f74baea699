"""Whatever a caller has of a picture, as the frame that training would have seen.

Rules of this file:
1. One picture gives one frame, be it a path, bytes, an open file, a Pillow image or an array. Large JPEG files are the
   exception: they are decoded at a reduced size, which changes a pixel by a level or two.
2. Nothing is guessed: an array or a Pillow image whose type, shape or range could mean two things is refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from device.files import escaped
from device.images.decode import MAX_FILE_BYTES, UndecodableInput, decode, decode_bytes, fit_array, fit_image
from edgeear.errors import UsageError
from edgeear.types import U8

Input = str | Path | bytes | bytearray | memoryview | BinaryIO | Image.Image | NDArray[Any]
"""A path; the content of a file, or an open file; a Pillow image; an array `(H, W)`, `(H, W, 3)` RGB or `(H, W, 4)`
RGBA of uint8, bool, float in 0..1, or uint16 in 0..65535: with no value above 255 it could be 8 bits and is refused."""

KINDS = "a path, bytes, an open file, a Pillow image or an array"


def frame_of(given: Input, size: tuple[int, int]) -> U8:
    """The frame `(*size, 3)` uint8 RGB of a picture, `size = (height, width)`.

    Raises `UndecodableInput` for content, shapes and ranges that give no frame, `UsageError` for other Python types."""
    if isinstance(given, str | Path):
        return decode(Path(given), size)
    if isinstance(given, bytes | bytearray | memoryview):
        return _frame_of_bytes(bytes(given), "bytes", size)
    if isinstance(given, Image.Image):
        return fit_image(given, size)
    if isinstance(given, np.ndarray):
        return fit_array(given, size)
    if hasattr(given, "read"):
        name = str(getattr(given, "name", "") or "open file")
        content: object
        try:
            content = given.read(MAX_FILE_BYTES + 1)
        except UnicodeDecodeError:
            content = ""
        except (OSError, TypeError, ValueError) as error:
            raise UndecodableInput(f"{name}: cannot be read ({error}); open it in mode 'rb'", (Path(name),)) from error
        if not isinstance(content, bytes):
            raise UsageError(f"an open file that gives {type(content).__name__}: open it in binary mode, 'rb'")
        return _frame_of_bytes(content, name, size)
    raise UsageError(f"a picture of type {type(given).__name__}: give {KINDS}, or a list of them")


def _frame_of_bytes(content: bytes, name: str, size: tuple[int, int]) -> U8:
    if len(content) > MAX_FILE_BYTES:
        what = f"{name}: more than {MAX_FILE_BYTES} bytes; make the picture smaller"
        raise UndecodableInput(escaped(what), (Path(name),))
    return decode_bytes(content, Path(name), size, suffix=".png")  # the content says what it is
