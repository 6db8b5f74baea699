"""The MQTT messages, version 1: one model for each payload, and a parser that never raises.

Rules of this file:

1. Every payload is one JSON object with `v: 1`. An unknown field and a repeated key are refused.
2. What was not measured is null. Every field is bounded (fields.py).
3. Size and number of values of a payload are checked before it is parsed, so that no payload costs more time or memory
   than its kind may.
4. `(boot, seq)` of a stamp orders all messages of a board and marks repeated ones; `time` is for people only.
5. `parse` and `parse_command` return a `Refusal` for anything that is not a message of this version. It names field,
   value and limit, and the command's id where that can be read.
"""

from __future__ import annotations

import binascii
import hashlib
import json
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final, Literal, NoReturn, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from device.mqtt.fields import (
    ID,
    MAX_DOMAINS,
    MAX_LABELS,
    Amount,
    CommandId,
    Count,
    Data,
    Image,
    Known,
    Labels,
    Moment,
    Name,
    Number,
    RequestImage,
    Session,
    Share,
    Text,
    shown,
)
from device.mqtt.measures import Cell, Measure, Sensor, rows
from device.mqtt.settings import NAMES, Changes

VERSION: Final = 1
PROTOCOL: Final = "edgeear/v1"
MAX_PAYLOAD: Final = 8 << 20
"""Bytes of the largest payload of any kind; most kinds take far less (`limit`)."""
SMALL: Final = 16 << 10
"""Bytes of a command that carries neither image nor labels."""
MAX_PARTS: Final = 4 * MAX_LABELS
"""Commas and brackets of a payload; they bound the memory that parsing takes."""
MAX_RESULT: Final = 65_536
"""Bytes of the JSON text of a response's result."""
MAX_REASON: Final = 1000


OutboxClass = Literal["telemetry", "frame", "response", "event"]
"""In the order in which the outbox drops them."""
Phase = Literal["serving", "collecting", "labelling", "learning", "probation"]
EventKind = Literal[
    "start", "shift", "label-wanted", "recognised", "search", "grown", "confirmed", "rolled-back",
    "store-damaged", "rejected", "refused", "frame-refused", "learning-failed", "paused", "resumed", "policy",
    "settings-ignored", "forgotten", "source", "dropped", "stopped", "too-few-scenes",
]  # fmt: skip


@dataclass(frozen=True)
class Stamper:
    """Makes the stamps of one process, `Event(**stamper(seq, now), kind=...)`: `session` is random for each process
    start, `boot` rises with each."""

    session: str
    boot: int

    def __call__(self, seq: int, time: float) -> dict[str, Any]:
        return {"session": self.session, "boot": self.boot, "seq": seq, "time": time}


def new_session() -> str:
    """A random session id: 16 hexadecimal digits."""
    return secrets.token_hex(8)


def finite(value: float) -> float | None:
    """`value` as a float, None where it is not finite: novelty is infinite before anything was learned."""
    return float(value) if math.isfinite(value) else None


