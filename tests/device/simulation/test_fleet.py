"""A fleet at a real broker passes when all is well, and does not when one message of one device is lost or wrong."""

from __future__ import annotations

import json
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.board.learner import InlineLearner, Learner
from device.cli import app as cli
from device.daemon.assemble import Running, opened
from device.encoder.engine import OrtEngine
from device.mqtt import messages, topics
from device.simulation.fleet import run as fleet
from device.simulation.fleet.check import Asked, Heard, Truth, faults
from device.simulation.fleet.factory import SharedEncoder
from device.simulation.fleet.place import broker_address, raise_file_limit
from device.simulation.fleet.result import FleetResult, table
from device.simulation.fleet.run import FleetOptions, run_fleet
from edgeear.errors import DataError, DeviceError, UsageError
from tests.device.simulation.test_simulate import write
from tests.support import fakes

SMALL = FleetOptions(Path(), Path("none.onnx"), devices=4, samples=40, labels=20, probation=15, period_s=200)
Harm = Callable[[Running], None]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("fleet"), (("red", 0), ("green", 1)), 40)


def learner() -> Learner:
    encoder = fakes.FakeEncoder()
    return InlineLearner(encoder, OrtEngine(encoder), fakes.QUICK)


@pytest.fixture(scope="module")
def healthy(data: Path) -> FleetResult:
    return run_fleet(replace(SMALL, data=data, order=("red", "green")), fakes.FakeEncoder(), learner())


def test_a_healthy_fleet_passes(healthy: FleetResult) -> None:
    found = healthy.fields
    assert healthy.passed and healthy.faults == []
    assert found["births"] == {"expected": 4, "received": 4, "unique_sessions": 4}
    counted = {key: 4 * 80 for key in ("frames_shown", "frames_answered", "frames_reported")}
    assert found["telemetry"] == {"windows_expected": 4 * 5, "windows_received": 4 * 5, **counted}
    assert found["sequence"]["missing"] == found["sequence"]["devices_out_of_order"] == 0
    commands = found["commands"]
    assert (commands["sent"], commands["answered_once"]) == (4 * 8, 4 * 8)
    assert commands["to_be_refused"] == commands["refused"] == 4 * 2
    assert found["broker"].startswith("mosquitto") and found["speed"]["speed_up"] > 1


def test_devices_that_move_declare_it_and_ask_for_labels(healthy: FleetResult) -> None:
    assert healthy.fields["shift"] == {"moved": 2, "declared": 2, "declared_without_move": 0, "labels_wanted": 2}
    moved = [row for row in healthy.fields["per_device"] if row["moved_to"]]
    assert {row["moved_to"] for row in moved} == {"green"} and all(row["messages"] > 20 for row in moved)


def test_the_result_is_json_and_a_table(healthy: FleetResult) -> None:
    assert json.loads(json.dumps(healthy.fields, allow_nan=False)) == healthy.fields
    assert "passed" in str(table(healthy).title)
    cpu, memory = healthy.fields["cpu"], healthy.fields["memory"]
    assert 0 < cpu["device_s"] <= cpu["device_with_encoder_s"] and memory["rss_mb_after"] > 0


def telemetry_lost(running: Running) -> None:
    """It never reaches the outbox."""
    put = running.daemon.outbox.put

    def without(cls: Any, *given: Any, **more: Any) -> int | None:
        return None if cls == "telemetry" else put(cls, *given, **more)

    running.daemon.outbox.put = without  # type: ignore[method-assign]


def event_lost(running: Running) -> None:
    """It is taken for sent."""
    outbox, lock, lost = running.daemon.outbox, threading.Lock(), list[int]()
    pending = outbox.pending

    def without(*given: Any, **more: Any) -> list[Any]:
        found = pending(*given, **more)
        with lock:
            lost.extend([i.id for i in found if i.cls == "event" and b'"paused"' in i.payload][: 1 - len(lost)])
        return [item for item in found if item.id not in lost]

    outbox.pending = without  # type: ignore[method-assign]


def answered_twice(running: Running) -> None:
    put = running.daemon.outbox.put

    def twice(*given: Any, answers: str | None = None, **more: Any) -> int | None:
        if answers is not None:
            put(*given, answers=answers, **more)
        return put(*given, **more)

    running.daemon.outbox.put = twice  # type: ignore[method-assign]


def correlation_lost(running: Running) -> None:
    put = running.daemon.outbox.put
    running.daemon.outbox.put = lambda *given, properties=None, **more: put(*given, **more)  # type: ignore[method-assign]


def frame_not_counted(running: Running) -> None:
    window = running.daemon._window
    window.add, add = lambda *_: setattr(window, "add", add), window.add  # type: ignore[method-assign]


