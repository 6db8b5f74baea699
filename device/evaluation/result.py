"""The JSON of `edgeear eval` and `edgeear bench ood`, as types.

Rules of this file:

1. Percentages are fractions of one, times are seconds. A figure that was not measured is None, `null` in JSON.
2. The same result gives the same JSON: keys keep their order.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue

Fraction = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    def to_json(self) -> str:
        """One JSON object, indented, ending in a line break."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"


class OodFigures(_Part):
    """How well a system that knows one domain detects another. OOD is the positive class."""

    known: str
    unknown: str
    auroc: Fraction
    fpr95: Fraction


class ShiftFigures(_Part):
    """One step of the order. `delay_samples` counts from the first sample of the new domain, None if undetected;
    `early_alarms` were declared before it, in the `warmup` samples of the domains already known."""

    from_: str = Field(alias="from")
    to: str
    detected: bool
    delay_samples: Count | None
    warmup: Count
    early_alarms: Count


class GrowthFigures(_Part):
    """One head that was grown. `memory_s` is the time for the domain's memory, calibration and admission."""

    model_config = ConfigDict(extra="ignore")  # a domain's growth record may hold more

    domain: str
    spec: dict[str, JsonValue]
    parameters: Count
    bytes: Count
    macs: Count
    search_s: Seconds
    train_s: Seconds
    memory_s: Seconds
    specs_scored: Count
    explanation: str
    chosen_by: str
    latency_ms_predicted: float | None = None
    quantised: str | None = None
    validation_accuracy: Fraction | None
    domain_bytes: Count
    training_samples: Count


class Rejection(_Part):
    """A domain that admission rejected. Its inputs are served by the heads that they are routed to."""

    domain: str
    reasons: tuple[str, ...]


class WrongRoutes(_Part):
    """The cost of wrong routes: the number of test images of learned domains that the final system routed to another
    domain's head, their accuracy, and the accuracy that their own head would have had. None if there are none."""

    inputs: Count
    share: Fraction
    accuracy_as_routed: Fraction | None
    accuracy_of_own_head: Fraction | None


class Memory(_Part):
    """Peak resident sets in MB: of a process that only serves the final system, and of this one, which learned it."""

    inference: float | None
    learning: float | None
    inference_missing_because: str | None = None


class EvalResult(_Part):
    """One run of the continual protocol. `accuracy_matrix[i][j]` is the accuracy on domain j after learning domain i,
    routed by the router; `own_head_accuracy[j]` is that of the final system with the route known;
    `false_ood_rate[j]` is the share of domain j's test images that its final verdict calls out of distribution."""

    domains: tuple[str, ...]
    classes: tuple[str, ...]
    seed: int
    shots: int | None
    accuracy_matrix: tuple[tuple[Fraction, ...], ...]
    final_accuracy: Fraction
    bwt: float
    oracle_route_accuracy: Fraction
    routing_accuracy: tuple[tuple[Fraction, ...], ...]
    wrong_routes: WrongRoutes
    ood: tuple[OodFigures, ...]
    shift: tuple[ShiftFigures, ...]
    false_alarms_per_10k: float
    growth: tuple[GrowthFigures, ...]
    old_outputs_bit_identical: bool
    peak_rss_mb: Memory
    rejected: tuple[Rejection, ...]
    own_head_accuracy: tuple[Fraction, ...]
    forgetting: tuple[float, ...]
    false_ood_rate: tuple[Fraction, ...]
    alpha: Fraction
    training_samples: tuple[Count, ...]
    test_samples: tuple[Count, ...]
    encoder_digest: str
    budget: str
    spatial: bool
    classes_per_step: int | None
    timings_s: dict[str, Seconds]
    warnings: tuple[str, ...]
    date: str | None
    machine: str
    versions: dict[str, str]


class Separation(_Part):
    """One score on one pair of domains, or its mean over pairs."""

    auroc: Fraction
    fpr95: Fraction


class PairScores(_Part):
    """Every score on one ordered pair of domains."""

    known: str
    unknown: str
    scores: dict[str, Separation]


class OodResult(_Part):
    """One run of `edgeear bench ood`."""

    pairs: tuple[PairScores, ...]
    mean: dict[str, Separation]
    domains: tuple[str, ...]
    seed: int
    shots: int | None
    encoder_digest: str
    warnings: tuple[str, ...] = ()
    date: str | None
    machine: str
    versions: dict[str, str]
