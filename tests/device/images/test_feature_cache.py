"""The feature cache and `featurise`: right or absent, bounded, and never in the way."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from device.files import TEMPORARY
from device.images.dataset import Item
from device.images.decode import UndecodableInput, decode
from device.images.feature_cache import FeatureCache, FeatureKey
from device.images.featurise import BATCH, featurise, featurise_items
from device.images.views import view
from edgeear.errors import DataError, UsageError
from edgeear.types import F32, U8, Tap

ROOM = 1 << 30


def key(number: int, encoder: str = "e", view: str = "plain", taps: tuple[str, ...] = ("t",)) -> FeatureKey:
    return FeatureKey(hashlib.sha256(b"%d" % number).digest(), encoder, view, taps)


def row(number: int, length: int = 50) -> NDArray[np.float32]:
    return np.random.default_rng(number).normal(size=length).astype(np.float32)


def put(cache: FeatureCache, numbers: Sequence[int], length: int = 50) -> None:
    for number in numbers:
        cache.put(key(number), row(number, length))


def held(cache: FeatureCache, numbers: Sequence[int], length: int = 50) -> list[int]:
    """Which of `numbers` the cache has, after checking that every row is the one that was put."""
    found = [cache.get(key(number)) for number in numbers]
    for number, array in zip(numbers, found, strict=True):
        assert array is None or np.array_equal(array, row(number, length))
    return [number for number, array in zip(numbers, found, strict=True) if array is not None]


def file_of(cache: FeatureCache, number: int) -> Path:
    return cache.folder / key(number).file_name


def age(cache: FeatureCache, numbers: Sequence[int]) -> None:
    """Make the files of `numbers` old, the first of them the oldest."""
    for place, number in enumerate(numbers):
        os.utime(file_of(cache, number), ns=(0, 1000 + place))


def total_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir()) if folder.exists() else 0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "features"


# ------------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("shape", [(7,), (3, 2, 2), (0,)])
def test_a_row_comes_back_bit_for_bit_after_reopening(path: Path, dtype: Any, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).normal(size=shape).astype(dtype)
    FeatureCache(path, ROOM).put(key(1), np.asfortranarray(array))
    cache = FeatureCache(path, ROOM)
    absent, found = cache.get(key(2)), cache.get(key(1))
    assert absent is None and found is not None
    assert found.dtype == dtype and found.shape == shape and np.array_equal(found, array)


@pytest.mark.parametrize(
    "other",
    [
        key(2),
        key(1, encoder="f"),
        key(1, view="flip"),
        key(1, taps=("u",)),
        key(1, taps=("t", "u")),
        key(1, encoder="e', 'plain", view="t", taps=()),
    ],
)
def test_content_encoder_view_and_taps_all_count(path: Path, other: FeatureKey) -> None:
    cache = FeatureCache(path, ROOM)
    put(cache, [1])
    assert cache.get(other) is None
    cache.put(other, row(7))
    assert held(cache, [1]) == [1]


def test_putting_again_replaces(path: Path) -> None:
    cache = FeatureCache(path, ROOM)
    cache.put(key(1), row(9, 500))
    put(cache, [1, 1])
    assert held(cache, [1]) == [1]
    assert len(list(path.iterdir())) == 1


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (np.array([1, np.nan], np.float32), DataError),
        (np.array([1, np.inf], np.float16), DataError),
        (np.array([1.0], np.float64), UsageError),
        (np.array([1], np.int32), UsageError),
    ],
)
def test_what_is_no_feature_is_refused_and_not_stored(path: Path, bad: Any, error: type[Exception]) -> None:
    cache = FeatureCache(path, ROOM)
    with pytest.raises(error):
        cache.put(key(2), bad)
    assert cache.get(key(2)) is None and not path.exists()


# ----------------------------------------------------------------------------------------------------- bound


@pytest.fixture
def cost(tmp_path: Path) -> int:
    """Bytes of the file of one row."""
    put(FeatureCache(tmp_path / "one", ROOM), [0])
    return total_bytes(tmp_path / "one")


def test_the_bound_holds_and_the_oldest_go_first(path: Path, cost: int) -> None:
    cache = FeatureCache(path, 20 * cost)
    for number in range(50):
        put(cache, [number])
        age(cache, held(cache, range(50)))
        assert total_bytes(path) <= 20 * cost
    left = held(cache, range(50))
    assert left == list(range(50 - len(left), 50))
    assert len(left) >= 18


def test_a_row_that_was_read_outlives_one_that_was_not(path: Path, cost: int) -> None:
    put(FeatureCache(path, ROOM), range(10))
    cache = FeatureCache(path, ROOM)
    age(cache, range(10))
    assert held(cache, [0, 1]) == [0, 1]
    again = FeatureCache(path, 8 * cost)
    assert held(again, range(10)) == [0, 1, 5, 6, 7, 8, 9]


def test_a_lower_bound_at_the_next_run_gives_the_disk_its_room_back(path: Path) -> None:
    cache = FeatureCache(path, ROOM)
    put(cache, range(200), 5000)
    age(cache, range(200))
    full = total_bytes(path)
    again = FeatureCache(path, full // 10)
    assert 0 < total_bytes(path) <= full // 10
    assert held(again, range(199, 200), 5000) == [199]


def test_a_row_too_large_for_the_bound_is_not_kept(path: Path) -> None:
    cache = FeatureCache(path, 100)
    put(cache, [1])
    assert total_bytes(path) == 0 and cache.warnings == []


def test_only_the_caches_own_files_are_deleted_and_what_a_killed_writer_left_among_them(path: Path) -> None:
    path.mkdir(parents=True)
    others = [path / "model.safetensors", path / "notes.txt"]
    for file in [*others, path / f"{TEMPORARY}abc"]:
        file.write_bytes(b"x" * 5000)
    put(FeatureCache(path, ROOM), [1])
    FeatureCache(path, 1)
    assert sorted(path.iterdir()) == others


@pytest.mark.parametrize("bound", [0, -5])
def test_a_bound_without_room_is_refused(path: Path, bound: int) -> None:
    with pytest.raises(UsageError, match="max_bytes"):
        FeatureCache(path, bound)


# ---------------------------------------------------------------------------------------------------- damage


def test_wherever_a_file_is_damaged_its_row_is_absent_and_the_next_one_put_is_right(path: Path) -> None:
    cache, rng = FeatureCache(path, ROOM), np.random.default_rng(0)
    put(cache, [1])
    file = file_of(cache, 1)
    whole = file.read_bytes()
    for trial in range(300):
        broken = bytearray(whole)
        for place in rng.integers(len(whole), size=1 if trial % 3 else 20):
            broken[int(place)] ^= int(rng.integers(1, 256))
        file.write_bytes(broken[: rng.integers(len(broken))] if trial % 5 == 4 else broken)
        held(cache, [1])
    for place in range(len(whole) - row(1).nbytes, len(whole)):
        broken = bytearray(whole)
        broken[place] ^= 1
        file.write_bytes(broken)
        assert held(cache, [1]) == []
    put(cache, [1])
    assert held(cache, [1]) == [1] and cache.warnings == []


@pytest.mark.parametrize("content", [b"", b"no such file format" * 99, b"\0" * 9000, b"\xff" * 9000])
def test_a_file_that_is_no_row_counts_as_missing(path: Path, content: bytes) -> None:
    cache = FeatureCache(path, ROOM)
    put(cache, [1])
    file_of(cache, 1).write_bytes(content)
    assert held(cache, [1]) == []


def test_an_intact_row_under_the_wrong_name_counts_as_missing(path: Path) -> None:
    cache = FeatureCache(path, ROOM)
    put(cache, [1, 2, 3])
    file_of(cache, 2).write_bytes(file_of(cache, 1).read_bytes())
    assert held(cache, [1, 2, 3]) == [1, 3]


def test_a_full_disk_ends_the_writing_and_not_the_reading(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FeatureCache(path, ROOM)
    put(cache, [1])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        put(cache, [2])
    put(cache, [3])
    assert held(cache, [1, 2, 3]) == [1]
    assert len(cache.warnings) == 1 and "No space left" in cache.warnings[0] and str(path) in cache.warnings[0]
    assert len(list(path.iterdir())) == 1


def test_a_place_that_cannot_hold_a_folder_costs_the_cache_and_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "features"):
        cache = FeatureCache(place, ROOM)
        put(cache, [1, 2])
        assert held(cache, [1, 2]) == []
        assert len(cache.warnings) == 1 and str(place) in cache.warnings[0]


# ------------------------------------------------------------------------------------------------- processes


def put_and_read(place: str, start: int) -> tuple[list[int], list[str]]:
    """One of several processes: writes its own rows and reads everybody's."""
    cache = FeatureCache(Path(place), ROOM)
    for number in range(start, start + 40):
        put(cache, [number])
        held(cache, range(120))
    return held(cache, range(start, start + 40)), cache.warnings


