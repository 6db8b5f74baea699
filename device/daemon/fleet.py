"""A fleet in one process: N real daemons, turned in a round with a made-up clock, against a real broker.

Rules of this file:

1. Every device is what `edgeear run` opens: its own state folder, store, outbox, link and session. Shared are the
   encoder, the factory's generation and the pictures, which are only read.
2. Time is made up and the same for all: it moves by `every_s` for a round, in which each device is shown one frame.
   The network and the learning process keep their own time: a round never waits for them, `settle` does.
3. An encoder's answer is remembered by picture, so that N devices on two cores do not cost N encoders. What it takes
   is measured on the pictures when they are first seen, and told apart from what a device takes.
4. An operator hears everything, commands every device, and what was said is held against what was done
   (fleet_check.py). Whatever does not fit is a fault, and the fleet has not passed.
"""

from __future__ import annotations

import gc
import hashlib
import math
import os
import resource
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from device.board import Board, BoardPolicy
from device.daemon import machine
from device.daemon.assemble import blank, opened
from device.daemon.config import Config, DeviceSection, LearningSection, MqttSection, SourceSection, TelemetrySection
from device.daemon.daemon import LEARNED, Daemon
from device.daemon.fleet_check import Truth
from device.daemon.fleet_data import Picture, Pictures, png, read_pictures
from device.daemon.fleet_operator import FleetOperator
from device.daemon.fleet_result import Costs, Fleet, FleetResult, Row, Taught, result
from device.engine import OrtEngine
from device.learner import Learner
from device.mqtt.embedded import embedded_broker
from edgeear.errors import DeviceError, UsageError
from edgeear.flow import Progress, infer
from edgeear.shift import ShiftState
from edgeear.system import Live, System
from edgeear.types import F32, U8, Encoder, Tap

FILES, SPARE_FILES = 12, 256
"""Open files of a device, with its client at an embedded broker, and of everything else."""
PATIENCE_S = 60.0
"""Seconds without a message after which no more is expected."""
LOOK_S = 0.02
"""Between two looks at devices that wait for the network or a learner."""
MOVING = 0.5
"""Share of the devices that move to another domain midway."""
FOREVER_S = 31_536_000.0
"""Labels are waited for longer than any run."""
EMBEDDED = "embedded"


@dataclass(frozen=True)
class FleetOptions:
    """`devices` of one site at `broker` ("embedded" or HOST[:PORT]), on the data set in the folder `data`.

    `samples`: frames shown before midway, and after it; `labels` asked for after a shift; `teach`: devices that the
    operator labels frames for, so that they learn; `specs` scored by their search. `every_s`: between two frames of a
    device, `period_s`: of its telemetry, a multiple of that. Raises UsageError for numbers out of range.
    """

    data: Path
    encoder: Path
    order: tuple[str, ...] | None = None
    devices: int = 10
    broker: str = EMBEDDED
    samples: int = 120
    labels: int = 40
    specs: int = 20
    teach: int = 0
    probation: int = 20
    every_s: float = 10.0
    period_s: float = 300.0
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = (("devices", 1), ("samples", 20), ("labels", 8), ("specs", 1), ("teach", 0), ("probation", 1))
        for name, least in bounds:
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        if self.teach > self.devices * MOVING:
            raise UsageError(f"teach is {self.teach}: half of {self.devices} devices move and can be taught")
        if not self.every_s > 0 or self.period_s % self.every_s:
            raise UsageError(f"period_s is {self.period_s:g}: it must be a multiple of every_s, {self.every_s:g}")
        broker_address(self.broker)


