"""The operator's commands against a real mosquitto, with a scripted board and with a real daemon."""

from __future__ import annotations

import base64
import io
import json
import os
import pty
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from PIL import Image
from rich.console import Console

from device.cli import app as cli
from device.cli.operator import _address, _host_and_port
from device.mqtt import messages
from device.mqtt.link import Link, LinkPolicy, TlsFiles
from device.operator import labelling
from device.operator.client import BrokerAddress, Operator
from device.operator.watch import Fleet
from device.operator.watching import _picture, command_of
from edgeear.errors import DeviceError, UsageError
from tests.device.daemon.test_loop import Rig, jpeg, rigged, shown
from tests.device.operator.test_watch import EVIL, event, status, telemetry
from tests.support import fakes
from tests.support.broker import PLAIN, Mosquitto, free_port, mosquitto
from tests.support.mqtt_peers import ScriptedBroker, Signal, properties_of

SESSION = "0123456789abcdef"
PATIENCE = 10.0
LOCKED = "listener {port} 127.0.0.1\nallow_anonymous true\nacl_file {folder}/acl\n"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    with mosquitto(tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("NO_COLOR", "COLUMNS"):
        monkeypatch.setenv(name, "200")


def code(broker: Mosquitto | int, *arguments: object) -> int:
    """The exit code of an operator's command."""
    port = broker if isinstance(broker, int) else broker.port
    with pytest.raises(SystemExit) as caught:
        cli.main([*map(str, arguments), "--broker", f"127.0.0.1:{port}"])
    return int(caught.value.code or 0)


Answer = Callable[[str, dict[str, Any]], dict[str, Any] | bytes | None]


@contextmanager
def board(port: int, name: str, answer: Answer) -> Iterator[Client]:
    """A scripted board: `answer` gives the fields of a response, bytes to send instead, or None for silence."""
    signal, ready = Signal(), [False]
    client = Client(CallbackAPIVersion.VERSION2, f"board-{name}", protocol=MQTTProtocolVersion.MQTTv5)

    def respond(client: Client, data: Any, message: MQTTMessage) -> None:
        asked = json.loads(message.payload)
        facts = answer(message.topic.rpartition("/")[2], asked)
        if facts is None:
            return
        stamp: dict[str, Any] = dict(
            session=SESSION, boot=1, seq=1, time=1.0, id=asked["id"], command="x", outcome="ok"
        )
        payload = facts if isinstance(facts, bytes) else messages.Response(**stamp | facts).payload()
        told: Any = message.properties
        properties = properties_of(PacketTypes.PUBLISH, CorrelationData=told.CorrelationData)
        for _ in range(2):  # an answer may come twice
            client.publish(told.ResponseTopic, payload, 1, properties=properties)

    def subscribed(*_: Any) -> None:
        with signal.change():
            ready[0] = True

    def on_connect(*_: Any) -> None:
        client.subscribe(f"edgeear/v1/hall/{name}/command/+", 1)

    client.on_message, client.on_subscribe = respond, subscribed
    client.on_connect = on_connect
    client.connect("127.0.0.1", port)
    client.loop_start()
    try:
        signal.wait(lambda: ready[0], "subscription")
        yield client
    finally:
        client.disconnect()
        client.loop_stop()


@contextmanager
def connected(broker: Mosquitto, name: str = "any") -> Iterator[Operator]:
    with Operator(BrokerAddress("127.0.0.1", broker.port), (f"edgeear/v1/hall/{name}/response",)) as us:
        yield us


def echo(command: str, asked: dict[str, Any]) -> dict[str, Any]:
    return {"command": command, "result": asked}


# Asking


def test_each_question_gets_its_own_answer_whatever_their_order(broker: Mosquitto) -> None:
    held: list[tuple[str, dict[str, Any], Any]] = []
    with connected(broker, "mixed") as us:
        found: dict[str, messages.Response] = {}
        count = 8

        def swapped(client: Client, data: Any, message: MQTTMessage) -> None:
            held.append((json.loads(message.payload)["id"], json.loads(message.payload), message.properties))
            if len(held) == count:
                for identity, _, told in reversed(held):
                    properties = properties_of(PacketTypes.PUBLISH, CorrelationData=told.CorrelationData)
                    facts: dict[str, Any] = dict(
                        session=SESSION, boot=1, seq=1, time=1.0, id=identity, command="report", outcome="ok"
                    )
                    client.publish(told.ResponseTopic, messages.Response(**facts).payload(), 1, properties=properties)

        def ask(number: int) -> None:
            found[f"q{number}"] = us.ask("hall", "mixed", messages.Report(id=f"q{number}"))

        with board(broker.port, "mixed", echo) as client:
            client.on_message = swapped
            threads = [threading.Thread(target=ask, args=(number,)) for number in range(count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(PATIENCE)
        assert {name: response.id for name, response in found.items()} == {f"q{n}": f"q{n}" for n in range(count)}
        assert us.connected and not us._waiting and not us._rejected


def test_a_board_that_does_not_answer_in_time_is_named(broker: Mosquitto) -> None:
    told = r"hall/mute did not answer report within 0.2 s: is it online\?"
    with board(broker.port, "mute", lambda *_: None), connected(broker) as us, pytest.raises(DeviceError, match=told):
        us.ask("hall", "mute", messages.Report(id="a"), 0.2)


def test_a_command_to_an_unknown_board_fails_at_once(broker: Mosquitto) -> None:
    told = "hall/ghost is unknown to the broker, or was away too long: check site and device"
    with connected(broker) as us, pytest.raises(DeviceError, match=told):
        us.ask("hall", "ghost", messages.Report(id="a"), 600)


def test_a_command_that_the_access_list_forbids_fails_at_once(tmp_path: Path) -> None:
    (tmp_path / "acl").write_text("topic read edgeear/#\n")
    told = r"hall/cam did not get the command: the broker refuses it \(Not authorized\)"
    with mosquitto(tmp_path, LOCKED) as locked, connected(locked) as us, pytest.raises(DeviceError, match=told):
        us.ask("hall", "cam", messages.Report(id="a"), 600)


def test_an_answer_of_another_version_is_an_error(broker: Mosquitto) -> None:
    old, told = board(broker.port, "old", lambda *_: b'{"v": 9}'), "another version: v is 9"
    with old, connected(broker, "old") as us, pytest.raises(DeviceError, match=told):
        us.ask("hall", "old", messages.Report(id="a"))


@pytest.mark.parametrize("wait", [0.0, -1.0, float("nan"), float("inf")])
def test_a_wait_out_of_range_is_refused(wait: float) -> None:
    us = Operator(BrokerAddress("127.0.0.1"), (), lambda *_: None)
    with pytest.raises(UsageError, match="more than 0"):
        us.ask("hall", "cam", messages.Report(id="a"), wait)


def test_no_broker_is_an_error_with_a_remedy() -> None:
    port = free_port()
    us = Operator(BrokerAddress("127.0.0.1", port), (), lambda *_: None)
    with pytest.raises(DeviceError, match=f"nothing listens on 127.0.0.1:{port}; check that the broker runs"):
        us.open(PATIENCE)


def test_a_broker_that_refuses_us_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    closed = PLAIN.replace("allow_anonymous true", "allow_anonymous false")
    told = "the broker refuses the connection: Not authorized; check user"
    with mosquitto(tmp_path, closed) as strict, pytest.raises(DeviceError, match=told):
        Operator(BrokerAddress("127.0.0.1", strict.port, "me", "wrong"), ("edgeear/#",), lambda *_: None).open(PATIENCE)


def test_a_broker_without_mqtt_5_is_an_error() -> None:
    with (
        ScriptedBroker() as old,
        pytest.raises(DeviceError, match=r"the broker refuses|no answer within"),
    ):
        us = Operator(BrokerAddress("127.0.0.1", old.port), (), lambda *_: None)
        us.open(0.3)


def test_files_for_tls_that_are_not_there_are_named(tmp_path: Path) -> None:
    files = TlsFiles(tmp_path / "ca.pem")
    with pytest.raises(UsageError, match=r"ca.pem: No such file .* name PEM files"):
        Operator(BrokerAddress("127.0.0.1", 8883, tls=files), (), lambda *_: None)


def test_an_operator_reconnects_and_receives_again(tmp_path: Path) -> None:
    signal, heard = Signal(), list[bytes]()

    def note(topic: str, payload: bytes) -> None:
        with signal.change():
            heard.append(payload)

    with mosquitto(tmp_path) as shaky, Operator(BrokerAddress("127.0.0.1", shaky.port), ("t/#",), note) as us:
        subscriptions = Signal()
        subscribed, count = us._client.on_subscribe, [0]

        def counted(*facts: Any) -> None:
            assert subscribed is not None
            subscribed(*facts)
            with subscriptions.change():
                count[0] += 1

        us._client.on_subscribe = counted
        us._client.reconnect_delay_set(1, 1)
        shaky.kill()
        shaky.start()
        subscriptions.wait(lambda: count[0] == 1, "a second subscription")
        with board(shaky.port, "other", echo) as other:
            other.publish("t/1", b"after", 1)
            signal.wait(lambda: heard == [b"after"], "the message")
        assert us.connected


# `edgeear send`


def test_send_prints_the_response_and_ends_in_0(broker: Mosquitto, capsys: pytest.CaptureFixture[str]) -> None:
    with board(broker.port, "one", echo):
        assert code(broker, "send", "hall/one", "forget", "domain=winter", "label=2024", "--id", "my-id") == 0
    response = json.loads(capsys.readouterr().out)
    assert response["result"] == {"v": 1, "id": "my-id", "expires": None, "domain": "winter", "label": "2024"}


@pytest.mark.parametrize("outcome", ["refused", "failed"])
def test_send_ends_in_1_where_nothing_was_done(
    broker: Mosquitto, capsys: pytest.CaptureFixture[str], outcome: str
) -> None:
    with board(broker.port, "two", lambda *_: {"outcome": outcome, "reason": EVIL}):
        assert code(broker, "send", "hall/two", "report") == 1
    out = capsys.readouterr().out
    assert json.loads(out)["reason"] == EVIL and out.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("hall", "report"), "board 'hall': give SITE/DEVICE"),
        (("hall/a b", "report"), "device 'a b'"),
        (("hall/x", "reboot"), "command 'reboot' is not known; this board takes infer, label"),
        (("hall/x", "forget", "winter"), "field 'winter': give NAME=VALUE"),
        (("hall/x", "forget", "=winter"), "field '=winter': give NAME=VALUE"),
        (("hall/x", "forget", "domain=a", "domain=b"), "field domain is given twice"),
        (("hall/x", "forget", "colour=red"), "forget: field 'colour' is not known; known are"),
        (("hall/x", "forget"), "forget: domain: Field required"),
        (("hall/x", "pause", "paused=maybe"), "pause: paused: Input should be a valid boolean, got 'maybe'"),
        (("hall/x", "set-policy"), "sets nothing: give at least one of labels, probation"),
        (("hall/x", "set-policy", "labels=4"), "labels: Input should be greater than or equal to 5, got 4"),
        (("hall/x", "infer", "image=@none.jpg"), "none.jpg: cannot be read (No such file or directory)"),
        (("hall/x", "infer", "image=@text.jpg"), "image: must be a JPEG or PNG file"),
    ],
)
def test_what_was_typed_wrong_is_named_and_ends_in_2(
    arguments: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("text.jpg").write_text("no picture")
    assert code(free_port(), "send", *arguments) == 2
    caught = capsys.readouterr()
    assert caught.err.startswith("error: ") and told in caught.err and caught.out == ""
    assert "Traceback" not in caught.err


def test_no_broker_ends_in_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert code(free_port(), "send", "hall/x", "report") == 2
    assert "nothing listens on 127.0.0.1:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("domain=2024", "2024"),
        ("domain=true", "true"),
        ("domain=null", None),
        ("domain=NaN", "NaN"),
        ('domain="quoted"', "quoted"),
        ("domain=a=b", "a=b"),
        ("domain=winter", "winter"),
    ],
)
def test_a_value_is_json_where_the_field_takes_it_else_text(field: str, value: str | None) -> None:
    command = command_of("adapt", [field], None)
    assert isinstance(command, messages.Adapt) and command.domain == value


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(messages.COMMANDS)), st.lists(st.text() | st.builds("{}={}".format, st.text(), st.text()))
)
def test_whatever_is_typed_is_a_command_or_a_mistake_with_a_name(name: str, fields: list[str]) -> None:
    try:
        command = command_of(name, fields, None)
    except UsageError as error:
        assert str(error)
    else:
        assert command.name == name


