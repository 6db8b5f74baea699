"""Fitting the winner of the search: closed form where the specification allows it, gradient descent otherwise.

Rules: heads solved in closed form choose their ridge strength by leave-one-out error, which needs one
eigendecomposition and no held-out samples; heads trained by descent stop by a stratified validation split; the same
seed and data give the same weights. With the `prototypes` reconfigurator gradient training is joint, as in section 3.2
of the EAR paper: the same cosine similarities are fitted to classify and, on virtual outliers (averages of inputs of
two classes), to stay low for every class.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from adaptors.fields import TapShapes
from adaptors.modules import Head, Weights
from adaptors.progress import Progress
from adaptors.proxies.spectral import residuals_left_out
from adaptors.quantise import dequantised
from adaptors.spec import PROTOTYPE_SCALE, HeadSpec
from adaptors.temperature import fit_temperature

Views = Sequence[Mapping[str, NDArray[np.float32]]]
"""The same samples seen in one or several ways (plain, flipped): each maps tap name -> `(samples, *shape)`."""
Solver = Callable[..., tuple[Tensor, Tensor]]
Fitted = tuple[float, str, Tensor, Tensor]
"""Accuracy on held-out samples, what was chosen, and those samples' scores `(held, classes)` and labels `(held,)`."""


@dataclass(frozen=True)
class TrainPolicy:
    """How a head is fitted. `strengths` are ridge strengths relative to the mean squared norm of the codes; one is
    chosen, on at most `spectrum` samples."""

    seed: int = 0
    validation_fraction: float = 0.2
    strengths: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    spectrum: int = 1000
    epochs: int = 30
    patience: int = 8
    batch: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    outlier_weight: float = 0.1


@dataclass(frozen=True)
class Trained:
    """A fitted head: arrays, accuracy (fraction of one) on samples that it was not fitted to, left out one by one or of
    the validation split, NaN where there are none, and what was chosen with them. `validated` is how many samples these
    were, `temperature` what makes the head's scores on them probabilities (temperature.py)."""

    weights: Weights
    validation_accuracy: float
    chosen: str
    validated: int = 0
    temperature: float | None = None


def train(
    spec: HeadSpec,
    shapes: TapShapes,
    views: Views,
    labels: NDArray[np.int64],
    classes: int,
    policy: TrainPolicy,
    on_progress: Progress | None = None,
) -> Trained:
    """Fit `spec` to labelled samples; `labels (samples,)` in [0, classes). The first view is what serving sees."""
    tensors = [{t: torch.from_numpy(np.ascontiguousarray(v[t])) for t in spec.inputs} for v in views]
    y = torch.from_numpy(labels.astype(np.int64))
    fit, held = split(labels, policy.validation_fraction, policy.seed)
    head = Head(spec, shapes, classes, policy.seed)
    with torch.no_grad():
        head.fit_normalisation(_gather(tensors[:1], fit))
    if spec.closed_form:
        chosen = _closed_form(head, tensors, y, fit, held, policy)
    else:
        chosen = _descend(head, tensors, y, fit, held, policy, on_progress)
    head.load(dequantised(head.weights(), spec.bits))
    scores, truth = chosen[2].numpy().astype(np.float32), chosen[3].numpy()
    return Trained(head.weights(), chosen[0], chosen[1], len(truth), fit_temperature(scores, truth))


@torch.no_grad()
def accuracy(
    spec: HeadSpec,
    shapes: TapShapes,
    weights: Weights,
    view: Mapping[str, NDArray[np.float32]],
    labels: NDArray[np.int64],
    classes: int,
    seed: int,
) -> float:
    """Share of `view` that a head classifies correctly, with its weights as `spec.bits` stores them."""
    head = Head(spec, shapes, classes, seed)
    head.load(dequantised(weights, spec.bits))
    taps = {t: torch.from_numpy(np.ascontiguousarray(view[t])) for t in spec.inputs}
    return _accuracy(head, _codes(head, [taps]), torch.from_numpy(labels.astype(np.int64)))


