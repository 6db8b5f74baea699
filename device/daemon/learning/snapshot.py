"""What goes between the board and its learning process, as bytes: a job there, messages and one result back.

Rules of this file:

1. A parcel is a JSON header and named blobs; no pickle, so a sick process can send nonsense but no code.
2. Only the new domain travels back. The board puts it into the generation that it has, so that old domains stay the
   very same objects, and it goes through `install` there, as everything from elsewhere does.
3. The inbox takes bytes in pieces of any size and gives whole messages; what is none raises FormatError at once.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal, assert_never

import numpy as np

from adaptors.selftrain import SelfTrainPolicy
from device.board.learner import Job, LabelledJob, UnlabelledJob
from device.state.codec import from_files, to_files
from edgeear.errors import EdgeearError, FormatError
from edgeear.system import System
from edgeear.unlabelled import UnlabelledPolicy

Buffer = bytes | memoryview
Kind = Literal["progress", "grown", "rejected", "failed"]
KINDS: tuple[Kind, ...] = ("progress", "grown", "rejected", "failed")
MAX_MESSAGE = 64 << 20
"""Bytes of a message; a domain takes a few hundred KiB."""
_HEAD = struct.Struct("<4sBI")
_MAGIC = b"EARw"
_FRAMES = "frames"


def parcel(header: Mapping[str, object], blobs: Mapping[str, Buffer]) -> list[Buffer]:
    """The parts to write, one after the other."""
    sizes = [[name, memoryview(blob).nbytes] for name, blob in blobs.items()]
    text = json.dumps([header, sizes]).encode()
    return [struct.pack("<I", len(text)), text, *blobs.values()]


def opened(data: Buffer) -> tuple[dict[str, Any], dict[str, memoryview]]:
    """Inverse of `parcel`; raises FormatError for anything else."""
    view = memoryview(data).cast("B")
    try:
        (length,) = struct.unpack_from("<I", view)
        header, sizes = json.loads(bytes(view[4 : 4 + length]))
        blobs, start = {}, 4 + length
        for name, size in sizes:
            blobs[str(name)] = view[start : start + size]
            start += size
        if start != len(view):
            raise FormatError(f"parcel of {len(view)} bytes, its header says {start}: it was cut off")
        return dict(header), blobs
    except (struct.error, ValueError, TypeError, RecursionError) as error:
        raise FormatError(f"parcel does not parse: {error}") from error


def job_parts(job: Job, how: Mapping[str, object]) -> Iterator[Buffer]:
    """The bytes of a job; `how` is the JSON-able part of it that is the learner's own."""
    frames = np.stack(job.frames)
    header = {
        "how": dict(how),
        "name": job.name,
        "shape": list(frames.shape),
        "views": list(job.views),
        "seed": job.seed,
    }
    match job:
        case LabelledJob():
            header |= {"kind": "labelled", "labels": list(job.labels)}
        case UnlabelledJob():
            header |= {"kind": "unlabelled", "policy": asdict(job.policy)}
        case _:
            assert_never(job)
    yield from parcel(header, {**to_files(job.system), _FRAMES: frames.data})


def job_of(data: Buffer) -> tuple[Job, dict[str, Any]]:
    """Inverse of `job_parts`; raises FormatError or what `from_files` raises."""
    header, blobs = opened(data)
    frames = np.frombuffer(blobs.pop(_FRAMES), np.uint8).reshape(header["shape"])
    system = from_files({name: bytes(blob) for name, blob in blobs.items()})
    common, views, seed = (system, header["name"], tuple(frames)), tuple(header["views"]), header["seed"]
    job: Job
    if header["kind"] == "labelled":
        job = LabelledJob(*common, tuple(header["labels"]), views=views, seed=seed)
    else:
        policy = header["policy"]
        policy = UnlabelledPolicy(**{**policy, "labelling": SelfTrainPolicy(**policy["labelling"])})
        job = UnlabelledJob(*common, policy, views=views, seed=seed)
    return job, header["how"]


def domain_parts(system: System, name: str) -> Sequence[Buffer]:
    """The bytes of one domain of `system`."""
    return parcel({}, to_files(replace(system, domains=(system.domain(name),))))


def system_of(data: Buffer, name: str) -> System:
    """The domain `name`, alone in a system; inverse of `domain_parts`. Raises FormatError for anything else."""
    try:
        _, blobs = opened(data)
        system = from_files({file: bytes(blob) for file, blob in blobs.items()})
    except EdgeearError as error:
        raise FormatError(f"the result is no domain: {error}") from error
    if system.names != (name,):
        raise FormatError(f"the result holds domains {list(system.names)}, asked for was {name!r}")
    return system


def message(kind: Kind, parts: Sequence[Buffer]) -> list[Buffer]:
    """The parts of one message to write."""
    return [_HEAD.pack(_MAGIC, KINDS.index(kind), sum(memoryview(p).nbytes for p in parts)), *parts]


class Inbox:
    """Bytes in, whole messages out."""

    def __init__(self) -> None:
        self._held = bytearray()

    @property
    def begun(self) -> bool:
        """Whether a message has come in part."""
        return bool(self._held)

    def feed(self, data: bytes) -> list[tuple[Kind, bytes]]:
        """The messages that `data` completes. Raises FormatError for bytes that no message starts with."""
        self._held += data
        found: list[tuple[Kind, bytes]] = []
        while len(self._held) >= _HEAD.size:
            magic, kind, length = _HEAD.unpack_from(self._held)
            if magic != _MAGIC or kind >= len(KINDS) or length > MAX_MESSAGE:
                raise FormatError(f"{bytes(self._held[:16])!r} is no message")
            end = _HEAD.size + length
            if len(self._held) < end:
                break
            found.append((KINDS[kind], bytes(self._held[_HEAD.size : end])))
            del self._held[:end]
        if 0 < len(self._held) < _HEAD.size and not _MAGIC.startswith(bytes(self._held[: len(_MAGIC)])):
            raise FormatError(f"{bytes(self._held)!r} is no message")
        return found
