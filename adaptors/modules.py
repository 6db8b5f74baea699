"""Heads as torch modules: the operator, the reconfigurator, and the weights as plain named arrays.

`Head(spec, shapes, classes, seed)` is random when built, and deterministic for a seed; `weights()` gives the arrays
that the archive stores and `load()` takes them back. Everything random that is not learned (the signs of the
projections) comes from the seed alone, see `adaptors.hadamard`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from adaptors.fields import TapShapes
from adaptors.hadamard import factors, next_power_of_two, signs, signs_to_phase
from adaptors.spec import PROTOTYPE_DIMENSIONS, PROTOTYPE_SCALE, HeadSpec, check_taps, weight_shapes

Weights = dict[str, NDArray[np.float32]]
TapTensors = Mapping[str, Tensor]


def fwht(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of `(samples, n)` through two small matrix products."""
    left, right = (torch.tensor(f) for f in factors(x.shape[-1]))
    y: Tensor = left @ x.reshape(-1, len(left), len(right)) @ right
    return y.reshape(x.shape)


def scrambled(x: Tensor, seed: int, label: str, n: int) -> Tensor:
    """`fwht` of `x (samples, width)`, filled up to `n` numbers and multiplied by the seeded signs of `label`."""
    return fwht(F.pad(x, (0, n - x.shape[1])) * torch.from_numpy(signs(seed, label, n)))


