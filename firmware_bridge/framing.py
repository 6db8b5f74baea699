"""Framing of the sensor link: packets on a byte stream that may lose, repeat and corrupt bytes.

    packet   version u8 | type u8 | sequence u16 | payload, at most 4096 bytes | CRC-32 of all before, u32
    on the wire   COBS(packet) 0x00            all integers little-endian

Rules of this file:

1. Bytes in, packets out, however the bytes are split. No ports, no clock.
2. A zero byte ends a packet and never occurs inside one (Consistent Overhead Byte Stuffing, Cheshire and Baker 1999).
   So the next packet is found after any corruption.
3. Data from the peer never raises. Bytes that form no intact packet (CRC-32, zlib's polynomial) are counted and
   skipped.
4. Memory is bounded by one packet.
5. The version rises when the header changes its meaning; packets of another version are counted and skipped.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass

from edgeear.errors import UsageError

VERSION = 1
MAX_PAYLOAD = 4096
_HEADER, _CRC = struct.Struct("<BBH"), struct.Struct("<I")
_BLOCK = 254
_ONES = re.compile(b"\x01+")
_OVERHEAD = _HEADER.size + _CRC.size
MAX_ENCODED = MAX_PAYLOAD + _OVERHEAD + (MAX_PAYLOAD + _OVERHEAD) // _BLOCK + 1


@dataclass(frozen=True)
class Packet:
    """`type` 0..255 defines the payload (sensor.py); `sequence` 0..65535 rises by one, and wraps."""

    type: int
    sequence: int
    payload: bytes


@dataclass(frozen=True)
class FramingCounts:
    """`broken` byte runs that were no packet, `foreign` intact packets of another version, `lost` missing sequence
    numbers, `repeated` packets with an old sequence number, which are still returned."""

    packets: int = 0
    broken: int = 0
    foreign: int = 0
    lost: int = 0
    repeated: int = 0


def encode_packet(packet: Packet) -> bytes:
    """The packet as sent, with the zero at its end. Raises `UsageError` for a field out of range."""
    if not (0 <= packet.type <= 0xFF and 0 <= packet.sequence <= 0xFFFF and len(packet.payload) <= MAX_PAYLOAD):
        what = f"type {packet.type}, sequence {packet.sequence}, {len(packet.payload)} bytes"
        raise UsageError(f"packet of {what}: at most 255, 65535 and {MAX_PAYLOAD}; split the payload")
    body = _HEADER.pack(VERSION, packet.type, packet.sequence) + packet.payload
    return cobs_encode(body + _CRC.pack(zlib.crc32(body))) + b"\0"


def cobs_encode(data: bytes) -> bytes:
    """`data` without zero bytes; at most 1 + len / 254 bytes longer."""
    out = bytearray()
    for run in data.split(b"\0"):
        while len(run) >= _BLOCK:
            out.append(_BLOCK + 1)
            out += run[:_BLOCK]
            run = run[_BLOCK:]
        out.append(len(run) + 1)
        out += run
    return bytes(out)


def cobs_decode(data: bytes) -> bytes | None:
    """The inverse of `cobs_encode`; None if `data` is not its result."""
    out, at = bytearray(), 0
    while at < len(data):
        code, end = data[at], at + data[at]
        if code == 0 or end > len(data):
            return None
        if code == 1:  # a run of zeros, as in a dark frame, in one go
            end = _ONES.match(data, at).end()  # type: ignore[union-attr]
            out += bytes(end - at - (end == len(data)))
            at = end
            continue
        out += data[at + 1 : end]
        at = end
        if code <= _BLOCK and at < len(data):
            out.append(0)
    return bytes(out)


class Deframer:
    """Decodes one direction of a link; see the module's rules."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._overflow = False
        self._expected: int | None = None
        self._packets = self._broken = self._foreign = self._lost = self._repeated = 0

    @property
    def counts(self) -> FramingCounts:
        return FramingCounts(self._packets, self._broken, self._foreign, self._lost, self._repeated)

    def feed(self, data: bytes) -> list[Packet]:
        """The packets that end in `data`, in order."""
        found = []
        *ended, rest = data.split(b"\0")
        for piece in ended:
            self._add(piece)
            packet = self._end()
            if packet is not None:
                found.append(packet)
        self._add(rest)
        return found

    def _add(self, piece: bytes) -> None:
        if len(self._buffer) + len(piece) > MAX_ENCODED:
            self._overflow = True
            self._buffer.clear()
        if not self._overflow:
            self._buffer += piece

    def _end(self) -> Packet | None:
        raw, overflow = bytes(self._buffer), self._overflow
        self._buffer.clear()
        self._overflow = False
        if not raw and not overflow:
            return None  # several zeros between packets are allowed
        parsed = None if overflow else _parsed(raw)
        if parsed is None:
            self._broken += 1
            return None
        version, packet = parsed
        if version != VERSION:
            self._foreign += 1
            return None
        self._packets += 1
        self._follow(packet.sequence)
        return packet

    def _follow(self, sequence: int) -> None:
        """Count missing packets. A step back of less than half the range is a repetition."""
        ahead = 0 if self._expected is None else (sequence - self._expected) & 0xFFFF
        if ahead >= 0x8000:
            self._repeated += 1
            return
        self._lost += ahead
        self._expected = (sequence + 1) & 0xFFFF


def _parsed(raw: bytes) -> tuple[int, Packet] | None:
    """Version and packet of the bytes between two zeros; None if they are no packet."""
    body = cobs_decode(raw)
    if body is None or not _OVERHEAD <= len(body) <= MAX_PAYLOAD + _OVERHEAD:
        return None
    content = body[: -_CRC.size]
    if zlib.crc32(content) != _CRC.unpack(body[-_CRC.size :])[0]:
        return None
    version, kind, sequence = _HEADER.unpack_from(content)
    return version, Packet(kind, sequence, content[_HEADER.size :])
