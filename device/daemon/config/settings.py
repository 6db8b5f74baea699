"""The daemon's configuration: a TOML file and the environment, checked as a whole before anything starts.

Rules of this file:

1. Every key has a default, a range and a sentence; `edgeear init` writes its file from these (init.py). The keys of
   `[source]` belong to the kinds of sources (device.daemon.sources).
2. The environment wins over the file: `EDGEEAR_SECTION__KEY`, in upper or lower case; an empty variable counts as not
   set. Variables without `__`, such as `EDGEEAR_CACHE`, are ignored.
3. An error lists all faults, one a line: `section.key = value: limit, remedy`. An unknown key is a fault.
4. No message and no repr shows a secret, nor the value of an unknown key, which may be a misspelt secret.
"""

from __future__ import annotations

import codecs
import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, SecretStr, SerializeAsAny, ValidationError, model_validator
from pydantic_core import ErrorDetails

from device.daemon import sources
from device.daemon.section import HomePath, Section, checked
from device.daemon.sources import NoSource, SourceSection, source_section
from device.mqtt.settings import LiveLearning, LiveSettings, LiveTelemetry
from device.redaction import redacted
from edgeear.errors import UsageError

PREFIX = "EDGEEAR_"
MAX_FILE_BYTES = 1 << 20

_NAME = r"^[A-Za-z0-9_-]{1,64}$"
_HOST = r"^[^\s/@]{1,253}$"


class DeviceSection(Section):
    """The name of this board, and where it keeps what it learned."""

    site: str = Field("site", pattern=_NAME, description="The site, in every topic: letters, digits, _ and -.")
    name: str = Field("board", pattern=_NAME, description="This board. Unique in its site.")
    state: HomePath = Field(Path("edgeear-state"), description="Folder of all state: generations, outbox, ledger.")
    encoder: HomePath | None = Field(
        None,
        description="ONNX file of the frozen encoder; without it, the built-in one from the cache.",
        examples=["/usr/share/edgeear/encoder.onnx"],
    )
    preprocessing: str | None = Field(
        None,
        description="How frames become the encoder's input, for a file that does not say it: HEIGHTxWIDTH, imagenet, "
        "mean=R,G,B std=R,G,B of pixels in [0, 1], BGR, NHWC.",
        examples=["224x224 imagenet"],
    )
    threads: int = Field(1, ge=1, le=64, description="Threads of the encoder.")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Seed of all randomness in learning.")

    @property
    def store(self) -> Path:
        """The folder of generations (device.state.store)."""
        return self.state / "store"

    @property
    def outbox(self) -> Path:
        """The database of the outbox and the ledger (device.mqtt.outbox)."""
        return self.state / "outbox.db"


class MqttSection(Section):
    """The broker. TLS is on if `tls` or `ca` is set."""

    enabled: bool = Field(True, description="Whether this board connects to a broker.")
    host: str = Field("localhost", pattern=_HOST, description="Name or address of the broker.")
    port: int = Field(1883, ge=1, le=65535, description="8883 is usual with TLS.")
    protocol: Annotated[Literal["5", "3.1.1"], BeforeValidator(lambda given: "5" if given == 5 else given)] = Field(
        "5", description="MQTT version; 3.1.1 has no message expiry and no response topics."
    )
    username: str | None = Field(None, min_length=1, description="Name at the broker.", examples=["board"])
    password: SecretStr | None = Field(
        None, description="Rather set EDGEEAR_MQTT__PASSWORD, so that it is not in this file.", examples=["change me"]
    )
    tls: bool = Field(False, description="Use TLS, and trust the authorities that this system trusts.")
    ca: HomePath | None = Field(
        None,
        description="Use TLS, and trust only the authority in this PEM file.",
        examples=["/etc/edgeear/ca.pem"],
    )
    cert: HomePath | None = Field(
        None, description="PEM file of this board's certificate.", examples=["/etc/edgeear/board.pem"]
    )
    key: HomePath | None = Field(
        None, description="PEM file of its key, readable by this user only.", examples=["/etc/edgeear/board.key"]
    )
    keepalive_s: int = Field(60, ge=5, le=3600, description="MQTT keep-alive in seconds.")
    session_expiry_s: int = Field(
        604_800,
        ge=0,
        le=2**32 - 1,
        description="Seconds for which the broker keeps commands for an offline board.",
    )
    receive_maximum: int = Field(
        32, ge=1, le=65535, description="Commands sent to the board and not yet acknowledged, at most."
    )
    inflight: int = Field(
        128, ge=1, le=65535, description="Messages sent by the board and not yet acknowledged, at most."
    )
    discovery: bool = Field(False, description="Announce this board to Home Assistant.")

    @property
    def secure(self) -> bool:
        """Whether TLS is on."""
        return self.tls or self.ca is not None

    @model_validator(mode="after")
    def _credentials_are_whole(self) -> Self:
        faults = []
        if self.password is not None and self.username is None:
            faults.append("username = (not set): mqtt.password is; set both or none")
        if (self.cert is None) != (self.key is None):
            missing = "cert" if self.cert is None else "key"
            faults.append(f"{missing} = (not set): certificate and key belong together; set both or none")
        if self.cert is not None and not self.secure:
            faults.append("tls = False: mqtt.cert is set; set mqtt.ca, or tls = true")
        return checked(self, faults)


