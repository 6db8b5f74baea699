"""NASWOT: Mellor et al., "Neural Architecture Search without Training", ICML 2021, eq. 2.

    score = log |det K|, K_ij = units - Hamming(pattern_i, pattern_j), summed over the layers

A pattern is the signs of all inputs of activations for one sample, at every position of a map.
Assumptions: a unit of `hardswish` counts as on where its input is positive, as with `relu`; a ridge of 1e-3 keeps a
head of fewer units than samples finite. Undefined for operators without hidden units.
"""

from __future__ import annotations

import torch

from adaptors.proxies.probe import Probe, patterns

RIDGE = 1e-3


def naswot(probe: Probe) -> float | None:
    """Log determinant of the kernel of agreements between activation patterns."""
    on = patterns(probe)
    if on is None:
        return None
    sign = 2 * on.float() - 1
    kernel = ((sign @ sign.T + sign.shape[1]) / 2).double()
    found, logdet = torch.linalg.slogdet(kernel + RIDGE * torch.eye(len(kernel), dtype=kernel.dtype))
    return float(logdet) if found > 0 else None
