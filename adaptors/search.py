"""Zero-shot search: filter many specifications, score the promising ones without training any, pick the best.

    filter    draw specifications, drop those beyond the budget
    prune     keep those that rank high by trained heads of other domains (transfer.py), and a random draw as reference
    score     training-free proxies on a small sample of the new domain, on all cores
    look closer   score the finalists again on more samples; as an option train them for a few steps (halving.py)

Rules: the budget is applied before any proxy; the score of a specification depends on nothing but the seed and the
sample; an interruption between specifications loses only the search.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice, zip_longest
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from adaptors import transfer
from adaptors.cost import Cost
from adaptors.halving import halve
from adaptors.progress import Progress
from adaptors.proxies import PROXIES, Probe, Sample
from adaptors.search_space import Budget, SearchSpace
from adaptors.spec import HeadSpec
from adaptors.transfer import Ranker

F64 = NDArray[np.float64]
Candidates = Sequence[tuple[HeadSpec, Cost]]
Price = Literal["parameters", "bytes", "latency_ms"]

COMBINED = "transfer"
"""The default: the combination of proxies in transfer.py, whose score is an estimate of the accuracy."""
DEFAULT_PROXY = COMBINED

PREFERENCES: dict[str, tuple[float, Price]] = {
    "best": (0.0, "parameters"),
    "fastest": (0.003, "latency_ms"),
    "smallest": (0.003, "bytes"),
}
"""What a search may prefer: the relative loss of its estimate that it may cost, and the price that counts."""


@dataclass(frozen=True)
class SearchPolicy:
    """How many specifications a search scores, and on which samples.

    `filtered` specifications are drawn and checked against the budget; `specs` of them are scored on `samples` of the
    new domain, of which the first `reference`, and at most half, are a random draw. `tie` is the relative loss of score
    (of the best score) that a head of a lower `price` may cost. Where the domain has more than `samples`, the
    `finalists` best are scored a second time, on up to `closer` of them; 0 for none. `halving` heads go through
    successive halving in the end; each costs a few steps of training, 0 for none. `ranker` None takes the built-in one.
    """

    filtered: int = 20_000
    specs: int = 1000
    reference: int = 250
    samples: int = 210
    proxy: str = DEFAULT_PROXY
    seed: int = 0
    tie: float = 0.0
    price: Price = "parameters"
    finalists: int = 8
    closer: int = 1500
    halving: int = 0
    ranker: Ranker | None = None


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

    @cached_property
    def front(self) -> tuple[Scored, ...]:
        """The Pareto front, best score first: no other head has as good a score in fewer bytes and less time."""
        return pareto(self.ranking)


def search(
    space: SearchSpace,
    budget: Budget,
    taps: Mapping[str, NDArray[np.float32]],
    labels: NDArray[np.int64],
    policy: SearchPolicy,
    on_progress: Progress = lambda *_: None,
) -> SearchResult:
    """Rank `policy.specs` specifications for labelled samples `taps[name] (samples, *shape)`, `labels (samples,)`.

    Raises EmptyBudget when nothing fits, KeyError on an unknown proxy."""
    run = _Run(space, taps, labels, policy, on_progress)
    drawn = space.sample(max(policy.filtered, policy.specs), budget, policy.seed)
    ranking = run.closer(run.ranked(run.pruned(drawn)))
    ranking = run.halved(ranking) if policy.halving else cheap_first(ranking, policy.tie, policy.price)
    return SearchResult(ranking, _explain(ranking, policy, len(drawn)))


class _Run:
    """One search: the samples that it looks at, and how far it is."""

    def __init__(
        self,
        space: SearchSpace,
        taps: Mapping[str, NDArray[np.float32]],
        labels: NDArray[np.int64],
        policy: SearchPolicy,
        on_progress: Progress,
    ) -> None:
        self.space, self.taps, self.labels, self.policy = space, taps, labels, policy
        self.combined = policy.proxy == COMBINED
        self.names = transfer.INPUTS if self.combined else (policy.proxy,)
        for name in self.names:
            PROXIES[name]  # an unknown name fails before anything is computed
        self.ranker = policy.ranker or transfer.built_in()
        self.on_progress, self.done, self.total, self.reference = on_progress, 0, 0, 0
        self.exact: dict[HeadSpec, float] = {}

    def pruned(self, drawn: Candidates) -> Candidates:
        """The candidates to score: a random draw and, where a prior is known, the best of each family by it.

        Families take turns: which of them wins depends on the amount of data, and the prior does not know that."""
        wanted = self.policy.specs
        self.reference = min(self.policy.reference, max(wanted // 2, 1))
        if not self.combined or len(drawn) <= wanted:
            return drawn[:wanted]
        reference, rest = drawn[: self.reference], drawn[self.reference :]
        prior = self.ranker.prior([spec for spec, _ in rest])
        families: dict[str, list[tuple[HeadSpec, Cost]]] = {}
        for i in np.argsort(-prior, kind="stable"):
            families.setdefault(transfer.family(rest[i][0]), []).append(rest[i])
        turns = (c for turn in zip_longest(*families.values()) for c in turn if c is not None)
        return [*reference, *islice(turns, wanted - len(reference))]

    def ranked(self, candidates: Candidates) -> tuple[Scored, ...]:
        """The candidates with their scores, best first."""
        able = sum(spec.solved for spec, _ in candidates) if self.combined else len(candidates)
        again = len(self.labels) > self.policy.samples
        self.total = len(candidates) + (min(self.policy.finalists, able) if again else 0)
        columns = self._columns(candidates, self.names, self.policy.samples)
        values = columns[self.names[0]]
        if self.combined:
            solved = [spec.solved for spec, _ in candidates]
            known = np.nan_to_num(values, nan=-np.inf)
            self.exact = {s: v for (s, _), v, ok in zip(candidates, known, solved, strict=True) if ok}
            values = transfer.estimates([s for s, _ in candidates], columns, self.reference, self.ranker)
            values = guarded(values, np.array(solved))
        return tuple(sorted((_scored(s, c, v) for (s, c), v in zip(candidates, values, strict=True)), key=_order))

    def closer(self, ranking: tuple[Scored, ...]) -> tuple[Scored, ...]:
        """The ranking after a second look at the finalists, on more samples.

        A single proxy reorders the best of its ranking. The combination has its finalists among the heads that ridge
        regression solves, for which the first proxy is the very error that training minimises: the best of them by
        that error take the first places that such heads hold."""
        if len(self.labels) <= self.policy.samples or not self.policy.finalists:
            return ranking
        pool = ranking
        if self.combined:
            pool = tuple(sorted((s for s in ranking if s.spec in self.exact), key=lambda s: -self.exact[s.spec]))
        finalists = pool[: self.policy.finalists]
        looked = self._columns([(s.spec, s.cost) for s in finalists], self.names[:1], self.policy.closer)
        again = [_scored(s.spec, s.cost, v) for s, v in zip(finalists, looked[self.names[0]], strict=True)]
        again.sort(key=_order)
        if not self.combined:
            return (*again, *ranking[len(again) :])
        chosen = {s.spec for s in again}
        solved = iter([*again, *(s for s in ranking if s.spec in self.exact and s.spec not in chosen)])
        return tuple(replace(next(solved), score=s.score) if s.spec in self.exact else s for s in ranking)

    def halved(self, ranking: tuple[Scored, ...]) -> tuple[Scored, ...]:
        """The ranking with the winner of successive halving in front: the best head of each of the best families."""
        best: dict[str, Scored] = {}
        for s in ranking:
            best.setdefault(transfer.family(s.spec), s)
        pool = list(best.values())[: self.policy.halving]
        winner = pool[halve([s.spec for s in pool], self.taps, self.labels, self.space.classes, self.policy.seed)[0]]
        return (winner, *(s for s in ranking if s is not winner))

    def _columns(self, candidates: Candidates, names: Sequence[str], samples: int) -> dict[str, F64]:
        """Scores `(candidates,)` by each proxy, NaN where it is undefined: on every core, in the candidates' order."""
        index = balanced(self.labels, samples, self.policy.seed)
        tensors = {t: torch.from_numpy(np.ascontiguousarray(x[index])) for t, x in self.taps.items()}
        y = torch.from_numpy(self.labels[index].astype(np.int64))
        sample = Sample(tensors, y, self.space.classes, self.policy.seed)

        def scores(candidate: tuple[HeadSpec, Cost]) -> list[float]:
            probe = Probe(*candidate, sample)
            found = [PROXIES[name](probe) for name in names]
            return [np.nan if v is None else v for v in found]

        rows = []
        with (
            single_thread() as cores,
            ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            pending = [pool.submit(scores, c) for c in candidates]
            try:
                for future in pending:
                    rows.append(future.result())
                    self.done += 1
                    self.on_progress("search", self.done, self.total)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        values = np.array(rows, np.float64).reshape(len(candidates), len(names))
        return {name: values[:, i] for i, name in enumerate(names)}


def guarded(values: F64, solved: NDArray[np.bool_]) -> F64:
    """Estimated accuracies `(specs,)`, none of an unmeasured head above the best measured one.

    The leave-one-out error of heads that ridge regression solves, `solved (specs,)`, is measured. For the others it is
    estimated, and the best of many estimates is too high (the winner's curse). So a head trained by descent can win
    only in successive halving, where it is trained."""
    if not solved.any():
        return values
    return np.where(solved, values, np.minimum(values, np.nextafter(values[solved].max(), 0)))


@contextmanager
def single_thread() -> Iterator[int]:
    """Scoring is thousands of tiny operations: handing each to a thread pool costs more than it saves.

    Yields the number of threads that torch had before; whole specifications are spread over them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


def pareto(ranking: Sequence[Scored]) -> tuple[Scored, ...]:
    """Those of a best-first ranking for which no better head has both fewer bytes and less latency."""
    front: list[Scored] = []
    for s in ranking:
        if s.score is not None and not any(
            f.cost.bytes <= s.cost.bytes and f.cost.latency_ms <= s.cost.latency_ms for f in front
        ):
            front.append(s)
    return tuple(front)


def _scored(spec: HeadSpec, cost: Cost, value: float) -> Scored:
    return Scored(spec, cost, float(value) if np.isfinite(value) else None)


def _order(s: Scored) -> tuple[float, int, str]:
    return (np.inf if s.score is None else -s.score, s.cost.parameters, str(s.spec))


def cheap_first(ranking: Sequence[Scored], tie: float, price: Price) -> tuple[Scored, ...]:
    """The best-first `ranking`, with the cheapest of the heads that tie with the first one moved to the front.

    An estimate does not tie with a known error (see `guarded`)."""
    top = ranking[0].score
    if top is None:
        return tuple(ranking)
    known = ranking[0].spec.solved
    near = [s for s in ranking if s.score is not None and s.score >= top - tie * abs(top)]
    tied = [s for s in near if s.spec.solved or not known]
    pick = min(tied, key=lambda s: float(getattr(s.cost, price)))
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


def _explain(ranking: tuple[Scored, ...], policy: SearchPolicy, drawn: int) -> str:
    best, scores = ranking[0], [s.score for s in ranking if s.score is not None]
    if not scores:
        return f"proxy {policy.proxy!r} is undefined for all {len(ranking)} heads; the smallest was taken"
    how = "winner of successive halving with" if policy.halving else "best"
    return (
        f"{best.spec.operator} head over {len(best.spec.inputs)} tap(s), {best.spec.reconfigurator} reconfigurator: "
        f"{how} {policy.proxy} score {best.score:.4g} of {len(ranking)} heads (median {np.median(scores):.4g}) out of "
        f"{drawn} within the budget, {best.cost.parameters} parameters, {best.cost.latency_ms:.2f} ms predicted"
    )
