"""Zero-shot search: score many specifications without training any, pick the best one.

Rules: the budget is applied before any proxy; the score of a specification depends on nothing but the seed and the
sample; interrupting between specifications loses nothing but the search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from adaptors.proxies import DEFAULT_PROXY, PROXIES, Probe, Sample
from adaptors.search_space import Budget, SearchSpace
from adaptors.spec import Cost, HeadSpec


@dataclass(frozen=True)
class SearchPolicy:
    """How long and on what the search looks: `specs` scored, `samples` of the new domain shown to the proxy.

    `tie` is the relative loss of score (of the best score) that a cheaper head may cost. Where the domain has more than
    `samples`, the `finalists` best are scored a second time, on up to `closer` of them; 0 for none."""

    specs: int = 1000
    samples: int = 210
    proxy: str = DEFAULT_PROXY
    seed: int = 0
    tie: float = 0.0
    finalists: int = 8
    closer: int = 1500


@dataclass(frozen=True)
class Scored:
    """One specification with its cost and its score (larger is better, None where the proxy is undefined)."""

    spec: HeadSpec
    cost: Cost
    score: float | None


@dataclass(frozen=True)
class SearchResult:
    """All scored specifications, best first, and why the first was picked."""

    ranking: tuple[Scored, ...]
    explanation: str

    @property
    def best(self) -> Scored:
        return self.ranking[0]


def search(
    space: SearchSpace,
    budget: Budget,
    taps: Mapping[str, NDArray[np.float32]],
    labels: NDArray[np.int64],
    policy: SearchPolicy,
    on_progress: Callable[[int, int], None] | None = None,
) -> SearchResult:
    """Rank `policy.specs` specifications for labelled samples `taps[name] (samples, *shape)`, `labels (samples,)`.

    Raises EmptyBudget when nothing fits, KeyError on an unknown proxy."""
    proxy = PROXIES[policy.proxy]
    candidates = space.sample(policy.specs, budget, policy.seed)
    again = min(policy.finalists, len(candidates)) if len(labels) > policy.samples else 0
    done = 0

    def scored(those: list[tuple[HeadSpec, Cost]], samples: int) -> list[Scored]:
        nonlocal done
        index = balanced(labels, samples, policy.seed)
        tensors = {t: torch.from_numpy(np.ascontiguousarray(x[index])) for t, x in taps.items()}
        sample = Sample(tensors, torch.from_numpy(labels[index].astype(np.int64)), space.classes, policy.seed)
        found = []
        for spec, price in those:
            score = proxy(Probe(spec, price, sample))
            found.append(Scored(spec, price, score if score is not None and np.isfinite(score) else None))
            done += 1
            if on_progress:
                on_progress(done, len(candidates) + again)
        return sorted(found, key=_order)

    with single_thread():
        first = scored(candidates, policy.samples)
        closer = scored([(s.spec, s.cost) for s in first[:again]], policy.closer)
    ranking = (*_cheap_first(closer, policy.tie), *first[again:]) if again else _cheap_first(first, policy.tie)
    return SearchResult(ranking, _explain(ranking, policy))


@contextmanager
def single_thread() -> Iterator[None]:
    """Scoring is thousands of tiny operations: handing each to a thread pool costs more than it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _order(s: Scored) -> tuple[float, int, str]:
    return (np.inf if s.score is None else -s.score, s.cost.parameters, str(s.spec))


def _cheap_first(ranking: list[Scored], tie: float) -> tuple[Scored, ...]:
    """The best-first `ranking`, with the cheapest of those that tie with its head moved to the front."""
    top = ranking[0].score
    if top is None:
        return tuple(ranking)
    tied = [s for s in ranking if s.score is not None and s.score >= top - tie * abs(top)]
    pick = min(tied, key=lambda s: s.cost.parameters)
    return (pick, *(s for s in ranking if s is not pick))


def balanced(labels: NDArray[np.int64], samples: int, seed: int) -> NDArray[np.int64]:
    """Indices of at most `samples` samples, classes in shares as equal as they come, in a seeded order."""
    rng = np.random.default_rng(seed)
    queues = [list(rng.permutation(np.flatnonzero(labels == c))) for c in np.unique(labels)]
    chosen: list[int] = []
    while len(chosen) < samples and any(queues):
        for queue in queues:
            if queue and len(chosen) < samples:
                chosen.append(int(queue.pop()))
    return np.asarray(chosen, np.int64)


def _explain(ranking: tuple[Scored, ...], policy: SearchPolicy) -> str:
    best, scores = ranking[0], [s.score for s in ranking if s.score is not None]
    if not scores:
        return f"proxy {policy.proxy!r} is undefined for all {len(ranking)} heads; the smallest was taken"
    return (
        f"{best.spec.operator} head over {len(best.spec.inputs)} tap(s), {best.spec.reconfigurator} reconfigurator: "
        f"best {policy.proxy} score {best.score:.4g} of {len(ranking)} heads (median {np.median(scores):.4g}), "
        f"{best.cost.parameters} parameters, {best.cost.latency_ms:.2f} ms predicted"
    )
