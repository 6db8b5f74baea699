"""The folder of cached encoders, whose file names hold the digest of their content.

Rules of this file:

1. The cache is `$EDGEEAR_CACHE`, else `$XDG_CACHE_HOME/edgeear`, else `~/.cache/edgeear`. If you delete it, its files
   are made again.
2. A cached file is named `STEM.SHA256.onnx`. It is used only if its bytes have that digest, so a damaged, partial or
   wrong file is never used.
3. A file is written under a temporary name, synced, then renamed. The next writer removes what a killed process left.
4. Several processes may ask at once: the writer holds a lock, which is released when it ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from device.encoder.file import prepared
from device.files import TEMPORARY, write_whole
from edgeear.errors import DeviceError

DEFAULT_ENCODER = "efficientnet-lite0-v1"
"""Stem of the default encoder's file. A changed graph needs a new version, because its features differ."""


def cached_encoder(cache: Path, stem: str = DEFAULT_ENCODER) -> Path | None:
    """The intact cached file `STEM.SHA256.onnx`, or None. Reads the file once."""
    for path in sorted(cache.glob(f"{stem}.*.onnx")):
        if _intact(path, stem):
            return path
    return None


def prepared_encoder(path: Path, preprocessing: str | None, cache: Path) -> Path:
    """The file `path`, or a cached copy of it that holds `preprocessing` (`metadata.parse_preprocessing`), so that
    every process that opens the file prepares frames alike. Raises as `open_encoder` and `publish_encoder`."""
    if preprocessing is None:
        return path
    content = prepared(path, preprocessing)
    return publish_encoder(cache, f"prepared-{hashlib.sha256(content).hexdigest()[:16]}", lambda: content)


def publish_encoder(
    cache: Path, stem: str, make: Callable[[], bytes], saving: Callable[[], None] = lambda: None
) -> Path:
    """The cached file, made by `make` if there is none. `saving` is called before it appears under its name.

    Raises `DeviceError` where the folder cannot be written, and whatever `make` raises.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache):
            found = cached_encoder(cache, stem)  # another process may have made it while we waited
            if found is not None:
                return found
            _sweep(cache, stem)
            content = make()
            path = cache / f"{stem}.{hashlib.sha256(content).hexdigest()}.onnx"
            write_whole(path, content, saving)
            return path
    except OSError as error:
        what = f"{cache}: cannot keep the encoder there ({error.strerror or error})"
        raise DeviceError(f"{what}; free space or set EDGEEAR_CACHE to another folder") from error


def _intact(path: Path, stem: str) -> bool:
    named = re.fullmatch(re.escape(stem) + r"\.([0-9a-f]{64})\.onnx", path.name)
    try:
        with path.open("rb") as file:
            return named is not None and hashlib.file_digest(file, "sha256").hexdigest() == named[1]
    except OSError:
        return False  # treated as damaged: it is made again


def _sweep(cache: Path, stem: str) -> None:
    """Remove damaged files of `stem` and files that killed writers left. The caller holds the lock."""
    for path in [*cache.glob(f"{stem}.*.onnx"), *cache.glob(f"{TEMPORARY}*")]:
        path.unlink(missing_ok=True)


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    with (cache / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
