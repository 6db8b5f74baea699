"""A whole deployment on one machine: domains streamed one after another through the board that the daemon runs.

Rules of this file:

1. Every frame is decoded and goes through `Board.step` alone, in order, as on a board. Only the clock is simulated.
2. Labels come from the ground truth, within the label budget of a shift, and from nowhere else.
3. Test images are never streamed. Their features are computed once; accuracy is measured at the end of every domain, on
   all domains, through the router.
4. A missed shift, a rejected head and a frame that does not decode are results: they are recorded and the run goes on.
5. What can be refused is refused before the first frame: folders, names, packages, a store of something else.
6. Ctrl-C ends a run early, with a record of what was done. A run with a store goes on from the confirmed generation:
   the domains up to the last learned one are not streamed again.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import ValidationError
from rich.console import Console

from adaptors.latency import LatencyModel
from adaptors.search import SearchPolicy
from adaptors.search_space import BUDGETS, Budget
from device.board import events
from device.board.board import Board, BoardPolicy
from device.encoder.session import pooled_taps
from device.files import write_whole
from device.images.dataset import FolderData, Item, read_folder, split
from device.images.decode import UndecodableInput, decode
from device.provenance import installation, machine, versions
from device.simulation.exam import Exam
from device.simulation.live import LiveView
from device.simulation.record import (
    ABSTAIN,
    MAX_EVENTS,
    MAX_THUMBNAILS,
    DomainFacts,
    EncoderInfo,
    Event,
    Growth,
    RunRecord,
    ShiftRecord,
    Stream,
    evenly,
    mean,
)
from device.simulation.report import write_report
from device.state import generations
from device.state.store import Store
from edgeear import __version__, metrics
from edgeear.errors import DeviceError, UsageError
from edgeear.flow import Prediction
from edgeear.space import HypervectorSpace
from edgeear.system import Live, System
from edgeear.types import Encoder
from edgeear.unlabelled import UnlabelledPolicy

FIRST_LABELS = 200
"""Labels of the first domain when nobody labels later ones; as many frames are then collected after a shift."""
BEYOND_LABELS = 250
"""Frames of a domain that are streamed by default beyond those that get a label."""
SLOWEST_SHIFT = 80
"""Frames until a shift was declared, at most, in runs with few labels."""
THUMBNAILS, THUMBNAIL = 96, (96, 96)
"""Small pictures in a record, of all domains together, and their size in pixels."""
CANDIDATE = ("parameters", "bytes", "latency_ms", "score", "chosen", "front")
GROWTH = ("spec", "explanation", "parameters", "bytes", "macs", "latency_ms_predicted", "specs_scored")
"""Figures that a grown domain carries and the record takes as they are."""


@dataclass(frozen=True)
class SimulateOptions:
    """What to stream and what to write.

    `labels` at most per shift, 0 for a labelled first domain and no labels after it; `samples` streamed of each domain,
    None for the labels and `BEYOND_LABELS` more; `tests` of its test images at most; `specs` scored by each search;
    `fps` frames a second of the simulated clock; `latency` the model of a profiled board. `report`, `json` and `store`
    None: not written, or removed at the end. Raises `UsageError` for numbers out of range.
    """

    data: Path
    order: tuple[str, ...] | None = None
    report: Path | None = None
    json: Path | None = None
    store: Path | None = None
    title: str = "edgeear simulation"
    labels: int = 200
    samples: int | None = None
    tests: int = 100
    specs: int = 300
    seed: int = 0
    fps: float = 30.0
    budget: Budget = field(default_factory=lambda: BUDGETS["medium"])
    latency: LatencyModel | None = None

    def __post_init__(self) -> None:
        least_labels = 5 if self.labels else 0
        for name, least in (("labels", least_labels), ("samples", 1), ("tests", 1), ("specs", 1), ("seed", 0)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        if not self.fps > 0:
            raise UsageError(f"fps is {self.fps}: it must be above 0")

    @property
    def frames(self) -> int:
        """Frames streamed of each domain."""
        return (self.labels or FIRST_LABELS) + BEYOND_LABELS if self.samples is None else self.samples


def simulate(
    options: SimulateOptions,
    encoder: Encoder,
    *,
    name: str = "encoder",
    console: Console | None = None,
    quiet: bool = False,
    policy: BoardPolicy | None = None,
    system: System | None = None,
    now: Callable[[], float] = time.time,
) -> RunRecord:
    """Stream the data set and write what the options name; `name` is what the record calls the encoder.

    `policy` replaces the board's rules other than labels, search and budget; `system` the empty system to start from,
    unless the store holds one. Ctrl-C once streaming began ends the run early: `stopped_at` of the record says where.
    Raises `UsageError`, `DataError`, `FormatError` and `DeviceError` for what cannot be read or written, `EmptyBudget`
    if no head fits the budget.
    """
    data = read_folder(options.data, options.order)
    blank = _blank(options, data, encoder, name, now())
    _prepare(options)
    with ExitStack() as stack:
        folder = options.store or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeear-")))
        store = stack.enter_context(Store.open(folder))
        learned = _learned(store, folder, data, encoder)
        start = learned or system or System(encoder.digest, HypervectorSpace(pooled_taps(encoder)))
        first = 1 + max((data.domains.index(known) for known in start.names), default=-1)
        total = options.frames * (len(data.domains) - first)
        view = LiveView(console or Console(stderr=True), data.domains, total, clock=time.monotonic, quiet=quiet)
        stack.enter_context(view)
        run = _Run(options, data, encoder, view, store, start, policy or BoardPolicy(), first)
        run.stream()
        record = run.record(blank)
    if options.json is not None:
        _write(options.json, record.to_json())
    if options.report is not None:
        write_report(record, options.report)
    return record


class GroundTruth:
    """A `Labeller`: it labels at most `budget` of the newest frames that it is asked for. With a budget of 0 it labels
    `FIRST_LABELS` frames once and none after."""

    def __init__(self, budget: int) -> None:
        self.budget, self._once = budget, FIRST_LABELS if budget == 0 else 0
        self.seen: list[tuple[str, str]] = []
        """Domain and class of each sample; sample numbers start at 1."""
        self.labelled: set[int] = set()
        """Numbers of the samples that got a label, for whoever empties it."""

    def label(self, at: Sequence[int]) -> list[str | None]:
        # The oldest frames since the onset are the ones that may still show the domain before.
        free = len(at) - (self.budget or self._once)
        self._once = 0
        self.labelled.update(at[max(free, 0) :])
        return [None if i < free else self.seen[number - 1][1] for i, number in enumerate(at)]

    def domain(self, at: Sequence[int]) -> str:
        return Counter(self.seen[number - 1][0] for number in at).most_common(1)[0][0]


class _Stopwatch:
    """Seconds by phase: `spent` in all, `growth` since the last adaptation began."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.growth: dict[str, float] = {}
        self._marked = time.monotonic()

    def lap(self, phase: str) -> None:
        """Add the time since the last call to `phase`."""
        now = time.monotonic()
        for total in (self.spent, self.growth):
            total[phase] = total.get(phase, 0.0) + now - self._marked
        self._marked = now


