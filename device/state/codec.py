"""A `System` as named byte files and back: JSON for structure, safetensors for arrays, ONNX for heads. No pickle.

Sums are stored as float32; `edgeear.flow.adapt` already rounds them, so what is read back equals what served. Files are
named by content, so that unchanged domains are the same files in every generation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from adaptors.archive import HeadArchive
from edgeear.errors import EdgeearError, FormatError
from edgeear.memory import DomainMemory
from edgeear.novelty import Calibration
from edgeear.shift import ShiftPolicy
from edgeear.space import HypervectorSpace, SpacePolicy
from edgeear.system import Domain, System, SystemPolicy
from edgeear.types import Tap

FORMAT = 2
SYSTEM = "system.json"


class SystemFormatError(FormatError):
    """Stored files that are no system of this version; the message names the file."""


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
    """Inverse of `to_files`; raises SystemFormatError for anything else, newer versions included."""
    try:
        structure = json.loads(files[SYSTEM])
        if structure["format"] > FORMAT:
            raise SystemFormatError(
                f"system of format {structure['format']}, this edgeear reads up to {FORMAT}: update this board"
            )
        if structure["format"] < FORMAT:
            raise SystemFormatError(
                f"system of format {structure['format']}, this edgeear reads format {FORMAT}: its hypervectors differ, "
                "learn the domains again"
            )
        return _system(structure, files)
    except EdgeearError:
        raise
    except KeyError as error:
        raise SystemFormatError(f"{error} is missing from the stored system: restore an earlier generation") from error
    except (ValueError, TypeError, AttributeError, IndexError, OverflowError, RecursionError, SafetensorError) as error:
        raise SystemFormatError(f"stored system does not parse: {error}; restore an earlier generation") from error


def _system(structure: dict[str, Any], files: Mapping[str, bytes]) -> System:
    taps = [Tap(name, tuple(shape)) for name, shape in structure["space"]["taps"]]
    policy = dict(structure["policy"])
    shift = {**policy.pop("shift")}
    shift["stakes"] = tuple(shift["stakes"])
    return System(
        structure["encoder"],
        HypervectorSpace(taps, SpacePolicy(**structure["space"]["policy"])),
        SystemPolicy(**policy, shift=ShiftPolicy(**shift)),
        tuple(_domain(d, files) for d in structure["domains"]),
        structure["generation"],
    )


def _domain(entry: dict[str, Any], files: Mapping[str, bytes]) -> Domain:
    name = entry["files"]["memory"]
    if name != _memory_name(files[name]):
        raise SystemFormatError(f"{name} is not what was stored under its name: restore an earlier generation")
    tensors = load(files[name])
    memory = DomainMemory(
        tuple(entry["classes"]), tensors["counts"], tensors["class_sums"].astype(np.float64), _unpacked(tensors["gram"])
    )
    statistics = [float(x) for x in tensors["statistics"]]
    calibration = Calibration(
        statistics[0], statistics[1], statistics[2], statistics[3], tensors["values"], statistics[4]
    )
    head = HeadArchive.from_dict(entry["head"], files[entry["files"]["head"]])
    return Domain(entry["name"], head, memory, calibration, tensors["codes"], entry["growth"], statistics[5])


def _tensors(domain: Domain) -> dict[str, NDArray[Any]]:
    c, memory = domain.calibration, domain.memory
    statistics = [c.angle_mean, c.angle_deviation, c.leverage_mean, c.leverage_deviation, c.delta, domain.likeness]
    return {
        "counts": np.ascontiguousarray(memory.counts),
        "class_sums": memory.class_sums.astype(np.float32),
        "gram": memory.gram[np.triu_indices(memory.m)].astype(np.float32),
        "codes": np.ascontiguousarray(domain.codes),
        "values": np.ascontiguousarray(c.values),
        "statistics": np.asarray(statistics, np.float64),
    }


def _unpacked(upper: NDArray[np.float32]) -> NDArray[np.float64]:
    """Symmetric `(m, m)` from its packed upper triangle."""
    m = int((np.sqrt(8 * len(upper) + 1) - 1) / 2)
    full = np.zeros((m, m))
    full[np.triu_indices(m)] = upper
    return full + np.triu(full, 1).T


def _memory_name(tensors: bytes) -> str:
    return f"memory-{hashlib.sha256(tensors).hexdigest()[:16]}.safetensors"
