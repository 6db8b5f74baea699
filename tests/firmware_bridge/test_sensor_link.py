"""Both ends of the sensor link, connected in memory: chunking, loss, repetition and corruption give no wrong frame."""

from __future__ import annotations

import random
import struct
import tracemalloc
import zlib
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeear.errors import UsageError
from firmware_bridge.framing import (
    MAX_ENCODED,
    MAX_PAYLOAD,
    Deframer,
    FramingCounts,
    Packet,
    cobs_decode,
    cobs_encode,
    encode_packet,
)
from firmware_bridge.sensor import (
    CHUNK_BYTES,
    MAX_FRAME_BYTES,
    Hello,
    HostEnd,
    Kind,
    Log,
    PixelFormat,
    SensorEnd,
    SensorFrame,
    pixels,
)

PACKETS = st.lists(
    st.builds(Packet, st.integers(0, 255), st.integers(0, 65535), st.binary(max_size=600) | st.just(b"\0" * 300)),
    max_size=6,
)
GRAY = Hello("gate", PixelFormat.GRAY8, 8, 4)
JPEG = Hello("gate", PixelFormat.JPEG, 640, 480)


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted(cut % (len(data) + 1) for cut in cuts)
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


# ------------------------------------------------------------------------------------------------- framing


@given(st.binary(max_size=1200) | st.integers(0, 1100).map(lambda n: b"\x01" * n))
def test_stuffing_is_undone_and_holds_no_zero(data: bytes) -> None:
    stuffed = cobs_encode(data)
    assert 0 not in stuffed and cobs_decode(stuffed) == data
    assert len(stuffed) <= len(data) + len(data) // 254 + 1


@pytest.mark.parametrize(
    ("plain", "stuffed"),
    [("", "01"), ("00", "0101"), ("0000", "010101"), ("11220033", "0311220233"), ("11000000", "0211010101")],
)
def test_stuffing_as_published(plain: str, stuffed: str) -> None:
    assert cobs_encode(bytes.fromhex(plain)).hex() == stuffed


def test_the_bytes_on_the_wire_stay_what_they_are() -> None:
    """Firmware in the field depends on them."""
    body = bytes([1, 3, 0x34, 0x12]) + b"a\0b"
    assert encode_packet(Packet(3, 0x1234, b"a\0b")) == cobs_encode(body + struct.pack("<I", zlib.crc32(body))) + b"\0"
    assert encode_packet(Packet(3, 0x1234, b"a\0b")).hex() == "060103341261" + "06" + (
        "62" + struct.pack("<I", zlib.crc32(body)).hex() + "00"
    )


@given(PACKETS, st.lists(st.integers(0, 10**6), max_size=30))
def test_any_chunking_gives_the_same_packets(packets: list[Packet], cuts: list[int]) -> None:
    deframer = Deframer()
    stream = b"".join(map(encode_packet, packets))
    assert [p for chunk in split(stream, cuts) for p in deframer.feed(chunk)] == packets
    assert deframer.counts.packets == len(packets) and deframer.counts.broken == 0


@given(PACKETS, PACKETS, st.binary(max_size=3000), st.lists(st.integers(0, 10**6), max_size=9))
def test_garbage_costs_at_most_the_packet_that_it_touches(
    before: list[Packet], after: list[Packet], garbage: bytes, cuts: list[int]
) -> None:
    deframer = Deframer()
    stream = b"".join(map(encode_packet, before)) + garbage + b"\0" + b"".join(map(encode_packet, after))
    found = [p for chunk in split(stream, cuts) for p in deframer.feed(chunk)]
    assert found == before + after
    assert (deframer.counts.broken > 0) is bool(garbage.strip(b"\0"))


@given(PACKETS, st.integers(0, 10**6), st.integers(1, 255))
def test_a_corrupted_byte_gives_no_packet_that_was_not_sent(packets: list[Packet], place: int, flip: int) -> None:
    stream = bytearray(b"".join(map(encode_packet, packets)) or b"\0")
    stream[place % len(stream)] ^= flip
    found = Deframer().feed(bytes(stream))
    assert all(packet in packets for packet in found) and len(found) >= len(packets) - 2