HARMS: tuple[tuple[Harm, str], ...] = (
    (telemetry_lost, "0 windows of telemetry came, 3 were due"),
    (event_lost, "1 messages are missing"),
    (answered_twice, "has 2 answers"),
    (correlation_lost, "correlation data is None"),
    (frame_not_counted, "40 frames were answered, telemetry counts 39"),
)


def test_each_bad_device_is_found_and_no_other(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harms = {f"d-{number:04}": harm for number, harm in enumerate(HARMS, start=1)}

    @contextmanager
    def harmed(config: Any, **more: Any) -> Iterator[Running]:
        with opened(config, **more) as running:
            harm, _ = harms.get(config.device.name, (lambda _: None, ""))
            harm(running)
            yield running

    monkeypatch.setattr(fleet, "opened", harmed)
    given = replace(SMALL, data=data, devices=1 + len(HARMS), samples=20)
    found = run_fleet(given, fakes.FakeEncoder(), learner(), system=fakes.grown(0))
    assert not found.passed and {fault.split(":")[0] for fault in found.faults} == harms.keys()
    for name, (_, told) in harms.items():
        assert any(fault.startswith(name) and told in fault for fault in found.faults), (name, found.faults)
    assert [row["name"] for row in found.fields["per_device"] if row["faults"]] == list(harms)


SESSION = "0123456789abcdef"
TRUTH = Truth(SESSION, boot=1, shown=20, answered=20, windows=2, started=0.0, ended=200.0)
ASKED = (Asked("a", "pause", "ok", {"paused": True}), Asked("b", "report", "ok"), Asked("c", "pause", "refused"))
Said = tuple[topics.Topic, bytes, bytes | None]


def transcript() -> list[Said]:
    """All that a sound device says."""
    stamp = messages.Stamper(SESSION, 1)
    status: dict[str, Any] = {"session": SESSION, "boot": 1, "time": 0.0, "version": "1", "encoder": "e"}
    window: dict[str, Any] = {name: 0 for name in ("dropped", "stale", "undecodable", "ood", "abstained", "generation")}
    window |= {"novelty": None, "latency_ms": None, "routes": {}, "phase": "serving", "temperature_c": None}
    window |= {"rss_mb": 1.0, "cpu_share": 0.1, "frames": 10}
    outbox = messages.OutboxReport(depth=0, bytes=0, oldest_s=None)

    def event(seq: int, kind: Any) -> Said:
        return topics.EVENT, messages.Event(**stamp(seq, 0.0), kind=kind, text="", at=1, generation=0).payload(), None

    def telemetry(seq: int, begin: float, refused: int) -> Said:
        times: dict[str, Any] = {"from_time": begin, "to_time": begin + 100, "refused_messages": refused}
        made = messages.Telemetry(**stamp(seq, 0.0), **times, outbox=outbox, **window)
        return topics.TELEMETRY, made.payload(), None

    def answer(seq: int, identity: str, name: str, outcome: Any, correlation: bytes | None, **result: Any) -> Said:
        made = messages.Response(**stamp(seq, 0.0), id=identity, command=name, outcome=outcome, result=result)
        return topics.RESPONSE, made.payload(), correlation

    return [
        (topics.STATUS, messages.Status(state="online", generation=0, **status).payload(), None),
        answer(1, "a", "pause", "ok", b"a", paused=True),
        event(2, "paused"),
        telemetry(3, 0.0, 0),
        answer(0, "c", "pause", "refused", b"c"),
        answer(4, "b", "report", "ok", b"b"),
        telemetry(5, 100.0, 1),
        event(6, "stopped"),
        (topics.STATUS, messages.Status(state="offline", generation=0, **status).payload(), None),
    ]


def judged(said: list[Said]) -> list[str]:
    heard = Heard()
    for row, payload, correlation in said:
        heard.hear(row, payload, correlation)
    return faults(TRUTH, ASKED, heard)


def test_a_sound_device_has_no_fault() -> None:
    assert judged(transcript()) == []


@given(lost=st.integers(0, len(transcript()) - 1))
def test_whatever_is_lost_is_a_fault(lost: int) -> None:
    said = transcript()
    del said[lost]
    assert judged(said)


@given(again=st.integers(0, len(transcript()) - 1), where=st.integers(0, len(transcript())))
def test_a_repeated_message_is_none_but_an_unmarked_answer_is(again: int, where: int) -> None:
    said = transcript()
    repeated = said[again]
    said.insert(max(where, again + 1), repeated)
    assert bool(judged(said)) == (b'"seq":0,' in repeated[1])


WRONG: dict[str, Any] = {
    "session": "f" * 16,
    "boot": 2,
    "outcome": "failed",
    "id": "other",
    "frames": 11,
    "refused_messages": 2,
    "to_time": 150.0,
    "kind": "dropped",
}


@given(at=st.integers(0, len(transcript()) - 1), name=st.sampled_from(list(WRONG)))
def test_a_wrong_field_is_a_fault(at: int, name: str) -> None:
    said = transcript()
    row, payload, correlation = said[at]
    fields = json.loads(payload)
    if name not in fields or (name == "boot" and row is topics.STATUS) or (name == "boot" and not fields["seq"]):
        return
    fields[name] = WRONG[name]
    said[at] = row, json.dumps(fields).encode(), correlation
    assert judged(said)


def test_swapped_messages_are_a_fault() -> None:
    said = transcript()
    said[3], said[5] = said[5], said[3]
    assert "messages came out of order" in judged(said)


def test_a_shared_encoder_encodes_a_picture_once() -> None:
    inner = fakes.FakeEncoder()
    shared, frames = SharedEncoder(inner), fakes.frames(0, fakes.CLASSES, fakes.labels_of(2), 1)
    first = shared.encode(frames[:1], ("a.mean",))
    again, other = shared.encode(frames[:1].copy(), ("a.mean",)), shared.encode(frames[1:], ("a.mean",))
    assert len(inner.asked) == 2 == shared.fresh
    assert (first["a.mean"] == again["a.mean"]).all() and (first["a.mean"] != other["a.mean"]).any()
    assert shared.encode(frames[:1], ("a.std",)).keys() == {"a.std"}


def test_too_low_a_limit_of_files_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))
    with pytest.raises(DeviceError, match=r"200 devices need 2656 open files, the hard limit is 1024.*at most 64"):
        raise_file_limit(200)


