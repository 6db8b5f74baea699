"""Small stand-ins for the core's tests: an encoder of a few matrix products, and domains of 8 x 8 frames.

A synthetic domain has a background colour; a class is one of a few fixed textures in any domain. So
domains and classes are separable by construction, and what fails to tell them apart is at fault.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from adaptors.archive import HeadArchive, pack
from adaptors.search import SearchPolicy
from adaptors.spec import HeadSpec
from adaptors.train import TrainPolicy, train
from device.encoder.engine import OrtEngine
from edgeear.learned import learned
from edgeear.memory import I64
from edgeear.samples import AdaptPolicy, Samples
from edgeear.shift import ShiftPolicy
from edgeear.space import HypervectorSpace, SpacePolicy
from edgeear.system import Domain, System, SystemPolicy
from edgeear.types import F32, U8, Features, Tap

SIZE = 8
CLASSES = ("rows", "columns", "half")
BACKGROUNDS = ((200, 40, 40), (40, 190, 60), (40, 60, 210), (190, 180, 30), (130, 30, 170), (30, 180, 190))
TAPS = (Tap("a.mean", (12,)), Tap("a.std", (12,)), Tap("b.mean", (16,)), Tap("b.std", (16,)), Tap("b.map", (16, 2, 2)))
POOLED = tuple(t for t in TAPS if not t.spatial)
ENCODER = hashlib.sha256(b"fake encoder").hexdigest()
M = 32
QUICK = AdaptPolicy(search=SearchPolicy(specs=12), train=TrainPolicy(epochs=12), spatial=False)
"""A real search, of a few specifications."""


class FakeEncoder:
    """`edgeear.types.Encoder` in numpy: two layers of random 2 x 2 patches, four pooled taps and a spatial one.

    `asked` holds the taps of every call, in order."""

    digest = ENCODER
    taps = TAPS
    input_size = (SIZE, SIZE)

    def __init__(self) -> None:
        rng = np.random.default_rng(7)
        self._first = rng.normal(0, 0.5, (12, 12)).astype(np.float32)
        self._second = rng.normal(0, 0.3, (48, 16)).astype(np.float32)
        self.asked: list[tuple[str, ...]] = []

    def encode(self, frames: U8, taps: Sequence[str]) -> dict[str, F32]:
        self.asked.append(tuple(taps))
        a = np.maximum(_patches(frames.astype(np.float32) / np.float32(128) - np.float32(1)) @ self._first, 0)
        b = np.maximum(_patches(a.reshape(len(a), 4, 4, 12)) @ self._second, 0)
        every = {"a.mean": a.mean(1), "a.std": a.std(1), "b.mean": b.mean(1), "b.std": b.std(1)}
        every["b.map"] = np.ascontiguousarray(b.transpose(0, 2, 1).reshape(len(b), 16, 2, 2))
        return {t: every[t] for t in taps}


def _patches(x: F32) -> F32:
    """`(samples, side, side, channels)` to its 2 x 2 patches, `(samples, (side / 2)**2, 4 channels)`."""
    n, side, _, channels = x.shape
    half = side // 2
    cut = x.reshape(n, half, 2, half, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    return np.ascontiguousarray(cut.reshape(n, half * half, 4 * channels))


def pattern(name: str) -> NDArray[np.bool_]:
    """Where the object of a class is, `(SIZE, SIZE)`."""
    y, x = np.mgrid[:SIZE, :SIZE]
    masks = {
        "rows": y % 2 == 0,
        "columns": x % 2 == 0,
        "half": x < SIZE // 2,
        "checks": (x + y) % 2 == 0,
        "all": x >= 0,
    }
    mask: NDArray[np.bool_] = masks[name]
    return mask


def frames(background: int, classes: Sequence[str], labels: I64, seed: int) -> U8:
    """Frames `(samples, SIZE, SIZE, 3)` of a domain: brighter where the class has its pattern, with pixel noise."""
    rng = np.random.default_rng([background, seed])
    base = np.array(BACKGROUNDS[background], np.float32)
    masks = np.stack([pattern(c) for c in classes])[labels][..., None]
    gain = rng.uniform(40, 60, (len(labels), 1, 1, 1))
    x = base * rng.uniform(0.9, 1.1, (len(labels), 1, 1, 1)) + gain * masks + rng.normal(0, 6, (*masks.shape[:3], 3))
    return np.clip(x, 0, 255).astype(np.uint8)


def labels_of(n: int, classes: int = 3) -> I64:
    """As many of each class as fit, in turn."""
    return np.arange(n, dtype=np.int64) % classes


def features(background: int, n: int = 60, seed: int = 0, classes: Sequence[str] = CLASSES) -> Features:
    """All taps of `n` frames of a domain, labelled `labels_of(n, len(classes))`."""
    shown = frames(background, classes, labels_of(n, len(classes)), seed)
    return FakeEncoder().encode(shown, [t.name for t in TAPS])


def samples(background: int, n: int = 60, name: str = "", classes: Sequence[str] = CLASSES) -> Samples:
    """Labelled samples of a domain, called `d<background>` unless named."""
    seen = features(background, n, classes=classes)
    return Samples(name or f"d{background}", [seen], labels_of(n, len(classes)), tuple(classes))


@lru_cache(maxsize=1)
def space() -> HypervectorSpace:
    return HypervectorSpace(POOLED, SpacePolicy(dimensions=256, levels=M))


def empty(**policy: object) -> System:
    """A system that has learned nothing; `policy` changes the fields of its `SystemPolicy`."""
    quick = SystemPolicy(memory_dimensions=M, codes=40, shift=ShiftPolicy(false_alarm_rate=1e-3))
    return System(ENCODER, space(), replace(quick, **policy))  # type: ignore[arg-type]


def head(given: Samples, spec: HeadSpec, seed: int = 0) -> HeadArchive:
    """A head of `spec`, really fitted and packed."""
    shapes = {t: x.shape[1:] for t, x in given.views[0].items()}
    fitted = train(spec, shapes, given.views, given.labels, len(given.classes), TrainPolicy(seed=seed, epochs=3))
    return pack(spec, {t: shapes[t] for t in spec.inputs}, given.classes, fitted.weights, seed)


@lru_cache(maxsize=64)
def domain(background: int, name: str = "", n: int = 60, spec: HeadSpec | None = None) -> Domain:
    """A learned domain, without any search. The same arguments give the same object."""
    given = samples(background, n, name)
    h = space().encode(given.views[0])
    fitted = head(given, spec or HeadSpec(("b.mean", "b.std")))
    return learned(empty(), given.name, h, given.labels, given.classes, fitted, {}, 0)


def grown(*backgrounds: int, **policy: object) -> System:
    """A system of these domains, put in without admission."""
    system = empty(**policy)
    for background in backgrounds:
        system = system.grown(domain(background))
    return system


def engine() -> OrtEngine:
    return OrtEngine(FakeEncoder())