class Part(BaseModel):
    """Base of everything in a payload."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Message(Part):
    """Base of all payloads; `limit` is the most bytes of one."""

    limit: ClassVar[int] = 2 << 20
    v: Literal[1] = VERSION

    def payload(self) -> bytes:
        """The JSON text that goes over the wire."""
        return self.model_dump_json().encode()


class _Stamped(Message):
    session: Session
    boot: Count
    seq: Count
    time: Moment


class Status(Message):
    """Retained state of a board, sent at each connect. The offline form is the last will; its time is that of the
    connect."""

    state: Literal["online", "offline"]
    session: Session
    boot: Count
    time: Moment
    version: Annotated[str, Field(min_length=1, max_length=64)]
    encoder: Known
    generation: Count
    protocol: Literal["edgeear/v1"] = PROTOCOL


class Event(_Stamped):
    """Something that happened to a board, at the sample number `at` of this session."""

    kind: EventKind
    text: Text
    at: Count
    generation: Count
    data: Data = {}


class Quantiles(Part):
    """Of the values in a telemetry window."""

    p50: Number
    p90: Number
    p99: Number


class OutboxReport(Part):
    """What waits for the broker."""

    depth: Annotated[
        Count,
        Measure(gauge="outbox_depth", sensor=Sensor("outbox", "Outbox depth", "mdi:tray-full", diagnostic=True)),
    ] = Field(description="Messages that the broker has not acknowledged.")
    bytes: Annotated[Count, Measure(gauge="outbox_bytes")] = Field(description="Bytes of their payloads.")
    oldest_s: Amount | None = Field(description="Age of the oldest in seconds, null for none.")
    dropped: dict[OutboxClass, Count] = Field({}, description="Messages dropped since the outbox was made, by class.")


class Telemetry(_Stamped):
    """Summary of the window from `from_time` to `to_time`: counts of that window, and the state at its end. A field's
    type is its range, its description its help; a `Measure` says where else it is shown."""

    from_time: Moment = Field(description="Start of the window, unix seconds.")
    to_time: Moment = Field(description="End of the window, unix seconds.")
    frames: Annotated[Count, Measure(sensor=Sensor("frames", "Frames", "mdi:image-multiple-outline"))] = Field(
        description="Frames that were answered."
    )
    dropped: Annotated[Count, Measure(loss="queue")] = Field(description="Frames dropped because the queue was full.")
    stale: Annotated[Count, Measure(loss="stale")] = Field(description="Frames dropped because they were too old.")
    undecodable: Annotated[Count, Measure(loss="undecodable")] = Field(description="Inputs that gave no usable frame.")
    ood: Annotated[Count, Measure(sensor=Sensor("ood", "Frames out of distribution", "mdi:help-rhombus-outline"))] = (
        Field(description="Frames found out of distribution.")
    )
    abstained: Count = Field(description="Frames that no head answered.")
    novelty: Annotated[
        Quantiles | None,
        Measure(
            sensor=Sensor("novelty", "Novelty", "mdi:eye-outline", digits=3),
            cell=Cell("novelty", 7, 1, ".2f", quantile="p50"),
        ),
    ] = Field(description="Novelty to the best domain; null before anything is learned.")
    latency_ms: Annotated[
        Quantiles | None,
        Measure(
            sensor=Sensor("latency", "Latency", "mdi:timer-outline", unit="ms"),
            cell=Cell("p99 ms", 6, 3, ".1f", quantile="p99"),
        ),
    ] = Field(description="From frame to answer, milliseconds.")
    routes: Annotated[dict[Known, Count], Field(max_length=MAX_DOMAINS)] = Field(
        description="Frames answered by each domain's head, of the most frequent domains."
    )
    phase: Annotated[Phase, Measure(sensor=Sensor("phase", "Phase", "mdi:state-machine", measured=False))] = Field(
        description="What the board is doing."
    )
    paused: bool = Field(False, description="Whether learning is paused.")
    generation: Annotated[
        Count,
        Measure(gauge="generation", sensor=Sensor("generation", "Generation", "mdi:source-branch", measured=False)),
    ] = Field(description="The generation that serves.")
    temperature_c: Annotated[
        Number | None,
        Measure(
            gauge="temperature_celsius",
            sensor=Sensor("temperature", "Temperature", unit="°C", device_class="temperature", diagnostic=True),
            cell=Cell("°C", 3, 1, ".0f"),
        ),
    ] = Field(description="Temperature of the board, degrees Celsius; none where it has no sensor.")
    rss_mb: Annotated[Amount, Measure(gauge="rss_bytes", scale=2**20, cell=Cell("MiB", 5, 0, ".0f"))] = Field(
        description="Resident memory of the inference process."
    )
    cpu_share: Amount = Field(description="Share of one core that the process used; above 1 with several threads.")
    outbox: OutboxReport = Field(description="What waits for the broker.")
    refused_messages: Count = Field(description="Messages that were no command or came too late.")


MEASURES: Final = tuple(rows(Telemetry))
"""Every figure that is shown beside the message."""


class PredictionMessage(Message):
    """The answer for one frame, `at` its sample number. `score` is the probability of the class `label`; both are null
    where the board abstained."""

    session: Session
    boot: Count
    at: Count
    time: Moment
    generation: Count
    label: Known | None
    score: Number | None = None
    route: Known | None
    novelty: Number | None
    p: Share
    ood: bool
    ref: Annotated[str, Field(max_length=500)] | None = None


class LabelRequest(_Stamped):
    """A frame whose class the board asks for: answer with the command `label`, this session and this `at`.
    `guess` is the class that the board predicted, `route` the domain that answered, null where it abstained; `until` is
    when it stops waiting."""

    at: Count
    image: RequestImage
    guess: Known | None = None
    route: Known | None = None
    until: Moment | None = None

    @property
    def image_bytes(self) -> bytes:
        return binascii.a2b_base64(self.image)


class Response(_Stamped):
    """The outcome of one command. `refused`: nothing was done, `reason` says why; `failed`: the board could not."""

    id: CommandId | None
    command: Annotated[str, Field(max_length=64)]
    outcome: Literal["ok", "refused", "failed"]
    reason: Annotated[str, Field(max_length=MAX_REASON)] | None = None
    result: dict[Annotated[str, Field(max_length=128)], JsonValue] = {}

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        try:
            size = len(json.dumps(self.result, allow_nan=False, ensure_ascii=False).encode())
        except (ValueError, RecursionError):
            raise PydanticCustomError("result", "result must be JSON with finite numbers") from None
        if size > MAX_RESULT:
            raise PydanticCustomError(
                "result", "result must be at most {most} bytes of JSON, has {size}", {"most": MAX_RESULT, "size": size}
            )
        return self


class Command(Message):
    """`id` makes a command happen once however often it arrives; after `expires` (unix seconds) it is refused. The
    docstring of each command is its help text, its class gives the `name`: `SetPolicy` is "set-policy"."""

    limit: ClassVar[int] = SMALL
    name: ClassVar[str]
    id: CommandId
    expires: Moment | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.name = re.sub("(?<=[a-z])(?=[A-Z])", "-", cls.__name__).lower()

    @property
    def digest(self) -> bytes:
        """SHA-256 of what the command asks for: its name and every field with a value of its own, apart from `id` and
        `expires`. So a command that is sent again with a later `expires` has the same."""
        asked = self.model_dump(mode="json", exclude={"id", "expires"}, exclude_defaults=True)
        return hashlib.sha256(json.dumps([self.name, asked], sort_keys=True).encode()).digest()

    @classmethod
    def help(cls) -> str:
        """What the command does, in one line."""
        return " ".join((cls.__doc__ or "").split())

    @classmethod
    def usage(cls) -> str:
        """The fields that belong to this command, those that may be left out in brackets."""
        own = [(name, field) for name, field in cls.model_fields.items() if name not in Command.model_fields]
        return " ".join(name if field.is_required() else f"[{name}]" for name, field in own)


class Infer(Command):
    """Predict for one picture, JPEG or PNG; the stream and its detector do not see it."""

    limit: ClassVar[int] = 6 << 20
    image: Image

    @property
    def image_bytes(self) -> bytes:
        """The JPEG or PNG file, not decoded to a picture."""
        return binascii.a2b_base64(self.image)


class Label(Command):
    """Give class names to frames, by the sample numbers and the session of their label requests. `domain` names what is
    new."""

    limit: ClassVar[int] = MAX_PAYLOAD
    session: Session
    labels: Labels
    domain: Name | None = None


class Adapt(Command):
    """Learn from what is being seen, without waiting for a shift. While labels are awaited: from those that came. The
    name of a known domain learns that one anew."""

    domain: Name | None = None


class Rollback(Command):
    """Undo the generation on probation: the one before it serves again."""


class Confirm(Command):
    """Make the generation on probation permanent."""


class Pause(Command):
    """Stop learning, or go on; predictions never stop. It survives restarts."""

    paused: bool


class SetPolicy(Changes, Command):  # type: ignore[misc]
    """Change at least one setting; it survives restarts."""

    @property
    def settings(self) -> dict[str, int | float | bool]:
        """What is to change: setting -> value."""
        return self.model_dump(exclude_none=True, include=set(NAMES))

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.settings:
            names = ", ".join(NAMES)
            raise PydanticCustomError("settings", "sets nothing: give at least one of {names}", {"names": names})
        return self


class Report(Command):
    """Describe the board: domains, phase, session, settings, outbox, source."""


class Forget(Command):
    """Forget a domain, or one class of it, in every stored generation. There is no way back."""

    domain: Name
    label: Name | None = None


COMMANDS: Final[Mapping[str, type[Command]]] = {
    model.name: model for model in (Infer, Label, Adapt, Rollback, Confirm, Pause, SetPolicy, Report, Forget)
}
"""Every command by its name. What each does stands in device/daemon/commands.py."""


@dataclass(frozen=True)
class Refusal:
    """Why a payload is refused; `id` is the command's, None where it cannot be read."""

    id: str | None
    reason: str

    def response(self, stamp: dict[str, Any], command: str) -> Response:
        """The response to the sender of `command`."""
        return Response(**stamp, id=self.id, command=_bare(command), outcome="refused", reason=self.reason)


