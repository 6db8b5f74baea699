"""The AsyncAPI document: current, whole in itself, and true to the table of topics.

The text was validated once against AsyncAPI's own parser (npm: @asyncapi/parser), which no test needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from device.mqtt.asyncapi import document, dumped
from device.mqtt.messages import COMMANDS
from device.mqtt.topics import COMMAND, TOPICS

COMMITTED = Path(__file__).resolve().parents[3] / "docs" / "asyncapi.json"
DOCUMENT = document()
OPERATIONS: dict[str, Any] = DOCUMENT["operations"]


def test_the_committed_document_is_current() -> None:
    assert COMMITTED.read_text(encoding="utf-8") == dumped(), "regenerate: edgeear asyncapi > docs/asyncapi.json"


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def resolved(reference: str) -> Any:
    """What a JSON pointer of this document names. Raises KeyError where it names nothing."""
    here: Any = DOCUMENT
    for step in reference.removeprefix("#/").split("/"):
        here = here[step.replace("~1", "/").replace("~0", "~")]
    return here


def test_every_reference_resolves_within_the_document() -> None:
    found = set(references(DOCUMENT))
    assert len(found) > 60
    assert all(reference.startswith("#/") and resolved(reference) is not None for reference in found)


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_an_operation_has_its_channel_and_only_messages_of_it(name: str) -> None:
    operation = OPERATIONS[name]
    channel = operation["channel"]["$ref"]
    assert resolved(channel) in DOCUMENT["channels"].values()
    assert [entry["$ref"].rpartition("/messages/")[0] for entry in operation["messages"]] == [channel]
    assert name.startswith(operation["action"]) and operation["action"] in ("send", "receive")


def test_every_message_has_a_payload_that_forbids_what_it_does_not_name() -> None:
    for name, message in DOCUMENT["components"]["messages"].items():
        schema = resolved(message["payload"]["$ref"])
        assert name == "Frame" or schema["additionalProperties"] is False
        assert name == "Frame" or schema["properties"]["v"]["const"] == 1


def test_bindings_are_those_of_the_table() -> None:
    told = {
        resolved(operation["channel"]["$ref"])["address"].removeprefix("edgeear/v1/{site}/{device}/"): (
            "up" if operation["action"] == "send" else "down",
            operation["bindings"]["mqtt"]["qos"],
            operation["bindings"]["mqtt"]["retain"],
            operation["bindings"]["mqtt"].get("messageExpiryInterval"),
        )
        for operation in OPERATIONS.values()
    }
    expected = {row.name: (row.direction, row.qos, row.retain, row.expiry_s) for row in TOPICS}
    of_commands = expected.pop(COMMAND.name)
    assert told == expected | {f"command/{name}": of_commands for name in COMMANDS}


def test_every_address_declares_its_parameters() -> None:
    for name, channel in DOCUMENT["channels"].items():
        braced = [part[1:-1] for part in (channel["address"] or "").split("/") if part.startswith("{")]
        assert name == "reply" or braced == ["site", "device"] == list(channel["parameters"])


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_command_says_where_its_response_goes_and_what_ties_them(name: str) -> None:
    (operation,) = (entry for entry in OPERATIONS.values() if entry["channel"]["$ref"] == f"#/channels/command-{name}")
    reply = operation["reply"]
    assert resolved(reply["channel"]["$ref"])["address"] is None  # AsyncAPI: found at run time, from the reply address
    asked, answered = (resolved(resolved(entry["$ref"])["$ref"]) for entry in operation["messages"] + reply["messages"])
    assert answered["name"] == "Response" and asked["correlationId"] == answered["correlationId"]
    for holder, location in (
        (asked, reply["address"]["location"]),
        (asked, asked["correlationId"]["location"]),
        (answered, answered["correlationId"]["location"]),
    ):
        assert location.removeprefix("$message.header#/") in resolved(holder["headers"]["$ref"])["properties"]
