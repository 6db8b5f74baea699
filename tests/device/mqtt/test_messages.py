"""Messages: what is valid survives the wire; whatever else arrives becomes a refusal in words, never an exception."""

from __future__ import annotations

import base64
import json
import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from device.mqtt.fields import MAX_IMAGE, MAX_LABELS, MAX_REQUEST_IMAGE
from device.mqtt.messages import (
    COMMANDS,
    MAX_PARTS,
    MAX_PAYLOAD,
    MAX_REASON,
    MEASURES,
    Adapt,
    Command,
    Confirm,
    Event,
    Forget,
    Infer,
    Label,
    LabelRequest,
    Message,
    OutboxReport,
    Pause,
    PredictionMessage,
    Quantiles,
    Refusal,
    Report,
    Response,
    Rollback,
    SetPolicy,
    Stamper,
    Status,
    Telemetry,
    finite,
    new_session,
    parse,
    parse_command,
)

JPEG = b"\xff\xd8\xff\xe0 the rest of a picture"
SESSION = "0123456789abcdef"
STAMP = Stamper(SESSION, 3)
TELEMETRY = Telemetry(
    **STAMP(8, 1e9),
    from_time=1e9 - 60,
    to_time=1e9,
    frames=600,
    dropped=1,
    stale=2,
    undecodable=0,
    ood=5,
    abstained=1,
    novelty=Quantiles(p50=0.1, p90=0.2, p99=0.9),
    latency_ms=None,
    routes={"photo": 590, "art": 10},
    phase="serving",
    generation=4,
    temperature_c=None,
    rss_mb=120.5,
    cpu_share=0.4,
    outbox=OutboxReport(depth=3, bytes=900, oldest_s=1.5, dropped={"telemetry": 2}),
    refused_messages=0,
)
UP: tuple[Message, ...] = (
    TELEMETRY,
    Status(state="online", session=SESSION, boot=3, time=1e9, version="0.5.0", encoder="lite0", generation=4),
    Event(**STAMP(9, 1e9), kind="grown", text="art: a head", at=500, generation=4, data={"share": 0.5, "ok": True}),
    PredictionMessage(
        session=SESSION, boot=3, at=7, time=1e9, generation=4, label=None, route=None, novelty=None, p=0.5, ood=True
    ),
    LabelRequest(**STAMP(10, 1e9), at=7, image=base64.b64encode(JPEG).decode(), guess="dog", route="photo"),
    Response(**STAMP(11, 1e9), id="a-1", command="infer", outcome="ok", result={"label": "dog", "scores": [0.5, 1]}),
)

names = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=128)
ids = st.from_regex(r"[A-Za-z0-9_.:-]{1,64}", fullmatch=True)
images = st.binary(max_size=200).map(lambda rest: base64.b64encode(JPEG + rest).decode())
base = {"id": ids, "expires": st.none() | st.floats(0, 4e9)}
settings_of = st.fixed_dictionaries(
    {"labels": st.integers(5, MAX_LABELS)},
    optional={
        "probation": st.integers(1, 9),
        "foreign": st.floats(0, 1, exclude_min=True),
        "label_free": st.booleans(),
    },
)
commands: st.SearchStrategy[Command] = st.one_of(
    st.builds(Infer, image=images, **base),
    st.builds(
        Label,
        session=st.just(SESSION),
        labels=st.dictionaries(st.integers(0, 2**53 - 1), names, min_size=1, max_size=5),
        domain=st.none() | names,
        **base,
    ),
    st.builds(Adapt, domain=st.none() | names, **base),
    st.builds(Rollback, **base),
    st.builds(Confirm, **base),
    st.builds(Pause, paused=st.booleans(), **base),
    st.builds(lambda settings, **rest: SetPolicy(**settings, **rest), settings=settings_of, **base),
    st.builds(Report, **base),
    st.builds(Forget, domain=names, label=st.none() | names, **base),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(), max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
command_names = st.sampled_from(sorted(COMMANDS))


def judged(name: str, payload: bytes) -> Command | Refusal:
    """The outcome, after checking what holds of every outcome."""
    outcome = parse_command(name, payload)
    if isinstance(outcome, Refusal):
        assert 10 < len(outcome.reason) <= MAX_REASON
        told = outcome.response(STAMP(1, 0.0), name)
        assert parse(Response, told.payload()) == told
    else:
        assert type(outcome) is COMMANDS[name]
    return outcome


def reason(name: str, payload: str | bytes) -> str:
    outcome = judged(name, payload.encode() if isinstance(payload, str) else payload)
    assert isinstance(outcome, Refusal)
    return outcome.reason


@given(commands)
def test_a_valid_command_survives_the_wire(command: Command) -> None:
    assert parse_command(command.name, command.payload()) == command


@pytest.mark.parametrize("message", UP, ids=lambda message: type(message).__name__)
def test_what_a_board_sends_survives_the_wire(message: Message) -> None:
    assert parse(type(message), message.payload()) == message
    assert json.loads(message.payload())["v"] == 1


def test_sample_numbers_are_digits_in_json_and_integers_here() -> None:
    payload = b'{"id": "a", "session": "0123456789abcdef", "labels": {"7": "dog", "12": "cat"}}'
    outcome = parse_command("label", payload)
    assert isinstance(outcome, Label) and outcome.labels == {7: "dog", 12: "cat"}


def test_image_comes_out_as_its_bytes() -> None:
    payload = json.dumps({"id": "a", "image": base64.b64encode(JPEG).decode()}).encode()
    outcome = parse_command("infer", payload)
    assert isinstance(outcome, Infer) and outcome.image_bytes == JPEG


@given(command_names | st.text(max_size=80), st.binary(max_size=200))
def test_any_bytes_get_an_answer(name: str, payload: bytes) -> None:
    judged(name, payload)


@given(command_names, st.dictionaries(st.sampled_from(["v", "id", "labels", "image", "x"]), json_values) | json_values)
def test_any_json_gets_an_answer(name: str, value: Any) -> None:
    judged(name, json.dumps(value).encode())


@given(st.data(), commands)
def test_mutated_commands_get_an_answer(data: st.DataObject, command: Command) -> None:
    payload = bytearray(command.payload())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(payload)))
        with_ = data.draw(st.binary(max_size=3) | st.sampled_from([b'"', b"{", b"1e999", b"\\ud800", b"NaN", b"null"]))
        payload[at : at + data.draw(st.integers(0, 3))] = with_
    judged(command.name, bytes(payload))