def test_what_nests_too_deep_is_text() -> None:
    command = command_of("adapt", ["domain=" + "[" * 100], None)
    assert isinstance(command, messages.Adapt) and command.domain == "[" * 100
    with pytest.raises(UsageError, match="adapt: payload of 100044 bytes"):
        command_of("adapt", ["domain=" + "[" * 100_000], None)


def test_a_picture_goes_as_base64(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(png := base64.b64decode(jpeg(shown(0, 1, 1)[0])))
    command = command_of("infer", [f"image=@{tmp_path}/p.png"], "one")
    assert isinstance(command, messages.Infer) and command.image_bytes == png and command.id == "one"
    assert command_of("report", [], None).id != command_of("report", [], None).id


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("plant", ("plant", 8883)),
        ("plant.example:18", ("plant.example", 18)),
        ("10.0.0.1", ("10.0.0.1", 8883)),
        ("[fe80::1]:99", ("fe80::1", 99)),
        ("fe80::1", ("fe80::1", 8883)),
    ],
)
def test_a_broker_address_is_parsed(text: str, found: tuple[str, int]) -> None:
    assert _host_and_port(text, 8883) == found


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize(
    ("broker", "trusted"),
    [
        (None, True),
        ("plant.example", True),
        ("Plant.Example:1884", True),
        ("plant.example.evil.test", False),
        ("evil.test:1883", False),
        ("127.0.0.1", False),
        ("[::1]:1883", False),
    ],
)
def test_the_configured_password_goes_to_the_configured_host_alone(
    broker: str | None, trusted: bool, secure: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "board.toml"
    path.write_text('[mqtt]\nhost = "plant.example"\nusername = "me"\npassword = "in the file"\n')
    ca = Path("ca.pem") if secure else None
    found = [_address(broker, path, ca, None, None)]
    monkeypatch.setenv("EDGEEAR_MQTT__PASSWORD", "in the environment")
    found.append(_address(broker, path, ca, None, None))
    wanted = ["in the file", "in the environment"] if trusted else [None, None]
    assert [address.password for address in found] == wanted
    assert all((address.username == "me") == trusted for address in found)


@pytest.mark.parametrize("text", ["", ":1", "a:", "a:0", "a:65536", "a:b", "a b", "mqtt://a:1"])
def test_a_wrong_broker_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="give HOST or HOST:PORT"):
        _host_and_port(text, 1883)