class SharedEncoder:
    """`edgeear.types.Encoder` that answers from memory what it has seen. `spent_s`: CPU seconds inside it; `fresh`
    frames took `fresh_s` of them."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder, self._known = encoder, dict[tuple[bytes, tuple[str, ...]], dict[str, F32]]()
        self.spent_s, self.fresh_s, self.fresh = 0.0, 0.0, 0

    @property
    def digest(self) -> str:
        return self._encoder.digest

    @property
    def taps(self) -> tuple[Tap, ...]:
        return self._encoder.taps

    @property
    def input_size(self) -> tuple[int, int]:
        return self._encoder.input_size

    def encode(self, frames: U8, taps: Sequence[str]) -> dict[str, F32]:
        begun = time.thread_time()
        key = (hashlib.sha256(np.ascontiguousarray(frames).data).digest(), tuple(taps))
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._encoder.encode(frames, taps)
            self.fresh += len(frames)
            self.fresh_s += time.thread_time() - begun
        self.spent_s += time.thread_time() - begun
        return dict(found)


@dataclass
class Device:
    """One daemon and what it is shown: `pictures` of its `home` domain, midway those `elsewhere`, of its `target`.
    `cpu_s`: of its turns, without the encoder."""

    name: str
    daemon: Daemon
    pictures: Iterator[Picture]
    elsewhere: Iterator[Picture]
    home: str
    target: str
    shown: list[Picture] = field(default_factory=list)
    cpu_s: float = 0.0

    @property
    def moves(self) -> bool:
        return self.home != self.target


def run_fleet(
    options: FleetOptions,
    encoder: Encoder,
    learner: Learner,
    *,
    show: Progress = lambda *_: None,
    system: System | None = None,
) -> FleetResult:
    """Run the fleet and say how it went. `system` is what all devices leave the factory with; where there is none,
    `learner` learns it from the first domain.

    Raises `UsageError`, `DataError`, `DeviceError` where it could not be run at all.
    """
    raise_file_limit(options.devices)
    shared = SharedEncoder(encoder)
    pictures = read_pictures(options.data, options.order, encoder.input_size, options.samples, options.seed, show)
    system = system or factory(options, shared, learner, pictures, show)
    look_at_all(system, shared, pictures, show)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeear-fleet-")))
        host, port, broker = stack.enter_context(broker_at(options.broker))
        operator = stack.enter_context(FleetOperator(host, port, f"fleet-{secrets.token_hex(4)}"))
        run = _Run(options, shared, pictures, system, operator, show)
        with run.started(folder, host, port):
            run.stream()
            run.teach()
            run.end()
        run.leave()
        return run.result(broker or operator.broker or "unknown", f"{host}:{port}")


class _Run:
    """A fleet at work. `clock` is the made-up time that all its devices read."""

    def __init__(
        self,
        options: FleetOptions,
        encoder: SharedEncoder,
        pictures: Pictures,
        system: System,
        operator: FleetOperator,
        show: Progress,
    ) -> None:
        self.options, self.encoder, self.pictures, self.system = options, encoder, pictures, system
        self.operator, self.show = operator, show
        self.devices: list[Device] = []
        self.taught: list[Taught] = []
        self.truths: dict[str, Truth] = {}
        self.costs = Costs(encoder_ms=1e3 * encoder.fresh_s / max(1, encoder.fresh))
        self._began = self._now = float(math.floor(time.time()))
        self._rounds = 0
        self._script = script(options, pictures, system, encoder)

    def clock(self) -> float:
        return self._now

    @contextmanager
    def started(self, folder: Path, host: str, port: int) -> Iterator[None]:
        """All devices, opened one after another and seen online; closed at the end."""
        options, costs = self.options, self.costs
        gc.collect()
        costs.rss_mb_before, begun, cpu = machine.rss_mb() or 0.0, time.monotonic(), time.process_time()
        with ExitStack() as stack:
            for number in range(options.devices):
                name = f"d-{number:04}"
                self.operator.expect(name)
                config = configuration(options, self.operator.site, name, folder / name, host, port)
                running = stack.enter_context(opened(config, now=self.clock, encoder=self.encoder, start=self.system))
                self.devices.append(self._device(number, name, running.daemon))
                self.show("devices", number + 1, options.devices)
            self._await(lambda: all(heard.births for heard in self.operator.heard.values()))
            costs.start_s, costs.start_cpu_s = time.monotonic() - begun, time.process_time() - cpu
            costs.rss_mb_started, costs.files = machine.rss_mb() or 0.0, len(os.listdir("/proc/self/fd"))
            costs.disk_mb = sum(f.stat().st_blocks * 512 for f in folder.rglob("*") if f.is_file()) / 2**20
            yield

    def _device(self, number: int, name: str, daemon: Daemon) -> Device:
        domains, moving = self.pictures.domains, number % max(2, round(1 / MOVING)) == 1
        target = domains[1 + number // 2 % (len(domains) - 1)] if moving else domains[0]
        seed = self.options.seed * 100_003 + number
        here, there = (self.pictures.endless(domain, seed) for domain in (domains[0], target))
        return Device(name, daemon, here, there, domains[0], target)

    def stream(self) -> None:
        """Everybody's frames: those of the first domain, then some devices move; commands along the way."""
        costs, samples = self.costs, self.options.samples
        begun, cpu, heard = time.monotonic(), time.process_time(), self.operator.messages
        loop, linked = time.thread_time(), link_cpu_s()
        for index in range(2 * samples):
            if index == samples:
                self.settle()  # so that nobody is paused any more when the world changes
                for device in self.devices:
                    device.pictures = device.elsewhere
            self._round(index, self.devices)
            self.show("frames", (index + 1) * len(self.devices), 2 * samples * len(self.devices))
        self.settle()
        costs.stream_s, costs.cpu_s = time.monotonic() - begun, time.process_time() - cpu
        costs.loop_s, costs.link_s = time.thread_time() - loop, link_cpu_s() - linked
        costs.messages, costs.virtual_s = self.operator.messages - heard, self._rounds * self.options.every_s
        costs.rss_mb_after = machine.rss_mb() or 0.0

    def _round(self, index: int, shown: Sequence[Device]) -> None:
        self._now += self.options.every_s
        self._rounds += 1
        for number, device in enumerate(self.devices):
            for ask in self._script.get(index - number % STAGGER, ()):
                ask(self.operator, device)
        seen = {device.name for device in shown}
        for device in self.devices:
            if device.name in seen:
                one = next(device.pictures)
                device.shown.append(one)
                device.daemon.frames.put(one.frame, self._now, one.ref)
            self._turn(device)

    def _turn(self, device: Device) -> None:
        wall, begun, encoding = time.perf_counter(), time.thread_time(), self.encoder.spent_s
        if not device.daemon.turn():
            return
        device.cpu_s += time.thread_time() - begun - (self.encoder.spent_s - encoding)
        self.costs.turns_ms.append(1e3 * (time.perf_counter() - wall))

    def settle(self) -> None:
        """Until every command is answered, without time moving."""
        self._await(self.operator.answered)

    def _await(self, predicate: Callable[[], bool]) -> None:
        """Turn everybody until it is true, or nothing was heard for `PATIENCE_S`: what is missing then is a fault at the
        end."""
        heard, since = -1, time.monotonic()
        while not self.operator.wait(predicate, LOOK_S) and time.monotonic() - since < PATIENCE_S:
            for device in self.devices:
                self._turn(device)
            if self.operator.messages != heard:
                heard, since = self.operator.messages, time.monotonic()

    def teach(self) -> None:
        """Label, as an operator would, what some devices ask for, one device after another."""
        wanting = [device for device in self.devices if device.daemon.board.phase == "labelling"]
        for number, device in enumerate(wanting[: self.options.teach]):
            self.show("teach", number, self.options.teach)
            self.taught.append(self._taught(device))
            self.show("teach", number + 1, self.options.teach)

    def _taught(self, device: Device) -> Taught:
        begun, board = time.monotonic(), device.daemon.board
        heard = self.operator.heard[device.name]
        wanted = [at for at, _, _ in board.wanted()]
        self._await(lambda: set(wanted) <= set(heard.wanted))
        labels = {at: device.shown[at - 1].label for at in heard.wanted if at in wanted}
        body = {"session": device.daemon.session, "labels": labels, "domain": device.target}
        self.operator.ask(device.name, "label", body, facts={"accepted": len(wanted)})
        self.settle()
        while board.phase == "learning":
            self.operator.wait(lambda: False, LOOK_S)
            for each in self.devices:
                self._turn(each)
        for _ in range(4 * PROBATION):
            if board.phase != "probation":
                break
            self._round(-STAGGER, [device])
        self._await(lambda: any(heard.kinds[kind] for kind in LEARNED))
        outcome = next((kind for kind in LEARNED if heard.kinds[kind]), "silence")
        return Taught(device.name, outcome, device.target in board.system.names, time.monotonic() - begun)

    def end(self) -> None:
        """Ask everybody for a last report, have the last telemetry sent, and note what everybody did."""
        for device in self.devices:
            facts = {
                "session": device.daemon.session,
                "generation": device.daemon.board.system.generation,
                "frames.answered": len(device.shown),
                "settings": {"probation": PROBATION},
            }
            self.operator.ask(device.name, "report", {}, facts=facts)
        self.settle()
        rounds_a_window = round(self.options.period_s / self.options.every_s)
        for device in self.devices:
            daemon = device.daemon
            daemon.report_window()
            daemon.note("stopped", "the fleet ends")
            self.truths[device.name] = Truth(
                daemon.session,
                daemon.outbox.boot,
                len(device.shown),
                daemon.counts.frames,
                self._rounds // rounds_a_window + 1,
                self._began,
                self._now,
            )

    def leave(self) -> None:
        """Until everybody's farewell was heard."""
        self.operator.wait(lambda: all(heard.farewells for heard in self.operator.heard.values()), PATIENCE_S)

    def result(self, broker: str, where: str) -> FleetResult:
        operator = self.operator
        rows = [
            Row(
                d.name,
                d.target if d.moves else "",
                d.cpu_s,
                self.truths[d.name],
                operator.asked[d.name],
                operator.heard[d.name],
            )
            for d in self.devices
        ]
        o = self.options
        about = {"samples": o.samples, "seed": o.seed, "every_s": o.every_s, "period_s": o.period_s}
        fleet = Fleet(broker, where, about, self.pictures.domains, o.teach)
        return result(fleet, rows, self.costs, self.taught)


