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
from device.board.events import MessagesLost, RolledBack, SettingsIgnored, StoreDamaged
from device.daemon.config.settings import Config
from device.daemon.frames import FrameQueue
from device.daemon.labels import LabelBook
from device.daemon.learning.worker import ProcessLearner, WorkerPolicy
from device.daemon.loop import LOG, Daemon
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


LINK = {"host", "port", "protocol", "keepalive_s", "username", "session_expiry_s", "receive_maximum", "inflight"}
"""The keys of [mqtt] that the link takes as they are."""
WORKER = {"budget", "specs", "time_limit_s", "memory_limit_mb", "nice"}
"""The keys of [learning] that the learning process takes as they are."""


def link_policy(config: Config) -> LinkPolicy:
    """How to reach the broker, as configured."""
    mqtt, password = config.mqtt, config.mqtt.password
    return LinkPolicy(
        site=config.device.site,
        device=config.device.name,
        password=None if password is None else password.get_secret_value(),
        tls=TlsFiles(mqtt.ca, mqtt.cert, mqtt.key) if mqtt.secure else None,
        frames=config.source.kind == "mqtt",
        **mqtt.model_dump(include=LINK),
    )


@contextmanager
def opened(
    config: Config,
    *,
    now: Callable[[], float] = time.time,
    timer: Callable[[], float] = time.perf_counter,
    encoder: Encoder | None = None,
    start: System | None = None,
) -> Iterator[Running]:
    """Everything that `config` names, started; the caller runs the loop. `now` gives unix seconds, which stamp, `timer`
    seconds that never go back, which measure. `encoder` is one that is open already, `start`
    what a board serves whose store is new. Raises `EncoderError`, `FormatError`, `StoreBusy`, `OutboxBusy` and other
    `DeviceError`s, `UsageError`."""
    with ExitStack() as stack:
        file = encoder_file(config)
        encoder = encoder or OnnxEncoder(file, threads=config.device.threads)
        for note in notes_of(encoder):
            LOG.warning("%s: %s", file, note)
        store = stack.enter_context(Store.open(config.device.store))
        dropped = None if store.live == store.confirmed else store.live
        system = serving(store, encoder, start)
        outbox = stack.enter_context(Outbox.open(config.device.outbox, outbox_policy(config), now()))
        wake, labels, seed = threading.Event(), LabelBook(), config.device.seed
        frames = FrameQueue(config.source.queue, wake.set)
        learning = WorkerPolicy(**config.learning.model_dump(include=WORKER))
        learner = ProcessLearner(file, learning, on_ready=wake.set)
        policy = BoardPolicy().with_live(config.live)
        board = Board(
            Live(system, system),
            encoder,
            labels,
            now,
            policy,
            store=store,
            seed=seed,
            learner=learner,
            timer=timer,
        )
        stack.callback(board.close)
        source = config.source.open(Feed(encoder.input_size, frames, timer))
        daemon = Daemon(
            board,
            labels,
            outbox,
            frames,
            (config.device.site, config.device.name),
            config.live,
            clock=now,
            timer=timer,
            wake=wake,
            seed=seed,
            max_age_s=config.source.max_age_s,
            label_requests=config.learning.label_requests,
            source=source,
            metrics=Metrics(__version__) if config.metrics.port else None,
        )
        _tell_what_is_wrong(config, daemon, store, dropped)
        link = _link(config, daemon, now) if config.mqtt.enabled else None
        if link is not None:
            stack.callback(link.stop, FAREWELL_S)
            link.start()
        port = None
        if (metrics := daemon.metrics) is not None:
            metrics.follow(daemon.readings)
            metrics.mqtt_connected.set_function(lambda: float(link is not None and link.connected))
            stack.callback(metrics.close)
            port = metrics.serve(config.metrics.port)
        if source is not None:
            stack.callback(source.stop)
            source.start()
        yield Running(daemon, link, port)


def run(config: Config, stop: threading.Event, ready: Callable[[Running], None] = lambda _: None) -> None:
    """Run a daemon until `stop` is set, as `edgeear run` does. `ready` is called before the loop starts."""
    notifier = Notifier()
    with opened(config) as running:
        metrics = running.daemon.metrics

        def took_a_turn() -> None:
            notifier.alive(time.monotonic())
            if metrics is not None:
                metrics.alive(time.time())

        ready(running)
        notifier.ready(f"{config.device.site}/{config.device.name} serves")
        running.daemon.run(stop, took_a_turn)
        notifier.stopping()


def outbox_policy(config: Config) -> OutboxPolicy:
    """The outbox's bounds as configured. Label requests may take half of it."""
    size = config.outbox.max_mb << 20
    return OutboxPolicy(size, config.outbox.max_count, config.outbox.max_age_s, frame_bytes=max(1, size // 2))


def _tell_what_is_wrong(config: Config, daemon: Daemon, store: Store, dropped: int | None) -> None:
    """Pause a board that cannot learn, and tell what was damaged, does not fit, or was `dropped` by the restart."""
    moment = daemon.board.moment
    if not config.learning.enabled:
        daemon.pause("learning.enabled is false")
    elif importlib.util.find_spec("torch") is None:
        daemon.pause(f"torch is not installed: {installation('learn')}")
    if daemon.outbox.recovered_from is not None:
        daemon.tell(MessagesLost(*moment, str(daemon.outbox.recovered_from)))
    if store.recovered_from is not None:
        daemon.tell(StoreDamaged(*moment, str(store.recovered_from)))
    for damage in daemon.board.damage:
        daemon.tell(damage)
    if dropped is not None:
        daemon.tell(RolledBack(*moment, daemon.board.system.generation, None, 0, dropped))
    if faults := daemon.commands.stored.faults:
        daemon.tell(SettingsIgnored(*moment, faults))


def _link(config: Config, daemon: Daemon, now: Callable[[], float]) -> Link:
    """The link, not started. Announces the board to Home Assistant where that is configured."""
    site, device, source = config.device.site, config.device.name, daemon.source
    link = Link(
        link_policy(config),
        daemon.outbox,
        daemon.status,
        daemon.receive,
        source.offer if source is not None else lambda _: None,
        daemon.connection_changed,
        random.Random(),  # boards that lost the same broker must not reconnect at the same moment
        now,
    )
    daemon.out.link = link.delivery
    if config.mqtt.discovery:
        encoder, lasting = daemon.board.system.encoder_digest, {"retain": True, "expiry_s": None}
        payload = homeassistant.discovery_payload(site, device, __version__, encoder, daemon.period_s)
        topic = homeassistant.discovery_topic(site, device)
        daemon.outbox.put("event", topic, lambda _: payload, time.time(), properties=lasting)
    return link