@given(commands, st.sampled_from(["v", "id", "expires", "paused", "labels", "image", "domain", "more"]), json_values)
def test_a_wrong_value_gets_an_answer(command: Command, field: str, value: Any) -> None:
    fields = json.loads(command.payload()) | {field: value}
    outcome = judged(command.name, json.dumps(fields).encode())
    if isinstance(outcome, Refusal) and field != "id":
        unread = "no JSON number" in outcome.reason or "whole number of" in outcome.reason
        assert outcome.id == (None if unread else command.id)


@given(st.sampled_from(UP), st.data())
def test_mutated_messages_of_boards_get_an_answer(message: Message, data: st.DataObject) -> None:
    payload = bytearray(message.payload())
    at = data.draw(st.integers(0, len(payload)))
    payload[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    outcome = parse(type(message), bytes(payload))
    assert isinstance(outcome, type(message) | Refusal)


@pytest.mark.parametrize(
    ("name", "payload", "words"),
    [
        ("pause", '{"id": "a", "paused": true, "v": 2}', "v is 2: this board speaks version 1"),
        ("pause", '{"id": "a", "paused": true, "v": "1"}', "v is '1': this board speaks version 1"),
        ("pause", '{"id": "a", "paused": true, "v": true}', "v is True: this board speaks version 1"),
        ("pause", '{"id": "a", "paused": 1}', "paused: Input should be a valid boolean, got 1"),
        ("pause", '{"id": "a"}', "paused: Field required"),
        (
            "pause",
            '{"id": "a", "paused": true, "now": 1}',
            "field 'now' is not known; known are v, id, expires, paused",
        ),
        ("pause", '{"id": "a", "id": "b", "paused": true}', "key 'id' is given twice"),
        ("adapt", '{"id": "a", "domain": {"x": 1, "x": 2}}', "key 'x' is given twice"),
        ("adapt", '{"id": "a b"}', "id: String should match pattern"),
        ("adapt", '{"id": "a\\n"}', "id: String should match pattern"),
        ("adapt", '{"id": "a", "expires": NaN}', "NaN is no JSON number"),
        ("adapt", '{"id": "a", "expires": -Infinity}', "-Infinity is no JSON number"),
        ("adapt", '{"id": "a", "expires": 1e999}', "expires: Input should be a finite number, got inf"),
        ("adapt", '{"id": "a", "expires": %s}' % ("9" * 5000), "a whole number of 5000 digits: at most 2^53 - 1"),
        ("adapt", '{"id": "a", "domain": "x\\ty"}', "domain: must be printable characters only, got 'x\\ty'"),
        ("adapt", '{"id": "a", "domain": "\\ud800"}', "payload is not JSON"),
        ("adapt", '{"id": "a", "\\ud800": 1}', "field '\\ud800' is not known"),
        ("adapt", '{"id": "a", "domain": ""}', "domain: String should have at least 1 character, got ''"),
        ("label", "[" * 30_000, "nested too deeply"),
        ("adapt", '{"id": "a", "domain": ' + "[" * 400 + "]" * 400 + "}", "recursion limit exceeded"),
        ("label", '{"a":' * 30_000, "nested too deeply"),
        ("adapt", "[]", "payload must be a JSON object, got a list of 0"),
        ("adapt", '{"id": "a"', "payload is not JSON: Expecting ',' delimiter at character 10"),
        ("adapt", "", "payload is not JSON: Expecting value at character 0"),
        ("adapt", b'{"id": "a\xff"}', "payload is not UTF-8 at byte 9"),
        ("adapt", '{"id": "a"}'.encode("utf-16"), "payload is not UTF-8 at byte 0"),
        ("adapt", b"\xef\xbb\xbf{}", "payload is not JSON"),
        ("adapt", b" " * 16_385, "payload of 16385 bytes, at most 16384 are taken: send less in one message"),
        ("label", b" " * (MAX_PAYLOAD + 1), f"payload of {MAX_PAYLOAD + 1} bytes, at most {MAX_PAYLOAD} are taken"),
        ("label", "[" + "1," * MAX_PARTS, f"commas and brackets, at most {MAX_PARTS} are taken"),
        ("reboot", '{"id": "a"}', "command 'reboot' is not known; this board takes infer, label, adapt, rollback"),
        ("infer", '{"id": "a", "image": "QUJD"}', "image: must be a JPEG or PNG file"),
        ("infer", '{"id": "a", "image": "/9j/\\n/9j/"}', "image: must be base64 with padding and without line breaks"),
        ("infer", '{"id": "a", "image": "/9j/4A"}', "image: must be base64 with padding and without line breaks"),
        ("infer", '{"id": "a", "image": "/9j/4B=="}', "image: must be base64 with padding and without line breaks"),
        ("infer", '{"id": "a", "image": "é/9j/"}', "image: must be base64 with padding and without line breaks"),
        ("set-policy", '{"id": "a"}', "sets nothing: give at least one of labels, probation, foreign, label_free"),
        ("set-policy", '{"id": "a", "labels": null}', "sets nothing"),
        ("set-policy", '{"id": "a", "labels": 1}', "labels: Input should be greater than or equal to 5, got 1"),
        ("set-policy", '{"id": "a", "labels": 10.0}', "labels: Input should be a valid integer"),
        ("set-policy", '{"id": "a", "foreign": 2}', "foreign: Input should be less than or equal to 1, got 2"),
        ("set-policy", '{"id": "a", "foreign": 0}', "foreign: Input should be greater than 0, got 0"),
        ("set-policy", '{"id": "a", "period_s": 5}', "field 'period_s' is not known"),
        ("forget", '{"id": "a"}', "domain: Field required"),
    ],
)
def test_a_refusal_names_field_value_and_limit(name: str, payload: str | bytes, words: str) -> None:
    assert words in reason(name, payload)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ("{}", "labels: must have 1 to 10000 entries, has 0"),
        ('{"01": "dog"}', "key '01' must be a sample number"),
        ('{"-1": "dog"}', "key '-1' must be a sample number"),
        ('{"1.0": "dog"}', "key '1.0' must be a sample number"),
        ('{"²": "dog"}', "key '\\xb2' must be a sample number"),
        ('{"9007199254740992": "dog"}', "must be a sample number: decimal digits, 0 to 2^53 - 1"),
        ('{"5": ""}', "sample '5': '' must be a class name of 1 to 128 printable characters"),
        ('{"5": "a\\u0000"}', "must be a class name of 1 to 128 printable characters"),
        ('{"5": 5}', "sample '5': 5 must be a class name"),
        ('{"5": "%s"}' % ("x" * 129), "must be a class name of 1 to 128 printable characters"),
        ('["dog"]', "labels: Input should be an object, got a list of 1"),
    ],
)
def test_a_refused_label_names_its_sample(labels: str, words: str) -> None:
    assert words in reason("label", f'{{"id": "a", "session": "{SESSION}", "labels": {labels}}}')


