"""Sources: what puts frames into the queue. One file for each kind holds its settings, opens it and checks it.

Rules of this package:

1. Frames are decoded and resized by device.images.decode alone, so the network sees the very pixels that it saw in
   training.
2. Frames are stamped on arrival, before decoding.
3. Input that gives no frame is counted and skipped. A device that is gone is tried again for ever, with pauses.
4. A source runs in one thread of its own, never in the caller's or the network's.
5. A new kind is one new file and its row in `KINDS`. In the file, `[source]` is one flat table: it may hold keys of
   other kinds, which are checked and ignored, so that you can switch the kind and keep the rest.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field, create_model
from pydantic.fields import FieldInfo

from device.daemon.section import Section
from device.daemon.sources.base import Feed, NoSource, SourceSection
from device.daemon.sources.camera import CameraSource
from device.daemon.sources.folder import FolderSource
from device.daemon.sources.mqtt import MqttSource
from device.daemon.sources.replay import ReplaySource
from device.daemon.sources.running import RunningSource
from device.daemon.sources.serial import SerialSource

__all__ = ["KINDS", "Feed", "NoSource", "RunningSource", "SourceSection", "flat_table", "source_section"]

KINDS: tuple[type[SourceSection], ...] = (
    NoSource,
    FolderSource,
    CameraSource,
    MqttSource,
    SerialSource,
    ReplaySource,
)


def source_section(given: object) -> object:
    """The settings of the kind that the table `given` names. Raises `ValidationError`."""
    if isinstance(given, SourceSection):
        return given
    table = flat_table(KINDS).model_validate(given)
    values = table.model_dump(exclude_unset=True)
    kinds = {_name(kind): kind for kind in KINDS}
    kind = kinds[values.get("kind", _name(KINDS[0]))]
    return kind(**{key: value for key, value in values.items() if key in kind.model_fields})


@cache
def flat_table(kinds: tuple[type[SourceSection], ...]) -> type[Section]:
    """`[source]` as it is in the file: the keys of all `kinds` beside each other, none of them required."""
    names = tuple(map(_name, kinds))
    about = " ".join(f"{_name(kind)}: {kind.__doc__}" for kind in kinds)
    keys: dict[str, Any] = {"kind": (Literal[names], Field(names[0], description=about))}
    own = dict.fromkeys(key for kind in kinds for key in kind.model_fields if key not in SourceSection.model_fields)
    for key in own:
        users = [(_name(kind), kind.model_fields[key]) for kind in kinds if key in kind.model_fields]
        keys[key] = _optional(users[0][1], " ".join(f"{name}: {field.description}" for name, field in users))
    keys |= {key: _optional(SourceSection.model_fields[key]) for key in SourceSection.model_fields if key != "kind"}
    about = "Where frames come from. Relative paths start at the working directory."
    return create_model("FlatSource", __base__=Section, __doc__=about, **keys)


def _name(kind: type[SourceSection]) -> str:
    return str(kind.model_fields["kind"].default)


def _optional(field: FieldInfo, about: str | None = None) -> tuple[Any, Any]:
    default = None if field.is_required() else field.default
    info = Field(default, description=about or field.description, examples=field.examples)
    return Annotated[(field.annotation, *field.metadata, info)], default
