"""A camera, through OpenCV (the `camera` extra), which is imported when the camera is opened.

Every picture is taken out of the device's buffer, so that the next one decoded is the newest; at most `fps` a second
are decoded. A video file can stand in for a device; it then gives `fps` pictures a second.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
from pydantic import Field

from device.daemon.finding import Finding, Machine, ok, problem, reason, warning
from device.daemon.sources.base import Feed, SourceSection, check_device
from device.daemon.sources.running import Stop
from device.images.decode import fit_pixels
from device.provenance import installation
from edgeear.errors import DeviceError, UsageError

PORTS = {"rtsp": 554, "rtsps": 322, "http": 80, "https": 443, "rtmp": 1935}
"""Usual ports of the schemes of a camera's URL."""
SILENT_S = 30.0
"""Seconds without a picture after which a camera is in trouble. OpenCV may wait longer for one."""
QUIET = {"OPENCV_LOG_LEVEL": "SILENT", "OPENCV_FFMPEG_LOGLEVEL": "-8"}
"""Environment of OpenCV: its own messages go past the log and show the password of a URL."""


class CameraSource(SourceSection):
    """A camera, through OpenCV."""

    kind: Literal["camera"] = "camera"
    device: str = Field(
        min_length=1, coerce_numbers_to_str=True, description="number or device file; 0 is the first.", examples=["0"]
    )
    fps: float = Field(5.0, gt=0, le=240, description="at most so many frames a second.")

    @property
    def patience_s(self) -> float:
        return self.silent_s or max(SILENT_S, 3 / self.fps)

    def capture(self, feed: Feed) -> Camera:
        if importlib.util.find_spec("cv2") is None:
            raise UsageError(f"source.kind = camera needs OpenCV: {installation('camera')}")
        return Camera(self, feed)

    def check(self, machine: Machine) -> Iterator[Finding]:
        if not machine.installed("cv2"):
            yield problem("OpenCV is not installed", installation("camera"))
        elif "://" in self.device:
            yield self._check_url(machine)
        else:
            file = f"/dev/video{self.device}" if self.device.isdecimal() else self.device
            yield check_device("camera", Path(file), "video")

    def _check_url(self, machine: Machine) -> Finding:
        try:
            url = urlsplit(self.device)
            host, port = url.hostname, url.port or PORTS.get(url.scheme)
        except ValueError as error:
            return problem(f"{self.device}: {error}", "write SCHEME://USER:PASSWORD@HOST:PORT/PATH")
        if host is None or port is None:
            return warning(f"camera {self.device} was not tried", "watch the log of the first run")
        try:
            machine.connect(host, port)
        except OSError as error:
            return problem(f"{self.device}: {reason(error)}", "check its power, its network and source.device")
        return ok(f"camera {self.device} answers")


@dataclass(frozen=True)
class Camera:
    """Frames of a camera: a number, a device file, or a video file. `pace` gives seconds that never go back."""

    settings: CameraSource
    feed: Feed
    pace: Callable[[], float] = time.monotonic

    def run(self, stop: Stop) -> None:
        os.environ.update(QUIET)
        cv2: Any = importlib.import_module("cv2")
        device = self.settings.device
        capture = cv2.VideoCapture(int(device) if device.isdecimal() else device)
        try:
            if not capture.isOpened():
                raise DeviceError(f"camera {device}: cannot be opened; check that it is there and not in use")
            capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
            self._watch(capture, stop)
        finally:
            capture.release()

    def _watch(self, capture: Any, stop: Stop) -> None:
        is_file, due, number = Path(self.settings.device).is_file(), self.pace(), 0
        while not stop.is_set():
            if is_file and stop.wait(max(0.0, due - self.pace())):
                return
            if not capture.grab():
                raise DeviceError(f"camera {self.settings.device}: gives no more pictures; check cable and power")
            captured, number = self.feed.clock(), number + 1
            if self.pace() < due:
                continue
            due = max(due + 1 / self.settings.fps, self.pace())
            found, picture = capture.retrieve()
            if not found or picture is None:
                self.feed.sink.undecodable()
                continue
            pixels = picture if picture.ndim == 2 else np.ascontiguousarray(picture[..., ::-1])
            self.feed.put(partial(fit_pixels, pixels), captured, f"picture {number}")
