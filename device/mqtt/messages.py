"""What is said over MQTT, version 1: one model for each payload, and the parser that never raises.

Rules of this file:

1. Every payload is one JSON object with `v: 1`. A field that the model does not name is refused, so is a key given
   twice.
2. Numbers are finite, whole ones fit 53 bits (what every JSON reader keeps exactly). What was not measured is null.
3. Every text, list and object is bounded, and so is the number of values that a payload may hold before it is read:
   no message can be huge, none costs more memory than its own kind may.
4. `(boot, seq)` of a stamp orders all messages of a board and marks a repeated one; `time` is only for people.
5. Input is judged, never trusted: `parse` and `parse_command` give a `Refusal` that names field, value and limit for
   anything that is not a message of this version, with the command's id whenever that can be read.
"""

from __future__ import annotations

import binascii
import json
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final, Literal, NoReturn, Self, TypedDict, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

VERSION: Final = 1
PROTOCOL: Final = "edgeear/v1"
MAX_PAYLOAD: Final = 8 << 20
"""Bytes of any incoming payload."""
MAX_IMAGE: Final = 4 << 20
"""Bytes of an image to infer, before base64."""
MAX_REQUEST_IMAGE: Final = 1 << 20
"""Bytes of an image that a board sends to be labelled, before base64."""
MAX_LABELS: Final = 10_000
MAX_DOMAINS: Final = 256
MAX_PARTS: Final = 4 * MAX_LABELS
"""Commas and brackets of a payload: what bounds the memory that reading it takes."""
MAX_RESULT: Final = 65_536
"""Bytes of the JSON text of a response's result."""
MAX_REASON: Final = 1000
SIGNATURES: Final = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
"""First bytes of a JPEG and of a PNG."""


def _printable(text: str) -> str:
    if not text.isprintable():
        raise PydanticCustomError("printable", "must be printable characters only")
    return text


