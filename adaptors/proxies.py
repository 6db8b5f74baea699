"""Training-free scores of head specifications, all behind one `Proxy` protocol.

Larger is better. A proxy returns None where it is undefined for a specification (no activation pattern, no gradient
path); the search then ranks such specs last for that proxy. Every proxy sees the same `Probe`: the head at random
initialisation on a small labelled sample of the new domain, with costly parts computed once.

| name       | source |
|------------|--------|
| spectral   | ours: leave-one-out error of kernel ridge through the spectrum of the head's feature kernel |
| naswot     | Mellor et al., "Neural Architecture Search without Training", ICML 2021, eq. 2 |
| synflow    | Tanaka et al., "Pruning neural networks without any data", NeurIPS 2020, eq. 1 |
| snip       | Lee et al., "SNIP", ICLR 2019, eq. 5 |
| grad_norm  | Abdelfattah et al., "Zero-Cost Proxies for Lightweight NAS", ICLR 2021, section 3.1 |
| zico       | Li et al., "ZiCo", ICLR 2023, eq. 15 |
| meco       | Jiang et al., "MeCo", NeurIPS 2023, eq. 5, on the adapted features |
| parameters, macs, random | controls |
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from adaptors.modules import Head
from adaptors.spec import Cost, HeadSpec, TapShapes


class Probe:
    """A random head on a small labelled sample: `taps` tensors `(samples, *shape)`, `labels (samples,)`."""

    def __init__(
        self, spec: HeadSpec, cost: Cost, taps: Mapping[str, Tensor], labels: Tensor, classes: int, seed: int
    ) -> None:
        self.spec, self.cost, self.taps, self.labels, self.classes, self.seed = spec, cost, taps, labels, classes, seed

    @cached_property
    def head(self) -> Head:
        shapes: TapShapes = {t: tuple(self.taps[t].shape[1:]) for t in self.spec.inputs}
        head = Head(self.spec, shapes, self.classes, self.seed)
        with torch.no_grad():
            head.fit_normalisation(self.taps)
        return head

    @cached_property
    def codes(self) -> Tensor:
        with torch.no_grad():
            return self.head.code(self.head.adapted(self.taps))

    def gradients(self, chunk: slice = slice(None)) -> dict[str, Tensor]:
        """Gradient of the cross-entropy with respect to every matrix, by name."""
        taps = {t: self.taps[t][chunk] for t in self.spec.inputs}
        loss = F.cross_entropy(self.head(taps), self.labels[chunk])
        matrices = dict(self.head.matrices.items())
        return dict(zip(matrices, torch.autograd.grad(loss, list(matrices.values())), strict=True))


class Proxy(Protocol):
    """A training-free score: larger means a better head is expected; None where it is undefined."""

    def __call__(self, probe: Probe) -> float | None: ...


def kernel_loo(gram: Tensor, targets: Tensor, strengths: NDArray[np.float64]) -> float:
    """Least leave-one-out mean squared error of kernel ridge over a grid of ridge strengths; centred `gram (n, n)`.

    With K = U S U' the hat matrix is U diag(s / (s + l)) U', and leave-one-out residuals follow without refitting
    (Allen's PRESS): r_i / (1 - H_ii), where centring adds 1/n to H_ii. Directions of large eigenvalue that align with
    the labels lower the error; directions that only spread spectrum raise H_ii and with it the price of noise."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0)
    aligned = vectors.T @ targets
    best = np.inf
    for strength in strengths * max(float(values.sum()) / 10, 1e-12):
        keep = values / (values + strength)
        leverage = (vectors.square() @ keep + 1 / len(gram)).clamp(0, 1 - 1e-6)
        residual = (targets - vectors @ (keep[:, None] * aligned)) / (1 - leverage)[:, None]
        best = min(best, float(residual.square().mean()))
    return float(best)


def spectral(probe: Probe) -> float | None:
    """Minus the leave-one-out error of kernel ridge on the head's codes at initialisation.

    Class prototypes are the limit of infinite ridge strength, so they are scored at the strongest one only."""
    codes = probe.codes.double()
    codes = codes - codes.mean(0)
    if codes.shape[1] == 0 or float(codes.abs().max()) < 1e-12:
        return None
    targets = F.one_hot(probe.labels, probe.classes).double()
    strengths = np.geomspace(1e-4, 1.0, 9)
    if probe.spec.reconfigurator == "prototypes":
        strengths = strengths[-1:]
    return -kernel_loo(codes @ codes.T, targets - targets.mean(0), strengths)


def naswot(probe: Probe) -> float | None:
    """log |det| of the kernel of Hamming agreements between activation patterns (sign of hidden units)."""
    if probe.spec.operator not in ("mlp", "conv", "depthwise"):
        return None
    pattern = (probe.codes > 0).double()
    kernel = pattern @ pattern.T + (1 - pattern) @ (1 - pattern).T
    sign, logdet = torch.linalg.slogdet(kernel + 1e-3 * torch.eye(len(kernel), dtype=kernel.dtype))
    return float(logdet) if sign > 0 else None


def synflow(probe: Probe) -> float | None:
    """Sum of |weight * gradient| of the summed output for an all-ones input with absolute weights."""
    if not probe.spec.convolutional and probe.spec.operator != "mlp":
        return None
    head = Head(probe.spec, {t: tuple(probe.taps[t].shape[1:]) for t in probe.spec.inputs}, probe.classes, probe.seed)
    for weight in head.matrices.values():
        weight.data.abs_()
    output = head.forward({t: torch.ones_like(probe.taps[t][:1]) for t in probe.spec.inputs}).sum()
    weights = list(head.matrices.values())
    grads = torch.autograd.grad(output, weights)
    return float(torch.log1p(sum((w.detach() * g).abs().sum() for w, g in zip(weights, grads, strict=True))))


def snip(probe: Probe) -> float | None:
    """Sum of |weight * gradient| of the loss: the connection sensitivity."""
    grads = probe.gradients()
    return float(sum((probe.head.matrices[n].detach() * g).abs().sum() for n, g in grads.items()))


def grad_norm(probe: Probe) -> float | None:
    """Sum of the Euclidean norms of the loss gradients."""
    return float(sum(g.norm() for g in probe.gradients().values()))


def zico(probe: Probe) -> float | None:
    """Sum over layers of log sum of mean |gradient| over its deviation across four sub-batches."""
    n = len(probe.labels) // 4
    if n < 1:
        return None
    batches = [probe.gradients(slice(i * n, (i + 1) * n)) for i in range(4)]
    total = 0.0
    for name in batches[0]:
        stack = torch.stack([b[name].abs() for b in batches])
        deviation = stack.std(0)
        alive = deviation > 0
        ratio = float((stack.mean(0)[alive] / deviation[alive]).sum())
        if ratio <= 0:
            return None
        total += float(np.log(ratio))
    return total


def meco(probe: Probe) -> float | None:
    """Least eigenvalue of the correlation matrix between (at most 64) adapted features."""
    codes = probe.codes[:, :64].double()
    alive = codes.std(0) > 1e-9
    if int(alive.sum()) < 2:
        return None
    return float(torch.linalg.eigvalsh(torch.corrcoef(codes[:, alive].T))[0])


def parameters(probe: Probe) -> float | None:
    """Control: the number of learned parameters."""
    return float(probe.cost.parameters)


def macs(probe: Probe) -> float | None:
    """Control: multiply-accumulates."""
    return float(probe.cost.macs)


def random(probe: Probe) -> float | None:
    """Control: a number in [0, 1) drawn from the specification and the seed."""
    word = hashlib.sha256(f"{probe.seed}/{probe.spec}".encode()).digest()
    return int.from_bytes(word[:8], "big") / 2.0**64


PROXIES: dict[str, Proxy] = {
    "spectral": spectral,
    "naswot": naswot,
    "synflow": synflow,
    "snip": snip,
    "grad_norm": grad_norm,
    "zico": zico,
    "meco": meco,
    "parameters": parameters,
    "macs": macs,
    "random": random,
}
DEFAULT_PROXY = "spectral"
