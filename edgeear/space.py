"""From features to hypervectors: every tap projected, bound to its role vector, and bundled.

Rules of this file:

1. The projection is fixed and orthonormal (HDFF: Wilson et al., WACV 2023): a tap's code is scattered to seeded random
   positions with seeded random signs and transformed by the orthonormal Walsh-Hadamard matrix, so norms are preserved.
2. A tap's code keeps its direction and its magnitude: `[x / |x|, c * (log|x| - log(d) / 2)]`. With angles alone,
   shallow taps rank foreign images as familiar.
3. Binding is elementwise multiplication with +1/-1 role vectors and bundling is the sum (the MAP model).
4. The first coordinates of a hypervector are its level part (levels.py), the others the bundle.
5. Everything follows from the policy and the taps: two systems may exchange memories if and only if `digest` is equal.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from adaptors.hadamard import fwht, permutation, signs, thirds
from edgeear.errors import DataError, UsageError
from edgeear.levels import projection, shares
from edgeear.types import F32, Features, Tap

Scalar = TypeVar("Scalar", bound=np.generic)
CHUNK = 64
"""Samples encoded at once: bounds the scratch memory at CHUNK * slots * dimensions floats."""
MAX_CHANNELS = 8192
"""Of a tap: the square of it is the scratch memory of its levels. All taps together may have 16 times as many."""
QUIET = 1e-6
"""Root mean square below which a tap counts as silent: its direction fades to zero, its magnitude stays finite."""


@dataclass(frozen=True)
class SpacePolicy:
    """What fixes a hypervector space, beside the taps.

    `dimensions` of the bundle: a power of two from 2 to 2**20; `shallow_weight` (> 0) multiplies the first half of the
    taps, whose novelty is mostly sensor noise; `magnitude_scale` c (>= 0) weighs log-magnitude against direction;
    `deviation_weight` (> 0) is what a tap of standard deviations (`*.std`) counts against one of means (`*.mean`).
    `levels` (>= 0) coordinates of level part read the taps from `level_from` to `level_to` of the depth, in [0, 1].
    """

    dimensions: int = 2048
    seed: int = 0
    shallow_weight: float = 0.3
    magnitude_scale: float = 0.3
    deviation_weight: float = 2.0
    levels: int = 256
    level_from: float = 0.4
    level_to: float = 0.75

    def __post_init__(self) -> None:
        d = self.dimensions
        if not 2 <= d <= 1 << 20 or d & (d - 1):
            raise UsageError(f"dimensions is {d}: it must be a power of two from 2 to {1 << 20}")
        if not (math.isfinite(self.shallow_weight) and self.shallow_weight > 0):
            raise UsageError(f"shallow_weight is {self.shallow_weight}: it must be finite and above 0")
        if not (math.isfinite(self.magnitude_scale) and self.magnitude_scale >= 0):
            raise UsageError(f"magnitude_scale is {self.magnitude_scale}: it must be finite and not below 0")
        if not (math.isfinite(self.deviation_weight) and self.deviation_weight > 0):
            raise UsageError(f"deviation_weight is {self.deviation_weight}: it must be finite and above 0")
        if not 0 <= self.levels <= 1 << 14:
            raise UsageError(f"levels is {self.levels}: it must be from 0 to {1 << 14}")
        if not 0 <= self.level_from < self.level_to <= 1:
            raise UsageError(f"levels are read from {self.level_from} to {self.level_to}: it must be a range in [0, 1]")


class HypervectorSpace:
    """The map from the features of pooled `taps` to hypervectors; immutable after construction.

    A slot is one B-vector of the bundle, B = `policy.dimensions`: a tap of up to B - 1 channels has one, a wider tap
    several. Public tables, all read-only: `index (codes,)` flat position of each code coordinate in `(slots, B)`,
    `sign (codes,)`, `roles (slots, B)` in {-1, +1}, `weights (slots,)`.
    Code coordinates are all taps' directions in order, then one magnitude per tap.
    """

    def __init__(self, taps: Sequence[Tap], policy: SpacePolicy | None = None) -> None:
        self.taps = tuple(taps)
        self.policy = policy or SpacePolicy()
        _check_taps(self.taps)
        self._names = [tap.name for tap in self.taps]
        self._channels = [tap.channels for tap in self.taps]
        self._widths = np.array(self._channels)
        self._starts = np.concatenate([[0], np.cumsum(self._widths)[:-1]])
        self._half_log = 0.5 * np.log(self._widths)
        self._floor = QUIET * np.sqrt(self._widths)
        self.slots = tuple(-(-(int(d) + 1) // self.policy.dimensions) for d in self._widths)
        self.index, self.sign, self.roles, self.weights = _tables(self.taps, self.slots, self.policy)
        self.level_taps = _middle(self.taps, self.policy)
        self.level_projection = projection(self.level_taps, self.policy.levels, self.policy.seed)
        self._level_blocks = _blocks(self.level_taps, self.level_projection)
        self._factors = thirds(self.policy.dimensions)
        b, slots = len(self._factors[2]), len(self.roles)
        slot, place = np.divmod(self.index, self.policy.dimensions)
        row, column = np.divmod(place, b)
        # `index` and the weighted roles in the layout (rows, slots, b) that `_bundle` works in.
        self._spread = _frozen((row * slots + slot) * b + column)
        bound = self.roles * (self.weights[:, None] / np.float32(math.sqrt(self.policy.dimensions)))
        self._bound = _frozen(np.ascontiguousarray(bound.reshape(slots, -1, b).transpose(1, 0, 2)))

    @property
    def dimensions(self) -> int:
        """D, the length of a hypervector: level part and bundle."""
        return self.policy.levels + self.policy.dimensions

    @property
    def digest(self) -> str:
        """SHA-256 (lower-case hex) of the policy and the taps."""
        text = json.dumps([2, asdict(self.policy), [[t.name, t.shape] for t in self.taps]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def encode(self, features: Features) -> F32:
        """Hypervectors `(samples, D)` of the features; taps of other spaces in the mapping are ignored.

        Raises `UsageError` for a missing tap or a wrong shape, `DataError` for NaN or infinity; both name the tap.
        """
        code, levels = self.code(features), self.policy.levels
        out = np.empty((len(code), self.dimensions), np.float32)
        out[:, :levels] = 0
        for tap, columns, block in self._level_blocks:  # one by one: mostly zeros, and read for every frame
            np.matmul(features[tap], block, out=out[:, columns])
        for first in range(0, len(code), CHUNK):
            out[first : first + CHUNK, levels:] = self._bundle(code[first : first + CHUNK])
        return out

    def code(self, features: Features) -> F32:
        """Directions and magnitudes before the projection, `(samples, codes)`."""
        arrays = self._read(features)
        code = np.empty((len(arrays[0]), len(self.index)), np.float32)
        x, magnitude = code[:, : -len(self.taps)], code[:, -len(self.taps) :]
        np.concatenate(arrays, axis=1, out=x)
        norm = np.sqrt(np.add.reduceat(np.square(x, dtype=np.float64), self._starts, axis=1))
        if not math.isfinite(norm.sum()):
            tap = self.taps[int(np.argmin(np.isfinite(norm).all(axis=0)))]
            raise DataError(f"tap {tap.name} has NaN or infinite features: check the encoder and its input")
        norm = np.maximum(norm, self._floor)
        magnitude[:] = self.policy.magnitude_scale * (np.log(norm) - self._half_log)
        x *= np.repeat((1 / norm).astype(np.float32), self._widths, axis=1)
        return code

    def unbind(self, h: F32, tap_name: str) -> F32:
        """Estimate of the tap's directions `(samples, channels)` from hypervectors `(samples, D)`.

        Exact for a space of one slot; otherwise the other slots add cross-talk. Raises `UsageError` for an unknown tap.
        """
        at = next((i for i, tap in enumerate(self.taps) if tap.name == tap_name), None)
        if at is None:
            raise UsageError(f"tap {tap_name} is not in this space: choose from {[t.name for t in self.taps]}")
        first, count = sum(self.slots[:at]), self.slots[at]
        codes = slice(int(self._starts[at]), int(self._starts[at] + self._widths[at]))
        d, bundle = self.policy.dimensions, h[:, None, self.policy.levels :]
        bound = bundle * (self.roles / self.weights[:, None])[first : first + count]
        flat = fwht(bound).reshape(len(h), count * d)
        out: F32 = flat[:, self.index[codes] - first * d] * self.sign[codes]
        return out

    def _bundle(self, code: F32) -> F32:
        n, (left, middle, right) = len(code), self._factors
        a, b = len(left), len(right)
        slots = np.zeros((n, self._bound.size), np.float32)
        for row, signed in zip(slots, code * self.sign, strict=True):
            row[self._spread] = signed
        # The transform of all slots at once, factor by factor, laid out so that each is one matrix product.
        last = slots.reshape(-1, b) @ right
        whole = np.matmul(middle, last.reshape(n * a, len(middle), -1), out=slots.reshape(n * a, len(middle), -1))
        whole = np.matmul(left, whole.reshape(n, a, -1), out=last.reshape(n, a, -1))
        bundled: F32 = np.einsum("natb,atb->nab", whole.reshape(n, *self._bound.shape), self._bound)
        return bundled.reshape(n, -1)

    def _read(self, features: Features) -> list[F32]:
        """The taps in order, each `(samples, channels)`, or a `UsageError`."""
        try:
            arrays: list[F32] = [np.asarray(features[name], np.float32) for name in self._names]
        except KeyError as error:
            raise UsageError(f"tap {error.args[0]} is missing: the space needs all of {self._names}") from None
        rows = len(arrays[0]) if arrays[0].ndim else 0
        if [x.shape for x in arrays] != [(rows, width) for width in self._channels]:
            for name, width, x in zip(self._names, self._channels, arrays, strict=True):
                if x.shape != (rows, width):
                    raise UsageError(f"tap {name} has shape {x.shape}: expected ({rows}, {width})")
        return arrays


def _check_taps(taps: tuple[Tap, ...]) -> None:
    if not taps:
        raise UsageError("a hypervector space needs at least one tap, got none")
    for tap in taps:
        if len(tap.shape) != 1 or tap.channels < 1:
            raise UsageError(f"tap {tap.name} has shape {tap.shape}: only pooled taps (channels,) can be bundled")
        if tap.channels > MAX_CHANNELS:
            raise UsageError(f"tap {tap.name} has {tap.channels} channels: at most {MAX_CHANNELS} can be bundled")
    if (total := sum(tap.channels for tap in taps)) > 16 * MAX_CHANNELS:
        raise UsageError(f"{total} channels in {len(taps)} taps: at most {16 * MAX_CHANNELS} can be bundled")
    if len({tap.name for tap in taps}) < len(taps):
        raise UsageError(f"tap names repeat: {[tap.name for tap in taps]}")


def _tables(
    taps: tuple[Tap, ...], slots: tuple[int, ...], policy: SpacePolicy
) -> tuple[NDArray[np.int64], F32, F32, F32]:
    """`index (codes,)`, `sign (codes,)`, `roles (slots, D)`, `weights (slots,)`: see `HypervectorSpace`."""
    d, seed, shallow = policy.dimensions, policy.seed, -(-len(taps) // 2) if len(taps) > 1 else 0
    index: list[NDArray[np.int64]] = []
    sign: list[F32] = []
    roles: list[F32] = []
    weights: list[float] = []
    for number, (tap, count) in enumerate(zip(taps, slots, strict=True)):
        places = []
        for part in range(count):
            places.append(permutation(seed, f"place/{tap.name}/{part}", d) + len(roles) * d)
            roles.append(signs(seed, f"role/{tap.name}/{part}", d))
            weights.append(_weight(tap, number < shallow, policy))
        index.append(np.concatenate(places)[: tap.channels + 1])
        sign.append(signs(seed, f"sign/{tap.name}", tap.channels + 1))
    order = [pair[:-1] for pair in index] + [np.array([pair[-1] for pair in index])]
    flips = [pair[:-1] for pair in sign] + [np.array([pair[-1] for pair in sign])]
    return (
        _frozen(np.concatenate(order)),
        _frozen(np.concatenate(flips)),
        _frozen(np.stack(roles)),
        _frozen(np.array(weights, np.float32)),
    )


def _weight(tap: Tap, shallow: bool, policy: SpacePolicy) -> float:
    root = math.sqrt(policy.deviation_weight)
    kind = {"std": root, "mean": 1 / root}
    depth = policy.shallow_weight if shallow else 1.0
    return depth * kind.get(tap.name.rpartition(".")[2], 1.0)


def _middle(taps: tuple[Tap, ...], policy: SpacePolicy) -> tuple[Tap, ...]:
    """The taps that levels are read from; all of them where there are too few to have a middle."""
    depth = [i / len(taps) for i in range(len(taps))]
    chosen = [t for t, d in zip(taps, depth, strict=True) if policy.level_from <= d < policy.level_to]
    return tuple(chosen) or taps


def _blocks(taps: tuple[Tap, ...], dense: F32) -> list[tuple[str, slice, F32]]:
    """Per tap: its name, its columns of the level part, and its block of the projection."""
    found, row, column = [], 0, 0
    for tap, width in zip(taps, shares([t.channels for t in taps], dense.shape[1]), strict=True):
        columns = slice(column, column + width)
        found.append((tap.name, columns, _frozen(np.ascontiguousarray(dense[row : row + tap.channels, columns]))))
        row, column = row + tap.channels, column + width
    return found


def _frozen(array: NDArray[Scalar]) -> NDArray[Scalar]:
    array.setflags(write=False)
    return array
