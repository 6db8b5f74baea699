"""What a class or a domain may be called."""

from __future__ import annotations

from typing import Final

from edgeear.errors import UsageError

MAX_NAME: Final = 128


def is_name(text: str) -> bool:
    """Whether `text` has 1 to 128 characters, all of them printable."""
    return 1 <= len(text) <= MAX_NAME and text.isprintable()


def check_name(name: object) -> None:
    """Raises `UsageError` unless `name` is a str of 1 to 128 printable characters, not only spaces."""
    if not (isinstance(name, str) and is_name(name) and name.strip()):
        raise UsageError(f"name {ascii(name)[:60]}: give 1 to {MAX_NAME} printable characters, not only spaces")
