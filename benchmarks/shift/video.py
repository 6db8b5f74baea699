"""Video: few scenes, many frames of each. The frames are jittered copies of still pictures, as the real encoder sees
them: shifted by up to 4 pixels, up to 5 % brighter or darker, and with noise of 2 grey levels.

A domain is known from 140 labelled frames of 140, 70 or 28 scenes. Measured are the rate of false OOD verdicts on fresh
scenes, the false alarms in 5,000 of them, and how many scenes of another domain it takes to declare a shift. Also: how
many domains a whole board grows on video of one domain, and streams that are no independent scenes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptors.search import SearchPolicy
from benchmarks.shift.streams import _jittered, _spread
from device.board.board import Board, BoardPolicy
from device.board.events import BoardEvent, Grown, LabelsWanted, RolledBack, Searching, Shifted
from device.encoder.session import pooled_taps
from device.images.decode import decode
from edgeear.memory import learn, rounded
from edgeear.novelty import Calibration, Detector, calibrate, detector
from edgeear.samples import AdaptPolicy
from edgeear.scenes import scene_code, scenes_of
from edgeear.shift import ShiftPolicy, ShiftState, observe
from edgeear.space import HypervectorSpace
from edgeear.system import Live, System
from edgeear.types import F32, U8, Encoder, Tap

I64 = NDArray[np.int64]
STILLS, FOREIGN, FRAMES = 500, 200, 5
LABELS = ((140, 1), (70, 2), (28, 5))
"""Scenes and frames of each that are labelled."""
QUIET, WATCHED = 5000, 600
"""Fresh scenes for false alarms, and those that a board sees after it has learned."""
M = 256


@dataclass(frozen=True, eq=False)
class Film:
    """`FRAMES` frames of each still: `h (stills, FRAMES, D)`, features of every tap alike, `labels (stills,)`."""

    h: F32
    features: Mapping[str, F32]
    labels: I64


def filmed(encoder: Encoder, folder: Path, stills: int, seed: int) -> Film:
    """Frames of `stills` pictures of a folder `CLASS/*`, evenly spread over it."""
    files = sorted(folder.glob("*/*.jpg"))
    files = [files[i] for i in _spread(len(files), stills)]
    classes = sorted({f.parent.name for f in files})
    rng, space, taps = np.random.default_rng(seed), HypervectorSpace(pooled_taps(encoder)), _names(encoder)
    found: list[dict[str, F32]] = []
    for file in files:
        frame = decode(file, encoder.input_size)
        found += [encoder.encode(jittered(frame, rng)[None], taps) for _ in range(FRAMES)]
    features = {t: np.concatenate([f[t] for f in found]) for t in taps}
    h = space.encode(features).reshape(len(files), FRAMES, -1)
    shaped = {t: x.reshape(len(files), FRAMES, -1) for t, x in features.items()}
    return Film(h, shaped, np.array([classes.index(f.parent.name) for f in files]))


def jittered(frame: U8, rng: np.random.Generator) -> U8:
    out: U8 = np.clip(_jittered(frame, rng) + rng.normal(0, 2, frame.shape), 0, 255).astype(np.uint8)
    return out


def fading(encoder: Encoder, folder: Path, scenes: int, seed: int) -> F32:
    """Hypervectors `(scenes, D)` of pictures that get darker one by one, the last with a quarter of its light."""
    files = sorted(folder.glob("*/*.jpg"))
    order = np.random.default_rng(seed).permutation(len(files))[:scenes]
    space, taps, found = HypervectorSpace(pooled_taps(encoder)), _names(encoder), []
    for k, i in enumerate(order):
        frame = decode(files[i], encoder.input_size) * (1 - 0.75 * k / scenes)
        found.append(space.encode(encoder.encode(frame.astype(np.uint8)[None], taps)))
    return np.concatenate(found)


def measure(encoder: Encoder, data: Path, seeds: int, known: str = "photo") -> dict[str, Any]:
    print("video: encoding", file=sys.stderr, flush=True)
    film = filmed(encoder, data / known, STILLS, 0)
    others = ("art_painting", "sketch")
    foreign = {name: filmed(encoder, data / name, FOREIGN, 1) for name in others}
    faded = fading(encoder, data / known, 600, 2)
    print("video: statistics", file=sys.stderr, flush=True)
    return {
        "known": known,
        "stills": len(film.labels),
        "calibrated": [_calibrated(film, foreign, scenes, times, seeds) for scenes, times in LABELS],
        "streams": _streams(film, faded, seeds),
        "board": [_board(encoder, film, seed) for seed in range(seeds)],
    }


def _calibrated(film: Film, foreign: Mapping[str, Film], scenes: int, times: int, seeds: int) -> dict[str, Any]:
    rows: dict[str, list[float | None]] = {"counted": [], "alarms": [], **{f"delay_{n}": [] for n in foreign}}
    false: list[float] = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        known, fresh = _parted(film, scenes, rng)
        h, labels = _shown(film, known, times)
        held, served = _learned(h, labels, seed)
        p, conditional = held.p_values(held.novelty(served, film.h[fresh, rng.integers(FRAMES, size=len(fresh))]))
        rows["counted"].append(len(set(scenes_of(scene_code(h), labels).tolist())))
        false.append(float((p <= np.float32(0.05)).mean()))
        rows["alarms"].append(float(_alarms(rng.choice(conditional, QUIET))))
        for name, other in foreign.items():
            moved = held.p_values(held.novelty(served, other.h[rng.permutation(len(other.labels)), 0]))[1]
            rows[f"delay_{name}"].append(_delay(moved))
    return {
        "scenes": scenes,
        "frames_a_scene": times,
        "false_ood_mean": float(np.mean(false)),
        "false_ood": false,
        **rows,
    }


def _streams(film: Film, faded: F32, seeds: int) -> list[dict[str, Any]]:
    """Alarms on streams that are not independent scenes of the domain, known from 140 scenes of one frame; of a fade,
    the scene at which it is declared, from 1, or None."""
    rows: dict[str, list[float | None]] = {}
    for seed in range(seeds):
        rng = np.random.default_rng([seed, 7])
        known, fresh = _parted(film, 140, rng)
        held, served = _learned(*_shown(film, known, 1), seed)

        def p_of(
            at: Sequence[int] | I64,
            rng: np.random.Generator = rng,
            held: Calibration = held,
            served: Detector = served,
        ) -> F32:
            given = film.h[at, rng.integers(FRAMES, size=len(at))]
            return held.p_values(held.novelty(served, given))[1]

        of = [fresh[film.labels[fresh] == c] for c in np.unique(film.labels[fresh])]
        blocks = np.concatenate([rng.choice(of[rng.integers(len(of))], 20) for _ in range(QUIET // 20)])
        hardest = max(of, key=lambda at: float((p_of(at) < 1).mean()))
        drift = [
            int(rng.choice(hardest if rng.random() < k / 2000 else fresh)) for k in range(2000)
        ]  # up to one class alone
        views = rng.choice(fresh, 6, replace=False)
        rows.setdefault("blocks of 20 scenes of one class, 5,000 scenes: alarms", []).append(_alarms(p_of(blocks)))
        rows.setdefault("drift to the most novel class alone, 2,000 scenes: alarms", []).append(_alarms(p_of(drift)))
        rows.setdefault("six views in turn, 5,000 frames: alarms", []).append(
            _alarms_on(film, views, held, served, rng)
        )
        moved = held.p_values(held.novelty(served, faded))[1]
        rows.setdefault("fade to a quarter of the light in 600 scenes: declared at", []).append(_delay(moved))
        six = np.tile(views, 24)[:140]
        few, one = _learned(film.h[six, rng.integers(3, size=140)], film.labels[six], seed)
        tour = film.h[np.tile(views, 100), rng.integers(3, FRAMES, size=600)]
        for where, given in (("on that tour", tour), ("elsewhere", film.h[fresh, 0])):
            share = float((few.p_values(few.novelty(one, given))[0] <= np.float32(0.05)).mean())
            rows.setdefault(f"known from 140 frames of six views in turn: OOD verdicts {where}", []).append(share)
    return [{"stream": name, "seeds": found} for name, found in rows.items()]


def _parted(film: Film, scenes: int, rng: np.random.Generator) -> tuple[I64, I64]:
    order = rng.permutation(len(film.labels))
    return order[:scenes], order[scenes:]


def _shown(film: Film, scenes: I64, times: int) -> tuple[F32, I64]:
    return film.h[scenes, :times].reshape(len(scenes) * times, -1), np.repeat(film.labels[scenes], times)


def _learned(h: F32, labels: I64, seed: int) -> tuple[Calibration, Detector]:
    own, compact = np.unique(labels, return_inverse=True)
    classes = [str(c) for c in own]
    return calibrate(h, compact, classes, M, seed=seed), detector(rounded(learn(h, compact, classes, M)))


def _alarms(p: Iterable[float]) -> int:
    return sum(1 for _ in _declared(p, None, 0.0))


def _delay(p: Iterable[float]) -> float | None:
    return next(_declared(p, None, 0.0), None)


def _alarms_on(film: Film, views: I64, held: Calibration, served: Detector, rng: np.random.Generator) -> int:
    """With codes: the shift test recognises the latest views, as on a board."""
    at, copy = np.tile(views, QUIET // len(views)), rng.integers(FRAMES, size=QUIET // len(views) * len(views))
    h = film.h[at, copy]
    return sum(1 for _ in _declared(held.p_values(held.novelty(served, h))[1], scene_code(h), 0.0))


def _declared(p: Iterable[float], codes: F32 | None, alike: float) -> Iterator[int]:
    state, policy = ShiftState(), ShiftPolicy()
    for k, value in enumerate(p):
        state, shift = observe(state, float(value), policy, None if codes is None else codes[k], alike)
        if shift is not None:
            state = state.restart()
            yield k + 1


class _Played:
    """`Encoder` of frames whose first pixels are the number of a frame of the film: nothing is encoded twice."""

    input_size = (2, 2)

    def __init__(self, encoder: Encoder, film: Film) -> None:
        self.digest, self.taps = encoder.digest, tuple(Tap(t.name, t.shape) for t in pooled_taps(encoder))
        self._features = {t: x.reshape(-1, x.shape[-1]) for t, x in film.features.items()}

    def encode(self, frames: U8, taps: Sequence[str]) -> dict[str, F32]:
        at = frames.reshape(len(frames), -1)[:, :4].copy().view(np.int32)[:, 0]
        return {t: self._features[t][at] for t in taps}


class _Truth:
    def __init__(self, film: Film) -> None:
        self._film, self.shown = film, list[int]()

    def label(self, at: Sequence[int]) -> Sequence[str | None]:
        return [str(self._film.labels[self.shown[n - 1] // FRAMES]) for n in at]

    def domain(self, at: Sequence[int]) -> str:
        return f"domain-{at[0]}"


def _board(encoder: Encoder, film: Film, seed: int) -> dict[str, Any]:
    """A board that starts empty, on video of one domain; each scene lasts for 1 to `FRAMES` frames."""
    print(f"video: board, seed {seed}", file=sys.stderr, flush=True)
    played, truth, told = _Played(encoder, film), _Truth(film), list[BoardEvent]()
    start = System(encoder.digest, HypervectorSpace(pooled_taps(encoder)))
    policy = BoardPolicy(views=("plain",), adapt=AdaptPolicy(search=SearchPolicy(specs=20), spatial=False))
    board = Board(Live(start, start), played, truth, lambda: 0.0, policy, seed=seed, on_event=told.append)
    rng = np.random.default_rng([seed, 3])
    for _ in range(140 + WATCHED):
        scene = int(rng.integers(len(film.labels)))
        for k in range(int(rng.integers(1, FRAMES + 1))):
            truth.shown.append(scene * FRAMES + k)
            pixels = np.zeros(12, np.uint8)
            pixels[:4] = np.array([truth.shown[-1]], np.int32).view(np.uint8)
            board.step(pixels.reshape(2, 2, 3))
    count = {kind: sum(isinstance(e, kind) for e in told) for kind in (Grown, Shifted, RolledBack)}
    labels = sum(e.frames for e in told if isinstance(e, Searching)) or sum(isinstance(e, LabelsWanted) for e in told)
    return {
        "seed": seed,
        "frames": len(truth.shown),
        "domains": len(board.system.domains),
        "grown": count[Grown],
        "shifts": count[Shifted],
        "rolled_back": count[RolledBack],
        "labels": labels,
    }


def _names(encoder: Encoder) -> list[str]:
    return [t.name for t in pooled_taps(encoder)]