def pool_map(x: Tensor, how: str) -> Tensor:
    """`(samples, channels, height, width)` to `(samples, channels or 4 channels)`."""
    if how == "average":
        return x.mean((2, 3))
    if how == "max":
        return x.amax((2, 3))
    if how == "gem":  # generalised mean with p = 3 (Radenovic et al. 2018)
        return x.clamp_min(1e-3).pow(3).mean((2, 3)).pow(1 / 3)
    h, w = x.shape[2], x.shape[3]
    top, left = slice(0, (h + 1) // 2), slice(0, (w + 1) // 2)
    bottom, right = slice(h // 2, h), slice(w // 2, w)
    return torch.cat([x[:, :, r, c].mean((2, 3)) for r in (top, bottom) for c in (left, right)], 1)


def normaliser(mean: Tensor, deviation: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """`(shift, scale)` that give a vector of these moments mean zero and mean squared norm about one.

    Scales never fall below a hundredth of the average one, so that a dead channel is not amplified."""
    if kind == "unit":
        deviation = deviation.pow(2).mean().sqrt().expand_as(deviation)
    floor = 1e-2 * deviation.mean() + 1e-6
    return mean, 1.0 / ((deviation + floor) * len(mean) ** 0.5)


class Head(nn.Module):
    """One head. `forward(taps)` maps tap tensors `(samples, *shape)` to class scores `(samples, classes)`.

    The vector input is normalised by `shift` and `scale` (fitted by `fit_normalisation`), which are data and not
    learned; a random head has a random reconfigurator too."""

    shift: Tensor
    scale: Tensor

    def __init__(self, spec: HeadSpec, shapes: TapShapes, classes: int, seed: int = 0) -> None:
        super().__init__()
        check_taps(spec, shapes)
        self.spec, self.classes, self.seed = spec, classes, seed
        self.matrices = nn.ParameterDict()
        self.biases = nn.ParameterDict()
        for name, shape in weight_shapes(spec, shapes, classes).items():
            kind, _, layer = name.partition(".")
            if kind in ("matrix", "bias"):
                held = self.matrices if kind == "matrix" else self.biases
                held[layer] = nn.Parameter(torch.zeros(shape))
            else:
                self.register_buffer(name, torch.zeros(shape) if name == "shift" else torch.ones(shape))
        self.reset(seed)

    def reset(self, seed: int) -> None:
        """Draw all learned parameters anew (Kaiming, biases zero) from `seed`."""
        generator = torch.Generator().manual_seed(seed)
        for weight in self.matrices.values():
            fan = weight[0].numel()
            weight.data = torch.randn(weight.shape, generator=generator) * (2.0 / fan) ** 0.5
        for bias in self.biases.values():
            bias.data.zero_()

    def vector(self, taps: TapTensors) -> Tensor:
        """The vector input before shift and scale, `(samples, vector width)`."""
        parts = [taps[tap] if pool is None else pool_map(taps[tap], pool) for tap, pool in self.spec.parts]
        if self.spec.normalisation == "unit":
            parts = [F.normalize(p, dim=1, eps=1e-6) for p in parts]
        return torch.cat(parts, 1) if parts else torch.zeros(len(next(iter(taps.values()))), 0)

    def fit_normalisation(self, taps: TapTensors) -> None:
        """Set `shift` and `scale` from data by `normaliser`."""
        x = self.vector(taps)
        if x.shape[1] == 0:
            return
        shift, scale = normaliser(x.mean(0), x.std(0, unbiased=False), self.spec.normalisation)
        self.shift.copy_(shift)
        self.scale.copy_(scale)

    def adapted(self, taps: TapTensors) -> Tensor:
        """The operator's output `(samples, adapted width)`."""
        adapted: Tensor = self.spec.row.module(TensorLayers(self, taps), self.spec)
        return adapted

    def code(self, z: Tensor) -> Tensor:
        """What the readout multiplies: the adapted features, or their unit hypervector for `prototypes`."""
        if self.spec.reconfigurator != "prototypes":
            return z
        n = next_power_of_two(max(z.shape[1], PROTOTYPE_DIMENSIONS))
        return F.normalize(scrambled(z, self.seed, "prototypes", n)[:, :PROTOTYPE_DIMENSIONS], dim=1, eps=1e-6)

    def read(self, code: Tensor) -> Tensor:
        """Class scores of codes: linear, or scaled cosine similarity to the class prototypes."""
        weight, bias = self.matrices["readout"], self.biases["readout"]
        if self.spec.reconfigurator == "prototypes":
            cosine = F.linear(code, F.normalize(weight, dim=1, eps=1e-6))
            return torch.add(bias, cosine, alpha=PROTOTYPE_SCALE)
        return F.linear(code, weight, bias)

    def forward(self, taps: TapTensors) -> Tensor:
        scores: Tensor = self.read(self.code(self.adapted(taps)))
        return scores

    def _arrays(self) -> dict[str, Tensor]:
        arrays: dict[str, Tensor] = {f"matrix.{k}": v for k, v in self.matrices.items()}
        return arrays | {f"bias.{k}": v for k, v in self.biases.items()} | {"shift": self.shift, "scale": self.scale}

    def weights(self) -> Weights:
        """All learned and fitted arrays by name; what the archive stores."""
        return {k: v.detach().numpy().astype(np.float32).copy() for k, v in self._arrays().items()}

    def load(self, weights: Mapping[str, NDArray[np.float32]]) -> None:
        """Set the named arrays, all or some of `weights()`; raises KeyError on a name that the head does not have."""
        arrays = self._arrays()
        for name, value in weights.items():
            arrays[name].data.copy_(torch.from_numpy(np.ascontiguousarray(value)))


class TensorLayers:
    """The layers of a head (`adaptors.operators.base.Tensors`) on the taps of a batch."""

    def __init__(self, head: Head, taps: TapTensors) -> None:
        self.head, self.taps, self.spec, self.seed = head, taps, head.spec, head.seed
        self.matrices, self.biases = head.matrices, head.biases

    def vector(self) -> Tensor:
        return (self.head.vector(self.taps) - self.head.shift) * self.head.scale

    def scaled(self) -> Tensor:
        x = self.vector()
        scaled: Tensor = x * x.shape[1] ** 0.5
        return scaled

    def map(self) -> Tensor:
        return self.taps[str(self.spec.spatial)]

    def dense(self, x: Tensor, name: str, width: int) -> Tensor:
        return F.linear(x, self.matrices[name], self.biases[name])

    def conv(self, x: Tensor, name: str, width: int) -> Tensor:
        return F.conv2d(x, self.matrices[name], self.biases[name])

    def spread(self, x: Tensor, name: str) -> Tensor:
        return F.conv2d(x, self.matrices[name], padding=1, groups=x.shape[1])

    def act(self, x: Tensor) -> Tensor:
        return F.relu(x) if self.spec.activation == "relu" else F.hardswish(x)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def pool(self, x: Tensor) -> Tensor:
        return pool_map(x, self.spec.pool)

    def join(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.scaled()], 1)

    def scrambled(self, x: Tensor, label: str, n: int) -> Tensor:
        return scrambled(x, self.seed, label, n)

    def phase(self, width: int) -> Tensor:
        return torch.from_numpy(signs_to_phase(self.seed, width))
