"""From a folder of domains to the arrays that the benchmarks need: split, featurised and encoded.

Rules of this file:

1. The encoder sees an image once for each view: features come from the feature cache.
2. Test images are only used plain, and never for learning.
3. Labels index the classes of the whole data set. `samples` converts them to the labels of one domain, by name.
4. What makes a figure weaker than it looks is a warning: copied files, classes without an image, skipped files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adaptors.progress import Progress
from device.encoder.session import notes_of, pooled_taps
from device.files import cache_dir
from device.images.dataset import FolderData, Item, listed, read_folder, shots, split
from device.images.feature_cache import FeatureCache
from device.images.featurise import OnBad, featurise_items
from edgeear.errors import DataError, UsageError
from edgeear.samples import Samples
from edgeear.space import HypervectorSpace
from edgeear.types import F32, Encoder

I64 = NDArray[np.int64]

CACHE_BYTES = 6 << 30
TRAINING_VIEWS = ("plain", "flip")


@dataclass(frozen=True)
class DataOptions:
    """Which images to use, and how.

    `order` None takes all domains, sorted. `shots` is the number of training images of each class, None for all.
    `spatial` is how many of the encoder's last spatial taps are used. The default is none: closed-form heads on the
    pooled taps do better on small data, and maps multiply the memory. `test_on_rest` adds the training images that
    `shots` leaves out to the test images. `cache` is the folder of the feature cache, None for the default one.
    `on_bad` says whether a file that cannot be decoded stops the run or is left out.
    """

    data: Path
    order: tuple[str, ...] | None = None
    shots: int | None = None
    seed: int = 0
    spatial: int = 0
    test_on_rest: bool = False
    workers: int = 2
    encoder: Path | None = None
    cache: Path | None = None
    on_bad: OnBad = "raise"

    def __post_init__(self) -> None:
        if self.shots is not None and self.shots < 1:
            raise UsageError(f"shots is {self.shots}: give at least 1 image a class, or None for all")
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}: it must not be negative")


@dataclass(frozen=True, eq=False)
class DomainData:
    """One domain: training views (plain first) and test features, labels `(samples,)` into the data set's classes,
    hypervectors `(samples, D)` of the plain images, and the paths of the test images."""

    name: str
    train: tuple[dict[str, F32], ...]
    train_labels: I64
    train_h: F32
    test: dict[str, F32]
    test_labels: I64
    test_h: F32
    test_paths: tuple[Path, ...]

    def samples(self, classes: Sequence[str]) -> Samples:
        """The training images as `adapt` takes them: with the domain's own classes only."""
        own, labels = np.unique(self.train_labels, return_inverse=True)
        return Samples(self.name, self.train, labels.astype(np.int64), tuple(classes[c] for c in own))

    def of_classes(self, name: str, wanted: Sequence[int]) -> DomainData:
        """The images of this domain whose classes have the given indices."""
        train = np.flatnonzero(np.isin(self.train_labels, wanted))
        test = np.flatnonzero(np.isin(self.test_labels, wanted))
        return DomainData(
            name,
            tuple({t: x[train] for t, x in view.items()} for view in self.train),
            self.train_labels[train],
            self.train_h[train],
            {t: x[test] for t, x in self.test.items()},
            self.test_labels[test],
            self.test_h[test],
            tuple(self.test_paths[i] for i in test),
        )


@dataclass(frozen=True, eq=False)
class EvalData:
    """A featurised data set. `warnings` are sentences about the data and the cache."""

    domains: tuple[DomainData, ...]
    classes: tuple[str, ...]
    space: HypervectorSpace
    warnings: tuple[str, ...]


def open_encoder(options: DataOptions) -> tuple[Encoder, Path]:
    """The encoder that the options name, or the default one, which is exported if it is missing."""
    from device.encoder.session import OnnxEncoder

    path = options.encoder
    if path is None:
        from device.encoder.export import default_encoder_path

        path = default_encoder_path(cache_dir())
    return OnnxEncoder(path), path


