"""Home Assistant's MQTT discovery: one retained message announces a board with its sensors and buttons.

Rules of this file:

1. Device-based discovery (Home Assistant 2024.11 and later): topic `homeassistant/device/{site}/{device}/config`, all
   components in one payload. An empty retained payload on the same topic removes the device.
2. Sensors are those of the table of measures (measures.py). A template gives `None`, which Home Assistant shows as
   unknown, where the board did not measure.
3. While the board's status is offline, all are unavailable except the connectivity sensor.
4. A button sends an ordinary command. Its id is made of the time of the press.

Source: Home Assistant's documentation of the MQTT integration (home-assistant.io/integrations/mqtt).
"""

from __future__ import annotations

import json
from typing import Any, Final

from device.mqtt.messages import MEASURES, Quantiles, Telemetry
from device.mqtt.topics import COMMAND, STATUS, TELEMETRY, prefix, topic_of

DISCOVERY: Final = "homeassistant"
PRESSED: Final = '"id": "ha-{{ (now().timestamp() * 1000) | int }}"'
Component = dict[str, Any]

_BUTTONS: Final = {"rollback": ("Roll back", "mdi:undo-variant"), "confirm": ("Confirm", "mdi:check-decagram-outline")}


def discovery_topic(site: str, device: str) -> str:
    """Where the retained discovery payload goes. Raises UsageError for a name that no topic may hold."""
    prefix(site, device)
    return f"{DISCOVERY}/device/{site}/{device}/config"


def discovery(site: str, device: str, version: str, encoder: str, telemetry_period_s: float = 60.0) -> dict[str, Any]:
    """The discovery payload. A sensor becomes unknown after three telemetry windows without a message."""
    identity = f"edgeear/{site}/{device}"
    available = {"topic": topic_of(site, device, STATUS), "value_template": "{{ value_json.state }}"}
    telemetry = topic_of(site, device, TELEMETRY)
    components = _sensors(telemetry, int(3 * telemetry_period_s) + 1) | _controls(site, device)
    for component in components.values():
        component["availability"] = [available]
    components["connectivity"] = {
        "platform": "binary_sensor",
        "name": "Connection",
        "device_class": "connectivity",
        "entity_category": "diagnostic",
        "state_topic": available["topic"],
        "value_template": available["value_template"],
        "payload_on": "online",
        "payload_off": "offline",
    }
    return {
        "device": {
            "identifiers": [identity],
            "name": device,
            "manufacturer": "edgeear",
            "model": encoder,
            "sw_version": version,
            "suggested_area": site,
        },
        "origin": {"name": "edgeear", "sw_version": version},
        "qos": 1,
        "components": {key: {**component, "unique_id": f"{identity}/{key}"} for key, component in components.items()},
    }


def discovery_payload(site: str, device: str, version: str, encoder: str, telemetry_period_s: float = 60.0) -> bytes:
    """`discovery` as it goes over the wire."""
    return json.dumps(discovery(site, device, version, encoder, telemetry_period_s), ensure_ascii=False).encode()


def _sensors(topic: str, expire_after_s: int) -> dict[str, Component]:
    components = {}
    for row in MEASURES:
        if (sensor := row.measure.sensor) is None:
            continue
        shown = ".".join(("value_json", *row.path))
        if Telemetry.model_fields[row.path[0]].annotation == Quantiles | None:
            shown = f"{shown}.p90 | round({sensor.digits}) if {shown} else None"
        options = {
            "platform": "sensor",
            "name": sensor.name,
            "state_topic": topic,
            "value_template": f"{{{{ {shown} }}}}",
            "expire_after": expire_after_s,
            "state_class": "measurement" if sensor.measured else None,
            "unit_of_measurement": sensor.unit,
            "device_class": sensor.device_class,
            "icon": sensor.icon,
            "entity_category": "diagnostic" if sensor.diagnostic else None,
        }
        components[sensor.key] = {name: value for name, value in options.items() if value is not None}
    return components


def _controls(site: str, device: str) -> dict[str, Component]:
    controls: dict[str, Component] = {
        key: {
            "platform": "button",
            "name": name,
            "icon": icon,
            "command_topic": topic_of(site, device, COMMAND, key),
            "command_template": f"{{{PRESSED}}}",
        }
        for key, (name, icon) in _BUTTONS.items()
    }
    controls["pause"] = {
        "platform": "switch",
        "name": "Learning paused",
        "icon": "mdi:pause-octagon-outline",
        "state_topic": topic_of(site, device, TELEMETRY),
        "value_template": "{{ value_json.paused | tojson }}",
        "state_on": "true",
        "state_off": "false",
        "payload_on": "true",
        "payload_off": "false",
        "command_topic": topic_of(site, device, COMMAND, "pause"),
        "command_template": f'{{{PRESSED}, "paused": {{{{ value }}}}}}',
    }
    return controls
