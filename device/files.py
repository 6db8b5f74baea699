"""Locks, syncs and whole-file writes on a POSIX file system, file names as text, and the place of the cache folder."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from edgeear.errors import EdgeearError, UsageError

TEMPORARY = ".partial-"
"""Prefix of the name of a file that is still being written."""


def escaped(text: object) -> str:
    """`text` with bytes of file names that are not UTF-8 escaped, so that it can be printed, stored and sent.

    Every text that comes from the file system or the command line goes through here where it enters.

    >>> print(escaped("Mu\\udcf1oz.jpg"))
    Mu\\udcf1oz.jpg
    """
    return str(text).encode("utf-8", "backslashreplace").decode()


def take_lock(path: Path, busy: EdgeearError) -> int:
    """Lock the file `path`, which is made if missing. Returns a descriptor that holds the lock until it is closed or
    this process ends. Raises `busy` if the lock is taken, also by another call in this process. It is advisory."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise busy from None
    return descriptor


def sync_folder(folder: Path) -> None:
    """Wait until files made, renamed or removed in `folder` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_dir(environment: Mapping[str, str] | None = None) -> Path:
    """The cache folder, which may not exist yet. A relative `XDG_CACHE_HOME` is ignored, as its standard says."""
    variables = os.environ if environment is None else environment
    if variables.get("EDGEEAR_CACHE"):
        return Path(variables["EDGEEAR_CACHE"]).expanduser().absolute()
    base = Path(variables.get("XDG_CACHE_HOME", ""))
    try:
        return (base if base.is_absolute() else Path.home() / ".cache") / "edgeear"
    except RuntimeError as error:
        raise UsageError("no home directory for the cache: set EDGEEAR_CACHE to a folder") from error


def write_whole(
    path: Path, content: bytes, saving: Callable[[], None] = lambda: None, *, durable: bool = True, mode: int = 0o644
) -> None:
    """Replace `path` by `content` in one step: the old file or the new one, never a part.

    `saving` is called before the new file appears. Without `durable`, a power cut may damage the file.
    """
    descriptor, name = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), mode)
            if durable:
                os.fsync(file.fileno())
        saving()
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)
