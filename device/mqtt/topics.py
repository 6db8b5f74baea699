"""The topics of a board, `edgeear/v1/{site}/{device}/...`, in one table.

Rules of this file:

1. `TOPICS` alone gives direction, QoS, retain, expiry, outbox class and payload of a topic.
2. Site and device are 1 to 64 letters, digits, `_` and `-`, so that no topic gets a wildcard or a further level.
3. A command's response topic is used only at or below the board's own `response`. The broker's access list allows no
   other, too. So nobody can make a board send commands.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from device.mqtt.messages import (
    COMMANDS,
    PROTOCOL,
    Event,
    LabelRequest,
    Message,
    OutboxClass,
    PredictionMessage,
    Response,
    Status,
    Telemetry,
)
from edgeear.errors import UsageError

MAX_TOPIC: Final = 512
"""Characters of a response topic."""
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
DAY: Final = 86_400


@dataclass(frozen=True)
class Topic:
    """One row. `name`: below the device's prefix; `expiry_s`: MQTT 5's message expiry, None for never (a command's is
    the sender's choice); `cls`: the class in the outbox, None for messages that bypass it; `models`: the payloads, none
    for an image file; `about`: help."""

    name: str
    direction: Literal["up", "down"]
    qos: Literal[0, 1]
    retain: bool
    expiry_s: int | None
    cls: OutboxClass | None
    models: tuple[type[Message], ...]
    about: str

    @property
    def content_type(self) -> str:
        return "application/json" if self.models else "image/jpeg"


STATUS: Final = Topic("status", "up", 1, True, None, None, (Status,), "Birth at each connect, offline as last will.")
TELEMETRY: Final = Topic("telemetry", "up", 1, False, DAY, "telemetry", (Telemetry,), "Summary of a time window.")
EVENT: Final = Topic("event", "up", 1, False, 7 * DAY, "event", (Event,), "Something that happened to the board.")
RESPONSE: Final = Topic("response", "up", 1, False, DAY, "response", (Response,), "Outcome of one command.")
PREDICTION: Final = Topic(
    "prediction",
    "up",
    0,
    False,
    60,
    None,
    (PredictionMessage,),
    "The answer for each frame, if telemetry.predictions is on.",
)
LABEL_REQUEST: Final = Topic(
    "label-request", "up", 1, False, DAY, "frame", (LabelRequest,), "A frame whose class the board asks for."
)
COMMAND: Final = Topic(
    "command/{name}", "down", 1, False, None, None, tuple(COMMANDS.values()), "A command to the board."
)
FRAME: Final = Topic("frame", "down", 0, False, 5, None, (), "A JPEG or PNG file: the next frame of the stream.")
TOPICS: Final = (STATUS, TELEMETRY, EVENT, RESPONSE, PREDICTION, LABEL_REQUEST, COMMAND, FRAME)
_BY_NAME: Final[Mapping[str, Topic]] = {topic.name: topic for topic in TOPICS}


@dataclass(frozen=True)
class Address:
    """A parsed topic: the board, the row of the table, and the name of a `command`."""

    site: str
    device: str
    topic: Topic
    command: str | None = None


def prefix(site: str, device: str) -> str:
    """`edgeear/v1/{site}/{device}`. Raises UsageError for a name that no topic may hold."""
    return f"{PROTOCOL}/{_checked('site', site)}/{_checked('device', device)}"


def topic_of(site: str, device: str, topic: Topic, command: str | None = None) -> str:
    """The full name of `topic` at a board; `command` names the command where `topic` is COMMAND, "+" stands for all."""
    if topic is not COMMAND:
        return f"{prefix(site, device)}/{topic.name}"
    if command != "+" and command not in COMMANDS:
        raise UsageError(f"command {command!r} is not known, choose one of {', '.join(COMMANDS)}")
    return f"{prefix(site, device)}/command/{command}"


def subscriptions(site: str, device: str) -> tuple[tuple[str, int], ...]:
    """The subscriptions of a board: (topic filter, QoS) of every row that goes down."""
    return tuple((topic_of(site, device, row, "+"), row.qos) for row in TOPICS if row.direction == "down")


def match(topic: str) -> Address | None:
    """The row of an incoming `topic`, None for a foreign topic. Unknown commands match, too, so that the board can
    refuse them with a reason."""
    if not topic.startswith(f"{PROTOCOL}/") or len(topic) > MAX_TOPIC:
        return None
    site, device, *rest = (topic[len(PROTOCOL) + 1 :] + "//").split("/", 2)
    name = rest[0][:-2] if rest else ""
    if not _NAME.fullmatch(site) or not _NAME.fullmatch(device):
        return None
    if name.startswith("command/") and "/" not in name[8:]:
        return Address(site, device, COMMAND, name[8:])
    row = _BY_NAME.get(name)
    return Address(site, device, row) if row is not None and row is not COMMAND else None


def may_respond(site: str, device: str, topic: str) -> bool:
    """Whether a board may respond to `topic`, which a command asks for: its own `response`, or a topic below."""
    own = topic_of(site, device, RESPONSE)
    if len(topic) > MAX_TOPIC or not topic.isprintable() or "+" in topic or "#" in topic:
        return False
    return topic == own or (topic.startswith(f"{own}/") and not topic.endswith("/"))


def _checked(what: str, name: str) -> str:
    if not _NAME.fullmatch(name):
        shown = name if len(name) <= 80 else f"{name[:77]}..."
        raise UsageError(f"{what} {shown!r} has other than 1 to 64 of A-Z a-z 0-9 _ -, which topics need: rename it")
    return name
