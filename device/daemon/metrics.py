"""The daemon's metrics for Prometheus, served on loopback.

Rules of this file:

1. The daemon owns one `Metrics` and counts into it. Nothing here knows the daemon, and nothing is global.
2. No label has a value from outside: values are from a closed list, or names of domains that this board has learned.
   The series of a forgotten domain is removed (`routes.remove(name)`).
3. Nothing listens before `serve` is called, and then on 127.0.0.1 only. To read the metrics elsewhere, run an agent on
   the board (deploy/README.md).
4. An open port does not prove that the loop runs: `healthy` asks when it last took a turn.

prometheus_client provides text format, buckets and locks: about 1 MB and 15 ms at import, 5 microseconds a frame.
"""

from __future__ import annotations

import errno
import math
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from http.server import ThreadingHTTPServer
from socketserver import TCPServer
from threading import Thread
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, MetricsHandler

from device.mqtt.measures import Row
from device.mqtt.messages import MEASURES
from edgeear.errors import DeviceError, UsageError

if TYPE_CHECKING:
    from edgeear.flow import Prediction

LOOPBACK = "127.0.0.1"
LATENCY_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
"""Seconds, from the bare encoder on a fast desktop (2 ms) to an overloaded board (2.5 s)."""
NOVELTY_BUCKETS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0, 20.0)
"""Standard deviations from the domain's usual novelty (edgeear/novelty.py)."""

_STEP = "edgeear_last_step_timestamp_seconds"


class Metrics:
    """The daemon's metrics, under names that begin with `edgeear_`; a counter's name ends in `_total`."""

    def __init__(self, version: str) -> None:
        registry = self.registry = CollectorRegistry(auto_describe=True)

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"edgeear_{name}", about, labels, registry=registry)

        def gauge(name: str, about: str, *labels: str) -> Gauge:
            return Gauge(f"edgeear_{name}", about, labels, registry=registry)

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"edgeear_{name}", about, buckets=buckets, registry=registry)

        self.frames = counter("frames", "Frames that were answered")
        self.dropped = counter("dropped", "Frames that were not answered: queue (full), stale, undecodable", "why")
        self.ood = counter("ood", "Frames found out of distribution")
        self.abstained = counter("abstained", "Frames that no head answered")
        self.routes = counter("routes", "Frames answered by a domain's head", "domain")
        self.prediction_seconds = histogram("prediction_seconds", "From frame to answer", LATENCY_BUCKETS)
        self.novelty = histogram("novelty", "Novelty of a frame to its best domain", NOVELTY_BUCKETS)
        self.gauges = {row: gauge(row.measure.gauge, row.help) for row in MEASURES if row.measure.gauge}
        self.outbox_dropped = counter("outbox_dropped", "Messages dropped at a bound of the outbox", "class")
        self.mqtt_connected = gauge("mqtt_connected", "1 while connected to the broker")
        self.source_up = gauge("source_up", "0 while the source gives no frames, as an event told")
        self.commands = counter("commands", "Commands answered", "command", "outcome")
        self.learning_runs = counter("learning_runs", "Adaptations that ended", "outcome")
        self._step = gauge(_STEP.removeprefix("edgeear_"), "When the daemon's loop last took a turn")
        self._phase = Info("edgeear_phase", "What the board is doing", registry=registry)
        Info("edgeear_build", "What runs here", registry=registry).info({"version": version})
        losses = {row.path[0]: row.measure.loss for row in MEASURES if row.measure.loss}
        self.losses = {name: self.dropped.labels(why) for name, why in losses.items()}
        self._server: tuple[_Server, Thread] | None = None

    def follow(self, readings: Mapping[str, Callable[[], Any]]) -> None:
        """Take the gauges at each scrape from `readings`: how each field of telemetry is read."""
        for row, gauge in self.gauges.items():
            gauge.set_function(partial(_reading, row, readings[row.path[0]]))

    def answered(self, prediction: Prediction, seconds: float) -> None:
        """Count one answer, `seconds` after its frame was taken from the queue."""
        self.frames.inc()
        self.prediction_seconds.observe(seconds)
        if math.isfinite(prediction.novelty):  # it is infinite before anything is learned
            self.novelty.observe(prediction.novelty)
        if prediction.ood:
            self.ood.inc()
        if prediction.route is None:
            self.abstained.inc()
        else:
            self.routes.labels(prediction.route).inc()

    def alive(self, now: float) -> None:
        """Note that the loop took a turn at `now`, unix seconds."""
        self._step.set(now)

    def phase(self, name: str) -> None:
        """Set `edgeear_phase_info{phase=name}` to 1 and remove the previous phase."""
        self._phase.info({"phase": name})

    def serve(self, port: int) -> int:
        """Answer `GET /metrics` on loopback, in a thread, until `close`. Port 0 takes a free one. Returns the port.

        Raises `UsageError` for a port out of range, or when called twice; `DeviceError` for a port in use.
        """
        if self._server is not None:
            raise UsageError("metrics are already served: call close first")
        if not 0 <= port <= 65535:
            raise UsageError(f"metrics port {port}: must be 0 to 65535; 0 takes a free one")
        try:
            server = _Server((LOOPBACK, port), MetricsHandler.factory(self.registry))
        except OSError as error:
            remedy = "another program uses it" if error.errno == errno.EADDRINUSE else str(error.strerror or error)
            raise DeviceError(f"metrics port {port}: {remedy}; choose another in [metrics], or 0 for none") from error
        thread = Thread(target=server.serve_forever, name="metrics", daemon=True)
        thread.start()
        self._server = server, thread
        return server.server_port

    def close(self) -> None:
        """Stop serving and free the port. Does nothing where nothing is served."""
        if self._server is not None:
            (server, thread), self._server = self._server, None
            server.shutdown()
            server.server_close()
            thread.join()


def _reading(row: Row, read: Callable[[], Any]) -> float:
    value = row.value(read())
    return math.nan if value is None else value * row.measure.scale


class _Server(ThreadingHTTPServer):
    """Starts without a DNS query: the base class looks up the name of 127.0.0.1, which takes long without a network."""

    def server_bind(self) -> None:
        TCPServer.server_bind(self)
        self.server_name, self.server_port = LOOPBACK, int(self.server_address[1])


def healthy(port: int, now: float, within_s: float = 60.0) -> bool:
    """Whether the daemon on `port` took a turn in the last `within_s` seconds; False if none answers.

    The container's health check is `python -m device.daemon.metrics PORT`, which exits with 0 or 1.
    """
    try:
        with urlopen(f"http://{LOOPBACK}:{port}/metrics?name[]={_STEP}", timeout=5) as answer:
            lines: list[bytes] = answer.read().splitlines()
    except OSError:
        return False
    steps = [float(line.split()[1]) for line in lines if line.startswith(_STEP.encode())]
    return bool(steps) and now - steps[0] <= within_s


if __name__ == "__main__":
    sys.exit(0 if healthy(int(sys.argv[1]), time.time()) else 1)
