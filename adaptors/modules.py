"""Heads as torch modules: the operator, the reconfigurator, and the weights as plain named arrays.

`Head(spec, shapes, classes, seed)` is random at birth and deterministic for a seed; `weights()` gives the arrays that
the archive stores and `load()` takes them back. Everything random that is not learned (the signs of the structured
Fourier projection, the prototype projection) comes from the seed alone, see `adaptors.hadamard`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from adaptors.hadamard import factors, signs, signs_to_phase
from adaptors.spec import (
    PROTOTYPE_DIMENSIONS,
    PROTOTYPE_SCALE,
    HeadSpec,
    TapShapes,
    adapted_width,
    check_taps,
    next_power_of_two,
    vector_width,
)

Weights = dict[str, NDArray[np.float32]]
TapTensors = Mapping[str, Tensor]


def fwht(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of `(samples, n)` through two small matrix products."""
    left, right = (torch.tensor(f) for f in factors(x.shape[-1]))
    y: Tensor = left @ x.reshape(-1, len(left), len(right)) @ right
    return y.reshape(x.shape)


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

    Scales never fall below a hundredth of the average one, so that a dead channel is not blown up."""
    if kind == "unit":
        deviation = deviation.pow(2).mean().sqrt().expand_as(deviation)
    floor = 1e-2 * deviation.mean() + 1e-6
    return mean, 1.0 / ((deviation + floor) * len(mean) ** 0.5)


class Head(nn.Module):
    """One head. `forward(taps)` maps tap tensors `(samples, *shape)` to class scores `(samples, classes)`.

    The vector input is normalised by `shift` and `scale` (fitted by `fit_normalisation`), which are data and not
    learned; a random head has a random reconfigurator too. Every activation appends its input to `trace`, if that is
    a list."""

    shift: Tensor
    scale: Tensor

    def __init__(self, spec: HeadSpec, shapes: TapShapes, classes: int, seed: int = 0) -> None:
        super().__init__()
        check_taps(spec, shapes)
        self.spec, self.classes, self.seed = spec, classes, seed
        self.trace: list[Tensor] | None = None
        vector, adapted = vector_width(spec, shapes), adapted_width(spec, shapes)
        self.register_buffer("shift", torch.zeros(vector))
        self.register_buffer("scale", torch.ones(vector))
        self.matrices = nn.ParameterDict()
        self.biases = nn.ParameterDict()
        self._build_operator(shapes, vector)
        self._build_reconfigurator(adapted)
        self.reset(seed)

    def _build_operator(self, shapes: TapShapes, vector: int) -> None:
        spec, w = self.spec, self.spec.width
        if spec.operator == "fourier":
            n = next_power_of_two(max(vector, w))
            for i in range(3):
                self.register_buffer(
                    f"signs{i}", torch.from_numpy(signs(self.seed, f"fourier/{i}", n)), persistent=False
                )
            phase = signs_to_phase(self.seed, w)
            self.register_buffer("phase", torch.from_numpy(phase), persistent=False)
        elif spec.operator == "mlp":
            for i in range(spec.depth):
                self._matrix(f"layer{i}", (w, vector if i == 0 else w))
        elif spec.convolutional:
            assert spec.spatial is not None
            self._matrix("stem", (w, shapes[spec.spatial][0], 1, 1))
            for i in range(spec.depth):
                if spec.operator == "depthwise":
                    self.matrices[f"spread{i}"] = nn.Parameter(torch.zeros(w, 1, 3, 3))
                self._matrix(f"block{i}", (w, w, 1, 1))

    def _build_reconfigurator(self, adapted: int) -> None:
        width = adapted
        if self.spec.reconfigurator == "prototypes":
            width = PROTOTYPE_DIMENSIONS
            n = next_power_of_two(max(adapted, width))
            self.register_buffer("role", torch.from_numpy(signs(self.seed, "prototypes", n)), persistent=False)
        self._matrix("readout", (self.classes, width))

    def _matrix(self, name: str, shape: tuple[int, ...]) -> None:
        self.matrices[name] = nn.Parameter(torch.zeros(*shape))
        self.biases[name] = nn.Parameter(torch.zeros(shape[0]))

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
        parts = [taps[t] for t in self.spec.taps]
        if self.spec.spatial is not None and not self.spec.convolutional:
            parts.append(pool_map(taps[self.spec.spatial], self.spec.pool))
        if self.spec.normalisation == "unit":
            parts = [F.normalize(p, dim=1, eps=1e-6) for p in parts]
        if not parts:
            assert self.spec.spatial is not None
            return taps[self.spec.spatial].new_zeros(len(taps[self.spec.spatial]), 0)
        return torch.cat(parts, 1)

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
        spec = self.spec
        x: Tensor = (self.vector(taps) - self.shift) * self.scale
        if spec.operator == "linear":
            return x
        if spec.operator == "fourier":
            return self._fourier(x)
        if spec.operator == "mlp":
            return self.layers(x * x.shape[1] ** 0.5)
        assert spec.spatial is not None
        maps = self.blocks(self.stem(taps[spec.spatial]))
        return torch.cat([pool_map(maps, spec.pool), x * x.shape[1] ** 0.5], 1)

    def _act(self, x: Tensor) -> Tensor:
        if self.trace is not None:
            self.trace.append(x)
        return F.relu(x) if self.spec.activation == "relu" else F.hardswish(x)

    def _fourier(self, x: Tensor) -> Tensor:
        signs0, signs1, signs2 = (getattr(self, f"signs{i}") for i in range(3))
        n = signs0.shape[0]
        y = F.pad(x, (0, n - x.shape[1]))
        y = fwht(fwht(fwht(y * signs0) * signs1) * signs2)[:, : self.spec.width]
        gain = (2.0 * self.spec.bandwidth * n) ** 0.5
        phase = self.phase
        assert isinstance(phase, Tensor)
        code: Tensor = torch.cos(y * gain + phase) * (2.0 / self.spec.width) ** 0.5
        return code

    def layers(self, x: Tensor) -> Tensor:
        """The bottleneck layers of `mlp`, from inputs of mean squared one a channel."""
        for i in range(self.spec.depth):
            y = self._act(F.linear(x, self.matrices[f"layer{i}"], self.biases[f"layer{i}"]))
            x = x + y if self.spec.residual and i else y
        return x

    def stem(self, x: Tensor) -> Tensor:
        """The first convolution of a spatial tap `(samples, channels, height, width)`, before its activation."""
        return F.conv2d(x, self.matrices["stem"], self.biases["stem"])

    def blocks(self, x: Tensor) -> Tensor:
        """The convolutions after the stem, from the stem's result."""
        spec, m, b = self.spec, self.matrices, self.biases
        x = self._act(x)
        for i in range(spec.depth):
            y = x
            if spec.operator == "depthwise":
                y = F.conv2d(y, m[f"spread{i}"], padding=1, groups=spec.width)
            y = self._act(F.conv2d(y, m[f"block{i}"], b[f"block{i}"]))
            x = x + y if spec.residual else y
        return x

    def code(self, z: Tensor) -> Tensor:
        """What the readout multiplies: the adapted features, or their unit hypervector for `prototypes`."""
        if self.spec.reconfigurator != "prototypes":
            return z
        role = self.role
        assert isinstance(role, Tensor)
        return F.normalize(
            fwht(F.pad(z, (0, len(role) - z.shape[1])) * role)[:, :PROTOTYPE_DIMENSIONS], dim=1, eps=1e-6
        )

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
