"""MeCo: Jiang et al., "MeCo: Zero-Shot NAS with One Data and Single Forward Pass via Minimum Eigenvalue of
Correlation", NeurIPS 2023, eq. 5.

    score = sum over layers of the least eigenvalue of the channels' correlation matrix

Assumptions: correlations are over all samples (and positions) and not over the positions of one input, as our maps have
fewer positions than channels; channels that do not vary are left out. Undefined for operators without hidden units, and
where no layer has two channels that vary.
"""

from __future__ import annotations

import torch

from adaptors.proxies.probe import Probe


def meco(probe: Probe) -> float | None:
    """Summed least eigenvalues of the layers' correlation matrices."""
    least = []
    for layer in probe.hidden:
        channels = layer.transpose(0, 1).flatten(1)
        channels = channels - channels.mean(1, keepdim=True)
        size = channels.norm(dim=1)
        channels = (channels / size[:, None])[size > 1e-6 * channels.shape[1] ** 0.5]
        if len(channels) > 1:
            least.append(float(torch.linalg.eigvalsh((channels @ channels.T).double())[0]))
    return sum(least) if least else None