def test_half_a_certificate_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert code(free_port(), "send", "hall/x", "report", "--cert", "me.pem", "--key", "me.key") == 2
    assert "needs its key and the broker's authority" in capsys.readouterr().err


# `edgeear watch`


@contextmanager
def watching(port: int, *options: str) -> Iterator[subprocess.Popen[str]]:
    """`edgeear watch` in a process of its own, when it has subscribed."""
    script = "from device.cli.app import main; main()"
    command = [sys.executable, "-c", script, "watch", "--broker", f"127.0.0.1:{port}", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def tell(client: Client, name: str, payload: bytes, device: str = "cam") -> None:
    topic = f"edgeear/v1/hall/{device}/{name}"
    client.publish(topic, payload, 1, retain=name == "status").wait_for_publish(PATIENCE)


def test_watch_tells_what_happens_in_lines_that_parse(broker: Mosquitto) -> None:
    with board(broker.port, "told", echo) as client, watching(broker.port, "--json", "--site", "hall") as process:
        tell(client, "status", status().payload())
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())  # retained: now it listens
        for message, name in ((telemetry(seq=1), "telemetry"), (event(seq=2, text=EVIL), "event"), (b"{", "event")):
            tell(client, name, message if isinstance(message, bytes) else message.payload())
        tell(client, "event", event(seq=2).payload())
        tell(client, "event", event(seq=3).payload())
        lines = [process.stdout.readline() for _ in range(3)]
        tell(client, "status", b"")
    assert all(line.rstrip("\n").isprintable() for line in lines)
    told = [first, *map(json.loads, lines)]
    assert [(one["site"], one["device"], one["kind"]) for one in told] == [
        ("hall", "cam", kind) for kind in ("status", "telemetry", "event", "event")
    ]
    assert [one["message"].get("seq") for one in told] == [None, 1, 2, 3] and told[2]["message"]["text"] == EVIL


