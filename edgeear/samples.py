"""What an adaptation takes: labelled samples of a domain, and the policy that bounds what it may cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeear.types import Features

if TYPE_CHECKING:
    from adaptors.latency import LatencyModel
    from adaptors.search import SearchPolicy
    from adaptors.search_space import Budget
    from adaptors.train import TrainPolicy


@dataclass(frozen=True, eq=False)
class Samples:
    """Labelled samples of a new domain: `views` are the same samples as served and, if any, augmented;
    `labels (samples,)` index `classes`."""

    name: str
    views: Sequence[Features]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class AdaptPolicy:
    """What an adaptation may cost, and the board's `latency` model; None takes the defaults of `adaptors`.

    `spatial` False leaves spatial taps out of the search."""

    budget: Budget | None = None
    search: SearchPolicy | None = None
    train: TrainPolicy | None = None
    spatial: bool = True
    latency: LatencyModel | None = None
