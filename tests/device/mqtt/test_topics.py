"""Topics: the table is whole, names are safe, what is built is matched, and nobody is made to send commands."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.mqtt.messages import COMMANDS, Label
from device.mqtt.topics import (
    COMMAND,
    FRAME,
    RESPONSE,
    STATUS,
    TOPICS,
    Address,
    Topic,
    match,
    may_respond,
    prefix,
    subscriptions,
    topic_of,
)
from edgeear.errors import UsageError

names = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)


def test_the_table() -> None:
    rows = {row.name: (row.direction, row.qos, row.retain, row.cls) for row in TOPICS}
    assert rows == {
        "status": ("up", 1, True, None),
        "telemetry": ("up", 1, False, "telemetry"),
        "event": ("up", 1, False, "event"),
        "response": ("up", 1, False, "response"),
        "prediction": ("up", 0, False, None),
        "label-request": ("up", 1, False, "frame"),
        "command/{name}": ("down", 1, False, None),
        "frame": ("down", 0, False, None),
    }


def test_what_is_delivered_again_after_a_loss_expires_and_what_is_retained_does_not() -> None:
    assert [row.name for row in TOPICS if row.expiry_s is None] == ["status", "command/{name}"]
    assert [row.name for row in TOPICS if row.retain] == ["status"]
    assert {row.name for row in TOPICS if row.content_type == "image/jpeg"} == {"frame"}


@given(names, names, st.sampled_from([row for row in TOPICS if row is not COMMAND]))
def test_a_built_topic_is_matched(site: str, device: str, row: Topic) -> None:
    assert match(topic_of(site, device, row)) == Address(site, device, row)


@given(names, names, st.sampled_from(sorted(COMMANDS)))
def test_a_built_command_is_matched(site: str, device: str, command: str) -> None:
    assert match(topic_of(site, device, COMMAND, command)) == Address(site, device, COMMAND, command)


def test_an_unknown_command_is_matched_so_that_it_can_be_refused() -> None:
    assert match("edgeear/v1/hall/cam/command/reboot") == Address("hall", "cam", COMMAND, "reboot")


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "edgeear/v1",
        "edgeear/v1/",
        "edgeear/v1/hall",
        "edgeear/v1/hall/cam",
        "edgeear/v1/hall/cam/",
        "edgeear/v1/hall/cam/status/",
        "edgeear/v1/hall/cam/status/more",
        "edgeear/v1/hall//status",
        "edgeear/v1//cam/status",
        "edgeear/v1/ha ll/cam/status",
        "edgeear/v1/hall/cam/command/a/b",
        "edgeear/v1/hall/cam/command/{name}/x",
        "edgeear/v2/hall/cam/status",
        "other/v1/hall/cam/status",
        "edgeear/v1/hall/cam/unknown",
        "edgeear/v1/hall/cam/command/" + "x" * 1000,
    ],
)
def test_other_topics_match_nothing(topic: str) -> None:
    assert match(topic) is None


@given(st.text() | st.text("edgvar1/+#hl", max_size=40).map(lambda rest: f"edgeear/v1/{rest}"))
def test_any_topic_gets_an_answer(topic: str) -> None:
    address = match(topic)
    assert address is None or topic.startswith(prefix(address.site, address.device))


def test_a_board_subscribes_to_what_goes_down_to_it() -> None:
    expected = (("edgeear/v1/hall/cam/command/+", 1), ("edgeear/v1/hall/cam/frame", 0))
    assert subscriptions("hall", "cam") == expected


@pytest.mark.parametrize("name", ["", "a/b", "+", "#", "a b", "ä", "a\n", "x" * 65, "x" * 5000])
def test_a_name_that_no_topic_may_hold(name: str) -> None:
    with pytest.raises(UsageError, match=r"site .* 1 to 64 of A-Z a-z 0-9 _ -.*: rename it") as caught:
        prefix(name, "cam")
    assert len(str(caught.value)) < 200
    with pytest.raises(UsageError, match="device "):
        topic_of("hall", name, STATUS)


@pytest.mark.parametrize("command", [None, "reboot", "", "#"])
def test_a_command_topic_needs_a_command(command: str | None) -> None:
    with pytest.raises(UsageError, match="choose one of infer, label"):
        topic_of("hall", "cam", COMMAND, command)


@pytest.mark.parametrize(
    ("topic", "honoured"),
    [
        ("edgeear/v1/hall/cam/response", True),
        ("edgeear/v1/hall/cam/response/op-1", True),
        ("edgeear/v1/hall/cam/response/", False),
        ("edgeear/v1/hall/cam/responses", False),
        ("edgeear/v1/hall/other/response", False),
        ("edgeear/v1/hall/replies", False),
        ("edgeear/v1/hall/other/command/rollback", False),
        ("edgeear/v1/hall/cam/status", False),
        ("edgeear/v1/hall/cam/frame", False),
        ("edgeear/v1/yard/cam/response", False),
        ("edgeear/v1/hallway/x", False),
        ("edgeear/v1/hall/", False),
        ("edgeear/v1/hall/cam/response/+", False),
        ("edgeear/v1/hall/cam/response/#", False),
        ("edgeear/v1/hall/cam/response/a\x00", False),
        ("homeassistant/status", False),
        ("edgeear/v1/hall/cam/response/" + "x" * 600, False),
        ("", False),
    ],
)
def test_where_a_response_may_go(topic: str, honoured: bool) -> None:
    assert may_respond("hall", "cam", topic) == honoured


def test_rows_name_their_payloads() -> None:
    assert (
        Label in COMMAND.models and FRAME.models == () and [model.__name__ for model in RESPONSE.models] == ["Response"]
    )
