"""Sources: frames equal those of training, files are read whole, lost devices are tried again, frames are stamped on
arrival."""

from __future__ import annotations

import importlib.util
import io
import os
import pty
import select
import socket
import struct
import sys
import threading
import tracemalloc
import types
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image
from pydantic import Field

from device.daemon import sources
from device.daemon.config import probes
from device.daemon.config.doctor import diagnose
from device.daemon.config.init import commented_toml
from device.daemon.config.settings import load_config
from device.daemon.finding import Finding, Machine
from device.daemon.frames import Frame, FrameCounts, FrameQueue
from device.daemon.sources import Feed, NoSource, SourceSection
from device.daemon.sources.camera import Camera, CameraSource
from device.daemon.sources.folder import PERIOD_S, FolderSource, WatchedFolder
from device.daemon.sources.mqtt import MAX_BYTES, MessageFrames, MqttSource
from device.daemon.sources.replay import Replay, ReplaySource, replayed
from device.daemon.sources.running import RunningSource, Stop
from device.daemon.sources.serial import SensorFrames, SerialSource, serial_port, tcp_port
from device.images.decode import decode, decode_bytes, fit_pixels
from edgeear.errors import DataError, DeviceError, UsageError
from edgeear.types import U8
from firmware_bridge.sensor import Hello, PixelFormat, SensorEnd

SIZE = (6, 8)


def picture(seed: int = 0, height: int = 20, width: int = 30) -> U8:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(pixels: U8, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def frame_of(data: bytes, name: str = "a.png") -> U8:
    return decode_bytes(data, Path(name), SIZE)


class Clock:
    """A clock that only tests move."""

    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def opened(settings: SourceSection, feed: Feed) -> RunningSource:
    source = settings.open(feed)
    assert source is not None
    return source


class Waits(Stop):
    """A stop whose waits pass at once, on `clock`, and that is set after so many."""

    def __init__(self, clock: Clock, limit: int = 1000) -> None:
        super().__init__()
        self.clock, self.waits, self._limit = clock, list[float](), limit

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        self.clock.now += seconds
        if len(self.waits) >= self._limit:
            self.set()
        return self.is_set()


def taken(queue: FrameQueue, now: float = 0.0) -> list[Frame]:
    frames = []
    while (frame := queue.get(now, 1e9)) is not None:
        frames.append(frame)
        if frame.answered is not None:
            frame.answered()
    return frames


# ---------------------------------------------------------------------------------------------- same bits


@pytest.mark.parametrize("shape", [(20, 30, 3), (20, 30), (6, 8, 3), (1, 1), (301, 7, 3)])
def test_decoded_pixels_give_the_bits_of_their_png(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(fit_pixels(pixels, SIZE), frame_of(encoded(pixels)))


@pytest.mark.parametrize("bad", [np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4)), np.zeros(4, np.uint8)])
def test_other_pixels_are_refused(bad: Any) -> None:
    with pytest.raises(UsageError, match="uint8"):
        fit_pixels(bad, SIZE)
    with pytest.raises(DataError, match="allowed"):
        fit_pixels(np.zeros((0, 4, 3), np.uint8), SIZE)


# ------------------------------------------------------------------------------------------------- folder


class Watch:
    """A watched folder whose looks the test makes."""

    def __init__(self, folder: Path, *, delete: bool = False, limit: int = 8, max_age_s: float = 2.0) -> None:
        self.folder, self.clock, self.queue = folder, Clock(), FrameQueue(limit)
        self.stop = Waits(self.clock)
        self.wall, self.pace = Clock(1e10), Clock()  # the folder's changes are long ago
        settings = FolderSource.model_construct(path=folder, after="delete" if delete else "keep", max_age_s=max_age_s)
        self._watched = WatchedFolder(settings, Feed(SIZE, self.queue, self.clock), self.wall, self.pace)
        self.look()

    def look(self) -> list[str]:
        self.pace.now += 1
        self._watched.look(self.stop)
        self.clock.now += PERIOD_S
        return [frame.ref for frame in taken(self.queue)]


def write(path: Path, data: bytes, time_ns: int = 10**18) -> None:
    path.write_bytes(data)
    os.utime(path, ns=(time_ns, time_ns))


def test_a_new_file_is_read_once_it_stands_still_and_once_only(tmp_path: Path) -> None:
    watch, data = Watch(tmp_path), encoded(picture())
    write(tmp_path / "a.png", data[:50])
    assert watch.look() == []
    write(tmp_path / "a.png", data)
    assert watch.look() == []
    assert watch.look() == ["a.png"]
    assert watch.look() == [] and watch.queue.counts == FrameCounts(received=1, served=1)
    assert (tmp_path / "a.png").exists()