def test_the_limit_of_files_is_raised_as_far_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    changed: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (512, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: changed.append(limits))
    raise_file_limit(10)
    raise_file_limit(200)
    assert changed == [(2656, 4096)]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("embedded", ("embedded", 1883)),
        ("mqtt.plant", ("mqtt.plant", 1883)),
        ("10.0.0.1:1884", ("10.0.0.1", 1884)),
        ("[::1]:1883", ("::1", 1883)),
    ],
)
def test_a_broker_is_named_by_host_and_port(text: str, address: tuple[str, int]) -> None:
    assert broker_address(text) == address


@pytest.mark.parametrize("text", ["", ":1883", "mqtt://host", "host:0", "host:65536", "user@host"])
def test_what_is_no_broker_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="HOST:PORT"):
        broker_address(text)


@pytest.mark.parametrize(
    "wrong", [{"devices": 0}, {"samples": 5}, {"teach": 3}, {"period_s": 15.0}, {"every_s": 0.0}, {"labels": 1}]
)
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        replace(SMALL, **wrong)


def test_one_domain_is_too_few(tmp_path: Path) -> None:
    data = write(tmp_path, (("red", 0),), 5)
    with pytest.raises(DataError, match="a second one"):
        run_fleet(replace(SMALL, data=data), fakes.FakeEncoder(), learner())


def test_a_broker_that_is_not_there_is_an_error(data: Path) -> None:
    given = replace(SMALL, data=data, broker="127.0.0.1:1")
    with pytest.raises(DeviceError, match=r"nothing listens on 127\.0\.0\.1:1"):
        run_fleet(given, fakes.FakeEncoder(), learner(), system=fakes.grown(0))


@pytest.mark.parametrize("passed", [True, False])
def test_the_command_ends_in_one_where_the_fleet_has_faults(
    passed: bool, healthy: FleetResult, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = FleetResult({**healthy.fields, "passed": passed, "faults": [] if passed else ["d-0000: no birth came"]})
    asked: list[FleetOptions] = []

    def run(options: FleetOptions, *_: Any, **__: Any) -> FleetResult:
        asked.append(options)
        return told

    monkeypatch.setattr(fleet, "run_fleet", run)
    monkeypatch.setattr("device.encoder.session.OnnxEncoder", lambda path: fakes.FakeEncoder())
    target = tmp_path / "fleet.json"
    line = ["simulate", "--data", str(data), "--devices", "7", "--broker", "host:1", "--encoder", "e.onnx"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*line, "--teach", "2", "--json", str(target)])
    assert ended.value.code == (0 if passed else 1)
    assert json.loads(target.read_text())["passed"] is passed
    assert [(o.devices, o.broker, o.teach, o.samples) for o in asked] == [(7, "host:1", 2, 120)]


def test_options_of_a_fleet_need_a_fleet(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["simulate", "--data", str(data), "--encoder", "e.onnx", "--teach", "1"])
    assert ended.value.code == 2 and "--devices" in capsys.readouterr().err