PROBATION = 33
"""What `set-policy` sets, to be found in the last report."""
STAGGER = 10
"""Rounds over which one command of the script is spread among the devices."""
Ask = Callable[[FleetOperator, Device], None]


def script(options: FleetOptions, pictures: Pictures, system: System, encoder: Encoder) -> dict[int, list[Ask]]:
    """The commands that every device gets, by round before midway."""
    one = pictures.shown[pictures.domains[0]][0]
    prediction, _, _ = infer(system, OrtEngine(encoder), ShiftState(), one.frame)
    image, said = png(one.frame), {"label": prediction.label, "route": prediction.route}

    def report(operator: FleetOperator, device: Device) -> None:
        operator.ask(device.name, "report", {}, facts={"session": device.daemon.session}, own_topic=False)

    def look(operator: FleetOperator, device: Device) -> None:
        operator.ask(device.name, "infer", {"image": image}, facts=said)

    def pause(operator: FleetOperator, device: Device) -> None:
        operator.ask(device.name, "pause", {"paused": True}, facts={"paused": True})

    def resume(operator: FleetOperator, device: Device) -> None:
        operator.ask(device.name, "pause", {"paused": False}, facts={"paused": False})

    def malformed(operator: FleetOperator, device: Device) -> None:
        operator.ask(device.name, "pause", {"paused": "perhaps"}, "refused")

    def expired(operator: FleetOperator, device: Device) -> None:
        operator.ask(device.name, "pause", {"paused": True, "expires": 1.0}, "refused")

    def settings(operator: FleetOperator, device: Device) -> None:
        operator.ask(device.name, "set-policy", {"probation": PROBATION})

    asks: tuple[Ask, ...] = (report, look, pause, resume, malformed, expired, settings)
    room = max(len(asks), options.samples - STAGGER)
    return {room * k // len(asks): [ask] for k, ask in enumerate(asks)}


def factory(
    options: FleetOptions,
    encoder: SharedEncoder,
    learner: Learner,
    pictures: Pictures,
    show: Progress,
) -> System:
    """What every device leaves the factory with: the first domain, learned and confirmed as on a board. Raises
    `DeviceError` where it is not."""
    lessons = pictures.lessons
    system = blank(encoder)
    policy = BoardPolicy(labels=len(lessons), memory=len(lessons), probation=options.probation)
    teacher = _Teacher([lesson.label for lesson in lessons], pictures.domains[0])
    board = Board(Live(system, system), encoder, teacher, lambda: 0.0, policy, seed=options.seed, learner=learner)
    for number, lesson in enumerate(lessons):
        board.step(lesson.frame)
        show("factory: frames", number + 1, len(lessons))
    events = list(board.poll())
    while board.phase == "learning":
        threading.Event().wait(LOOK_S)
        events += board.poll()
    for one in pictures.shown[pictures.domains[0]]:
        if board.phase != "probation":
            break
        events += board.step(one.frame).events
    if board.system.names != (pictures.domains[0],) or board.phase != "serving":
        told = "; ".join(event.text for event in events[-2:])
        raise DeviceError(f"the factory learned nothing from {len(lessons)} frames ({told}): show it other data")
    return board.system


class _Teacher:
    """`device.board.Labeller` that knows the labels of the first frames."""

    def __init__(self, labels: Sequence[str], domain: str) -> None:
        self._labels, self._domain = labels, domain

    def label(self, at: Sequence[int]) -> list[str | None]:
        return [self._labels[number - 1] if number <= len(self._labels) else None for number in at]

    def domain(self, at: Sequence[int]) -> str:
        return self._domain


def look_at_all(system: System, encoder: SharedEncoder, pictures: Pictures, show: Progress) -> None:
    """Have the encoder see every picture that will be shown, and time it."""
    engine, every = OrtEngine(encoder), [one for shown in pictures.shown.values() for one in shown]
    encoder.fresh, encoder.fresh_s = 0, 0.0
    for number, one in enumerate(every):
        infer(system, engine, ShiftState(), one.frame)
        show("encode", number + 1, len(every))


def configuration(options: FleetOptions, site: str, name: str, state: Path, host: str, port: int) -> Config:
    """What the configuration file of a device would say."""
    return Config(
        device=DeviceSection(site=site, name=name, state=state, encoder=options.encoder, seed=options.seed),
        source=SourceSection(kind="none"),
        mqtt=MqttSection(host=host, port=port, session_expiry_s=300),
        learning=LearningSection(
            labels=options.labels, probation=options.probation, specs=options.specs, label_wait_s=FOREVER_S
        ),
        telemetry=TelemetrySection(period_s=options.period_s),
    )


def broker_address(text: str) -> tuple[str, int]:
    """HOST[:PORT], read. Raises `UsageError`."""
    host, colon, port = text.rpartition(":") if text.rpartition(":")[2].isdecimal() else (text, "", "1883")
    if not host or not 0 < int(port) < 65_536 or any(character in host for character in " /@"):
        raise UsageError(f"broker {text!r}: say {EMBEDDED}, or HOST or HOST:PORT")
    return host.strip("[]") if colon else host, int(port)


@contextmanager
def broker_at(text: str) -> Iterator[tuple[str, int, str]]:
    """Host, port and name of the broker; one of our own is run meanwhile."""
    if text == EMBEDDED:
        with embedded_broker() as broker:
            yield broker.host, broker.port, f"{broker.name} (embedded)"
    else:
        yield *broker_address(text), ""


def raise_file_limit(devices: int) -> None:
    """Let this process, and the broker that it starts, have files enough. Raises `DeviceError` where it may not."""
    needed = devices * FILES + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        most = max(0, (hard - SPARE_FILES) // FILES)
        raise DeviceError(
            f"{devices} devices need {needed} open files, the hard limit is {hard}: raise it (`ulimit -Hn {needed}` as "
            f"root, or LimitNOFILE={needed}), or simulate at most {most}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def link_cpu_s() -> float:
    """CPU seconds of the devices' network threads."""
    links = [t.ident for t in threading.enumerate() if t.name == "edgeear-link" and t.ident is not None]
    return sum(time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in links)
