"""The record of one simulated run: the single source of the HTML report and of `--json`.

Rules of this file:

1. Percentages are fractions of one, times seconds unless the name says `ms`, positions sample indices.
2. What was not measured is None, `null` in JSON. A NaN or infinite measure is no measurement: it becomes None.
3. Every list and every text is bounded, so that no run makes a record that a browser cannot open.
4. A record agrees with itself: matrices fit the domains, and a series has one entry for each position.
5. Same record, same JSON: keys keep their order and nothing is added from outside.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Annotated, Final, Literal, Self, SupportsFloat

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError, model_validator

from edgeear.errors import FormatError, UsageError

RECORD_VERSION: Final = 1
ABSTAIN = "abstain"
"""The route of an input that no head serves; no domain may have this name."""
MAX_DOMAINS = 256
MAX_POINTS = 4096
MAX_CANDIDATES = 500
MAX_EVENTS = 4096
MAX_SPEC_CHARACTERS = 65_536


class RecordError(FormatError):
    """A file that is no record of a run, or one of another version."""


def _measured(value: object) -> object:
    if isinstance(value, SupportsFloat) and not isinstance(value, bool) and not math.isfinite(float(value)):
        return None
    return value


Measure = Annotated[float | None, BeforeValidator(_measured)]
Fraction = Annotated[Annotated[float, Field(ge=0, le=1)] | None, BeforeValidator(_measured)]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Text = Annotated[str, Field(max_length=2000)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class EncoderInfo(_Part):
    """Which encoder computed the features. `input` is `(height, width)` of a frame; `digest` its SHA-256."""

    name: Name
    digest: Name
    input: tuple[Count, Count]


class OodPair(_Part):
    """How well the known domain alone tells the unknown one; OOD is the positive class."""

    known: Name
    unknown: Name
    auroc: Fraction
    fpr95: Fraction


class ShiftRecord(_Part):
    """One step of the stream, or one alarm without a step (`false_alarm`, where `to` repeats `from`).

    `onset` is where the stream really left, `at` where that was declared, each None where it did not happen.
    """

    from_: Name = Field(alias="from")
    to: Name
    at: Count | None = None
    onset: Count | None = None
    delay_samples: Count | None = None
    detected: bool
    false_alarm: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.detected or self.false_alarm) and self.at is None:
            raise ValueError(f"shift {self.from_} -> {self.to} was declared: say where (`at`)")
        if self.detected and self.false_alarm:
            raise ValueError(f"shift {self.from_} -> {self.to} is either detected or a false alarm, not both")
        return self


class Stream(_Part):
    """What the detector saw, thinned: one entry per kept sample, `at` rising. See `evenly`."""

    at: tuple[Count, ...] = Field(default=(), max_length=MAX_POINTS)
    novelty: tuple[Measure, ...] = Field(default=(), max_length=MAX_POINTS)
    p: tuple[Fraction, ...] = Field(default=(), max_length=MAX_POINTS)
    route: tuple[Name, ...] = Field(default=(), max_length=MAX_POINTS)
    domain: tuple[Name, ...] = Field(default=(), max_length=MAX_POINTS)

    @model_validator(mode="after")
    def _aligned(self) -> Self:
        for name in ("novelty", "p", "route", "domain"):
            if len(getattr(self, name)) != len(self.at):
                raise ValueError(f"stream has {len(self.at)} positions but {len(getattr(self, name))} {name}")
        if any(later <= earlier for earlier, later in zip(self.at, self.at[1:], strict=False)):
            raise ValueError("the positions of the stream must rise")
        return self


class CandidatePoint(_Part):
    """One spec that the search scored; `proxies` holds the single proxies behind `score`. `front`: no spec of as good a
    score takes fewer bytes and less time."""

    parameters: Count
    bytes: Count | None = None
    latency_ms: Measure = None
    score: Measure
    chosen: bool = False
    front: bool = False
    proxies: dict[Name, Measure] = Field(default_factory=dict, max_length=64)


class Growth(_Part):
    """One head that was grown: what it is, why it was picked, what it costs."""

    domain: Name
    spec: dict[str, JsonValue]
    explanation: Text
    parameters: Count
    bytes: Count
    macs: Count
    latency_ms_predicted: Measure = None
    search_s: Seconds
    train_s: Seconds
    specs_scored: Count
    validation_accuracy: Fraction = None
    candidates: tuple[CandidatePoint, ...] = Field(default=(), max_length=MAX_CANDIDATES)

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        size = len(json.dumps(self.spec))
        if size > MAX_SPEC_CHARACTERS:
            raise ValueError(f"spec has {size} characters as JSON, over the limit of {MAX_SPEC_CHARACTERS}")
        if sum(candidate.chosen for candidate in self.candidates) > 1:
            raise ValueError(f"{self.domain}: more than one candidate is marked as chosen")
        return self


class Event(_Part):
    """One line of the log: at which sample, what kind (`shift`, `search`, `commit` ...), what happened."""

    at: Count
    kind: Name
    text: Text


Row = Annotated[tuple[Fraction, ...], Field(max_length=MAX_DOMAINS + 1)]
Matrix = Annotated[tuple[Row, ...], Field(max_length=MAX_DOMAINS)]


class RunRecord(_Part):
    """One run. `accuracy_matrix` is `(domains, domains)`: R[i][j] on domain j after learning domain i.

    `routing_accuracy` is `(domains, domains)` or `(domains, domains + 1)`: rows are true domains and the last
    extra column, where present, is "abstain". `forgetting` has one entry per domain. `created` is in seconds
    since 1970, UTC. `timings` are seconds by phase.
    """

    version: Literal[1] = RECORD_VERSION
    title: Text
    created: Annotated[float, Field(ge=0, le=253_402_300_799)]
    seed: int
    encoder: EncoderInfo
    domains: tuple[Name, ...] = Field(max_length=MAX_DOMAINS)
    classes: tuple[Name, ...] = Field(max_length=10_000)
    accuracy_matrix: Matrix = ()
    routing_accuracy: Matrix = ()
    final_accuracy: Fraction = None
    bwt: Measure = None
    forgetting: tuple[Measure, ...] = Field(default=(), max_length=MAX_DOMAINS)
    oracle_route_accuracy: Fraction = None
    ood: tuple[OodPair, ...] = Field(default=(), max_length=MAX_DOMAINS * MAX_DOMAINS)
    shift: tuple[ShiftRecord, ...] = Field(default=(), max_length=MAX_EVENTS)
    stream: Stream = Stream()
    growth: tuple[Growth, ...] = Field(default=(), max_length=MAX_DOMAINS)
    events: tuple[Event, ...] = Field(default=(), max_length=MAX_EVENTS)
    timings: dict[Name, Seconds] = Field(default_factory=dict, max_length=64)
    versions: dict[Name, Text] = Field(default_factory=dict, max_length=64)
    machine: Text = ""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        count = len(self.domains)
        if len(set(self.domains)) != count or ABSTAIN in self.domains:
            raise ValueError(f"domains {self.domains} must differ, and none may be called {ABSTAIN!r}")
        _check_shape("accuracy_matrix", self.accuracy_matrix, count, (count,))
        _check_shape("routing_accuracy", self.routing_accuracy, count, (count, count + 1))
        if len(self.forgetting) not in (0, count):
            raise ValueError(f"forgetting has {len(self.forgetting)} entries for {count} domains")
        unknown = sorted(self._named() - set(self.domains))
        if unknown:
            raise ValueError(f"{unknown[:5]} are not among the domains {list(self.domains)}")
        return self

    def _named(self) -> set[str]:
        """Every domain that a part of the record speaks of."""
        return {
            *self.stream.domain,
            *(route for route in self.stream.route if route != ABSTAIN),
            *(growth.domain for growth in self.growth),
            *(name for pair in self.ood for name in (pair.known, pair.unknown)),
            *(name for shift in self.shift for name in (shift.from_, shift.to)),
        }

    def to_json(self) -> str:
        """One JSON object, indented, ending in a line break."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> RunRecord:
        """Read what `to_json` wrote. Raises `RecordError` for anything else."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the whole"
            raise RecordError(
                f"not a run record of version {RECORD_VERSION} ({where}: {first['msg']}); make it again with "
                "`edgeear simulate --json`"
            ) from error


def evenly(count: int, limit: int = MAX_POINTS) -> tuple[int, ...]:
    """At most `limit` of the indices `0 .. count - 1`, spread evenly, first and last included.

    Raises `UsageError` where `limit` is below 2.
    """
    if limit < 2:
        raise UsageError(f"limit {limit}: keep at least 2 points")
    if count <= limit:
        return tuple(range(max(count, 0)))
    return tuple(step * (count - 1) // (limit - 1) for step in range(limit))


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of what was measured, or None if nothing was."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _check_shape(name: str, matrix: Matrix, rows: int, columns: tuple[int, ...]) -> None:
    if matrix and (len(matrix) != rows or any(len(row) not in columns for row in matrix)):
        found = [len(row) for row in matrix]
        raise ValueError(f"{name} has rows of {found} entries; {rows} domains need {rows} rows of {columns}")
