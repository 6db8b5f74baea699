"""The feature cache and `featurise`: right or absent, bounded, and never in the way."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from device.images import feature_cache
from device.images.dataset import Item
from device.images.decode import UndecodableInput, decode
from device.images.feature_cache import ROW_OVERHEAD, FeatureCache, FeatureKey
from device.images.featurise import WRITE_ROWS, featurise, featurise_items
from device.images.views import view
from edgeear.errors import DataError, DeviceError, UsageError
from edgeear.types import F32, U8, Tap

ROOM = 1 << 30


def key(number: int, encoder: str = "e", view: str = "plain", tap: str = "t") -> FeatureKey:
    return FeatureKey(hashlib.sha256(b"%d" % number).digest(), encoder, view, tap)


def row(number: int, length: int = 50) -> NDArray[np.float32]:
    return np.random.default_rng(number).normal(size=length).astype(np.float32)


def rows(numbers: Sequence[int], length: int = 50) -> list[tuple[FeatureKey, NDArray[Any]]]:
    return [(key(number), row(number, length)) for number in numbers]


def held(cache: FeatureCache, numbers: Sequence[int], length: int = 50) -> list[int]:
    """Which of `numbers` the cache has, after checking that every row is the one that was put."""
    found = cache.get_many([key(number) for number in numbers])
    for number, array in zip(numbers, found, strict=True):
        assert array is None or np.array_equal(array, row(number, length))
    return [number for number, array in zip(numbers, found, strict=True) if array is not None]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "features.sqlite"


# ------------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("shape", [(7,), (3, 2, 2), (0,)])
def test_a_row_comes_back_bit_for_bit_after_reopening(path: Path, dtype: Any, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).normal(size=shape).astype(dtype)
    with FeatureCache(path, ROOM) as cache:
        cache.put_many([(key(1), np.asfortranarray(array))])
    with FeatureCache(path, ROOM) as cache:
        absent, found = cache.get_many([key(2), key(1)])
    assert absent is None and found is not None
    assert found.dtype == dtype and found.shape == shape and np.array_equal(found, array)


@pytest.mark.parametrize(
    "other",
    [
        key(2),
        key(1, encoder="f"),
        key(1, view="flip"),
        key(1, tap="u"),
        key(1, encoder="e\0plain", view="t", tap=""),
    ],
)
def test_content_encoder_view_and_tap_all_count(path: Path, other: FeatureKey) -> None:
    with FeatureCache(path, ROOM) as cache:
        cache.put_many([(key(1), row(1))])
        assert cache.get_many([other]) == [None]
        cache.put_many([(other, row(7))])
        assert held(cache, [1]) == [1]


def test_putting_again_replaces_and_is_charged_once(path: Path) -> None:
    with FeatureCache(path, ROOM) as cache:
        cache.put_many([(key(1), row(9, 500))])
        cache.put_many(rows([1]) + rows([1]))
        assert held(cache, [1]) == [1]
        assert cache.total_bytes == 200 + ROW_OVERHEAD


def test_more_keys_than_fit_one_statement(path: Path) -> None:
    numbers = list(range(2 * feature_cache.CHUNK + 1))
    with FeatureCache(path, ROOM) as cache:
        cache.put_many(rows(numbers))
        assert held(cache, numbers[::-1]) == numbers[::-1]
        assert cache.get_many([]) == []


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (np.array([1, np.nan], np.float32), DataError),
        (np.array([1, np.inf], np.float16), DataError),
        (np.array([1.0], np.float64), UsageError),
        (np.array([1], np.int32), UsageError),
    ],
)
def test_what_is_no_feature_is_refused_and_nothing_is_stored(path: Path, bad: Any, error: type[Exception]) -> None:
    with FeatureCache(path, ROOM) as cache:
        with pytest.raises(error):
            cache.put_many([*rows([1]), (key(2), bad)])
        assert cache.get_many([key(1), key(2)]) == [None, None]


# ----------------------------------------------------------------------------------------------------- bound


COST = 200 + ROW_OVERHEAD


def test_the_bound_holds_and_the_oldest_go_first(path: Path) -> None:
    with FeatureCache(path, 20 * COST) as cache:
        for number in range(50):
            cache.put_many(rows([number]))
            assert cache.total_bytes <= 20 * COST
        left = held(cache, range(50))
    assert left == list(range(50 - len(left), 50))
    assert len(left) >= 18


def test_a_row_that_was_read_outlives_one_that_was_not(path: Path) -> None:
    with FeatureCache(path, 10 * COST) as cache:
        cache.put_many(rows(range(10)))
        assert held(cache, [0, 1]) == [0, 1]
        cache.put_many(rows([10]))
        assert held(cache, range(11)) == [0, 1, 4, 5, 6, 7, 8, 9, 10]


def test_use_is_remembered_over_reopening(path: Path) -> None:
    with FeatureCache(path, 10 * COST) as cache:
        cache.put_many(rows(range(10)))
    with FeatureCache(path, 10 * COST) as cache:
        assert held(cache, [0]) == [0]
    with FeatureCache(path, 10 * COST) as cache:
        cache.put_many(rows([10]))
        assert held(cache, [0, 1]) == [0]


def test_a_lower_bound_at_the_next_run_gives_the_disk_its_room_back(path: Path) -> None:
    with FeatureCache(path, ROOM) as cache:
        cache.put_many(rows(range(200), 5000))
        full = cache.total_bytes
    assert path.stat().st_size > full * 0.9
    with FeatureCache(path, full // 10) as cache:
        assert 0 < cache.total_bytes <= full // 10
        assert held(cache, range(199, 200), 5000) == [199]
        assert path.stat().st_size < full / 5


def test_a_row_larger_than_the_bound_is_not_kept(path: Path) -> None:
    with FeatureCache(path, 100) as cache:
        cache.put_many(rows([1]))
        assert cache.total_bytes == 0 and cache.warnings == ()


@pytest.mark.parametrize("bound", [0, -5])
def test_a_bound_without_room_is_refused(path: Path, bound: int) -> None:
    with pytest.raises(UsageError, match="max_bytes"):
        FeatureCache(path, bound)


# ---------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("content", [b"no database at all, but long enough to look like one" * 99, b"\0" * 9000])
def test_a_file_that_is_no_database_is_set_aside(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with FeatureCache(path, ROOM) as cache:
        assert len(cache.warnings) == 1 and str(path) in cache.warnings[0]
        cache.put_many(rows([1]))
        assert held(cache, [1]) == [1]
    assert path.with_name(path.name + ".damaged").read_bytes() == content
    with FeatureCache(path, ROOM) as cache:
        assert held(cache, [1]) == [1] and cache.warnings == ()


def test_a_database_of_another_kind_or_version_is_set_aside(path: Path) -> None:
    path.parent.mkdir()
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE other (x)")
    database.commit()
    database.close()
    with FeatureCache(path, ROOM) as cache:
        assert "version" in cache.warnings[0]
        cache.put_many(rows([1]))
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 99")
    database.close()
    with FeatureCache(path, ROOM) as cache:
        assert "version" in cache.warnings[0]
        assert held(cache, [1]) == []


def test_wherever_the_file_is_damaged_rows_are_right_or_absent(path: Path) -> None:
    numbers = range(40)
    with FeatureCache(path, ROOM) as cache:
        cache.put_many(rows(numbers, 1000))
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    lost = 0
    for trial in range(60):
        broken = bytearray(whole)
        for place in rng.integers(100, len(whole), 6 if trial % 3 else 60):
            broken[int(place)] ^= int(rng.integers(1, 256))
        shutil.rmtree(path.parent)
        path.parent.mkdir()
        path.write_bytes(broken[: len(broken) * 2 // 3] if trial % 5 == 4 else broken)
        with FeatureCache(path, ROOM) as cache:
            lost += len(numbers) - len(held(cache, numbers, 1000))
            cache.put_many(rows(numbers, 1000))
            held(cache, numbers, 1000)
    assert lost > 60, "the damage must have hit rows for this test to mean anything"


def test_an_intact_row_under_the_wrong_key_counts_as_missing(path: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a", "b")]
    for file in files:
        file.write_bytes(b"one length " + file.name.encode())
    with FeatureCache(path, ROOM) as cache:
        cache.put_many(rows([1, 2, 3]))
        right = cache.digests(files)
    database = sqlite3.connect(path)
    database.execute("UPDATE rows SET id = CASE id WHEN 1 THEN -2 WHEN 2 THEN -1 END WHERE id < 3")
    database.execute("UPDATE rows SET id = -id WHERE id < 0")
    database.execute("UPDATE files SET digest = (SELECT digest FROM files WHERE place = 1)")
    database.commit()
    database.close()
    with FeatureCache(path, ROOM) as cache:
        assert held(cache, [1, 2, 3]) == [3]
        assert cache.digests(files) == right


def test_a_lock_that_does_not_yield_ends_the_writing_and_not_the_run(path: Path) -> None:
    with FeatureCache(path, ROOM) as other:
        other.put_many(rows([1]))
    blocker = sqlite3.connect(path, isolation_level=None)
    with FeatureCache(path, ROOM, timeout_s=0.01) as cache:
        blocker.execute("BEGIN IMMEDIATE")
        cache.put_many(rows([2]))
        assert len(cache.warnings) == 1 and "locked" in cache.warnings[0]
        assert held(cache, [1, 2]) == [1]
        cache.put_many(rows([3]))
        assert len(cache.warnings) == 1
    blocker.execute("ROLLBACK")
    blocker.close()


def test_a_full_disk_ends_the_writing_and_not_the_reading(path: Path) -> None:
    with FeatureCache(path, ROOM) as cache:
        cache.put_many(rows([1]))
        cache._database.execute("PRAGMA max_page_count = 20")
        cache.put_many(rows(range(2, 100), 1000))
        assert len(cache.warnings) == 1 and "full" in cache.warnings[0]
        assert held(cache, [1]) == [1]


def test_damage_that_cannot_be_set_aside_ends_the_caching_and_not_the_run(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    with FeatureCache(path, ROOM) as cache:
        cache.put_many(rows(range(40), 1000))
    with FeatureCache(path, ROOM) as cache:
        with open(path, "r+b") as file:
            file.write(b"\xff" * 100_000)
        monkeypatch.setattr(os, "replace", refuse)
        assert held(cache, range(40), 1000) == []
        cache.put_many(rows([1]))
        assert held(cache, [1]) == []
        assert len(cache.warnings) == 1 and "cannot be replaced (read-only)" in cache.warnings[0]


def test_a_place_that_holds_no_file_is_the_machines_fault(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="cannot be opened"):
        FeatureCache(tmp_path, ROOM)
    (tmp_path / "file").write_text("")
    with pytest.raises(DeviceError, match="cannot be opened"):
        FeatureCache(tmp_path / "file" / "cache.sqlite", ROOM)


def test_use_after_close_is_a_bug_and_says_so(path: Path) -> None:
    cache = FeatureCache(path, ROOM)
    cache.close()
    with pytest.raises(sqlite3.ProgrammingError):
        cache.get_many([key(1)])


# ------------------------------------------------------------------------------------------------- processes


def put_and_read(place: str, start: int) -> tuple[list[int], tuple[str, ...]]:
    """One of several processes: writes its own rows, one transaction each, and reads everybody's."""
    with FeatureCache(Path(place), ROOM) as cache:
        for number in range(start, start + 40):
            cache.put_many(rows([number]))
            held(cache, range(120))
        return held(cache, range(start, start + 40)), cache.warnings


