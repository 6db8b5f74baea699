"""What the daemon counts, as Prometheus reads it over loopback."""

from __future__ import annotations

import math
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from device.daemon.metrics import Metrics, healthy
from edgeear.errors import DeviceError, UsageError
from edgeear.flow import Prediction
from tests.test_architecture import probe

NONE = np.zeros(0, np.float32)


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    made = Metrics("1.2.3")
    yield made
    made.close()


def read(port: int) -> dict[str, float]:
    """`name{label="value"}` -> value of everything that is served, without the times of creation."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        samples = [sample for family in families for sample in family.samples]
    shown = {s.name + "".join(f"{{{k}={v}}}" for k, v in sorted(s.labels.items())): s.value for s in samples}
    return {name: value for name, value in shown.items() if "_created" not in name}


def test_answers_are_counted(metrics: Metrics) -> None:
    metrics.answered(Prediction("dog", NONE, "photo", -0.25, 0.7, False), 0.004)
    metrics.answered(Prediction("dog", NONE, "photo", 2.5, 0.03, True), 0.3)
    metrics.answered(Prediction(None, NONE, None, math.inf, 0.0, True), 0.012)
    served = read(metrics.serve(0))
    assert served["edgeear_frames_total"] == 3
    assert served["edgeear_ood_total"] == 2
    assert served["edgeear_abstained_total"] == 1
    assert served["edgeear_routes_total{domain=photo}"] == 2
    assert served["edgeear_prediction_seconds_count"] == 3
    assert served["edgeear_prediction_seconds_sum"] == pytest.approx(0.316)
    assert served["edgeear_prediction_seconds_bucket{le=0.005}"] == 1
    assert served["edgeear_novelty_count"] == 2
    assert served["edgeear_novelty_bucket{le=0.0}"] == 1


def test_everything_else_is_served_under_its_name(metrics: Metrics) -> None:
    metrics.dropped.labels("stale").inc(2)
    metrics.outbox_dropped.labels("telemetry").inc()
    metrics.commands.labels("adapt", "ok").inc()
    metrics.learning_runs.labels("rejected").inc()
    metrics.mqtt_connected.set(1)
    metrics.source_up.set(True)
    metrics.follow(
        {
            "generation": lambda: 7,
            "outbox": lambda: {"depth": 11, "bytes": 2048},
            "rss_mb": lambda: 143.5,
            "temperature_c": lambda: 48.5,
        }
    )
    expected = {
        "edgeear_generation": 7,
        "edgeear_outbox_depth": 11,
        "edgeear_outbox_bytes": 2048,
        "edgeear_mqtt_connected": 1,
        "edgeear_source_up": 1,
        "edgeear_rss_bytes": 143.5 * 2**20,
        "edgeear_temperature_celsius": 48.5,
        "edgeear_dropped_total{why=queue}": 0,
        "edgeear_dropped_total{why=stale}": 2,
        "edgeear_dropped_total{why=undecodable}": 0,
        "edgeear_outbox_dropped_total{class=telemetry}": 1,
        "edgeear_commands_total{command=adapt}{outcome=ok}": 1,
        "edgeear_learning_runs_total{outcome=rejected}": 1,
        "edgeear_build_info{version=1.2.3}": 1,
    }
    served = read(metrics.serve(0))
    assert {name: served.get(name) for name in expected} == expected


def test_a_temperature_that_no_sensor_gives_is_not_a_number(metrics: Metrics) -> None:
    metrics.follow(
        {"generation": int, "outbox": lambda: {"depth": 0, "bytes": 0}, "rss_mb": float, "temperature_c": lambda: None}
    )
    served = read(metrics.serve(0))
    assert math.isnan(served["edgeear_temperature_celsius"]) and served["edgeear_generation"] == 0


def test_a_board_is_in_one_phase_and_forgets_domains(metrics: Metrics) -> None:
    metrics.answered(Prediction("dog", NONE, "photo", 0.0, 0.7, False), 0.004)
    metrics.phase("serving")
    metrics.phase("learning")
    metrics.routes.remove("photo")
    served = read(metrics.serve(0))
    assert [name for name in served if "phase" in name or "photo" in name] == ["edgeear_phase_info{phase=learning}"]


def test_two_boards_in_one_process_do_not_mix(metrics: Metrics) -> None:
    other = Metrics("1.2.3")
    other.frames.inc()
    assert read(metrics.serve(0))["edgeear_frames_total"] == 0


def test_nothing_listens_but_loopback_and_only_while_served(metrics: Metrics) -> None:
    before = threading.active_count()
    port = metrics.serve(0)
    assert metrics._server is not None and metrics._server[0].server_address[0] == "127.0.0.1"
    metrics.close()
    metrics.close()
    assert threading.active_count() == before
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        pass
    again = metrics.serve(port)
    assert again == port and read(port)["edgeear_frames_total"] == 0


def test_serving_asks_no_name_service(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    def unanswered(*_: object) -> str:
        raise AssertionError("a board without a network would wait here")

    monkeypatch.setattr(socket, "getfqdn", unanswered)
    monkeypatch.setattr(socket, "gethostbyaddr", unanswered)
    assert read(metrics.serve(0))["edgeear_frames_total"] == 0


def test_taken_port_is_the_machines_fault_and_a_wrong_one_the_callers(metrics: Metrics) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(DeviceError, match=f"metrics port {port}: another program uses it; choose another"):
            metrics.serve(port)
    assert read(metrics.serve(port))["edgeear_frames_total"] == 0, "a refused port left something behind"
    with pytest.raises(UsageError, match="already"):
        metrics.serve(0)
    for wrong in (-1, 65536):
        with pytest.raises(UsageError, match=f"metrics port {wrong}: "):
            Metrics("1").serve(wrong)


def test_health_is_a_step_not_long_ago(metrics: Metrics) -> None:
    port = metrics.serve(0)
    assert not healthy(port, 1000.0), "serving is not living"
    metrics.alive(1000.0)
    assert healthy(port, 1060.0) and not healthy(port, 1061.0)
    command = [sys.executable, "-m", "device.daemon.metrics", str(port)]
    assert subprocess.run(command, timeout=60).returncode == 1, "that was long ago"
    metrics.alive(time.time())
    assert subprocess.run(command, timeout=60).returncode == 0
    metrics.close()
    assert not healthy(port, 1000.0)


def test_import_is_light() -> None:
    assert probe("device.daemon.metrics", "device.daemon.systemd") == ""
