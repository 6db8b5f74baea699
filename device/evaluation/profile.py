"""`edgeear profile`: how long heads take on this board, measured once and kept in a small file.

Rules of this file:

1. Whole heads are timed, packed and opened as they are served, with one input and one thread. Weights are random: time
   does not depend on them.
2. Heads take turns in a new order every round. A head's time is the smallest of its rounds' medians, so that other
   programs on the board disturb no single head.
3. The file says how well the prices predict heads that they were not fitted to. It does not name the machine's host.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adaptors.archive import pack
from adaptors.fields import TapShapes
from adaptors.latency import DEFAULT, InvalidModel, LatencyModel, fit
from adaptors.progress import Progress
from adaptors.search_space import BUDGETS, SearchSpace
from adaptors.spec import HeadSpec, weight_shapes
from device.encoder.runtime import open_session
from device.provenance import machine, versions
from edgeear.errors import DataError, FormatError, UsageError

F64 = NDArray[np.float64]

Clock = Callable[[], float]

FORMAT = 1
LEAST_HEADS = 5
CLASSES = 10
VALIDATED = 0.4
"""Share of the measured heads that the prices are not fitted to."""
CLOSE = 0.2
"""A prediction is close if its error is at most this share of the measured time."""
ROUNDS, WARM, CALLS, TURN_S = 10, 3, (7, 60), 0.02
"""Rounds; warm-up calls of a turn; least and most timed calls; seconds of a turn between these bounds."""

Share = Annotated[float, Field(ge=0, le=1)]


class ProfileError(FormatError):
    """A file that is no profile of a board, or one of another version."""


class Profile(BaseModel):
    """The content of the file: microseconds for each unit of work (`adaptors.latency.UNITS`), the machine, and errors.

    `within_20_percent` is a share of the `heads_validated`. The errors are theirs, relative to the measured time."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: int
    machine: str
    versions: dict[str, str]
    threads: int
    heads_fitted: int
    heads_validated: int
    within_20_percent: Share
    median_error: float
    worst_error: float
    seconds: float
    microseconds: dict[str, float]

    @property
    def latency(self) -> LatencyModel:
        return LatencyModel(self.microseconds)


def profile(
    shapes: TapShapes,
    heads: int = 150,
    seed: int = 0,
    *,
    rounds: int | None = None,
    clock: Clock = time.perf_counter,
    on_progress: Progress = lambda *_: None,
) -> Profile:
    """Measure `heads` random heads over taps of these shapes, half of them within each of the two larger budgets.

    Raises UsageError for fewer than five heads."""
    if heads < LEAST_HEADS:
        raise UsageError(f"heads is {heads}: measure at least {LEAST_HEADS}; 150 is the default")
    begun = clock()
    specs = drawn(SearchSpace(shapes, CLASSES), heads, seed)
    calls = []
    for i, spec in enumerate(specs):
        calls.append(opened(spec, shapes, seed))
        on_progress("open heads", i + 1, len(specs))
    ms = measure(calls, rounds or ROUNDS, seed, clock, on_progress)
    works = [spec.plan(shapes, CLASSES).work for spec in specs]
    order = np.random.default_rng(seed).permutation(len(specs))
    held, kept = np.split(order, [max(1, int(VALIDATED * len(specs)))])
    model = fit([works[i] for i in kept], ms[kept], DEFAULT)
    predicted = np.array([model.ms(works[i]) for i in held])
    error = np.abs(predicted / ms[held] - 1)
    return Profile(
        format=FORMAT,
        machine=machine(),
        versions=versions(),
        threads=1,
        heads_fitted=len(kept),
        heads_validated=len(held),
        within_20_percent=float((error <= CLOSE).mean()),
        median_error=float(np.median(error)),
        worst_error=float(error.max()),
        seconds=clock() - begun,
        microseconds=dict(model.prices),
    )


def drawn(space: SearchSpace, heads: int, seed: int) -> list[HeadSpec]:
    """Different random heads, alternately medium and large."""
    draws = [space.sample(heads, BUDGETS[name], seed) for name in ("medium", "large")]
    mixed = dict.fromkeys(spec for pair in zip(*draws, strict=False) for spec, _ in pair)
    return list(mixed)[:heads]


def opened(spec: HeadSpec, shapes: TapShapes, seed: int) -> Callable[[], object]:
    """One call of a head with random weights on a random input."""
    rng = np.random.default_rng(seed)
    weights = {
        name: (rng.normal(size=shape) / max(1, int(np.prod(shape[1:]))) ** 0.5).astype(np.float32)
        for name, shape in weight_shapes(spec, shapes, CLASSES).items()
    }
    head = pack(spec, shapes, [str(i) for i in range(CLASSES)], weights, seed)
    inputs = {t: np.abs(rng.normal(size=(1, *shapes[t]))).astype(np.float32) for t in spec.inputs}
    return partial(open_session(head.onnx).run, ["scores"], inputs)


def measure(calls: Sequence[Callable[[], object]], rounds: int, seed: int, clock: Clock, on_progress: Progress) -> F64:
    """Milliseconds `(calls,)` of each call: the smallest over the rounds of the median within a turn."""
    rng, least = np.random.default_rng(seed), np.full(len(calls), np.inf)
    for done in range(rounds):
        for i in rng.permutation(len(calls)):
            least[i] = min(least[i], _turn(calls[i], clock))
        on_progress("measure", done + 1, rounds)
    return least * 1e3


def _turn(call: Callable[[], object], clock: Clock) -> float:
    """The median seconds of a call, after a warm-up."""
    for _ in range(WARM):
        call()
    seconds: list[float] = []
    fewest, most = CALLS
    while len(seconds) < fewest or (sum(seconds) < TURN_S and len(seconds) < most):
        begun = clock()
        call()
        seconds.append(clock() - begun)
    return float(np.median(seconds))


def read_profile(path: Path) -> Profile:
    """The profile in a file. Raises ProfileError if it is damaged, no profile or of another version, DataError if it
    cannot be read."""
    remedy = "measure this board again with `edgeear profile`"
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    except UnicodeDecodeError as error:
        raise ProfileError(f"{path}: not text ({error.reason}); {remedy}") from error
    try:
        found = Profile.model_validate_json(content)
        LatencyModel(found.microseconds)  # refuses impossible prices
    except ValidationError as error:
        what = error.errors()[0]
        where = ".".join(map(str, what["loc"])) or "content"
        raise ProfileError(f"{path}: not a profile of a board ({where}: {what['msg']}); {remedy}") from error
    except InvalidModel as error:
        raise ProfileError(f"{path}: {error}; {remedy}") from error
    if found.format != FORMAT:
        raise ProfileError(f"{path}: has format {found.format}, this version reads {FORMAT}; {remedy}")
    return found


def read_latency(path: Path | None) -> LatencyModel | None:
    """The latency model of a profile file. None, which means the built-in model, if `path` is None."""
    return None if path is None else read_profile(path).latency


def to_json(found: Profile) -> str:
    return json.dumps(found.model_dump(), indent=2) + "\n"
