"""ZiCo: Li et al., "ZiCo: Zero-shot NAS via Inverse Coefficient of Variation on Gradients", ICLR 2023, eq. 15.

    score = sum over layers of log sum over weights of mean_b |g_b| / std_b |g_b|

over mini-batches b of the sample, here four of a quarter each; weights whose gradient does not vary are left out.
Undefined for heads in closed form, for fewer than four samples, and where no gradient of a layer varies.
"""

from __future__ import annotations

import numpy as np
import torch

from adaptors.proxies.probe import Probe

BATCHES = 4


def zico(probe: Probe) -> float | None:
    """Sum over layers of the log of the summed inverse coefficients of variation."""
    size = len(probe.sample) // BATCHES
    if probe.spec.closed_form or size < 1:
        return None
    batches = [probe.gradients(slice(i * size, (i + 1) * size)) for i in range(BATCHES)]
    total = 0.0
    for name in batches[0]:
        stack = torch.stack([b[name].abs() for b in batches])
        deviation = stack.std(0, unbiased=False)
        alive = deviation > 0
        ratio = float((stack.mean(0)[alive] / deviation[alive]).sum())
        if ratio <= 0:
            return None
        total += float(np.log(ratio))
    return total
