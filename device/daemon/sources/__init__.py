"""Sources: what puts frames into the queue. One file for each kind; this one starts the kind that is configured.

Rules of this package:

1. Frames are decoded and resized by device.images.decode alone, so a source gives the very bits that training saw.
2. A frame's time is when it came here, not when its decoding ended: nothing grows young on the way.
3. Input that gives no frame is counted and passed over. A vanished device is tried again for ever, with pauses.
4. A source runs in one thread of its own, and never in the caller's or the network's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Protocol, assert_never

from device.daemon.config.settings import SourceSection
from device.daemon.frames import FrameQueue
from device.daemon.sources.messages import MessageFrames
from device.daemon.sources.running import RunningSource
from device.provenance import installation
from edgeear.errors import UsageError

__all__ = ["MessageFrames", "Source", "open_source"]


class Source(Protocol):
    """Something that feeds the queue once started. Starting and stopping happen once."""

    @property
    def alive(self) -> bool:
        """Whether it runs and its device is there."""

    @property
    def finished(self) -> bool:
        """Whether it came to its end by itself, as a replay does."""

    @property
    def last_error(self) -> str | None:
        """What went wrong last, with its remedy; it stays after a recovery."""

    def start(self) -> None:
        """Begin; returns at once."""

    def stop(self, timeout: float = 5.0) -> bool:
        """End; whether it has ended within `timeout` seconds."""

    def offer(self, payload: bytes) -> None:
        """A frame that came by MQTT, from the network thread; ignored where frames come from elsewhere."""


def open_source(
    config: SourceSection, size: tuple[int, int], sink: FrameQueue, clock: Callable[[], float]
) -> Source | None:
    """The source that `config` names, not started; None for kind none. `size` is `(height, width)` of a frame.

    Raises `UsageError` for what no waiting mends: a missing extra, a folder that is a file.
    """
    match config.kind:
        case "none":
            return None
        case "folder":
            from device.daemon.sources.watched import WatchedFolder

            assert config.path is not None
            watched = WatchedFolder(config.path, size, sink, clock, config.after == "delete", config.max_age_s)
            return RunningSource("folder", watched, sink)
        case "replay":
            from device.daemon.sources.replay import Replay

            assert config.path is not None
            return RunningSource("replay", Replay(config.path, size, sink, clock, config.fps, config.loop), sink)
        case "camera":
            from device.daemon.sources.camera import Camera

            if importlib.util.find_spec("cv2") is None:
                raise UsageError(f"source.kind = camera needs OpenCV: {installation('camera')}")
            assert config.device is not None
            return RunningSource("camera", Camera(config.device, size, sink, clock, config.fps), sink)
        case "serial":
            from device.daemon.sources.sensor import SensorFrames, serial_port, tcp_port

            port = tcp_port(config.url) if config.url else serial_port(config.device or "", config.baud)
            return RunningSource("sensor", SensorFrames(port, size, sink, clock), sink)
        case "mqtt":
            return RunningSource("mqtt", MessageFrames(size, sink, clock, config.queue), sink)
        case _:
            assert_never(config.kind)
