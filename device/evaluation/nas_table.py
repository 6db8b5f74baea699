"""Ground truth of the search: random heads of the space, trained, and their accuracy on images they never saw.

Rules of this file:

1. A table says how its heads were trained (the regime), on which encoder and with which seeds. A head is trained once
   for a regime and a seed and then read from the cache, so that an interrupted run continues where it stopped.
2. Accuracies are those of the head as it is served: fp32 or int8, as its specification says.
3. The specifications are drawn with a seed from the domain's name, so that domains have different heads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptors.fields import TapShapes
from adaptors.progress import Progress
from adaptors.search import single_thread
from adaptors.search_space import Budget, SearchSpace
from adaptors.spec import HeadSpec
from adaptors.train import TrainPolicy, accuracy, train
from adaptors.transfer import INPUTS, Example
from device.files import write_whole
from edgeear.errors import DataError

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Regime:
    """How the heads of a table are trained: `shots` images of each class (None for all), at most `epochs` of
    gradient descent. Closed-form heads are solved as usual."""

    shots: int | None = 200
    epochs: int = 12


CHEAP = Regime()
FULL = Regime(None, TrainPolicy.epochs)


@dataclass(frozen=True, eq=False)
class Images:
    """Features and labels of one domain: training views (plain first) and test images; `identity` names the encoder,
    the images and the regime."""

    views: Sequence[Mapping[str, F32]]
    labels: I64
    test: Mapping[str, F32]
    test_labels: I64
    classes: int
    identity: str

    @property
    def shapes(self) -> TapShapes:
        return {t: tuple(x.shape[1:]) for t, x in self.views[0].items()}


@dataclass(frozen=True, eq=False)
class Truth:
    """Measured heads: `accuracy (heads, seeds)`, fractions of one, on `test_images` images; `scores[proxy] (seeds,
    heads)`, NaN where the proxy is undefined. The seeds of the scores are those of the sample and the random heads."""

    domain: str
    specs: tuple[HeadSpec, ...]
    accuracy: F64
    scores: Mapping[str, F64]
    regime: Regime
    encoder: str
    classes: int
    test_images: int

    @property
    def mean(self) -> F64:
        """Accuracy over the seeds, `(heads,)`."""
        mean: F64 = self.accuracy.mean(axis=1)
        return mean


def draw(space: SearchSpace, budget: Budget, domain: str, heads: int) -> tuple[HeadSpec, ...]:
    """The specifications of a domain's table: drawn within the budget, the same number from each family."""
    seed = int.from_bytes(hashlib.sha256(domain.encode()).digest()[:4], "big")
    return tuple(spec for spec, _ in space.sample(heads, budget, seed))


def measure(
    specs: Sequence[HeadSpec],
    images: Images,
    regime: Regime,
    seeds: Sequence[int],
    cache: Path,
    on_progress: Progress = lambda *_: None,
) -> F64:
    """Test accuracy `(heads, seeds)` of every specification, trained once and then read from the folder `cache`."""
    found = np.zeros((len(specs), len(seeds)))
    for i, spec in enumerate(specs):
        for j, seed in enumerate(seeds):
            word = f"{images.identity}/{regime}/{seed}/{json.dumps(spec.to_dict(), sort_keys=True)}"
            place = cache / f"{hashlib.sha256(word.encode()).hexdigest()}.json"
            if not place.exists():
                cache.mkdir(parents=True, exist_ok=True)
                write_whole(place, json.dumps(trained_accuracy(spec, images, regime, seed)).encode())
            found[i, j] = float(json.loads(place.read_text()))
        on_progress("train", i + 1, len(specs))
    return found


def trained_accuracy(spec: HeadSpec, images: Images, regime: Regime, seed: int) -> float:
    """Test accuracy of one head, trained."""
    policy = TrainPolicy(seed=seed, epochs=regime.epochs)
    with single_thread():
        fitted = train(spec, images.shapes, images.views, images.labels, images.classes, policy)
        return accuracy(spec, images.shapes, fitted.weights, images.test, images.test_labels, images.classes, seed)


def to_json(truth: Truth) -> dict[str, object]:
    """The table as JSON, one column for each field, which keeps the file small."""
    rows = [spec.to_dict() for spec in truth.specs]
    return {
        "domain": truth.domain,
        "encoder": truth.encoder,
        "classes": truth.classes,
        "test_images": truth.test_images,
        "regime": asdict(truth.regime),
        "specs": {name: [row[name] for row in rows] for name in rows[0]},
        "accuracy": np.round(truth.accuracy, 5).tolist(),
        "scores": {name: [[_short(v) for v in row] for row in rows] for name, rows in truth.scores.items()},
    }


def _short(value: float) -> float | None:
    """Five digits: more would be noise."""
    return float(f"{value:.5g}") if np.isfinite(value) else None


def from_json(content: Mapping[str, Any]) -> Truth:
    """Inverse of `to_json`. Raises DataError if the content is no table."""
    try:
        columns = content["specs"]
        rows = zip(*columns.values(), strict=True)
        return Truth(
            domain=content["domain"],
            specs=tuple(HeadSpec.from_dict(dict(zip(columns, row, strict=True))) for row in rows),
            accuracy=np.asarray(content["accuracy"], np.float64),
            scores={name: np.array(rows, np.float64) for name, rows in content["scores"].items()},
            regime=Regime(**content["regime"]),
            encoder=content["encoder"],
            classes=content["classes"],
            test_images=content["test_images"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"not a table of trained heads ({error!r}): make it again with `edgeear bench nas`") from error


def examples(truth: Truth) -> list[Example]:
    """What the ranker learns from: one example for each seed of the scores."""
    seeds = range(len(truth.scores[INPUTS[0]]))
    return [Example(truth.domain, truth.specs, {n: truth.scores[n][k] for n in INPUTS}, truth.mean) for k in seeds]
