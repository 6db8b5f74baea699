"""Training-free scores of head specifications, all behind one `Proxy` protocol, a file each.

Larger is better. A proxy returns None where it is undefined for a specification (no activation pattern, no gradient
path, constant codes); the search then ranks such specs last for that proxy. Every proxy sees the same `Probe`: the head
at random initialisation on a small labelled `Sample` of the new domain. A new proxy is a file and a line in `PROXIES`.

| name            | source | defined for |
|-----------------|--------|-------------|
| spectral        | ours: leave-one-out error of kernel ridge on the codes | all |
| class_means     | ours: leave-one-out accuracy of the nearest class mean of the codes | all |
| naswot          | Mellor et al., ICML 2021, eq. 2 | hidden units |
| swap            | Peng et al., ICLR 2024 | hidden units |
| synflow         | Tanaka et al., NeurIPS 2020, eq. 1 | learned layers |
| snip            | Lee et al., ICLR 2019, eq. 5 | gradient descent |
| grad_norm       | Abdelfattah et al., ICLR 2021, section 3.1 | gradient descent |
| zico            | Li et al., ICLR 2023, eq. 15 | gradient descent |
| meco            | Jiang et al., NeurIPS 2023, eq. 5 | hidden units |
| az_expressivity | Lee and Ham, CVPR 2024 | all |
| te_nas          | Chen et al., ICLR 2021 | gradient descent |
| parameters, macs, random | controls | all |
"""

from __future__ import annotations

from adaptors.proxies.az_expressivity import az_expressivity
from adaptors.proxies.class_means import class_means
from adaptors.proxies.controls import macs, parameters, random
from adaptors.proxies.grad_norm import grad_norm
from adaptors.proxies.meco import meco
from adaptors.proxies.naswot import naswot
from adaptors.proxies.probe import Probe, Proxy, Sample
from adaptors.proxies.snip import snip
from adaptors.proxies.spectral import kernel_loo, spectral
from adaptors.proxies.swap import swap
from adaptors.proxies.synflow import synflow
from adaptors.proxies.te_nas import te_nas
from adaptors.proxies.zico import zico

PROXIES: dict[str, Proxy] = {
    "spectral": spectral,
    "class_means": class_means,
    "naswot": naswot,
    "swap": swap,
    "synflow": synflow,
    "snip": snip,
    "grad_norm": grad_norm,
    "zico": zico,
    "meco": meco,
    "az_expressivity": az_expressivity,
    "te_nas": te_nas,
    "parameters": parameters,
    "macs": macs,
    "random": random,
}

__all__ = ["PROXIES", "Probe", "Proxy", "Sample", "kernel_loo"]