@pytest.mark.parametrize("damaged", [False, True])
def test_processes_share_a_cache_even_one_that_must_be_rebuilt(path: Path, damaged: bool) -> None:
    path.parent.mkdir()
    if damaged:
        path.write_bytes(b"damaged" * 1000)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        results = pool.starmap(put_and_read, [(str(path), start) for start in (0, 40, 80)])
    assert [numbers for numbers, _ in results] == [list(range(start, start + 40)) for start in (0, 40, 80)]
    assert sum(len(warnings) for _, warnings in results) == int(damaged)
    with FeatureCache(path, ROOM) as cache:
        assert held(cache, range(120)) == list(range(120))
        assert cache.total_bytes == 120 * COST


def test_damage_met_by_two_at_once_costs_one_rebuild(path: Path) -> None:
    with FeatureCache(path, ROOM) as first:
        first.put_many(rows(range(40), 1000))
    with FeatureCache(path, ROOM) as first, FeatureCache(path, ROOM) as second:
        whole = path.stat().st_size
        with open(path, "r+b") as file:
            file.seek(4096)
            file.write(b"\xff" * (whole - 4096))
        assert held(first, range(40), 1000) == []
        first.put_many(rows([1]))
        held(second, range(40), 1000)
        assert held(second, [1]) == [1], "the second opens what the first rebuilt"
        assert len(first.warnings) + len(second.warnings) == 1


