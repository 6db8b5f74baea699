"""A learned combination of proxies: it ranks untrained heads by what trained heads of other domains showed.

No proxy compares a head solved in closed form with one trained by gradient descent: from the same features at
initialisation they end up points apart. This gap is much the same on every domain, so it is learned once, from tables
of trained heads, and never from the domain under search. As in RoBoT (He et al., ICLR 2024) the mix of scores is
linear; ours adds the fields of the specification. The model is ridge regression

    logit(accuracy) - its mean over the domain's heads  ~  w . x(spec, scores)

with x: the fields of the specification as numbers, the family (operator and reconfigurator), and each proxy's score,
standardised over a random draw of heads on the same domain, once for all and once a family. So a difference of two
scores is an expected difference of logits. No term of x names a tap, so the model holds for every encoder with several
taps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from adaptors.spec import HeadSpec

F64 = NDArray[np.float64]
INPUTS = ("spectral", "class_means", "parameters")
"""The proxies that the combination reads, the first one the most exact; of parameters it takes the logarithm."""
RIDGE = 10.0
"""Strength of the ridge, in heads: chosen on art paintings and cartoons (PACS) alone."""
FLOOR = 1e-3
"""Accuracies are kept this far from 0 and 1 before their logit is taken."""


@dataclass(frozen=True)
class Ranker:
    """A fitted combination. `weights` by term; `learned_on` names the domains of its tables."""

    weights: Mapping[str, float]
    learned_on: tuple[str, ...]

    def prior(self, specs: Sequence[HeadSpec]) -> F64:
        """Expected logit of every specification relative to the mean head, before any score is known `(specs,)`."""
        return self._sum(_words(specs))

    def score(self, specs: Sequence[HeadSpec], scores: Mapping[str, F64], reference: Mapping[str, F64]) -> F64:
        """Expected logit relative to the mean head `(specs,)`; `reference` holds the same scores of a random draw."""
        return self._sum({**_words(specs), **_score_terms(specs, standardised(scores, reference))})

    def _sum(self, terms: Mapping[str, F64]) -> F64:
        total: F64 = np.sum([self.weights.get(name, 0.0) * column for name, column in terms.items()], axis=0)
        return total


@dataclass(frozen=True, eq=False)
class Example:
    """One domain's trained heads, drawn at random: `scores[input] (heads,)`, `accuracy (heads,)` fractions of one."""

    domain: str
    specs: Sequence[HeadSpec]
    scores: Mapping[str, F64]
    accuracy: F64


def fit(examples: Sequence[Example], ridge: float = RIDGE) -> Ranker:
    """The ranker of least squared error on all heads of `examples`; raises ValueError where there are none."""
    if not examples:
        raise ValueError("a ranker is learned from the tables of at least one domain, and none is given")
    tables = [{**_words(e.specs), **_score_terms(e.specs, standardised(e.scores, e.scores))} for e in examples]
    names = sorted({name for table in tables for name in table})
    blocks, targets = [], []
    for example, table in zip(examples, tables, strict=True):
        x = np.stack([table.get(n, np.zeros(len(example.specs))) for n in names], axis=1)
        y = logit(example.accuracy)
        blocks.append(x - x.mean(axis=0))
        targets.append(y - y.mean())
    x, y = np.concatenate(blocks), np.concatenate(targets)
    w = np.linalg.solve(x.T @ x + ridge * np.eye(len(names)), x.T @ y)
    domains = tuple(dict.fromkeys(e.domain for e in examples))
    return Ranker(dict(zip(names, np.round(w, 4).tolist(), strict=True)), domains)