class LearningSection(LiveLearning, Section):
    """When and how the board adapts. Adapting needs the `learn` extra; predicting does not."""

    enabled: bool = Field(True, description="Whether this board adapts by itself.")
    label_requests: bool = Field(True, description="Publish the frames whose labels are wanted.")
    budget: Literal["small", "medium", "large"] = Field("medium", description="Upper limits of a head.")
    specs: int = Field(300, ge=1, le=100_000, description="Number of heads that a search scores.")
    time_limit_s: float = Field(1800.0, ge=1, le=604_800, description="Seconds after which learning is stopped.")
    memory_limit_mb: int = Field(1200, ge=256, le=1_048_576, description="Memory above which learning is stopped.")
    nice: int = Field(19, ge=0, le=19, description="Niceness of the learning process: 19 is the lowest priority.")


class TelemetrySection(LiveTelemetry, Section):
    """What the board publishes by itself."""


class OutboxSection(Section):
    """Limits of the messages that wait on disk for the broker. The least important are dropped first."""

    max_mb: int = Field(64, ge=1, le=1_048_576, description="Megabytes of all messages.")
    max_count: int = Field(200_000, ge=100, le=100_000_000, description="Number of messages.")
    max_age_s: float = Field(604_800.0, ge=60, le=315_360_000, description="Age of a message in seconds.")


class MetricsSection(Section):
    """Prometheus metrics, on the loopback address only (127.0.0.1)."""

    port: int = Field(0, ge=0, le=65535, description="TCP port; 0: off.")


class Config(Section):
    """The whole configuration, frozen. `load_config` makes one from a file and the environment."""

    device: DeviceSection = Field(default_factory=DeviceSection)
    source: Annotated[SerializeAsAny[SourceSection], BeforeValidator(source_section)] = Field(default_factory=NoSource)
    mqtt: MqttSection = Field(default_factory=MqttSection)
    learning: LearningSection = Field(default_factory=LearningSection)
    telemetry: TelemetrySection = Field(default_factory=TelemetrySection)
    outbox: OutboxSection = Field(default_factory=OutboxSection)
    metrics: MetricsSection = Field(default_factory=MetricsSection)

    @property
    def live(self) -> LiveSettings:
        """The settings that `set-policy` can change, as configured."""
        learning = self.learning.model_dump(include=set(LiveLearning.model_fields))
        return LiveSettings(**learning, **self.telemetry.model_dump(include=set(LiveTelemetry.model_fields)))

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Self:
        orphan = self.source.kind == "mqtt" and not self.mqtt.enabled
        fault = "source.kind = 'mqtt': mqtt.enabled is false; enable it, or choose another source.kind"
        return checked(self, [fault] if orphan else [])


def sections() -> dict[str, type[Section]]:
    """The tables of the file, in order: name -> model. `[source]` holds the keys of every kind."""
    models: dict[str, Any] = {name: field.annotation for name, field in Config.model_fields.items()}
    return models | {"source": sources.flat_table(sources.KINDS)}


