"""edgeear: a classifier on an edge board that survives a changing world.

What is public is what `__all__` names; everything else, in this package and in the others, is private and may change in
any version. `Ear` and what it returns are the Python interface:

    from edgeear import Ear

The package itself is the pure core: hypervectors, novelty, shift, routing, admission and the flow that joins them.

Rules of this room:

1. No clock, no disk, no network, no thread. Time is an argument; randomness comes from a seed passed in.
2. Values in, values out: the system is immutable and moves only from generation to generation.
3. Imports reach down to `adaptors` and nowhere else, with one exception: the public names of this file are loaded from
   `device.api` when they are first used, so that `import edgeear` stays light. torch is never loaded by importing this
   package; the one file that needs it, `torch_space`, is imported by the learning process only.
4. Expected outcomes (out of distribution, rejected, abstained) are values; exceptions are `edgeear.errors`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from edgeear.errors import DataError, DeviceError, EdgeearError, FormatError, KnownDomain, UsageError

if TYPE_CHECKING:
    from device.api import Changed, Ear, Evaluation, Learned, Score
    from edgeear.flow import Prediction
    from edgeear.samples import AdaptPolicy
    from edgeear.shift import Shift
    from edgeear.system import Recognised, Rejected
    from edgeear.types import Encoder, Tap

__version__ = "0.1.0"
__all__ = [
    "AdaptPolicy",
    "Changed",
    "DataError",
    "DeviceError",
    "Ear",
    "EdgeearError",
    "Encoder",
    "Evaluation",
    "FormatError",
    "KnownDomain",
    "Learned",
    "Prediction",
    "Recognised",
    "Rejected",
    "Score",
    "Shift",
    "Tap",
    "UsageError",
    "__version__",
]

_HOMES = {
    **dict.fromkeys(("Changed", "Ear", "Evaluation", "Learned", "Score"), "device.api"),
    "Prediction": "edgeear.flow",
    "AdaptPolicy": "edgeear.samples",
    "Shift": "edgeear.shift",
    **dict.fromkeys(("Recognised", "Rejected"), "edgeear.system"),
    **dict.fromkeys(("Encoder", "Tap"), "edgeear.types"),
}


if not TYPE_CHECKING:  # a type checker that saw it would take any name for public

    def __getattr__(name: str) -> object:
        """Load a public name when it is first used (PEP 562)."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found: object = getattr(import_module(_HOMES[name]), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
