"""Where a figure of telemetry is shown beside its message: Prometheus, Home Assistant, `edgeear watch`.

A `Measure` is metadata of a field of `messages.Telemetry`, or of a part of it; the field's type is its range and the
field's description its help. The daemon reads the value (loop.py, machine.py, telemetry.py). What is shown elsewhere is
made from these rows, so a new figure needs its row and its reading, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel


@dataclass(frozen=True)
class Sensor:
    """A sensor of Home Assistant: its key, its name and Home Assistant's options for it; a figure that is measured has
    a state class. `digits`: decimals shown."""

    key: str
    name: str
    icon: str | None = None
    unit: str | None = None
    device_class: str | None = None
    measured: bool = True
    diagnostic: bool = False
    digits: int = 2


@dataclass(frozen=True)
class Cell:
    """A column of `edgeear watch`: its heading, its width in characters, a format. Of two columns the one with the
    higher `keep` is kept."""

    heading: str
    width: int
    keep: int
    form: str
    quantile: str | None = None


@dataclass(frozen=True)
class Measure:
    """`gauge` is the name for Prometheus, `scale` what the value is multiplied by for it. A count of frames that were
    not answered has a `loss` instead: its label in `edgeear_dropped_total`."""

    gauge: str | None = None
    scale: float = 1.0
    loss: str | None = None
    sensor: Sensor | None = None
    cell: Cell | None = None


@dataclass(frozen=True)
class Row:
    """One measure: the `path` to its field, such as ("outbox", "depth"), and the field's description."""

    path: tuple[str, ...]
    help: str
    measure: Measure

    def value(self, found: Any) -> Any:
        """The figure in `found`, the value of the path's first field: as it is, or of a part as model or mapping."""
        for name in self.path[1:]:
            found = found[name] if isinstance(found, dict) else getattr(found, name)
        return found


def rows(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[Row]:
    """The measures of a message's fields and of those of its parts, in order."""
    for name, field in model.model_fields.items():
        path = (*above, name)
        yield from (Row(path, field.description or "", m) for m in field.metadata if isinstance(m, Measure))
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from rows(field.annotation, path)
