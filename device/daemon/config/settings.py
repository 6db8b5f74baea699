"""The daemon's configuration: a TOML file, then the environment over it, checked whole before anything starts.

Rules of this file:

1. Every key has a default, a range and a sentence; the file that `edgeear init` writes is made from these (init.py).
2. The environment wins: `EDGEEAR_SECTION__KEY`, in any case; an empty variable counts as not set. Variables
   without `__` (`EDGEEAR_CACHE`) are not ours.
3. All faults are told at once, one a line: `section.key = value: limit, remedy`. Unknown keys are faults.
4. A secret is in no message and in no repr. Nor is the value of an unknown key, which may be a misspelt secret.
5. `Config` reads nothing by itself: what is passed in is all there is.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from device.mqtt.settings import LiveLearning, LiveSettings, LiveTelemetry
from edgeear.errors import UsageError

PREFIX = "EDGEEAR_"
MAX_FILE_BYTES = 1 << 20

_NAME = r"^[A-Za-z0-9_-]{1,64}$"
_HOST = r"^[^\s/@]{1,253}$"
_TCP = r"^tcp://([^\s/@:]{1,253}|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}$"
M = TypeVar("M", bound=BaseModel)
HomePath = Annotated[Path, AfterValidator(lambda path: _expanded(path))]


class Section(BaseModel):
    """One table of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_is_a_truth(cls, value: object, info: ValidationInfo) -> object:
        """pydantic would take true for 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("must not be true or false")
        return value


class DeviceSection(Section):
    """Who this board is and where it keeps what it learned."""

    site: str = Field("site", pattern=_NAME, description="The site, in every topic: letters, digits, _ and -.")
    name: str = Field("board", pattern=_NAME, description="This board, unique in its site: it is the MQTT client id.")
    state: HomePath = Field(Path("edgeear-state"), description="Folder of all state: generations, outbox, ledger.")
    encoder: HomePath | None = Field(
        None,
        description="ONNX file of the frozen encoder; without it the built-in one, from the cache.",
        examples=["/usr/share/edgeear/encoder.onnx"],
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


class SourceSection(Section):
    """Where frames come from. Relative paths start at the working directory."""

    kind: Literal["none", "folder", "camera", "mqtt", "serial", "replay"] = Field(
        "none",
        description="none: frames come with the infer command only. mqtt: the topic `frame`. serial: a sensor on a "
        "serial line or a TCP port. replay: the files of a folder at a fixed rate.",
    )
    path: HomePath | None = Field(None, description="folder, replay: the folder.", examples=["/srv/frames"])
    after: Literal["keep", "delete"] = Field(
        "keep",
        description="folder: what happens to files that were read. keep: those there at the start are not.",
    )
    fps: float = Field(5.0, gt=0, le=240, description="replay: frames a second; camera: at most so many.")
    loop: bool = Field(True, description="replay: begin again after the last file.")
    device: str | None = Field(
        None,
        min_length=1,
        coerce_numbers_to_str=True,
        description="camera: number or device file; serial: the tty.",
        examples=["/dev/ttyACM0"],
    )
    baud: int = Field(115_200, ge=300, le=4_000_000, description="serial: bits a second.")
    url: str | None = Field(
        None, pattern=_TCP, description="serial: tcp://HOST:PORT instead of a tty.", examples=["tcp://sensor:7000"]
    )
    queue: int = Field(4, ge=1, le=1024, description="Frames that may wait; one more drops the oldest.")
    max_age_s: float = Field(2.0, gt=0, le=3600, description="Seconds after which a waiting frame is never served.")

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> Self:
        faults = []
        if self.kind in ("folder", "replay") and self.path is None:
            faults.append(f"path = (not set): source.kind {self.kind} needs it; name the folder of the frames")
        if self.kind == "camera" and self.device is None:
            faults.append("device = (not set): source.kind camera needs it; 0 is the first camera")
        if self.kind == "serial" and (self.device is None) == (self.url is None):
            both = "both set" if self.device else "neither set"
            faults.append(f"device, url = ({both}): source.kind serial needs one of them; a tty or tcp://HOST:PORT")
        return _without(self, faults)


class MqttSection(Section):
    """The broker, with TLS where `tls` or `ca` is set."""

    enabled: bool = Field(True, description="Whether this board talks to a broker at all.")
    host: str = Field("localhost", pattern=_HOST, description="Name or address of the broker.")
    port: int = Field(1883, ge=1, le=65535, description="8883 is usual with TLS.")
    protocol: Annotated[Literal["5", "3.1.1"], BeforeValidator(lambda given: "5" if given == 5 else given)] = Field(
        "5", description="MQTT version; 3.1.1 has no message expiry and no response topics."
    )
    username: str | None = Field(None, min_length=1, description="Name at the broker.", examples=["board"])
    password: SecretStr | None = Field(
        None, description="Better kept out of this file, in EDGEEAR_MQTT__PASSWORD.", examples=["change me"]
    )
    tls: bool = Field(False, description="TLS, by the authorities that this system trusts.")
    ca: HomePath | None = Field(
        None,
        description="TLS, by the authority in this PEM file alone.",
        examples=["/etc/edgeear/ca.pem"],
    )
    cert: HomePath | None = Field(
        None, description="PEM file of this board's certificate.", examples=["/etc/edgeear/board.pem"]
    )
    key: HomePath | None = Field(
        None, description="PEM file of its key, readable by this user only.", examples=["/etc/edgeear/board.key"]
    )
    keepalive_s: int = Field(60, ge=5, le=3600, description="Seconds between signs of life.")
    session_expiry_s: int = Field(
        604_800, ge=0, le=2**32 - 1, description="Seconds for which the broker keeps commands for an absent board."
    )
    receive_maximum: int = Field(32, ge=1, le=65535, description="Commands taken from the broker at once.")
    inflight: int = Field(128, ge=1, le=65535, description="Messages sent and not yet acknowledged, at most.")
    discovery: bool = Field(False, description="Announce this board to Home Assistant.")

    @property
    def secure(self) -> bool:
        """Whether TLS is spoken."""
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
        return _without(self, faults)


class LearningSection(LiveLearning, Section):
    """When and how the board adapts. Needs the `learn` extra; predictions do not."""

    enabled: bool = Field(True, description="Whether this board adapts by itself.")
    label_requests: bool = Field(True, description="Publish the frames whose labels are wanted.")
    budget: Literal["small", "medium", "large"] = Field("medium", description="Upper limits of a head.")
    specs: int = Field(300, ge=1, le=100_000, description="Heads that a search scores.")
    time_limit_s: float = Field(1800.0, ge=1, le=604_800, description="Seconds after which learning is stopped.")
    memory_limit_mb: int = Field(1200, ge=256, le=1_048_576, description="Memory above which learning is stopped.")
    nice: int = Field(19, ge=0, le=19, description="How far learning steps back: 19 is furthest.")


class TelemetrySection(LiveTelemetry, Section):
    """What the board tells unasked."""


class OutboxSection(Section):
    """Bounds of what waits on disk for the broker; the least important goes first."""

    max_mb: int = Field(64, ge=1, le=1_048_576, description="Megabytes.")
    max_count: int = Field(200_000, ge=100, le=100_000_000, description="Messages.")
    max_age_s: float = Field(604_800.0, ge=60, le=315_360_000, description="Seconds.")


class MetricsSection(Section):
    """Prometheus metrics, on the loopback address only."""

    port: int = Field(0, ge=0, le=65535, description="0: off.")


class Config(BaseSettings):
    """The whole configuration, frozen. `load_config` makes one from a file and the environment."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, env_prefix=PREFIX, env_nested_delimiter="__",
        env_ignore_empty=True,
    )  # fmt: skip

    device: DeviceSection = Field(default_factory=DeviceSection)
    source: SourceSection = Field(default_factory=SourceSection)
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
        fault = "source.kind = 'mqtt': mqtt.enabled is false; enable it or take frames from elsewhere"
        return _without(self, [fault] if orphan else [])

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


