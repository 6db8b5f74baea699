"""The daemon's loop, turn by turn, with a real board, store and outbox; only the network is played by hand."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from device.board.board import Board, BoardPolicy
from device.daemon.frames import FrameQueue
from device.daemon.labels import LabelBook
from device.daemon.loop import Daemon
from device.daemon.metrics import Metrics
from device.daemon.sources import RunningSource
from device.mqtt import messages
from device.mqtt.delivery import Token
from device.mqtt.link import Inbound
from device.mqtt.outbox import Outbox, OutboxFull, OutboxPolicy
from device.mqtt.settings import NAMES, LiveSettings
from device.state.codec import from_files
from device.state.store import Store, StoreFull
from edgeear.errors import DataError
from edgeear.flow import infer
from edgeear.shift import ShiftState
from edgeear.system import Live
from edgeear.types import U8
from tests.support import fakes

START = 1_800_000_000.0
POLICY = BoardPolicy(memory=60, adapt=fakes.QUICK)
SETTINGS = LiveSettings(labels=40, probation=20, label_wait_s=3600, label_free=False)
OWN = "edgeear/v1/plant/cam-1"


@dataclass
class Wire:
    """The daemon's link, played by hand: what was acknowledged and what was sent past the outbox."""

    acknowledged: list[Token | None] = field(default_factory=list)
    sent: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    asked_again: int = 0

    def acknowledge(self, token: Token | None) -> None:
        self.acknowledged.append(token)

    def request_redelivery(self) -> None:
        self.asked_again += 1

    def publish_now(self, topic: str, payload: bytes, correlation: bytes | None = None) -> bool:
        assert correlation == (None if topic.endswith("prediction") else b"\1\2")
        self.sent.append((topic, json.loads(payload)))
        return True

    def wake(self) -> None:
        pass


