"""The data sets of the benchmarks, as features: unpacked once into the cache folder, encoded once.

Rules of this file:

1. Data stay outside the repository: archives come from `EDGEEAR_DATA`, folders DOMAIN/CLASS/files lie in the cache.
2. A folder appears whole or not at all: written beside under a temporary name, then renamed.
3. A seed picks 90 % of the training images, or the shots of a class; test images never change.
"""

from __future__ import annotations

import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from device.encoder.session import OnnxEncoder
from device.evaluation.data import I64, DataOptions, open_encoder, read_domains
from device.files import cache_dir
from device.images.dataset import read_folder, split
from device.images.decode import decode
from edgeear.errors import DataError
from edgeear.space import HypervectorSpace, SpacePolicy
from edgeear.types import F32, U8

ORDER = ("photo", "art_painting", "cartoon", "sketch")
SUBSAMPLE = 0.9
CLIP, CLIPS = 2048, 40
"""Samples of a vibration clip, and clips taken of each recording, without overlap."""
CORRUPTIONS = ("noise", "blur", "brightness", "hue")
FLAT = SpacePolicy(magnitude_scale=0.0, shallow_weight=1.0, deviation_weight=1.0, levels=0)
"""The bundling of HDFF: directions only, every tap alike."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """Features of some images, and the codes that are computed from them on demand and kept."""

    features: dict[str, F32]
    space: HypervectorSpace

    def __len__(self) -> int:
        return len(next(iter(self.features.values())))

    @cached_property
    def h(self) -> F32:
        """Hypervectors `(samples, D)`."""
        return self.space.encode(self.features)

    @cached_property
    def flat(self) -> F32:
        """Hypervectors `(samples, D)` as HDFF bundles them."""
        policy = replace(FLAT, dimensions=self.space.policy.dimensions, seed=self.space.policy.seed)
        return HypervectorSpace(self.space.taps, policy).encode(self.features)

    @cached_property
    def taps(self) -> F32:
        """All taps side by side, each at length one, `(samples, sum of channels)`: no projection."""
        parts = [self.features[t.name] for t in self.space.taps]
        return np.concatenate([x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in parts], axis=1)

    @property
    def last(self) -> F32:
        """The deepest mean of a feature map `(samples, channels)`: what published methods take."""
        means = [t.name for t in self.space.taps if t.name.endswith(".mean")]
        return self.features[means[-1] if means else self.space.taps[-1].name]

    def take(self, rows: NDArray[np.generic]) -> Inputs:
        """Some rows, without the codes of the others."""
        return Inputs({t: x[rows] for t, x in self.features.items()}, self.space)

    def fresh(self) -> Inputs:
        """The same images, no code computed yet: for measuring times."""
        return Inputs(self.features, self.space)


@dataclass(frozen=True, eq=False)
class Split:
    """One domain: training and test images with labels `(samples,)` into the classes of the data set."""

    name: str
    train: Inputs
    train_labels: I64
    test: Inputs
    test_labels: I64


@dataclass(frozen=True, eq=False)
class DataSet:
    name: str
    classes: tuple[str, ...]
    domains: tuple[Split, ...]


@lru_cache(maxsize=3)
def whole(name: str) -> DataSet:
    """All images of `pacs`, `digits`, `cwru`, `textures` or `corrupted`, in the space of seed 0."""
    encoder, _ = open_encoder(DataOptions(Path()))
    order = ORDER if name == "pacs" else None
    options = DataOptions(folder(name), order, workers=int(os.environ.get("EDGEEAR_BENCH_WORKERS", "1")))
    found = read_domains(options, encoder, lambda *_: None, views=("plain",))
    domains = tuple(
        Split(d.name, Inputs(d.train[0], found.space), d.train_labels, Inputs(d.test, found.space), d.test_labels)
        for d in found.domains
    )
    return DataSet(name, found.classes, domains)


def prepare(name: str) -> list[dict[str, object]]:
    """Unpack and encode a data set, so that jobs only read; what it holds."""
    data = whole(name)
    return [
        {"data": name, "train": sum(len(d.train) for d in data.domains), "test": sum(len(d.test) for d in data.domains)}
    ]


@lru_cache(maxsize=2)
def seeded(name: str, seed: int, shots: int | None = None) -> DataSet:
    """`whole(name)` with the training images and the hypervector space of a seed."""
    data = whole(name)
    space = HypervectorSpace(data.domains[0].train.space.taps, SpacePolicy(seed=seed))
    domains = []
    for number, d in enumerate(data.domains):
        rows = _rows(d.train_labels, np.random.default_rng([seed, number]), shots)
        train = Inputs({t: x[rows] for t, x in d.train.features.items()}, space)
        domains.append(Split(d.name, train, d.train_labels[rows], Inputs(d.test.features, space), d.test_labels))
    return DataSet(name, data.classes, tuple(domains))


def _rows(labels: I64, rng: np.random.Generator, shots: int | None) -> I64:
    if shots is None:
        return np.sort(rng.permutation(len(labels))[: round(SUBSAMPLE * len(labels))])
    picked = [rng.permutation(np.flatnonzero(labels == c))[:shots] for c in np.unique(labels)]
    return np.sort(np.concatenate(picked))


# -------------------------------------------------------------------------------------------------- folders


def folder(name: str) -> Path:
    """The folder DOMAIN/CLASS/files of a data set, made first where it is not there."""
    makers: dict[str, tuple[str, Callable[[Path], None]]] = {
        "pacs": ("PACS", lambda to: _unpack("PACS.tar.gz", "PACS", to)),
        "digits": ("Digits", lambda to: _unpack("Digits_tree.tar.gz", "Digits/tree", to)),
        "textures": ("DTD10", lambda to: _unpack("DTD10.tar.gz", "DTD10", to)),
        "cwru": (f"CWRU-{CLIP}x{CLIPS}", lambda to: spectrograms(_archive("cwru_12k.npz"), to)),
        "corrupted": ("PACS-photo-corrupted", lambda to: corrupt(folder("pacs"), to)),
    }
    place, make = makers[name]
    target = cache_dir() / place
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix="unpack-", dir=target.parent))
        try:
            make(fresh / "data")
            os.replace(fresh / "data", target)
        finally:
            shutil.rmtree(fresh)
    return target


def _archive(name: str) -> Path:
    path = Path(os.environ.get("EDGEEAR_DATA", ""), name)
    if not path.is_file():
        raise DataError(f"{path}: not found; set EDGEEAR_DATA to the folder that holds {name}")
    return path


def _unpack(name: str, inside: str, target: Path) -> None:
    with tarfile.open(_archive(name)) as archive:
        archive.extractall(target.parent, filter="data")
    os.replace(target.parent / inside, target)


def spectrograms(archive: Path, target: Path) -> None:
    """Bearing vibration as pictures: domain = bearing end and motor speed, class = fault and its size.

    A picture is the log-spectrogram of a clip of one recording, taken by the sensor at the damaged bearing. The outer
    ring's faults are taken where the load is (@6), else at the position that was recorded.
    """
    with np.load(archive) as recordings:
        for key, kind in sorted(_recordings(recordings.files).items()):
            end, speed, fault = kind
            place = target / f"{end}_{speed}" / fault
            place.mkdir(parents=True, exist_ok=True)
            signal = recordings[f"{key}|{end}"].astype(np.float32)
            for number in range(min(CLIPS, len(signal) // CLIP)):
                picture = Image.fromarray(_spectrogram(signal[number * CLIP : (number + 1) * CLIP]))
                picture.save(place / f"{number:03}.png")


def _recordings(files: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """Recording -> (end, speed, fault); one outer-ring position for each fault of a domain."""
    chosen: dict[tuple[str, str, str], str] = {}
    for key in sorted({name.split("|")[0] for name in files}, key=lambda k: ("OR" in k and "@6" not in k, k)):
        match = re.fullmatch(r"(\d+)_(B|IR|OR)(?:@\d+)?_(\d+)_(DE12|FE)", key)
        if match:
            speed, fault, size, end = match.groups()
            chosen.setdefault((end[:2], speed, f"{fault}{size}"), key)
    return {key: kind for kind, key in chosen.items()}


def _spectrogram(signal: F32, window: int = 256) -> U8:
    """80 dB of level over frequency (upwards) and time, 224 x 224, grey as RGB."""
    hop = max(1, (len(signal) - window) // 224)
    frames = np.lib.stride_tricks.sliding_window_view(signal - signal.mean(), window)[::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(window), axis=1))
    decibel = 20 * np.log10(np.maximum(power, 1e-10))
    levels = np.clip(1 + (decibel - decibel.max()) / 80, 0, 1).T[::-1] * 255
    grey = Image.fromarray(np.rint(levels).astype(np.uint8)).resize((224, 224), Image.Resampling.BILINEAR)
    return np.repeat(np.asarray(grey)[:, :, None], 3, axis=2)


def corrupt(pacs: Path, target: Path) -> None:
    """The test photographs under each corruption, three strengths in turn: domain = corruption."""
    items = split(read_folder(pacs, ("photo",)).items["photo"])[1]
    size = OnnxEncoder(open_encoder(DataOptions(Path()))[1]).input_size
    for number, item in enumerate(items):
        frame = decode(item.path, size)
        for how in CORRUPTIONS:
            place = target / how / item.path.parent.name
            place.mkdir(parents=True, exist_ok=True)
            changed = corrupted(frame, how, number % 3, np.random.default_rng(number))
            Image.fromarray(changed).save(place / f"{number:04}.jpg", quality=95)


def corrupted(frame: U8, how: str, strength: int, rng: np.random.Generator) -> U8:
    """A frame `(height, width, 3)` as a worse sensor would give it; `strength` 0 to 2."""
    x = frame.astype(np.float32)
    if how == "noise":
        x = x + rng.normal(0, (20, 35, 50)[strength], x.shape).astype(np.float32)
    elif how == "blur":
        blurred = Image.fromarray(frame).filter(ImageFilter.GaussianBlur((2, 3, 4)[strength]))
        x = np.asarray(blurred, np.float32)
    elif how == "brightness":
        x = x * (0.5, 0.35, 1.8)[strength]
    elif how == "hue":
        hsv = np.array(Image.fromarray(frame).convert("HSV"))
        hsv[..., 0] += np.uint8((64, 128, 192)[strength])
        x = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"), np.float32)
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)
