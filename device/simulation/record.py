"""The record of one simulated run: the single source of the HTML report and of `--json`.

Rules of this file:

1. Percentages are fractions of one, times are seconds unless the name says `ms`, and positions are sample numbers:
   the first sample of a run is number 1.
2. What was not measured is None, `null` in JSON. A NaN or infinite measure becomes None.
3. Every list and every text is bounded, so that a browser can open the report of any run.
4. A record is consistent: matrices fit the domains, and a series has one entry for each position.
5. Same record, same JSON: keys keep their order and nothing is added from outside.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import dropwhile
from typing import Annotated, Final, Literal, Self, SupportsFloat

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError, model_validator

from edgeear.errors import FormatError, UsageError
from edgeear.system import SystemPolicy

RECORD_VERSION: Final = 1
ABSTAIN = "abstain"
"""The route of an input that no head serves; no domain may have this name."""
ALPHA = SystemPolicy.alpha
"""A frame with a p-value up to this one is called out of distribution."""
FEW_TESTS = 30
"""Test sets of fewer images are named as such: one image more or less moves the accuracy by over 3 points."""
MAX_DOMAINS = 256
MAX_POINTS = 4096
MAX_CANDIDATES = 500
MAX_EVENTS = 4096
MAX_THUMBNAILS = 6
MAX_SPEC_CHARACTERS = 65_536


class RecordError(FormatError):
    """The file is not a record of a run, or it has another version."""


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
Jpeg = Annotated[str, Field(max_length=16_384, pattern=r"^[A-Za-z0-9+/]+={0,2}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class EncoderInfo(_Part):
    """Which encoder computed the features. `input` is `(height, width)` of a frame; `digest` its SHA-256."""

    name: Name
    digest: Name
    input: tuple[Count, Count]


class OodPair(_Part):
    """How well the detector of the known domain alone finds images of the unknown one; OOD is the positive class."""

    known: Name
    unknown: Name
    auroc: Fraction
    fpr95: Fraction


class ShiftRecord(_Part):
    """One change of domain in the stream, or an alarm without one (`false_alarm`, where `to` repeats `from`).

    `onset` is the last sample of the old domain, `at` the sample at which the shift was declared; each is None if it
    did not happen.
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
    """What the detector saw, thinned by `evenly`: one entry for each kept sample, `at` rising."""

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
    """One head that was grown: what it is, why it was picked, what it costs.

    `total_s`: from the labels to the admitted head, encoding included; None if this run did not grow it."""

    domain: Name
    spec: dict[str, JsonValue]
    explanation: Text
    parameters: Count
    bytes: Count
    macs: Count
    latency_ms_predicted: Measure = None
    search_s: Seconds
    train_s: Seconds
    total_s: Seconds | None = None
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


class DomainFacts(_Part):
    """The data of one domain: `frames` streamed of `images` different images; `labelled` frames of `labels` different
    images that its head was learned from; classes that were streamed and got no label; the number of test images; a few
    images as JPEG in base64."""

    domain: Name
    frames: Count
    images: Count
    labelled: Count
    labels: Count
    unlabelled: tuple[Name, ...] = Field(default=(), max_length=10_000)
    tests: Count
    thumbnails: tuple[Jpeg, ...] = Field(default=(), max_length=MAX_THUMBNAILS)


@dataclass(frozen=True)
class Worth:
    """Accuracy on one domain `without` edgeear (only the first domain was ever learned) and `after` the run, both as
    fractions, and what that took: images labelled, seconds of learning. None where it is unknown."""

    domain: str
    without: float | None
    after: float | None
    labels: int | None
    seconds: float | None
    tests: int | None

    @property
    def gain(self) -> float | None:
        return None if self.without is None or self.after is None else self.after - self.without

    @property
    def few(self) -> bool:
        """Whether the test set is too small to trust a difference of a few points."""
        return self.tests is not None and self.tests < FEW_TESTS


Row = Annotated[tuple[Fraction, ...], Field(max_length=MAX_DOMAINS + 1)]
Matrix = Annotated[tuple[Row, ...], Field(max_length=MAX_DOMAINS)]