class _Run:
    """One simulation: the board, what it is shown, and what is recorded of it."""

    def __init__(
        self,
        options: SimulateOptions,
        data: FolderData,
        encoder: Encoder,
        view: LiveView,
        store: Store,
        system: System,
        policy: BoardPolicy,
        first: int,
    ) -> None:
        self.options, self.data, self.encoder, self.view = options, data, encoder, view
        self.store, self.first, self.asked_to_stop = store, first, threading.Event()
        self.stopped: System | None = None
        """The confirmed generation at the time when you stopped the run; None while it goes on."""
        self.truth, self.watch = GroundTruth(options.labels), _Stopwatch()
        self.board = Board(
            Live(system, system),
            encoder,
            self.truth,
            lambda: len(self.truth.seen) / options.fps,
            _board_policy(options, policy),
            store=store,
            seed=options.seed,
            on_progress=self._progress,
            on_event=self._event,
        )
        self.rows: list[tuple[float | None, ...]] = []
        self.starts: list[int] = []
        self.events: list[Event] = []
        self.shifts: list[ShiftRecord] = []
        self.trace: list[tuple[float, float, str]] = []
        self.times: dict[str, dict[str, float]] = {}
        self.labelled: dict[str, set[int]] = {}
        """Numbers of the samples whose labels were spent on a domain."""
        self.images: list[str] = []
        """The file of each sample, relative to the data set."""
        for warning in (*data.warnings, *_shortage(options, data, self.board.policy)):
            self._note("data", warning)
        self.exam = Exam(data, encoder, system.space, options.tests, options.seed, view.phase)
        for warning in self.exam.warnings:
            self._note("skipped", warning)
        self.watch.lap("test images")

    @property
    def system(self) -> System:
        """What the record describes. If you stop a run, a generation on probation is dropped."""
        return self.board.system if self.stopped is None else self.stopped

    def stream(self) -> None:
        """Show the board every domain that it has not learned, and measure the accuracies after each."""
        names = self.data.domains
        if self.first:
            todo = f"going on with {names[self.first]}" if self.first < len(names) else "no domain is left to stream"
            self._note("resumed", f"generation {self.store.confirmed} knows {', '.join(self.system.names)}: {todo}")
        for index in range(self.first):  # older heads are frozen, so an earlier state is a part of the present one
            self.starts.append(0)
            known = tuple(d for d in self.system.domains if d.name in names[: index + 1])
            self._measure(replace(self.system, domains=known))
        try:
            with _ctrl_c() as self.asked_to_stop:
                for index in range(self.first, len(names)):
                    self.starts.append(len(self.truth.seen))
                    for item in _streamed(self.data, names[index], self.options):
                        self._show(names[index], item)
                    self._measure(self.system)
                    self._close_segment(index)
        except KeyboardInterrupt:
            self.stopped = generations.load(self.store)
            self._note("stopped", self._kept())
            if len(self.rows) < len(names):
                self._measure(self.system)

    def _measure(self, system: System) -> None:
        self.rows.append(self.exam.accuracies(system, self.board.engine))
        self.watch.lap("evaluation")

    def _kept(self) -> str:
        """What is left of a run that you stopped."""
        if self.options.store is None:
            return "stopped by you; without --store nothing that was learned is kept"
        known = ", ".join(self.system.names) or "nothing was learned yet"
        kept = f"{self.options.store} keeps generation {self.store.confirmed} ({known})"
        return f"stopped by you; {kept}: the same command goes on from there"

    def _show(self, domain: str, item: Item) -> None:
        self._stop_if_asked()
        try:
            frame = decode(item.path, self.encoder.input_size)
        except UndecodableInput as error:
            self._note("skipped", str(error))
            return
        self.truth.seen.append((domain, self.data.classes[item.label]))
        self.images.append(item.relative)
        self.view.at = len(self.truth.seen)
        prediction, _ = self.board.step(frame)
        self.watch.lap("stream")
        route = prediction.route or ABSTAIN
        self.trace.append((prediction.novelty, prediction.p, route))
        self.view.sample(self.view.at, domain, *_shown(prediction), route)

    def _close_segment(self, index: int) -> None:
        """Record a change of domain that was not noticed."""
        names = self.data.domains
        noticed = any(shift.detected and shift.to == names[index] for shift in self.shifts)
        if index and not noticed:
            onset = self.starts[index]
            missed = ShiftRecord(from_=names[index - 1], to=names[index], onset=onset, detected=False)
            self.shifts.append(missed)
            self._note("missed", f"the change from {names[index - 1]} to {names[index]} was not noticed")

    def _event(self, event: events.BoardEvent) -> None:
        match event:
            case events.Shifted():
                self._shift(event.at)
            case events.Searching():
                self.watch.growth = {}
                self.labelled[event.domain] = self.labelled.get(event.domain, set()) | self.truth.labelled
                self.truth.labelled = set()
            case events.Grown():
                self.times[event.domain] = dict(self.watch.growth)
        self._note(event.kind, event.text)

    def _shift(self, at: int) -> None:
        """Record a declared shift: a change of domain, once, or a false alarm."""
        index = len(self.starts) - 1
        name, onset = self.data.domains[index], self.starts[index]
        if name in self.board.system.names:
            self.shifts.append(ShiftRecord(from_=name, to=name, at=at, detected=False, false_alarm=True))
        elif index and not any(shift.to == name for shift in self.shifts):
            self.shifts.append(
                ShiftRecord(
                    from_=self.data.domains[index - 1],
                    to=name,
                    at=at,
                    onset=onset,
                    delay_samples=at - onset,
                    detected=True,
                )
            )

    def _progress(self, phase: str, done: int, total: int) -> None:
        self.watch.lap(phase)
        self.view.phase(phase, done, total)
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        if self.asked_to_stop.is_set():
            raise KeyboardInterrupt

    def _note(self, kind: str, text: str) -> None:
        if len(self.events) < MAX_EVENTS:
            self.events.append(Event(at=len(self.truth.seen), kind=kind, text=text[:2000]))
        self.view.event(kind, text)

    def record(self, blank: RunRecord) -> RunRecord:
        """The record of the finished run; `blank` holds what was known before it."""
        system, engine, count = self.system, self.board.engine, len(self.data.domains)
        learned = np.array([[np.nan if x is None else x for x in row] for row in self.rows])[:, : len(self.rows)]
        rest = count - len(self.rows)
        fields = {
            "accuracy_matrix": [*self.rows, *[(None,) * count] * rest],
            "routing_accuracy": self.exam.routing(system, engine),
            "final_accuracy": mean(self.rows[-1]),
            "bwt": metrics.bwt(learned) if system.domains else None,
            "forgetting": [*metrics.forgetting(learned), *[None] * rest],
            "oracle_route_accuracy": self.exam.oracle(system, engine),
            "ood": self.exam.ood(system),
            "facts": [self._facts(domain) for domain in self.data.domains],
            "stopped_at": None if self.stopped is None else len(self.trace),
            "shift": self.shifts,
            "stream": self._thinned(),
            "growth": [_growth(d.name, d.growth, self.times.get(d.name, {})) for d in system.domains],
            "events": self.events,
            "timings": self.watch.spent,
        }
        return RunRecord.model_validate(dict(blank) | fields)

    def _facts(self, domain: str) -> DomainFacts:
        numbers = [number for number, (seen, _) in enumerate(self.truth.seen, start=1) if seen == domain]
        labelled = sorted(self.labelled.get(domain, set()))
        classes = [{self.truth.seen[number - 1][1] for number in group} for group in (numbers, labelled)]
        return DomainFacts(
            domain=domain,
            frames=len(numbers),
            images=len({self.images[number - 1] for number in numbers}),
            labelled=len(labelled),
            labels=len({self.images[number - 1] for number in labelled}),
            unlabelled=tuple(sorted(classes[0] - classes[1])),
            tests=len(self.exam.sets[domain].h),
            thumbnails=_thumbnails(_streamed(self.data, domain, self.options), len(self.data.domains)),
        )

    def _thinned(self) -> Stream:
        kept = evenly(len(self.trace))
        return Stream(
            at=tuple(i + 1 for i in kept),
            novelty=tuple(self.trace[i][0] for i in kept),
            p=tuple(self.trace[i][1] for i in kept),
            route=tuple(self.trace[i][2] for i in kept),
            domain=tuple(self.truth.seen[i][0] for i in kept),
        )


@contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, so that it never interrupts a change of the store. A second one raises
    KeyboardInterrupt at once. Outside the main thread, which alone may handle signals, nothing sets it."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def stop(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _board_policy(options: SimulateOptions, policy: BoardPolicy) -> BoardPolicy:
    search = SearchPolicy(specs=options.specs, seed=options.seed)
    adapt = replace(policy.adapt, budget=options.budget, search=search, latency=options.latency)
    if options.labels:
        return replace(policy, labels=options.labels, adapt=adapt)
    return replace(policy, labels=FIRST_LABELS, adapt=adapt, unlabelled=policy.unlabelled or UnlabelledPolicy())


def _streamed(data: FolderData, domain: str, options: SimulateOptions) -> list[Item]:
    """The training images of a domain in a seeded order, some shown again where there are fewer than `samples`."""
    items = split(data.items[domain])[0]
    rng = np.random.default_rng([options.seed, data.domains.index(domain)])
    order = [int(place) for place in rng.permutation(len(items))[: options.frames]]
    order += [int(place) for place in rng.integers(len(items), size=options.frames - len(order))]
    return [items[place] for place in order]


def _shortage(options: SimulateOptions, data: FolderData, policy: BoardPolicy) -> list[str]:
    """What is too little for the figures to mean much, or for a shift to be found: value, limit, remedy."""
    told = []
    needed = policy.labels + policy.probation + SLOWEST_SHIFT
    if len(data.domains) > 1 and options.frames < needed:
        why = f"{policy.labels} to label, {policy.probation} on probation and up to {SLOWEST_SHIFT} to notice a shift"
        told.append(
            f"{options.frames} frames of each domain are fewer than {needed} ({why}): a shift may be missed; "
            f"give --samples {needed} or fewer --labels"
        )
    for domain in data.domains:
        found = len(split(data.items[domain])[0])
        if found < options.frames:
            told.append(
                f"{domain} has {found} training images for {options.frames} frames: they are shown repeatedly; "
                "add images or lower --samples"
            )
    if len(data.classes) < 2:
        told.append(f"{data.classes[0]} is the only class, so every answer is right: add a second class folder")
    return told


