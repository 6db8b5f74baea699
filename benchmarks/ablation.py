"""Each choice of the hyperdimensional core switched off or varied, on PACS: detection, routing and accuracy.

A job is one variant and one seed. Every variant goes through the same public functions; what differs is the hypervector
that they are given, so that a variant is exactly one change. Those of the bundle leave the level part as it is:

- projection off: the code's own coordinates in place of random projections of it;
- binding off: roles all one, every tap still with its own projection; shared projection: one projection for every tap,
  told apart by the roles alone, or by nothing;
- dimensions, and bits: the bundle is rounded to its sign or to 256 steps before anything is learned.

Those of the level part leave the bundle as it is: no levels, so that second-order memory covers the first coordinates
of the bundle and the angle the others; levels alone, so that novelty is the leverage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from adaptors.hadamard import fwht
from adaptors.spec import HeadSpec
from benchmarks.data import DataSet, Inputs, seeded
from benchmarks.detection import Row
from benchmarks.ours import Learned, M, learn_domain, readout, route_by
from device.evaluation.data import I64
from edgeear.metrics import auroc, fpr95
from edgeear.novelty import detector
from edgeear.space import HypervectorSpace
from edgeear.types import F32

DIMENSIONS = (512, 1024, 2048, 8192)
OUTLIER_WEIGHTS = (0.0, 0.1)
SHOTS = 20
LEVELS_ALONE = "levels alone"
Encode = Callable[[HypervectorSpace, Inputs], F32]


def variants() -> dict[str, tuple[str, Encode]]:
    """Name -> (the choice it belongs to, its hypervectors)."""
    found: dict[str, tuple[str, Encode]] = {
        "ours": ("", lambda s, x: x.h),
        "no projection": ("projection", unprojected),
        "no binding": ("binding", lambda s, x: bundled(s, x, bound=False, shared=False)),
        "one projection, bound": ("binding", lambda s, x: bundled(s, x, bound=True, shared=True)),
        "one projection, not bound": ("binding", lambda s, x: bundled(s, x, bound=False, shared=True)),
        "8 bits": ("bits", lambda s, x: levelled(s, x, rounded(bundle(s, x), 127))),
        "1 bit": ("bits", lambda s, x: levelled(s, x, np.where(bundle(s, x) < 0, np.float32(-1), np.float32(1)))),
        "no levels": ("levels", bundle),
        LEVELS_ALONE: ("levels", lambda s, x: x.h[:, : s.policy.levels]),
    }
    for d in DIMENSIONS:
        found[f"D = {d}"] = ("dimensions", lambda s, x, d=d: resized(s, d).encode(x.features))  # type: ignore[misc]
    return found


def bundle(space: HypervectorSpace, x: Inputs) -> F32:
    """Hypervectors without their level part."""
    return x.h[:, space.policy.levels :]


def levelled(space: HypervectorSpace, x: Inputs, bundle: F32) -> F32:
    """Hypervectors of another bundle with the level part of ours."""
    return np.concatenate([x.h[:, : space.policy.levels], bundle], axis=1)


def unprojected(space: HypervectorSpace, x: Inputs) -> F32:
    """The weighted code itself in place of the bundle."""
    return levelled(space, x, space.code(x.features) * space.weights[space.index // space.policy.dimensions])


def bundled(space: HypervectorSpace, x: Inputs, *, bound: bool, shared: bool) -> F32:
    """Hypervectors with the roles left out, or with one projection for every tap."""
    code, d = space.code(x.features), space.policy.dimensions
    slot, place = np.divmod(space.index, d)
    sign = space.sign.copy()
    if shared:
        first_place, first_sign = (
            np.random.default_rng(1).permutation(d),
            np.sign(np.random.default_rng(2).random(d) - 0.5),
        )
        rank = np.concatenate([np.arange((slot == s).sum()) for s in range(len(space.roles))])
        order = np.argsort(slot, kind="stable")
        place = place.copy()
        place[order], sign[order] = first_place[rank], first_sign[rank].astype(np.float32)
    roles = (space.roles if bound else np.ones_like(space.roles)) * space.weights[:, None]
    out = np.empty((len(code), d), np.float32)
    for start in range(0, len(code), 64):
        part = code[start : start + 64]
        slots = np.zeros((len(part), len(roles), d), np.float32)
        slots.reshape(len(part), -1)[:, slot * d + place] = part * sign
        out[start : start + 64] = np.einsum("nsd,sd->nd", fwht(slots), roles)
    return levelled(space, x, out)


def rounded(h: F32, steps: int) -> F32:
    """Whole multiples of the largest magnitude of each bundle over `steps`."""
    step = np.maximum(np.abs(h).max(axis=1, keepdims=True), 1e-9) / steps
    out: F32 = (np.rint(h / step) * step).astype(np.float32)
    return out


def resized(space: HypervectorSpace, dimensions: int) -> HypervectorSpace:
    """The same space with a bundle of other dimensions."""
    return HypervectorSpace(space.taps, replace(space.policy, dimensions=dimensions))


def ablate(variant: str, seed: int) -> list[Row]:
    """One row: means over the 12 pairs and the 4 domains."""
    data = seeded("pacs", seed)
    choice, encode = variants()[variant]
    space = data.domains[0].train.space
    train = [encode(space, d.train) for d in data.domains]
    test = [encode(space, d.test) for d in data.domains]
    learned = [
        learn_domain(h, d.train_labels, seed, min(M, h.shape[1])) for h, d in zip(train, data.domains, strict=True)
    ]
    if variant == LEVELS_ALONE:
        learned = [replace(k, novelty=detector(k.memory).leverage) for k in learned]
    route = route_by([k.memory for k in learned])
    row: Row = {"variant": variant, "choice": choice, "seed": seed, **_detection(learned, test)}
    row["routing"] = float(np.mean([(route(h) == i).mean() for i, h in enumerate(test)]))
    row |= _reading(data, learned, test)
    return [row]


def _detection(learned: list[Learned], test: list[F32]) -> Row:
    scores = [[known.novelty(h) for h in test] for known in learned]
    pairs = [(s[i], s[j]) for i, s in enumerate(scores) for j in range(len(test)) if i != j]
    return {
        "auroc": float(np.mean([auroc(a, b) for a, b in pairs])),
        "fpr95": float(np.mean([fpr95(a, b) for a, b in pairs])),
    }


def _reading(data: DataSet, learned: list[Learned], test: list[F32]) -> Row:
    """Accuracy in each domain by nearest prototype and by ridge regression on the first m coordinates."""
    prototypes, ridge = [], []
    for known, h, domain in zip(learned, test, data.domains, strict=True):
        classes: I64 = np.array([int(c) for c in known.memory.classes])
        prototypes.append((classes[(h @ known.memory.prototypes.T).argmax(axis=1)] == domain.test_labels).mean())
        ridge.append((classes[readout(known.memory).scores(h).argmax(axis=1)] == domain.test_labels).mean())
    return {"prototypes": float(np.mean(prototypes)), "ridge": float(np.mean(ridge))}


def joint_training(weight: float, seed: int) -> list[Row]:
    """A prototypes head on the last taps, trained with the hyperdimensional loss against virtual outliers, or without:
    accuracy in its domain and AUROC of its largest cosine against the other domains; 20 images a class."""
    import torch

    from adaptors.modules import Head
    from adaptors.train import TrainPolicy, train

    data, taps = seeded("pacs", seed, SHOTS), ("stage7.mean", "head.mean")
    spec = HeadSpec(taps, operator="mlp", width=64, reconfigurator="prototypes")
    shapes = {t: data.domains[0].train.features[t].shape[1:] for t in taps}
    accuracy, areas, rates = [], [], []
    for domain in data.domains:
        policy = TrainPolicy(seed=seed, outlier_weight=weight)
        fitted = train(spec, shapes, [domain.train.features], domain.train_labels, len(data.classes), policy)
        head = Head(spec, shapes, len(data.classes), seed)
        head.load(fitted.weights)
        with torch.no_grad():
            scores = [head({t: torch.from_numpy(d.test.features[t]) for t in taps}).numpy() for d in data.domains]
        own = scores[data.domains.index(domain)]
        accuracy.append(float((own.argmax(axis=1) == domain.test_labels).mean()))
        for other, strange in zip(data.domains, scores, strict=True):
            if other is not domain:
                areas.append(auroc(-own.max(axis=1), -strange.max(axis=1)))
                rates.append(fpr95(-own.max(axis=1), -strange.max(axis=1)))
    row: Row = {"outlier_weight": weight, "seed": seed, "accuracy": float(np.mean(accuracy))}
    return [row | {"auroc": float(np.mean(areas)), "fpr95": float(np.mean(rates))}]
