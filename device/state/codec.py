"""A `System` as named byte files and back: JSON for structure, safetensors for arrays, ONNX for heads. No pickle.

Rules of this file:

1. Sums are stored as float32; `edgeear.flow.adapt` already rounds them, so what is read back equals what served.
2. Files are named by content, so that unchanged domains are the same files in every generation.
3. Every array has a name. A field of `Calibration` is stored under its own name.
4. Sizes that a file claims are compared with each other and with the bytes that are there before anything is built.
5. Older formats are brought up to date while they are read (migrations.py); a newer one is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from adaptors.archive import HeadArchive
from device.state.migrations import FORMAT, MIGRATIONS, Arrays
from edgeear.errors import EdgeearError, FormatError
from edgeear.memory import DomainMemory
from edgeear.novelty import Calibration
from edgeear.shift import ShiftPolicy
from edgeear.space import HypervectorSpace, SpacePolicy
from edgeear.system import Domain, System, SystemPolicy
from edgeear.types import Tap

SYSTEM = "system.json"
_CALIBRATION = "calibration."
_DAMAGED = (
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    OverflowError,
    RecursionError,
    MemoryError,
    SafetensorError,
)


class SystemFormatError(FormatError):
    """Stored files that are no system that this version can read; the message names the file."""


def to_files(system: System) -> dict[str, bytes]:
    """All files of a generation, by name."""
    files: dict[str, bytes] = {}
    domains = []
    for domain in system.domains:
        tensors = save(_tensors(domain))
        names = {"head": f"head-{domain.head.digest[:16]}.onnx", "memory": _memory_name(tensors)}
        files[names["head"]], files[names["memory"]] = domain.head.onnx, tensors
        domains.append(
            {
                "name": domain.name,
                "files": names,
                "head": domain.head.to_dict(),
                "classes": list(domain.memory.classes),
                "growth": dict(domain.growth),
            }
        )
    structure = {
        "format": FORMAT,
        "generation": system.generation,
        "encoder": system.encoder_digest,
        "space": {"policy": asdict(system.space.policy), "taps": [[t.name, list(t.shape)] for t in system.space.taps]},
        "policy": asdict(system.policy),
        "domains": domains,
    }
    files[SYSTEM] = json.dumps(structure, indent=1, sort_keys=True).encode()
    return files


def from_files(files: Mapping[str, bytes]) -> System:
    """Inverse of `to_files`, for files of older formats, too. Raises SystemFormatError for anything else, newer formats
    included."""
    try:
        structure = json.loads(files[SYSTEM])
        version, oldest = structure["format"], min(MIGRATIONS)
        if version > FORMAT:
            raise SystemFormatError(f"system of format {version}, this edgeear reads up to {FORMAT}: update this board")
        if version < oldest:
            raise SystemFormatError(
                f"system of format {version}, this edgeear reads {oldest} to {FORMAT}: its hypervectors differ, learn "
                "the domains again"
            )
        arrays = [_arrays(entry["files"]["memory"], files) for entry in structure["domains"]]
        for step in range(version, FORMAT):
            MIGRATIONS[step](structure, arrays)
        return _system(structure, arrays, files)
    except EdgeearError:
        raise
    except KeyError as error:
        raise SystemFormatError(f"{error} is missing from the stored system: restore an earlier generation") from error
    except _DAMAGED as error:
        raise SystemFormatError(f"the stored system does not parse: {error}; restore an earlier generation") from error


def _system(structure: dict[str, Any], arrays: Sequence[Arrays], files: Mapping[str, bytes]) -> System:
    taps = [Tap(name, tuple(shape)) for name, shape in structure["space"]["taps"]]
    policy = dict(structure["policy"])
    shift = {**policy.pop("shift")}
    shift["stakes"] = tuple(shift["stakes"])
    space = HypervectorSpace(taps, SpacePolicy(**structure["space"]["policy"]))
    return System(
        structure["encoder"],
        space,
        SystemPolicy(**policy, shift=ShiftPolicy(**shift)),
        tuple(_domain(*both, files, space.dimensions) for both in zip(structure["domains"], arrays, strict=True)),
        structure["generation"],
    )


def _arrays(name: str, files: Mapping[str, bytes]) -> Arrays:
    """The arrays of one domain."""
    if name != _memory_name(files[name]):
        raise SystemFormatError(f"{name} is damaged: restore an earlier generation")
    return load(files[name])


def _domain(entry: dict[str, Any], arrays: Arrays, files: Mapping[str, bytes], dimensions: int) -> Domain:
    _check_shapes(entry["name"], len(entry["classes"]), arrays, dimensions)
    memory = DomainMemory(
        tuple(entry["classes"]), arrays["counts"], arrays["class_sums"].astype(np.float64), _symmetric(arrays["gram"])
    )
    statistics: dict[str, Any] = {f.name: arrays[_CALIBRATION + f.name] for f in fields(Calibration)}
    calibration = Calibration(**{name: x if x.ndim else x.item() for name, x in statistics.items()})
    head = HeadArchive.from_dict(entry["head"], files[entry["files"]["head"]])
    likeness = float(arrays["likeness"])
    return Domain(entry["name"], head, memory, calibration, arrays["codes"], entry["growth"], likeness)


def _check_shapes(name: str, classes: int, arrays: Arrays, dimensions: int) -> None:
    codes = arrays["codes"]
    m = codes.shape[-1]
    expected = {"counts": (classes,), "class_sums": (classes, dimensions), "gram": (m * (m + 1) // 2,), "likeness": ()}
    for array, shape in expected.items():
        if arrays[array].shape != shape or codes.ndim != 2:
            found = arrays[array].shape
            what = f"domain {name!r}: array {array} is {found} beside codes of {codes.shape}, expected {shape}"
            raise SystemFormatError(f"{what}; restore an earlier generation")


def _tensors(domain: Domain) -> Arrays:
    memory, calibration = domain.memory, domain.calibration
    return {
        "counts": np.ascontiguousarray(memory.counts),
        "class_sums": memory.class_sums.astype(np.float32),
        "gram": memory.gram[np.triu_indices(memory.m)].astype(np.float32),
        "codes": np.ascontiguousarray(domain.codes),
        "likeness": np.asarray(domain.likeness, np.float64),
        **{_CALIBRATION + f.name: np.asarray(getattr(calibration, f.name)) for f in fields(Calibration)},
    }


def _symmetric(upper: NDArray[np.float32]) -> NDArray[np.float64]:
    """The symmetric matrix `(m, m)` of a packed upper triangle."""
    m = int((np.sqrt(8 * len(upper) + 1) - 1) / 2)
    full = np.zeros((m, m))
    full[np.triu_indices(m)] = upper
    return full + np.triu(full, 1).T


def _memory_name(tensors: bytes) -> str:
    return f"memory-{hashlib.sha256(tensors).hexdigest()[:16]}.safetensors"
