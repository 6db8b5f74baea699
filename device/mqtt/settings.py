"""The settings that an operator can change while the board runs: one row for each, used by everyone who needs it.

Rules of this file:

1. A row gives type, range, default and description. Sections of the configuration file inherit the rows, `set-policy`
   has them as optional fields, the board and the daemon read their values from `LiveSettings`.
2. What an operator changed is stored as JSON, without the settings that stand as configured. A stored setting that this
   version does not know, or whose value is out of range, stays in the store for a version that it fits. It has no
   effect and does not stop the start.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from device.mqtt.fields import shown

MIN_LABELS: Final = 5
"""What a calibration needs (edgeear/novelty.py)."""
UNREADABLE: Final = "unreadable"
"""Under this key a stored text that is no JSON object is kept."""


class LiveLearning(BaseModel):
    """Those of the file's section [learning]."""

    labels: int = Field(140, ge=MIN_LABELS, le=100_000, description="Labels asked for after one shift.")
    probation: int = Field(40, ge=1, le=1_000_000, description="Frames before a new generation is confirmed.")
    foreign: float = Field(
        0.5, gt=0, le=1, description="Share of foreign frames on probation that rolls the generation back."
    )
    label_free: bool = Field(True, description="Adapt without labels when none come, where the evidence allows it.")
    label_wait_s: float = Field(86_400.0, ge=0, le=31_536_000, description="Seconds to wait for labels.")


class LiveTelemetry(BaseModel):
    """Those of the file's section [telemetry]."""

    period_s: float = Field(
        60.0,
        ge=1,
        le=86_400,
        description="Seconds that one summary covers.",
        serialization_alias="telemetry_period_s",
    )
    predictions: bool = Field(False, description="Publish every prediction, with QoS 0.")


class LiveSettings(LiveTelemetry, LiveLearning):
    """All of them, each with a value."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def changed(self, changes: Mapping[str, Any]) -> LiveSettings:
        """These settings with `changes`, by their names on the wire, which were checked before."""
        return self.model_copy(update={NAMES[name]: value for name, value in changes.items()})


NAMES: Final = {field.serialization_alias or name: name for name, field in LiveSettings.model_fields.items()}
"""Name on the wire and in the store -> name here."""


def _optional() -> type[BaseModel]:
    rows: dict[str, Any] = {}
    for wire, name in NAMES.items():
        field = LiveSettings.model_fields[name]
        rows[wire] = (field.rebuild_annotation() | None, Field(None, description=field.description))
    return create_model("Changes", **rows)


Changes: Any = _optional()
"""`LiveSettings` as a change: each setting is optional, None where it stays as it is."""


@dataclass(frozen=True)
class Stored:
    """What an operator changed and the board stored: `chosen` has effect; `aside` does not fit this version, and
    `faults` says why, a sentence for each."""

    chosen: Mapping[str, Any]
    aside: Mapping[str, Any]
    faults: tuple[str, ...]

    def with_changes(self, changes: Mapping[str, Any]) -> str:
        """The text to store after `changes`, which replace what stood aside under their names."""
        return json.dumps({**self.aside, **self.chosen, **changes})


def read_stored(text: str | None) -> Stored:
    """The stored settings; `text` None where none were stored. Never raises, whatever the text."""
    try:
        stored = json.loads(text or "{}")
    except (ValueError, RecursionError):
        stored = text
    if not isinstance(stored, dict):
        stored = {UNREADABLE: stored}
    chosen, aside, faults = dict[str, Any](), dict[str, Any](), list[str]()
    for name, value in stored.items():
        why = _fault(name, value)
        (chosen if why is None else aside)[name] = value
        if why is not None:
            faults.append(f"{name} = {shown(value)}: {why}")
    return Stored(chosen, aside, tuple(faults))


def _fault(name: str, value: object) -> str | None:
    if name not in NAMES:
        return "this version does not know it"
    try:
        LiveSettings.model_validate({NAMES[name]: value})
    except ValidationError as error:
        return error.errors(include_url=False)[0]["msg"]
    return None
