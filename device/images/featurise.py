"""Features of many files: read from the cache, or decoded and encoded on a few threads.

Rules of this file:
1. Results do not depend on the cache: spatial taps are rounded to float16 with and without it.
2. All pooled taps of the encoder are computed and stored together, each spatial tap separately.
3. A file that cannot be decoded does not stop the others: they are encoded and cached first, then it is reported.
4. Features are stored under the digest of the bytes that were decoded.
5. An interruption or a kill loses only the batches in progress.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from adaptors.progress import Progress
from device.images.dataset import Item
from device.images.decode import UndecodableInput, decode_bytes, read_input
from device.images.feature_cache import Array, FeatureCache, FeatureKey
from device.images.views import view as augment
from edgeear.errors import DataError, UsageError
from edgeear.types import F32, Encoder, Tap

BATCH = 8
DECODER = 2
"""Raise it when `decode.py` or `views.py` changes the pixels of the same bytes: it is part of every cache key."""

OnBad = Literal["raise", "skip"]


@dataclass(frozen=True)
class Featurised:
    """`features[tap]` is `(len(items), *tap.shape)` float32; `bad` says which files were left out and why."""

    items: tuple[Item, ...]
    features: dict[str, F32]
    bad: tuple[UndecodableInput, ...]


def featurise(
    items: Sequence[Item],
    encoder: Encoder,
    taps: Sequence[str],
    *,
    view: str = "plain",
    cache: FeatureCache | None = None,
    on_progress: Progress | None = None,
    workers: int = 2,
) -> dict[str, F32]:
    """Features of the named taps, in item order: tap name -> `(len(items), *tap.shape)` float32.

    `on_progress("features", done, total)` is called on this thread, for the first time after the cache was read.
    Raises `UndecodableInput` for all bad files together after the good ones are cached, `DataError` for NaN
    features, `UsageError` for an unknown tap or view, no tap or no worker.
    """
    return featurise_items(
        items, encoder, taps, view=view, cache=cache, on_progress=on_progress, workers=workers
    ).features


def featurise_items(
    items: Sequence[Item],
    encoder: Encoder,
    taps: Sequence[str],
    *,
    view: str = "plain",
    cache: FeatureCache | None = None,
    on_progress: Progress | None = None,
    workers: int = 2,
    on_bad: OnBad = "raise",
) -> Featurised:
    """As `featurise`. With `on_bad="skip"` the result leaves out files that cannot be decoded, and lists them."""
    if workers < 1:
        raise UsageError(f"workers={workers}: at least 1 thread is needed")
    run = _Run(tuple(items), encoder, tuple(taps), view, cache, on_progress)
    run.read_cache()
    run.encode_missing(workers)
    bad = tuple(run.bad[place] for place in sorted(run.bad))
    if bad and on_bad == "raise":
        raise UndecodableInput.of_many(bad)
    kept = [place for place in range(len(items)) if place not in run.bad]
    features = {name: out[kept] for name, out in run.out.items()} if bad else run.out
    return Featurised(tuple(items[place] for place in kept), features, bad)


@dataclass(frozen=True)
class _Group:
    """Taps that share a cache row: all pooled ones, concatenated, as float32, or a spatial one as float16."""

    name: str
    taps: tuple[Tap, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.taps[0].shape if self.taps[0].spatial else (sum(tap.channels for tap in self.taps),)

    def pack(self, features: Mapping[str, F32], row: int, path: Path) -> Array:
        """What is stored for the image of `path`. Raises `DataError` for NaN or infinity."""
        values = np.concatenate([features[tap.name][row].ravel() for tap in self.taps]).reshape(self.shape)
        if not np.isfinite(values).all():
            raise DataError(f"{path}: the encoder gave NaN or infinity ({self.name}): check the encoder's file")
        if not self.taps[0].spatial:
            return values
        limit = np.finfo(np.float16).max
        return values.clip(-limit, limit).astype(np.float16)

    def unpack(self, stored: Array, out: Mapping[str, F32], row: int) -> None:
        """Copy the result of `pack` into row `row` of each of its taps that is in `out`."""
        start = 0
        for tap in self.taps:
            if tap.spatial:
                out[tap.name][row] = stored
            elif tap.name in out:
                out[tap.name][row] = stored[start : start + tap.channels]
            start += tap.channels


def _groups(encoder: Encoder, names: Sequence[str]) -> tuple[_Group, ...]:
    known = {tap.name: tap for tap in encoder.taps}
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise UsageError(f"taps {unknown or 'missing'}: name at least one of {', '.join(known)}")
    wanted = [known[name] for name in dict.fromkeys(names)]
    groups = [_Group(tap.name, (tap,)) for tap in wanted if tap.spatial]
    if any(not tap.spatial for tap in wanted):
        pooled = tuple(tap for tap in encoder.taps if not tap.spatial)
        groups.insert(0, _Group("pooled taps", pooled))
    return tuple(groups)


@dataclass(frozen=True)
class _Encoded:
    """A finished batch: for each item its index, the digest of its content, and one array for each group."""

    rows: tuple[tuple[int, bytes, tuple[Array, ...]], ...]
    bad: dict[int, UndecodableInput]


@dataclass
class _Run:
    """The state of one call of `featurise`."""

    items: tuple[Item, ...]
    encoder: Encoder
    taps: tuple[str, ...]
    view: str
    cache: FeatureCache | None
    on_progress: Progress | None
    groups: tuple[_Group, ...] = field(init=False)
    out: dict[str, F32] = field(init=False)
    missing: list[int] = field(init=False)
    bad: dict[int, UndecodableInput] = field(default_factory=dict)

    def __post_init__(self) -> None:
        augment(np.zeros((2, 2, 3), np.uint8), self.view)  # refuses an unknown view before any work
        self.groups = _groups(self.encoder, self.taps)
        shapes = {tap.name: tap.shape for tap in self.encoder.taps}
        self.out = {name: np.empty((len(self.items), *shapes[name]), np.float32) for name in self.taps}
        self.missing = list(range(len(self.items)))

    def key(self, content: bytes, group: _Group) -> FeatureKey:
        height, width = self.encoder.input_size
        pixels = f"{self.view}/{height}x{width}/decoder{DECODER}"
        return FeatureKey(content, self.encoder.digest, pixels, tuple(tap.name for tap in group.taps))

    def read_cache(self) -> None:
        if self.cache is not None:
            self.missing = [place for place in self.missing if not self._cached(self.cache, place)]
        self._report(len(self.missing))

    def _cached(self, cache: FeatureCache, place: int) -> bool:
        """Fill the row of an item; False unless the cache holds all of it."""
        try:
            content = hashlib.sha256(read_input(self.items[place].path)).digest()
        except UndecodableInput:
            return False
        for group in self.groups:
            row = cache.get(self.key(content, group))
            if row is None or row.shape != group.shape:
                return False
            group.unpack(row, self.out, place)
        return True

    def encode_missing(self, workers: int) -> None:
        """Encode the missing items. Finished batches are stored even if this is interrupted."""
        batches = [self.missing[start : start + BATCH] for start in range(0, len(self.missing), BATCH)]
        left = len(self.missing)
        pool = ThreadPoolExecutor(workers, thread_name_prefix="featurise")
        try:
            for batch, encoded in _in_order(pool, self._encode, batches, 2 * workers):
                self._take(encoded)
                left -= len(batch)
                self._report(left)
        finally:
            pool.shutdown(cancel_futures=True)

    def _encode(self, places: Sequence[int]) -> _Encoded:
        """Decode, augment and encode one batch. Runs on a worker thread: uses neither the cache nor the results."""
        good: list[tuple[int, bytes]] = []
        frames, bad = [], {}
        for place in places:
            path = self.items[place].path
            try:
                data = read_input(path)
                frames.append(augment(decode_bytes(data, path, self.encoder.input_size), self.view))
                good.append((place, hashlib.sha256(data).digest()))
            except UndecodableInput as error:
                bad[place] = error
        if not good:
            return _Encoded((), bad)
        names = [tap.name for group in self.groups for tap in group.taps]
        features = self.encoder.encode(np.stack(frames), names)
        rows = [
            (
                place,
                content,
                tuple(group.pack(features, row, self.items[place].path) for group in self.groups),
            )
            for row, (place, content) in enumerate(good)
        ]
        return _Encoded(tuple(rows), bad)

    def _take(self, encoded: _Encoded) -> None:
        self.bad.update(encoded.bad)
        for place, content, arrays in encoded.rows:
            for group, array in zip(self.groups, arrays, strict=True):
                group.unpack(array, self.out, place)
                if self.cache is not None:
                    self.cache.put(self.key(content, group), array)

    def _report(self, left: int) -> None:
        if self.on_progress is not None:
            self.on_progress("features", len(self.items) - left, len(self.items))


def _in_order(
    pool: ThreadPoolExecutor,
    work: Callable[[list[int]], _Encoded],
    batches: Sequence[list[int]],
    ahead: int,
) -> Iterator[tuple[list[int], _Encoded]]:
    """Results in the order of the batches. At most `ahead` batches are in the pool, which bounds the memory."""
    queue: deque[tuple[list[int], Future[_Encoded]]] = deque()
    for batch in batches:
        queue.append((batch, pool.submit(work, batch)))
        if len(queue) >= ahead:
            first, future = queue.popleft()
            yield first, future.result()
    while queue:
        first, future = queue.popleft()
        yield first, future.result()
