"""What a proxy looks at: one head at random initialisation, on a small labelled sample of the new domain.

1. A `Sample` is shared by all probes of a search and keeps what many heads have in common: pooled maps, moments and
   Gram matrices of tap sets, the stems of convolutions. Keeping them changes no score, and their bytes are limited.
2. The Gram matrix of the codes is found without the codes wherever that is cheaper. It is exact, except that random
   features are replaced by what they approximate: `fourier` by the Gaussian kernel exp(-bandwidth |x - y|^2), the
   projection of more than 1024 features to prototypes by the identity. `Probe.random_features` tells how many they are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptors.cost import Cost
from adaptors.fields import Normalisation, Pool, TapShapes
from adaptors.modules import Head, TensorLayers, normaliser, pool_map
from adaptors.spec import HeadSpec

KEPT_BYTES = 96 << 20
"""Most that a sample keeps for later heads."""
STEM = 128
"""Channels of the stem that is computed once a map: a seeded draw of fewer rows gives the first rows of this one."""
Moments = tuple[Tensor, Tensor]


class Kept:
    """Results by key; beyond `limit` bytes the least recently used are dropped."""

    def __init__(self, limit: int = KEPT_BYTES) -> None:
        self.limit, self.bytes, self._lock = limit, 0, Lock()
        self._held: OrderedDict[Hashable, tuple[Tensor, ...]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The result of `make`, kept under `key`; two threads that ask at the same time may both compute it."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        made = make()
        with self._lock:
            if key not in self._held:
                self._held[key] = made
                self.bytes += _bytes(made)
            while self.bytes > self.limit:
                self.bytes -= _bytes(self._held.popitem(last=False)[1])
        return made


def _bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(t.nbytes for t in tensors)


@dataclass(frozen=True, eq=False)
class Sample:
    """`taps` tensors `(samples, *shape)`, float32, and `labels (samples,)` in `range(classes)`; `seed` draws heads."""

    taps: Mapping[str, Tensor]
    labels: Tensor
    classes: int
    seed: int = 0
    kept: Kept = field(default_factory=Kept, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shapes(self) -> TapShapes:
        return {t: tuple(x.shape[1:]) for t, x in self.taps.items()}

    @cached_property
    def targets(self) -> Tensor:
        """One-hot labels `(samples, classes)`."""
        return F.one_hot(self.labels, self.classes).float()

    def normalisation(self, spec: HeadSpec) -> Moments:
        """`shift` and `scale` of the head's vector input, as `Head.fit_normalisation` finds them."""
        moments = [self._moments(*part, spec.normalisation) for part in spec.parts]
        if not moments:
            return torch.zeros(0), torch.ones(0)
        means, deviations = zip(*moments, strict=True)
        return normaliser(torch.cat(means), torch.cat(deviations), spec.normalisation)

    def inputs(self, spec: HeadSpec) -> Tensor:
        """The head's normalised vector input `(samples, vector width)`."""
        parts = [self._part(*part, spec.normalisation) for part in spec.parts]
        if not parts:
            return torch.zeros(len(self), 0)
        shift, scale = self.normalisation(spec)
        return torch.cat(parts, 1).sub_(shift).mul_(scale)

    def gram(self, spec: HeadSpec) -> Tensor:
        """Inner products `(samples, samples)` of the head's normalised vector input."""

        def make() -> tuple[Tensor, ...]:
            x = self.inputs(spec)
            return (x @ x.T,)

        return self.kept.get(("gram", *spec.parts, spec.normalisation), make)[0]

    def stem(self, head: Head, tap: str) -> Tensor | None:
        """The stem of a convolutional head before its activation, cut from a wider one; None where the head's weights
        are not the beginning of that one."""
        weight = head.matrices["stem"]

        def make() -> tuple[Tensor, ...]:
            x = self.taps[tap].contiguous(memory_format=torch.channels_last)
            generator = torch.Generator().manual_seed(self.seed)
            wide = torch.randn((STEM, *weight.shape[1:]), generator=generator) * (2.0 / x.shape[1]) ** 0.5
            return wide, F.conv2d(x, wide)

        wide, maps = self.kept.get(("stem", tap), make)
        if not torch.equal(wide[: len(weight)], weight) or head.biases["stem"].any():
            return None
        return maps[:, : len(weight)].contiguous(memory_format=torch.channels_last)

    def _part(self, tap: str, pool: Pool | None, normalisation: Normalisation) -> Tensor:
        """One part of a vector input, before shift and scale."""

        def make() -> tuple[Tensor, ...]:
            x = self.taps[tap] if pool is None else pool_map(self.taps[tap], pool)
            return (F.normalize(x, dim=1, eps=1e-6) if normalisation == "unit" else x,)

        if pool is None and normalisation == "standard":
            return self.taps[tap]
        return self.kept.get(("part", tap, pool, normalisation), make)[0]

    def _moments(self, tap: str, pool: Pool | None, normalisation: Normalisation) -> Moments:
        def make() -> tuple[Tensor, ...]:
            x = self._part(tap, pool, normalisation)
            return x.mean(0), x.std(0, unbiased=False)

        return cast(Moments, self.kept.get(("moments", tap, pool, normalisation), make))


