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
from typing import Any, Final

from pydantic.json_schema import models_json_schema

from device.mqtt.messages import PROTOCOL, VERSION, Command, Message, Response
from device.mqtt.topics import COMMAND, STATUS, TOPICS, Topic

BINDING: Final = "0.2.0"
SCHEMAS: Final = "#/components/schemas/"
MESSAGES: Final = "#/components/messages/"
CORRELATION: Final = {"location": "$message.header#/correlationData"}
Object = dict[str, Any]


def document() -> Object:
    """The whole document, as JSON values."""
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
        "operations": dict(_operation(row, model) for row in TOPICS for model in _models(row)),
        "components": {
            "messages": _messages(),
            "schemas": _schemas(),
            "parameters": _parameters(),
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

    def server(protocol: str, version: str, port: str, security: str, about: str) -> Object:
        return {
            "host": "{host}:{port}",
            "protocol": protocol,
            "protocolVersion": version,
            "description": about,
            "variables": {"host": {"default": "localhost"}, "port": {"default": port}},
            "security": [{"$ref": f"#/components/securitySchemes/{security}"}],
            "bindings": bindings,
        }

    return {
        "tls": server("secure-mqtt", "5", "8883", "certificate", "A certificate for each board and operator."),
        "plain": server("mqtt", "5", "1883", "password", "Within one machine or a closed network."),
        "mqtt3": server(
            "mqtt",
            "3.1.1",
            "1883",
            "password",
            "Without properties: responses go to `response`, `id` tells them apart.",
        ),
    }


def _parameters() -> Object:
    names = "1 to 64 of `A-Z a-z 0-9 _ -`."
    return {"site": {"description": f"Where: {names}"}, "device": {"description": f"Which board: {names}"}}


def _models(row: Topic) -> tuple[type[Message] | None, ...]:
    return row.models or (None,)


def _key(row: Topic, model: type[Message] | None) -> str:
    """The name of the message and, with its action in front, of the operation."""
    return model.__name__ if model is not None else row.name.capitalize()


def _channel_id(row: Topic, model: type[Message] | None) -> str:
    return _address(row, model).replace("/", "-")


def _address(row: Topic, model: type[Message] | None) -> str:
    return f"command/{model.name}" if model is not None and issubclass(model, Command) else row.name


def _about(row: Topic, model: type[Message] | None) -> str:
    return model.help() if model is not None and issubclass(model, Command) else row.about


def _channels() -> Object:
    channels: Object = {}
    for row in TOPICS:
        for model in _models(row):
            key = _key(row, model)
            channels[_channel_id(row, model)] = {
                "address": f"{PROTOCOL}/{{site}}/{{device}}/{_address(row, model)}",
                "description": _about(row, model),
                "messages": {key: {"$ref": MESSAGES + key}},
                "parameters": {name: {"$ref": f"#/components/parameters/{name}"} for name in ("site", "device")},
            }
    channels["reply"] = {
        "address": None,
        "description": f"The response topic a command names, below `{PROTOCOL}/{{site}}/`; else `response` serves.",
        "messages": {"Response": {"$ref": MESSAGES + "Response"}},
    }
    return channels


def _operation(row: Topic, model: type[Message] | None) -> tuple[str, Object]:
    key, channel = _key(row, model), f"#/channels/{_channel_id(row, model)}"
    binding: Object = {"qos": row.qos, "retain": row.retain}
    if row.expiry_s is not None:
        binding["messageExpiryInterval"] = row.expiry_s
    operation: Object = {
        "action": "send" if row.direction == "up" else "receive",
        "channel": {"$ref": channel},
        "summary": _about(row, model),
        "messages": [{"$ref": f"{channel}/messages/{key}"}],
        "bindings": {"mqtt": {**binding, "bindingVersion": BINDING}},
    }
    if row is COMMAND:
        operation["reply"] = {
            "address": {"location": "$message.header#/responseTopic", "description": "MQTT 5 response topic."},
            "channel": {"$ref": "#/channels/reply"},
            "messages": [{"$ref": "#/channels/reply/messages/Response"}],
        }
    return f"{operation['action']}{key}", operation


def _messages() -> Object:
    messages: Object = {}
    for row in TOPICS:
        for model in _models(row):
            key = _key(row, model)
            message: Object = {"name": key, "title": _about(row, model), "contentType": row.content_type}
            if row is COMMAND:
                message |= {"headers": {"$ref": f"{SCHEMAS}CommandProperties"}, "correlationId": CORRELATION}
            if model is Response:
                message |= {"headers": {"$ref": f"{SCHEMAS}ResponseProperties"}, "correlationId": CORRELATION}
            message["payload"] = {"$ref": SCHEMAS + key}
            messages[key] = message
    return messages


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