@pytest.mark.parametrize(("count", "taken"), [(MAX_LABELS, True), (MAX_LABELS + 1, False)])
def test_labels_up_to_their_bound(count: int, taken: bool) -> None:
    payload = {"id": "a", "session": SESSION, "labels": {str(at): "ünï" for at in range(count)}}
    assert isinstance(judged("label", json.dumps(payload).encode()), Label) == taken


@pytest.mark.parametrize(("size", "taken"), [(MAX_IMAGE, True), (MAX_IMAGE + 1, False)])
def test_images_up_to_their_bound(size: int, taken: bool) -> None:
    image = base64.b64encode(JPEG.ljust(size, b"x")).decode()
    outcome = judged("infer", json.dumps({"id": "a", "image": image}).encode())
    assert isinstance(outcome, Infer) == taken
    assert taken or (isinstance(outcome, Refusal) and "4194304 bytes, has 4194305" in outcome.reason)


@pytest.mark.parametrize("name", ["pause", "nonsense"])
def test_a_refusal_carries_the_id_that_can_be_read(name: str) -> None:
    assert parse_command(name, b'{"id": "op:1", "v": 9}') == Refusal("op:1", reason(name, b'{"id": "op:1", "v": 9}'))
    for unreadable in (b'{"id": "no good"}', b'{"id": 5}', b'{"id": "a"', b"[]", b'{"id": "%s"}' % (b"a" * 65)):
        outcome = parse_command(name, unreadable)
        assert isinstance(outcome, Refusal) and outcome.id is None