@given(st.binary(max_size=4000))
def test_any_bytes_are_taken(data: bytes) -> None:
    for packet in Deframer().feed(data + b"\0"):
        assert packet.payload in data


def test_another_version_is_counted() -> None:
    body = struct.pack("<BBH", 2, 1, 0) + b"x"
    deframer = Deframer()
    assert deframer.feed(cobs_encode(body + struct.pack("<I", zlib.crc32(body))) + b"\0") == []
    assert deframer.counts == FramingCounts(foreign=1)


def test_gaps_and_repetitions_are_counted_across_the_wrap() -> None:
    deframer = Deframer()
    for number in (65533, 65535, 0, 0, 65535, 3):
        assert len(deframer.feed(encode_packet(Packet(9, number, b"")))) == 1
    assert deframer.counts == FramingCounts(packets=6, lost=3, repeated=2)


def test_the_largest_packet_passes_and_one_byte_more_is_refused() -> None:
    for payload in (b"\1" * MAX_PAYLOAD, b"\0" * MAX_PAYLOAD):
        wire = encode_packet(Packet(255, 65535, payload))
        assert len(wire) <= MAX_ENCODED + 1 and Deframer().feed(wire)[0].payload == payload
    for bad in (
        Packet(1, 0, b"\1" * (MAX_PAYLOAD + 1)),
        Packet(256, 0, b""),
        Packet(-1, 0, b""),
        Packet(0, 65536, b""),
    ):
        with pytest.raises(UsageError, match="at most"):
            encode_packet(bad)


def test_memory_is_bounded_by_one_packet() -> None:
    deframer, noise = Deframer(), b"\x55" * 50_000
    deframer.feed(noise)
    tracemalloc.start()
    for _ in range(100):
        deframer.feed(noise)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(noise)
    wire = encode_packet(Packet(1, 0, b"x"))
    assert deframer.feed(wire) == [] and deframer.counts.broken == 1
    assert len(deframer.feed(wire)) == 1


# -------------------------------------------------------------------------------------------------- sensor


def joined(sensor: SensorEnd, frames: list[bytes], chunk: int) -> list[bytes]:
    return [sensor.hello(), *(packet for frame in frames for packet in sensor.frame(frame, chunk))]


def heard(host: HostEnd, pieces: list[bytes]) -> list[SensorFrame]:
    events = [event for at, piece in enumerate(pieces) for event in host.feed(piece, float(at))]
    return [event for event in events if isinstance(event, SensorFrame)]


FRAMES = st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=4)


@given(FRAMES, st.integers(1, 40), st.lists(st.integers(0, 10**6), max_size=20))
def test_frames_arrive_whatever_the_chunks(frames: list[bytes], chunk: int, cuts: list[int]) -> None:
    stream = b"".join(joined(SensorEnd(GRAY), frames, chunk))
    found = heard(HostEnd(), split(stream, cuts))
    assert [(frame.number, frame.data) for frame in found] == list(enumerate(frames))


@given(st.data(), FRAMES, st.integers(1, 12))
def test_loss_repetition_and_damage_give_no_wrong_frame(data: st.DataObject, frames: list[bytes], chunk: int) -> None:
    packets = joined(SensorEnd(GRAY), frames, chunk)
    sent = []
    for packet in packets:
        fate = data.draw(st.sampled_from(["pass", "pass", "pass", "pass", "drop", "twice", "spoil", "cut"]))
        spoilt = bytearray(packet)
        if fate == "spoil":
            spoilt[data.draw(st.integers(0, len(packet) - 1))] ^= data.draw(st.integers(1, 255))
        if fate == "cut":
            del spoilt[data.draw(st.integers(0, len(packet) - 1))]
        sent += {"drop": [], "twice": [packet, packet]}.get(fate, [bytes(spoilt)])
    host = HostEnd()
    found = heard(host, split(b"".join(sent), data.draw(st.lists(st.integers(0, 10**6), max_size=9))))
    numbers = [frame.number for frame in found]
    assert numbers == sorted(set(numbers))
    assert all(frame.data == frames[frame.number] for frame in found)
    assert host.counts.frames == len(found)


