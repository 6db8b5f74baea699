"""From a configuration to a running board: opens all that the loop needs, in order, and closes it in reverse.

A broker or a camera that is absent at the start is retried while the loop runs. A fault that no retry can mend, such as
the store of another encoder, is a typed error here, before the board announces itself.
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
from device.daemon.loop import LOG, Daemon, DaemonPolicy
from device.daemon.metrics import Metrics
from device.daemon.sources import Feed
from device.daemon.systemd import Notifier
from device.encoder.cache import cached_encoder, prepared_encoder
from device.encoder.session import OnnxEncoder, notes_of, pooled_taps
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
"""Seconds at the end to send waiting messages and the offline status."""


@dataclass(frozen=True)
class Running:
    """A daemon, its link and the port that serves its metrics."""

    daemon: Daemon
    link: Link | None
    metrics_port: int | None


def encoder_file(config: Config) -> Path:
    """The configured encoder with the configured preprocessing, or the built-in one from the cache. Raises `UsageError`
    where there is none, `EncoderError` and `DeviceError` where it cannot be prepared."""
    path = config.device.encoder or cached_encoder(cache_dir())
    if path is None:
        raise UsageError(
            "device.encoder is not set and the cache holds no encoder: run `edgeear encoder export` here or on a "
            "machine that has the learn extra, and set device.encoder to the file"
        )
    return prepared_encoder(path, config.device.preprocessing, cache_dir())


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
        for note in notes_of(encoder):
            LOG.warning("%s: %s", file, note)
        store = stack.enter_context(Store.open(config.device.store))
        system = serving(store, encoder, start)
        outbox = stack.enter_context(Outbox.open(config.device.outbox, outbox_policy(config), now()))
        daemon = _daemon(config, encoder, file, store, system, outbox, now, stack)
        link, source = _link(config, daemon, outbox, now, stack), daemon.source
        port = _serve_metrics(config, daemon, link, stack)
        if source is not None:
            stack.callback(source.stop)
            source.start()
        yield Running(daemon, link, port)


def run(config: Config, stop: threading.Event, ready: Callable[[Running], None] = lambda _: None) -> None:
    """Run a daemon until `stop` is set, as `edgeear run` does. `ready` is called before the loop starts."""
    notifier = Notifier()
    with opened(config) as running:
        ready(running)
        notifier.ready(f"{config.device.site}/{config.device.name} serves")
        running.daemon.run(stop, lambda: _lives(notifier, running.daemon.metrics))
        notifier.stopping()


def _lives(notifier: Notifier, metrics: Metrics | None) -> None:
    """Tell systemd and the metrics that the loop took a turn."""
    notifier.alive(time.monotonic())
    if metrics is not None:
        metrics.alive(time.time())


def outbox_policy(config: Config) -> OutboxPolicy:
    """The outbox's bounds as configured. Label requests may take half of it."""
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
    frames = FrameQueue(config.source.queue, wake.set)
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
        frames,
        (config.device.site, config.device.name),
        config.live,
        clock=now,
        timer=time.perf_counter,
        wake=wake,
        seed=config.device.seed,
        policy=DaemonPolicy(config.source.max_age_s, config.learning.label_requests),
        source=config.source.open(Feed(encoder.input_size, frames, now)),
        metrics=Metrics(__version__) if config.metrics.port else None,
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
    """Why this board cannot learn; empty where it can."""
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
    now: Callable[[], float],
    stack: ExitStack,
) -> Link | None:
    if not config.mqtt.enabled:
        return None
    source = daemon.source
    link = Link(
        link_policy(config),
        outbox,
        daemon.status,
        daemon.receive,
        source.offer if source is not None else lambda _: None,
        daemon.connection_changed,
        random.Random(),  # boards that lost the same broker must not reconnect at the same moment
        now,
    )
    daemon.out.link = link
    stack.callback(link.stop, FAREWELL_S)
    link.start()
    if config.mqtt.discovery:
        _announce(config, daemon, outbox)
    return link


def _announce(config: Config, daemon: Daemon, outbox: Outbox) -> None:
    """Announce this board to Home Assistant."""
    site, device, encoder = config.device.site, config.device.name, daemon.board.system.encoder_digest
    payload = homeassistant.discovery_payload(site, device, __version__, encoder, daemon.period_s)
    lasting = {"retain": True, "expiry_s": None}
    outbox.put("event", homeassistant.discovery_topic(site, device), lambda _: payload, time.time(), properties=lasting)


def _serve_metrics(config: Config, daemon: Daemon, link: Link | None, stack: ExitStack) -> int | None:
    metrics = daemon.metrics
    if metrics is None:
        return None
    metrics.follow(daemon.readings)
    metrics.mqtt_connected.set_function(lambda: float(link is not None and link.connected))
    stack.callback(metrics.close)
    return metrics.serve(config.metrics.port)
