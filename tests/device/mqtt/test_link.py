"""The link against a real mosquitto: delivery, recovery, and what is reported when something fails."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.client import MQTTMessage

from device.mqtt.delivery import Rate
from device.mqtt.link import LinkPolicy, TlsFiles
from device.mqtt.outbox import Outbox, OutboxPolicy
from edgeear.errors import DeviceError, UsageError
from tests.support.broker import PERSISTENT, PLAIN, Mosquitto, free_port, mosquitto
from tests.support.mqtt_peers import PREFIX, Board, MemoryOutbox, Operator, ScriptedBroker, Wire

STATUS = f"{PREFIX}/status"


def numbered(count: int, start: int = 0) -> list[bytes]:
    return [b"event %06d" % number for number in range(start, start + count)]


def property_of(message: MQTTMessage, name: str) -> Any:
    return getattr(message.properties, name)


def distinct(payloads: list[bytes]) -> list[bytes]:
    return list(dict.fromkeys(payloads))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    with mosquitto(tmp_path_factory.mktemp("plain")) as broker:
        yield broker


def test_birth_and_will_are_retained_and_name_the_session(plain: Mosquitto) -> None:
    with Operator(plain.port, STATUS, name="birth") as seen, Wire(plain.port) as wire, Board(wire.port) as board:
        board.wait_connected()
        seen.wait(lambda: b"online session-1" in seen.payloads("/status"))
        wire.cut()
        seen.wait(
            lambda: seen.payloads("/status")[-3:] == [b"online session-1", b"offline session-1", b"online session-1"]
        )
        assert all(message.retain for message in seen.messages)
        will = next(message for message in seen.messages if message.payload == b"offline session-1")
        assert property_of(will, "ContentType") == "application/json"
    with Operator(plain.port, STATUS, name="late", session=False) as late:
        late.wait(lambda: late.payloads("/status") == [b"offline session-1"])


def test_stop_empties_the_outbox_then_says_offline(plain: Mosquitto) -> None:
    with Operator(plain.port, f"{PREFIX}/#", name="stop") as seen:
        with Board(plain.port, rate=0) as board:
            board.wait_connected()
            for payload in numbered(300):
                board.put(payload)
        seen.wait(lambda: seen.payloads("/status")[-1:] == [b"offline session-1"])
        assert seen.payloads() == numbered(300) and not board.outbox.items
        assert seen.messages[-1].topic == STATUS


def test_rebirth_and_order_across_a_restart_of_the_broker_under_load(tmp_path: Path) -> None:
    events = numbered(3000)
    with mosquitto(tmp_path, PERSISTENT) as broker, Operator(broker.port, f"{PREFIX}/#") as seen:
        with Board(broker.port) as board:
            board.wait_connected()
            for payload in events[:1500]:
                board.put(payload)
            broker.stop()
            for payload in events[1500:]:
                board.put(payload)
            broker.start()
            board.wait_connected(2)
            board.outbox.wait_empty()
            seen.wait(lambda: events[-1] in [bytes(message.payload) for message in seen.messages[-3:]])
        assert distinct(seen.payloads()) == events
        assert seen.payloads("/status").count(b"online session-1") >= 2


def test_with_the_outbox_on_disk_nothing_is_lost_when_broker_and_board_restart(tmp_path: Path) -> None:
    sent: list[bytes] = []

    def put(outbox: Outbox, board: Board, count: int) -> None:
        for _ in range(count):
            outbox.put("event", f"{PREFIX}/event", lambda seq: b"%d %06d" % (outbox.boot, seq), 2e9)
            sent.append(b"%d %06d" % (outbox.boot, len(sent) % 300 + 1))
            board.link.delivery.wake()

    with mosquitto(tmp_path, PERSISTENT) as broker, Operator(broker.port, f"{PREFIX}/event", name="disk") as seen:
        for _ in range(2):
            with Outbox.open(tmp_path / "outbox.db", OutboxPolicy(), 2e9) as outbox:
                with Board(broker.port, outbox) as board:
                    board.wait_connected()
                    put(outbox, board, 100)
                    broker.stop()
                    put(outbox, board, 100)
                    broker.start()
                    board.wait_connected(2)
                    put(outbox, board, 100)
                    seen.wait(lambda: sent[-1] in seen.payloads()[-1:])
                assert outbox.counters().depth == 0
    assert distinct(seen.payloads()) == sent and len(sent) == 600


def test_a_command_sent_while_away_arrives_unless_it_expired(plain: Mosquitto) -> None:
    with Board(plain.port, device="away") as board:
        board.wait_connected()
    with Operator(plain.port, name="sender") as operator:
        operator.send("away", "report", b"stale", MessageExpiryInterval=1)
        operator.send("away", "report", b"fresh", MessageExpiryInterval=600)
        threading.Event().wait(2.1)  # mosquitto's own clock counts whole seconds: there is no event to wait for
        with Board(plain.port, device="away") as board:
            fresh = board.wait_commands(1)[0]
            operator.send("away", "report", b"last")
            last = board.wait_commands(2)[1]
    assert (fresh.payload, last.payload) == (b"fresh", b"last")
    assert fresh.expires is not None and 1000 < fresh.expires <= 1600 and last.expires is None


def test_only_commands_that_were_not_acknowledged_come_again(plain: Mosquitto) -> None:
    with (
        Operator(plain.port, name="again") as operator,
        Wire(plain.port) as wire,
        Board(wire.port, device="again") as board,
    ):
        board.wait_connected()
        for payload in (b"first", b"second"):
            operator.send("again", "adapt", payload)
        first, second = board.wait_commands(2)
        assert not first.dup
        board.link.delivery.acknowledge(first.token)
        board.put(b"after", topic=f"{PREFIX}/event")
        board.outbox.wait_empty()  # what the broker answers came to it after the acknowledgement
        operator.send("again", "adapt", b"third")
        board.wait_commands(3)
        wire.cut()
        board.wait_connected(2)
        board.wait_commands(5)
        board.link.delivery.acknowledge(second.token)  # of a connection that has gone: harmless
        again = board.commands[3:]
        assert [(inbound.payload, inbound.dup) for inbound in again] == [(b"second", True), (b"third", True)]


def test_response_topic_and_correlation_pass_through_both_ways(plain: Mosquitto) -> None:
    answer = "edgeear/v1/lab/console/answers"
    with Operator(plain.port, answer, name="asker") as operator, Board(plain.port, device="asked") as board:
        board.wait_connected()
        operator.send("asked", "infer", b"{}", ResponseTopic=answer, CorrelationData=b"\x00\xff")
        inbound = board.wait_commands(1)[0]
        assert (inbound.name, inbound.response_topic, inbound.correlation) == ("infer", answer, b"\x00\xff")
        board.put(b"done", topic=answer, correlation=b"\x00\xff".hex())
        operator.wait(lambda: operator.payloads("answers") == [b"done"])
        message = operator.messages[0]
        assert property_of(message, "CorrelationData") == b"\x00\xff"
        assert property_of(message, "ContentType") == "application/json"
        assert 0 < property_of(message, "MessageExpiryInterval") <= 7 * 86400


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_retained_command_is_ignored(plain: Mosquitto, protocol: str) -> None:
    device = f"retained-{protocol[0]}"
    with Operator(plain.port, name="keeper") as operator:
        operator.send(device, "rollback", b"{}", retain=True)
        with Board(plain.port, device=device, protocol=protocol) as board:
            board.wait_connected()
            operator.send(device, "report", b"{}")
            assert [inbound.name for inbound in board.wait_commands(1)] == ["report"]


def test_a_failing_disk_or_callback_does_not_end_the_link(plain: Mosquitto, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(MemoryOutbox):
        def acknowledge(self, ids: Sequence[int]) -> None:
            if not faults:
                return super().acknowledge(ids)
            raise faults.pop()

    faults: list[Exception] = [DeviceError("the disk is full"), RuntimeError("a bug")]
    with Board(plain.port, Failing()) as board:
        board.put(b"kept")
        board.outbox.wait_empty()
        board.wait_told("the disk is full")
    assert (False, "internal error RuntimeError: a bug") in board.changes and "a bug" in caplog.text
    assert board.outbox.acknowledged == [1]


def test_frames_come_only_where_wanted(plain: Mosquitto) -> None:
    with (
        Operator(plain.port, name="eyes") as operator,
        Board(plain.port, device="eye", frames=True) as eye,
        Board(plain.port, device="blind") as blind,
    ):
        for device, board in (("eye", eye), ("blind", blind)):
            board.wait_connected()
            operator.send(device, "frame", b"\xff\xd8")
            operator.send(device, "report", b"{}")  # comes after the frame: MQTT keeps the order
            board.wait_commands(1)
        eye.signal.wait(lambda: eye.frames == [b"\xff\xd8"])
        assert blind.frames == []


def test_mqtt_311(plain: Mosquitto) -> None:
    with Operator(plain.port, "edgeear/v1/lab/old/#", name="modern") as operator:
        with Board(plain.port, device="old", protocol="3.1.1") as board:
            board.wait_told("MQTT 3.1.1")
            board.put(b"hello", topic="edgeear/v1/lab/old/event")
            operator.send("old", "pause", b"{}")
            board.link.delivery.acknowledge(board.wait_commands(1)[0].token)
            operator.wait(lambda: operator.payloads() == [b"hello"])
        operator.wait(lambda: operator.payloads("/status")[-1] == b"offline session-1")


def test_a_broker_that_refuses_mqtt_5_gets_311() -> None:
    with ScriptedBroker() as broker, Board(broker.port) as board:
        board.wait_told("MQTT 3.1.1")
        board.put(b"hello")
        board.outbox.wait_empty()
        assert broker.levels == [5, 4]
        assert board.changes[0] == (
            False,
            "the broker refused the connection: Unsupported protocol version; MQTT 3.1.1 is tried next",
        )


def test_a_broker_that_hangs_up_on_mqtt_5_gets_311_and_the_setting_is_named() -> None:
    poison = b"poison"
    with ScriptedBroker(poison=poison, hangs_up=99) as broker, Board(broker.port) as board:
        board.wait_told("connected to 127.0.0.1")
        assert broker.levels == [5, 5, 5, 4]
        assert any("mqtt.protocol" in text for up, text in board.changes if not up)
        board.put(poison)  # ends the connection: the broker is known now and asked for MQTT 5 once
        board.wait_connected(2)
        assert broker.levels == [5, 5, 5, 4, 5, 4]


def test_a_broker_that_hangs_up_while_it_starts_gets_mqtt_5() -> None:
    with ScriptedBroker(receive_maximum=8, hangs_up=2) as broker, Board(broker.port) as board:
        board.wait_connected()
        assert broker.levels == [5, 5, 5]


def test_no_two_boards_have_the_same_client_id() -> None:
    names = ("a", "a-b", "b", "b-a", "a_b", "a-b-a")
    ids = {LinkPolicy("h", site, device).client_id for site in names for device in names}
    assert len(ids) == len(names) ** 2


def test_clones_of_a_board_are_told_what_disconnects_them(plain: Mosquitto) -> None:
    patient: dict[str, Any] = {"device": "clone", "reconnect_max_s": 5.0}
    with Board(plain.port, **patient) as one, Board(plain.port, **patient) as two:
        for board in (one, two):
            board.wait_told("another client may use the client id edgeear-lab/clone")


def test_a_board_that_connects_again_now_and_then_is_not_called_a_clone(plain: Mosquitto) -> None:
    with Wire(plain.port) as wire, Board(wire.port, device="alone", reconnect_max_s=60.0) as board:
        for times in range(1, 4):
            board.wait_connected(times)
            wire.cut()
        board.wait_connected(4)
        assert not any("another client" in text for _, text in board.changes)


def test_boards_whose_names_read_alike_share_a_broker(plain: Mosquitto) -> None:
    with Board(plain.port, site="lab-1", device="cam") as one, Board(plain.port, site="lab", device="1-cam") as two:
        one.wait_connected()
        two.wait_connected()
        for board in (one, two):
            board.put(b"said")
            board.outbox.wait_empty()
        assert len(one.changes) == len(two.changes) == 1


def test_an_item_that_makes_the_broker_disconnect_does_not_block_the_rest() -> None:
    with ScriptedBroker(poison=b"poison") as broker, Board(broker.port, protocol="3.1.1") as board:
        for payload in (b"before", b"poison", b"after", b"more"):
            board.put(payload)
        board.outbox.signal.wait(lambda: len(board.outbox.items) == 1, "all but one sent")
        assert [item.payload for item in board.outbox.items.values()] == [b"poison"]
        assert 5 <= broker.seen.count(b"poison") <= 8  # alone 5 times
        assert board.link.delivery.counters().held == 1 and "held back" in board.link.delivery.counters().last_refusal


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        ({"host": "nowhere.invalid"}, "cannot resolve host nowhere.invalid"),
        ({"host": "a" * 64 + ".b"}, "check mqtt.host"),
        ({"port": free_port()}, "nothing listens on 127.0.0.1"),
    ],
)
def test_an_unreachable_broker_is_reported_and_tried_again(policy: dict[str, object], told: str) -> None:
    settings = {"port": 1} | policy
    with Board(**settings) as board:  # type: ignore[arg-type]
        board.wait_told(told)
        assert not board.link.connected and not board.link.delivery.publish_now(f"{PREFIX}/prediction", b"{}")


def test_a_broker_that_starts_later_is_found(tmp_path: Path) -> None:
    broker = Mosquitto(tmp_path)
    with Board(broker.port) as board:
        board.put(b"early")
        board.wait_told("nothing listens")
        broker.start()
        board.outbox.wait_empty()
        assert board.link.delivery.publish_now(f"{PREFIX}/prediction", b"{}")
    broker.stop()


def test_refused_credentials_are_reported(tmp_path: Path) -> None:
    with mosquitto(tmp_path, PLAIN.replace("anonymous true", "anonymous false")) as broker, Board(broker.port) as board:
        board.wait_told("the broker refused the connection: Not authorized; check mqtt.username")


def test_the_broker_s_receive_maximum_is_respected() -> None:
    with ScriptedBroker(receive_maximum=3, holds=True) as broker, Board(broker.port, patience=0, inflight=100) as board:
        for payload in numbered(10):
            board.put(payload)
        board.wait_connected()
        for count, probe in ((4, b"probe 1"), (5, b"probe 2")):  # what follows the drain proves that it has paused
            assert board.link.delivery.publish_now(f"{PREFIX}/prediction", probe)
            broker.wait_seen(count)
        assert sorted(broker.seen) == sorted([b"online session-1", *numbered(2), b"probe 1", b"probe 2"])


def test_mosquitto_takes_a_small_receive_maximum(tmp_path: Path) -> None:
    few = PLAIN.replace("max_inflight_messages 0", "max_inflight_messages 3")
    with mosquitto(tmp_path, few) as broker, Board(broker.port) as board:
        for payload in numbered(500):
            board.put(payload)
        board.outbox.wait_empty()
        assert board.link.delivery.counters().connects == 1


def test_quota_is_tried_again_and_nothing_is_dropped() -> None:
    with ScriptedBroker(receive_maximum=9, reason=0x97) as broker, Board(broker.port) as board:
        board.put(b"later")
        broker.signal.wait(lambda: broker.seen.count(b"later") >= 8)
        assert not board.link.delivery.counters().dropped and list(board.outbox.items) == [1]
        board.wait_told("Quota exceeded")


def test_too_large_for_the_broker_is_dropped_and_counted(tmp_path: Path) -> None:
    with mosquitto(tmp_path, PLAIN + "max_packet_size 2000\n") as broker, Board(broker.port) as board:
        board.wait_connected()
        for payload in (b"a", b"x" * 1990, b"b"):
            board.put(payload)
        board.outbox.wait_empty()
        counters = board.link.delivery.counters()
        assert (counters.sent, counters.dropped, counters.connects) == (2, 1, 1)
        board.wait_told("too large for the broker")


def test_what_mqtt_cannot_hold_is_dropped_and_blocks_nothing(plain: Mosquitto) -> None:
    with Board(plain.port) as board:
        board.put(b"wildcard", topic=f"{PREFIX}/+")
        board.put(b"no hexadecimal", correlation="xyz")
        board.put(b"too long", correlation="00" * 70_000)
        board.put(b"good")
        board.outbox.wait_empty()
        counters = board.link.delivery.counters()
        assert (counters.sent, counters.dropped, counters.connects) == (1, 3, 1)
        assert "item 3 was dropped: MQTT cannot hold it" in counters.last_refusal


def test_an_item_that_mosquitto_refuses_out_of_protocol_is_held(tmp_path: Path) -> None:
    """Over `message_size_limit` it sends a PUBACK with 0x95, which MQTT does not allow, paho calls it malformed."""
    with mosquitto(tmp_path, PLAIN + "message_size_limit 1000\n") as broker, Board(broker.port) as board:
        for payload in (b"a", b"x" * 1500, b"b"):
            board.put(payload)
        board.outbox.signal.wait(lambda: len(board.outbox.items) == 1, "all but one sent")
        board.wait_told("item 2: 5 connections in a row ended on it, it is held back")
        assert board.link.delivery.counters().sent == 2


@pytest.mark.parametrize("queue", ["0", "1000"])  # with 0, mosquitto 2.0.11 hangs up after each PUBACK of failure
def test_a_topic_that_the_access_list_forbids_waits_and_blocks_nothing(tmp_path: Path, queue: str) -> None:
    rules = tmp_path / "acl"
    rules.write_text(f"topic readwrite {PREFIX}/event\ntopic write {STATUS}\n")
    config = PLAIN.replace("queued_messages 0", f"queued_messages {queue}") + f"acl_file {rules}\n"
    with mosquitto(tmp_path, config) as broker, Board(broker.port, hold_s=0.3) as board:
        for payload in (b"1", b"2", b"3"):
            board.put(payload, topic=f"{PREFIX}/telemetry")
            board.put(payload)
        board.outbox.signal.wait(lambda: len(board.outbox.items) == 3, "the allowed ones to be sent")
        board.wait_told(f"the broker forbids {PREFIX}/telemetry: Not authorized")
        assert {item.topic for item in board.outbox.items.values()} == {f"{PREFIX}/telemetry"}
        rules.write_text(f"topic readwrite {PREFIX}/#\n")
        broker.reload()
        board.outbox.wait_empty()
        counters = board.link.delivery.counters()
        assert (counters.sent, counters.dropped) == (6, 0) and counters.held >= 1
        assert len(set(board.outbox.acknowledged)) == len(board.outbox.acknowledged) == 6


def test_an_idle_link_does_not_look_at_the_outbox(plain: Mosquitto) -> None:
    with Operator(plain.port, name="idle") as operator, Board(plain.port, device="idle") as board:
        board.wait_connected()
        board.put(b"one")
        board.outbox.wait_empty()
        board.outbox.signal.wait(lambda: board.outbox.looks >= 2)
        looks = board.outbox.looks
        for _ in range(20):
            operator.send("idle", "report", b"{}")
        board.wait_commands(20)
        assert board.outbox.looks <= looks + 1


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Mosquitto]]:
    """A broker that asks clients for a certificate, and the folder of all certificates."""
    pki = tmp_path_factory.mktemp("pki")
    make_certificates(pki)
    config = (
        "listener {port} 127.0.0.1\nallow_anonymous true\nrequire_certificate true\n"
        f"cafile {pki}/ca.crt\ncertfile {pki}/server.crt\nkeyfile {pki}/server.key\n"
    )
    with mosquitto(tmp_path_factory.mktemp("secured"), config) as broker:
        yield pki, broker


def test_tls_with_a_client_certificate(secured: tuple[Path, Mosquitto]) -> None:
    pki, broker = secured
    with Board(broker.port, tls=TlsFiles(pki / "ca.crt", pki / "client.crt", pki / "client.key")) as board:
        board.wait_connected()
        for payload in (*numbered(300), b"x" * 100_000):
            board.put(payload)
        board.outbox.wait_empty()
        assert board.link.delivery.counters().sent == 301


@pytest.mark.parametrize(
    ("files", "host", "told"),
    [
        (("ca", "client"), "localhost", "Hostname mismatch"),
        (
            ("other", "client"),
            "127.0.0.1",
            "is not accepted: self-signed certificate in certificate chain; check mqtt.ca",
        ),
        (("ca", None), "127.0.0.1", "connection lost: failed to receive on socket"),
        (("ca", "other"), "127.0.0.1", "alert unknown ca"),
        (("missing", "client"), "127.0.0.1", "missing.crt"),
    ],
)
def test_a_failure_of_tls_is_reported(
    secured: tuple[Path, Mosquitto], files: tuple[str, str | None], host: str, told: str
) -> None:
    pki, broker = secured
    ca, own = files
    tls = TlsFiles(pki / f"{ca}.crt", own and pki / f"{own}.crt", own and pki / f"{own}.key")  # type: ignore[arg-type]
    with Board(broker.port, host=host, tls=tls) as board:
        board.wait_told(told)
        assert not any(up for up, _ in board.changes)


def make_certificates(folder: Path) -> None:
    """An authority, a server for 127.0.0.1 and a client of it, and a self-signed certificate."""

    def openssl(name: str, extensions: str, *signer: str) -> None:
        key = f"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN={name}".split()
        adds = [part for extension in extensions.split() for part in ("-addext", extension)]
        files = ["-keyout", str(folder / f"{name}.key"), "-out", str(folder / f"{name}.crt")]
        subprocess.run(["openssl", *key, *adds, *files, *signer], check=True, capture_output=True)

    by_ca = ("-CA", str(folder / "ca.crt"), "-CAkey", str(folder / "ca.key"))
    openssl("ca", "keyUsage=critical,keyCertSign")
    openssl("server", "subjectAltName=IP:127.0.0.1 basicConstraints=critical,CA:FALSE", *by_ca)
    openssl("client", "basicConstraints=critical,CA:FALSE", *by_ca)
    openssl("other", "keyUsage=critical,keyCertSign,digitalSignature")


@given(st.integers(0, 200), st.integers(0, 2**32))
def test_backoff_is_full_jitter(tries: int, seed: int) -> None:
    policy = LinkPolicy("localhost", "lab", "cam", reconnect_min_s=0.5, reconnect_max_s=60)
    assert 0 <= policy.backoff(tries, Random(seed)) <= min(60, 0.5 * 2**tries)


@given(st.floats(0.1, 1e4), st.lists(st.floats(0, 0.5), max_size=50))
def test_rate_never_exceeds_its_bucket(rate: float, pauses: list[float]) -> None:
    bucket, now, taken = Rate(rate, 0.0), 0.0, 0
    for pause in pauses:
        now += pause
        while taken < 10_000 and bucket.take(now):
            taken += 1
    assert taken <= 1 + max(1.0, rate / 10) + rate * now * (1 + 1e-9)
    wait = bucket.wait(now)
    assert bucket.take(now + wait * (1 + 1e-9) + 1e-9)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"port": 0}, "port is 0"),
        ({"site": "a/b"}, "site 'a/b'"),
        ({"host": "a b"}, "host is 'a b'"),
        ({"inflight": 0}, "inflight is 0"),
        ({"reconnect_min_s": 61.0}, "reconnect_min_s 61"),
    ],
)
def test_policy_refuses(bad: dict[str, object], text: str) -> None:
    good: dict[str, object] = {"host": "localhost", "site": "lab", "device": "cam"}
    with pytest.raises(UsageError, match=text):
        LinkPolicy(**(good | bad))  # type: ignore[arg-type]
