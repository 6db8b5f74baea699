"""Expressivity of AZ-NAS: Lee and Ham, "AZ-NAS: Assembling Zero-Cost Proxies for Network Architecture Search",
CVPR 2024.

    score = -sum p_k log p_k, p the eigenvalues of the features' covariance, divided by their sum

Assumptions: of the last features alone, the codes, where the paper sums over blocks; random features as their kernel.
The exponential of the score is the effective rank (Roy and Vetterli, EUSIPCO 2007), which so ranks the same and has no
file of its own. Undefined where the codes are constant.
"""

from __future__ import annotations

import torch

from adaptors.proxies.probe import Probe


def az_expressivity(probe: Probe) -> float | None:
    """Entropy of the normalised principal variances of the codes, in nats."""
    if probe.constant:
        return None
    values = probe.spectrum[0].clamp_min(0)
    share = values / values.sum()
    return float(torch.special.entr(share).sum())
