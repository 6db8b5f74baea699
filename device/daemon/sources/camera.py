"""A camera, through OpenCV (the `camera` extra), which is imported when the camera is opened.

Every picture of a device is taken off its buffer, so that what is decoded is the newest; decoded are at most `fps` a
second. A regular file stands in for a device, at `fps` pictures a second.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from device.daemon.finding import Finding, Machine
from device.daemon.frames import FrameQueue
from device.daemon.sources.base import SourceSection, check_device, problem
from device.daemon.sources.running import RunningSource, Stop
from device.images.decode import fit_pixels
from device.provenance import installation
from edgeear.errors import DataError, DeviceError, UsageError


class CameraSource(SourceSection):
    """A camera, through OpenCV."""

    kind: Literal["camera"] = "camera"
    device: str = Field(
        min_length=1, coerce_numbers_to_str=True, description="number or device file; 0 is the first.", examples=["0"]
    )
    fps: float = Field(5.0, gt=0, le=240, description="at most so many frames a second.")

    def open(self, size: tuple[int, int], sink: FrameQueue, clock: Callable[[], float]) -> RunningSource:
        if importlib.util.find_spec("cv2") is None:
            raise UsageError(f"source.kind = camera needs OpenCV: {installation('camera')}")
        return RunningSource("camera", Camera(self.device, size, sink, clock, self.fps), sink)

    def check(self, machine: Machine) -> Iterator[Finding]:
        if not machine.installed("cv2"):
            yield problem("OpenCV is not installed", installation("camera"))
        else:
            file = f"/dev/video{self.device}" if self.device.isdecimal() else self.device
            yield check_device("camera", Path(file), "video")


class Camera:
    """Frames of the camera `device`: a number, a device file, or a video file."""

    def __init__(
        self,
        device: str,
        size: tuple[int, int],
        sink: FrameQueue,
        clock: Callable[[], float],
        fps: float,
        pace: Callable[[], float] = time.monotonic,
    ) -> None:
        self._device, self._size, self._sink, self._clock = device, size, sink, clock
        self._period, self._pace = 1 / fps, pace

    def run(self, stop: Stop) -> None:
        cv2: Any = importlib.import_module("cv2")
        capture = cv2.VideoCapture(int(self._device) if self._device.isdecimal() else self._device)
        try:
            if not capture.isOpened():
                raise DeviceError(f"camera {self._device}: cannot be opened; check that it is there and not in use")
            capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
            self._watch(capture, stop)
        finally:
            capture.release()

    def _watch(self, capture: Any, stop: Stop) -> None:
        is_file, due, number = Path(self._device).is_file(), self._pace(), 0
        while not stop.is_set():
            if is_file and stop.wait(max(0.0, due - self._pace())):
                return
            if not capture.grab():
                raise DeviceError(f"camera {self._device}: gives no more pictures; check cable and power")
            captured, number = self._clock(), number + 1
            if self._pace() < due:
                continue
            due = max(due + self._period, self._pace())
            found, picture = capture.retrieve()
            try:
                if not found or picture is None:
                    raise DataError("a picture that OpenCV cannot decode")
                pixels = picture if picture.ndim == 2 else np.ascontiguousarray(picture[..., ::-1])
                self._sink.put(fit_pixels(pixels, self._size), captured, f"picture {number}")
            except DataError:
                self._sink.undecodable()
