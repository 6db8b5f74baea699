"""`edgeear run` as a process, with a real broker, a real child that learns, and a real notification socket."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from device.mqtt import messages
from device.mqtt.outbox import Outbox, OutboxPolicy
from device.operator.client import BrokerAddress, Operator
from device.state.store import Store
from edgeear.types import U8
from tests.support import fakes, mqtt_peers, tiny_models
from tests.support.boards import DEVICE, OWN, SITE, TAUGHT, DaemonProcess, config, state, teach
from tests.support.broker import Mosquitto, mosquitto

Facts = dict[str, Any]
ANSWER_S = 60.0


class Ear:
    """An operator who notes all that a board says, in order."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.heard: list[tuple[str, Facts]] = []
        self.us: Operator

    def __call__(self, topic: str, payload: bytes) -> None:
        if not topic.endswith("/frame"):
            with self._changed:
                self.heard.append((topic.removeprefix(f"{OWN}/"), json.loads(payload)))
                self._changed.notify_all()

    def wait(self, topic: str, fits: Callable[[Facts], bool] = lambda _: True, times: int = 1) -> list[Facts]:
        """The messages of a topic that fit, once there are so many."""

        def found() -> list[Facts]:
            return [facts for name, facts in self.heard if name == topic and fits(facts)]

        with self._changed:
            assert self._changed.wait_for(lambda: len(found()) >= times, ANSWER_S), (topic, self.heard[-5:])
            return found()

    def event(self, kind: str) -> Facts:
        return self.wait("event", lambda facts: facts["kind"] == kind)[-1]

    def ask(self, command: messages.Command) -> messages.Response:
        return self.us.ask(SITE, DEVICE, command, ANSWER_S)

    def report(self, identity: str = "report") -> Facts:
        return self.ask(messages.Report(id=identity)).result


@contextmanager
def listening(broker: Mosquitto) -> Iterator[Ear]:
    ear = Ear()
    with Operator(BrokerAddress("127.0.0.1", broker.port), (f"{OWN}/+",), ear) as ear.us:
        yield ear


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with mosquitto(tmp_path / "broker") as running:
        yield running


def png(frame: U8) -> bytes:
    target = io.BytesIO()
    Image.fromarray(frame).save(target, "PNG")
    return target.getvalue()


def shown(background: int, count: int, seed: int) -> U8:
    return fakes.frames(background, fakes.CLASSES, fakes.labels_of(count), seed)


def test_it_serves_without_a_broker_connects_when_one_comes_and_says_goodbye(tmp_path: Path) -> None:
    broker = Mosquitto(tmp_path / "broker")
    board = DaemonProcess(tmp_path, config(tmp_path, broker.port, teach(tmp_path)), {"WATCHDOG_USEC": "1000"})
    with board:
        board.wait_ready()
        board.wait_told("WATCHDOG=1")
        board.wait_said("nothing listens on")
        broker.start()
        try:
            with listening(broker) as ear:
                (birth,) = ear.wait("status")
                assert birth["state"] == "online" and birth["generation"] > 0
                assert [d["name"] for d in ear.report()["domains"]] == [TAUGHT]
                board.wait_told("WATCHDOG=1", times=2)
                assert board.terminate() == 0
                board.wait_told("STOPPING=1")
                (farewell,) = ear.wait("status", lambda facts: facts["state"] == "offline")
                assert farewell["session"] == birth["session"] and ear.event("stopped")
        finally:
            broker.stop()


def test_a_power_cut_leaves_a_will_and_the_learned_state(tmp_path: Path, broker: Mosquitto) -> None:
    board = DaemonProcess(tmp_path, config(tmp_path, broker.port, teach(tmp_path)))
    with listening(broker) as ear, board:
        (birth,) = ear.wait("status")
        assert ear.ask(messages.SetPolicy.model_validate({"id": "set", "labels": 77})).outcome == "ok"
        before = ear.report("before")
        board.kill()
        (will,) = ear.wait("status", lambda facts: facts["state"] == "offline")
        assert will["session"] == birth["session"]
        board.start()
        again = ear.wait("status", lambda facts: facts["state"] == "online", times=2)[-1]
        after = ear.report("after")
        assert again["boot"] == after["boot"] > before["boot"] and again["session"] != birth["session"]
        for name in ("domains", "generation", "encoder", "settings"):
            assert after[name] == before[name]
        assert after["settings"] == {"labels": 77} and before["domains"]


def test_a_restart_on_probation_is_an_event(tmp_path: Path, broker: Mosquitto) -> None:
    encoder = teach(tmp_path)
    with Store.open(state(tmp_path).store) as store:
        confirmed = store.confirmed
        assert confirmed is not None
        tried = store.write(store.read(confirmed), created=0.0)
        store.commit(tried)
    board = DaemonProcess(tmp_path, config(tmp_path, broker.port, encoder))
    with listening(broker) as ear, board:
        (event,) = ear.wait("event", lambda facts: facts["kind"] == "rolled-back")
        assert event["data"] == {"generation": confirmed, "foreign": None, "frames": 0, "restart": tried}
        assert "was on probation when the daemon stopped" in event["text"] and event["generation"] == confirmed
        assert board.terminate() == 0
        board.start()
        ear.wait("status", lambda facts: facts["state"] == "online", times=2)
        ear.report()
        assert len(ear.wait("event", lambda facts: facts["kind"] == "rolled-back")) == 1


