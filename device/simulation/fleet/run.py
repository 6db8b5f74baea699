"""A fleet in one process: N real daemons, stepped in turn with a simulated clock, at a real broker.

Rules of this file:

1. Every device is what `edgeear run` opens: its own state folder, store, outbox, link and session. The devices share
   the encoder, the first generation and the pictures, which are only read.
2. Time is simulated and the same for all: it advances by `every_s` a round, in which each device is shown one frame.
   The network and the learning process run in real time: a round never waits for them, `settle` does.
3. The encoder's answers are cached by picture, so that N devices on two cores do not cost N encoders. The time of the
   encoder is measured when a picture is first seen, and reported apart from the time of a device.
4. An operator receives everything and commands every device, and check.py compares what was said with what was done.
   Any difference is a fault, and the fleet has not passed.
"""

from __future__ import annotations

import gc
import math
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from adaptors.progress import Progress
from device.board.events import ENDED, Stopped
from device.board.learner import Learner
from device.daemon import machine
from device.daemon.assemble import opened
from device.daemon.config.settings import (
    Config,
    DeviceSection,
    LearningSection,
    MqttSection,
    TelemetrySection,
)
from device.daemon.loop import Daemon
from device.simulation.fleet.check import Truth
from device.simulation.fleet.data import Pictures, read_pictures
from device.simulation.fleet.factory import SharedEncoder, factory, look_at_all
from device.simulation.fleet.operator import FleetOperator
from device.simulation.fleet.place import EMBEDDED, broker_address, broker_at, link_cpu_s, raise_file_limit
from device.simulation.fleet.result import Costs, Fleet, FleetResult, Row, Taught, result
from device.simulation.fleet.script import PROBATION, STAGGER, Device, script
from edgeear.errors import UsageError
from edgeear.system import System
from edgeear.types import Encoder

PATIENCE_S = 60.0
"""Seconds without a message after which no more is expected."""
LOOK_S = 0.02
"""Seconds between two polls of devices that wait for the network or a learner."""
MOVING = 0.5
"""Share of the devices that move to another domain midway."""
FOREVER_S = 31_536_000.0
"""Labels are waited for longer than any run."""


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


def run_fleet(
    options: FleetOptions,
    encoder: Encoder,
    learner: Learner,
    *,
    show: Progress = lambda *_: None,
    system: System | None = None,
) -> FleetResult:
    """Run the fleet. All devices start with `system`; if it is None, `learner` learns it from the first domain.

    Raises `UsageError`, `DataError`, `DeviceError` if the fleet cannot run at all.
    """
    raise_file_limit(options.devices)
    shared = SharedEncoder(encoder)
    pictures = read_pictures(options.data, options.order, encoder.input_size, options.samples, options.seed, show)
    system = system or factory(shared, learner, pictures, options.probation, options.seed, show)
    look_at_all(system, shared, pictures, show)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeear-fleet-")))
        host, port, broker = stack.enter_context(broker_at(options.broker))
        operator = stack.enter_context(FleetOperator(host, port, f"fleet-{secrets.token_hex(4)}", broker))
        run = _Run(options, shared, pictures, system, operator, show)
        with run.started(folder, host, port):
            run.stream()
            run.teach()
            run.end()
        run.leave()
        return run.result(operator.broker or "unknown", f"{host}:{port}")


class _Run:
    """A running fleet. `clock` is the simulated time that all its devices read."""

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
        self._script = script(options.samples, pictures.shown[pictures.domains[0]][0], system, encoder)

    def clock(self) -> float:
        return self._now

    @contextmanager
    def started(self, folder: Path, host: str, port: int) -> Iterator[None]:
        """Open all devices, one after another, and wait until all are online; close them at the end."""
        options, costs = self.options, self.costs
        gc.collect()
        costs.rss_mb_before, begun, cpu = machine.rss_mb() or 0.0, time.monotonic(), time.process_time()
        with ExitStack() as stack:
            for number in range(options.devices):
                name = f"d-{number:04}"
                self.operator.expect(name)
                config = configuration(options, self.operator.site, name, folder / name, host, port)
                running = stack.enter_context(
                    opened(config, now=self.clock, timer=self.clock, encoder=self.encoder, start=self.system)
                )
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
        """Show every device its frames and send commands meanwhile; midway some devices move to another domain."""
        costs, samples = self.costs, self.options.samples
        begun, cpu, heard = time.monotonic(), time.process_time(), self.operator.messages
        linked = link_cpu_s()
        for index in range(2 * samples):
            if index == samples:
                self.settle()  # so that no device is paused any more when the domain changes
                for device in self.devices:
                    device.pictures = device.elsewhere
            self._round(index, self.devices)
            self.show("frames", (index + 1) * len(self.devices), 2 * samples * len(self.devices))
        self.settle()
        costs.stream_s, costs.cpu_s = time.monotonic() - begun, time.process_time() - cpu
        costs.link_s = link_cpu_s() - linked
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
        busy = device.daemon.turn()
        device.cpu_s += time.thread_time() - begun - (self.encoder.spent_s - encoding)
        if busy:
            self.costs.turns_ms.append(1e3 * (time.perf_counter() - wall))

    def settle(self) -> None:
        """Wait until every command is answered; the simulated time stands still."""
        self._await(self.operator.answered)

    def _await(self, predicate: Callable[[], bool]) -> None:
        """Step all devices until `predicate` is true or no message came for `PATIENCE_S`."""
        heard, since = -1, time.monotonic()
        while not self.operator.wait(predicate, LOOK_S) and time.monotonic() - since < PATIENCE_S:
            for device in self.devices:
                self._turn(device)
            if self.operator.messages != heard:
                heard, since = self.operator.messages, time.monotonic()

    def teach(self) -> None:
        """Label the frames that some devices ask for, one device after another, as an operator would."""
        wanting = [device for device in self.devices if device.daemon.board.phase == "labelling"]
        for number, device in enumerate(wanting[: self.options.teach]):
            self.show("teach", number, self.options.teach)
            self.taught.append(self._taught(device))
            self.show("teach", number + 1, self.options.teach)

    def _taught(self, device: Device) -> Taught:
        begun, board = time.monotonic(), device.daemon.board
        heard = self.operator.heard[device.name]
        wanted = [seen.number for seen in board.wanted()]
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
        self._await(lambda: any(heard.kinds[event.kind] for event in ENDED))
        outcome = next((event.kind for event in ENDED if heard.kinds[event.kind]), "silence")
        return Taught(device.name, outcome, device.target in board.system.names, time.monotonic() - begun)

    def end(self) -> None:
        """Ask every device for a last report, send the last telemetry, and note what every device did."""
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
            daemon.tell(Stopped(*daemon.board.moment, "the fleet ends"))
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
        """Wait for the offline status of every device."""
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


def configuration(options: FleetOptions, site: str, name: str, state: Path, host: str, port: int) -> Config:
    """The configuration of one device."""
    return Config(
        device=DeviceSection(site=site, name=name, state=state, encoder=options.encoder, seed=options.seed),
        mqtt=MqttSection(host=host, port=port, session_expiry_s=300),
        learning=LearningSection(
            labels=options.labels, probation=options.probation, specs=options.specs, label_wait_s=FOREVER_S
        ),
        telemetry=TelemetrySection(period_s=options.period_s),
    )