def test_watch_without_a_terminal_tells_states_and_events(broker: Mosquitto) -> None:
    with board(broker.port, "plain", echo) as client, watching(broker.port) as process:
        tell(client, "status", status(generation=4).payload(), "plain")
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        tell(client, "telemetry", telemetry(seq=1).payload(), "plain")
        tell(client, "event", event(seq=2).payload(), "plain")
        lines.append(process.stdout.readline())
        tell(client, "status", b"", "plain")
    assert [line.split(None, 2)[1:] for line in lines] == [
        ["hall/plain", "online, generation 4\n"],
        ["hall/plain", "grown: winter\n"],
    ]


def test_watch_ends_when_its_reader_closes_the_pipe(broker: Mosquitto) -> None:
    with board(broker.port, "piped", echo) as client, watching(broker.port) as process:
        tell(client, "status", status().payload(), "piped")
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        tell(client, "event", event(seq=2).payload(), "piped")
        assert process.wait(PATIENCE) == 0 and process.stderr.read() == ""
        tell(client, "status", b"", "piped")


def test_watch_ends_after_its_time_and_refuses_a_wrong_site(
    broker: Mosquitto, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code(broker, "watch", "--seconds", 0.1, "--site", "elsewhere") == 0
    assert code(broker, "watch", "--site", "a/#") == 2
    assert "site 'a/#'" in capsys.readouterr().err


def test_watch_on_a_terminal_shows_the_table_and_what_happened(broker: Mosquitto) -> None:
    ours, theirs = pty.openpty()
    script = "from device.cli.app import main; main()"
    command = [sys.executable, "-c", script, "watch", "--broker", f"127.0.0.1:{broker.port}"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    seen = b""
    with board(broker.port, "tty", echo) as client:
        tell(client, "status", status().payload(), "tty")
        with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as process:
            os.close(theirs)
            try:
                while b"hall/tty" not in seen:
                    seen += os.read(ours, 65536)
                tell(client, "event", event(seq=2, text=EVIL).payload(), "tty")
                while seen.count(b"grown") < 2:  # in its row, and below the table
                    seen += os.read(ours, 65536)
            finally:
                process.kill()
        tell(client, "status", b"", "tty")
    os.close(ours)
    assert b"1 online" in seen and b"owned\x07" not in seen and b"\x1b[2J\x1b]0;" not in seen


def test_the_screen_says_when_the_broker_is_gone() -> None:
    fleet = Fleet()
    for seq in range(1, 20):
        fleet.take(f"edgeear/v1/hall/cam-{seq}/event", event(seq=seq, text="x" * 400).payload(), 1.0)
    for connected in (True, False):
        console = Console(file=io.StringIO(), width=60, height=24)
        console.print(_picture(fleet, 1.0, console, connected))
        assert isinstance(console.file, io.StringIO)
        lines = console.file.getvalue().splitlines()
        assert len(lines) <= 24 and ("the broker is gone: reconnecting" in lines) is not connected


# `edgeear requests` and `edgeear label`, against a real daemon


@contextmanager
def served(rig: Rig, port: int) -> Iterator[threading.Thread]:
    """The daemon of `rig`, connected to a broker and running by itself."""
    connected, stop = threading.Event(), threading.Event()
    policy = LinkPolicy("127.0.0.1", "plant", "cam-1", port, reconnect_min_s=0.02)

    def changed(up: bool, text: str) -> None:
        if up:
            connected.set()

    def clock() -> float:
        return rig.now

    link = Link(policy, rig.outbox, rig.daemon.status, rig.daemon.receive, lambda _: None, changed, Random(0), clock)
    rig.daemon.out.link = link.delivery
    thread = threading.Thread(target=rig.daemon.run, args=(stop,))
    link.start()
    try:
        assert connected.wait(PATIENCE)
        thread.start()
        yield thread
    finally:
        stop.set()
        rig.daemon.wake.set()
        thread.join(PATIENCE)
        link.stop(PATIENCE)


def sort(folder: Path) -> None:
    """What a person does with a file manager; the class is in the order of the frames, as fakes makes them."""
    for path in folder.glob("*.jpg"):
        kind = folder / fakes.CLASSES[(int(path.stem.rpartition("-")[2]) - 1) % 3]
        kind.mkdir(exist_ok=True)
        shutil.move(path, kind)


def test_a_board_is_labelled_with_a_file_manager(
    broker: Mosquitto, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = tmp_path / "frames"
    # Called once before the board needs anybody: the broker keeps what comes later.
    assert code(broker, "requests", "plant/cam-1", "--out", frames, "--seconds", 0.1) == 0
    with rigged(tmp_path / "board") as rig:
        rig.show(0, 40)
        assert rig.kinds[-1] == "label-wanted"
        with served(rig, broker.port):
            assert code(broker, "requests", "plant/cam-1", "--out", frames, "--count", 40) == 0
            saved = sorted(path.name for path in frames.iterdir())
            assert saved == [f"{rig.session}-{number:06}.jpg" for number in range(1, 41)]
            with Image.open(frames / saved[0]) as picture:
                assert picture.size == (fakes.SIZE, fakes.SIZE)
            assert code(broker, "label", "plant/cam-1", "--from", frames) == 2
            assert "40 frames to sort, 0 of earlier sessions" in capsys.readouterr().err
            sort(frames)
            shutil.move(frames / "half" / saved[2], frames)
            (frames / "half" / f"{SESSION}-000009.jpg").write_bytes(b"of a session before")
            assert code(broker, "label", "plant/cam-1", "--from", frames, "--domain", "day") == 0
            caught = capsys.readouterr()
            assert json.loads(caught.out)["result"] == {"accepted": 39, "unknown_samples": []}
            assert caught.err.startswith("1 pictures are in no class, 1 are of earlier sessions")
            sort(frames)
            assert code(broker, "label", "plant/cam-1", "--from", frames) == 0
        assert rig.board.phase == "probation" and rig.board.system.names == ("day",)


def named_session(command: str, asked: dict[str, Any]) -> dict[str, Any]:
    if command == "report":
        return {"result": {"session": SESSION}}
    return {"outcome": "refused", "reason": "not now"}


def put(folder: Path, label: str, at: int) -> None:
    (folder / label).mkdir(exist_ok=True)
    (folder / label / f"{SESSION}-{at:06}.jpg").touch()


def test_label_ends_in_1_where_the_board_refuses(
    broker: Mosquitto, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, "cat", 1)
    with board(broker.port, "busy", named_session):
        assert code(broker, "label", "hall/busy", "--from", tmp_path) == 1
    assert json.loads(capsys.readouterr().out)["reason"] == "not now"


@pytest.mark.parametrize("label", ["a\tb", "x" * 129])
def test_a_folder_whose_name_cannot_be_a_class_is_named(
    broker: Mosquitto, tmp_path: Path, label: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, label, 7)
    with board(broker.port, "picky", named_session):
        assert code(broker, "label", "hall/picky", "--from", tmp_path) == 2
    assert "sample '7'" in capsys.readouterr().err


def test_a_board_that_names_no_session_is_an_error(
    broker: Mosquitto, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with board(broker.port, "odd", lambda *_: {}):
        assert code(broker, "label", "hall/odd", "--from", tmp_path) == 2
    assert "does not report its session" in capsys.readouterr().err


def request(at: int = 12, session: str = SESSION, image: bytes = b"\xff\xd8\xff0") -> bytes:
    encoded = base64.b64encode(image).decode()
    return messages.LabelRequest(session=session, boot=1, seq=1, time=1.0, at=at, image=encoded).payload()


def test_a_frame_is_saved_once_wherever_it_was_sorted_to(tmp_path: Path) -> None:
    path = labelling.save(tmp_path / "new", request())
    assert path == tmp_path / "new" / f"{SESSION}-000012.jpg" and path.read_bytes() == b"\xff\xd8\xff0"
    assert labelling.save(tmp_path / "new", request()) is None
    (tmp_path / "new" / "cat").mkdir()
    path.rename(tmp_path / "new" / "cat" / path.name)
    assert labelling.save(tmp_path / "new", request()) is None
    png = labelling.save(tmp_path / "new", request(image=b"\x89PNG\r\n\x1a\n"))
    assert png is not None and png.suffix == ".png"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [png.name, "cat"]


@pytest.mark.parametrize("payload", [b"", b"{}", b"\xff", request().replace(b'"v":1', b'"v":2'), request()[:-1]])
def test_what_is_no_request_is_not_saved(tmp_path: Path, payload: bytes) -> None:
    assert labelling.save(tmp_path, payload) is None and list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DeviceError, match=r"file: .* name a folder that you may write to"):
        labelling.save(tmp_path / "file", request())


def test_folders_are_read_as_labels(tmp_path: Path) -> None:
    for place in ("cat/1", "cat/2", "dog ä/3", "4", "cat/note", "a/b/5"):
        folder, _, name = place.rpartition("/")
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        stem = f"{SESSION}-{int(name):06}.jpg" if name.isdigit() else name
        (tmp_path / folder / stem).touch()
    (tmp_path / "cat" / "fedcba9876543210-000001.jpg").touch()
    found = labelling.read(tmp_path, SESSION)
    assert found == labelling.Sorted({1: "cat", 2: "cat", 3: "dog ä"}, waiting=1, stale=1)
    shutil.copy(tmp_path / "cat" / f"{SESSION}-000002.jpg", tmp_path / "dog ä")
    with pytest.raises(UsageError, match="sample 2 is also in cat"):
        labelling.read(tmp_path, SESSION)
    with pytest.raises(UsageError, match=r"no such folder; `edgeear requests` makes one"):
        labelling.read(tmp_path / "none", SESSION)
