"""Messages that nobody should send to a board: from hypothesis, and real ones spoilt in as many ways as we know.

One seed gives the same messages on every run. What they carry besides a payload (topic, response topic, correlation
data, expiry, content type) is spoilt as well.
"""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from device.mqtt import messages
from device.mqtt.fields import MAX_LABELS

UNKNOWN_NAMES = ("", "INFER", "infer ", "set_policy", "reboot", "x" * 200, "é", "..", "\u202eyort", "$share", "0")
CORRELATIONS = (None, b"", b"\0", b"\x01" * 16, b"\xff" * 65_535)
CONTENT_TYPES = (None, "application/json", "image/jpeg", "text/html; charset=latin-1", "", "é" * 99)
HUGE = (
    "9" * 400,
    f"-{'9' * 18}",
    "1e999",
    "-1e999",
    "NaN",
    "Infinity",
    "1E-400",
    "0.1" + "0" * 5000,
    "12345678901234567890",
)
TEXTS = ('""', '"\\u0000"', '"\\ud800"', '"\\ud83d\\ude00"', f'"{"a" * 129}"', f'"{"a" * 20_000}"', '"\u202e"', '"\\x"')
OTHERS = (
    "true",
    "null",
    "[]",
    "{}",
    "[[[[1]]]]",
    '{"a":{"b":{"c":{}}}}',
    "[" * 500 + "]" * 500,
    '{"a":' * 300 + "1" + "}" * 300,
)
VERSIONS = ("0", "2", '"1"', "1.0", "true", "null", "[1]", "1" * 30, "-1")
SEEDS = 1500
"""Payloads that hypothesis makes."""


@dataclass(frozen=True)
class Message:
    """One message to a board: `topic` in full, `expiry_s` and the other properties as MQTT 5 has them."""

    topic: str
    payload: bytes
    response_topic: str | None = None
    correlation: bytes | None = None
    expiry_s: int | None = None
    content_type: str | None = None
    dup: bool = False


