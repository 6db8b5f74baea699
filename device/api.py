"""The Python interface, `from edgeear import Ear`: a frozen encoder and all that was learned over it, in one object.

Rules of this file:

1. `learn`, `update` and `merge` pass the same admission as on a board. A rejection is a value and changes nothing.
   A known domain is never replaced without a word.
2. The last change can be taken back with `undo`, until the next change or `save` makes it permanent.
3. Nothing touches the disk but `save` and `load`, and the cache of the default encoder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from threading import RLock
from types import MappingProxyType
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, overload

import numpy as np

from adaptors.progress import Progress
from device.encoder.cache import cached_encoder
from device.encoder.engine import OrtEngine
from device.encoder.session import OnnxEncoder, pooled_taps
from device.files import cache_dir
from device.images.dataset import listed, read_folder
from device.images.decode import SUFFIXES, UndecodableInput
from device.images.inputs import Input, frame_of
from device.images.views import view
from device.progress import shown
from device.provenance import installation
from device.state import generations
from device.state.maintenance import Changed as Changed
from device.state.store import MANIFEST, Manifest, Store
from edgeear.errors import DataError, KnownDomain, UsageError
from edgeear.flow import Prediction, adapt, infer, infer_features
from edgeear.forgetting import forget_class, forget_domain
from edgeear.memory import I64
from edgeear.merging import merge_domains
from edgeear.names import check_name
from edgeear.recognition import recognise
from edgeear.samples import AdaptPolicy, Samples
from edgeear.shift import Shift, ShiftState
from edgeear.space import HypervectorSpace
from edgeear.system import DIGEST, Candidate, Domain, Live, Recognised, Rejected, System, commit, confirm, rollback
from edgeear.types import F32, Encoder, Features
from edgeear.updating import update_domain

VIEWS = ("plain", "flip")
"""How each image is shown to training."""
SPECS = 300
"""Heads that a search scores, unless a policy says otherwise."""
FEW = 30
"""Below so many images an accuracy is a rough figure, and is called so."""
BATCH, WORKERS = 8, 2
"""Images that are encoded together, and threads that do it."""
LOOK_BACK = 30
"""Frames after a shift that are judged together: is the stream in a known domain again?"""
SILENCE = 300
"""Frames after a shift before it is announced again."""
EncoderChoice = Literal["default"] | str | Path | Encoder
Show = bool | Progress | None
"""Progress: True shows it, False does not, None only on a terminal, a function is called with (phase, done, total)."""
Images = str | Path | Iterable[Input]
T = TypeVar("T")
P = ParamSpec("P")


@dataclass(frozen=True)
class Learned:
    """A domain that was learned and serves now.

    `images` counts different pictures that were new, 0 where nothing changed, `total` all that the domain has learned.
    `validation_accuracy` (fraction of one)
    is that of its head on `validated` of them that it was not fitted to, None where there were none. `replay` maps each
    older domain to the share of its inputs that now goes to another one. `warnings` are sentences."""

    name: str
    classes: tuple[str, ...]
    images: int
    total: int
    head: str
    bytes: int
    validation_accuracy: float | None
    validated: int
    replay: dict[str, float]
    generation: int
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        accuracy = "not measured" if self.validation_accuracy is None else f"{self.validation_accuracy:.1%}"
        facts = f"validation accuracy {accuracy} (n = {self.validated}); {self.bytes / 1024:.0f} KiB; head: {self.head}"
        new = "" if self.images == self.total else f"{_count(self.images, 'new image')}, now "
        lines = [
            f"{self.name}: {new}{_count(self.total, 'image')} of {_count(len(self.classes), 'class')}"
            f" ({listed(self.classes)})",
            f"  {facts}" if self.images else "  nothing was changed: no image is new",
            *(
                f"  {share:.1%} of the inputs of {name} now go elsewhere"
                for name, share in self.replay.items()
                if share
            ),
            *(f"  warning: {warning}" for warning in self.warnings),
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Score:
    """`right` of `images` answers were right; `routed` of them came from the domain's own head, None where that domain
    is not known."""

    images: int
    right: int
    routed: int | None = None

    @property
    def accuracy(self) -> float:
        """Fraction of one."""
        return self.right / self.images

    def __str__(self) -> str:
        routed = "" if self.routed is None else f", {self.routed / self.images:.1%} answered by its own head"
        return f"{self.accuracy:.1%} of {self.images}{routed}"


@dataclass(frozen=True)
class Evaluation:
    """How many labelled images are answered right, each by the head that the router gives it. An image without an
    answer counts as wrong."""

    total: Score
    domains: dict[str, Score]
    classes: dict[str, Score]
    warnings: tuple[str, ...] = ()

    @property
    def accuracy(self) -> float:
        """Fraction of one."""
        return self.total.accuracy

    def __str__(self) -> str:
        lines = [f"accuracy {self.total}"]
        for kind, scores in (("domain", self.domains), ("class", self.classes)):
            lines += [f"  {kind} {name}: {score}" for name, score in scores.items()]
        return "\n".join([*lines, *(f"  warning: {warning}" for warning in self.warnings)])


@dataclass(frozen=True)
class _Labelled:
    """Labelled images of one domain, as they were given; `warnings` are sentences."""

    name: str
    images: tuple[Input, ...]
    labels: tuple[str, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Encoded:
    """One image: the digest of its frame, and its features `(1, *tap.shape)` in each view."""

    digest: str
    views: tuple[dict[str, F32], ...]


def _one_at_a_time(change: Callable[Concatenate[Ear, P], T]) -> Callable[Concatenate[Ear, P], T]:
    """Of the changes of one `Ear`, also where several threads make them: each starts from what the last one left."""

    @wraps(change)
    def alone(ear: Ear, /, *args: P.args, **given: P.kwargs) -> T:
        with ear._lock:
            return change(ear, *args, **given)

    return alone


class Ear:
    """A classifier that learns domain after domain over a frozen encoder, and says when an image is from none of them.

    `encoder` is "default", the path of any ONNX image network, or an object of `edgeear.Encoder`, which must allow
    calls from several threads. `policy` bounds what learning may cost. Raises `FormatError` for a file that cannot
    serve, `UsageError` for other types and seeds. Learning needs the `learn` extra.
    """

    def __init__(self, encoder: EncoderChoice = "default", *, seed: int = 0, policy: AdaptPolicy | None = None) -> None:
        if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or not 0 <= seed < 1 << 63:
            raise UsageError(f"seed {seed!r}: give a whole number from 0 to 2^63 - 1")
        if not isinstance(policy, AdaptPolicy | None):
            raise UsageError(f"policy of type {type(policy).__name__}: give an edgeear.AdaptPolicy")
        self.encoder = _opened(encoder)
        self.engine = OrtEngine(self.encoder)
        self.seed, self.policy = int(seed), policy
        empty = System(self.encoder.digest, HypervectorSpace(pooled_taps(self.encoder)))
        self._live = Live(empty, empty)
        self._lock = RLock()
        self._forgets = (0, 0)  # how often something was forgotten in what serves, and in what `undo` goes back to
        self._kept: dict[Path, tuple[int | Manifest | None, int]] = {}  # what a store serves, and `_forgets` then

    def __repr__(self) -> str:
        known = [
            f"{d.name}: {_count(d.memory.n, 'image')} of {listed(d.memory.classes)}, {d.bytes / 1024:.0f} KiB"
            for d in self.system.domains
        ]
        return f"Ear({'; '.join(known) or 'nothing learned yet'}; encoder {self.encoder.digest[:12]})"

    @property
    def system(self) -> System:
        """The serving generation."""
        return self._live.serving

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains learned so far, in order."""
        return self.system.names

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes of all domains, sorted."""
        return tuple(sorted({c for d in self.system.domains for c in d.memory.classes}))

    # ------------------------------------------------------------------------------------------------ answering

    @overload
    def predict(self, image: list[Any] | tuple[Any, ...]) -> list[Prediction]: ...
    @overload
    def predict(self, image: Input) -> Prediction: ...
    def predict(self, image: Input | list[Any] | tuple[Any, ...]) -> Prediction | list[Prediction]:
        """The answer for one image, or a list of answers for a list of images.

        An image is a path; the bytes of a file, or an open file; a Pillow image; an array `(H, W)`, RGB `(H, W, 3)` or
        RGBA `(H, W, 4)` of uint8, or of float in 0..1. Any size: the shorter side is resized to the encoder's input and
        the centre cropped, as in training. Raises `DataError` that names what cannot be read, `UsageError` for other
        types.
        """
        if isinstance(image, list | tuple):
            return list(_all_good(self._answers(image)))
        frame = frame_of(image, self.encoder.input_size)
        return infer(self.system, self.engine, ShiftState(), frame)[0]

    infer = predict

    def stream(self, frames: Iterable[Input]) -> Iterator[Prediction | Shift | Recognised]:
        """The answer for each frame of a stream, and between them what the stream does as a whole.

        `Shift`: the stream has left all known domains; told again where it is in none after a change of what is known,
        or after 300 frames. From then on the latest 30 frames are judged together, and `Recognised` says that they are
        of a known domain: the stream is back, or it was learned in the meantime. There are no labels here: to learn the
        new domain, label some frames and call `learn`, also while you iterate.
        """
        state, away, silent, known = ShiftState(), False, 0, self.system.domains
        codes: deque[F32] = deque(maxlen=LOOK_BACK)
        for image in frames:
            frame, system = frame_of(image, self.encoder.input_size), self.system
            if silent == 1 or system.domains is not known:
                state, silent, known = state.restart(), 0, system.domains
            silent = max(silent - 1, 0)
            answer, state, shift = infer(system, self.engine, state, frame)
            yield answer
            if shift is not None and not silent:
                away, silent = True, SILENCE
                codes.clear()
                yield shift
            elif away and answer.code is not None:
                codes.append(answer.code)
                back = recognise(system, np.stack(codes)) if len(codes) == LOOK_BACK else None
                if back is not None:
                    away, silent, state = False, 0, state.restart()
                    yield back

    def evaluate(self, images: Images, labels: Iterable[str] | None = None, *, progress: Show = None) -> Evaluation:
        """Accuracy on a folder CLASS/* or DOMAIN/CLASS/*, or on images and their labels; on all of them, so give images
        that were not learned. Raises `DataError` for images that cannot be read."""
        parts = _labelled(images, labels, None)
        with shown(progress) as show:
            given = [image for part in parts for image in part.images]
            answers = _all_good(_watched(self._answers(given), "predict", len(given), show))
        truth = [(part.name, label) for part in parts for label in part.labels]
        rows = [(*true, answer) for true, answer in zip(truth, answers, strict=True)]
        known = {name: [r for r in rows if r[0] == name] for name in dict.fromkeys(r[0] for r in rows)}
        by_class = {name: [r for r in rows if r[1] == name] for name in sorted({r[1] for r in rows})}
        warnings = [warning for part in parts for warning in part.warnings]
        few = {f"domain {name}" if name else "this set": len(r) for name, r in known.items() if len(r) < FEW}
        warnings += [
            f"{name} has only {_count(n, 'image')}, fewer than {FEW}: a rough figure" for name, n in few.items()
        ]
        missing = sorted({label for _, label in truth}.difference(self.classes))
        if missing:
            warnings.append(f"classes that were never learned count as wrong: {listed(missing)}")
        return Evaluation(
            _score(rows, False),
            {name: _score(r, name in self.domains) for name, r in known.items() if name},
            {name: _score(r, False) for name, r in by_class.items()},
            tuple(warnings),
        )

    # ------------------------------------------------------------------------------------------------- learning

    @_one_at_a_time
    def learn(
        self,
        images: Images,
        labels: Iterable[str] | None = None,
        *,
        name: str | None = None,
        skip_bad: bool = False,
        progress: Show = None,
    ) -> Learned | Rejected:
        """Learn a new domain: a folder `FOLDER/CLASS/*`, called as the folder unless named, or images and their labels.

        A head is searched and fitted, which takes from seconds to minutes. `skip_bad` leaves out images that cannot be
        read, with a warning. Raises `KnownDomain` where a domain of that name is known, `DataError` for images that
        cannot be read or fewer than five different ones, `UsageError` for labels that do not fit the images.
        """
        lesson = self._lesson(images, labels, name)
        if lesson.name in self.domains:
            raise KnownDomain(
                f"domain {lesson.name!r} is known: call update({lesson.name!r}, ...) to add images to it, "
                f"forget({lesson.name!r}) to start again, or give another name=..."
            )
        _need_torch("learning")
        with shown(progress) as show:
            taps = [t.name for t in self.system.space.taps]
            samples, seen, warnings = self._samples(lesson, VIEWS, taps, show, skip_bad)
            if len(samples.classes) == 1:
                warnings += (f"one class only: every image of this domain is called {samples.classes[0]}",)
            try:
                outcome = adapt(self.system, samples, self.policy or default_policy(self.seed), self.seed, show)
            except DataError as error:
                raise DataError("; ".join([str(error), *warnings])) from error
        return self._learned(outcome, samples, {"seen": seen}, warnings)

    @_one_at_a_time
    def update(
        self,
        name: str,
        images: Images,
        labels: Iterable[str] | None = None,
        *,
        skip_bad: bool = False,
        progress: Show = None,
    ) -> Learned | Rejected:
        """Add images, and any new classes, to the known domain `name`: a folder `FOLDER/CLASS/*`, or images and labels.

        What is kept of a domain are sums, so the result is that of having learned all images at once, but for its head:
        that is refitted from the sums where this answers the new images better, and stays otherwise. Images that the
        domain learned before are left out. Where it was learned without a record of them, by a board or by an older
        version, they count twice, and no accuracy is given. Raises `UsageError` for an unknown domain, else as `learn`.
        """
        old = self.system.domain(name)
        _need_torch("learning")
        with shown(progress) as show:
            lesson = self._lesson(images, labels, name)
            taps, before = self.system.wanted_taps, old.seen
            samples, seen, warnings = self._samples(lesson, VIEWS[:1], taps, show, skip_bad, before)
            if not len(samples.labels):
                return self._told(old, 0, {}, warnings)
            outcome = update_domain(
                self.system, self.engine, name, samples.views[0], samples.labels, samples.classes, self.seed
            )
        record: dict[str, object] = {"seen": seen}
        if sum(map(len, before.values())) < DIGEST * old.memory.n:
            warnings += (
                f"not all images of {name} were recorded when it was learned: give new ones only, since known ones "
                "count twice; so the accuracy is not measured",
            )
            record |= {"validation_accuracy": None, "validated_on": 0}
        return self._learned(outcome, samples, record, warnings)

    @_one_at_a_time
    def forget(self, domain: str, label: str | None = None, images: Images | None = None) -> Changed | Rejected:
        """Forget a domain, or one class of it. The next `save` removes older generations that know it, too.

        A domain is forgotten exactly. A class is, if `images` are all that were learned of it, as a folder or a list;
        without them its weight in the common covariance is left. Raises `UsageError` for an unknown domain or class, no
        images, and images without a label.
        """
        if label is None:
            if images is not None:
                raise UsageError("images without the label of their class: give both, or neither to forget the domain")
            return self._changed(forget_domain(self.system, domain), f"forgot {domain}", forgot=True)
        _need_torch("forgetting a class")
        seen = None
        if images is not None:
            given = _files_in(Path(images)) if isinstance(images, str | Path) else tuple(images)
            if not given:
                raise UsageError(f"no images: give all that were learned of {label}, or leave images out")
            taps = [t.name for t in self.system.space.taps]
            different = {one.digest: one.views[0] for one in _all_good(self._encoded(given, VIEWS[:1], taps))}
            seen = self.system.space.encode(_joined(list(different.values())))
        how = "from the sums alone" if seen is None else "with its images, exactly"
        return self._changed(
            forget_class(self.system, domain, label, seen), f"forgot {label} of {domain}, {how}", forgot=True
        )

    @_one_at_a_time
    def merge(self, first: str, second: str, name: str | None = None) -> Changed | Rejected:
        """Make one domain of two that turned out the same, called `name`, else as the first. Raises `UsageError` for
        unknown or equal names, `KnownDomain` where `name` is that of a third one."""
        name = first if name is None else name
        if name in self.domains and name not in (first, second):
            raise KnownDomain(f"domain {name!r} is known: give a name that is free, or that of one of the two")
        if name not in self.domains:
            check_name(name)
        _need_torch("merging")
        outcome = merge_domains(self.system, first, second)
        if isinstance(outcome, Candidate):
            outcome = outcome.renamed(first, name)
        return self._changed(outcome, f"merged {second} into {first}" + (f" as {name}" if name != first else ""))

    @_one_at_a_time
    def undo(self) -> bool:
        """Serve what served before the last change. False where there is none: it was undone, saved or made
        permanent."""
        undone = self._live.probation
        self._live, self._forgets = rollback(self._live), (self._forgets[1],) * 2
        return undone

    # -------------------------------------------------------------------------------------------------- keeping

    @_one_at_a_time
    def save(self, folder: str | Path, *, overwrite: bool = False) -> int:
        """Keep everything learned in the store `folder`, made when missing, and make it permanent; its number there.

        Raises `UsageError` where the store serves what this `Ear` neither loaded nor saved there, unless you ask to
        `overwrite` it; `DeviceError` where the disk fails or another process has the store open.
        """
        path, forgets = Path(folder), self._forgets[0]
        with Store.open(path) as store:
            kept, forgotten = self._kept.get(path.resolve(), (None, forgets))
            served = store.confirmed and store.manifest(store.confirmed)
            if served and served != kept and not overwrite:
                raise UsageError(
                    f"{path} keeps {served.note or 'nothing'}, which this Ear neither loaded nor saved there: "
                    f"go on from Ear.load({str(path)!r}), give another folder, or overwrite=True"
                )
            given = (store, self.system, time.time(), ", ".join(self.domains))
            purge = forgets > forgotten
            saved = generations.publish_alone(*given)[0] if purge else generations.publish_confirmed(*given)
            self._kept[path.resolve()] = (store.manifest(saved.generation), forgets)
        self._live, self._forgets = Live(saved, saved), (forgets, forgets)
        return saved.generation

    @classmethod
    def load(
        cls,
        folder: str | Path,
        encoder: EncoderChoice = "default",
        *,
        seed: int = 0,
        policy: AdaptPolicy | None = None,
    ) -> Ear:
        """What was kept in `folder`. Raises `UsageError` where nothing was, `FormatError` for another encoder's."""
        path = Path(folder)
        if not path.is_dir():
            raise UsageError(f"{path} is not a folder: give the one that was saved to")
        system = None
        if any(path.glob(f"[0-9]*/{MANIFEST}")):  # opening would make a store of any other folder
            with Store.open(path) as store:
                system, served = generations.load(store), store.confirmed and store.manifest(store.confirmed)
        if system is None:
            raise UsageError(f"{path} holds nothing learned: give the folder that was saved to")
        ear = cls(encoder, seed=seed, policy=policy)
        generations.require_encoder(system, ear.encoder.digest)
        ear._live, ear._kept[path.resolve()] = Live(system, system), (served, 0)
        return ear

    # --------------------------------------------------------------------------------------------------- inside

    def _answers(self, images: Sequence[Input]) -> Iterator[Prediction | UndecodableInput]:
        system = self.system
        for one in self._encoded(images, VIEWS[:1], system.wanted_taps):
            if isinstance(one, UndecodableInput):
                yield one
            else:
                yield infer_features(system, self.engine, ShiftState(), one.views[0])[0]

    def _encoded(
        self, images: Sequence[Input], views: Sequence[str], taps: Sequence[str]
    ) -> Iterator[_Encoded | UndecodableInput]:
        """Each image in turn, encoded in batches on a few threads; a bad one gives its error."""

        def work(batch: Sequence[Input]) -> list[_Encoded | UndecodableInput]:
            found = [_caught(image, self.encoder.input_size) for image in batch]
            frames = [frame for frame in found if not isinstance(frame, UndecodableInput)]
            if not frames:
                return [error for error in found if isinstance(error, UndecodableInput)]
            features = [self.encoder.encode(np.stack([view(f, how) for f in frames]), taps) for how in views]
            rows = iter(range(len(frames)))
            return [one if isinstance(one, UndecodableInput) else _row(one, features, next(rows)) for one in found]

        pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="encode")
        waiting: deque[Future[list[_Encoded | UndecodableInput]]] = deque()
        try:
            for start in range(0, len(images), BATCH):
                waiting.append(pool.submit(work, images[start : start + BATCH]))
                if len(waiting) >= 2 * WORKERS:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _lesson(self, images: Images, labels: Iterable[str] | None, name: str | None) -> _Labelled:
        """The images of one domain, which has a name."""
        parts = _labelled(images, labels, name)
        if len(parts) > 1:
            raise UsageError(
                f"{images} holds domains ({', '.join(p.name for p in parts)}): learn each folder by itself"
            )
        if not parts[0].name:
            raise UsageError("images without a name for their domain: give name=...")
        for one in (parts[0].name, *dict.fromkeys(parts[0].labels)):
            if one not in (*self.domains, *self.classes):
                check_name(one)
        return parts[0]

    def _samples(
        self,
        lesson: _Labelled,
        views: Sequence[str],
        taps: Sequence[str],
        show: Progress,
        skip_bad: bool,
        before: Mapping[str, str] = MappingProxyType({}),
    ) -> tuple[Samples, dict[str, str], tuple[str, ...]]:
        """The different images of a lesson that are not among `before`, encoded; then class -> digests of both, joined
        as `Domain.seen` has them; and warnings."""
        found = list(_watched(self._encoded(lesson.images, views, taps), "encode", len(lesson.images), show))
        bad = [one for one in found if isinstance(one, UndecodableInput)]
        if bad and not skip_bad:
            raise UndecodableInput.of_many(bad)
        known = {joined[at : at + DIGEST] for joined in before.values() for at in range(0, len(joined), DIGEST)}
        first: dict[tuple[str, str], _Encoded] = {}
        repeated = 0
        for one, label in zip(found, lesson.labels, strict=True):
            if not isinstance(one, UndecodableInput):
                repeated += one.digest in known
                if one.digest not in known:
                    first.setdefault((one.digest, label), one)
        copies = len(found) - len(bad) - repeated - len(first)
        classes = tuple(sorted({label for _, label in first}))
        labels: I64 = np.array([classes.index(label) for _, label in first], np.int64)
        features = [_joined([one.views[v] for one in first.values()]) for v in range(len(views))]
        seen = dict(before)
        for digest, label in first:
            seen[label] = seen.get(label, "") + digest
        warnings = (*lesson.warnings, *_told_left_out(bad, repeated, copies, first))
        return Samples(lesson.name, features, labels, classes), seen, warnings

    def _learned(
        self, outcome: Candidate | Rejected, samples: Samples, record: Mapping[str, object], warnings: tuple[str, ...]
    ) -> Learned | Rejected:
        if isinstance(outcome, Rejected):
            return outcome
        self._commit(outcome.recorded(samples.name, **record))
        grown = self.system.domain(samples.name)
        least = math.ceil(1 / self.system.policy.alpha) - 1 if self.system.policy.alpha else math.inf
        if (n := len(grown.calibration.values)) < least:
            warnings += (f"{_count(n, 'image')}: below {least} no image can be called out of distribution",)
        return self._told(grown, len(samples.labels), outcome.replay, warnings)

    def _commit(self, candidate: Candidate, forgot: bool = False) -> None:
        self._live = commit(confirm(self._live), candidate)
        self._forgets = (self._forgets[0] + forgot, self._forgets[0])

    def _told(self, domain: Domain, images: int, replay: Mapping[str, float], warnings: tuple[str, ...]) -> Learned:
        """What is said of `domain`, whose last change were `images` new ones."""
        accuracy, validated = domain.growth.get("validation_accuracy"), domain.growth.get("validated_on")
        n = validated if images and isinstance(validated, int) else 0
        if 0 < n < FEW:
            warnings += (f"validated on only {_count(n, 'image')}, fewer than {FEW}: the accuracy is a rough figure",)
        tried = domain.growth.get("specs_scored")
        how = f"best of {tried} tried" if tried != 1 else f"fitted to the sums of {_count(domain.memory.n, 'image')}"
        return Learned(
            name=domain.name,
            classes=domain.head.classes,
            images=images,
            total=domain.memory.n,
            head=f"{domain.head.spec.operator}, {how}",
            bytes=domain.bytes,
            validation_accuracy=accuracy if n and isinstance(accuracy, float) else None,
            validated=n,
            replay=dict(replay),
            generation=self.system.generation,
            warnings=warnings,
        )

    def _changed(self, outcome: Candidate | Rejected, what: str, forgot: bool = False) -> Changed | Rejected:
        if isinstance(outcome, Rejected):
            return outcome
        self._commit(outcome, forgot)
        lost = {name: share for name, share in outcome.replay.items() if name in self.domains}
        return Changed(what, self.system.generation, self.domains, lost)


