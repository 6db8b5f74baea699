"""The pictures that a fleet is shown, decoded once and shared by all its devices.

If a domain has enough pictures, those that the factory learns from are never shown to a device. Each device sees the
pictures in an order of its own and starts again when it has seen all.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from adaptors.progress import Progress
from device.images.dataset import FolderData, Item, read_folder, split
from device.images.decode import UndecodableInput, decode
from edgeear.errors import DataError
from edgeear.types import U8

LESSONS = 140
"""Labelled frames of the factory, at most half of what there is."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A `frame (height, width, 3)`, its class, and the file that it is from."""

    frame: U8
    label: str
    ref: str


@dataclass(frozen=True, eq=False)
class Pictures:
    """`lessons` of the first domain, for the factory; `shown` by domain, for the devices."""

    domains: tuple[str, ...]
    lessons: Sequence[Picture]
    shown: Mapping[str, Sequence[Picture]]

    def endless(self, domain: str, seed: int) -> Iterator[Picture]:
        """The pictures of a domain in a random order, again and again."""
        order = np.random.default_rng([self.domains.index(domain), seed]).permutation(len(self.shown[domain]))
        while True:
            for place in order:
                yield self.shown[domain][int(place)]


def read_pictures(
    root: Path, order: tuple[str, ...] | None, size: tuple[int, int], samples: int, seed: int, show: Progress
) -> Pictures:
    """Up to `samples` pictures to show of each domain under `root`, and the factory's. Raises `DataError`."""
    data = read_folder(root, order)
    if len(data.domains) < 2:
        raise DataError(f"{root} has one domain, {data.domains[0]}: a fleet needs a second one to move to")
    shown: dict[str, list[Picture]] = {}
    lessons: list[Picture] = []
    for number, domain in enumerate(data.domains):
        items = split(data.items[domain])[0]
        places = np.random.default_rng([seed, number]).permutation(len(items))
        taught = 0 if number else min(LESSONS, len(items) // 2)
        chosen = [items[int(place)] for place in places[: taught + samples]]
        found = list(_decoded(data, chosen, size))
        if len(found) - taught < 1:
            raise DataError(f"domain {domain} has {len(found)} pictures that decode: add some")
        lessons, shown[domain] = lessons or found[:taught], found[taught:]
        show("pictures", number + 1, len(data.domains))
    return Pictures(data.domains, lessons, shown)


def png(frame: U8) -> str:
    """A frame as PNG in base64: every pixel as it is."""
    target = io.BytesIO()
    Image.fromarray(frame).save(target, "PNG")
    return base64.b64encode(target.getvalue()).decode("ascii")


def _decoded(data: FolderData, items: Sequence[Item], size: tuple[int, int]) -> Iterator[Picture]:
    """Skips files that do not decode; how sources treat them is tested elsewhere."""
    for item in items:
        try:
            yield Picture(decode(item.path, size), data.classes[item.label], item.relative)
        except UndecodableInput:
            continue
