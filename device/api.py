"""The Python interface: a board in one object, for an encoder and folders of images of your own.

Rules of this file:

1. `learn` goes through the same door as everything else: search, train, admit, and only then serve. A rejection is a
   value, and leaves what served as it was.
2. What was learned last can be taken back with `undo`, until the next `learn` or `save` makes it permanent.
3. Nothing touches the disk but `save` and `load`, and the cache of the default encoder.
"""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from adaptors.progress import Progress
from device.encoder.cache import cached_encoder
from device.encoder.engine import OrtEngine
from device.encoder.session import OnnxEncoder, pooled_taps
from device.files import cache_dir
from device.images.dataset import FolderData, read_folder
from device.images.decode import decode
from device.images.featurise import featurise
from device.provenance import installation
from device.state import generations
from device.state.store import Store
from edgeear.errors import UsageError
from edgeear.flow import Prediction, adapt, infer
from edgeear.samples import AdaptPolicy, Samples
from edgeear.shift import ShiftState
from edgeear.space import HypervectorSpace
from edgeear.system import Live, Rejected, System, commit, confirm, rollback
from edgeear.types import U8, Encoder

VIEWS = ("plain", "flip")
"""How each image is shown to training."""
SPECS = 300
"""Heads that a search scores, unless a policy says otherwise."""
EncoderChoice = Literal["default"] | str | Path | Encoder


@dataclass(frozen=True)
class Learned:
    """A domain that was admitted and serves now. `validation_accuracy` is that of its head on held-out images, None
    where there were too few; `replay` maps each older domain to the share of its stored codes that changed route."""

    name: str
    classes: tuple[str, ...]
    images: int
    head: str
    bytes: int
    validation_accuracy: float | None
    replay: dict[str, float]
    generation: int


class Ear:
    """A frozen encoder and everything learned over it.

    `encoder` is "default", the path of any ONNX image network, or an object of `edgeear.types.Encoder`. Raises
    `EncoderError` for a file that cannot serve.
    """

    def __init__(self, encoder: EncoderChoice = "default", *, seed: int = 0, policy: AdaptPolicy | None = None) -> None:
        self.encoder = _opened(encoder)
        self.engine = OrtEngine(self.encoder)
        self.seed, self.policy = seed, policy
        empty = System(self.encoder.digest, HypervectorSpace(pooled_taps(self.encoder)))
        self._live = Live(empty, empty)

    @property
    def system(self) -> System:
        """The serving generation."""
        return self._live.serving

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains learned so far, in order."""
        return self.system.names

    def learn(
        self, folder: str | Path, name: str | None = None, *, on_progress: Progress = lambda *_: None
    ) -> Learned | Rejected:
        """Learn the images `folder/CLASS/*` as a domain, called as the folder unless named.

        Needs the `learn` extra. Raises `UndecodableInput` for broken images, `DataError` for too few.
        """
        _need_torch("learning")
        data = _domain_of(Path(folder))
        domain = data.domains[0]
        samples = self._samples(data, name or domain, on_progress)
        outcome = adapt(self.system, samples, self.policy or _policy(self.seed), self.seed, on_progress)
        if isinstance(outcome, Rejected):
            return outcome
        self._live = commit(confirm(self._live), outcome)
        grown = self.system.domain(samples.name)
        return Learned(
            name=grown.name,
            classes=grown.head.classes,
            images=len(samples.labels),
            head=str(grown.growth["explanation"]),
            bytes=grown.bytes,
            validation_accuracy=_number(grown.growth["validation_accuracy"]),
            replay=dict(outcome.replay),
            generation=self.system.generation,
        )

    def infer(self, image: str | Path | U8) -> Prediction:
        """The answer for one image: a file, or a frame of the encoder's size. Raises `UndecodableInput`."""
        frame = image if isinstance(image, np.ndarray) else decode(Path(image), self.encoder.input_size)
        return infer(self.system, self.engine, ShiftState(), frame)[0]

    def undo(self) -> None:
        """Serve what served before the last `learn`; does nothing once that is permanent."""
        self._live = rollback(self._live)

    def save(self, folder: str | Path) -> int:
        """Keep everything learned in the store `folder`, made when missing, and make it permanent; its number there.

        Raises `StoreBusy` while another process has the store open, `DeviceError` where the disk fails.
        """
        with Store.open(Path(folder)) as store:
            number = generations.publish_confirmed(store, self.system, time.time(), ", ".join(self.domains))
        self._live = confirm(self._live)
        return number

    @classmethod
    def load(cls, folder: str | Path, encoder: EncoderChoice = "default", *, seed: int = 0) -> Ear:
        """What was kept in `folder`. Raises `UsageError` where nothing was, `FormatError` for another encoder's."""
        path = Path(folder)
        if not path.is_dir():
            raise UsageError(f"{path} is not a folder: give the one that was saved to")
        with Store.open(path) as store:
            system = generations.load(store)
        if system is None:
            raise UsageError(f"{path} holds nothing learned: give the folder that was saved to")
        ear = cls(encoder, seed=seed)
        generations.require_encoder(system, ear.encoder.digest)
        ear._live = Live(system, system)
        return ear

    def _samples(self, data: FolderData, name: str, on_progress: Progress) -> Samples:
        items = data.items[data.domains[0]]
        taps = [tap.name for tap in self.system.space.taps]
        views = [
            featurise(items, self.encoder, taps, view=view, on_progress=lambda _, *at: on_progress("encode", *at))
            for view in VIEWS
        ]
        return Samples(name, views, np.array([item.label for item in items], np.int64), data.classes)


def _opened(encoder: EncoderChoice) -> Encoder:
    if not isinstance(encoder, str | Path):
        return encoder
    if encoder != "default":
        return OnnxEncoder(encoder)
    path = cached_encoder(cache_dir())
    if path is None:
        _need_torch("making the default encoder")
        from device.encoder.export import default_encoder_path

        path = default_encoder_path(cache_dir())
    return OnnxEncoder(path)


def _policy(seed: int) -> AdaptPolicy:
    from adaptors.search import SearchPolicy  # loads torch

    return AdaptPolicy(search=SearchPolicy(specs=SPECS, seed=seed), spatial=False)


def _need_torch(what: str) -> None:
    if importlib.util.find_spec("torch") is None:
        raise UsageError(f"{what} needs torch: {installation('learn')}")


def _domain_of(folder: Path) -> FolderData:
    """The folder as a data set of one domain."""
    absolute = folder.absolute()
    return read_folder(absolute.parent, (absolute.name,))


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None
