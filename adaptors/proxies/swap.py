"""SWAP-Score: Peng et al., "SWAP-NAS: Sample-Wise Activation Patterns for Ultra-fast NAS", ICLR 2024.

    score = |{ (1[v_u(x_1) > 0], ..., 1[v_u(x_n) > 0]) : u a hidden unit }|

One pattern a unit over the n samples, where NASWOT has one a sample over the units; at every position of a map.
Assumptions: as of `naswot`; without the paper's regularisation by size. Undefined without hidden units.
"""

from __future__ import annotations

import numpy as np

from adaptors.proxies.probe import Probe, patterns


def swap(probe: Probe) -> float | None:
    """Number of different patterns of hidden units over the sample."""
    on = patterns(probe)
    if on is None:
        return None
    words = np.packbits(on.numpy(), axis=0).T  # (units, bytes)
    rows = np.ascontiguousarray(words).view(np.dtype((np.void, words.shape[1])))
    return float(len(np.unique(rows)))