def split(labels: NDArray[np.int64], fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Stratified (fit, held-out) index tensors; a class with one sample stays in fit, and held may be empty."""
    rng = np.random.default_rng(seed)
    held: list[int] = []
    for c in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == c))
        held.extend(members[: int(len(members) * fraction)].tolist())
    mask = np.zeros(len(labels), bool)
    mask[held] = True
    return torch.from_numpy(np.flatnonzero(~mask)), torch.from_numpy(np.flatnonzero(mask))


def _gather(views: list[dict[str, Tensor]], index: Tensor) -> dict[str, Tensor]:
    return {t: torch.cat([v[t][index] for v in views]) for t in views[0]}


def _accuracy(head: Head, codes: Tensor, y: Tensor) -> float:
    if len(y) == 0:
        return float("nan")
    with torch.no_grad():
        return float((head.read(codes).argmax(1) == y).float().mean())


@torch.no_grad()
def _codes(head: Head, views: list[dict[str, Tensor]]) -> Tensor:
    """Codes of all samples, view after view, `(views * samples, width)`: computed in chunks, into one array."""
    n = len(next(iter(views[0].values())))
    out: Tensor | None = None
    for k, view in enumerate(views):
        for start in range(0, n, 256):
            part = slice(start, min(start + 256, n))
            some = head.code(head.adapted({t: x[part] for t, x in view.items()}))
            if out is None:
                out = some.new_empty(len(views) * n, some.shape[1])
            out[k * n + part.start : k * n + part.stop] = some
    assert out is not None
    return out


@torch.no_grad()
def _closed_form(
    head: Head, views: list[dict[str, Tensor]], y: Tensor, fit: Tensor, held: Tensor, policy: TrainPolicy
) -> Fitted:
    codes, n = _codes(head, views), len(y)
    every = torch.cat([fit + k * n for k in range(len(views))])
    if head.spec.reconfigurator == "prototypes":
        _set_prototypes(head, codes[every], y[fit].repeat(len(views)))
        score, scores = _accuracy(head, codes[held], y[held]), head.read(codes[held])
        _set_prototypes(head, codes, y.repeat(len(views)))
        return score, "class means", scores, y[held]
    some = torch.from_numpy(np.random.default_rng(policy.seed).permutation(n)[: policy.spectrum])
    strength, score, scores = left_out(codes[some], y[some], head.classes, policy.strengths)
    truth = y[some]
    if n > policy.spectrum:
        solve = _ridge(codes, y[fit].repeat(len(views)), head.classes, every)
        strength, score, scores = _stronger(head, solve, codes[held], y[held], strength)
        truth = y[held]
        del solve  # frees its Gram matrix before the next one is made
    _set_readout(head, *_ridge(codes, y.repeat(len(views)), head.classes)(strength, last=True))
    return score, f"ridge strength {strength:g}", scores, truth


@torch.no_grad()
def _stronger(head: Head, solve: Solver, codes: Tensor, y: Tensor, strength: float) -> tuple[float, float, Tensor]:
    """The best of `strength`, three and ten times as much on the held-out samples, its accuracy and its scores there.

    What was right for some samples is too weak where all of them, seen in several ways, come near the number of random
    features: there a ridge solution has its peak of variance (Belkin et al., 2019)."""
    found = []
    for factor in (1.0, 3.0, 10.0):
        _set_readout(head, *solve(factor * strength))
        found.append((_accuracy(head, codes, y), -factor, head.read(codes)))
    score, factor, scores = max(found, key=lambda one: one[:2])
    return -factor * strength, score, scores


def left_out(codes: Tensor, y: Tensor, classes: int, strengths: Sequence[float]) -> tuple[float, float, Tensor]:
    """The ridge strength of least leave-one-out squared error, and there the accuracy (fraction of one) and the scores
    `(samples, classes)` of the samples left out.

    See `adaptors.proxies.spectral` for the residuals."""
    z = (codes - codes.mean(0)).double()
    values, vectors = torch.linalg.eigh(z @ z.T)
    values = values.clamp_min(0)
    targets = F.one_hot(y, classes).double()
    ridge = torch.tensor(strengths, dtype=torch.float64)[:, None] * (float(values.sum()) / len(y) + 1e-12)
    residual = residuals_left_out(values, vectors, targets - targets.mean(0), ridge)[0]
    best = int(residual.square().mean((1, 2)).argmin())
    scores = targets - residual[best]
    return strengths[best], float((scores.argmax(1) == y).double().mean()), scores


def _ridge(codes: Tensor, y: Tensor, classes: int, rows: Tensor | None = None) -> Solver:
    """Solver of centred ridge regression onto one-hot targets: (strength, last) -> (weight `(classes, width)`, bias).

    `y` are the labels of `rows` of the codes, None for all. Primal or dual, whichever system is smaller. The Gram
    matrix takes most of the memory: it is computed in chunks, once for all strengths, and the `last` solution
    overwrites it."""
    rows = torch.arange(len(codes)) if rows is None else rows
    parts = rows.tensor_split(-(-len(rows) // 512))
    mean = torch.stack([codes[part].sum(0) for part in parts]).sum(0) / len(rows)
    targets = F.one_hot(y, classes).to(codes)
    offset = targets.mean(0)
    dual = len(rows) < codes.shape[1]
    if dual:
        gram, start = codes.new_empty(len(rows), len(rows)), 0
        for part in parts:
            gram[start : start + len(part)] = ((codes[part] - mean) @ codes.T)[:, rows]
            start += len(part)
        gram.sub_(gram.mean(1, keepdim=True))
        right = targets - offset
    else:
        gram, right = codes.new_zeros(codes.shape[1], codes.shape[1]), codes.new_zeros(codes.shape[1], classes)
        for part, target in zip(parts, (targets - offset).tensor_split(len(parts)), strict=True):
            z = codes[part] - mean
            gram.addmm_(z.T, z)
            right.addmm_(z.T, target)
    unit = float(gram.diagonal().sum() / len(rows)) + 1e-12

    def solve(strength: float, last: bool = False) -> tuple[Tensor, Tensor]:
        system = (gram if last else gram.clone()).mT  # columns lie together, as LAPACK wants them: no further copy
        system.diagonal().add_(strength * unit)
        solution = torch.cholesky_solve(right, torch.linalg.cholesky(system, out=system))
        if dual:
            full = codes.new_zeros(len(codes), classes).index_add_(0, rows, solution)
            weight = (codes.T @ full - mean[:, None] * solution.sum(0)).T
        else:
            weight = solution.T
        return weight, offset - weight @ mean

    return solve


def _set_readout(head: Head, weight: Tensor, bias: Tensor) -> None:
    head.matrices["readout"].data.copy_(weight)
    head.biases["readout"].data.copy_(bias)


def _set_prototypes(head: Head, codes: Tensor, y: Tensor) -> None:
    sums = torch.zeros(head.classes, codes.shape[1]).index_add_(0, y, codes)
    _set_readout(head, F.normalize(sums, dim=1, eps=1e-6), torch.zeros(head.classes))


def _descend(
    head: Head,
    views: list[dict[str, Tensor]],
    y: Tensor,
    fit: Tensor,
    held: Tensor,
    policy: TrainPolicy,
    on_progress: Progress | None,
) -> Fitted:
    """AdamW with a one-cycle schedule and early stopping on the validation accuracy; keeps the best epoch.

    With nothing held out the epoch is chosen on the fitted samples, and no accuracy is reported."""
    generator = torch.Generator().manual_seed(policy.seed)
    optimiser = torch.optim.AdamW(head.parameters(), policy.learning_rate, weight_decay=policy.weight_decay)
    batches = max(1, len(fit) // policy.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, policy.learning_rate, total_steps=policy.epochs * batches, pct_start=0.2
    )
    best, best_epoch, state = -1.0, 0, copy.deepcopy(head.state_dict())
    for epoch in range(policy.epochs):
        order = fit[torch.randperm(len(fit), generator=generator)]
        for index in order.tensor_split(batches):
            view = views[int(torch.randint(len(views), (1,), generator=generator))]
            loss = _loss(head, {t: x[index] for t, x in view.items()}, y[index], policy, generator)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
        watched = held if len(held) else fit
        score = _accuracy(head, _codes(head, [{t: x[watched] for t, x in views[0].items()}]), y[watched])
        if score >= best:
            best, best_epoch, state = score, epoch, copy.deepcopy(head.state_dict())
        if on_progress:
            on_progress("train", epoch + 1, policy.epochs)
        if epoch - best_epoch >= policy.patience:
            break
    head.load_state_dict(state)
    with torch.no_grad():
        scores = head({t: x[held] for t, x in views[0].items()})
    return best if len(held) else float("nan"), f"stopped after epoch {best_epoch + 1}", scores, y[held]


def _loss(head: Head, taps: dict[str, Tensor], y: Tensor, policy: TrainPolicy, generator: torch.Generator) -> Tensor:
    loss = F.cross_entropy(head(taps), y, label_smoothing=0.1)
    if head.spec.reconfigurator == "prototypes":
        partner = torch.randperm(len(y), generator=generator)
        other = y != y[partner]
        if bool(other.any()):
            mixed = {t: (x[other] + x[partner[other]]) / 2 for t, x in taps.items()}
            cosine = head(mixed) / PROTOTYPE_SCALE
            loss = loss + policy.outlier_weight * F.relu(cosine.amax(1) - 0.2).mean()
    return loss