class RunRecord(_Part):
    """One run. `accuracy_matrix` is `(domains, domains)`: R[i][j] on domain j after learning domain i.

    `routing_accuracy` is `(domains, domains)` or `(domains, domains + 1)`: rows are true domains and the last
    extra column, where present, is "abstain". `forgetting` has one entry per domain. `created` is in seconds
    since 1970, UTC. `timings` are seconds by phase. `stopped_at`: the last sample of a run that you interrupted; the
    rows of later domains are None then. `facts` has one entry per domain, or none in an older record.
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
    facts: tuple[DomainFacts, ...] = Field(default=(), max_length=MAX_DOMAINS)
    stopped_at: Count | None = None
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
        if self.facts and tuple(fact.domain for fact in self.facts) != self.domains:
            raise ValueError(f"facts are not one for each of the domains {list(self.domains)}")
        unknown = sorted(self._named() - set(self.domains))
        if unknown:
            raise ValueError(f"{unknown[:5]} are not among the domains {list(self.domains)}")
        return self

    def _named(self) -> set[str]:
        """Every domain that a part of the record names."""
        return {
            *self.stream.domain,
            *(route for route in self.stream.route if route != ABSTAIN),
            *(growth.domain for growth in self.growth),
            *(name for pair in self.ood for name in (pair.known, pair.unknown)),
            *(name for shift in self.shift for name in (shift.from_, shift.to)),
        }

    def worth(self) -> tuple[Worth, ...]:
        """Each domain's accuracy without and with edgeear: the first row of the accuracy matrix, where one head serves
        every domain, and the last measured one."""
        nothing = (None,) * len(self.domains)
        measured = [row for row in self.accuracy_matrix if any(value is not None for value in row)] or [nothing]
        seconds = {growth.domain: growth.total_s for growth in self.growth}
        used = [fact for fact in self.facts if self.stopped_at is None or fact.domain in seconds]
        labels = {fact.domain: fact.labels for fact in used}  # those of a search that you stopped taught nothing
        tests = {fact.domain: fact.tests for fact in self.facts}
        return tuple(
            Worth(name, before, after, labels.get(name), seconds.get(name), tests.get(name))
            for name, before, after in zip(self.domains, measured[0], measured[-1], strict=True)
        )

    def mean_worth(self) -> tuple[float | None, float | None]:
        """Mean accuracy without and with edgeear, over the domains for which both were measured."""
        rows = [row for row in self.worth() if row.gain is not None]
        return mean(row.without for row in rows), mean(row.after for row in rows)

    def spent(self) -> tuple[int | None, float | None]:
        """Labels and seconds of learning of all domains together; None where none is known."""
        worth = self.worth()
        labels = [row.labels for row in worth if row.labels is not None]
        seconds = [row.seconds for row in worth if row.seconds is not None]
        return sum(labels) if labels else None, sum(seconds) if seconds else None

    def own_p(self, domain: str) -> list[float]:
        """p-values of the domain's own frames, from the first one that its head answered."""
        stream = self.stream
        own = [
            (p, route) for p, route, true in zip(stream.p, stream.route, stream.domain, strict=True) if true == domain
        ]
        return [p for p, _ in dropwhile(lambda frame: frame[1] != domain, own) if p is not None]

    def remarks(self) -> tuple[str, ...]:
        """Sentences on what limits the figures: small test sets, repeated frames, classes that got no label, more OOD
        verdicts on known frames than the average that is promised."""
        told = []
        for fact in self.facts:
            if fact.tests < FEW_TESTS:
                few = f"{fact.domain} has {fact.tests} test images, fewer than {FEW_TESTS}"
                told.append(f"{few}: differences of a few points may be chance.")
            if fact.frames > fact.images:
                again = f"{fact.domain} has {fact.images} different training images for {fact.frames} frames"
                told.append(f"{again}: they were shown repeatedly; a repeated image counts as one label.")
            if fact.labels and fact.unlabelled:
                told.append(f"{fact.domain}: no image of these classes got a label: {', '.join(fact.unlabelled)}.")
            own = self.own_p(fact.domain)
            foreign = sum(p <= ALPHA for p in own)
            if foreign > ALPHA * len(own):
                share = f"{fact.domain}: once it was learned, {100 * foreign / len(own):.1f} % of {len(own)} of its own"
                bound = f"At most {100 * ALPHA:.0f} % is an average over many calibration sets; this one comes from"
                source = f"{fact.labels} labelled images" if fact.labels else "labels that the board gave itself"
                again = "; a surprising image counts each time it is shown" if fact.frames > fact.images else ""
                told.append(f"{share} frames were called out of distribution. {bound} {source}{again}.")
        return tuple(told)

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
