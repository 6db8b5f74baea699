"""Trainability of TE-NAS: Chen et al., "Neural Architecture Search on ImageNet in Four GPU Hours", ICLR 2021.

    score = -log(largest / least eigenvalue of the NTK), NTK_ij = <df(x_i)/dw, df(x_j)/dw>, f the sum of the outputs

Assumptions: on the first 24 samples, as it costs a gradient each. Undefined for heads in closed form, for fewer than
two samples, and where the NTK is singular in single precision.
"""

from __future__ import annotations

import torch

from adaptors.proxies.probe import Probe

SAMPLES = 24


def te_nas(probe: Probe) -> float | None:
    """Minus the log of the condition number of the empirical neural tangent kernel."""
    if probe.spec.closed_form or len(probe.sample) < 2:
        return None
    taps = {t: probe.sample.taps[t][:SAMPLES] for t in probe.spec.inputs}
    outputs, weights = probe.head(taps).sum(1), list(probe.head.matrices.values())
    grads = [torch.autograd.grad(f, weights, retain_graph=True) for f in outputs]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in grads])
    values = torch.linalg.eigvalsh((jacobian @ jacobian.T).double())
    least, largest = float(values[0]), float(values[-1])
    return float(torch.log(values[0] / values[-1])) if least > 1e-6 * largest > 0 else None