class Fuzzer:
    """`next()` gives messages for the board whose topics begin with `own`. `session` is the board's; `seeds` payloads
    are hypothesis's."""

    def __init__(self, own: str, session: str, number: int = 0, seeds: int = SEEDS) -> None:
        self._own, self._random = own, random.Random(number)
        self._picture = picture("PNG")
        self._pictures = (self._picture, picture("JPEG"))
        self._real = _real(session, base64.b64encode(self._picture).decode())
        self._made = made(seeds, number)
        self._spoil: tuple[Callable[[bytes], bytes], ...] = (
            self._flipped,
            self._cut,
            self._spliced,
            self._repeated,
            self._stuffed,
        )

    def next(self) -> Message:
        """The next one, on any topic that the board subscribes to, and on some that it does not."""
        r = self._random
        where = r.random()
        if where < 0.15:
            return self._message(f"{self._own}/frame", self._broken_picture())
        name = r.choice(tuple(messages.COMMANDS))
        payload = self._payload(name)
        if where < 0.25:
            return self._message(f"{self._own}/command/{self._unknown_name()}", payload)
        return self._message(f"{self._own}/command/{name}", payload)

    def warming(self) -> list[Message]:
        """What a board needs memory for once and then keeps: its first look at a picture, which loads code, and what
        takes most to refuse, the most bytes that are read and one wrong field after many labels."""
        wide = b"[" + b" " * (messages.MAX_PAYLOAD - 2) + b"]"
        labels = {str(at): "a" * 128 for at in range(MAX_LABELS)}
        many = json.dumps({"id": "many", "session": "0" * 16, "labels": labels, "extra": 1}).encode()
        look = Message(f"{self._own}/command/infer", self._real["infer"])
        return [look, *(Message(f"{self._own}/command/label", payload) for payload in (wide, many))]

    def valid(self, identity: str) -> Message:
        """A report whose answer must carry as much correlation data as MQTT has room for."""
        payload = messages.Report(id=identity).payload()
        return Message(
            f"{self._own}/command/report", payload, f"{self._own}/response", self._random.randbytes(65_535), 60
        )

    def elsewhere(self) -> str:
        """A topic that is no command and no frame of this board."""
        return self._random.choice(
            (
                f"{self._own}/status",
                f"{self._own}/command",
                f"{self._own}/command/a/b",
                f"{self._own}x/command/forget",
                "edgeear/v1/+/cam/command/forget",
                "edgeear/v2/plant/cam-1/command/forget",
                "edgeear/v1//cam/frame",
                "$SYS/broker/uptime",
                "a" * 65_535,
                "\0",
                "",
            )
        )

    def _message(self, topic: str, payload: bytes) -> Message:
        r, own = self._random, self._own
        replies = (None, f"{own}/response", f"{own}/response/me", f"{own}/response/+", "#", f"{own}/command/forget", "",
                   f"{own}/response/\0", "$SYS/x", "a" * 65_535)  # fmt: skip
        big = r.random() < 0.001
        return Message(
            topic,
            payload,
            r.choice(replies[: -1 if not big else None]),
            r.choice(CORRELATIONS[: -1 if not big else None]),
            r.choice((None, 0, 1, 60, 2**32 - 1)),
            r.choice(CONTENT_TYPES),
            r.random() < 0.1,
        )

    def _payload(self, name: str) -> bytes:
        r = self._random
        way = r.random()
        if way < 0.15:
            return r.choice(self._made)
        if way < 0.5:
            return self._respelt(name)
        if way < 0.53:
            return r.choice(list(self._real.values()))  # of another command, mostly
        payload = self._real[name]
        for _ in range(r.choice((1, 1, 1, 2, 5))):
            payload = r.choice(self._spoil)(payload)
        if way > 0.9999:
            payload += b" " * r.choice((messages.SMALL, messages.MAX_PAYLOAD))
        return payload

    def _respelt(self, name: str) -> bytes:
        """A command with one thing about its fields wrong, in JSON that is otherwise fine."""
        r = self._random
        fields = [(json.dumps(key), json.dumps(value)) for key, value in json.loads(self._real[name]).items()]
        at = r.randrange(len(fields))
        match r.randrange(6):
            case 0:
                fields.pop(at)
            case 1:
                fields[at] = fields[at][0], self._hostile()
            case 2:
                fields.append((json.dumps(r.choice(("id", "extra", "", "__class__", "a" * 300))), self._hostile()))
            case 3:
                fields.insert(0, ('"v"', r.choice(VERSIONS)))
            case 4:
                fields.append(fields[at])  # the key is there twice
            case _:
                fields[at] = self._hostile(), fields[at][1]
        r.shuffle(fields)
        return ("{" + ",".join(f"{key}:{value}" for key, value in fields) + "}").encode("utf-8", "surrogatepass")

    def _hostile(self) -> str:
        r = self._random
        if r.random() < 0.3:
            return r.choice(self._made).decode("utf-8", "replace")
        return r.choice(r.choice((HUGE, TEXTS, OTHERS)))

    def _unknown_name(self) -> str:
        r = self._random
        if r.random() < 0.5:
            return r.choice(UNKNOWN_NAMES)
        name = list(r.choice(tuple(messages.COMMANDS)))
        name[r.randrange(len(name))] = chr(r.choice((0x20, 0x41, 0x7F, 0x100, 0x1F600, r.randrange(0x80, 0xD800))))
        return "".join(name)

    def _broken_picture(self) -> bytes:
        r = self._random
        if r.random() < 0.2:
            return r.choice(self._made)
        data = r.choice(self._pictures)
        for _ in range(r.choice((1, 2, 9))):
            data = r.choice(self._spoil)(data)
        return data

    # Ways to spoil bytes

    def _flipped(self, data: bytes) -> bytes:
        if not data:
            return b"\0"
        spoilt = bytearray(data)
        for _ in range(self._random.choice((1, 1, 3, 10))):
            spoilt[self._random.randrange(len(spoilt))] ^= 1 << self._random.randrange(8)
        return bytes(spoilt)

    def _cut(self, data: bytes) -> bytes:
        end = self._random.randrange(len(data) + 1)
        return data[end:] if self._random.random() < 0.2 else data[:end]

    def _spliced(self, data: bytes) -> bytes:
        other = self._random.choice((*self._real.values(), *self._pictures))
        return data[: self._random.randrange(len(data) + 1)] + other[self._random.randrange(len(other)) :]

    def _repeated(self, data: bytes) -> bytes:
        at = self._random.randrange(len(data) + 1)
        return data[:at] + data[at : at + 40] * self._random.choice((2, 3, 50)) + data[at:]

    def _stuffed(self, data: bytes) -> bytes:
        at = self._random.randrange(len(data) + 1)
        return data[:at] + self._random.randbytes(self._random.choice((1, 4, 64))) + data[at:]


def picture(kind: str, side: int = 8) -> bytes:
    """A picture file of noise."""
    target = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(target, kind)
    return target.getvalue()


def _real(session: str, image: str) -> dict[str, bytes]:
    """One of each command as an operator would send it."""
    commands = (
        messages.Infer(id="a1", image=image),
        messages.Label(id="a2", session=session, labels={1: "rows", 2: "half"}, domain="night"),
        messages.Adapt(id="a3", domain="night"),
        messages.Rollback(id="a4"),
        messages.Confirm(id="a5"),
        messages.Pause(id="a6", paused=True),
        messages.SetPolicy.model_validate({"id": "a7", "labels": 50, "foreign": 0.5, "predictions": True}),
        messages.Report(id="a8", expires=4e9),
        messages.Forget(id="a9", domain="day", label="rows"),
    )
    return {c.name: json.dumps(c.model_dump(mode="json", exclude_none=True)).encode() for c in commands}


def made(count: int, number: int) -> list[bytes]:
    """Payloads from hypothesis: any JSON, JSON under the names of our fields, and any bytes."""
    leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    keys = st.text(max_size=8)
    value = st.recursive(
        leaf, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
    )
    names = sorted({field for model in messages.COMMANDS.values() for field in model.model_fields})
    ours = st.dictionaries(st.sampled_from(names), value, max_size=8)
    spelt = st.builds(partial(json.dumps, ensure_ascii=False), value | ours)
    payload = st.binary(max_size=200) | spelt.map(lambda text: text.encode("utf-8", "surrogatepass"))
    found: list[bytes] = []

    @seed(number)
    @settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck), derandomize=False,
    )  # fmt: skip
    @given(payload)
    def collect(one: bytes) -> None:
        found.append(one)

    collect()
    return found