def _labelled(images: Images, labels: Iterable[str] | None, name: str | None) -> tuple[_Labelled, ...]:
    """Labelled images, domain by domain: one without a name where images and labels were given without one."""
    if isinstance(images, str | Path):
        if labels is not None:
            raise UsageError("a folder and labels: its class folders are the labels; call the domain name=...")
        return labelled_folder(Path(images), name)
    if isinstance(labels, str | bytes):
        raise UsageError(f"labels {labels[:60]!r} are one text: give one label an image, as a list")
    try:
        given, said = tuple(images), () if labels is None else tuple(labels)
    except TypeError as error:
        raise UsageError(f"{error}: give images and labels as lists") from error
    if len(given) != len(said) or not given:
        raise UsageError(f"{_count(len(given), 'image')} and {_count(len(said), 'label')}: give one label an image")
    odd = sorted({type(label).__name__ for label in said if not isinstance(label, str)})
    if odd:
        raise UsageError(f"labels of type {', '.join(odd)}: give the names of the classes, as str")
    return (_Labelled(name or "", given, tuple(map(str, said))),)


def labelled_folder(folder: Path, name: str | None = None) -> tuple[_Labelled, ...]:
    """The images of `FOLDER/CLASS/*`, one domain called `name` or as the folder, or of `FOLDER/DOMAIN/CLASS/*`."""
    absolute = folder.absolute()
    if not absolute.is_dir():
        raise DataError(f"{folder} is not a folder: give one that holds CLASS/ folders of pictures")
    if _holds_domains(absolute):
        if name is not None:
            raise UsageError(
                f"{folder} holds DOMAIN/CLASS/ folders, which name the domains: leave out the name {name!r}"
            )
        data = read_folder(absolute)
    else:
        data = read_folder(absolute.parent, (absolute.name,))
    return tuple(
        _Labelled(
            name or domain,
            tuple(item.path for item in items),
            tuple(data.classes[item.label] for item in items),
            data.warnings if place == 0 else (),
        )
        for place, (domain, items) in enumerate(data.items.items())
    )