KILLED = """
import sys
import numpy as np
from pathlib import Path
from tests.device.images.test_feature_cache import FeatureCache, ROOM, rows
cache = FeatureCache(Path(sys.argv[1]), ROOM)
for number in range(100000):
    cache.put_many(rows([number]))
    print(number, flush=True)
"""


def test_a_killed_writer_leaves_what_it_had_written(path: Path) -> None:
    root = str(Path(__file__).resolve().parents[3])
    command = [sys.executable, "-c", KILLED, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, text=True) as writer:
        assert writer.stdout is not None
        seen = [int(writer.stdout.readline()) for _ in range(30)]
        writer.send_signal(signal.SIGKILL)
    with FeatureCache(path, ROOM) as cache:
        assert held(cache, seen) == seen
        assert cache.warnings == ()


# -------------------------------------------------------------------------------------------- files' digests


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose content was read."""
    read: list[Path] = []
    real = feature_cache._file_digest

    def noted(path: Path) -> bytes | None:
        read.append(path)
        return real(path)

    monkeypatch.setattr(feature_cache, "_file_digest", noted)
    return read


def test_a_file_is_read_once_and_again_when_it_changes(path: Path, tmp_path: Path, hashed: list[Path]) -> None:
    files = [tmp_path / os.fsdecode(name) for name in (b"a", b"b\xff", b"missing", b"pipe")]
    os.mkfifo(files[3])
    for file in files[:2]:
        file.write_bytes(file.name.encode("utf-8", "surrogateescape"))
    expected = [hashlib.sha256(b"a").digest(), hashlib.sha256(b"b\xff").digest(), None, None]
    with FeatureCache(path, ROOM) as cache:
        assert cache.digests(files) == expected
    hashed.clear()
    with FeatureCache(path, ROOM) as cache:
        assert cache.digests(files[:2]) == expected[:2]
        assert hashed == []
        before = files[0].stat()
        files[0].write_bytes(b"A")
        os.utime(files[0], ns=(before.st_atime_ns, before.st_mtime_ns))
        assert cache.digests(files[:2]) == [hashlib.sha256(b"A").digest(), expected[1]]
        assert hashed == [files[0]]


def test_the_memory_for_files_is_bounded(
    path: Path, tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "MAX_FILES", 3)
    files = [tmp_path / str(number) for number in range(5)]
    for file in files:
        file.write_bytes(b"x")
    with FeatureCache(path, ROOM) as cache:
        cache.digests(files)
        hashed.clear()
        cache.digests(files)
    assert hashed == files[:2]


# ------------------------------------------------------------------------------------------------- featurise


class TinyEncoder:
    """Two pooled taps and a spatial one, by arithmetic on the frame; remembers what it was asked for."""

    taps = (Tap("mean", (3,)), Tap("deep", (2,)), Tap("map", (3, 2, 2)))
    input_size = (8, 8)

    def __init__(self, digest: str = "0" * 64, nan_from: int = 256) -> None:
        self.digest = digest
        self.nan_from = nan_from
        self.batches: list[int] = []
        self.asked: list[tuple[str, ...]] = []

    def encode(self, frames: U8, taps: Sequence[str]) -> dict[str, F32]:
        self.batches.append(len(frames))
        self.asked.append(tuple(taps))
        pixels = frames.astype(np.float32).transpose(0, 3, 1, 2)
        pixels[pixels >= self.nan_from] = np.nan
        cells = pixels.reshape(len(frames), 3, 2, 4, 2, 4).mean(axis=(3, 5), dtype=np.float32)
        mean = cells.mean(axis=(2, 3))
        every = {"mean": mean, "deep": mean[:, :2] ** 2 / 7, "map": cells * np.float32(100) / 3}
        return {name: every[name].astype(np.float32) for name in taps}

    @property
    def encoded(self) -> int:
        return sum(self.batches)


def picture(folder: Path, number: int, content: int | None = None) -> Item:
    rng = np.random.default_rng(number if content is None else content)
    place = folder / f"{number}.png"
    Image.fromarray(rng.integers(0, 250, (8, 8, 3), dtype=np.uint8)).save(place)
    return Item(place, f"d/c/{number}.png", 0)


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    folder = tmp_path / "pictures"
    folder.mkdir()
    return [picture(folder, number) for number in range(21)]


@pytest.fixture
def cache(path: Path) -> Iterator[FeatureCache]:
    with FeatureCache(path, ROOM) as opened:
        yield opened
        assert opened.warnings == ()


ALL = ("map", "deep", "mean")


def same(one: Mapping[str, F32], other: Mapping[str, F32]) -> bool:
    return list(one) == list(other) and all(np.array_equal(one[name], other[name]) for name in one)


def test_features_are_the_encoders_in_item_order_with_or_without_a_cache(
    items: list[Item], cache: FeatureCache
) -> None:
    encoder = TinyEncoder()
    frames = np.stack([decode(item.path, (8, 8)) for item in items[::-1]])
    direct = TinyEncoder().encode(frames, ALL)
    bare = featurise(items[::-1], encoder, ALL)
    assert list(bare) == list(ALL) and all(bare[name].dtype == np.float32 for name in ALL)
    assert np.array_equal(bare["mean"], direct["mean"]) and np.array_equal(bare["deep"], direct["deep"])
    assert np.array_equal(bare["map"], direct["map"].astype(np.float16).astype(np.float32))
    assert not np.array_equal(bare["map"], direct["map"])
    cold = featurise(items[::-1], encoder, ALL, cache=cache, workers=3)
    warm = featurise(items[::-1], encoder, ALL, cache=cache)
    assert same(bare, cold) and same(bare, warm)
    assert max(encoder.batches) == 8


def test_only_what_the_cache_lacks_is_encoded(items: list[Item], cache: FeatureCache) -> None:
    encoder = TinyEncoder()
    featurise(items[::2], encoder, ALL, cache=cache)
    assert encoder.encoded == 11
    everything = featurise(items, encoder, ALL, cache=cache)
    assert encoder.encoded == 21
    assert same(everything, featurise(items, TinyEncoder(), ALL))


def test_one_pooled_tap_brings_all_and_no_spatial_one(items: list[Item], cache: FeatureCache) -> None:
    encoder = TinyEncoder()
    first = featurise(items, encoder, ["deep"], cache=cache)
    assert list(first) == ["deep"]
    assert set(encoder.asked) == {("mean", "deep")}
    featurise(items, encoder, ["mean"], cache=cache)
    assert encoder.encoded == 21
    featurise(items, encoder, ["map"], cache=cache)
    assert encoder.encoded == 42 and encoder.asked[-1] == ("map",)


def test_view_and_encoder_have_their_own_features(items: list[Item], cache: FeatureCache) -> None:
    encoder = TinyEncoder()
    plain = featurise(items, encoder, ["map"], cache=cache)
    flipped = featurise(items, encoder, ["map"], view="flip", cache=cache)
    assert np.array_equal(flipped["map"], plain["map"][..., ::-1])
    crop = featurise(items[:1], encoder, ["mean"], view="crop3", cache=cache)
    frame = view(decode(items[0].path, (8, 8)), "crop3")
    assert np.array_equal(crop["mean"], TinyEncoder().encode(frame[None], ["mean"])["mean"])
    other = TinyEncoder(digest="1" * 64)
    featurise(items, other, ["map"], cache=cache)
    assert other.encoded == 21


def test_content_counts_and_not_the_name(items: list[Item], cache: FeatureCache) -> None:
    encoder = TinyEncoder()
    before = featurise(items, encoder, ["mean"], cache=cache)
    moved = items[0].path.rename(items[0].path.with_name("moved.png"))
    after = featurise([Item(moved, "d/c/moved.png", 0)], encoder, ["mean"], cache=cache)
    assert encoder.encoded == 21 and np.array_equal(after["mean"], before["mean"][:1])
    changed = picture(items[1].path.parent, 1, content=77)
    fresh = featurise([changed], encoder, ["mean"], cache=cache)
    assert encoder.encoded == 22 and not np.array_equal(fresh["mean"], before["mean"][1:2])


def test_progress_rises_from_what_was_cached_to_the_total(items: list[Item], cache: FeatureCache) -> None:
    encoder = TinyEncoder()
    featurise(items[:5], encoder, ["mean"], cache=cache)
    calls: list[tuple[str, int, int]] = []
    featurise(items, encoder, ["mean"], cache=cache, on_progress=lambda *call: calls.append(call))
    assert calls == [("features", n, 21) for n in (5, 13, 21)]


def break_some(items: list[Item]) -> list[Path]:
    broken = [items[place].path for place in (3, 4, 20)]
    for place in broken:
        place.write_bytes(b"broken")
    return broken


def test_bad_files_are_reported_together_after_the_good_ones_are_cached(items: list[Item], cache: FeatureCache) -> None:
    broken, encoder = break_some(items), TinyEncoder()
    with pytest.raises(UndecodableInput) as caught:
        featurise(items, encoder, ["mean"], cache=cache)
    assert caught.value.paths == tuple(broken)
    assert encoder.encoded == 18
    with pytest.raises(UndecodableInput):
        featurise(items, encoder, ["mean"], cache=cache)
    assert encoder.encoded == 18


def test_bad_files_can_be_skipped(items: list[Item], cache: FeatureCache) -> None:
    broken = break_some(items)
    result = featurise_items(items, TinyEncoder(), ["mean"], cache=cache, on_bad="skip")
    good = [item for item in items if item.path not in broken]
    assert result.items == tuple(good)
    assert [error.paths[0] for error in result.bad] == broken
    assert same(result.features, featurise(good, TinyEncoder(), ["mean"]))


def test_nothing_but_bad_files_gives_empty_arrays_when_skipped(items: list[Item]) -> None:
    break_some(items)
    encoder = TinyEncoder()
    result = featurise_items(items[3:5], encoder, ALL, on_bad="skip")
    assert result.features["map"].shape == (0, 3, 2, 2) and encoder.batches == []


def test_no_items_give_empty_arrays(cache: FeatureCache) -> None:
    assert featurise([], TinyEncoder(), ALL, cache=cache)["map"].shape == (0, 3, 2, 2)


def test_nan_features_are_refused_with_the_file_and_never_cached(items: list[Item], cache: FeatureCache) -> None:
    with pytest.raises(DataError, match=r"\.png: the encoder gave NaN"):
        featurise(items, TinyEncoder(nan_from=200), ["mean"], cache=cache)
    assert cache.total_bytes == 0


class LoudEncoder(TinyEncoder):
    def encode(self, frames: U8, taps: Sequence[str]) -> dict[str, F32]:
        return {name: value * np.float32(1e4) for name, value in super().encode(frames, taps).items()}


def test_values_beyond_float16_are_clipped_and_finite(items: list[Item], cache: FeatureCache) -> None:
    features = featurise(items, LoudEncoder(), ["map"], cache=cache)
    assert features["map"].max() == np.finfo(np.float16).max
    assert same(features, featurise(items, LoudEncoder(), ["map"], cache=cache))


def test_an_interruption_loses_little(tmp_path: Path, cache: FeatureCache) -> None:
    many = [picture(tmp_path, number) for number in range(2 * WRITE_ROWS)]

    def interrupt(_: str, done: int, total: int) -> None:
        if done >= WRITE_ROWS:
            raise KeyboardInterrupt

    encoder = TinyEncoder()
    with pytest.raises(KeyboardInterrupt):
        featurise(many, encoder, ["mean"], cache=cache, on_progress=interrupt)
    again = TinyEncoder()
    featurise(many, again, ["mean"], cache=cache)
    assert again.encoded <= WRITE_ROWS


@pytest.mark.parametrize("taps", [[], ["mean", "absent"]])
def test_unknown_or_no_taps_are_refused(items: list[Item], taps: list[str]) -> None:
    with pytest.raises(UsageError, match="mean, deep, map"):
        featurise(items, TinyEncoder(), taps)


def test_unknown_views_and_no_workers_are_refused_before_any_work(items: list[Item]) -> None:
    encoder = TinyEncoder()
    with pytest.raises(UsageError, match="view"):
        featurise(items, encoder, ["mean"], view="upside-down")
    with pytest.raises(UsageError, match="workers"):
        featurise(items, encoder, ["mean"], workers=0)
    assert encoder.batches == []
