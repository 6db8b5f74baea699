"""Streams of frames as detectors see them: novelty, p-values and codes of real images under a system that knows some
domains.

A `Stream` is drawn from judged pools with a seeded generator. Bursts show one image as 5 to 50 frames that the real
encoder saw: shifted by up to 4 pixels and up to 5 % brighter or darker.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from device.evaluation.data import EvalData
from device.images.decode import decode
from edgeear.flow import judge
from edgeear.memory import learn
from edgeear.novelty import calibrate
from edgeear.scenes import likeness, scene_code
from edgeear.space import HypervectorSpace
from edgeear.system import Domain, System
from edgeear.types import F32, U8, Encoder

FRAMES = 6
"""Different frames that the encoder sees of one image."""
BURST = (5, 50)


@dataclass(frozen=True, eq=False)
class Stream:
    """Frames in order: `novelty`, `p` (conditional) `(frames,)`, `codes (frames, m)`, and which are `foreign`."""

    novelty: F32
    p: F32
    codes: F32
    foreign: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.p)

    def take(self, at: NDArray[np.int64]) -> Stream:
        return Stream(self.novelty[at], self.p[at], self.codes[at], self.foreign[at])


def joined(*streams: Stream) -> Stream:
    parts = [(s.novelty, s.p, s.codes, s.foreign) for s in streams]
    return Stream(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def known_system(data: EvalData, names: Sequence[str], shots: int | None, seed: int) -> System:
    """A system that judges but does not classify: no head is grown. `shots` training images a class, drawn by seed."""
    system, rng = System("", data.space), np.random.default_rng(seed)
    for domain in (d for d in data.domains if d.name in names):
        picked = _picked(domain.train_labels, shots, rng)
        h, y, m = domain.train_h[picked], domain.train_labels[picked], system.policy.memory_dimensions
        memory, held = learn(h, y, data.classes, m), calibrate(h, y, data.classes, m, seed=seed)
        kept = h[rng.permutation(len(h))[: system.policy.codes]]
        codes, alike = scene_code(kept).astype(np.float16), likeness(scene_code(kept))  # codes are for MMD only
        system = system.grown(Domain(domain.name, None, memory, held, codes, {}, alike))  # type: ignore[arg-type]
    return system


def judged(system: System, h: F32, foreign: bool) -> Stream:
    """All frames of hypervectors `(frames, D)`."""
    verdict = judge(system, h)
    return Stream(verdict.novelty, verdict.conditional_p, scene_code(h), np.full(len(h), foreign))


def drawn(pool: Stream, n: int, rng: np.random.Generator) -> Stream:
    """`n` independent frames, without replacement as far as the pool goes."""
    rounds = [rng.permutation(len(pool)) for _ in range(-(-n // len(pool)))]
    return pool.take(np.concatenate(rounds)[:n])


def ramp(quiet: Stream, foreign: Stream, n: int, rng: np.random.Generator) -> Stream:
    """`n` frames of which a linearly rising share is foreign."""
    a, b = drawn(quiet, n, rng), drawn(foreign, n, rng)
    return joined(a, b).take(np.arange(n) + n * (rng.random(n) < np.arange(1, n + 1) / n))


def bursts(pool: Stream, n: int, rng: np.random.Generator) -> Stream:
    """`n` frames or a few more, each image shown 5 to 50 times in a row. `pool` holds `FRAMES` frames of each image."""
    at, images = list[int](), len(pool) // FRAMES
    while len(at) < n:
        image = rng.integers(images)
        at += (image * FRAMES + rng.integers(FRAMES, size=rng.integers(BURST[0], BURST[1] + 1))).tolist()
    return pool.take(np.array(at))


def measured(stream: Stream, alarms: Iterable[int], began: int | None = None) -> dict[str, float]:
    """Mean delay from the first frame of each foreign episode, share of episodes without an alarm, and alarms in 10,000
    frames outside of them. `began` makes one episode from that frame to the end: a ramp mixes both.
    """
    if began is not None:
        onsets, ends = np.array([began]), np.array([len(stream)])
    else:
        edges = np.diff(np.concatenate([[False], stream.foreign, [False]]).astype(int))
        onsets, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    inside = np.zeros(len(stream), bool)
    for a, b in zip(onsets, ends, strict=True):
        inside[a:b] = True
    first: dict[int, int] = {}
    false = 0
    for at in alarms:
        if not inside[at]:
            false += 1
            continue
        episode = int(np.searchsorted(onsets, at, side="right")) - 1
        first.setdefault(episode, at)
        if len(first) == len(onsets) and episode == len(onsets) - 1 and ends[-1] == len(stream):
            break
    quiet = int((~inside).sum())
    found = {"false_per_10k": 1e4 * false / quiet}
    if len(onsets):
        delays = [at - onsets[k] + 1 for k, at in first.items()]
        found["delay"] = float(np.mean(delays)) if delays else float("nan")
        found["missed"] = 1 - len(first) / len(onsets)
    return found


def burst_hypervectors(data: EvalData, encoder: Encoder, images: int, seed: int) -> dict[str, F32]:
    """Hypervectors `(images * FRAMES, D)` of each domain's test images, `FRAMES` frames of each image in a row."""
    return {
        d.name: _frames_of(encoder, data.space, [d.test_paths[i] for i in _spread(len(d.test_paths), images)], seed)
        for d in data.domains
    }


def _frames_of(encoder: Encoder, space: HypervectorSpace, paths: Sequence[Path], seed: int) -> F32:
    rng, taps = np.random.default_rng(seed), [t.name for t in space.taps]
    found = []
    for path in paths:
        frame = decode(path, encoder.input_size)
        found += [space.encode(encoder.encode(_jittered(frame, rng)[None], taps)) for _ in range(FRAMES)]
    return np.concatenate(found)


def _jittered(frame: U8, rng: np.random.Generator) -> U8:
    height, width, _ = frame.shape
    y, x = rng.integers(0, 9, 2)
    moved = np.pad(frame, ((4, 4), (4, 4), (0, 0)), mode="edge")[y : y + height, x : x + width]
    out: U8 = np.clip(np.rint(moved * rng.uniform(0.95, 1.05)), 0, 255).astype(np.uint8)
    return out


def _spread(n: int, wanted: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, n - 1, min(n, wanted)).astype(np.int64))


def _picked(labels: NDArray[np.int64], shots: int | None, rng: np.random.Generator) -> NDArray[np.int64]:
    if shots is None:
        return np.arange(len(labels))
    return np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:shots] for c in np.unique(labels)])
