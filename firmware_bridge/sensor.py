"""The protocol of the sensor link: a microcontroller announces itself and delivers frames. Both ends, without a port.

    type  from    payload
    1     sensor  Hello: format u8 (1 rgb888, 2 gray8, 3 jpeg) | width u16 | height u16 | sensor id, 1..32 bytes
    2     sensor  chunk of a frame: number u32 | total bytes u32 | CRC-32 of the frame u32 | offset u32 | 1..4080 bytes
    3     sensor  Log: level u8 (10 debug, 20 info, 30 warning, 40 error) | text, UTF-8, at most 1024 bytes
    4     host    Time: microseconds since the epoch u64

Rules of this file:

1. The host sends Time when it opens the link, and again while frames come before any Hello or do not match it. A sensor
   answers Time with Hello, and also sends Hello when it starts.
2. A frame is built from chunks of the same number, total and CRC, in order; a repeated chunk is ignored. At the
   first gap, or when another frame begins, the unfinished frame is dropped and counted.
3. A frame is returned once, complete, and only if its CRC-32 is right. Raw formats have exactly width x height x
   channels bytes.
4. Hello resets the state. Data from the peer never raises; packets that break these rules are counted as `refused`.
5. At most one unfinished frame is in memory, at most `MAX_FRAME_BYTES`, and only its received bytes.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from edgeear.errors import FormatError, UsageError
from edgeear.types import U8
from firmware_bridge.framing import MAX_PAYLOAD, Deframer, FramingCounts, Packet, encode_packet

MAX_FRAME_BYTES = 8 << 20
MAX_SIDE = 4096
MAX_LOG_BYTES = 1024
_HELLO, _CHUNK, _LOG, _TIME = struct.Struct("<BHH"), struct.Struct("<IIII"), struct.Struct("<B"), struct.Struct("<Q")
CHUNK_BYTES = MAX_PAYLOAD - _CHUNK.size


class Kind(IntEnum):
    """Types of packets."""

    HELLO = 1
    CHUNK = 2
    LOG = 3
    TIME = 4


class PixelFormat(IntEnum):
    """The format of a frame's bytes."""

    RGB888 = 1
    GRAY8 = 2
    JPEG = 3


_CHANNELS = {PixelFormat.RGB888: 3, PixelFormat.GRAY8: 1}


@dataclass(frozen=True)
class Hello:
    """The sensor's name and the form of its frames. Raises `UsageError` for values out of range."""

    sensor: str
    format: PixelFormat
    width: int
    height: int

    def __post_init__(self) -> None:
        if not 1 <= len(self.sensor.encode()) <= 32 or not self.sensor.isprintable():
            raise UsageError(f"sensor id {self.sensor!r}: 1 to 32 printable bytes of UTF-8; shorten it")
        if not (1 <= self.width <= MAX_SIDE and 1 <= self.height <= MAX_SIDE):
            raise UsageError(f"frames of {self.width} x {self.height}: both sides must be 1 to {MAX_SIDE}")
        if (size := self.raw_bytes) is not None and size > MAX_FRAME_BYTES:
            raise UsageError(f"frames of {size} bytes: at most {MAX_FRAME_BYTES}; send jpeg or smaller frames")

    @property
    def raw_bytes(self) -> int | None:
        """Bytes of every frame; None if the format is compressed."""
        channels = _CHANNELS.get(self.format)
        return None if channels is None else self.width * self.height * channels


@dataclass(frozen=True)
class SensorFrame:
    """A complete frame. `started`: when its first chunk came, so the frame is at least that old."""

    number: int
    hello: Hello
    data: bytes
    started: float


@dataclass(frozen=True)
class Log:
    """A log line of the firmware; levels as in `logging`."""

    level: int
    text: str


@dataclass(frozen=True)
class Time:
    """The host's time in seconds since the epoch."""

    seconds: float


@dataclass(frozen=True)
class LinkCounts:
    """`framing`: of the packets; `incomplete` frames dropped at a gap, `refused` packets that broke a rule, `unknown`
    packets of a type that this version does not know, `unannounced` chunks before any Hello."""

    framing: FramingCounts
    frames: int = 0
    incomplete: int = 0
    refused: int = 0
    unknown: int = 0
    unannounced: int = 0


SensorEvent = Hello | SensorFrame | Log


def pixels(frame: SensorFrame) -> U8:
    """A raw frame as `(height, width, 3)` uint8 or, gray, `(height, width)`. Raises `UsageError` for jpeg."""
    channels = _CHANNELS.get(frame.hello.format)
    if channels is None:
        raise UsageError("a jpeg frame has no raw pixels: decode its data")
    shape = (frame.hello.height, frame.hello.width, channels)[: 2 if channels == 1 else 3]
    return np.frombuffer(frame.data, np.uint8).reshape(shape)


@dataclass
class _Partial:
    """An unfinished frame: number, size and CRC of all its chunks, and the bytes received."""

    key: tuple[int, int, int]
    started: float
    data: bytearray


