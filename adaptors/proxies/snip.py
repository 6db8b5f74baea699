"""SNIP: Lee et al., "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019, eq. 5, summed as in
Abdelfattah et al., ICLR 2021, section 3.1.

    score = sum |w * dL/dw|, L the cross-entropy of the sample

Undefined for heads in closed form, which no gradient trains.
"""

from __future__ import annotations

from adaptors.proxies.probe import Probe


def snip(probe: Probe) -> float | None:
    """Sum of the connection sensitivities."""
    if probe.spec.closed_form:
        return None
    return float(sum((probe.head.matrices[n].detach() * g).abs().sum() for n, g in probe.gradients().items()))