def test_processes_share_a_cache(path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        results = pool.starmap(put_and_read, [(str(path), start) for start in (0, 40, 80)])
    assert results == [(list(range(start, start + 40)), []) for start in (0, 40, 80)]
    assert held(FeatureCache(path, ROOM), range(120)) == list(range(120))


def evict_all(place: str, bound: int) -> list[str]:
    """One of several processes: writes rows into a folder that holds few of them."""
    cache = FeatureCache(Path(place), bound)
    for number in range(100):
        put(cache, [number % 50])
        held(cache, range(50))
    return cache.warnings


def test_processes_that_delete_each_others_files_give_no_warning(path: Path, cost: int) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.starmap(evict_all, [(str(path), 20 * cost)] * 2) == [[], []]
    assert total_bytes(path) <= 24 * cost


KILLED = """
import sys
from pathlib import Path
from tests.device.images.test_feature_cache import FeatureCache, ROOM, put
cache = FeatureCache(Path(sys.argv[1]), ROOM)
for number in range(100000):
    put(cache, [number])
    print(number, flush=True)
"""


def test_a_killed_writer_leaves_what_it_had_written(path: Path) -> None:
    root = str(Path(__file__).resolve().parents[3])
    command = [sys.executable, "-c", KILLED, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, text=True) as writer:
        assert writer.stdout is not None
        seen = [int(writer.stdout.readline()) for _ in range(30)]
        writer.send_signal(signal.SIGKILL)
    cache = FeatureCache(path, ROOM)
    assert held(cache, seen) == seen
    assert cache.warnings == []


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
    opened = FeatureCache(path, ROOM)
    yield opened
    assert opened.warnings == []


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
    assert total_bytes(cache.folder) == 0


class LoudEncoder(TinyEncoder):
    def encode(self, frames: U8, taps: Sequence[str]) -> dict[str, F32]:
        return {name: value * np.float32(1e4) for name, value in super().encode(frames, taps).items()}


def test_values_beyond_float16_are_clipped_and_finite(items: list[Item], cache: FeatureCache) -> None:
    features = featurise(items, LoudEncoder(), ["map"], cache=cache)
    assert features["map"].max() == np.finfo(np.float16).max
    assert same(features, featurise(items, LoudEncoder(), ["map"], cache=cache))


def test_an_interruption_loses_little(tmp_path: Path, cache: FeatureCache) -> None:
    many = [picture(tmp_path, number) for number in range(16 * BATCH)]

    def interrupt(_: str, done: int, total: int) -> None:
        if done >= 8 * BATCH:
            raise KeyboardInterrupt

    encoder = TinyEncoder()
    with pytest.raises(KeyboardInterrupt):
        featurise(many, encoder, ["mean"], cache=cache, on_progress=interrupt)
    again = TinyEncoder()
    featurise(many, again, ["mean"], cache=cache)
    assert again.encoded == 8 * BATCH


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