def _image(most: int) -> Any:
    """Strict base64 of a JPEG or PNG of at most `most` bytes."""
    limit = 4 * math.ceil(most / 3)

    def check(text: str) -> str:
        try:
            data = binascii.a2b_base64(text, strict_mode=True)
        except (ValueError, binascii.Error):
            data = None
        if data is None or binascii.b2a_base64(data[3 * (len(text) // 4 - 1) :], newline=False).decode() != text[-4:]:
            raise PydanticCustomError("base64", "must be base64 with padding and without line breaks")
        if len(data) > most:
            raise PydanticCustomError(
                "image", "must be at most {most} bytes, has {size}", {"most": most, "size": len(data)}
            )
        if not data.startswith(SIGNATURES):
            raise PydanticCustomError("image", "must be a JPEG or PNG file: send one of these")
        return text

    schema: dict[str, JsonValue] = {"contentEncoding": "base64", "contentMediaType": "image/jpeg"}
    return Field(min_length=4, max_length=limit, json_schema_extra=schema), AfterValidator(check)


def _labels(value: object) -> object:
    """The first wrong entry speaks for all, so that ten thousand wrong ones cost no more than one."""
    if not isinstance(value, Mapping):
        return value
    if not 1 <= len(value) <= MAX_LABELS:
        facts = {"most": MAX_LABELS, "size": len(value)}
        raise PydanticCustomError("labels", "must have 1 to {most} entries, has {size}", facts)
    return {_sample(key): _class_name(key, name) for key, name in value.items()}


def _sample(key: object) -> int:
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 16 and str(int(key)) == key:
        key = int(key)
    if type(key) is int and 0 <= key <= MAX_WHOLE:
        return key
    message = "key {key} must be a sample number: decimal digits, 0 to 2^53 - 1"
    raise PydanticCustomError("labels", message, {"key": _short(key)})


def _class_name(key: object, name: object) -> str:
    if isinstance(name, str) and 1 <= len(name) <= 128 and name.isprintable():
        return name
    message = "sample {key}: {name} must be a class name of 1 to 128 printable characters"
    raise PydanticCustomError("labels", message, {"key": _short(key), "name": _short(name)})


MAX_WHOLE: Final = (1 << 53) - 1
Count = Annotated[int, Field(ge=0, le=MAX_WHOLE)]
Whole = Annotated[int, Field(ge=-MAX_WHOLE, le=MAX_WHOLE)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Moment = Annotated[float, Field(ge=0, le=253_402_300_799, allow_inf_nan=False)]
"""Unix seconds, up to the year 9999."""
Name = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_printable)]
"""Of a class, a domain or an encoder."""
Text = Annotated[str, Field(max_length=2000)]
Session = Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")]
_ID: Final = r"^[A-Za-z0-9_.:-]{1,64}$"
CommandId = Annotated[str, Field(pattern=_ID)]
Scalar = Annotated[str, Field(max_length=500)] | Whole | Number | bool | None
Data = Annotated[dict[Annotated[str, Field(min_length=1, max_length=64)], Scalar], Field(max_length=64)]
_SAMPLE_KEYS: Final[dict[str, JsonValue]] = {"propertyNames": {"pattern": "^(0|[1-9][0-9]{0,15})$"}}
Labels = Annotated[
    dict[int, Name],
    Field(min_length=1, max_length=MAX_LABELS, json_schema_extra=_SAMPLE_KEYS),
    BeforeValidator(_labels),
]
Image = Annotated[str, *_image(MAX_IMAGE)]
RequestImage = Annotated[str, *_image(MAX_REQUEST_IMAGE)]
OutboxClass = Literal["telemetry", "frame", "response", "event"]
Phase = Literal["serving", "collecting", "labelling", "learning", "probation"]
EventKind = Literal[
    "start",
    "shift",
    "label-wanted",
    "recognised",
    "search",
    "grown",
    "confirmed",
    "rolled-back",
    "rejected",
    "refused",
    "learning-failed",
    "paused",
    "resumed",
    "policy",
    "forgotten",
    "source",
    "dropped",
    "stopped",
]


class Stamp(TypedDict):
    """What marks a message that went through the outbox: `Event(**stamper(seq, now), kind=...)`."""

    session: str
    boot: int
    seq: int
    time: float


@dataclass(frozen=True)
class Stamper:
    """Makes the stamps of one process: `session` is random for each process start, `boot` rises with each."""

    session: str
    boot: int

    def __call__(self, seq: int, time: float) -> Stamp:
        return Stamp(session=self.session, boot=self.boot, seq=seq, time=time)


def new_session() -> str:
    """A random session id: 16 hexadecimal digits."""
    return secrets.token_hex(8)


def finite(value: float) -> float | None:
    """`value` as a plain float, None where it is no number: novelty is infinite before anything was learned."""
    return float(value) if math.isfinite(value) else None


class Part(BaseModel):
    """Base of everything in a payload."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Message(Part):
    """Base of all payloads."""

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
    """Retained state of a board: sent at each connect; its offline form is the last will, whose time is that of the
    connect."""

    state: Literal["online", "offline"]
    session: Session
    boot: Count
    time: Moment
    version: Annotated[str, Field(min_length=1, max_length=64)]
    encoder: Name
    generation: Count
    protocol: Literal["edgeear/v1"] = PROTOCOL


class Event(_Stamped):
    """Something an operator wants to know. `at` is the sample number of this session that it happened at."""

    kind: EventKind
    text: Text
    at: Count
    generation: Count
    data: Data = {}


class Quantiles(Part):
    """Of the values in a telemetry window."""

    p50: Amount
    p90: Amount
    p99: Amount


class OutboxReport(Part):
    """What waits for the broker; `dropped` counts messages by class since the outbox was made."""

    depth: Count
    bytes: Count
    oldest_s: Amount | None
    dropped: dict[OutboxClass, Count] = {}


class Telemetry(_Stamped):
    """Summary of the window from `from_time` to `to_time`: counts of that window, and the state at its end."""

    from_time: Moment
    to_time: Moment
    frames: Count
    dropped: Count
    stale: Count
    undecodable: Count
    ood: Count
    abstained: Count
    novelty: Quantiles | None
    latency_ms: Quantiles | None
    routes: Annotated[dict[Name, Count], Field(max_length=MAX_DOMAINS)]
    phase: Phase
    paused: bool = False
    generation: Count
    temperature_c: Number | None
    rss_mb: Amount
    cpu_share: Amount
    outbox: OutboxReport
    refused_messages: Count


class PredictionMessage(Message):
    """The answer for one frame, `at` its sample number. `label` is null where the board abstained."""

    session: Session
    boot: Count
    at: Count
    time: Moment
    generation: Count
    label: Name | None
    score: Number | None = None
    route: Name | None
    novelty: Amount | None
    p: Share
    ood: bool
    ref: Annotated[str, Field(max_length=500)] | None = None


class LabelRequest(_Stamped):
    """A frame whose class the board wants to know: answer with the command `label`, this session and this `at`.
    `guess` and `route` are the board's own idea, `until` is when it stops waiting."""

    at: Count
    image: RequestImage
    guess: Name | None
    route: Name | None
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


class _Command(Message):
    """`id` makes a command happen once however often it arrives; after `expires` (unix seconds) it is refused."""

    name: ClassVar[str]
    id: CommandId
    expires: Moment | None = None


class Infer(_Command):
    """Predict for this image; the stream and its detector do not see it."""

    name: ClassVar[str] = "infer"
    image: Image

    @property
    def image_bytes(self) -> bytes:
        """The JPEG or PNG file, not decoded to a picture."""
        return binascii.a2b_base64(self.image)


class Label(_Command):
    """Class names of frames by sample number, which count within a session."""

    name: ClassVar[str] = "label"
    session: Session
    labels: Labels
    domain: Name | None = None


class Adapt(_Command):
    """Adapt to what was just seen, without waiting for a shift."""

    name: ClassVar[str] = "adapt"
    domain: Name | None = None


class Rollback(_Command):
    """Back to the generation before the serving one."""

    name: ClassVar[str] = "rollback"


class Confirm(_Command):
    """Make the generation on probation permanent."""

    name: ClassVar[str] = "confirm"


class Pause(_Command):
    """Stop, or go on with, learning; predictions never stop."""

    name: ClassVar[str] = "pause"
    paused: bool


class SetPolicy(_Command):
    """Settings that survive restarts; at least one."""

    name: ClassVar[str] = "set-policy"
    labels: Annotated[int, Field(ge=8, le=MAX_LABELS)] | None = None
    probation: Annotated[int, Field(ge=1, le=100_000)] | None = None
    foreign: Share | None = None
    label_free: bool | None = None
    label_wait_s: Annotated[float, Field(ge=0, le=30 * 86_400, allow_inf_nan=False)] | None = None
    telemetry_period_s: Annotated[float, Field(ge=1, le=86_400, allow_inf_nan=False)] | None = None
    predictions: bool | None = None

    @property
    def settings(self) -> dict[str, int | float | bool]:
        """What is to change: setting -> value."""
        return self.model_dump(exclude_none=True, exclude={"v", "id", "expires"})

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.settings:
            names = ", ".join(key for key in type(self).model_fields if key not in _Command.model_fields)
            raise PydanticCustomError("settings", "sets nothing: give at least one of {names}", {"names": names})
        return self


class Report(_Command):
    """Describe the board: domains, generations, settings."""

    name: ClassVar[str] = "report"


class Forget(_Command):
    """Forget a domain, or one class of it."""

    name: ClassVar[str] = "forget"
    domain: Name
    label: Name | None = None


Command = Infer | Label | Adapt | Rollback | Confirm | Pause | SetPolicy | Report | Forget
COMMANDS: Final[Mapping[str, type[Command]]] = {
    model.name: model for model in (Infer, Label, Adapt, Rollback, Confirm, Pause, SetPolicy, Report, Forget)
}


@dataclass(frozen=True)
class Refusal:
    """Why a payload was not taken; `id` is the command's, None where none could be read."""

    id: str | None
    reason: str

    def response(self, stamp: Stamp, command: str) -> Response:
        """What to answer whoever sent `command`."""
        return Response(**stamp, id=self.id, command=_bare(command), outcome="refused", reason=self.reason)


M = TypeVar("M", bound=Message)


def parse_command(name: str, payload: bytes) -> Command | Refusal:
    """The command `name` that `payload` holds. Never raises, whatever the bytes."""
    model = COMMANDS.get(name)
    if model is None:
        known = ", ".join(COMMANDS)
        return Refusal(_readable_id(payload), f"command {_short(name)} is not known; this board takes {known}")
    return parse(model, payload)


def parse(model: type[M], payload: bytes) -> M | Refusal:
    """The message that `payload` holds, or why it holds none. Never raises, whatever the bytes."""
    try:
        fields = _read(payload)
    except ValueError as error:
        return Refusal(None, str(error))
    identity, reason = _id_of(fields), _mismatch(model, fields)
    if reason is None:
        try:
            return model.model_validate_json(payload)
        except ValidationError as error:
            reason = _reason(error)
    return Refusal(identity, reason[:MAX_REASON])


def _read(payload: bytes) -> dict[str, object]:
    """The fields of a payload. Raises ValueError, with the reason as its text, for anything but one JSON object."""
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"payload of {len(payload)} bytes, at most {MAX_PAYLOAD} are taken: send less in one message")
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
        raise ValueError(f"payload must be a JSON object, got {_short(fields)}")
    return fields


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields: dict[str, object] = {}
    for key, value in pairs:
        if key in fields:
            raise ValueError(f"key {_short(key)} is given twice: give each once")
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
        return _id_of(_read(payload))
    except ValueError:
        return None


def _id_of(fields: Mapping[str, object]) -> str | None:
    identity = fields.get("id")
    return identity if isinstance(identity, str) and re.fullmatch(_ID[1:-1], identity) else None


def _mismatch(model: type[Message], fields: Mapping[str, object]) -> str | None:
    """What is wrong with the version or the names of the fields."""
    version = fields.get("v", VERSION)
    if type(version) is not int or version != VERSION:
        return f"v is {_short(version)}: this board speaks version {VERSION}"
    unknown = [key for key in fields if key not in model.model_fields]
    if unknown:
        known = ", ".join(model.model_fields)
        return f"field {_short(unknown[0])} is not known; known are {known}"
    return None


def _reason(error: ValidationError) -> str:
    """One sentence: field, what it must be, what it was."""
    first, *rest = error.errors(include_url=False)
    where = ".".join(_bare(part) for part in first["loc"])
    told = f"{where}: {first['msg']}" if where else first["msg"]
    if first["type"] == "json_invalid":
        return f"payload is not JSON: {first['ctx']['error']}"
    if first["type"] not in ("missing", "settings", "result", "labels", "image", "base64"):
        told += f", got {_short(first['input'])}"
    return f"{told} (and {len(rest)} more)" if rest else told


def _bare(part: object) -> str:
    return str(part).encode("ascii", "backslashreplace").decode()[:64]


def _short(value: object) -> str:
    """`value` for a person, in at most 60 characters that any encoding can carry."""
    if isinstance(value, str):
        value = value[:60]
    elif isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    elif isinstance(value, int) and abs(value) > MAX_WHOLE:
        return "a whole number beyond 2^53"
    return ascii(value)[:60]
