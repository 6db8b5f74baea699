"""A bounded folder of features, one safetensors file a row, so that a frozen encoder sees every image once.

Rules of this file:
1. A row's file is named by a digest of all that the row depends on: the image file's content, encoder, view and taps.
2. A row is right or absent. It carries a checksum of its name and values: a damaged or half-written file is a miss.
3. Files take at most `max_bytes`; the least recently used are deleted first, a tenth of the bound at a time.
4. The cache costs time at worst. A disk that is full or cannot be written ends the writing and leaves a sentence in
   `warnings`, never an exception.
5. Any number of processes may share a folder: a file appears under its name whole. Each process may exceed the bound
   by a tenth of it until the next one looks.
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from device.files import TEMPORARY, write_whole
from edgeear.errors import DataError, UsageError

Array = NDArray[Any]

_OURS = re.compile(rf"[0-9a-f]{{64}}\.safetensors|{re.escape(TEMPORARY)}.+")
_UNUSABLE = (OSError, SafetensorError, LookupError, ValueError, TypeError)
"""What reading a missing or damaged file raises."""


class FeatureKey(NamedTuple):
    """What a row holds: `taps` of `view` of the file with SHA-256 `content`."""

    content: bytes
    encoder: str
    view: str
    taps: tuple[str, ...]

    @property
    def file_name(self) -> str:
        """The row's name in the folder."""
        return hashlib.sha256(repr(tuple(self)).encode()).hexdigest() + ".safetensors"


class FeatureCache:
    """The cache in `folder`, which is made when the first row is written."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Delete down to `max_bytes`. Raises `UsageError` for `max_bytes < 1`."""
        if max_bytes < 1:
            raise UsageError(f"max_bytes={max_bytes}: the feature cache needs at least 1 byte")
        self.folder, self.max_bytes = Path(folder), max_bytes
        self.warnings: list[str] = []
        self._evict()

    def get(self, key: FeatureKey) -> Array | None:
        """The row of `key`, float16 or float32; None where there is none."""
        path = self.folder / key.file_name
        try:
            stored = load(path.read_bytes())
            row, checksum = stored["row"], int(stored["crc"][0])
        except _UNUSABLE:
            return None
        if checksum != _checksum(path.name, row):
            return None
        with suppress(OSError):
            os.utime(path)  # used just now
        return row

    def put(self, key: FeatureKey, row: Array) -> None:
        """Store a float16 or float32 array, replacing what is there. A row of over a tenth of the bound is not kept.

        Raises `DataError` for NaN or infinity, `UsageError` for another type.
        """
        if row.dtype not in (np.float16, np.float32):
            raise UsageError(f"features of {key.taps} are {row.dtype}: the cache holds float16 and float32")
        if not np.isfinite(row).all():
            raise DataError(f"features of {key.taps} hold NaN or infinity: check the encoder")
        path, row = self.folder / key.file_name, np.ascontiguousarray(row)
        content = save({"row": row, "crc": np.array([_checksum(path.name, row)], np.uint32)})
        if self.warnings or len(content) > self.max_bytes // 10:
            return
        if len(content) > self._room:
            self._evict()
        self._room -= len(content)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, content, durable=False)
        except FileNotFoundError:
            pass  # another process made room meanwhile, or somebody emptied the folder: this row is lost
        except OSError as error:
            why = error.strerror or error
            self.warnings.append(f"feature cache {self.folder} cannot be written ({why}): this run stores no more")

    def _evict(self) -> None:
        """Delete the least recently used files until a tenth of the bound is free."""
        found: list[tuple[int, str, int]] = []
        with suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(OSError):  # another process may have deleted it
                    if _OURS.fullmatch(entry.name):
                        state = entry.stat()
                        found.append((state.st_mtime_ns, entry.name, state.st_size))
        surplus = sum(size for _, _, size in found) - self.max_bytes * 9 // 10
        for _, name, size in sorted(found):
            if surplus <= 0:
                break
            with suppress(OSError):
                os.unlink(self.folder / name)
            surplus -= size
        self._room = self.max_bytes // 10


def _checksum(name: str, row: Array) -> int:
    """CRC-32 of what a row is and where it belongs."""
    return zlib.crc32(row.tobytes(), zlib.crc32(f"{name} {row.dtype} {row.shape}".encode()))
