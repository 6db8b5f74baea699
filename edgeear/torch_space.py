"""The same hypervectors as `space`, computed by torchhd: the reference that the numpy code is held to.

This is the one file of the core that imports torch and torchhd; only the learning process and tests load it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torchhd

from adaptors.hadamard import fwht
from edgeear.space import QUIET, HypervectorSpace


def encode(space: HypervectorSpace, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Hypervectors `(samples, D)` of float32 `features`, differentiable; equal to `space.encode` to 1e-5."""
    code = torch.cat([_directions(space, features), _magnitudes(space, features)], dim=1)
    d, count = space.policy.dimensions, len(space.weights)
    slots = torch.zeros(len(code), count * d, dtype=code.dtype)
    slots[:, torch.tensor(space.index)] = code * torch.tensor(space.sign)
    projected = slots.reshape(-1, count, d) @ torch.from_numpy(fwht(np.eye(d, dtype=np.float32)))
    roles = torch.tensor(space.roles).as_subclass(torchhd.MAPTensor)
    bound = torchhd.bind(projected.as_subclass(torchhd.MAPTensor), roles)
    weighted = bound * torch.tensor(space.weights)[:, None]
    bundled: torch.Tensor = torchhd.multibundle(weighted).as_subclass(torch.Tensor)
    return torch.cat([_levels(space, features), bundled], dim=1) if space.policy.levels else bundled


def _levels(space: HypervectorSpace, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
    middle = torch.cat([features[tap.name] for tap in space.level_taps], dim=1)
    return middle @ torch.tensor(space.level_projection)


def _norms(space: HypervectorSpace, features: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    norms = [features[tap.name].norm(dim=1, keepdim=True) for tap in space.taps]
    return [n.clamp_min(QUIET * tap.channels**0.5) for n, tap in zip(norms, space.taps, strict=True)]


def _directions(space: HypervectorSpace, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
    pairs = zip(space.taps, _norms(space, features), strict=True)
    return torch.cat([features[tap.name] / norm for tap, norm in pairs], dim=1)


def _magnitudes(space: HypervectorSpace, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
    roots = torch.tensor([tap.channels**0.5 for tap in space.taps])
    return space.policy.magnitude_scale * torch.log(torch.cat(_norms(space, features), dim=1) / roots)
