"""The orthonormal Walsh-Hadamard transform and the seeded numbers that go with it.

Rules of this file:

1. Signs and permutations come from SHAKE-256 of `"{seed}/{label}"` and from nothing else. A bundle carries only the
   seed, so the numbers must be the same for ever, on every platform and under every version of numpy.
2. The transform is its own inverse and preserves norms; n is a power of two.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]

TURN = 2 * np.pi / 65536
"""Radians of one step of a phase word."""


def fwht(x: F32) -> F32:
    """Orthonormal Walsh-Hadamard transform of the last axis: `(..., n) -> (..., n)`, n a power of two.

    H_n is the Kronecker product of H_a and H_b with a * b = n, so two small matrix products do the work.
    Raises `ValueError` when n is not a power of two.

    >>> fwht(np.array([1, 0, 0, 0], np.float32)).tolist()
    [0.5, 0.5, 0.5, 0.5]
    """
    left, right = factors(x.shape[-1])
    rows = np.ascontiguousarray(x, dtype=np.float32).reshape(-1, len(right)) @ right
    out: F32 = (left @ rows.reshape(-1, len(left), len(right))).reshape(x.shape)
    return out


def signs(seed: int, label: str, n: int) -> F32:
    """`(n,)` values of +1 and -1: bit i of the stream, least significant first in each byte; a set bit is -1."""
    bits = np.unpackbits(np.frombuffer(_stream(seed, label, -(-n // 8)), np.uint8), count=n, bitorder="little")
    return np.float32(1) - np.float32(2) * bits.astype(np.float32)


def permutation(seed: int, label: str, n: int) -> NDArray[np.int64]:
    """A permutation of `range(n)`: the stable argsort of n little-endian 64-bit words of the stream."""
    words = np.frombuffer(_stream(seed, label, 8 * n), dtype="<u8")
    return np.argsort(words, kind="stable").astype(np.int64)


def phase_words(seed: int, width: int) -> NDArray[np.uint16]:
    """`(width,)` seeded words; word / 65536 of a turn is a phase of the Fourier hypervector.

    Each takes 16 signs, most significant bit first; a set bit is +1."""
    bits = signs(seed, "fourier/phase", 16 * width).reshape(width, 16) > 0
    return (bits @ (1 << np.arange(15, -1, -1))).astype(np.uint16)


def signs_to_phase(seed: int, width: int) -> F32:
    """The phases of `phase_words` in [0, 2 pi)."""
    return (phase_words(seed, width) * TURN).astype(np.float32)


def next_power_of_two(n: int) -> int:
    return 1 << max(n - 1, 1).bit_length()


def transform_factors(n: int) -> tuple[int, int]:
    """(a, b), a <= b, a * b = n: the transform of n numbers is made of one of a and one of b."""
    a: int = 1 << (n.bit_length() - 1) // 2
    return a, n // a


def transform_macs(n: int, inputs: int, outputs: int) -> int:
    """Work of a transform whose inputs beyond `inputs` are zero, as two products of matrices.

    The `(a, b)` matrix of the inputs is cut to the rows that matter before, and of the outputs after."""
    _, b = transform_factors(n)
    before, after = -(-inputs // b), -(-outputs // b)
    return before * after * b + min(before, after) * b * b


def _stream(seed: int, label: str, count: int) -> bytes:
    return hashlib.shake_256(f"{seed}/{label}".encode()).digest(count)


@lru_cache(maxsize=8)
def factors(n: int) -> tuple[F32, F32]:
    """`(a, a)` and `(b, b)`, a <= b, whose Kronecker product is the orthonormal transform; read-only."""
    if n < 1 or n & (n - 1):
        raise ValueError(f"length {n} is not a power of two: pad to {1 << max(n, 1).bit_length()}")
    a, b = transform_factors(n)
    left, right = sylvester(a), sylvester(b) / np.float32(np.sqrt(n))
    left.setflags(write=False)
    right.setflags(write=False)
    return left, right


@lru_cache(maxsize=8)
def thirds(n: int) -> tuple[F32, F32, F32]:
    """Three matrices of +1 and -1 whose Kronecker product is the unnormalised transform: fewest operations; read-only.

    n is a power of two."""
    exponent = n.bit_length() - 1
    outer = (exponent + 1) // 3
    left, middle = sylvester(1 << outer), sylvester(1 << (exponent - 2 * outer))
    left.setflags(write=False)
    middle.setflags(write=False)
    return left, middle, left


def sylvester(n: int) -> F32:
    """The `(n, n)` Hadamard matrix of +1 and -1 in Sylvester's order, n a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
