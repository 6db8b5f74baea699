"""The bytes between a board and its learning process: a job goes there, messages and one result come back.

Rules of this file:

1. A job or message is a JSON header and named blobs. There is no pickle, so a faulty process can send wrong data but no
   code.
2. Only the new domain comes back. The board adds it to the generation that it has with `install`, as it does with every
   domain from elsewhere, so that old domains stay the very same objects.
3. The inbox takes bytes in pieces of any size and gives whole messages. It raises FormatError for bytes that are no
   message.
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


def pack(header: Mapping[str, object], blobs: Mapping[str, Buffer]) -> list[Buffer]:
    """A JSON-able header and named blobs as parts to write one after the other."""
    sizes = [[name, memoryview(blob).nbytes] for name, blob in blobs.items()]
    text = json.dumps([header, sizes]).encode()
    return [struct.pack("<I", len(text)), text, *blobs.values()]


def unpack(data: Buffer) -> tuple[dict[str, Any], dict[str, memoryview]]:
    """Inverse of `pack`; raises FormatError for anything else."""
    view = memoryview(data).cast("B")
    try:
        (length,) = struct.unpack_from("<I", view)
        header, sizes = json.loads(bytes(view[4 : 4 + length]))
        blobs, start = {}, 4 + length
        for name, size in sizes:
            blobs[str(name)] = view[start : start + size]
            start += size
        if start != len(view):
            raise FormatError(f"{len(view)} bytes of packed data, its header says {start}: it was cut off")
        return dict(header), blobs
    except (struct.error, ValueError, TypeError, RecursionError) as error:
        raise FormatError(f"packed data does not parse: {error}") from error


def job_parts(job: Job, how: Mapping[str, object]) -> Iterator[Buffer]:
    """The bytes of a job; `how`, JSON-able, is what only the learner knows: its policy and the encoder's file."""
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
    yield from pack(header, {**to_files(job.system), _FRAMES: frames.data})


def job_of(data: Buffer) -> tuple[Job, dict[str, Any]]:
    """Inverse of `job_parts`; raises FormatError or what `from_files` raises."""
    header, blobs = unpack(data)
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
    return pack({}, to_files(replace(system, domains=(system.domain(name),))))


def system_of(data: Buffer, name: str) -> System:
    """The domain `name`, alone in a system; inverse of `domain_parts`. Raises FormatError for anything else."""
    try:
        _, blobs = unpack(data)
        system = from_files({file: bytes(blob) for file, blob in blobs.items()})
    except EdgeearError as error:
        raise FormatError(f"the result is not a domain: {error}") from error
    if system.names != (name,):
        raise FormatError(f"the result holds domains {list(system.names)}, expected is {name!r}")
    return system


def message(kind: Kind, parts: Sequence[Buffer]) -> list[Buffer]:
    """The parts of one message to write."""
    return [_HEAD.pack(_MAGIC, KINDS.index(kind), sum(memoryview(p).nbytes for p in parts)), *parts]


class Inbox:
    """Collects bytes and gives whole messages."""

    def __init__(self) -> None:
        self._held = bytearray()

    @property
    def partial(self) -> bool:
        """Whether a part of a message has arrived."""
        return bool(self._held)

    def feed(self, data: bytes) -> list[tuple[Kind, bytes]]:
        """The messages that `data` completes. Raises FormatError for bytes that no message starts with."""
        self._held += data
        found: list[tuple[Kind, bytes]] = []
        while len(self._held) >= _HEAD.size:
            magic, kind, length = _HEAD.unpack_from(self._held)
            if magic != _MAGIC or kind >= len(KINDS) or length > MAX_MESSAGE:
                raise FormatError(f"{bytes(self._held[:16])!r} is not a message")
            end = _HEAD.size + length
            if len(self._held) < end:
                break
            found.append((KINDS[kind], bytes(self._held[_HEAD.size : end])))
            del self._held[:end]
        if 0 < len(self._held) < _HEAD.size and not _MAGIC.startswith(bytes(self._held[: len(_MAGIC)])):
            raise FormatError(f"{bytes(self._held)!r} is not a message")
        return found