def estimates(
    specs: Sequence[HeadSpec], columns: Mapping[str, F64], reference: int, ranker: Ranker | None = None
) -> F64:
    """Estimated accuracy of every specification `(specs,)`, fractions of one; the first `reference` are a random draw.

    `columns[proxy] (specs,)`. The ranker tells differences of logits; the level comes from the heads of that draw
    whose accuracy is known without training: those with class prototypes in closed form (`class_means`)."""
    ranker = ranker or built_in()
    difference = ranker.score(specs, columns, {name: columns[name][:reference] for name in INPUTS})
    means = columns["class_means"]
    known = np.array([s.closed_form and not s.solved for s in specs]) & np.isfinite(means)
    known[reference:] = False
    level = float((logit(means[known]) - difference[known]).mean()) if known.any() else 0.0
    return np.asarray(1 / (1 + np.exp(-difference - level)))


def logit(accuracy: F64) -> F64:
    """log(a / (1 - a)) of fractions of one, finite at 0 and 1."""
    a = np.clip(accuracy, FLOOR, 1 - FLOOR)
    return np.asarray(np.log(a / (1 - a)))


def standardised(scores: Mapping[str, F64], reference: Mapping[str, F64]) -> dict[str, F64]:
    """Every input with the mean and deviation of the reference taken out; what is undefined counts as the mean."""
    found = {}
    for name in INPUTS:
        column, drawn = (np.log(x[name]) if name == "parameters" else x[name] for x in (scores, reference))
        known = drawn[np.isfinite(drawn)]
        mean, deviation = (float(known.mean()), float(known.std())) if len(known) else (0.0, 0.0)
        z = (column - mean) / deviation if deviation > 0 else np.zeros(len(column))
        found[name] = np.clip(np.where(np.isfinite(z), z, 0.0), -4.0, 4.0)
    return found


@cache
def built_in() -> Ranker:
    """The ranker that ships with the package, learned from the tables in benchmarks/data."""
    content = json.loads(files("adaptors").joinpath("ranker.json").read_text())
    return Ranker(content["weights"], tuple(content["learned_on"]))


def to_json(ranker: Ranker) -> str:
    """What `built_in` reads."""
    return json.dumps({"learned_on": list(ranker.learned_on), "weights": dict(ranker.weights)}, indent=1) + "\n"


def family(spec: HeadSpec) -> str:
    """Heads that are fitted in the same way: operator and reconfigurator."""
    return f"{spec.operator}/{spec.reconfigurator}"


def _score_terms(specs: Sequence[HeadSpec], z: Mapping[str, F64]) -> dict[str, F64]:
    families = np.array([family(s) for s in specs])
    terms = dict(z)
    for name in INPUTS:
        terms |= {f"{name} of {f}": z[name] * (families == f) for f in sorted(set(families))}
    return terms


def _words(specs: Sequence[HeadSpec]) -> dict[str, F64]:
    """The specification as numbers of order one; a term is zero where its word means nothing."""
    terms: dict[str, F64] = {}
    for i, spec in enumerate(specs):
        for name, value in _words_of(spec).items():
            if name not in terms:
                terms[name] = np.zeros(len(specs))
            terms[name][i] = value
    return terms


def _words_of(spec: HeadSpec) -> dict[str, float]:
    found = {
        family(spec): 1.0,
        "deep": float(spec.depth > 1),
        "residual": float(spec.residual),
        "hardswish": float(spec.activation == "hardswish"),
        "unit": float(spec.normalisation == "unit"),
        "int8": float(spec.bits == 8),
    }
    taps = {"taps": len(spec.taps) / 5, "no pooled tap": float(not spec.taps), "unit": found["unit"]}
    if spec.row.learned:
        taps["log width"] = float(np.log2(spec.width)) / 3
    found |= spec.row.terms(spec)
    if spec.spatial is not None:
        found[f"{spec.pool} pool"] = 1.0
    how = ["all", *(["prototypes"] if spec.reconfigurator == "prototypes" else [])]
    how += [*(["descended"] if not spec.closed_form else []), *(["convolution"] if spec.convolutional else [])]
    return {n: v for n, v in {**found, **{f"{n} ({h})": v for n, v in taps.items() for h in how}}.items() if v}