def test_its_frame_is_that_of_training_and_as_old_as_its_first_sight(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    write(tmp_path / "a.png", encoded(picture()))
    seen = watch.clock.now
    watch._watched.look(watch.stop)
    watch.clock.now += 1
    watch._watched.look(watch.stop)
    (frame,) = taken(watch.queue)
    assert np.array_equal(frame.pixels, decode(tmp_path / "a.png", SIZE)) and frame.captured == seen


def test_a_file_that_takes_long_to_write_is_not_stale_for_it(tmp_path: Path) -> None:
    watch, data = Watch(tmp_path), encoded(picture())
    for part in range(1, 30):  # 5.8 s, and 2 s is the limit
        write(tmp_path / "a.png", data[: 40 * part])
        assert watch.look() == []
    write(tmp_path / "a.png", data)
    assert watch.look() + watch.look() == ["a.png"] and watch.queue.counts.stale == 0


def test_a_file_renamed_in_or_changed_later_is_a_new_frame(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    write(tmp_path / ".a.png.part", encoded(picture()))
    assert watch.look() + watch.look() == []
    (tmp_path / ".a.png.part").rename(tmp_path / "a.png")
    assert watch.look() + watch.look() == ["a.png"]
    write(tmp_path / "a.png", encoded(picture(1)), 2 * 10**18)
    assert watch.look() + watch.look() == ["a.png"]


def test_what_was_there_at_the_start_is_read_only_to_be_deleted(tmp_path: Path) -> None:
    write(tmp_path / "old.png", encoded(picture()))
    keeping = Watch(tmp_path)
    assert keeping.look() + keeping.look() == []
    deleting = Watch(tmp_path, delete=True)
    assert deleting.look() + deleting.look() == ["old.png"] and list(tmp_path.iterdir()) == []


def test_what_gives_no_frame_is_counted_once_and_kept(tmp_path: Path) -> None:
    watch = Watch(tmp_path, delete=True)
    write(tmp_path / "bad.jpg", b"nonsense")
    write(tmp_path / "note.txt", b"nonsense")
    (tmp_path / "folder.png").mkdir()
    assert watch.look() + watch.look() + watch.look() == [] and watch.queue.counts.undecodable == 1
    assert sorted(os.listdir(tmp_path)) == ["bad.jpg", "folder.png", "note.txt"]


def test_kept_files_that_wait_longer_than_the_age_are_passed_over_and_counted(tmp_path: Path) -> None:
    watch = Watch(tmp_path, limit=1, max_age_s=0.0)
    for name in ("a.png", "b.png", "c.png"):
        write(tmp_path / name, encoded(picture()))
    watch.look()
    assert watch.look() == [] and watch.queue.counts == FrameCounts(received=3, stale=3)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_burst_is_deleted_only_as_it_is_answered(tmp_path: Path) -> None:
    watch = Watch(tmp_path, delete=True, limit=1, max_age_s=0.001)
    names = [f"{number:03d}.png" for number in range(40)]
    for name in names:
        write(tmp_path / name, encoded(picture()))
    answered: list[str] = []

    def answer(room: Callable[[float], bool] = watch.queue.room) -> Callable[[float], bool]:
        def served(timeout: float) -> bool:  # the loop takes a frame when the source waits for room, days later
            watch.clock.now += 86_400
            answered.extend(frame.ref for frame in taken(watch.queue, watch.clock.now))
            return room(timeout)

        return served

    watch.queue.room = answer()  # type: ignore[method-assign, assignment]
    watch.look()
    answered += watch.look()
    assert answered == names and watch.queue.counts.stale == watch.queue.counts.dropped == 0
    watch.look()
    assert not list(tmp_path.iterdir())


def test_what_was_not_answered_or_changed_since_is_not_deleted(tmp_path: Path) -> None:
    watch = Watch(tmp_path, delete=True)
    for name in ("refused.png", "changed.png", "gone.png"):
        write(tmp_path / name, encoded(picture()))
    for _ in range(2):
        watch._watched.look(watch.stop)
    frames = {frame.ref: frame for frame in iter(lambda: watch.queue.get(1e9, 1.0), None)}
    write(tmp_path / "changed.png", encoded(picture(1)), 2 * 10**18)
    (tmp_path / "gone.png").unlink()
    for name in ("changed.png", "gone.png"):
        answered = frames[name].answered
        assert answered is not None
        answered()
    assert watch.look() + watch.look() == ["changed.png"]
    watch.look()
    assert os.listdir(tmp_path) == ["refused.png"]


def test_a_file_that_cannot_be_removed_is_told_and_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(tmp_path, delete=True)
    write(tmp_path / "a.png", encoded(picture()))
    assert watch.look() + watch.look() == ["a.png"]

    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(DeviceError, match=r"answered and cannot be removed.*keep"):
        watch.look()
    write(tmp_path / "b.png", encoded(picture()))
    assert watch.look() + watch.look() == ["b.png"]


def test_an_odd_entry_does_not_stop_the_others(tmp_path: Path) -> None:
    for delete in (False, True):
        folder = tmp_path / str(delete)
        folder.mkdir()
        (folder / "self.jpg").symlink_to("self.jpg")
        (folder / "a.jpg").symlink_to("b.jpg")
        (folder / "b.jpg").symlink_to("a.jpg")
        (folder / "dead.jpg").symlink_to("/nowhere")
        (folder / "under.jpg").symlink_to("self.jpg/x.jpg")
        (folder / "folder.jpg").mkdir()
        os.mkfifo(folder / "fifo.jpg")
        write(folder / "empty.jpg", b"")
        watch = Watch(folder, delete=delete)
        write(folder / "good.png", encoded(picture()))
        assert watch.look() + watch.look() == ["good.png"]


@pytest.mark.parametrize("way", ["renamed", "in place"])
@pytest.mark.parametrize("delete", [False, True])
def test_a_file_that_is_written_anew_all_the_time_is_served(tmp_path: Path, way: str, delete: bool) -> None:
    watch, served = Watch(tmp_path, delete=delete), 0
    for number in range(20):
        target = tmp_path / ("latest.png" if way == "in place" else ".new")
        write(target, encoded(picture(number, 20 + number % 3)), 10**18 + number)
        target.rename(tmp_path / "latest.png")
        served += len(watch.look())
    assert served >= 15 and watch.queue.counts.undecodable == 0


def test_a_version_that_is_half_written_is_left_for_the_next_poll(tmp_path: Path) -> None:
    watch, served = Watch(tmp_path), list[str]()
    for number in range(20):
        data = encoded(picture(number, 20 + number % 3))
        write(tmp_path / "latest.png", data[: len(data) // 2] if number % 2 else data, 10**18 + number)
        served += watch.look()
    assert 5 <= len(served) <= 10 and watch.queue.counts.undecodable == 0
    assert watch.look() == [] and watch.queue.counts.undecodable == 1  # it stands still: it is broken


class Mount:
    """Makes a folder look as if another file system were mounted on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self._folder, self._stat, self.system = folder, os.stat, 1
        monkeypatch.setattr(os, "stat", self)

    def __call__(self, path: Any, **options: Any) -> Any:
        status = self._stat(path, **options)
        if path != self._folder:
            return status
        return types.SimpleNamespace(st_mtime_ns=status.st_mtime_ns, st_dev=self.system)


@pytest.mark.parametrize("again", [1, 3])
def test_a_share_that_is_mounted_again_is_not_served_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: int
) -> None:
    folder, away = tmp_path / "in", tmp_path / "away"
    folder.mkdir()
    away.mkdir()
    write(folder / "old.png", encoded(picture()))
    mount = Mount(monkeypatch, folder)
    watch = Watch(folder)
    write(folder / "a.png", encoded(picture()))
    assert watch.look() + watch.look() == ["a.png"]
    for name in ("a.png", "old.png"):
        (folder / name).rename(away / name)
    mount.system = 2
    assert watch.look() + watch.look() == []
    for name in ("a.png", "old.png"):
        (away / name).rename(folder / name)
    write(folder / "b.png", encoded(picture()))
    mount.system = again
    assert watch.look() + watch.look() == ["b.png"]
    assert watch.look() == []


def test_a_share_that_is_mounted_after_the_start_is_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount, watch = Mount(monkeypatch, tmp_path), Watch(tmp_path)
    write(tmp_path / "old.png", encoded(picture()))
    mount.system = 2
    assert watch.look() + watch.look() == []
    write(tmp_path / "new.png", encoded(picture()))
    assert watch.look() + watch.look() == ["new.png"]


def test_files_wait_for_room_instead_of_pushing_each_other_out(tmp_path: Path) -> None:
    queue, clock = FrameQueue(1), Clock()
    watched = WatchedFolder(FolderSource(path=tmp_path, after="delete", max_age_s=3600), Feed(SIZE, queue, clock))
    for number in range(5):
        write(tmp_path / f"{number}.png", encoded(picture()))
    stop, served = Stop(), list[str]()

    def serve() -> None:
        while len(served) < 5 and queue.wait(30):
            served.extend(frame.ref for frame in taken(queue))

    server = threading.Thread(target=serve, daemon=True)
    server.start()
    watched.look(stop)
    watched.look(stop)
    server.join(30)
    assert served == [f"{number}.png" for number in range(5)] and queue.counts.dropped == 0


def test_an_unchanged_folder_is_not_listed_but_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, listed, scandir = Watch(tmp_path), list[Path](), os.scandir

    def slow(folder: Path) -> Any:
        listed.append(folder)
        watch.pace.now += 0.1
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", slow)
    for _ in range(100):
        watch.look()
    assert 2 <= len(listed) <= 3  # 100 s, and 50 s of rest after 0.1 s


def test_a_change_that_hides_behind_the_same_time_stamp_is_seen(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    watch.wall.now = tmp_path.stat().st_mtime + 1
    watch._watched._rested = 1e9
    stamp = tmp_path.stat().st_mtime_ns
    write(tmp_path / "a.png", encoded(picture()))
    os.utime(tmp_path, ns=(stamp, stamp))
    assert watch.look() + watch.look() == ["a.png"]


def test_a_folder_that_vanishes_is_a_lost_device_and_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    watch = Watch(folder)
    folder.rmdir()
    with pytest.raises(DeviceError, match=r"source\.path"):
        watch.look()
    folder.mkdir()
    watch.look()
    write(folder / "a.png", encoded(picture()))
    assert watch.look() + watch.look() == ["a.png"]


def test_what_is_remembered_goes_with_the_file(tmp_path: Path) -> None:
    watch = Watch(tmp_path, limit=20)
    for number in range(20):
        write(tmp_path / f"{number}.png", encoded(picture()))
    assert len(watch.look() + watch.look() + watch.look()) == 20
    for path in tmp_path.iterdir():
        path.unlink()
    watch.look()
    assert watch._watched._done == {}


# ------------------------------------------------------------------------------------------------- replay


def replay(folder: Path, feed: Feed, fps: float, loop: bool, pace: Clock) -> Replay:
    return Replay(ReplaySource(path=folder, fps=fps, loop=loop), feed, pace)


def tree(folder: Path) -> list[str]:
    names = [f"{d}/{c}/{n}.png" for d in ("art", "photo") for c in ("cat", "dog") for n in range(4)]
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, encoded(picture(seed)))
    return names


def test_a_tree_is_replayed_domain_by_domain_with_classes_mixed(tmp_path: Path) -> None:
    names = tree(tmp_path)
    (tmp_path / "art" / "cat" / ".hidden.png").write_bytes(b"")
    order = replayed(tmp_path)
    assert sorted(order) == sorted(names) and order != sorted(order)
    assert [name.split("/")[0] for name in order] == ["art"] * 8 + ["photo"] * 8


def test_a_flat_folder_is_replayed_by_name_at_its_rate_and_once(tmp_path: Path) -> None:
    for name in ("b.png", "a.png", "c.jpg"):
        write(tmp_path / name, encoded(picture()) if name != "c.jpg" else b"bad")
    clock, queue = Clock(), FrameQueue(9)
    stop = Waits(clock)
    replay(tmp_path, Feed(SIZE, queue, clock), 4.0, False, clock).run(stop)
    frames = taken(queue)
    assert [(frame.ref, frame.captured) for frame in frames] == [("a.png", 100.0), ("b.png", 100.25)]
    assert queue.counts.undecodable == 1 and not stop.is_set()
    assert np.array_equal(frames[0].pixels, decode(tmp_path / "a.png", SIZE))


def test_a_loop_goes_on_until_it_is_stopped(tmp_path: Path) -> None:
    write(tmp_path / "a.png", encoded(picture()))
    clock, queue = Clock(), FrameQueue(99)
    replay(tmp_path, Feed(SIZE, queue, clock), 5.0, True, clock).run(Waits(clock, 11))
    assert [round(frame.captured - 100, 3) for frame in taken(queue)] == [round(0.2 * n, 3) for n in range(10)]


def test_a_replay_that_falls_behind_does_not_hurry(tmp_path: Path) -> None:
    for name in "abcd":
        write(tmp_path / f"{name}.png", encoded(picture()))
    clock, queue = Clock(), FrameQueue(9)
    stop = Waits(clock)
    slow = types.SimpleNamespace(count=0)

    def captured() -> float:
        slow.count += 1
        clock.now += 10.0 if slow.count == 2 else 0.0
        return clock.now

    replay(tmp_path, Feed(SIZE, queue, captured), 1.0, False, clock).run(stop)
    assert stop.waits == [0.0, 1.0, 0.0, 1.0]


def test_a_folder_without_frames_does_not_spin(tmp_path: Path) -> None:
    clock = Clock()
    empty = replay(tmp_path, Feed(SIZE, FrameQueue(1), clock), 5.0, True, clock)
    with pytest.raises(DeviceError, match="none of its files"):
        empty.run(Waits(clock))
    with pytest.raises(DeviceError, match="no folder"):
        replay(tmp_path / "none", Feed(SIZE, FrameQueue(1), clock), 5.0, True, clock).run(Waits(clock))


# --------------------------------------------------------------------------------------------------- mqtt


@pytest.fixture
def messages() -> Iterator[tuple[RunningSource, FrameQueue]]:
    queue = FrameQueue(64)
    source = RunningSource("mqtt", MessageFrames(Feed(SIZE, queue, Clock()), 64), queue)
    yield source, queue
    assert source.stop(30)


def bomb() -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_messages_become_frames_and_bad_ones_are_counted(messages: tuple[RunningSource, FrameQueue]) -> None:
    source, queue = messages
    jpeg, png = encoded(picture(), "JPEG"), encoded(picture())
    bad = [b"", b"RIFF", png[: len(png) // 2], jpeg[:100], bomb(), encoded(picture(), "GIF"), bytes(MAX_BYTES + 1)]
    for payload in (*bad, jpeg, png):
        source.offer(payload)
    source.start()
    frames: list[Frame] = []
    while len(frames) < 2 and queue.wait(30):
        frames += taken(queue)
    assert np.array_equal(frames[0].pixels, frame_of(jpeg, "a.jpg"))
    assert np.array_equal(frames[1].pixels, frame_of(png))
    assert [frame.captured for frame in frames] == [100.0, 100.0]
    assert queue.counts == FrameCounts(received=2, served=2, undecodable=len(bad))


def test_undecoded_messages_are_bounded_and_the_oldest_goes_first() -> None:
    clock, queue = Clock(), FrameQueue(9)
    waiting = MessageFrames(Feed(SIZE, queue, clock), 2)
    tracemalloc.start()
    for _ in range(50):
        waiting.offer(bytes(1 << 20))
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert grown < 3 << 20 and queue.counts == FrameCounts(received=48, dropped=48)
    assert [number for number, _, _ in waiting._inbox] == [49, 50]


# ------------------------------------------------------------------------------------------------- camera


class FakeCapture:
    """What a driver gives, in order: pictures (BGR), None for one that does not decode, and then nothing."""

    def __init__(self, opened: bool, given: list[U8 | None]) -> None:
        self._opened, self._given, self.released = opened, deque(given), False

    def isOpened(self) -> bool:
        return self._opened

    def set(self, key: int, value: float) -> bool:
        return True

    def grab(self) -> bool:
        self._now = self._given.popleft() if self._given else "lost"
        return not isinstance(self._now, str)

    def retrieve(self) -> tuple[bool, Any]:
        return self._now is not None, self._now

    def release(self) -> None:
        self.released = True


@pytest.fixture
def cv2(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake = types.ModuleType("cv2")
    fake.__spec__ = importlib.util.spec_from_loader("cv2", None)
    fake.CAP_PROP_BUFFERSIZE = 38  # type: ignore[attr-defined]
    fake.captures, fake.asked = deque[FakeCapture](), []  # type: ignore[attr-defined]

    def open_capture(device: object) -> FakeCapture:
        fake.asked.append(device)
        return fake.captures.popleft()  # type: ignore[no-any-return]

    fake.VideoCapture = open_capture  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cv2", fake)
    return fake


def test_a_camera_gives_rgb_frames_at_most_so_many_a_second_and_its_loss_is_told(cv2: Any) -> None:
    clock, queue, seen = Clock(), FrameQueue(9), [picture(n) for n in range(7)]
    capture = FakeCapture(True, [p[..., ::-1] for p in seen])
    cv2.captures.append(capture)

    def captured() -> float:  # the camera gives ten pictures a second
        clock.now += 0.1
        return clock.now

    with pytest.raises(DeviceError, match="cable"):
        Camera(CameraSource(device="0", fps=10 / 3), Feed(SIZE, queue, captured), clock).run(Stop())
    frames = taken(queue)
    assert [frame.ref for frame in frames] == ["picture 1", "picture 4", "picture 7"]
    assert all(np.array_equal(f.pixels, fit_pixels(p, SIZE)) for f, p in zip(frames, seen[::3], strict=True))
    assert cv2.asked == [0] and capture.released


def test_pictures_that_do_not_decode_are_counted_and_grey_ones_serve(cv2: Any) -> None:
    clock, queue = Clock(), FrameQueue(9)
    cv2.captures.append(FakeCapture(True, [None, picture()[..., 0], np.zeros((0, 3, 3), np.uint8)]))

    def captured() -> float:
        clock.now += 1
        return clock.now

    with pytest.raises(DeviceError):
        Camera(CameraSource(device="/dev/video9"), Feed(SIZE, queue, captured), clock).run(Stop())
    (frame,) = taken(queue)
    assert np.array_equal(frame.pixels, fit_pixels(picture()[..., 0], SIZE)) and queue.counts.undecodable == 2
    assert cv2.asked == ["/dev/video9"]


@pytest.mark.parametrize("error", [None, OSError("(in file name): rtsp://admin:S3cret@cam/live")])
def test_the_password_of_a_camera_is_in_no_error(cv2: Any, error: OSError | None) -> None:
    def refused(device: object) -> FakeCapture:
        assert device == "rtsp://admin:S3cret@cam/live"
        if error is not None:
            raise error
        return FakeCapture(False, [])

    cv2.VideoCapture = refused
    queue = FrameQueue(1)
    camera = CameraSource(device="rtsp://admin:S3cret@cam/live").capture(Feed(SIZE, queue, Clock()))
    source = RunningSource("camera", camera, queue, (0.0, 0.0))
    source._stop = Waits(Clock(), 2)
    source.start()
    source._thread.join(30)
    assert "rtsp://***@cam/live" in str(source.last_error)


def test_opencv_prints_no_messages_of_its_own(cv2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENCV_LOG_LEVEL", "INFO")
    monkeypatch.setenv("OPENCV_FFMPEG_LOGLEVEL", "32")
    cv2.captures.append(FakeCapture(False, []))
    with pytest.raises(DeviceError):
        Camera(CameraSource(device="rtsp://admin:S3cret@cam/"), Feed(SIZE, FrameQueue(1), Clock())).run(Stop())
    assert (os.environ["OPENCV_LOG_LEVEL"], os.environ["OPENCV_FFMPEG_LOGLEVEL"]) == ("SILENT", "-8")


def test_a_camera_may_be_silent_for_half_a_minute_and_other_kinds_for_ever_unless_configured(
    cv2: Any, tmp_path: Path
) -> None:
    feed = Feed(SIZE, FrameQueue(1), Clock())
    assert opened(CameraSource(device="0"), feed).silent_s == 30
    assert opened(CameraSource(device="0", fps=0.01), feed).silent_s == 300
    assert opened(CameraSource(device="0", silent_s=5), feed).silent_s == 5
    assert opened(FolderSource(path=tmp_path), feed).silent_s is None
    assert opened(MqttSource(silent_s=60), feed).silent_s == 60


def test_a_camera_that_is_not_there_is_told(cv2: Any) -> None:
    cv2.captures.append(FakeCapture(False, []))
    with pytest.raises(DeviceError, match="in use"):
        Camera(CameraSource(device="3"), Feed(SIZE, FrameQueue(1), Clock())).run(Stop())


def test_without_opencv_the_command_to_get_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cv2" else find(name))
    with pytest.raises(UsageError, match=r"pip install -e '\.\[camera\]'"):
        CameraSource(device="0").open(Feed(SIZE, FrameQueue(1), Clock()))


def test_a_video_file_stands_in_for_a_camera(tmp_path: Path) -> None:
    real = pytest.importorskip("cv2", reason="needs OpenCV: pip install -e '.[camera]'")
    path = tmp_path / "film.avi"
    writer = real.VideoWriter(str(path), real.VideoWriter_fourcc(*"MJPG"), 10.0, (32, 24))
    for level in (40, 120, 200):
        writer.write(np.full((24, 32, 3), (level, 0, 0), np.uint8))  # blue
    writer.release()
    clock, queue = Clock(), FrameQueue(9)
    with pytest.raises(DeviceError, match="no more pictures"):
        Camera(CameraSource(device=str(path), fps=10), Feed(SIZE, queue, clock), clock).run(Waits(clock))
    blue = [int(frame.pixels[..., 2].mean()) for frame in taken(queue)]
    assert np.allclose(blue, (40, 120, 200), atol=8)


# ------------------------------------------------------------------------------------------------- sensor


def got(queue: FrameQueue, count: int) -> list[Frame]:
    frames: list[Frame] = []
    while len(frames) < count and queue.wait(30):
        frames += taken(queue)
    return frames


def heard_host(sensor: SensorEnd, read: Callable[[], bytes]) -> None:
    """Read what the host says until it greets."""
    while not sensor.feed(read()):
        pass


def send(write: Callable[[bytes], int], data: bytes) -> None:
    while data:
        data = data[write(data) :]


RGB = Hello("gate", PixelFormat.RGB888, 30, 20)


@pytest.fixture
def terminal() -> Iterator[tuple[int, str]]:
    """A pseudo-terminal: the sensor's descriptor, and the device file of the host's end."""
    ours, theirs = pty.openpty()
    yield ours, os.ttyname(theirs)
    os.close(theirs)
    os.close(ours)


def test_frames_come_over_a_serial_line_bit_for_bit(terminal: tuple[int, str]) -> None:
    line, tty = terminal
    queue, sensor = FrameQueue(9), SensorEnd(RGB)
    source = opened(SerialSource(device=tty), Feed(SIZE, queue, Clock(7.0)))
    source.start()
    heard_host(sensor, lambda: os.read(line, 99))
    pixels = [picture(n) for n in range(3)]  # every byte value, control characters among them
    for data in (sensor.hello(), sensor.log(20, "ready"), *(d for p in pixels for d in sensor.frame(p.tobytes(), 500))):
        send(lambda part: os.write(line, part[:1000]), data)
    frames = got(queue, 3)
    assert [(f.ref, f.captured) for f in frames] == [(f"gate {n}", 7.0) for n in range(3)]
    assert all(np.array_equal(f.pixels, fit_pixels(p, SIZE)) for f, p in zip(frames, pixels, strict=True))
    assert source.alive and source.last_error is None
    assert source.stop(30) and not source.alive


def test_a_sensor_that_is_not_known_is_greeted_again(terminal: tuple[int, str]) -> None:
    line, tty = terminal
    queue, sensor = FrameQueue(9), SensorEnd(RGB)
    source = RunningSource("x", SensorFrames(serial_port(tty, 9600), Feed(SIZE, queue, Clock())), queue)
    source.start()
    for _ in range(2):
        heard_host(sensor, lambda: os.read(line, 99))
        send(lambda part: os.write(line, part), b"".join(sensor.frame(picture().tobytes())))
    heard_host(sensor, lambda: os.read(line, 99))
    send(lambda part: os.write(line, part), sensor.hello() + b"".join(sensor.frame(picture().tobytes())))
    (frame,) = got(queue, 1)
    assert frame.ref == "gate 2"
    assert source.stop(30)


def test_a_sensor_that_changed_unheard_is_asked_who_it_is(terminal: tuple[int, str]) -> None:
    line, tty = terminal
    queue, old, new = FrameQueue(9), SensorEnd(RGB), SensorEnd(Hello("gate", PixelFormat.GRAY8, 30, 20))
    source = RunningSource("x", SensorFrames(serial_port(tty, 9600), Feed(SIZE, queue, Clock())), queue)
    source.start()
    heard_host(old, lambda: os.read(line, 99))
    gray = picture()[..., 0]
    send(lambda part: os.write(line, part), old.hello() + b"".join(new.frame(gray.tobytes())))
    heard_host(new, lambda: os.read(line, 99))
    send(lambda part: os.write(line, part), new.hello() + b"".join(new.frame(gray.tobytes())))
    (frame,) = got(queue, 1)
    assert np.array_equal(frame.pixels, fit_pixels(gray, SIZE))
    assert source.stop(30)


def test_frames_come_over_tcp_and_a_lost_sensor_is_joined_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        queue, port = FrameQueue(9), tcp_port(f"tcp://127.0.0.1:{server.getsockname()[1]}")
        source = RunningSource("x", SensorFrames(port, Feed(SIZE, queue, Clock())), queue, (0.0, 0.0))
        source.start()
        jpeg = encoded(picture(), "JPEG")
        for _ in range(2):
            connection, _ = server.accept()
            with connection:
                sensor = SensorEnd(Hello("yard", PixelFormat.JPEG, 30, 20))
                heard_host(sensor, lambda: connection.recv(99))  # noqa: B023
                broken = b"".join(sensor.frame(jpeg[:60]))
                connection.sendall(sensor.hello() + broken + b"".join(sensor.frame(jpeg)))
                (frame,) = got(queue, 1)
                assert np.array_equal(frame.pixels, frame_of(jpeg, "a.jpg"))
        connection, _ = server.accept()
        connection.close()
        assert source.stop(30)
    assert queue.counts.undecodable == 2 and "sensor" in str(source.last_error)


def test_what_is_no_serial_line_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for name, word in (("none", "No such file"), ("file", "serial line")):
        with pytest.raises(DeviceError, match=word):
            SensorFrames(serial_port(str(tmp_path / name), 115_200), Feed(SIZE, FrameQueue(1), Clock())).run(Stop())


def test_a_speed_that_does_not_exist_is_told_before_the_start() -> None:
    with pytest.raises(UsageError, match="115200"):
        SerialSource(device="x", baud=115_201).open(Feed(SIZE, FrameQueue(1), Clock()))


# ------------------------------------------------------------------------------------------------ running


class Failing:
    """A capture that puts a frame on the tries in `good`, and fails on all."""

    def __init__(self, queue: FrameQueue, good: tuple[int, ...] = ()) -> None:
        self._queue, self._good, self.tries = queue, good, 0

    def run(self, stop: Stop) -> None:
        self.tries += 1
        if self.tries in self._good:
            self._queue.put(picture(), 0.0, "a")
        raise DeviceError(f"try {self.tries}") if self.tries % 2 else KeyError("a bug")


def test_pauses_grow_to_a_bound_and_start_anew_after_a_frame() -> None:
    queue, clock = FrameQueue(1), Clock()
    capture = Failing(queue, good=(5,))
    source = RunningSource("x", capture, queue, (1.0, 8.0))
    source._stop = Waits(clock, 8)
    source.start()
    source._thread.join(30)
    assert source._stop.waits == [1, 2, 4, 8, 1, 2, 4, 8]
    assert source.last_error == "KeyError: 'a bug'" and not source.alive and not source.finished


def test_a_source_that_ends_by_itself_is_finished(tmp_path: Path) -> None:
    write(tmp_path / "a.png", encoded(picture()))
    queue = FrameQueue(1)
    source = opened(ReplaySource(path=tmp_path, fps=240, loop=False), Feed(SIZE, queue, Clock()))
    assert not source.alive
    source.start()
    (frame,) = got(queue, 1)
    source.offer(b"ignored")
    assert frame.ref == "a.png" and source.stop(30) and source.finished is (source.last_error is None)
    with pytest.raises(UsageError, match="started already"):
        source.start()


def test_the_watched_folder_runs_as_configured(tmp_path: Path) -> None:
    env = {"EDGEEAR_SOURCE__KIND": "folder", "EDGEEAR_SOURCE__PATH": str(tmp_path), "EDGEEAR_SOURCE__AFTER": "delete"}
    queue = FrameQueue(1)
    source = opened(load_config(None, env).source, Feed(SIZE, queue, Clock()))
    source.start()
    write(tmp_path / "a.png", encoded(picture()))
    (frame,) = got(queue, 1)
    assert frame.ref == "a.png" and source.stop(30) and not list(tmp_path.iterdir())


def test_none_is_no_source_and_a_source_that_never_started_stops() -> None:
    assert NoSource().open(Feed(SIZE, FrameQueue(1), Clock())) is None
    assert opened(MqttSource(), Feed(SIZE, FrameQueue(1), Clock())).stop(0)


def test_stopping_wakes_who_selects() -> None:
    stop = Stop()
    assert select.select([stop.fileno()], [], [], 0)[0] == []
    stop.set()
    assert select.select([stop.fileno()], [], [], 0)[0] == [stop.fileno()]


# -------------------------------------------------------------------------------------------- a kind of its own


class Toy:
    """A capture that gives one frame and ends."""

    def __init__(self, level: int, feed: Feed) -> None:
        self._level, self._feed = level, feed

    def run(self, stop: Stop) -> None:
        self._feed.put(lambda size: np.full((*size, 3), self._level, np.uint8), self._feed.clock(), "toy")


class ToySource(SourceSection):
    """One frame of one level."""

    kind: Literal["toy"] = "toy"
    level: int = Field(7, ge=0, le=255, description="the level of all pixels.")

    def capture(self, feed: Feed) -> Toy:
        return Toy(self.level, feed)

    def check(self, machine: Machine) -> Iterator[Finding]:
        yield Finding("source", "ok", f"a toy at level {self.level}")


def test_a_new_kind_is_one_class_and_its_row_in_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources, "KINDS", (*sources.KINDS, ToySource))
    text = commented_toml()
    assert "toy: One frame of one level." in text and "replay, toy." in text
    assert "# toy: the level of all pixels. (0 to 255)\n#level = 7\n" in text

    path = tmp_path / "edgeear.toml"
    path.write_text('[source]\nkind = "toy"\nlevel = 9\n')
    config = load_config(path, {"EDGEEAR_SOURCE__QUEUE": "2"})
    assert config.source == ToySource(level=9, queue=2)
    with pytest.raises(UsageError, match=r"source\.level = '256' .*: must be at most 255, for example level = 7"):
        load_config(path, {"EDGEEAR_SOURCE__LEVEL": "256"})

    with monkeypatch.context() as patch:
        patch.setattr(probes, "encoder", lambda *_: probes.EncoderFacts(1, (), None, None))
        findings = diagnose(config)
    assert Finding("source", "ok", "a toy at level 9") in findings

    queue = FrameQueue(1)
    source = opened(config.source, Feed(SIZE, queue, Clock()))
    source.start()
    (frame,) = got(queue, 1)
    assert frame.ref == "toy" and (frame.pixels == 9).all() and source.stop(30)


def test_kinds_that_share_a_key_give_it_one_type_and_one_range() -> None:
    seen: dict[str, tuple[object, ...]] = {}
    for kind in sources.KINDS:
        for key, field in kind.model_fields.items():
            if key != "kind":
                rules = (repr(field.metadata), None if field.is_required() else field.default)
                assert seen.setdefault(key, rules) == rules, key
    assert {"path", "device", "fps", "queue", "max_age_s"} <= set(seen)


def test_keys_of_other_kinds_are_checked_and_ignored(tmp_path: Path) -> None:
    path = tmp_path / "edgeear.toml"
    path.write_text(f'[source]\nkind = "folder"\npath = "{tmp_path}"\nfps = 2\nloop = false\nurl = "tcp://a:1"\n')
    assert load_config(path, {}).source == FolderSource(path=tmp_path)
    with pytest.raises(UsageError, match=r"source\.fps = '0'"):
        load_config(path, {"EDGEEAR_SOURCE__FPS": "0"})


def test_a_frame_of_a_file_whose_name_is_not_utf8_has_a_ref_that_can_be_sent() -> None:
    queue = FrameQueue(4)
    feed = Feed(SIZE, queue, lambda: 1.0)
    assert feed.put(lambda size: np.zeros((*size, 3), np.uint8), 1.0, "Mu\udcf1oz.png")
    (frame,) = taken(queue)
    assert frame.ref == "Mu\\udcf1oz.png" and frame.ref.encode()
