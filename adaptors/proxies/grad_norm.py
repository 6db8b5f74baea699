"""Gradient norm: Abdelfattah et al., "Zero-Cost Proxies for Lightweight NAS", ICLR 2021, section 3.1.

    score = sum over layers of |dL/dW|, Euclidean, L the cross-entropy of the sample

Undefined for heads in closed form, which no gradient trains.
"""

from __future__ import annotations

from adaptors.proxies.probe import Probe


def grad_norm(probe: Probe) -> float | None:
    """Sum of the Euclidean norms of the loss gradients."""
    return None if probe.spec.closed_form else float(sum(g.norm() for g in probe.gradients().values()))