@given(st.lists(st.tuples(st.integers(0, 6), st.binary(max_size=40)), max_size=8))
def test_any_intact_packets_are_taken(packets: list[tuple[int, bytes]]) -> None:
    host, sensor = HostEnd(), SensorEnd(GRAY)
    host.feed(sensor.hello(), 0.0)
    for number, (kind, payload) in enumerate(packets):
        host.feed(encode_packet(Packet(kind, number, payload)), 0.0)
    found = heard(host, [sensor.hello(), *sensor.frame(b"\7" * 32)])
    assert [frame.data for frame in found] == [b"\7" * 32]


def test_a_frame_without_its_first_chunk_or_a_middle_one_counts_once() -> None:
    host, sensor = HostEnd(), SensorEnd(GRAY)
    host.feed(sensor.hello(), 0.0)
    for missing in (0, 1, 3):
        pieces = list(sensor.frame(bytes(range(32)), 8))
        del pieces[missing]
        assert heard(host, [*pieces, *sensor.frame(b"\1" * 32, 8)]) != []
    assert (host.counts.incomplete, host.counts.frames) == (3, 3)


def test_a_gap_frees_the_frame_at_once() -> None:
    host, sensor = HostEnd(), SensorEnd(GRAY)
    first, _, third, _ = sensor.frame(bytes(range(32)), 8)
    assert heard(host, [sensor.hello(), first, third]) == [] and host.counts.incomplete == 1


@pytest.mark.parametrize("chunk", [8, 32])
def test_a_whole_frame_that_is_repeated_leaves_once(chunk: int) -> None:
    host, sensor = HostEnd(), SensorEnd(GRAY)
    pieces = list(sensor.frame(b"\1" * 32, chunk))
    assert len(heard(host, [sensor.hello(), *pieces, *pieces])) == 1 and host.counts.incomplete == 0


def test_a_frame_that_is_not_what_its_crc_says_never_leaves() -> None:
    host, sensor = HostEnd(), SensorEnd(GRAY)
    key = (0, 32, zlib.crc32(b"\1" * 32))
    parts = ((0, b"\1" * 16), (16, b"\2" * 16))  # two sensors with one number, or a broken memory
    wrong = [
        encode_packet(Packet(Kind.CHUNK, n, struct.pack("<IIII", *key, at) + d)) for n, (at, d) in enumerate(parts)
    ]
    assert heard(host, [sensor.hello(), *wrong]) == [] and host.counts.incomplete == 1


def test_its_time_is_that_of_its_first_chunk() -> None:
    host, sensor = HostEnd(), SensorEnd(GRAY)
    (frame,) = heard(host, [sensor.hello(), *sensor.frame(b"\1" * 32, 8)])
    assert frame.started == 1.0


def test_a_sensor_that_starts_anew_does_not_finish_an_old_frame() -> None:
    host, sensor = HostEnd(), SensorEnd(GRAY)
    start = list(sensor.frame(b"\1" * 32, 8))[:3]
    assert heard(host, [sensor.hello(), *start]) == []
    again = list(SensorEnd(GRAY).frame(b"\1" * 32, 8))
    assert heard(host, [sensor.hello(), again[3]]) == [] and host.counts.incomplete == 2


