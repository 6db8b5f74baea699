"""Synflow: Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow",
NeurIPS 2020, eq. 1.

    score = log(1 + sum |w * dR/dw|), R = sum of the outputs for an input of ones, weights replaced by their size

Assumptions: the network that is linear for positive inputs, so activations count as `relu` and the reconfigurator as
linear. Undefined for operators without learned layers.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from adaptors.modules import Head
from adaptors.proxies.probe import Probe


def synflow(probe: Probe) -> float | None:
    """Log of the synaptic flow."""
    spec, sample = probe.spec, probe.sample
    if not spec.row.learned:
        return None
    head = Head(replace(spec, activation="relu", reconfigurator="linear"), sample.shapes, sample.classes, sample.seed)
    weights = list(head.matrices.values())
    for weight in weights:
        weight.data.abs_()
    output = head({t: torch.ones_like(sample.taps[t][:1]) for t in spec.inputs}).sum()
    grads = torch.autograd.grad(output, weights)
    return float(torch.log1p(sum((w.detach() * g).abs().sum() for w, g in zip(weights, grads, strict=True))))