def _holds_domains(folder: Path) -> bool:
    """Whether images lie in `DOMAIN/CLASS/` and none in `CLASS/`."""
    inner, outer = (any(p.suffix.lower() in SUFFIXES for p in folder.glob(at)) for at in ("*/*/*", "*/*"))
    return inner and not outer


def _score(rows: Sequence[tuple[str, str, Prediction]], routed: bool) -> Score:
    """Of rows of domain, class and answer."""
    right = sum(answer.label == label for _, label, answer in rows)
    own = sum(answer.route == name for name, _, answer in rows) if routed else None
    return Score(len(rows), right, own)


def _files_in(folder: Path) -> tuple[Input, ...]:
    files = tuple(sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)) if folder.is_dir() else ()
    if not files:
        raise DataError(f"{folder} holds no image: give the folder of all images that were learned of the class")
    return files


def _told_left_out(
    bad: Sequence[UndecodableInput], repeated: int, copies: int, first: Iterable[tuple[str, str]]
) -> Iterator[str]:
    """`first`: digest and label of each image that is kept."""
    if bad:
        yield f"{_count(len(bad), 'image')} left out: {listed([str(error) for error in bad])}"
    if repeated:
        yield f"{_count(repeated, 'image')} left out: already learned"
    if copies:
        yield f"{_count(copies, 'image')} left out: copies of others in the same class"
    torn = sum(n > 1 for n in Counter(digest for digest, _ in first).values())
    if torn:
        yield f"copies of the same image under different labels: {torn}; label each image once"