def test_no_event_that_was_put_is_lost_in_a_power_cut(tmp_path: Path) -> None:
    """Without labels and patience a board that knows nothing says `refused` every 40 frames."""
    encoder, broker = tiny_models.saved(tmp_path, tiny_models.seeing()), Mosquitto(tmp_path / "broker")
    pictures(tmp_path / "frames", shown(0, 6, 1))
    source = f'kind = "replay"\npath = "{tmp_path / "frames"}"\nfps = 240'
    text = config(tmp_path, broker.port, encoder, source=source, learning="labels = 40\nlabel_wait_s = 0")
    board = DaemonProcess(tmp_path, text)
    with board:
        board.wait_said("refused: ", times=3)
        board.kill()
        with Outbox.open(state(tmp_path).outbox, OutboxPolicy(), 0.0) as outbox:
            put = {(m["boot"], m["seq"]) for i in outbox.pending(0, 1000) if (m := json.loads(i.payload))["kind"]}
        assert len(put) >= 3  # start, and all that was refused but the last, which may have been only logged
        broker.start()
        try:
            with listening(broker) as ear:
                board.start()
                heard = ear.wait("event", lambda facts: (facts["boot"], facts["seq"]) in put, times=len(put))
                assert {(facts["boot"], facts["seq"]) for facts in heard} == put
        finally:
            broker.stop()


def test_one_state_folder_is_for_one_daemon(tmp_path: Path) -> None:
    text = config(tmp_path, None, teach(tmp_path))
    with DaemonProcess(tmp_path, text) as first:
        first.wait_ready()
        with DaemonProcess(tmp_path, text) as second:
            assert second.ended() == 2
            assert str(tmp_path / "state") in second.said() and "is in use" in second.said()
            assert "Traceback" not in second.said()
        assert first.terminate() == 0


def test_a_store_of_another_encoder_is_refused(tmp_path: Path) -> None:
    encoder = teach(tmp_path)
    encoder.write_bytes(tiny_models.sound())
    with DaemonProcess(tmp_path, config(tmp_path, None, encoder)) as board:
        assert board.ended() == 2
        assert "error: the store was learned on encoder" in board.said() and "Traceback" not in board.said()
        assert board.told == []


def test_a_faulty_configuration_names_key_value_and_limit(tmp_path: Path) -> None:
    text = config(tmp_path, None, tmp_path / "encoder.onnx", source="queue = 0", telemetry="perod_s = 5")
    with DaemonProcess(tmp_path, text) as board:
        assert board.ended() == 2
        assert "source.queue = 0: must be at least 1" in board.said()
        assert "did you mean period_s?" in board.said() and "Traceback" not in board.said()


def test_a_domain_is_taught_over_mqtt_alone(tmp_path: Path, broker: Mosquitto) -> None:
    encoder = tiny_models.saved(tmp_path, tiny_models.seeing())
    text = config(tmp_path, broker.port, encoder, source='kind = "mqtt"\nqueue = 100\nmax_age_s = 3600')
    with listening(broker) as ear, mqtt_peers.Operator(broker.port) as camera, DaemonProcess(tmp_path, text):
        ear.wait("status")
        for frame in shown(0, 40, 1):
            camera.send(DEVICE, "frame", png(frame))
        wanted = ear.wait("label-request", times=40)
        session = ear.event("label-wanted")["session"]
        assert Image.open(io.BytesIO(base64.b64decode(wanted[0]["image"]))).size == (fakes.SIZE, fakes.SIZE)
        known = {request["at"]: fakes.CLASSES[(request["at"] - 1) % 3] for request in wanted}
        answer = ear.ask(messages.Label(id="teach", session=session, labels=known, domain="morning"))
        assert answer.result == {"accepted": 40, "unknown_samples": []}
        assert ear.event("grown")["generation"] > 0
        for frame in shown(0, 20, 2):
            camera.send(DEVICE, "frame", png(frame))
        ear.event("confirmed")
        report = ear.report()
        assert [domain["name"] for domain in report["domains"]] == ["morning"]
        assert report["frames"]["answered"] == 60 and report["source"]["alive"]
        picture = base64.b64encode(png(shown(0, 1, 3)[0])).decode()
        seen = ear.ask(messages.Infer(id="look", image=picture)).result
        assert (seen["label"], seen["route"], seen["ood"]) == (fakes.CLASSES[0], "morning", False)


def test_a_replay_is_served_and_ends(tmp_path: Path, broker: Mosquitto) -> None:
    pictures(tmp_path / "frames", shown(0, 6, 4))
    source = f'kind = "replay"\npath = "{tmp_path / "frames"}"\nfps = 100\nloop = false\nqueue = 100\nmax_age_s = 3600'
    text = config(tmp_path, broker.port, teach(tmp_path), source=source, telemetry="predictions = true\nperiod_s = 1")
    with listening(broker) as ear, DaemonProcess(tmp_path, text) as board:
        windows = ear.wait("telemetry", lambda facts: facts["frames"] > 0)
        assert windows[0]["routes"] == {TAUGHT: 6} and windows[0]["latency_ms"]["p50"] > 0
        report = ear.report()
        assert report["source"]["finished"] and report["frames"]["answered"] == 6
        late = ear.ask(messages.Report(id="late", expires=1.0))  # refused before the ledger knows of it
        assert late.outcome == "refused" and late.reason and "expired" in late.reason
        assert board.terminate() == 0
        for _, facts in (heard for heard in ear.heard if heard[0] == "prediction"):
            at = int(facts["ref"].removesuffix(".png"))
            assert facts["label"] == fakes.CLASSES[at % 3] and facts["at"] == at + 1


def pictures(folder: Path, frames: U8) -> None:
    folder.mkdir()
    for index, frame in enumerate(frames):
        (folder / f"{index:03}.png").write_bytes(png(frame))