def sections() -> dict[str, type[Section]]:
    """The tables of the file, in order: name -> model."""
    return {name: field.annotation for name, field in Config.model_fields.items()}  # type: ignore[misc]


def load_config(path: Path | None, env: Mapping[str, str] | None = None) -> Config:
    """The configuration of the file at `path`, if any, under that of `env` (the process environment when None).

    Raises `UsageError` that lists every fault, with the line of a syntax error.
    """
    variables = os.environ if env is None else env
    table = {} if path is None else _read_toml(path)
    own = {name.upper(): value for name, value in variables.items() if name.upper().startswith(PREFIX) and "__" in name}
    faults = list(_unknown_variables(own))
    try:
        config = Config(**_merged(table, _Environment(Config, own)()))
    except ValidationError as error:
        faults += [line for detail in error.errors(include_url=False) for line in _told(detail, own)]
    if faults:
        where = "the environment" if path is None else str(path)
        raise UsageError("\n  ".join([f"{where}: {len(faults)} fault{'s' * (len(faults) > 1)}", *faults]))
    return config


class _Environment(EnvSettingsSource):
    """pydantic-settings' reading of the environment, of the variables that it is given."""

    def __init__(self, settings: type[BaseSettings], variables: Mapping[str, str]) -> None:
        self._variables = variables
        super().__init__(settings)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return {name.lower(): value for name, value in self._variables.items() if value}


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise UsageError(f"{path}: more than {MAX_FILE_BYTES} bytes; is it the right file?")
        return tomllib.loads(data.decode())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; write one with `edgeear init`, or name another") from error
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UsageError(f"{path}: line {line} is not UTF-8; save the file as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: {error}; that is no TOML: mend the line") from None
    except RecursionError:
        raise UsageError(f"{path}: nested too deep; sections hold plain values") from None