def test_settings_are_those_given() -> None:
    command = parse_command("set-policy", b'{"id": "a", "label_free": false, "telemetry_period_s": 10}')
    assert isinstance(command, SetPolicy) and command.settings == {"label_free": False, "telemetry_period_s": 10.0}


def test_no_message_of_a_board_can_be_huge() -> None:
    data: Any = {f"{n:02}" + "\x01" * 62: "\x01" * 500 for n in range(64)}
    event = Event(**STAMP(2**53 - 1, 1e9), kind="grown", text="\x01" * 2000, at=1, generation=1, data=data)
    routes = {f"{n:03}" + "\x01" * 252: 2**53 - 1 for n in range(256)}
    telemetry = Telemetry(**TELEMETRY.model_dump() | {"routes": routes})
    image = base64.b64encode(JPEG.ljust(MAX_REQUEST_IMAGE, b"x")).decode()
    asked = LabelRequest(**STAMP(10, 1e9), at=7, image=image, guess="\x01" * 255, route="\x01" * 255)
    assert max(len(event.payload()), len(telemetry.payload())) < 512 << 10
    for message in (event, telemetry, asked):
        assert parse(type(message), message.payload()) == message
        assert len(message.payload()) <= message.limit


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=255))
def test_a_board_can_tell_whatever_name_it_has_learned(name: str) -> None:
    telemetry = Telemetry(**TELEMETRY.model_dump() | {"routes": {name: 1}})
    assert parse(Telemetry, telemetry.payload()) == telemetry


@pytest.mark.parametrize("value", [math.nan, math.inf, 10**400, "x" * 501, [], {}])
def test_data_of_an_event_is_small_scalars(value: Any) -> None:
    with pytest.raises(ValidationError):
        Event(**STAMP(1, 1), kind="start", text="", at=0, generation=0, data={"x": value})


@pytest.mark.parametrize("result", [{"x": "y" * 70_000}, {"x": math.nan}, {"x": [math.inf]}, {"x": object()}])
def test_a_result_is_bounded_json(result: Any) -> None:
    with pytest.raises(ValidationError):
        Response(**STAMP(1, 1), id="a", command="report", outcome="ok", result=result)


def test_every_figure_of_telemetry_says_what_it_is() -> None:
    own = {name: field.description for name, field in Telemetry.model_fields.items() if name not in ("v", *STAMP(1, 1))}
    assert all(own.values()) and all(row.help.endswith(".") for row in MEASURES)
    assert {row.path[0] for row in MEASURES} <= own.keys()


def test_messages_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        TELEMETRY.frames = 1  # type: ignore[misc]


def test_numbers_that_are_none() -> None:
    assert [finite(value) for value in (1, -0.5, math.inf, -math.inf, math.nan)] == [1.0, -0.5, None, None, None]


def test_each_process_start_has_its_own_session() -> None:
    assert len({new_session() for _ in range(100)}) == 100
    assert Status.model_validate(json.loads(UP[1].payload()) | {"session": new_session()}).boot == 3


def test_the_import_brings_pydantic_and_no_array_library() -> None:
    probe = "import sys, device.mqtt.topics; print({'numpy', 'torch', 'paho', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"