M = TypeVar("M", bound=Message)


def parse_command(name: str, payload: bytes) -> Command | Refusal:
    """The command `name` in `payload`. Never raises, whatever the bytes."""
    model = COMMANDS.get(name)
    if model is None:
        known = ", ".join(COMMANDS)
        return Refusal(_readable_id(payload), f"command {shown(name)} is not known; this board takes {known}")
    return parse(model, payload)


def parse(model: type[M], payload: bytes) -> M | Refusal:
    """The message in `payload`, or why it is none. Never raises, whatever the bytes."""
    try:
        fields = _read(payload, model.limit)
    except ValueError as error:
        return Refusal(None, str(error))
    identity, reason = _id_of(fields), _mismatch(model, fields)
    if reason is None:
        try:
            return model.model_validate_json(payload)
        except ValidationError as error:
            reason = _reason(error)
    return Refusal(identity, reason[:MAX_REASON])


def _read(payload: bytes, limit: int) -> dict[str, object]:
    """The fields of a payload of at most `limit` bytes. Raises ValueError with the reason where it is not one JSON
    object."""
    if len(payload) > limit:
        raise ValueError(f"payload of {len(payload)} bytes, at most {limit} are taken: send less in one message")
    parts = payload.count(b",") + payload.count(b"[") + payload.count(b"{")
    if parts > MAX_PARTS:
        raise ValueError(f"payload has {parts} commas and brackets, at most {MAX_PARTS} are taken: split it")
    try:
        fields = json.loads(payload.decode(), object_pairs_hook=_unique, parse_int=_whole, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise ValueError(f"payload is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"payload is not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise ValueError("payload is nested too deeply: a message has at most 3 levels") from None
    if not isinstance(fields, dict):
        raise ValueError(f"payload must be a JSON object, got {shown(fields)}")
    return fields


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields: dict[str, object] = {}
    for key, value in pairs:
        if key in fields:
            raise ValueError(f"key {shown(key)} is given twice: give each once")
        fields[key] = value
    return fields


def _whole(text: str) -> int:
    if len(text) > 17:
        raise ValueError(f"a whole number of {len(text)} digits: at most 2^53 - 1 is taken")
    return int(text)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number: leave out or send null what was not measured")


def _readable_id(payload: bytes) -> str | None:
    try:
        return _id_of(_read(payload, SMALL))
    except ValueError:
        return None


def _id_of(fields: Mapping[str, object]) -> str | None:
    identity = fields.get("id")
    return identity if isinstance(identity, str) and re.fullmatch(ID[1:-1], identity) else None


def _mismatch(model: type[Message], fields: Mapping[str, object]) -> str | None:
    """The fault of the version or of a field's name."""
    version = fields.get("v", VERSION)
    if type(version) is not int or version != VERSION:
        return f"v is {shown(version)}: this board speaks version {VERSION}"
    unknown = [key for key in fields if key not in model.model_fields]
    if unknown:
        known = ", ".join(model.model_fields)
        return f"field {shown(unknown[0])} is not known; known are {known}"
    return None


def _reason(error: ValidationError) -> str:
    """One sentence: the field, what it must be, what it was."""
    first, *rest = error.errors(include_url=False)
    where = ".".join(_bare(part) for part in first["loc"])
    told = f"{where}: {first['msg']}" if where else first["msg"]
    if first["type"] == "json_invalid":
        return f"payload is not JSON: {first['ctx']['error']}"
    if first["type"] not in ("missing", "settings", "result", "labels", "image", "base64"):
        told += f", got {shown(first['input'])}"
    return f"{told} (and {len(rest)} more)" if rest else told


def _bare(part: object) -> str:
    return str(part).encode("ascii", "backslashreplace").decode()[:64]