def _caught(image: Input, size: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.uint8]] | UndecodableInput:
    try:
        return frame_of(image, size)
    except UndecodableInput as error:
        return error


def _row(frame: np.ndarray[Any, np.dtype[np.uint8]], features: Sequence[Features], row: int) -> _Encoded:
    one = tuple({tap: x[row : row + 1] for tap, x in given.items()} for given in features)
    return _Encoded(hashlib.sha256(frame.tobytes()).hexdigest()[:DIGEST], one)


def _joined(rows: Sequence[Features]) -> dict[str, F32]:
    return {tap: np.concatenate([row[tap] for row in rows]) for tap in (rows[0] if rows else ())}


def _watched(found: Iterable[T], phase: str, total: int, show: Progress) -> Iterator[T]:
    show(phase, 0, total)
    for done, one in enumerate(found, 1):
        yield one
        show(phase, done, total)


def _all_good(found: Iterable[T | UndecodableInput]) -> list[T]:
    """All of `found`; raises one `UndecodableInput` for all bad ones."""
    every = list(found)
    bad = [one for one in every if isinstance(one, UndecodableInput)]
    if bad:
        raise UndecodableInput.of_many(bad)
    return [one for one in every if not isinstance(one, UndecodableInput)]


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}{'es' if what.endswith('s') else 's'}"


def _opened(encoder: EncoderChoice) -> Encoder:
    if not isinstance(encoder, str | Path):
        lacking = [part for part in ("digest", "taps", "input_size", "encode") if not hasattr(encoder, part)]
        if lacking:
            raise UsageError(
                f"an encoder of type {type(encoder).__name__} without {', '.join(lacking)}: "
                'give "default", the path of an ONNX file, or an edgeear.Encoder'
            )
        return encoder
    if encoder != "default":
        return OnnxEncoder(encoder)
    path = cached_encoder(cache_dir())
    if path is None:
        _need_torch("making the default encoder")
        from device.encoder.export import default_encoder_path

        with shown(None) as show:
            path = default_encoder_path(cache_dir(), progress=lambda step: show(f"encoder: {step}", 0, 1))
    return OnnxEncoder(path)


def default_policy(seed: int) -> AdaptPolicy:
    """What learning may cost where no policy was given. Needs the `learn` extra."""
    from adaptors.search import SearchPolicy  # loads torch

    return AdaptPolicy(search=SearchPolicy(specs=SPECS, seed=seed), spatial=False)


def _need_torch(what: str) -> None:
    if importlib.util.find_spec("torch") is None:
        raise UsageError(f"{what} needs torch: {installation('learn')}")
