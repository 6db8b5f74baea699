"""Labelling with a file manager: `edgeear requests` saves the frames that a board wants labelled, you sort them into
folders, and `edgeear label` sends the folders' names as classes.

Rules of this file:

1. A saved frame is `DIR/SESSION-SAMPLE.jpg`: its name identifies the sample, wherever below DIR you move it.
2. A frame that was saved before, sorted or not, is not written again. A file appears only when it is complete.
3. Only labels of the board's current session are sent: the board no longer has frames of earlier sessions.
4. Each folder has its own session at the broker, which keeps requests for a day while no `edgeear requests` runs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import queue
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from device.mqtt import messages, topics
from device.operator.client import BrokerAddress, Operator
from edgeear.errors import DeviceError, UsageError

_NAME = re.compile(r"([0-9a-f]{8,64})-([0-9]{6,16})\.(jpg|png)")
LOOK_S = 0.5


@dataclass(frozen=True)
class Sorted:
    """The labels in a folder: class names by sample number, for one session. `waiting`: its frames that are in no class
    folder; `stale`: frames of other sessions."""

    labels: dict[int, str]
    waiting: int
    stale: int


def collect(
    address: BrokerAddress,
    board: str,
    folder: Path,
    *,
    seconds: float | None = None,
    count: int | None = None,
    saved: Callable[[Path], object] = lambda _: None,
) -> int:
    """Save the frames that `board` (SITE/DEVICE) wants labelled below `folder`: until interrupted, for `seconds`, or
    until `count` are saved. Returns how many. Raises `DeviceError`."""
    topic = topics.topic_of(*named(board), topics.LABEL_REQUEST)
    session = hashlib.sha256(f"{socket.gethostname()}:{folder.resolve()}".encode()).hexdigest()[:16]
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    until, total = math.inf if seconds is None else time.monotonic() + seconds, 0
    with (
        suppress(KeyboardInterrupt),
        Operator(address, (topic,), lambda _, payload: inbox.put(payload), session),
    ):
        while (count is None or total < count) and time.monotonic() < until:
            with suppress(queue.Empty):
                total += _saved(folder, inbox.get(timeout=LOOK_S), saved)
    while not inbox.empty():  # the broker no longer has these
        total += _saved(folder, inbox.get(), saved)
    return total


def _saved(folder: Path, payload: bytes, tell: Callable[[Path], object]) -> bool:
    path = save(folder, payload)
    if path is not None:
        tell(path)
    return path is not None


def save(folder: Path, payload: bytes) -> Path | None:
    """Write the frame of a label request. None if it was saved before, or the message is none. Raises `DeviceError`."""
    request = messages.parse(messages.LabelRequest, payload)
    if isinstance(request, messages.Refusal):
        return None
    image = request.image_bytes
    kind = "jpg" if image.startswith(b"\xff") else "png"
    name = f"{request.session}-{request.at:06}.{kind}"
    if (folder / name).exists() or any(folder.glob(f"*/{name}")):
        return None
    partial = folder / f".{name}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(image)
        os.replace(partial, folder / name)
    except OSError as error:
        raise DeviceError(f"{folder}: {error.strerror}; name a folder that you may write to") from error
    return folder / name


def read(folder: Path, session: str) -> Sorted:
    """The labels that the folders below `folder` give to frames of `session`. Raises `UsageError` if there is no such
    folder, or a frame is in two classes."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; `edgeear requests` makes one")
    labels: dict[int, str] = {}
    waiting = stale = 0
    for path, found, at in _frames(folder):
        label = path.parent.name
        if found != session:
            stale += 1
        elif path.parent == folder:
            waiting += 1
        elif labels.setdefault(at, label) != label:
            raise UsageError(f"{path}: sample {at} is also in {labels[at]}; keep it in one class")
    return Sorted(labels, waiting, stale)


def send(us: Operator, board: str, folder: Path, domain: str | None, wait_s: float) -> tuple[messages.Response, Sorted]:
    """Send the labels in `folder` to `board`. Raises `UsageError` if no frame of its session is in a class folder."""
    site, device = named(board)
    told = us.ask(site, device, messages.Report(id=_identity()), wait_s)
    session = told.result.get("session")
    if told.outcome != "ok" or not isinstance(session, str):
        raise DeviceError(f"{board} does not report its session ({told.reason}): update its software")
    found = read(folder, session)
    if not found.labels:
        counts = f"{found.waiting} frames to sort, {found.stale} of earlier sessions, which the board no longer has"
        raise UsageError(f"{folder}: no frame of {board} in a class folder ({counts}); sort into {folder}/CLASS/")
    facts = {"id": _identity(), "session": session, "labels": found.labels, "domain": domain}
    command = messages.parse_command("label", json.dumps(facts).encode())
    if isinstance(command, messages.Refusal):
        raise UsageError(f"{folder}: {command.reason}")
    return us.ask(site, device, command, wait_s), found


def named(board: str) -> tuple[str, str]:
    """Site and device of SITE/DEVICE. Raises `UsageError`."""
    site, slash, device = board.partition("/")
    if not slash:
        raise UsageError(f"board {board!r}: give SITE/DEVICE, such as hall/cam-1")
    topics.prefix(site, device)
    return site, device


def _frames(folder: Path) -> Iterator[tuple[Path, str, int]]:
    for path in sorted((*folder.glob("*"), *folder.glob("*/*"))):
        if match := _NAME.fullmatch(path.name):
            yield path, match[1], int(match[2])


def _identity() -> str:
    return f"cli-{messages.new_session()}"