def _merged(table: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `table`, key by key. A section that is no table is left for the models to refuse."""
    merged = dict(table)
    for section, values in over.items():
        below = merged.get(section, {})
        merged[section] = {**below, **values} if isinstance(below, dict) and isinstance(values, dict) else values
    return merged


def _unknown_variables(own: Mapping[str, str]) -> Iterator[str]:
    """Faults for `EDGEEAR_SECTION__KEY` of no section; unknown keys of a section fail with its model."""
    for name in own:
        section = name.removeprefix(PREFIX).partition("__")[0].lower()
        if section not in sections():
            yield f"{name}: no such section, {_meant(section, list(sections()))}"


def _told(detail: ErrorDetails, env: Mapping[str, str]) -> Iterator[str]:
    """The lines of one of pydantic's errors."""
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
        yield f"{where}{origin}: no such {'key' if key else 'section'}, {_meant(key or section, names)}"
    elif not key:
        yield f"{where}{origin}: must be a table, write [{section}] and its keys below it"
    else:
        yield f"{where} = {_shown(section, key, detail['input'])}{origin}: {_limit(detail)}, {_remedy(section, key)}"


def _meant(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"


def _shown(section: str, key: str, value: object) -> str:
    if section in sections() and "SecretStr" in str(sections()[section].model_fields[key].annotation):
        return "(secret)"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


_BOUNDS = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be one of {expected}",
    "finite_number": "must be finite",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must match {pattern}",
    "missing": "must be given",
}


def _limit(detail: ErrorDetails) -> str:
    template = _BOUNDS.get(detail["type"])
    if template:
        return template.format(**detail.get("ctx", {}))
    message = detail["msg"]
    return re.sub(r"^(Input|Value error,)\s*(should|must)?", "must", message).rstrip(".")


def _remedy(section: str, key: str) -> str:
    """What to write instead: the usual value, or an example where the usual is none."""
    field = sections()[section].model_fields[key]
    usual = field.examples[0] if field.examples else field.default
    return f"for example {key} = {usual!r}" if not isinstance(usual, bool) else "write true or false"


def _without(model: M, faults: list[str]) -> M:
    """`model` itself, if nothing is wrong with it."""
    if faults:
        raise PydanticCustomError("rules", "{faults}", {"faults": faults})
    return model


def _expanded(path: Path) -> Path:
    if not path.parts:
        raise ValueError("must name a file or folder")
    if "\0" in str(path):
        raise ValueError("must not hold a zero byte")
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError("must not start with ~: there is no such home directory") from None