class Probe:
    """One head with its cost, at random initialisation, on a sample; costly parts are computed once."""

    def __init__(self, spec: HeadSpec, cost: Cost, sample: Sample) -> None:
        self.spec, self.cost, self.sample = spec, cost, sample

    @cached_property
    def head(self) -> Head:
        head = Head(self.spec, self.sample.shapes, self.sample.classes, self.sample.seed)
        shift, scale = self.sample.normalisation(self.spec)
        head.shift.copy_(shift)
        head.scale.copy_(scale)
        return head

    @cached_property
    def codes(self) -> Tensor:
        """What the readout multiplies, `(samples, width)`."""
        with torch.no_grad():
            return self.head.code(self.head.adapted(self.sample.taps))

    @cached_property
    def hidden(self) -> tuple[Tensor, ...]:
        """Inputs of the activations, layer by layer: `(samples, units)` or `(samples, channels, height, width)`.

        Empty where the operator has none."""
        return self._operated[1]

    @property
    def random_features(self) -> float:
        """How many random features stand behind the kernel that `gram` holds; infinity where it is exact."""
        return self.spec.row.random_features(self.spec)

    @cached_property
    def narrow(self) -> Tensor | None:
        """Few features with the codes' inner products; None where they are not fewer than half the samples."""
        features = self._operated[0]
        wide = self.spec.convolutional and bool(self.spec.taps)
        if features is None or wide or 2 * features.shape[1] > len(features):
            return None
        return F.normalize(features, dim=1, eps=1e-6) if self._prototypes else features

    @cached_property
    def gram(self) -> Tensor:
        """Inner products of the codes `(samples, samples)`, in the sense of rule 2."""
        if self.narrow is not None:
            return self.narrow @ self.narrow.T
        gram = self._adapted_gram()
        if self._prototypes:
            norm = gram.diagonal().clamp_min(1e-12).sqrt()
            gram = gram / norm / norm[:, None]
        return gram

    @cached_property
    def centred(self) -> Tensor:
        """`gram` of the codes less their mean."""
        gram = self.gram - self.gram.mean(0)
        return gram.sub_(gram.mean(1, keepdim=True))

    @cached_property
    def constant(self) -> bool:
        """Whether the codes of all samples are the same, as far as single precision tells."""
        total = float(self.gram.diagonal().sum())
        return total - float(self.gram.sum()) / len(self.gram) <= max(1e-6 * total, 1e-12)

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """`(values (k,), vectors (samples, k))` of `centred`, ascending; needs codes that are not constant."""
        if self.narrow is None:
            values, vectors = torch.linalg.eigh(self.centred)
            return values, vectors
        x = (self.narrow - self.narrow.mean(0)).double()
        values, axes = torch.linalg.eigh(x.T @ x)
        alive = values > 1e-10 * values[-1]
        return values[alive], (x @ axes[:, alive]) * values[alive].rsqrt()

    def gradients(self, chunk: slice = slice(None)) -> dict[str, Tensor]:
        """Gradient of the cross-entropy with respect to every matrix, by name."""
        taps = {t: self.sample.taps[t][chunk] for t in self.spec.inputs}
        loss = F.cross_entropy(self.head(taps), self.sample.labels[chunk])
        matrices = dict(self.head.matrices.items())
        return dict(zip(matrices, torch.autograd.grad(loss, list(matrices.values())), strict=True))

    @property
    def _prototypes(self) -> bool:
        return self.spec.reconfigurator == "prototypes"

    @cached_property
    def _operated(self) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """What the learned layers make of the sample `(samples, features)`, before the pooled taps of a convolutional
        head are joined, and the inputs of their activations."""
        if not self.spec.row.learned:
            return None, ()
        layers = SampledLayers(self)
        with torch.no_grad():
            features = self.spec.row.module(layers, self.spec)
        return features, tuple(layers.hidden)

    def _adapted_gram(self) -> Tensor:
        spec, features = self.spec, self._operated[0]
        if features is not None and not spec.convolutional:
            return features @ features.T
        gram = self.sample.gram(spec)
        if features is None:
            kernel: Tensor = spec.row.kernel(gram, spec)
            return kernel
        return torch.addmm(gram, features, features.T, beta=len(self.head.shift))


class SampledLayers(TensorLayers):
    """The layers of a probe's head on its sample, with what the sample keeps; `hidden` are the activations' inputs."""

    def __init__(self, probe: Probe) -> None:
        super().__init__(probe.head, probe.sample.taps)
        self.sample, self.hidden = probe.sample, list[Tensor]()

    def vector(self) -> Tensor:
        return self.sample.inputs(self.spec)

    def conv(self, x: Tensor, name: str, width: int) -> Tensor:
        stem = self.sample.stem(self.head, str(self.spec.spatial)) if name == "stem" else None
        return super().conv(x, name, width) if stem is None else stem

    def act(self, x: Tensor) -> Tensor:
        self.hidden.append(x)
        return super().act(x)

    def join(self, x: Tensor) -> Tensor:
        return x


def patterns(probe: Probe) -> Tensor | None:
    """Which hidden units are on: booleans `(samples, units over all layers and positions)`; None without units."""
    if not probe.hidden:
        return None
    return torch.cat([layer.flatten(1) for layer in probe.hidden], 1) > 0


class Proxy(Protocol):
    """A training-free score: larger means a better head is expected; None where it is undefined."""

    def __call__(self, probe: Probe) -> float | None: ...
