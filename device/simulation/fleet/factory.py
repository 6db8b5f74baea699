"""What all devices of a fleet share: an encoder with a cache, and the generation that they start with."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Sequence

import numpy as np

from adaptors.progress import Progress
from device.board.board import Board, BoardPolicy
from device.board.learner import Learner
from device.daemon.assemble import blank
from device.encoder.engine import OrtEngine
from device.simulation.fleet.data import Pictures
from edgeear.errors import DeviceError
from edgeear.flow import infer
from edgeear.shift import ShiftState
from edgeear.system import Live, System
from edgeear.types import F32, U8, Encoder, Tap

LOOK_S = 0.02
"""Seconds between two polls of a learner."""


class SharedEncoder:
    """An `Encoder` with a cache. `spent_s`: CPU seconds inside it; `fresh` frames that were not cached took
    `fresh_s` of them."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder, self._known = encoder, dict[tuple[bytes, tuple[str, ...]], dict[str, F32]]()
        self.spent_s, self.fresh_s, self.fresh = 0.0, 0.0, 0

    @property
    def digest(self) -> str:
        return self._encoder.digest

    @property
    def taps(self) -> tuple[Tap, ...]:
        return self._encoder.taps

    @property
    def input_size(self) -> tuple[int, int]:
        return self._encoder.input_size

    def encode(self, frames: U8, taps: Sequence[str]) -> dict[str, F32]:
        begun = time.thread_time()
        key = (hashlib.sha256(np.ascontiguousarray(frames).data).digest(), tuple(taps))
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._encoder.encode(frames, taps)
            self.fresh += len(frames)
            self.fresh_s += time.thread_time() - begun
        self.spent_s += time.thread_time() - begun
        return dict(found)


def factory(
    encoder: SharedEncoder, learner: Learner, pictures: Pictures, probation: int, seed: int, show: Progress
) -> System:
    """What every device starts with: the first domain, learned and confirmed as on a board. Raises `DeviceError` if
    that fails."""
    lessons = pictures.lessons
    system = blank(encoder)
    policy = BoardPolicy(labels=len(lessons), memory=len(lessons), probation=probation)
    teacher = _Teacher([lesson.label for lesson in lessons], pictures.domains[0])
    board = Board(Live(system, system), encoder, teacher, lambda: 0.0, policy, seed=seed, learner=learner)
    for number, lesson in enumerate(lessons):
        board.step(lesson.frame)
        show("factory: frames", number + 1, len(lessons))
    events = list(board.poll())
    while board.phase == "learning":
        threading.Event().wait(LOOK_S)
        events += board.poll()
    for one in pictures.shown[pictures.domains[0]]:
        if board.phase != "probation":
            break
        events += board.step(one.frame)[1]
    if board.system.names != (pictures.domains[0],) or board.phase != "serving":
        told = "; ".join(event.text for event in events[-2:])
        raise DeviceError(f"the factory learned nothing from {len(lessons)} frames ({told}): show it other data")
    return board.system


class _Teacher:
    """A `Labeller` that knows the labels of the first frames."""

    def __init__(self, labels: Sequence[str], domain: str) -> None:
        self._labels, self._domain = labels, domain

    def label(self, at: Sequence[int]) -> list[str | None]:
        return [self._labels[number - 1] if number <= len(self._labels) else None for number in at]

    def domain(self, at: Sequence[int]) -> str:
        return self._domain


def look_at_all(system: System, encoder: SharedEncoder, pictures: Pictures, show: Progress) -> None:
    """Encode every picture that will be shown, so that it is cached, and measure how long that takes."""
    engine, every = OrtEngine(encoder), [one for shown in pictures.shown.values() for one in shown]
    encoder.fresh, encoder.fresh_s = 0, 0.0
    for number, one in enumerate(every):
        infer(system, engine, ShiftState(), one.frame)
        show("encode", number + 1, len(every))
