"""The pure core: hypervectors, novelty, shift, routing, admission and the flow that joins them.

Rules of this room:

1. No clock, no disk, no network, no thread. Time is an argument; randomness comes from a seed passed in.
2. Values in, values out: the system is immutable and moves only from generation to generation.
3. Imports reach down to `adaptors` and nowhere else. torch is never loaded by importing this package; the one
   file that needs it, `torch_space`, is imported by the learning process only.
4. Expected outcomes (out of distribution, rejected, abstained) are values; exceptions are `edgeear.errors`.
"""

from __future__ import annotations

__version__ = "0.1.0"
