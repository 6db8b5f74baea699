"""Ours: leave-one-out error of kernel ridge, through the spectrum of the kernel that the head's codes span.

    score = -min over l of mean((y_i - f_i(x_i; l))^2), f_i fitted without sample i

With the centred Gram matrix K = U S U' of the codes, the hat matrix is U diag(s / (s + l)) U', and leave-one-out
residuals follow without refitting (Allen's PRESS): r_i / (1 - H_ii), where centring adds 1/n to H_ii. Directions of
large eigenvalue that align with the labels lower the error; directions that only spread the spectrum raise H_ii and
with it the price of noise.

Random features. Where K is the limit of m random features (`fourier`), their scatter K_m - K has covariance
(K_ii K_jj + K_ij^2) / m for Gaussian features of covariance K; carried through (K + l)^-1 to first order it adds
mean((R K R)_ii / R_ii^2) * tr(Y' R K R Y) / (m c) with R = (K + l)^-1 and c classes.

Assumptions: the operator's layers stay near their draw, the reconfigurator does the learning; class prototypes are the
limit of infinite ridge strength, so they are scored at the strongest one only. Undefined where the codes are constant.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptors.proxies.probe import Probe

STRENGTHS = np.geomspace(1e-4, 1.0, 9)
"""Ridge strengths, in tenths of the kernel's trace."""


def spectral(probe: Probe) -> float | None:
    """Minus the leave-one-out error of ridge on the head's codes at initialisation."""
    if probe.constant:
        return None
    targets = probe.sample.targets - probe.sample.targets.mean(0)
    prototypes = probe.spec.reconfigurator == "prototypes"
    if prototypes and probe.narrow is None:
        return -kernel_loo(probe.centred, targets, STRENGTHS[-1:])
    strengths = STRENGTHS[-1:] if prototypes else STRENGTHS
    features = float("inf") if prototypes else probe.random_features
    values, vectors = probe.spectrum
    return -spectrum_loo(values, vectors, targets.to(vectors.dtype), strengths, features)


def kernel_loo(gram: Tensor, targets: Tensor, strengths: NDArray[np.float64]) -> float:
    """Least leave-one-out mean squared error of kernel ridge over a grid of ridge strengths; centred `gram (n, n)`,
    centred `targets (n, c)`. One strength needs no eigenvectors: r = l (K + l)^-1 y and 1 - H_ii = l (K + l)^-1_ii."""
    if len(strengths) > 1:
        values, vectors = torch.linalg.eigh(gram)
        return spectrum_loo(values, vectors, targets, strengths)
    ridge = float(strengths[0]) * max(float(gram.diagonal().sum()) / 10, 1e-12)
    shifted = gram.clone()
    shifted.diagonal().add_(ridge)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(shifted)) * ridge
    free = (inverse.diagonal() - 1 / len(gram)).clamp_min(1e-6)
    return float((inverse @ targets / free[:, None]).square().mean())


def spectrum_loo(
    values: Tensor,
    vectors: Tensor,
    targets: Tensor,
    strengths: NDArray[np.float64],
    features: float = float("inf"),
) -> float:
    """`kernel_loo` from eigenvalues `(k,)` and eigenvectors `(n, k)`; `features` random ones stand behind them."""
    values = values.clamp_min(0)
    ridge = torch.from_numpy(strengths * max(float(values.sum()) / 10, 1e-12)).to(values.dtype)[:, None]
    residual, keep, free = residuals_left_out(values, vectors, targets, ridge)
    error = residual.square().mean((1, 2))
    if np.isfinite(features):
        shaken = keep * (1 - keep) / ridge  # eigenvalues of R K R
        spread = (vectors.square() @ shaken.T / (free / ridge.T).square()).mean(0)
        aligned = (vectors.T @ targets).square().sum(1)
        error = error + spread * (shaken @ aligned) / (features * targets.shape[1])
    return float(error.min())


def residuals_left_out(
    values: Tensor, vectors: Tensor, targets: Tensor, ridge: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Residuals of each sample left out `(strengths, n, classes)` for `ridge (strengths, 1)`; what each eigenvector
    keeps `(strengths, k)`; and 1 - H_ii `(n, strengths)`. `values` are not negative, `targets` are centred."""
    keep = values / (values + ridge)
    free = 1 - (vectors.square() @ keep.T + 1 / len(targets)).clamp(0, 1 - 1e-6)
    fitted = vectors @ (keep[:, :, None] * (vectors.T @ targets))
    return (targets - fitted) / free.T[:, :, None], keep, free
