"""How the files of older formats of a stored system become those of the present one.

Rules of this file:

1. `FORMAT` rises by one with every change of the files, and `MIGRATIONS` gets the step from the format before.
2. A step works on what was read: the structure (system.json) and the arrays of each domain, both changed in place. It
   changes names and places, never a value. The files on disk stay as they are; the next generation has the new format.
3. Every format with a step has a store of that version among the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

FORMAT = 3
Structure = dict[str, Any]
Arrays = dict[str, NDArray[Any]]


def _named_statistics(structure: Structure, domains: Sequence[Arrays]) -> None:
    """2 to 3: the numbers of a calibration are arrays with names, and two rates have names that say what they are."""
    policy = structure["policy"]
    policy["min_own_share"], policy["max_stolen_share"] = policy.pop("own"), policy.pop("steal")
    names = ("angle_mean", "angle_deviation", "leverage_mean", "leverage_deviation", "delta")
    for arrays in domains:
        *calibration, arrays["likeness"] = arrays.pop("statistics")
        arrays |= {f"calibration.{name}": value for name, value in zip(names, calibration, strict=True)}
        arrays["calibration.values"] = arrays.pop("values")


MIGRATIONS: Mapping[int, Callable[[Structure, Sequence[Arrays]], None]] = {2: _named_statistics}
"""From each format that this version can read to the next one."""