def read_domains(
    options: DataOptions, encoder: Encoder, on_progress: Progress, views: Sequence[str] = TRAINING_VIEWS
) -> EvalData:
    """Read, split and featurise every domain.

    Raises `DataError` for a missing domain, a domain without a test image, a file that cannot be decoded (unless
    `on_bad` skips it) and for features that are not finite.
    """
    folder = read_folder(options.data, options.order)
    space = HypervectorSpace(pooled_taps(encoder))
    taps = [t.name for t in space.taps]
    taps += [t.name for t in encoder.taps if t.spatial][-options.spatial :] if options.spatial else []
    cache = FeatureCache(options.cache or cache_dir() / "features", CACHE_BYTES)
    reader = _Reader(options, encoder, taps, cache, on_progress)
    domains = tuple(reader.domain(folder, name, space, views) for name in folder.domains)
    warnings = (*notes_of(encoder), *folder.warnings, *cache.warnings, *reader.bad.values(), *reader.warnings)
    return EvalData(domains, folder.classes, space, warnings)


class _Reader:
    """Reads one domain after another and collects the warnings."""

    def __init__(
        self, options: DataOptions, encoder: Encoder, taps: list[str], cache: FeatureCache, on_progress: Progress
    ) -> None:
        self.options, self.encoder, self.taps = options, encoder, taps
        self.cache, self.on_progress = cache, on_progress
        self.bad: dict[tuple[Path, ...], str] = {}
        self.warnings: list[str] = []

    def domain(self, folder: FolderData, name: str, space: HypervectorSpace, views: Sequence[str]) -> DomainData:
        train, test = split(folder.items[name])
        if self.options.shots is not None:
            every, train = train, shots(train, self.options.shots, self.options.seed)
            if self.options.test_on_rest:
                test = (*test, *sorted(set(every) - set(train), key=lambda item: item.relative))
        tested, test_features = self._features(test, name, "plain")
        if not tested:
            chosen = f"a fifth is tested, chosen by file name, and none of its {len(folder.items[name])} images was"
            raise DataError(f"domain {name!r} has no test image: {chosen}; add images")
        seen = [self._features(train, name, view) for view in views]
        trained, features = seen[0][0], tuple(f for _, f in seen)
        self.warnings += _gaps(folder, name, _labels(trained), _labels(tested))
        self.warnings += _copies(name, *(_contents(part, space) for part in (features[0], test_features)))
        return DomainData(
            name,
            features,
            _labels(trained),
            space.encode(features[0]),
            test_features,
            _labels(tested),
            space.encode(test_features),
            tuple(item.path for item in tested),
        )

    def _features(self, items: Sequence[Item], name: str, view: str) -> tuple[tuple[Item, ...], dict[str, F32]]:
        found = featurise_items(
            items,
            self.encoder,
            self.taps,
            view=view,
            cache=self.cache,
            on_progress=lambda _, *at: self.on_progress(f"{name}: features ({view})", *at),
            workers=self.options.workers,
            on_bad=self.options.on_bad,
        )
        for bad in found.bad:  # a bad file is bad in every view: name it once
            self.bad.setdefault(bad.paths, str(bad))
        return found.items, found.features


def _labels(items: Sequence[Item]) -> I64:
    return np.array([item.label for item in items], np.int64)


def _gaps(folder: FolderData, name: str, trained: I64, tested: I64) -> list[str]:
    """Which classes of a domain lack a training or a test image, of those with more than one file."""
    counts = np.bincount([item.label for item in folder.items[name]], minlength=len(folder.classes))
    found = []
    for labels, what in (
        (trained, "no labelled image that can be read"),
        (tested, "no test image, so no accuracy covers them"),
    ):
        absent = [c for label, c in enumerate(folder.classes) if counts[label] > 1 and label not in labels]
        if absent:
            found.append(f"domain {name}: {len(absent)} classes have {what}: {listed(absent)}")
    return found


def _contents(features: dict[str, F32], space: HypervectorSpace) -> list[int]:
    """A hash for each image. The encoder gives equal pixels equal bits, whatever their file names and formats."""
    parts = [features[tap.name] for tap in space.taps]
    return [hash(b"".join(x.tobytes() for x in row)) for row in zip(*parts, strict=True)]


def _copies(name: str, trained: Sequence[int], tested: Sequence[int]) -> list[str]:
    """What repeated images do to the counts of a domain and to its accuracy."""
    total, known = len(trained) + len(tested), set(trained)
    copies, leaked = total - len({*trained, *tested}), sum(content in known for content in tested)
    found = []
    if copies:
        found.append(f"domain {name}: {copies} of {total} files are copies of another file and tell nothing new")
    if leaked:
        what = "test files are copies of training files, so its accuracy is too high"
        found.append(f"domain {name}: {leaked} of {len(tested)} {what}")
    return found
