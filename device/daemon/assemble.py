"""From a configuration to a running board: opens what the loop needs, in order, and closes it in reverse.

What is not there at the start, such as a broker or a camera, is retried while the loop runs. What no retry mends, such
as another encoder's store, is a typed error here, before anything is announced.
"""

from __future__ import annotations

import importlib.util
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from device.board.board import Board, BoardPolicy
from device.board.events import OutboxReset, SettingsIgnored, StoreDamaged
from device.daemon.config.settings import Config
from device.daemon.frames import FrameQueue
from device.daemon.labels import LabelBook
from device.daemon.learning.worker import ProcessLearner, WorkerPolicy
from device.daemon.loop import Daemon, DaemonPolicy
from device.daemon.metrics import Metrics
from device.daemon.sources import Feed, Source
from device.daemon.systemd import Notifier
from device.encoder.cache import cached_encoder
from device.encoder.session import OnnxEncoder, pooled_taps
from device.files import cache_dir
from device.mqtt import homeassistant
from device.mqtt.link import Link, LinkPolicy, TlsFiles
from device.mqtt.outbox import Outbox, OutboxPolicy
from device.provenance import installation
from device.state import generations
from device.state.store import Store
from edgeear import __version__
from edgeear.errors import UsageError
from edgeear.space import HypervectorSpace
from edgeear.system import Live, System
from edgeear.types import Encoder

FAREWELL_S = 5.0
"""Time at the end to send what waits and to say goodbye."""


@dataclass(frozen=True)
class Running:
    """A daemon and the parts of it that its caller may want to know of."""

    daemon: Daemon
    link: Link | None
    metrics_port: int | None


def encoder_file(config: Config) -> Path:
    """The configured encoder, or the built-in one from the cache. Raises `UsageError` where there is none."""
    path = config.device.encoder or cached_encoder(cache_dir())
    if path is None:
        raise UsageError(
            "device.encoder is not set and the cache holds no encoder: run `edgeear encoder export` here or on a "
            "machine that has the learn extra, and set device.encoder to the file"
        )
    return path


def blank(encoder: Encoder) -> System:
    """A system that has learned nothing."""
    return System(encoder.digest, HypervectorSpace(pooled_taps(encoder)))


def serving(store: Store, encoder: Encoder, start: System | None = None) -> System:
    """What a board serves at boot: the confirmed generation, or `start`, else nothing learned. Raises `FormatError`."""
    system = generations.load(store)
    if system is None:
        return start or blank(encoder)
    generations.require_encoder(system, encoder.digest)
    return system


def link_policy(config: Config) -> LinkPolicy:
    """How to reach the broker, as configured."""
    mqtt, password = config.mqtt, config.mqtt.password
    return LinkPolicy(
        host=mqtt.host,
        port=mqtt.port,
        site=config.device.site,
        device=config.device.name,
        protocol=mqtt.protocol,
        keepalive_s=mqtt.keepalive_s,
        username=mqtt.username,
        password=None if password is None else password.get_secret_value(),
        tls=TlsFiles(mqtt.ca, mqtt.cert, mqtt.key) if mqtt.secure else None,
        session_expiry_s=mqtt.session_expiry_s,
        receive_maximum=mqtt.receive_maximum,
        inflight=mqtt.inflight,
        frames=config.source.kind == "mqtt",
    )


@contextmanager
def opened(
    config: Config,
    *,
    now: Callable[[], float] = time.time,
    encoder: Encoder | None = None,
    start: System | None = None,
) -> Iterator[Running]:
    """Everything that `config` names, started; the caller runs the loop. `encoder` is one that is open already, `start`
    what a board serves whose store is new. Raises `EncoderError`, `FormatError`, `StoreBusy`, `OutboxBusy` and other
    `DeviceError`s, `UsageError`."""
    with ExitStack() as stack:
        file = encoder_file(config)
        encoder = encoder or OnnxEncoder(file, threads=config.device.threads)
        store = stack.enter_context(Store.open(config.device.store))
        system = serving(store, encoder, start)
        outbox = stack.enter_context(Outbox.open(config.device.outbox, outbox_policy(config), now()))
        daemon = _daemon(config, encoder, file, store, system, outbox, now, stack)
        source = config.source.open(Feed(encoder.input_size, daemon.frames, now))
        link = _link(config, daemon, outbox, source, now, stack)
        port = _metrics(config, daemon, link, stack)
        if source is not None:
            daemon.source = source
            stack.callback(source.stop)
            source.start()
        yield Running(daemon, link, port)


