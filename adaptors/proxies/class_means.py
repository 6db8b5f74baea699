"""Ours: leave-one-out accuracy of the nearest class mean by cosine, on the head's codes.

    S_c = sum of z_j over samples j of class c, codes z of unit length
    score = fraction of samples i with y_i = argmax_c cos(z_i, S_c - [c = y_i] z_i)

Everything follows from the cosines K_ij = z_i . z_j: z_i . S_c is a row sum over a class, |S_c|^2 a block sum.

Assumptions: as of `spectral`; the smallest learner there is, so it sees geometry rather than capacity. Undefined where
no class has two samples, and where the codes are constant. A tie counts as wrong.
"""

from __future__ import annotations

import torch

from adaptors.proxies.probe import Probe


def class_means(probe: Probe) -> float | None:
    """Fraction of samples nearest to the mean of their own class, themselves left out."""
    targets, labels = probe.sample.targets, probe.sample.labels[:, None]
    if float(targets.sum(0).max()) < 2 or probe.constant:
        return None
    norm = probe.gram.diagonal().clamp_min(1e-12).sqrt()
    reach = (probe.gram / norm[:, None]) @ (targets / norm[:, None])  # z_i . S_c
    size = (targets * reach).sum(0).expand_as(reach)  # |S_c|^2
    alive = (probe.gram.diagonal() / norm.square())[:, None]  # 1, or 0 of a code that vanishes
    size = size - targets * (2 * reach - alive)
    cosine = (reach - targets * alive) / size.clamp_min(1e-12).sqrt()
    own = cosine.gather(1, labels)
    others = cosine.scatter(1, labels, -torch.inf).amax(1, keepdim=True)
    return float((own > others).float().mean())
