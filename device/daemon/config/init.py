"""The file that `edgeear init` writes: every key with its default, its range and what it is for.

Rules of this file:

1. The text is made from the models of settings.py.
2. `#key = value` is a setting at its default; a comment for people begins with `# `. So a board that did not choose a
   value gets the default of the version that it runs. Only the names of site and board are set.
3. An existing file is replaced only on request. The file appears as a whole, readable by its owner alone, because it
   may hold a password.
"""

from __future__ import annotations

import json
import os
import re
import socket
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic.fields import FieldInfo

from device.daemon.config.settings import PREFIX, sections
from device.daemon.section import Section
from device.files import write_whole
from edgeear.errors import DeviceError, UsageError

_INTRODUCTION = f"""\
# edgeear's configuration. `edgeear doctor` checks it, `edgeear run` follows it.
# A line that begins with # and a letter shows a default: remove the # to change it.
# An environment variable {PREFIX}SECTION__KEY wins over the line in this file.
"""


def commented_toml(name: str = "board") -> str:
    """The text of a file of defaults for a board called `name`."""
    tables = ("\n".join(_table(title, model, name)) for title, model in sections().items())
    return "\n\n".join([_INTRODUCTION.rstrip(), *tables]) + "\n"


def write_config(path: Path, force: bool = False) -> None:
    """Write the commented file to `path`, for a board that has this machine's name.

    Raises `UsageError` if the file exists and `force` is false, `DeviceError` if it cannot be written.
    """
    if not force and os.path.lexists(path):
        raise UsageError(f"{path} exists: use --force to replace it")
    try:
        write_whole(path, commented_toml(_host_name()).encode(), mode=0o600)
    except OSError as error:
        raise DeviceError(f"{path}: {error.strerror}; name a file in a folder that you may write to") from error


def _host_name() -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", socket.gethostname().partition(".")[0])[:64].strip("-") or "board"


def _table(title: str, model: type[Section], name: str) -> Iterator[str]:
    yield f"# {model.__doc__}"
    yield f"[{title}]"
    for key, field in model.model_fields.items():
        notes = f"{field.description} {_range(field)}"
        yield from textwrap.wrap(notes.strip(), 100, initial_indent="# ", subsequent_indent="# ")
        chosen = title == "device" and key in ("site", "name")
        value = name if chosen and key == "name" else field.default
        shown = field.examples[0] if value is None and field.examples else value
        yield f"{'' if chosen else '#'}{key} = {_toml(shown)}"


def _range(field: FieldInfo) -> str:
    """The choices or the bounds in words, or that the key has no default."""
    if get_origin(field.annotation) is Literal:
        return f"One of {', '.join(get_args(field.annotation))}."
    low = high = ""
    for rule in field.metadata:
        match rule:
            case Ge(ge=bound):
                low = f"{bound:,}"
            case Gt(gt=bound):
                low = f"above {bound:,}"
            case Le(le=bound):
                high = f"{bound:,}"
    if high:
        return f"({low} to {high})"
    return "(not set)" if field.default is None else ""


def _toml(value: Any) -> str:
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False)
    return str(value).lower() if isinstance(value, bool) else repr(value)