def test_unannounced_frames_are_counted_until_the_sensor_answers() -> None:
    host, sensor = HostEnd(), SensorEnd(GRAY)
    assert heard(host, list(sensor.frame(b"\1" * 32))) == [] and host.counts.unannounced == 1
    (time,) = sensor.feed(host.greet(1234.5))
    assert time.seconds == 1234.5
    assert len(heard(host, [sensor.hello(), *sensor.frame(b"\2" * 32)])) == 1
    assert host.hello == GRAY


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (Kind.HELLO, b""),
        (Kind.HELLO, struct.pack("<BHH", 9, 8, 8) + b"a"),
        (Kind.HELLO, struct.pack("<BHH", 1, 0, 8) + b"a"),
        (Kind.HELLO, struct.pack("<BHH", 1, 4096, 4096) + b"a"),
        (Kind.HELLO, struct.pack("<BHH", 1, 8, 8)),
        (Kind.HELLO, struct.pack("<BHH", 1, 8, 8) + b"\xff"),
        (Kind.HELLO, struct.pack("<BHH", 1, 8, 8) + b"a" * 33),
        (Kind.HELLO, struct.pack("<BHH", 1, 8, 8) + b"\x1b[2J"),
        (Kind.CHUNK, b"short"),
        (Kind.CHUNK, struct.pack("<IIII", 0, 32, 0, 0)),
        (Kind.CHUNK, struct.pack("<IIII", 0, 33, 0, 0) + b"x"),
        (Kind.CHUNK, struct.pack("<IIII", 0, 32, 0, 32) + b"x"),
        (Kind.CHUNK, struct.pack("<IIII", 0, 32, 0, 2**32 - 1) + b"x"),
        (Kind.LOG, b""),
    ],
)
def test_what_breaks_a_rule_is_refused_and_changes_nothing(kind: Kind, payload: bytes) -> None:
    host, sensor = HostEnd(), SensorEnd(GRAY)
    first, *rest = sensor.frame(b"\1" * 32, 8)
    assert heard(host, [sensor.hello(), first, encode_packet(Packet(kind, 2, payload)), *rest])
    assert host.counts.refused == 1 and host.hello == GRAY


def test_a_jpeg_may_have_any_size_up_to_the_limit() -> None:
    host, sensor = HostEnd(), SensorEnd(JPEG)
    data = random.Random(0).randbytes(3 * CHUNK_BYTES + 5)
    (frame,) = heard(host, [sensor.hello(), *sensor.frame(data)])
    assert frame.data == data
    huge = struct.pack("<IIII", 0, MAX_FRAME_BYTES + 1, 0, 0) + b"x"
    host.feed(encode_packet(Packet(Kind.CHUNK, 0, huge)), 0.0)
    assert host.counts.refused == 1
    with pytest.raises(UsageError, match="jpeg"):
        pixels(frame)


def test_pixels() -> None:
    for form, shape in ((PixelFormat.GRAY8, (2, 3)), (PixelFormat.RGB888, (2, 3, 3))):
        sensor, values = SensorEnd(Hello("a", form, 3, 2)), np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
        (frame,) = heard(HostEnd(), [sensor.hello(), *sensor.frame(values.tobytes())])
        assert np.array_equal(pixels(frame), values)


def test_log_lines_arrive_and_text_is_cut() -> None:
    host, sensor = HostEnd(), SensorEnd(GRAY)
    assert host.feed(sensor.log(30, "wärme"), 0.0) == [Log(30, "wärme")]
    (event,) = host.feed(sensor.log(10, "x" * 5000), 0.0)
    assert isinstance(event, Log) and len(event.text) == 1024


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Hello("", PixelFormat.GRAY8, 8, 8),
        lambda: Hello("a" * 33, PixelFormat.GRAY8, 8, 8),
        lambda: Hello("a", PixelFormat.RGB888, 0, 8),
        lambda: Hello("a", PixelFormat.RGB888, 4096, 4096),
        lambda: SensorEnd(GRAY).frame(b"\1" * 31),
        lambda: SensorEnd(GRAY).frame(b"\1" * 32, 0),
        lambda: SensorEnd(GRAY).frame(b"\1" * 32, CHUNK_BYTES + 1),
        lambda: SensorEnd(JPEG).frame(b""),
        lambda: HostEnd().greet(-1.0),
        lambda: HostEnd().greet(float("nan")),
    ],
)
def test_misuse_is_refused(wrong: object) -> None:
    with pytest.raises(UsageError):
        wrong()  # type: ignore[operator]


def test_an_unfinished_frame_takes_no_more_memory_than_has_come() -> None:
    host, sensor = HostEnd(), SensorEnd(JPEG)
    host.feed(sensor.hello(), 0.0)
    starts = [next(iter(sensor.frame(bytes([n]) * 1000 * n, 100))) for n in range(1, 200)]
    tracemalloc.start()
    for number, _ in enumerate(accumulate(starts)):
        host.feed(starts[number], 0.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert host.counts.incomplete == 198 and peak < 50_000_000