def run(config: Config, stop: threading.Event, ready: Callable[[Running], None] = lambda _: None) -> None:
    """The life of a daemon, until `stop` is set: what `edgeear run` does."""
    notifier = Notifier()
    with opened(config) as running:
        ready(running)
        notifier.ready(f"{config.device.site}/{config.device.name} serves")
        running.daemon.run(stop, lambda: _lives(notifier, running.daemon.metrics))
        notifier.stopping()


def _lives(notifier: Notifier, metrics: Metrics | None) -> None:
    """The loop took a step: tell whoever watches that it goes on."""
    notifier.alive(time.monotonic())
    if metrics is not None:
        metrics.alive(time.time())


def outbox_policy(config: Config) -> OutboxPolicy:
    """The outbox's bounds as configured; pictures may take half of it."""
    size = config.outbox.max_mb << 20
    return OutboxPolicy(size, config.outbox.max_count, config.outbox.max_age_s, frame_bytes=max(1, size // 2))


def _daemon(
    config: Config,
    encoder: Encoder,
    file: Path,
    store: Store,
    system: System,
    outbox: Outbox,
    now: Callable[[], float],
    stack: ExitStack,
) -> Daemon:
    wake = threading.Event()
    labels = LabelBook(lambda: board.system.names)
    learner = ProcessLearner(file, _worker_policy(config), on_ready=wake.set)
    board = Board(
        Live(system, system),
        encoder,
        labels,
        now,
        BoardPolicy().with_live(config.live),
        store=store,
        seed=config.device.seed,
        learner=learner,
    )
    stack.callback(board.close)
    daemon = Daemon(
        board,
        labels,
        outbox,
        FrameQueue(config.source.queue, wake.set),
        (config.device.site, config.device.name),
        config.live,
        clock=now,
        timer=time.perf_counter,
        wake=wake,
        seed=config.device.seed,
        policy=DaemonPolicy(config.source.max_age_s, config.learning.label_requests),
    )
    if why := _unable(config):
        daemon.pause(why)
    if outbox.recovered_from is not None:
        daemon.tell(OutboxReset(*board.moment, str(outbox.recovered_from)))
    if store.recovered_from is not None:
        daemon.tell(StoreDamaged(*board.moment, str(store.recovered_from)))
    if faults := daemon.commands.stored.faults:
        daemon.tell(SettingsIgnored(*board.moment, faults))
    return daemon


def _unable(config: Config) -> str:
    """Why this board does not learn, or nothing."""
    if not config.learning.enabled:
        return "learning.enabled is false"
    if importlib.util.find_spec("torch") is None:
        return f"torch is not installed: {installation('learn')}"
    return ""


def _worker_policy(config: Config) -> WorkerPolicy:
    learning = config.learning
    return WorkerPolicy(
        budget=learning.budget,
        specs=learning.specs,
        time_limit_s=learning.time_limit_s,
        memory_limit_mb=learning.memory_limit_mb,
        nice=learning.nice,
    )


def _link(
    config: Config,
    daemon: Daemon,
    outbox: Outbox,
    source: Source | None,
    now: Callable[[], float],
    stack: ExitStack,
) -> Link | None:
    if not config.mqtt.enabled:
        return None
    link = Link(
        link_policy(config),
        outbox,
        daemon.status,
        daemon.receive,
        source.offer if source is not None else lambda _: None,
        daemon.connection_changed,
        random.Random(),  # boards that lost one broker must not come back at the same moment
        now,
    )
    daemon.link = link
    stack.callback(link.stop, FAREWELL_S)
    link.start()
    if config.mqtt.discovery:
        _announce(config, daemon, outbox)
    return link


def _announce(config: Config, daemon: Daemon, outbox: Outbox) -> None:
    """Make this board a device of Home Assistant."""
    site, device, encoder = config.device.site, config.device.name, daemon.board.system.encoder_digest
    payload = homeassistant.discovery_payload(site, device, __version__, encoder, daemon.period_s)
    lasting = {"retain": True, "expiry_s": None}
    outbox.put("event", homeassistant.discovery_topic(site, device), lambda _: payload, time.time(), properties=lasting)


def _metrics(config: Config, daemon: Daemon, link: Link | None, stack: ExitStack) -> int | None:
    if not config.metrics.port:
        return None
    metrics = daemon.metrics = Metrics(__version__)
    metrics.follow(daemon.readings)
    metrics.mqtt_connected.set_function(lambda: float(link is not None and link.connected))
    stack.callback(metrics.close)
    return metrics.serve(config.metrics.port)