class HostEnd:
    """The host's end: `feed` it the bytes from the port, and send what `greet` returns."""

    def __init__(self) -> None:
        self._deframer, self._sequence = Deframer(), 0
        self._hello: Hello | None = None
        self._partial: _Partial | None = None
        self._finished: tuple[int, int, int] | None = None
        self._abandoned: tuple[int, int, int] | None = None
        self._frames = self._incomplete = self._refused = self._unknown = self._unannounced = 0

    @property
    def hello(self) -> Hello | None:
        """The sensor at the other end, None before its Hello."""
        return self._hello

    @property
    def counts(self) -> LinkCounts:
        return LinkCounts(
            self._deframer.counts, self._frames, self._incomplete, self._refused, self._unknown, self._unannounced
        )

    def greet(self, now: float) -> bytes:
        """A Time packet, which a sensor answers with Hello; `now` in seconds since the epoch."""
        if not 0 <= now < 2**63 / 1e6:
            raise UsageError(f"time {now}: give seconds since the epoch")
        packet = Packet(Kind.TIME, self._sequence, _TIME.pack(round(now * 1e6)))
        self._sequence = (self._sequence + 1) & 0xFFFF
        return b"\0" + encode_packet(packet)

    def feed(self, data: bytes, now: float) -> list[SensorEvent]:
        """The events that `data`, received at `now`, completes."""
        events: list[SensorEvent] = []
        for packet in self._deframer.feed(data):
            try:
                event = self._event(packet, now)
            except (ValueError, struct.error):  # FormatError, a wrong UTF-8 or PixelFormat
                self._refused += 1
            else:
                events += [] if event is None else [event]
        return events

    def _event(self, packet: Packet, now: float) -> SensorEvent | None:
        match packet.type:
            case Kind.HELLO:
                return self._greeted(packet.payload)
            case Kind.CHUNK:
                return self._chunk(packet.payload, now)
            case Kind.LOG:
                (level,), text = _LOG.unpack_from(packet.payload), packet.payload[_LOG.size :]
                return Log(level, text[:MAX_LOG_BYTES].decode(errors="replace"))
            case _:
                self._unknown += 1
                return None

    def _greeted(self, payload: bytes) -> Hello:
        code, width, height = _HELLO.unpack_from(payload)
        hello = Hello(payload[_HELLO.size :].decode(), PixelFormat(code), width, height)
        self._drop()
        self._hello, self._finished, self._abandoned = hello, None, None
        return hello

    def _chunk(self, payload: bytes, now: float) -> SensorFrame | None:
        if self._hello is None:
            self._unannounced += 1
            return None
        *key, offset = _CHUNK.unpack_from(payload)
        data, identity = payload[_CHUNK.size :], (key[0], key[1], key[2])
        self._check(identity[1], offset, len(data))
        if identity == self._finished:
            return None
        if self._partial is None or self._partial.key != identity:
            self._drop()
            if offset:
                self._incomplete += identity != self._abandoned
                self._abandoned = identity
                return None  # its first chunk was lost
            self._partial = _Partial(identity, now, bytearray())
        return self._grown(self._partial, offset, data)

    def _check(self, total: int, offset: int, size: int) -> None:
        assert self._hello is not None
        if not (size > 0 and offset + size <= total <= MAX_FRAME_BYTES):
            raise FormatError(f"chunk of {size} bytes at {offset} of {total}: at most {MAX_FRAME_BYTES} in all")
        if self._hello.raw_bytes not in (None, total):
            raise FormatError(f"frame of {total} bytes, the sensor announced {self._hello.raw_bytes}")

    def _grown(self, partial: _Partial, offset: int, data: bytes) -> SensorFrame | None:
        if offset < len(partial.data):
            return None  # a repetition
        if offset > len(partial.data):
            self._drop()
            return None
        partial.data += data
        number, total, crc = partial.key
        if len(partial.data) < total:
            return None
        if zlib.crc32(partial.data) != crc:
            self._drop()
            return None
        assert self._hello is not None
        self._partial, self._finished = None, partial.key
        self._frames += 1
        return SensorFrame(number, self._hello, bytes(partial.data), partial.started)

    def _drop(self) -> None:
        if self._partial is not None:
            self._incomplete += 1
            self._abandoned, self._partial = self._partial.key, None


class SensorEnd:
    """The sensor's end, as in firmware; simulations and tests connect it to a `HostEnd` in memory."""

    def __init__(self, hello: Hello) -> None:
        self._hello, self._deframer, self._sequence, self._number = hello, Deframer(), 0, 0

    def hello(self) -> bytes:
        """The Hello packet, after a zero: bytes before it cannot corrupt it."""
        fields = _HELLO.pack(self._hello.format, self._hello.width, self._hello.height)
        return b"\0" + self._packet(Kind.HELLO, fields + self._hello.sensor.encode())

    def frame(self, data: bytes, chunk: int = CHUNK_BYTES) -> Iterator[bytes]:
        """The packets of the next frame, `chunk` bytes in each. Raises `UsageError` if the host would refuse it."""
        expected = self._hello.raw_bytes
        if not 0 < len(data) <= MAX_FRAME_BYTES or expected not in (None, len(data)):
            raise UsageError(f"frame of {len(data)} bytes: {expected or f'1 to {MAX_FRAME_BYTES}'} are expected")
        if not 1 <= chunk <= CHUNK_BYTES:
            raise UsageError(f"chunks of {chunk} bytes: 1 to {CHUNK_BYTES}")
        key = (self._number, len(data), zlib.crc32(data))
        self._number = (self._number + 1) & 0xFFFFFFFF
        return (
            self._packet(Kind.CHUNK, _CHUNK.pack(*key, offset) + data[offset : offset + chunk])
            for offset in range(0, len(data), chunk)
        )

    def log(self, level: int, text: str) -> bytes:
        """A line for the host's log; `level` 0..255."""
        return self._packet(Kind.LOG, _LOG.pack(level) + text.encode()[:MAX_LOG_BYTES])

    def feed(self, data: bytes) -> list[Time]:
        """The host's Time packets; answer each with `hello`."""
        heard = [packet for packet in self._deframer.feed(data) if packet.type == Kind.TIME]
        return [Time(_TIME.unpack(p.payload)[0] / 1e6) for p in heard if len(p.payload) == _TIME.size]

    def _packet(self, kind: Kind, payload: bytes) -> bytes:
        packet = encode_packet(Packet(kind, self._sequence, payload))
        self._sequence = (self._sequence + 1) & 0xFFFF
        return packet
