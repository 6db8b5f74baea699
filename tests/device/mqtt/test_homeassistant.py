"""Home Assistant discovery: its templates read what boards really send, and its buttons send what boards understand."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import jinja2
import pytest

from device.mqtt.homeassistant import discovery, discovery_payload, discovery_topic
from device.mqtt.messages import Confirm, Message, Pause, Quantiles, Rollback, Status, parse_command
from device.mqtt.topics import COMMAND, match
from edgeear.errors import UsageError
from tests.device.mqtt.test_messages import TELEMETRY

STATUS = Status(state="online", session="0" * 16, boot=1, time=1.0, version="0.5.0", encoder="lite0", generation=0)
MEASURED = TELEMETRY.model_copy(
    update={"latency_ms": Quantiles(p50=5.0, p90=6.257, p99=9.0), "temperature_c": 51.5, "paused": True}
)
UNMEASURED = TELEMETRY.model_copy(update={"novelty": None, "latency_ms": None})
PAYLOAD = discovery("hall", "cam-1", "0.5.0", "lite0", telemetry_period_s=30.0)
COMPONENTS: dict[str, dict[str, Any]] = PAYLOAD["components"]
# Of the documentation of sensor.mqtt, binary_sensor.mqtt, button.mqtt and switch.mqtt.
COMMON = {"platform", "name", "unique_id", "icon", "availability", "entity_category", "device_class"}
OPTIONS = {
    "sensor": COMMON | {"state_topic", "value_template", "expire_after", "state_class", "unit_of_measurement"},
    "binary_sensor": COMMON | {"state_topic", "value_template", "payload_on", "payload_off"},
    "button": COMMON | {"command_topic", "command_template"},
    "switch": COMMON
    | {"state_topic", "value_template", "state_on", "state_off"}
    | {"command_topic", "command_template", "payload_on", "payload_off"},
}


def rendered(template: str, message: Message | None = None, **variables: object) -> str:
    """As Home Assistant does it, but an unknown field is an error here."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    environment.globals["now"] = lambda: datetime.fromtimestamp(1_700_000_000.25, UTC)
    value_json = json.loads(message.payload()) if message is not None else None
    return environment.from_string(template).render(value_json=value_json, **variables)


def sender(topic: str, telemetry: Message) -> Message:
    """The message that a state topic brings."""
    address = match(topic)
    assert address is not None and (address.site, address.device) == ("hall", "cam-1")
    return {"telemetry": telemetry, "status": STATUS}[address.topic.name]


def states(telemetry: Message) -> dict[str, str]:
    return {
        key: rendered(component["value_template"], sender(component["state_topic"], telemetry))
        for key, component in COMPONENTS.items()
        if "state_topic" in component
    }


def test_templates_show_what_was_measured() -> None:
    assert states(MEASURED) == {
        "novelty": "0.2",
        "latency": "6.26",
        "frames": "600",
        "ood": "5",
        "phase": "serving",
        "generation": "4",
        "outbox": "3",
        "temperature": "51.5",
        "pause": "true",
        "connectivity": "online",
    }


def test_what_was_not_measured_is_none_which_home_assistant_shows_as_unknown() -> None:
    shown = states(UNMEASURED)
    assert [shown[key] for key in ("novelty", "latency", "temperature", "pause")] == ["None", "None", "None", "false"]


@pytest.mark.parametrize("key", sorted(COMPONENTS))
def test_a_component_has_only_options_that_its_platform_documents(key: str) -> None:
    component = COMPONENTS[key]
    assert set(component) <= OPTIONS[component["platform"]]
    assert component["unique_id"] == f"edgeear/hall/cam-1/{key}"


def test_everything_but_the_connection_is_unavailable_while_the_board_is_offline() -> None:
    offline = STATUS.model_copy(update={"state": "offline"})
    assert [key for key, component in COMPONENTS.items() if "availability" not in component] == ["connectivity"]
    for component in COMPONENTS.values():
        for available in component.get("availability", []):
            assert rendered(available["value_template"], sender(available["topic"], TELEMETRY)) == "online"
            assert rendered(available["value_template"], offline) == "offline"
    assert COMPONENTS["connectivity"]["payload_off"] == rendered(COMPONENTS["connectivity"]["value_template"], offline)


def test_buttons_and_the_switch_send_commands_that_a_board_takes() -> None:
    sent = {}
    for key, component in COMPONENTS.items():
        if "command_topic" in component:
            address = match(component["command_topic"])
            assert address is not None and address.topic is COMMAND and address.command is not None
            for value in (component.get("payload_on", "PRESS"), component.get("payload_off", "PRESS")):
                payload = rendered(component["command_template"], value=value).encode()
                sent[key, value] = parse_command(address.command, payload)
    identity = "ha-1700000000250"
    assert sent == {
        ("rollback", "PRESS"): Rollback(id=identity),
        ("confirm", "PRESS"): Confirm(id=identity),
        ("pause", "true"): Pause(id=identity, paused=True),
        ("pause", "false"): Pause(id=identity, paused=False),
    }


def test_sensors_turn_unknown_after_three_windows_without_telemetry() -> None:
    assert {c["expire_after"] for c in COMPONENTS.values() if c["platform"] == "sensor"} == {91}


def test_the_topic_is_one_that_home_assistant_listens_to() -> None:
    assert discovery_topic("hall", "cam-1") == "homeassistant/device/hall/cam-1/config"
    with pytest.raises(UsageError, match="device 'a/b'"):
        discovery_topic("hall", "a/b")


def test_the_payload_is_the_discovery_as_json() -> None:
    payload = discovery_payload("hall", "cam-1", "0.5.0", "lite0", 30.0)
    assert json.loads(payload) == PAYLOAD
    assert PAYLOAD["device"]["identifiers"] == ["edgeear/hall/cam-1"] and PAYLOAD["origin"]["name"] == "edgeear"
