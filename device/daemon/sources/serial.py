"""A sensor front-end on a serial line or a TCP port; firmware_bridge.sensor speaks its protocol.

Rules of this file:

1. A port is a descriptor that is read when `select` reports it readable. Stopping the source ends every wait at once.
2. termios sets up the serial line: raw, 8 data bits, no parity, one stop bit, no flow control.
3. A line that hangs up and a peer that closes the connection raise `DeviceError`, so the source tries again.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from device.daemon.finding import Finding, Machine, ok, problem, reason
from device.daemon.section import checked
from device.daemon.sources.base import Feed, SourceSection, check_device
from device.daemon.sources.running import Stop
from device.images.decode import decode_bytes, fit_pixels, sent
from edgeear.errors import DeviceError, UsageError
from edgeear.types import U8
from firmware_bridge.sensor import Hello, HostEnd, Log, PixelFormat, SensorFrame, pixels

_READ = 64 << 10
_TCP = r"^tcp://([^\s/@:]{1,253}|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}$"
_TCP_TIMEOUT_S = 10.0
_log = logging.getLogger("edgeear.sensor")
Port = Callable[[], AbstractContextManager[int]]
"""Opens the port: a non-blocking descriptor while the context lasts. Raises `DeviceError` or `OSError`."""


class SerialSource(SourceSection):
    """A sensor on a serial line or a TCP port."""

    kind: Literal["serial"] = "serial"
    device: str | None = Field(
        None, min_length=1, coerce_numbers_to_str=True, description="the tty.", examples=["/dev/ttyACM0"]
    )
    baud: int = Field(115_200, ge=300, le=4_000_000, description="bits a second.")
    url: str | None = Field(
        None, pattern=_TCP, description="tcp://HOST:PORT instead of a tty.", examples=["tcp://sensor:7000"]
    )

    @model_validator(mode="after")
    def _has_one_port(self) -> Self:
        both = "both set" if self.device else "neither set"
        fault = f"device, url = ({both}): source.kind serial needs one of them; a tty or tcp://HOST:PORT"
        return checked(self, [fault] if (self.device is None) == (self.url is None) else [])

    def capture(self, feed: Feed) -> SensorFrames:
        return SensorFrames(tcp_port(self.url) if self.url else serial_port(self.device or "", self.baud), feed)

    def check(self, machine: Machine) -> Iterator[Finding]:
        if self.url is None:
            yield check_device("serial", Path(self.device or ""), "dialout")
            return
        try:
            machine.connect(*_address(self.url))
        except OSError as error:
            yield problem(f"{self.url}: {reason(error)}", "check its power, its network and source.url")
        else:
            yield ok(f"sensor at {self.url}")


@dataclass(frozen=True)
class SensorFrames:
    """Frames of the sensor behind `port`; `wall` is the time of day that is sent to the sensor."""

    port: Port
    feed: Feed
    wall: Callable[[], float] = time.time

    def run(self, stop: Stop) -> None:
        host = HostEnd()
        try:
            with self.port() as descriptor:
                _send(descriptor, host.greet(self.wall()))
                while not stop.is_set():
                    ready, _, _ = select.select([descriptor, stop.fileno()], [], [])
                    if descriptor in ready:
                        self._take(host, descriptor)
        except OSError as error:
            if isinstance(error, DeviceError):
                raise
            raise DeviceError(f"sensor: {error.strerror or error}; check cable, power and source settings") from error

    def _take(self, host: HostEnd, descriptor: int) -> None:
        data = os.read(descriptor, _READ)
        if not data:
            raise DeviceError("sensor: the connection was closed; check cable and power")
        before = host.counts
        for event in host.feed(data, self.feed.clock()):
            match event:
                case SensorFrame():
                    self._put(event)
                case Log():
                    _log.log(event.level, "sensor: %s", _printable(event.text))
                case Hello():
                    _log.info("sensor %s: %s, %d x %d", event.sensor, event.format.name, event.width, event.height)
        after = host.counts
        for _ in range(after.incomplete - before.incomplete):
            self.feed.sink.undecodable()
        if (after.unannounced, after.refused) != (before.unannounced, before.refused):  # another sensor?
            _send(descriptor, host.greet(self.wall()))

    def _put(self, frame: SensorFrame) -> None:
        def decoded(size: tuple[int, int]) -> U8:
            if frame.hello.format is PixelFormat.JPEG:
                return decode_bytes(frame.data, Path("sensor.jpg"), size, sent(size))
            return fit_pixels(pixels(frame), size)

        self.feed.put(decoded, frame.started, f"{frame.hello.sensor} {frame.number}")


def serial_port(tty: str, baud: int) -> Port:
    """The serial line `tty`. Raises `UsageError` for a speed that this system does not know."""
    speed = getattr(termios, f"B{baud}", None)
    if speed is None:
        known = sorted(int(name[1:]) for name in dir(termios) if name.startswith("B") and name[1:].isdigit())
        raise UsageError(f"source.baud = {baud}: no such speed; use one of {', '.join(map(str, known[1:]))}")

    @contextmanager
    def opened() -> Iterator[int]:
        descriptor = os.open(tty, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            try:
                _, _, cflag, _, _, _, control = termios.tcgetattr(descriptor)
                cflag &= ~(termios.CSIZE | termios.PARENB | termios.CSTOPB | termios.CRTSCTS)
                cflag |= termios.CS8 | termios.CREAD | termios.CLOCAL
                control[termios.VMIN], control[termios.VTIME] = 1, 0
                termios.tcsetattr(descriptor, termios.TCSANOW, [0, 0, cflag, 0, speed, speed, control])
                termios.tcflush(descriptor, termios.TCIOFLUSH)
            except termios.error as error:
                raise DeviceError(f"{tty}: {error.args[-1]}; source.device must be a serial line") from error
            yield descriptor
        finally:
            os.close(descriptor)

    return opened


def tcp_port(url: str) -> Port:
    """The TCP port of `tcp://HOST:PORT`. Keep-alive probes detect a peer that vanished."""

    @contextmanager
    def opened() -> Iterator[int]:
        with socket.create_connection(_address(url), _TCP_TIMEOUT_S) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
            connection.setblocking(False)
            yield connection.fileno()

    return opened


def _address(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), int(port)


def _send(descriptor: int, data: bytes) -> None:
    """Write a greeting of a few bytes; if the line is full, drop it: the next one will do."""
    try:
        os.write(descriptor, data)
    except BlockingIOError:
        _log.debug("the sensor accepts no data now")


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "\ufffd" for char in text)
