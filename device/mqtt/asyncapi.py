"""The AsyncAPI 3.0 document of a board's topics, made from the table of topics and the models of the payloads.

Rules of this file:

1. Topics, QoS, retain and expiry come from topics.py, payloads and texts of commands from messages.py.
2. The document takes the board's side: it sends what goes up and receives what goes down.
3. docs/asyncapi.json is `dumped()`; a test compares them.

Source: the AsyncAPI 3.0.0 specification and its MQTT binding 0.2.0. A reply whose address is known only at run time
needs a channel without an address. Where a command names no response topic, the channel `response` is used.
"""

from __future__ import annotations

import json
from typing import Any, Final, NamedTuple

from pydantic.json_schema import models_json_schema

from device.mqtt.messages import PROTOCOL, VERSION, Command
from device.mqtt.topics import COMMAND, RESPONSE, STATUS, TOPICS, Topic

BINDING: Final = "0.2.0"
SCHEMAS: Final = "#/components/schemas/"
MESSAGES: Final = "#/components/messages/"
CORRELATION: Final = {"location": "$message.header#/correlationData"}
Object = dict[str, Any]


class _Entry(NamedTuple):
    """One kind of message: the row of its topic, its `name`, its `address` below the board's prefix, its help."""

    row: Topic
    name: str
    address: str
    about: str

    @property
    def channel(self) -> str:
        return self.address.replace("/", "-")


def _entry(row: Topic, model: type[Any] | None) -> _Entry:
    if model is None:
        return _Entry(row, row.name.capitalize(), row.name, row.about)
    if issubclass(model, Command):
        return _Entry(row, model.__name__, f"command/{model.name}", model.help())
    return _Entry(row, model.__name__, row.name, row.about)


ENTRIES: Final = tuple(_entry(row, model) for row in TOPICS for model in row.models or (None,))


def document() -> Object:
    """The whole document, as JSON values."""
    names = "1 to 64 of `A-Z a-z 0-9 _ -`."
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "edgeear board",
            "version": f"{VERSION}.0.0",
            "description": "What an edge board publishes over MQTT, and the commands that it takes. Payloads are JSON "
            "objects; unknown fields are refused. `(boot, seq)` orders a board's messages and marks repeated ones.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": _servers(),
        "channels": _channels(),
        "operations": dict(map(_operation, ENTRIES)),
        "components": {
            "messages": {entry.name: _message(entry) for entry in ENTRIES},
            "schemas": _schemas(),
            "parameters": {
                "site": {"description": f"Where: {names}"},
                "device": {"description": f"Which board: {names}"},
            },
            "securitySchemes": {"certificate": {"type": "X509"}, "password": {"type": "userPassword"}},
        },
    }


def dumped() -> str:
    """The text of docs/asyncapi.json, its last line break included."""
    return json.dumps(document(), indent=2, ensure_ascii=False) + "\n"


def _servers() -> Object:
    will = {
        "topic": f"{PROTOCOL}/{{site}}/{{device}}/{STATUS.name}",
        "qos": STATUS.qos,
        "retain": STATUS.retain,
        "message": "Status with state offline.",
    }
    bindings = {"mqtt": {"cleanSession": False, "lastWill": will, "bindingVersion": BINDING}}
    rows = {
        "tls": ("secure-mqtt", "5", "8883", "certificate", "A certificate for each board and operator."),
        "plain": ("mqtt", "5", "1883", "password", "Within one machine or a closed network."),
        "mqtt3": (
            "mqtt",
            "3.1.1",
            "1883",
            "password",
            "Without properties: responses go to `response`, `id` tells them apart.",
        ),
    }
    return {
        name: {
            "host": "{host}:{port}",
            "protocol": protocol,
            "protocolVersion": version,
            "description": about,
            "variables": {"host": {"default": "localhost"}, "port": {"default": port}},
            "security": [{"$ref": f"#/components/securitySchemes/{security}"}],
            "bindings": bindings,
        }
        for name, (protocol, version, port, security, about) in rows.items()
    }


def _channels() -> Object:
    channels: Object = {
        entry.channel: {
            "address": f"{PROTOCOL}/{{site}}/{{device}}/{entry.address}",
            "description": entry.about,
            "messages": {entry.name: {"$ref": MESSAGES + entry.name}},
            "parameters": {name: {"$ref": f"#/components/parameters/{name}"} for name in ("site", "device")},
        }
        for entry in ENTRIES
    }
    channels["reply"] = {
        "address": None,
        "description": f"The response topic a command names, below `{PROTOCOL}/{{site}}/`; else `response` serves.",
        "messages": {"Response": {"$ref": MESSAGES + "Response"}},
    }
    return channels


def _operation(entry: _Entry) -> tuple[str, Object]:
    row, channel = entry.row, f"#/channels/{entry.channel}"
    binding: Object = {"qos": row.qos, "retain": row.retain}
    if row.expiry_s is not None:
        binding["messageExpiryInterval"] = row.expiry_s
    operation: Object = {
        "action": "send" if row.direction == "up" else "receive",
        "channel": {"$ref": channel},
        "summary": entry.about,
        "messages": [{"$ref": f"{channel}/messages/{entry.name}"}],
        "bindings": {"mqtt": {**binding, "bindingVersion": BINDING}},
    }
    if row is COMMAND:
        operation["reply"] = {
            "address": {"location": "$message.header#/responseTopic", "description": "MQTT 5 response topic."},
            "channel": {"$ref": "#/channels/reply"},
            "messages": [{"$ref": "#/channels/reply/messages/Response"}],
        }
    return f"{operation['action']}{entry.name}", operation


def _message(entry: _Entry) -> Object:
    message: Object = {"name": entry.name, "title": entry.about, "contentType": entry.row.content_type}
    if entry.row in (COMMAND, RESPONSE):
        kind = "Command" if entry.row is COMMAND else "Response"
        message |= {"headers": {"$ref": f"{SCHEMAS}{kind}Properties"}, "correlationId": CORRELATION}
    return message | {"payload": {"$ref": SCHEMAS + entry.name}}


def _schemas() -> Object:
    correlation = {"type": "string", "description": "MQTT 5 correlation data: comes back unchanged in the response."}
    response_topic = {"type": "string", "description": "MQTT 5 response topic, below the board's own site."}
    expiry = {"type": "integer", "minimum": 0, "description": "MQTT 5 message expiry, seconds; `expires` serves too."}
    wanted = [
        (model, "serialization" if row.direction == "up" else "validation") for row in TOPICS for model in row.models
    ]
    _, definitions = models_json_schema(wanted, ref_template=SCHEMAS + "{model}")  # type: ignore[arg-type]
    return {
        **definitions["$defs"],
        "Frame": {"type": "string", "format": "binary", "description": "The bytes of a JPEG or PNG file."},
        "CommandProperties": {
            "type": "object",
            "properties": {
                "responseTopic": response_topic,
                "correlationData": correlation,
                "messageExpiryInterval": expiry,
            },
        },
        "ResponseProperties": {"type": "object", "properties": {"correlationData": correlation}},
    }
