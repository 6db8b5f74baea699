"""The commands that the operator sends to every device of a fleet while frames are shown, and the expected answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from device.daemon.loop import Daemon
from device.encoder.engine import OrtEngine
from device.simulation.fleet.data import Picture, png
from device.simulation.fleet.operator import FleetOperator
from edgeear.flow import infer
from edgeear.shift import ShiftState
from edgeear.system import System
from edgeear.types import Encoder

PROBATION = 33
"""The value that `set-policy` sets and the last report must hold."""
STAGGER = 10
"""Rounds over which one command of the script is spread among the devices."""


@dataclass
class Device:
    """One daemon and what it is shown: `pictures` of its `home` domain, from midway those `elsewhere`, of its `target`.
    `cpu_s`: CPU seconds of its turns without the encoder."""

    name: str
    daemon: Daemon
    pictures: Iterator[Picture]
    elsewhere: Iterator[Picture]
    home: str
    target: str
    shown: list[Picture] = field(default_factory=list)
    cpu_s: float = 0.0

    @property
    def moves(self) -> bool:
        return self.home != self.target


Ask = Callable[[FleetOperator, Device], None]


def script(samples: int, one: Picture, system: System, encoder: Encoder) -> dict[int, list[Ask]]:
    """The commands that every device gets, by the round in which they are sent, all before midway; `one` is the
    picture of the `infer` command."""
    prediction, _, _ = infer(system, OrtEngine(encoder), ShiftState(), one.frame)
    image, said = png(one.frame), {"label": prediction.label, "route": prediction.route}

    def report(operator: FleetOperator, device: Device) -> None:
        operator.ask(device.name, "report", {}, facts={"session": device.daemon.session}, own_topic=False)

    def look(operator: FleetOperator, device: Device) -> None:
        operator.ask(device.name, "infer", {"image": image}, facts=said)

    def pause(operator: FleetOperator, device: Device) -> None:
        operator.ask(device.name, "pause", {"paused": True}, facts={"paused": True})

    def resume(operator: FleetOperator, device: Device) -> None:
        operator.ask(device.name, "pause", {"paused": False}, facts={"paused": False})

    def malformed(operator: FleetOperator, device: Device) -> None:
        operator.ask(device.name, "pause", {"paused": "perhaps"}, "refused")

    def expired(operator: FleetOperator, device: Device) -> None:
        operator.ask(device.name, "pause", {"paused": True, "expires": 1.0}, "refused")

    def settings(operator: FleetOperator, device: Device) -> None:
        operator.ask(device.name, "set-policy", {"probation": PROBATION})

    asks: tuple[Ask, ...] = (report, look, pause, resume, malformed, expired, settings)
    room = max(len(asks), samples - STAGGER)
    return {room * k // len(asks): [ask] for k, ask in enumerate(asks)}