def load_config(path: Path | None, env: Mapping[str, str] | None = None) -> Config:
    """The configuration of the file at `path`, if any, under that of `env` (the process environment when None).

    Raises `UsageError` that lists every fault, with the line of a syntax error.
    """
    variables = os.environ if env is None else env
    table = {} if path is None else _read_toml(path)
    own = {name.upper(): value for name, value in variables.items() if name.upper().startswith(PREFIX) and "__" in name}
    merged, faults = _merged(table, own)
    try:
        config = Config(**merged)
    except ValidationError as error:
        faults += [line for detail in error.errors(include_url=False) for line in _faults(detail, own)]
    if faults:
        where = "the environment" if path is None else str(path)
        raise UsageError("\n  ".join([f"{where}: {len(faults)} fault{'s' * (len(faults) > 1)}", *faults]))
    return config


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise UsageError(f"{path}: more than {MAX_FILE_BYTES} bytes; is it the right file?")
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # as Windows editors save
            text = data.decode("utf-16")
        else:
            text = data.decode("utf-8-sig")
        if "\0" in text:
            line = text[: text.index("\0")].count("\n") + 1
            raise UsageError(f"{path}: line {line} holds a zero byte; save the file as UTF-8, or write it again")
        return tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; write one with `edgeear init`, or name another file") from error
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UsageError(f"{path}: line {line} is not {error.encoding.upper()}; save the file as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: {error}; that is not TOML: correct the line") from None
    except RecursionError:
        raise UsageError(f"{path}: nested too deep; a section holds plain values only") from None


def _merged(table: Mapping[str, Any], own: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The variables `own` over `table`, key by key, and the faults of variables whose section does not exist. A section
    that is no table is left for the models to refuse."""
    merged, faults, known = dict(table), [], list(Config.model_fields)
    for name, value in own.items():
        section, _, key = name.removeprefix(PREFIX).lower().partition("__")
        below = merged.get(section, {})
        if section not in known:
            faults.append(f"{name}: no such section, {_suggestion(section, known)}")
        elif value and isinstance(below, dict):
            merged[section] = {**below, key: value}
    return merged, faults


def _faults(detail: ErrorDetails, env: Mapping[str, str]) -> Iterator[str]:
    """The faults in one of pydantic's errors."""
    where = ".".join(str(part) for part in detail["loc"][:2])
    context = detail.get("ctx", {})
    if detail["type"] == "rules":
        yield from (f"{where}.{fault}" if where else fault for fault in context["faults"])
        return
    variable = PREFIX + where.replace(".", "__").upper()
    origin = f" (from {variable})" if variable in env else ""
    section, _, key = where.partition(".")
    known = sections()
    if detail["type"] == "extra_forbidden":
        names = list(known[section].model_fields) if section in known else list(known)
        yield f"{where}{origin}: no such {'key' if key else 'section'}, {_suggestion(key or section, names)}"
    elif not key:
        yield f"{where}{origin}: must be a table; write [{section}] and its keys below it"
    else:
        yield f"{where} = {_shown(section, key, detail)}{origin}: {_limit(detail)}, {_remedy(section, key)}"


def _suggestion(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"


def _shown(section: str, key: str, detail: ErrorDetails) -> str:
    if detail["type"] == "missing":
        return "(not set)"
    annotation = sections()[section].model_fields[key].annotation
    if SecretStr in (annotation, *get_args(annotation)):
        return "(secret)"
    text = redacted(repr(detail["input"]))
    return text if len(text) <= 80 else text[:77] + "..."


_BOUNDS = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be one of {expected}",
    "finite_number": "must be finite",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must match {pattern}",
    "missing": "this source.kind needs it",
}


def _limit(detail: ErrorDetails) -> str:
    template = _BOUNDS.get(detail["type"])
    if template:
        return template.format(**detail.get("ctx", {}))
    message = detail["msg"]
    return re.sub(r"^(Input|Value error,)\s*(should|must)?", "must", message).rstrip(".")


def _remedy(section: str, key: str) -> str:
    """What to write instead: the example if there is one, else the default."""
    field = sections()[section].model_fields[key]
    usual = field.examples[0] if field.examples else field.default
    return f"for example {key} = {usual!r}" if not isinstance(usual, bool) else "write true or false"