def _thumbnails(items: Sequence[Item], domains: int) -> list[str]:
    """The first image of each class as JPEG in base64: at most `THUMBNAILS` over all `domains`."""
    most, found = min(MAX_THUMBNAILS, THUMBNAILS // domains), dict[int, str]()
    for item in items:
        if len(found) < most and item.label not in found:
            with suppress(UndecodableInput):
                buffer = io.BytesIO()
                Image.fromarray(decode(item.path, THUMBNAIL)).save(buffer, "JPEG", quality=70)
                found[item.label] = base64.b64encode(buffer.getvalue()).decode()
    return list(found.values())


def _shown(prediction: Prediction) -> tuple[float, float | None]:
    return prediction.novelty, None if prediction.route is None else prediction.p


def _growth(domain: str, growth: Mapping[str, object], times: Mapping[str, float]) -> Growth:
    points = growth["candidates"]
    assert isinstance(points, list)
    return Growth.model_validate(
        {
            "domain": domain,
            **{key: growth[key] for key in GROWTH},
            "search_s": times.get("search", 0.0),
            "train_s": times.get("train", 0.0),
            "total_s": sum(times.values()) if times else None,
            "validation_accuracy": growth.get("validation_accuracy"),
            "candidates": [{key: point[key] for key in CANDIDATE} for point in points],
        }
    )


def _blank(options: SimulateOptions, data: FolderData, encoder: Encoder, name: str, created: float) -> RunRecord:
    """The record before the run. Raises `UsageError` for names that it cannot hold."""
    try:
        return RunRecord(
            title=options.title,
            created=created,
            seed=options.seed,
            encoder=EncoderInfo(name=name, digest=encoder.digest, input=encoder.input_size),
            domains=data.domains,
            classes=data.classes,
            versions={"edgeear": __version__, **versions()},
            machine=machine(),
        )
    except ValidationError as error:
        reason = error.errors(include_url=False, include_input=False)[0]["msg"]
        raise UsageError(f"{data.root}: its domains or classes cannot be reported ({reason}): rename them") from error


def _prepare(options: SimulateOptions) -> None:
    """Try everything that would spoil the end of a run before its start."""
    for package in ("matplotlib", "jinja2") if options.report is not None else ():
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"the report needs {package}: {installation('report')}, or ask for --json only")
    for path in (options.report, options.json):
        if path is not None and path.is_dir():
            raise UsageError(f"{path} is a folder: name a file in it")
        if path is not None:
            _make_folder(path.parent)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DeviceError(f"{folder}: cannot be made ({error.strerror}): name a file in a writable folder") from error


def _learned(store: Store, folder: Path, data: FolderData, encoder: Encoder) -> System | None:
    """What an earlier run left in the store, if anything. Raises `UsageError` for a domain that this run does not
    stream, `FormatError` for another encoder."""
    system = generations.load(store)
    if system is None:
        return None
    generations.require_encoder(system, encoder.digest)
    if unknown := sorted(set(system.names) - set(data.domains)):
        raise UsageError(
            f"{folder} knows {', '.join(unknown)}, which {data.root} does not stream: "
            "name all its domains with --order, or give a new folder"
        )
    return system


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise DeviceError(f"{path}: cannot be written ({error.strerror}): name a file in a writable folder") from error
