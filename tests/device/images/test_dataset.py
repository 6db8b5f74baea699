"""Folder data sets: what is listed and how it is split."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.images.dataset import Item, is_test, read_folder, shots, split
from device.images.decode import UndecodableInput, decode
from edgeear.errors import DataError, UsageError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def numbered(place: str, count: int, suffix: str = "png") -> list[str]:
    return [f"{place}/{number}.{suffix}" for number in range(count)]


# --------------------------------------------------------------------------------------------------- reading


def test_domains_and_classes_are_sorted_and_items_carry_relative_path_and_label(tmp_path: Path) -> None:
    touch(tmp_path, "b/dog/2.png", "b/dog/1.JPG", "b/cat/1.wav", "b/cat/2.npy", "a/emu/1.jpeg", "a/emu/2.png")
    data = read_folder(tmp_path)
    assert data.domains == ("a", "b")
    assert data.classes == ("cat", "dog", "emu")
    assert [(item.relative, item.label) for item in data.items["b"]] == [
        ("b/cat/1.wav", 0),
        ("b/cat/2.npy", 0),
        ("b/dog/1.JPG", 1),
        ("b/dog/2.png", 1),
    ]
    assert [item.path for item in data.items["a"]] == [tmp_path / "a/emu/1.jpeg", tmp_path / "a/emu/2.png"]


def test_given_domains_keep_their_order_and_bound_the_classes(tmp_path: Path) -> None:
    touch(tmp_path, *numbered("a/x", 2), *numbered("b/y", 2), *numbered("c/z", 2))
    data = read_folder(tmp_path, ["c", "a"])
    assert data.domains == ("c", "a")
    assert list(data.items) == ["c", "a"]
    assert data.classes == ("x", "z")


def test_a_clean_folder_gives_no_warning(tmp_path: Path) -> None:
    touch(tmp_path, *numbered("a/x", 2), *numbered("b/x", 2), "README.txt", "a/notes.txt")
    assert read_folder(tmp_path).warnings == ()


def test_hidden_names_are_passed_over_in_silence(tmp_path: Path) -> None:
    touch(tmp_path, *numbered("a/x", 2), "a/x/._0.png", "a/.cache/1.png", ".git/x/1.png", "a/x/.DS_Store")
    data = read_folder(tmp_path)
    assert data.domains == ("a",) and data.classes == ("x",)
    assert [item.path.name for item in data.items["a"]] == ["0.png", "1.png"]
    assert data.warnings == ()


def test_what_is_ignored_is_named(tmp_path: Path) -> None:
    touch(tmp_path, *numbered("a/x", 2), "a/x/movie.mp4", "a/x/deeper/1.png", "a/loose.png")
    os.mkfifo(tmp_path / "a/x/pipe.png")
    (tmp_path / "a/x/gone.png").symlink_to("nowhere.png")
    data = read_folder(tmp_path)
    assert len(data.items["a"]) == 2
    text = "\n".join(data.warnings)
    for name in ("movie.mp4", "deeper", "loose.png", "pipe.png", "gone.png"):
        assert name in text
    assert f"{tmp_path / 'a/x'}: 1 ignored (nested folders): deeper" in data.warnings


def test_a_class_in_the_place_of_a_domain_is_told_from_an_empty_one(tmp_path: Path) -> None:
    touch(tmp_path, *numbered("photo/dog", 2))
    (tmp_path / "photo/empty").mkdir()
    for name, complaint in (("dog", "dog holds pictures, not CLASS/ folders"), ("empty", "empty is empty: add CLASS/")):
        with pytest.raises(DataError, match=complaint):
            read_folder(tmp_path / "photo", (name,))


def test_small_and_absent_classes_are_warned_about(tmp_path: Path) -> None:
    touch(tmp_path, *numbered("a/x", 2), *numbered("a/y", 1), *numbered("b/x", 2))
    (tmp_path / "b/y").mkdir()
    data = read_folder(tmp_path)
    assert data.classes == ("x", "y")
    assert any("a" in text and "one image" in text and text.endswith("y") for text in data.warnings)
    assert any("b has no image of 1 classes: y" in text for text in data.warnings)
    assert any("class folders without an image" in text for text in data.warnings)


def test_a_class_that_is_empty_everywhere_is_no_class(tmp_path: Path) -> None:
    touch(tmp_path, *numbered("a/x", 2))
    (tmp_path / "a/void").mkdir()
    assert read_folder(tmp_path).classes == ("x",)


def test_an_empty_domain_is_an_error_only_if_asked_for(tmp_path: Path) -> None:
    touch(tmp_path, *numbered("a/x", 2))
    (tmp_path / "empty/x").mkdir(parents=True)
    data = read_folder(tmp_path)
    assert data.domains == ("a",)
    assert any("empty" in text for text in data.warnings)
    with pytest.raises(DataError, match="empty"):
        read_folder(tmp_path, ["a", "empty"])


def test_a_missing_domain_is_refused_and_the_present_ones_named(tmp_path: Path) -> None:
    touch(tmp_path, *numbered("photo/x", 2))
    with pytest.raises(DataError, match=r"no domain fhoto: it has photo"):
        read_folder(tmp_path, ["fhoto"])
    with pytest.raises(DataError, match="no domain"):
        read_folder(tmp_path, ["../" + tmp_path.name + "/photo"])


@pytest.mark.parametrize("domains", [[], ["a", "b", "a"]])
def test_an_empty_or_repeating_order_is_a_mistake_of_the_caller(tmp_path: Path, domains: list[str]) -> None:
    touch(tmp_path, *numbered("a/x", 2), *numbered("b/x", 2))
    with pytest.raises(UsageError):
        read_folder(tmp_path, domains)


def test_no_folder_and_no_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a folder"):
        read_folder(tmp_path / "nowhere")
    touch(tmp_path, "file")
    with pytest.raises(DataError, match="not a folder"):
        read_folder(tmp_path / "file")
    with pytest.raises(DataError, match="DOMAIN/CLASS"):
        read_folder(tmp_path)


@pytest.mark.parametrize("places", [("a/{}", "b/{}"), ("{}/x", "{}/x")])
def test_names_that_look_the_same_are_refused(tmp_path: Path, places: tuple[str, str]) -> None:
    forms = unicodedata.normalize("NFC", "caf\u00e9"), unicodedata.normalize("NFD", "caf\u00e9")
    for place, form in zip(places, forms, strict=True):
        touch(tmp_path, *numbered(place.format(form), 2))
    with pytest.raises(DataError, match="Unicode"):
        read_folder(tmp_path)


@pytest.mark.parametrize("place", [b"a\xff/x", b"a/x\xff"])
def test_folders_whose_names_are_not_text_are_refused(tmp_path: Path, place: bytes) -> None:
    touch(tmp_path, *numbered(os.fsdecode(place), 2))
    with pytest.raises(DataError, match=r"not UTF-8: [ax]\\udcff: rename"):
        read_folder(tmp_path)


def test_a_warning_about_a_file_whose_name_is_not_text_can_be_printed(tmp_path: Path) -> None:
    touch(tmp_path, *numbered("a/x", 2), os.fsdecode(b"a/x/\xff.txt"))
    (warning,) = read_folder(tmp_path).warnings
    assert "\\udcff.txt" in warning.encode().decode()


def test_classes_that_differ_in_case_stay_apart_with_a_warning(tmp_path: Path) -> None:
    touch(tmp_path, *numbered("a/Dog", 2), *numbered("a/dog", 2), *numbered("a/cat", 2))
    data = read_folder(tmp_path)
    assert data.classes == ("Dog", "cat", "dog")
    assert [text for text in data.warnings if "upper and lower case" in text and text.endswith("Dog, dog")]


# ------------------------------------------------------------------------------------------------- splitting


def test_the_split_of_known_paths_never_changes() -> None:
    paths = [f"photo/dog/{number}.jpg" for number in range(12)]
    assert [number for number, path in enumerate(paths) if is_test(path)] == [2, 4, 8, 9]


def test_about_a_fifth_is_tested_and_fractions_nest() -> None:
    paths = [f"d/c/{number}.png" for number in range(5000)]
    tenth, fifth = {p for p in paths if is_test(p, 0.1)}, {p for p in paths if is_test(p)}
    assert 0.18 < len(fifth) / 5000 < 0.22
    assert tenth < fifth
    assert not any(is_test(path, 0.0) for path in paths)


@given(st.text(st.characters(codec="utf-8"), max_size=20))
def test_the_split_does_not_move_with_the_file_systems_unicode_form(name: str) -> None:
    forms = {is_test(unicodedata.normalize(form, name), 0.5) for form in ("NFC", "NFD")}
    assert len(forms) == 1


def test_a_name_that_is_no_utf8_is_split_too(tmp_path: Path) -> None:
    (tmp_path / "a/x").mkdir(parents=True)
    for number in range(2):
        (tmp_path / "a/x" / os.fsdecode(b"\xff%d.png" % number)).write_bytes(b"")
    items = read_folder(tmp_path).items["a"]
    training, test = split(items)
    assert len(items) == 2 and sorted(item.relative for item in training + test) == [i.relative for i in items]


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(UsageError, match="fraction"):
        is_test("a/b/c.png", fraction)


def items_of(counts: dict[int, int]) -> list[Item]:
    names = [(label, f"d/{label}/{number}.png") for label, count in counts.items() for number in range(count)]
    return [Item(Path(name), name, label) for label, name in names]


def test_split_is_a_partition_by_path_whatever_the_order() -> None:
    items = items_of({0: 100, 1: 60})
    training, test = split(items)
    assert sorted(i.relative for i in training + test) == sorted(i.relative for i in items)
    assert all(is_test(item.relative) for item in test) and test
    backwards = split(items[::-1])
    assert (set(backwards[0]), set(backwards[1])) == (set(training), set(test))


@given(st.lists(st.integers(0, 400), min_size=1, max_size=3, unique=True))
def test_every_class_keeps_something_to_train_on(numbers: list[int]) -> None:
    items = [Item(Path(), f"d/c/{number}.png", 0) for number in numbers]
    training, test = split(items, 0.9)
    assert training
    assert len(training) + len(test) == len(items)


def test_shots_picks_k_of_every_class_and_all_of_a_small_one() -> None:
    picked = shots(items_of({0: 30, 1: 3, 4: 20}), 5, seed=1)
    labels = [item.label for item in picked]
    assert (labels.count(0), labels.count(1), labels.count(4)) == (5, 3, 5)


def test_shots_depend_on_seed_and_own_class_only_and_nest() -> None:
    items = items_of({0: 30, 1: 30})
    five = set(shots(items, 5, seed=1))
    assert five == set(shots(items[::-1], 5, seed=1))
    assert five != set(shots(items, 5, seed=2))
    assert five < set(shots(items, 9, seed=1))
    alone = shots([item for item in items if item.label == 1], 5, seed=1)
    assert set(alone) == {item for item in five if item.label == 1}


def test_classes_do_not_share_their_shots_places() -> None:
    picked = shots(items_of({0: 30, 1: 30}), 10, seed=1)
    names = [{item.path.name for item in picked if item.label == label} for label in (0, 1)]
    assert names[0] != names[1]


@pytest.mark.parametrize(("k", "seed"), [(0, 0), (-1, 0), (1, -1)])
def test_impossible_shots_are_refused(k: int, seed: int) -> None:
    with pytest.raises(UsageError, match="shots"):
        shots(items_of({0: 3}), k, seed)


# ------------------------------------------------------------------------------------- what the outside holds


def test_links_that_lead_nowhere_or_to_themselves_are_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, *numbered("a/x", 3))
    (tmp_path / "old").symlink_to("old")
    (tmp_path / "gone").symlink_to("/nowhere/at/all")
    (tmp_path / "a" / "loop").symlink_to("loop")
    (tmp_path / "a" / "x" / "me.png").symlink_to("me.png")
    (tmp_path / "a" / "x" / "gone.png").symlink_to("/nowhere.png")
    (tmp_path / "a" / "up").symlink_to("..")
    data = read_folder(tmp_path)
    assert data.domains == ("a",) and len(data.items["a"]) == 3
    assert any("gone.png, me.png" in warning for warning in data.warnings)


@pytest.mark.parametrize("name", ["lost+found", "System Volume Information", "$RECYCLE.BIN", "@eaDir", "__MACOSX"])
def test_folders_that_systems_make_are_passed_over(tmp_path: Path, name: str) -> None:
    touch(tmp_path, *numbered("a/x", 3), f"{name}/x/1.png", f"a/{name}/1.png", f"a/x/{name}/1.png")
    data = read_folder(tmp_path)
    assert data.domains == ("a",) and data.classes == ("x",) and data.warnings == ()


def test_a_name_that_is_not_utf8_is_text_from_here_on(tmp_path: Path) -> None:
    touch(tmp_path, *numbered("a/x", 3))
    odd = os.fsdecode(os.fsencode(tmp_path / "a" / "x") + b"/Mu\xf1oz.png")
    Path(odd).write_bytes(b"broken")
    data = read_folder(tmp_path)
    (item,) = (item for item in data.items["a"] if "oz" in item.relative)
    assert item.relative == "a/x/Mu\\udcf1oz.png" and item.path == Path(odd)
    assert is_test(item.relative) in (True, False)
    with pytest.raises(UndecodableInput) as caught:
        decode(item.path, (8, 8))
    assert "Mu\\udcf1oz.png: " in str(caught.value) and str(caught.value).encode()
    assert caught.value.paths == (Path(odd),)


@pytest.mark.parametrize("make", ["missing", "empty", "flat", "domains"])
def test_a_message_about_a_folder_that_is_not_utf8_can_be_printed(tmp_path: Path, make: str) -> None:
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/Sch\xf6n"))
    if make != "missing":
        root.mkdir()
    if make == "flat":
        touch(root, "x/1.png")
    with pytest.raises(DataError) as caught:
        read_folder(root, ["none"] if make == "domains" else None)
    assert "Sch\\udcf6n" in str(caught.value) and str(caught.value).encode()


@pytest.mark.parametrize("names", [("train", "test"), ("train", "val", "test"), ("Train", "Validation"), ("train",)])
def test_splits_of_one_domain_are_recognised_and_explained(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        touch(tmp_path, *numbered(f"{name}/cat", 3), *numbered(f"{name}/dog", 3))
    with pytest.raises(DataError, match=r"splits of one domain, as torchvision .* DOMAIN/CLASS/ .*--order"):
        read_folder(tmp_path)
    assert read_folder(tmp_path, names).domains == names
    touch(tmp_path, *numbered("night/cat", 3))
    assert "night" in read_folder(tmp_path).domains


def test_classes_that_are_given_as_domains_are_explained(tmp_path: Path) -> None:
    touch(tmp_path, *numbered("cat", 3), *numbered("dog", 3))
    with pytest.raises(
        DataError, match="hold images themselves, as if they were classes; put all of them into one folder"
    ):
        read_folder(tmp_path)