class Rig:
    """A daemon, its wire, and a clock that only moves when told to."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.now, self.jump = START, 0.0
        self.store = stack.enter_context(Store.open(folder / "store"))
        self.outbox = stack.enter_context(Outbox.open(folder / "outbox.sqlite", OutboxPolicy(), self.now))
        number = self.store.recover()
        system = fakes.empty() if number is None else from_files(self.store.read(number))
        self.labels = LabelBook()
        self.board = Board(
            Live(system, system), fakes.FakeEncoder(), self.labels, lambda: self.now, POLICY, store=self.store
        )
        self.frames = FrameQueue(4)
        self.daemon = Daemon(
            self.board,
            self.labels,
            self.outbox,
            self.frames,
            ("plant", "cam-1"),
            SETTINGS,
            clock=lambda: self.now + self.jump,
            timer=lambda: self.now,
        )
        self.session = self.daemon.session
        self.wire = self.daemon.out.link = Wire()

    def show(self, background: int, count: int, seed: int = 1) -> None:
        """Frames of a domain, ten a second."""
        for frame in shown(background, count, seed):
            self.now += 0.1
            self.frames.put(frame, self.now, "frame")
            self.daemon.turn()

    def rest(self) -> None:
        """Turn until there is nothing to do."""
        while self.daemon.turn():
            pass

    def command(self, name: str, **extra: Any) -> dict[str, Any] | None:
        """Send a command; its response, wherever that went."""
        facts = {"id": f"id-{self.now}-{name}", **extra}
        return self.send(name, json.dumps(facts).encode())

    def send(self, name: str, payload: bytes, **how: Any) -> dict[str, Any] | None:
        before, after = len(self.wire.sent), self.last
        fields = {"response_topic": f"{OWN}/response", "correlation": b"\1\2", "expires": None, "dup": False}
        self.daemon.receive(Inbound(name, payload, token=None, **{**fields, **how}))
        self.daemon.turn()
        answers = [i for i in self.outbox.pending(after, 10_000) if i.cls == "response"]
        if answers:
            assert answers[-1].properties == {"correlation": "0102"} and answers[-1].topic == f"{OWN}/response"
            found: dict[str, Any] = json.loads(answers[-1].payload)
            return found
        return self.wire.sent[-1][1] if len(self.wire.sent) > before else None

    @property
    def last(self) -> int:
        return max((i.id for i in self.outbox.pending(0, 10_000)), default=0)

    def told(self, cls: str = "event") -> list[dict[str, Any]]:
        return [json.loads(i.payload) for i in self.outbox.pending(0, 10_000) if i.cls == cls]

    @property
    def kinds(self) -> list[str]:
        return [event["kind"] for event in self.told()]

    def label_all(self, background: int, **extra: Any) -> dict[str, Any] | None:
        """Answer the label request as an operator would, from the frames that came with it."""
        self.rest()
        wanted = self.told("frame")
        known = {request["at"]: fakes.CLASSES[index % 3] for index, request in enumerate(wanted)}
        return self.command("label", session=self.session, labels=known, **extra)


def shown(background: int, count: int, seed: int) -> U8:
    return fakes.frames(background, fakes.CLASSES, fakes.labels_of(count), seed)


@contextmanager
def rigged(folder: Path) -> Iterator[Rig]:
    with ExitStack() as stack:
        yield Rig(folder, stack)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with rigged(tmp_path) as made:
        yield made


def jpeg(frame: U8) -> str:
    target = io.BytesIO()
    Image.fromarray(frame).save(target, "PNG")
    return base64.b64encode(target.getvalue()).decode()


def learned(rig: Rig) -> Rig:
    """A rig that learned its first domain, as an operator taught it."""
    rig.show(0, 40)
    assert rig.label_all(0, domain="day") is not None
    rig.show(0, 25, seed=2)
    assert rig.board.phase == "serving" and rig.board.system.names == ("day",)
    return rig


def test_a_board_is_taught_over_mqtt_alone(rig: Rig) -> None:
    rig.show(0, 40)
    assert rig.kinds == ["start", "label-wanted"] and rig.board.phase == "labelling"
    rig.rest()
    requests = rig.told("frame")
    assert [request["at"] for request in requests] == list(range(1, 41))
    assert Image.open(io.BytesIO(base64.b64decode(requests[0]["image"]))).size == (fakes.SIZE, fakes.SIZE)
    response = rig.label_all(0, domain="day")
    assert response is not None and response["outcome"] == "ok" and response["result"]["accepted"] == 40
    rig.show(0, 25, seed=2)
    assert rig.kinds == ["start", "label-wanted", "search", "grown", "confirmed"]
    assert rig.board.system.names == ("day",)
    stamps = [(event["boot"], event["seq"]) for event in rig.told()]
    assert stamps == sorted(set(stamps)) and all(event["session"] == rig.session for event in rig.told())


def test_a_label_request_says_what_was_predicted_and_how_long_the_board_waits(rig: Rig) -> None:
    learned(rig)
    asked = len(rig.told("frame"))
    assert {(request["guess"], request["route"]) for request in rig.told("frame")} == {(None, None)} and asked == 40
    rig.command("set-policy", predictions=True, label_wait_s=100.0)
    rig.show(0, 10, seed=4)
    rig.command("adapt")
    until = rig.now + 100
    rig.now += 5
    rig.rest()
    predicted = {sent["at"]: sent["label"] for topic, sent in rig.wire.sent if topic.endswith("/prediction")}
    requests = rig.told("frame")[asked:]
    assert {r["at"]: r["guess"] for r in requests if r["at"] in predicted} == predicted and len(predicted) == 10
    assert len({r["guess"] for r in requests}) == 3
    assert all(r["route"] == "day" and r["until"] == pytest.approx(until) for r in requests)


def test_a_prediction_carries_the_score_of_its_class(rig: Rig) -> None:
    learned(rig)
    rig.command("set-policy", predictions=True)
    (frame,) = shown(0, 1, 9)
    expected, _, _ = infer(rig.board.system, rig.board.engine, ShiftState(), frame)
    assert expected.label is not None
    rig.show(0, 1, seed=9)
    response = rig.command("infer", image=jpeg(frame))
    assert response is not None
    for told in (rig.wire.sent[-1][1], response["result"]):
        score = expected.probabilities[expected.label]
        assert told["label"] == expected.label and told["score"] == pytest.approx(score) and 1 / 3 < score <= 1
    probabilities = response["result"]["probabilities"]
    assert probabilities == pytest.approx(expected.probabilities) and next(iter(probabilities)) == expected.label
    assert set(probabilities) == set(fakes.CLASSES) and sum(probabilities.values()) == pytest.approx(1)


def test_infer_answers_and_leaves_no_trace(rig: Rig) -> None:
    learned(rig)
    before = (rig.board.at, rig.board.system, rig.outbox.counters().sent)
    response = rig.command("infer", image=jpeg(shown(0, 1, 9)[0]))
    assert response is not None and response["outcome"] == "ok"
    assert response["result"]["label"] == fakes.CLASSES[0] and response["result"]["route"] == "day"
    assert (rig.board.at, rig.board.system, rig.outbox.counters().sent) == before


def test_infer_of_a_broken_picture_is_refused_in_words(rig: Rig) -> None:
    whole = base64.b64decode(jpeg(shown(0, 1, 9)[0]))
    response = rig.command("infer", image=base64.b64encode(whole[:60]).decode())
    assert response is not None and response["outcome"] == "refused" and response["reason"]


def test_a_repeated_command_is_answered_again_and_applied_once(rig: Rig) -> None:
    payload = json.dumps({"id": "once", "paused": True}).encode()
    first = rig.send("pause", payload)
    rig.command("pause", paused=False)
    again = rig.send("pause", payload, dup=True)
    assert first == again and not rig.board.paused
    assert rig.kinds == ["paused", "resumed"] and len(rig.wire.acknowledged) == 3


def test_a_command_is_applied_once_across_a_restart(tmp_path: Path) -> None:
    payload = json.dumps({"id": "once", "paused": True}).encode()
    with rigged(tmp_path) as before:
        first = before.send("pause", payload)
        before.command("pause", paused=False)
    with rigged(tmp_path) as after:
        assert after.send("pause", payload, dup=True) == first
        assert after.board.paused is False and after.outbox.boot > before.outbox.boot


@pytest.mark.parametrize(
    ("name", "facts"), [("pause", {"paused": False}), ("report", {}), ("set-policy", {"labels": 60})]
)
def test_an_id_used_for_another_command_is_refused_and_keeps_its_answer(
    rig: Rig, name: str, facts: dict[str, Any]
) -> None:
    payload = json.dumps({"id": "once", "paused": True}).encode()
    first = rig.send("pause", payload)
    for dup in (False, True):
        other = rig.send(name, json.dumps({"id": "once", **facts}).encode(), dup=dup)
        assert other is not None and other["outcome"] == "refused" and "id once was used" in other["reason"]
    assert rig.board.paused and rig.kinds == ["paused"] and rig.daemon.commands.settings == SETTINGS
    later = json.dumps({"paused": True, "expires": rig.now + 60, "id": "once"}).encode()
    assert rig.send("pause", later) == first  # the same command, written in another way


def test_an_id_of_a_command_that_was_cut_short_is_not_free_for_another(tmp_path: Path) -> None:
    with rigged(tmp_path) as before:
        command = messages.parse_command("pause", b'{"id": "cut", "paused": true}')
        assert isinstance(command, messages.Pause)
        before.outbox.begin("cut", before.now, command.digest)
    with rigged(tmp_path) as after:
        other = after.send("report", b'{"id": "cut"}')
        assert other is not None and other["outcome"] == "refused"
        same = after.send("pause", b'{"id": "cut", "paused": true}', dup=True)
        assert same is not None and same["outcome"] == "ok" and after.board.paused


def test_what_was_refused_can_be_asked_again_and_is_not_done_by_a_copy_of_the_first(rig: Rig) -> None:
    payload = b'{"id": "again"}'
    first = rig.send("confirm", payload)
    assert first is not None and first["outcome"] == "refused"
    rig.show(0, 40)
    rig.label_all(0)
    assert rig.board.phase == "probation"
    assert rig.send("confirm", payload, dup=True) == first and str(rig.board.phase) == "probation"
    asked = rig.send("confirm", payload)
    assert asked is not None and asked["outcome"] == "ok" and str(rig.board.phase) == "serving"
    assert rig.send("confirm", payload) == asked and rig.kinds.count("confirmed") == 1


def test_confirm_on_a_full_disk_fails_and_works_later(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> int:
        raise StoreFull("disk full")

    rig.show(0, 40)
    rig.label_all(0)
    monkeypatch.setattr(rig.store, "confirm", full)
    failed = rig.send("confirm", b'{"id": "c"}')
    assert failed is not None and failed["outcome"] == "failed" and "disk full" in failed["reason"]
    assert rig.board.phase == "probation" and "confirmed" not in rig.kinds
    monkeypatch.undo()
    done = rig.send("confirm", b'{"id": "c"}')
    assert done is not None and done["outcome"] == "ok" and rig.store.confirmed == rig.board.system.generation


def test_a_forget_that_was_cut_short_is_finished_and_not_refused(tmp_path: Path) -> None:
    payload = json.dumps({"id": "erase", "domain": "day"}).encode()
    with rigged(tmp_path) as before:
        learned(before)
        before.outbox.begin("erase", before.now)  # and power failed after the store knew
        command = messages.parse_command("forget", payload)
        assert isinstance(command, messages.Forget)
        assert before.daemon.commands.apply(command).outcome == "ok"
    with rigged(tmp_path) as after:
        assert after.board.system.names == ()
        response = after.send("forget", payload, dup=True)
        assert response is not None and response["outcome"] == "ok"
        assert (after.command("forget", domain="day") or {})["outcome"] == "refused"


def test_what_is_forgotten_is_gone_from_every_generation(rig: Rig) -> None:
    learned(rig)
    response = rig.command("forget", domain="day")
    assert response is not None and response["outcome"] == "ok" and rig.kinds[-1] == "forgotten"
    systems = [from_files(rig.store.read(m.number)) for m in rig.store.generations()]
    assert systems and all("day" not in system.names for system in systems)


def test_an_expired_command_is_never_applied(rig: Rig) -> None:
    payload = json.dumps({"id": "late", "paused": True}).encode()
    response = rig.send("pause", payload, expires=rig.now - 1)
    assert response is not None and response["outcome"] == "refused" and "expired 1.0 s ago" in response["reason"]
    own = rig.command("pause", paused=True, expires=rig.now - 5)
    assert own is not None and "expired" in own["reason"] and not rig.board.paused
    assert len(rig.wire.acknowledged) == 2 and rig.outbox.recall("late", rig.now) is None


@pytest.mark.parametrize("payload", [b"", b"\xff", b"[]", b'{"id": "x"}', b'{"id": "x", "paused": 1}', b"{" * 9999])
def test_nonsense_is_answered_once_and_fills_no_disk(rig: Rig, payload: bytes) -> None:
    response = rig.send("pause", payload)
    assert response is not None and response["outcome"] == "refused" and response["reason"]
    assert rig.outbox.counters().depth == 0 and rig.daemon.counts.refused_messages == 1
    assert len(rig.wire.acknowledged) == 1 and not rig.board.paused


def test_a_response_goes_to_no_topic_outside_the_site(rig: Rig) -> None:
    payload = json.dumps({"id": "a"}).encode()
    rig.daemon.receive(Inbound("report", payload, "edgeear/v1/plant/cam-2/command/forget", None, None, False, None))
    rig.daemon.turn()
    assert [item.topic for item in rig.outbox.pending(0, 10)] == [f"{OWN}/response"]


def test_labels_of_another_session_are_refused(rig: Rig) -> None:
    rig.show(0, 40)
    response = rig.command("label", session="0123456789abcdef", labels={1: "rows"})
    assert response is not None and response["outcome"] == "refused" and rig.session in response["reason"]
    assert len(rig.labels) == 0


def test_labels_for_frames_that_are_not_held_are_named(rig: Rig) -> None:
    rig.show(0, 40)
    response = rig.command("label", session=rig.session, labels={5: "rows", 900: "rows"})
    assert response is not None and response["result"] == {"accepted": 1, "unknown_samples": [900]}


def test_verbs_out_of_place_are_refused_with_the_phase(rig: Rig) -> None:
    for name in ("rollback", "confirm", "adapt"):
        response = rig.command(name)
        assert response is not None and response["outcome"] == "refused" and response["reason"], name
    assert rig.board.phase == "serving"


def test_rollback_undoes_a_generation_on_probation(rig: Rig) -> None:
    rig.show(0, 40)
    rig.label_all(0)
    assert rig.board.phase == "probation"
    response = rig.command("rollback")
    assert response is not None and response["outcome"] == "ok" and rig.kinds[-1] == "rolled-back"
    assert rig.board.system.names == () and rig.store.live == rig.store.confirmed


def test_settings_survive_a_restart(tmp_path: Path) -> None:
    with rigged(tmp_path) as before:
        response = before.command("set-policy", labels=50, telemetry_period_s=5.0)
        assert response is not None and response["outcome"] == "ok"
        before.command("pause", paused=True)
    with rigged(tmp_path) as after:
        assert after.board.policy.labels == 50 and after.daemon.period_s == 5.0 and after.board.paused


STORED = (
    ('{"labels": 50, "haste": 3}', {"haste": 3}, "haste = 3"),
    ('{"labels": 50, "foreign": "much"}', {"foreign": "much"}, "foreign = 'much'"),
    ('{"labels": 50, "probation": true}', {"probation": True}, "probation = True"),
    ('{"labels": 50, "label_wait_s": null}', {"label_wait_s": None}, "label_wait_s = None"),
    ('{"labels": 50, "telemetry_period_s": 0.5}', {"telemetry_period_s": 0.5}, "greater than or equal to 1"),
    ('{"labels": 50, "period_s": 5}', {"period_s": 5}, "period_s = 5: this version does not know it"),
)
WHOLE = ('{"labels": 50', "[1, 2]", "null", '"text"', "[" * 5000)


@pytest.mark.parametrize(("text", "aside", "words"), STORED)
def test_a_stored_setting_of_another_version_is_kept_aside_and_told(
    tmp_path: Path, text: str, aside: dict[str, Any], words: str
) -> None:
    with rigged(tmp_path) as before:
        before.outbox.set("settings", text)
    with rigged(tmp_path) as after:
        commands = after.daemon.commands
        assert after.board.policy.labels == 50 and commands.settings == SETTINGS.changed({"labels": 50})
        assert len(commands.stored.faults) == 1 and words in commands.stored.faults[0]
        assert (after.command("set-policy", labels=60) or {})["result"] == {"settings": {"labels": 60}}
        assert json.loads(after.outbox.get("settings") or "") == {"labels": 60, **aside}
        (name,) = aside
        if name in NAMES:  # a new choice replaces what stood aside
            after.now += 1
            taken = {"foreign": 0.25, "probation": 5, "label_wait_s": 9.0, "telemetry_period_s": 9.0}[name]
            assert (after.command("set-policy", **{name: taken}) or {})["outcome"] == "ok"
            assert json.loads(after.outbox.get("settings") or "") == {"labels": 60, name: taken}


@pytest.mark.parametrize("text", WHOLE)
def test_stored_settings_that_are_no_object_are_kept_whole(tmp_path: Path, text: str) -> None:
    with rigged(tmp_path) as before:
        before.outbox.set("settings", text)
    with rigged(tmp_path) as after:
        assert after.daemon.commands.settings == SETTINGS and len(after.daemon.commands.stored.faults) == 1
        after.command("set-policy", labels=60)
        kept = json.loads(after.outbox.get("settings") or "")
        assert kept.pop("labels") == 60 and list(kept) == ["unreadable"]
        assert kept["unreadable"] in (text, json.loads(text) if text in WHOLE[1:4] else text)


def test_every_live_setting_reaches_the_board_or_the_loop(rig: Rig) -> None:
    changes: dict[str, Any] = {
        "labels": 41, "probation": 21, "foreign": 0.25, "label_free": True, "label_wait_s": 5.0,
        "telemetry_period_s": 7.0, "predictions": True,
    }  # fmt: skip
    assert set(changes) == set(NAMES)
    assert (rig.command("set-policy", **changes) or {})["outcome"] == "ok"
    policy = rig.board.policy
    found = (policy.labels, policy.probation, policy.foreign, policy.patience, policy.unlabelled is not None)
    assert found == (41, 21, 0.25, 5.0, True)
    assert rig.daemon.period_s == 7.0 and rig.daemon.commands.settings.predictions


def test_telemetry_counts_every_frame_once(rig: Rig) -> None:
    learned(rig)
    rig.show(0, 700, seed=3)  # seventy seconds
    windows = rig.told("telemetry")
    assert len(windows) == 1
    rig.daemon.report_window()
    first, second = rig.told("telemetry")
    assert first["to_time"] == second["from_time"]
    assert first["frames"] + second["frames"] == rig.daemon.counts.frames == 765
    assert first["routes"].keys() == {"day"} and first["novelty"]["p50"] <= first["novelty"]["p99"]
    assert first["generation"] >= 1 and first["outbox"]["depth"] > 0


def test_what_waits_too_long_for_a_broker_is_dropped_while_the_board_runs(rig: Rig) -> None:
    rig.show(0, 1)
    assert rig.kinds == ["start"]
    rig.now += OutboxPolicy().max_age_s + 1
    rig.daemon.turn()
    assert rig.kinds == [] and rig.told("telemetry")[-1]["outbox"]["dropped"]["event"] == 1


def test_a_stale_frame_is_counted_and_not_served(rig: Rig) -> None:
    rig.frames.put(shown(0, 1, 1)[0], rig.now - 10, "old")
    assert rig.daemon.turn() is False
    rig.daemon.report_window()
    rig.daemon.report_window()
    assert [window["stale"] for window in rig.told("telemetry")] == [1, 0] and rig.board.at == 0


def test_predictions_are_published_only_when_asked_for(rig: Rig) -> None:
    rig.show(0, 2)
    assert rig.wire.sent == []
    rig.command("set-policy", predictions=True)
    rig.show(0, 1)
    topic, message = rig.wire.sent[-1]
    assert topic == f"{OWN}/prediction" and message["at"] == 3 and message["label"] is message["score"] is None


def test_a_full_disk_stops_learning_and_not_predictions(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.show(0, 40)

    def full(*_: object, **__: object) -> int:
        raise StoreFull("no space left: free some")

    monkeypatch.setattr(rig.store, "write", full)
    rig.label_all(0)
    rig.show(0, 3, seed=5)
    assert "learning-failed" in rig.kinds and rig.board.system.names == ()
    assert rig.daemon.counts.frames == 43


def test_messages_that_the_disk_damaged_are_told_once(rig: Rig) -> None:
    rig.show(0, 1)
    (kept,) = rig.outbox.pending(0, 9)
    bad = [rig.outbox.put("event", "t", lambda seq: b"{}", rig.now) for _ in range(2)]
    update = "UPDATE item SET topic = CAST(x'f4' AS TEXT) WHERE id >= ?"
    rig.outbox._database.connection.execute(update, (bad[0],)).close()
    assert rig.outbox.pending(0, 9) == [kept]  # as the link does
    rig.rest()
    rig.rest()
    damaged = [event for event in rig.told("event") if event["kind"] == "dropped"]
    assert [event["data"] for event in damaged] == [{"damage": "check the disk", "count": 2}]


def test_a_full_outbox_stops_neither_predictions_nor_answers(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> int:
        raise OutboxFull("no space left: free some")

    for name in ("put", "begin"):
        monkeypatch.setattr(rig.outbox, name, full)
    rig.show(0, 2)
    response = rig.command("pause", paused=True)
    assert response is not None and response["outcome"] == "refused" and "no space left" in response["reason"]
    assert rig.daemon.counts.frames == 2 and not rig.board.paused


def test_a_frame_that_cannot_be_encoded_is_an_event(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    learned(rig)

    def broken(frames: U8, taps: object) -> dict[str, Any]:
        raise DataError("tap a.mean holds NaN")

    monkeypatch.setattr(rig.board.engine.encoder, "encode", broken)
    answered = rig.daemon.counts.frames
    rig.show(0, 1)
    assert rig.kinds[-1] == "frame-refused" and rig.daemon.counts.frames == answered and rig.daemon.counts.unusable == 1


def test_the_loop_ends_when_told_and_wakes_for_what_comes(rig: Rig) -> None:
    stop, turned = threading.Event(), threading.Semaphore(0)
    thread = threading.Thread(target=rig.daemon.run, args=(stop, turned.release))
    thread.start()
    assert turned.acquire(timeout=10)
    rig.daemon.receive(Inbound("report", b'{"id": "r"}', None, None, None, False, None))
    while not rig.wire.acknowledged:
        assert turned.acquire(timeout=10)
    stop.set()
    rig.daemon.wake.set()
    thread.join(10)
    assert not thread.is_alive() and rig.kinds == ["stopped"]


def test_status_names_the_session(rig: Rig) -> None:
    status = json.loads(rig.daemon.status("online"))
    assert (status["session"], status["state"], status["generation"]) == (rig.session, "online", 1)


def test_a_report_says_what_is_learned(rig: Rig) -> None:
    learned(rig)
    response = rig.command("report")
    assert response is not None
    result = response["result"]
    assert [domain["name"] for domain in result["domains"]] == ["day"] and result["session"] == rig.session
    assert result["frames"]["answered"] == 65 and np.isfinite(result["rss_mb"])


def test_commands_that_find_no_room_are_asked_for_again(rig: Rig) -> None:
    for number in range(300):
        payload = json.dumps({"id": f"c{number}"}).encode()
        rig.daemon.receive(Inbound("report", payload, None, None, None, False, None))
    while rig.daemon.turn():
        assert rig.wire.asked_again == 0
    assert rig.wire.asked_again == 1 and len(rig.wire.acknowledged) == 256
    assert rig.daemon.turn() is False and rig.wire.asked_again == 1


def test_a_bug_in_a_command_is_answered_and_not_met_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(rig.daemon.commands, "report", bug)
    response = rig.command("report")
    assert response is not None and response["outcome"] == "failed" and "ZeroDivisionError" in response["reason"]
    assert len(rig.wire.acknowledged) == 1


def test_a_result_that_does_not_fit_is_left_out_and_the_answer_given(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.daemon.commands, "report", lambda: {"much": "x" * 100_000})
    response = rig.command("report")
    assert response is not None and response["outcome"] == "ok" and "left_out" in response["result"]


@pytest.mark.parametrize("jump", [-6e8, -61.0, 61.0, 6e8])
def test_a_clock_that_jumps_ends_no_window_stretches_none_and_makes_no_frame_stale(rig: Rig, jump: float) -> None:
    rig.frames.put(shown(0, 1, 1)[0], rig.now, "frame")
    rig.jump = jump
    rig.daemon.turn()
    assert rig.daemon.counts.frames == 1 and rig.told("telemetry") == []
    rig.now += 61
    rig.daemon.turn()
    (window,) = rig.told("telemetry")
    assert window["to_time"] == pytest.approx(rig.now + jump) and window["frames"] == 1
    assert window["to_time"] - window["from_time"] == pytest.approx(61)


def test_label_requests_leave_one_a_turn_and_only_while_wanted(rig: Rig) -> None:
    rig.show(0, 41)
    assert 0 < len(rig.told("frame")) < 5
    rig.command("pause", paused=True)  # drops what was collected
    rig.rest()
    assert len(rig.told("frame")) < 5


def test_a_source_learns_that_its_frame_was_answered_at_any_age_but_not_that_it_was_refused(rig: Rig) -> None:
    answered: list[str] = []
    frame = shown(0, 1, 1)[0]
    rig.frames.put(frame, rig.now - 1e6, "old", lambda: answered.append("old"))
    rig.daemon.turn()
    assert answered == ["old"] and rig.frames.counts.stale == 0

    def refused(frame: U8) -> Any:
        raise DataError("not finite")

    rig.board.step = refused  # type: ignore[method-assign]
    rig.frames.put(frame, rig.now, "refused", lambda: answered.append("refused"))
    rig.daemon.turn()
    assert answered == ["old"] and rig.daemon.counts.unusable == 1


@dataclass
class Camera:
    """A source played by hand."""

    alive: bool = True
    finished: bool = False
    last_error: str | None = None
    silent_s: float | None = None

    def start(self) -> None: ...

    def stop(self, timeout: float = 5.0) -> bool:
        return True

    def offer(self, payload: bytes) -> None: ...


def test_a_source_that_runs_and_is_silent_is_told_once_and_again_when_it_is_back(rig: Rig) -> None:
    camera = Camera(silent_s=30.0)
    rig.daemon.source = cast(RunningSource, camera)
    metrics = rig.daemon.metrics = Metrics("1")
    rig.show(0, 1)
    for silence, told, up in ((29.0, 0, 1.0), (2.0, 1, 0.0), (1000.0, 1, 0.0)):
        rig.now += silence
        rig.daemon.turn()
        assert rig.kinds == ["start"] + ["source"] * told
        assert metrics.registry.get_sample_value("edgeear_source_up") == up
    assert "31 s" in rig.told()[-1]["text"]
    rig.now += 1
    rig.show(0, 1)
    assert rig.kinds == ["start", "source", "source"] and "again" in rig.told()[-1]["text"]
    rig.now += 1
    rig.daemon.turn()
    assert metrics.registry.get_sample_value("edgeear_source_up") == 1
    camera.silent_s = None
    rig.now += 1e4
    rig.daemon.turn()
    assert rig.kinds == ["start", "source", "source"]


def test_a_source_that_goes_is_told_once_and_again_when_it_is_back(rig: Rig) -> None:
    camera = Camera()
    rig.daemon.source = cast(RunningSource, camera)
    rig.show(0, 1)
    camera.alive, camera.last_error = False, "camera 0: gone; plug it in"
    for _ in range(3):  # its retries
        rig.daemon.turn()
        camera.alive = not camera.alive
    assert rig.kinds == ["start", "source"] and "plug it in" in rig.told()[-1]["text"]
    camera.alive = True
    rig.show(0, 2)
    assert rig.kinds == ["start", "source", "source"] and "again" in rig.told()[-1]["text"]
    camera.alive, camera.finished = False, True
    rig.daemon.turn()
    assert "end" in rig.told()[-1]["text"]
