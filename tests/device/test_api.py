"""The Python interface: every kind of picture gives one answer, nothing known is lost in silence, mistakes are
named."""

from __future__ import annotations

import codecs
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import edgeear
from device.images.decode import decode, fit_image
from edgeear import (
    Changed,
    DataError,
    Ear,
    FormatError,
    KnownDomain,
    Learned,
    Prediction,
    Recognised,
    Rejected,
    Shift,
    UsageError,
)
from edgeear.system import Live
from edgeear.types import U8
from tests.device.simulation.test_simulate import write
from tests.support import fakes
from tests.support.tiny_models import saved, sound

DOMAINS = (("red", 0), ("green", 1), ("blue", 2))
FIRST = fakes.CLASSES[0]


def new_ear() -> Ear:
    return Ear(encoder=fakes.FakeEncoder(), policy=fakes.QUICK)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data"), DOMAINS, 20)


@pytest.fixture(scope="module")
def trained(data: Path) -> Ear:
    """Knows red and green. Tests must not change it: `copy_of` gives one that they may."""
    ear = new_ear()
    assert isinstance(ear.learn(data / "red"), Learned)
    assert isinstance(ear.learn(data / "green"), Learned)
    return ear


def copy_of(ear: Ear) -> Ear:
    other = new_ear()
    other._live = ear._live
    return other


def shown(background: int, n: int, seed: int = 3) -> tuple[list[U8], list[str]]:
    """Fresh frames of a domain and their labels."""
    labels = fakes.labels_of(n)
    return list(fakes.frames(background, fakes.CLASSES, labels, seed)), [fakes.CLASSES[k] for k in labels]


# --------------------------------------------------------------------------------------------------- the package


def test_the_public_names_are_there_and_no_others_are_promised() -> None:
    assert {name for name in edgeear.__all__ if not hasattr(edgeear, name)} == set()
    assert set(edgeear.__all__) <= set(dir(edgeear))
    assert edgeear.Ear is Ear and edgeear.Prediction is Prediction
    with pytest.raises(AttributeError, match="no attribute 'Store'"):
        _ = edgeear.Store  # type: ignore[attr-defined]


# ----------------------------------------------------------------------------------------------- kinds of pictures


def pixels(path: Path) -> U8:
    return np.asarray(Image.open(path))


def with_alpha(path: Path) -> U8:
    return np.dstack([pixels(path), np.full(pixels(path).shape[:2], 255, np.uint8)])


KINDS: dict[str, Callable[[Path], Any]] = {
    "path": lambda path: path,
    "name": str,
    "bytes": Path.read_bytes,
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "open file": lambda path: path.open("rb"),
    "file in memory": lambda path: io.BytesIO(path.read_bytes()),
    "Pillow": Image.open,
    "Pillow, loaded": lambda path: Image.open(path).convert("RGB"),
    "uint8": pixels,
    "float32": lambda path: pixels(path).astype(np.float32) / np.float32(255),
    "float64": lambda path: pixels(path) / 255,
    "uint16": lambda path: pixels(path).astype(np.uint16) * 257,
    "RGBA": with_alpha,
    "not contiguous": lambda path: np.asfortranarray(pixels(path)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_picture_gives_one_answer(kind: str, trained: Ear, tmp_path: Path) -> None:
    large = tmp_path / "large.png"  # not of the encoder's size: it is resized and cropped
    Image.fromarray(shown(0, 1)[0][0]).resize((50, 40), Image.Resampling.BICUBIC).save(large)
    given = KINDS[kind](large)
    expected, found = trained.predict(large), trained.predict(given)
    if kind == "open file":
        given.close()
    assert found.scores.tobytes() == expected.scores.tobytes() and str(found) == str(expected)
    frame = decode(large, trained.encoder.input_size)
    assert trained.predict(frame).scores.tobytes() == expected.scores.tobytes(), "not what training sees"


def test_grey_pictures_answer_like_their_files(trained: Ear, tmp_path: Path) -> None:
    grey = np.asarray(Image.fromarray(shown(0, 1)[0][0]).convert("L").resize((30, 30)))
    path = tmp_path / "grey.png"
    Image.fromarray(grey).save(path)
    expected = trained.predict(path).scores.tobytes()
    assert trained.predict(grey).scores.tobytes() == expected
    assert trained.predict(Image.fromarray(grey)).scores.tobytes() == expected
    assert trained.predict(np.stack([grey] * 3, axis=2)).scores.tobytes() == expected


def test_exif_orientation_is_obeyed_for_files_bytes_and_pillow(trained: Ear, tmp_path: Path) -> None:
    path, exif = tmp_path / "turned.jpg", Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)).save(path, exif=exif, quality=95)
    upright = decode(path, trained.encoder.input_size)
    assert not np.array_equal(upright, trained_size(np.asarray(Image.open(path)), trained))
    for given in (path, path.read_bytes(), Image.open(path)):
        assert trained.predict(given).scores.tobytes() == trained.predict(upright).scores.tobytes()


def trained_size(array: U8, ear: Ear) -> U8:
    return np.asarray(Image.fromarray(array).resize(ear.encoder.input_size))


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (np.zeros((4, 8, 8, 3), np.uint8), r"uint8 \(4, 8, 8, 3\).*list\(array\)"),
        (np.zeros((3, 8, 8), np.uint8), r"uint8 \(3, 8, 8\).*transpose\(1, 2, 0\)"),
        (np.zeros((8, 8, 2), np.uint8), r"\(8, 8, 2\).*give \(H, W\)"),
        (np.zeros(8, np.uint8), r"\(8,\).*give \(H, W\)"),
        (np.zeros((0, 8), np.uint8), r"\(0, 8\).*give \(H, W\)"),
        (np.zeros((8, 8, 3), np.int64), r"int64.*uint8 in 0..255 or float32 in 0..1"),
        (np.full((8, 8, 3), 200, np.float32), r"float32 \(8, 8, 3\).*values 200 to 200.*0..1"),
        (np.full((8, 8), -0.1), r"values -0.1 to -0.1"),
        (np.full((8, 8), np.nan), r"values nan to nan"),
        (b"no picture", r"bytes.*broken content"),
        (b"", r"the file is empty"),
        (".", r"a folder; give its files; `evaluate` and `learn` take folders"),
        ("/dev/null", r"/dev/null: not a regular file; give the file of a picture"),
        ("nowhere.jpg", r"nowhere.jpg: cannot be read \(No such file or directory\); check its path"),
        (io.StringIO("text"), r"open it in binary mode"),
        (7, r"picture of type int: give a path"),
        ("a\0b.jpg", r"cannot be read \(embedded null"),
        ("\ud800.jpg", r"cannot be read .*check its path"),
        ("a" * 5000 + ".jpg", r"cannot be read .*check its path"),
        ("", r"a folder; give its files"),
        (Image.new("L", (8, 8), 255).convert("I"), r"Pillow image: values 255 to 255 of int32; give uint8"),
        (Image.new("I", (8, 8), -1), r"values -1 to -1"),
        (Image.new("I", (8, 8), 65536), r"values 65536 to 65536"),
        (Image.new("I;16", (8, 8), 200), r"values 200 to 200"),
        (Image.new("F", (8, 8), 200), r"float image with values 200 to 200.*0..1"),
        (np.full((8, 8), 255, np.uint16), r"values 255 to 255 of uint16; give uint8"),
        (None, r"picture of type NoneType"),
    ],
    ids=str,
)
def test_what_is_no_picture_is_refused_by_name(given: Any, complaint: str, trained: Ear) -> None:
    with pytest.raises((DataError, UsageError), match=complaint):
        trained.predict(given)


def test_an_open_file_that_gives_no_picture_is_refused_by_its_own_name(trained: Ear, tmp_path: Path) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"\xff\xd8\xff broken")
    closed, writing, binary = path.open("rb"), (tmp_path / "new.jpg").open("wb"), path.open("rb")
    closed.close()
    cases: list[tuple[Any, str]] = [
        (closed, r"broken.jpg: cannot be read .*closed file"),
        (writing, r"new.jpg: cannot be read .*'rb'"),
        (path.open(), r"binary mode, 'rb'"),
        (codecs.getreader("utf-8")(path.open("rb")), r"binary mode, 'rb'"),
        (binary, r"/broken.jpg: broken content"),
        (b"RIFF1234WEBPVP8 ", r"^bytes: the content is a WebP picture"),
        (b"", r"^bytes: the file is empty"),
    ]
    for given, complaint in cases:
        with pytest.raises((DataError, UsageError), match=complaint):
            trained.predict(given)
        if not isinstance(given, bytes):
            given.close()
    for name in ("", "/", "a\0b", 3, None):
        odd, good = io.BytesIO(b"no picture"), io.BytesIO()
        Image.fromarray(shown(0, 1)[0][0]).save(good, "PNG")
        good.seek(0)
        for file in (odd, good):
            file.name = name
        with pytest.raises(DataError, match=r"broken content"):
            trained.predict(odd)
        assert trained.predict(good).label is not None


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "F"])
def test_every_pillow_mode_gives_its_picture(mode: str, trained: Ear) -> None:
    image = Image.new("RGB", (40, 40), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 20, 40))
    if mode == "F":
        given = Image.fromarray(np.asarray(image.convert("L")).astype(np.float32) / 255)
    elif mode in ("La", "RGBa"):
        given = image.convert(mode.upper()).convert(mode)
    else:
        given = image.convert("LA" if mode == "PA" else mode).convert(mode)
    assert given.mode == mode
    frame = fit_image(given, (40, 40)).astype(int)
    assert np.abs(frame - np.asarray(image)).max() <= 3


def test_a_dark_16_bit_png_is_dark_as_a_file_and_opened(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 255, np.uint16)).save(tmp_path / "dark.png")
    assert decode(tmp_path / "dark.png", (8, 8)).max() == 1
    assert fit_image(Image.open(tmp_path / "dark.png"), (8, 8)).max() == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        *(({"seed": seed}, "seed .*: give a whole number") for seed in ("a", None, 1.5, -1, True, 1 << 63)),
        *(({"encoder": encoder}, "without digest.*an ONNX file") for encoder in (None, 5, b"x", object)),
        ({"policy": "x"}, "policy of type str"),
    ],
    ids=str,
)
def test_what_makes_no_ear_is_refused(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        Ear(**{"encoder": fakes.FakeEncoder(), **arguments})


def test_a_list_gives_a_list_whose_answers_are_those_of_single_images(trained: Ear) -> None:
    frames, _ = shown(0, 20)
    found = trained.predict(frames)
    assert [a.scores.tobytes() for a in found] == [trained.predict(f).scores.tobytes() for f in frames]
    assert trained.predict([]) == []
    assert [a.label for a in trained.infer(tuple(frames[:2]))] == [a.label for a in found[:2]]


def test_bad_pictures_of_a_list_are_all_named(trained: Ear, tmp_path: Path) -> None:
    bad = [tmp_path / f"bad{n}.jpg" for n in range(2)]
    for path in bad:
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"(?s)2 files.*bad0.jpg.*bad1.jpg"):
        trained.predict([bad[0], shown(0, 1)[0][0], bad[1]])


# ------------------------------------------------------------------------------------------------------ answers


def test_an_answer_says_class_probabilities_route_and_verdict(trained: Ear) -> None:
    frames, labels = shown(1, 6)
    for answer, label in zip(trained.predict(frames), labels, strict=True):
        assert (answer.label, answer.route, answer.ood) == (label, "green", False)
        assert next(iter(answer.probabilities)) == label and set(answer.probabilities) == set(fakes.CLASSES)
        assert sum(answer.probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert answer.probabilities[label] > 0.5
        assert str(answer).startswith(f"{label} ") and "domain green" in str(answer)
    foreign = trained.predict(shown(2, 1)[0][0])
    assert foreign.ood and foreign.p <= 0.05 and "out of distribution" in str(foreign)


def test_before_anything_is_learned_there_is_no_answer() -> None:
    answer = new_ear().predict(np.zeros((8, 8), np.uint8))
    assert (answer.label, answer.route, answer.ood, answer.probabilities) == (None, None, True, {})
    assert str(answer).startswith("no answer")


def test_a_head_of_an_older_store_has_probabilities_by_the_default_temperature(trained: Ear) -> None:
    from edgeear.system import TEMPERATURE

    domain = trained.system.domains[0]
    assert domain.temperature == domain.growth["temperature"]
    old = replace(domain, growth={k: v for k, v in domain.growth.items() if k != "temperature"})
    assert old.temperature == TEMPERATURE[domain.head.spec.solved]


# ------------------------------------------------------------------------------------------------------- streams


def test_a_stream_tells_a_shift_once_and_that_a_domain_is_back(trained: Ear) -> None:
    known, _ = shown(0, 60)
    foreign, _ = shown(2, 120, seed=8)
    back, _ = shown(1, 90, seed=9)
    told = list(trained.stream([*known, *foreign, *back]))
    answers = [t for t in told if isinstance(t, Prediction)]
    events = [t for t in told if not isinstance(t, Prediction)]
    assert len(answers) == 270
    assert [type(e) for e in events] == [Shift, Recognised]
    shift, recognised = events
    assert isinstance(shift, Shift) and 60 < shift.at <= 120
    assert isinstance(recognised, Recognised) and recognised.domain == "green"


def test_a_domain_that_is_learned_on_the_way_is_recognised(data: Path, trained: Ear) -> None:
    ear, told = copy_of(trained), []
    for item in ear.stream([*shown(0, 60)[0], *shown(2, 150, seed=8)[0]]):
        told.append(item)
        if isinstance(item, Shift):
            assert isinstance(ear.learn(data / "blue"), Learned)
    events = [t for t in told if not isinstance(t, Prediction)]
    assert [type(e) for e in events] == [Shift, Recognised]
    assert isinstance(events[1], Recognised) and events[1].domain == "blue"


def kinds_of_events(told: Iterable[object]) -> list[type]:
    return [type(t) for t in told if not isinstance(t, Prediction)]


def test_a_stream_that_goes_on_to_another_unknown_domain_after_a_lesson_is_announced(data: Path) -> None:
    ear = new_ear()
    ear.learn(data / "red")

    def camera() -> Iterator[U8]:
        yield from [*shown(0, 40)[0], *shown(1, 4, seed=7)[0]]
        rest = iter(shown(1, 40, seed=8)[0])
        while ear.domains == ("red",):
            yield next(rest)
        yield from shown(2, 60, seed=9)[0]  # before 30 frames of green could be recognised

    shifts = 0
    for item in ear.stream(camera()):
        if isinstance(item, Shift):
            shifts += 1
            if shifts == 1:
                assert isinstance(ear.learn(data / "green"), Learned)
    assert shifts == 2


def test_a_stream_that_stays_away_is_announced_again(trained: Ear, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [*shown(0, 30)[0], *shown(2, 200, seed=8)[0]]
    assert kinds_of_events(trained.stream(frames)) == [Shift]
    monkeypatch.setattr("device.api.SILENCE", 60)
    events = kinds_of_events(trained.stream([*frames, *shown(1, 60, seed=9)[0]]))
    assert events.count(Shift) >= 2 and events[-1] is Recognised


def test_saving_a_known_stream_does_not_lose_the_evidence(trained: Ear, tmp_path: Path) -> None:
    ear, frames = copy_of(trained), [*shown(0, 30)[0], *shown(2, 60, seed=8)[0]]
    plain = [t.at for t in ear.stream(frames) if isinstance(t, Shift)]
    saving = []
    for item in ear.stream(frames):
        if isinstance(item, Shift):
            saving.append(item.at)
        elif not saving:
            ear._live = Live(*[replace(ear.system)] * 2)
    assert saving == plain


# ------------------------------------------------------------------------------------------------------ learning


def test_what_was_learned_is_told(data: Path) -> None:
    ear = new_ear()
    learned = ear.learn(data / "red", name="daylight")
    assert isinstance(learned, Learned)
    assert (learned.name, learned.classes, learned.images) == ("daylight", tuple(sorted(fakes.CLASSES)), 60)
    assert learned.validation_accuracy is not None and learned.validation_accuracy > 0.9 and learned.validated > 0
    assert "daylight: 60 images of 3 classes" in str(learned) and f"n = {learned.validated}" in str(learned)
    assert ear.domains == ("daylight",) and ear.classes == tuple(sorted(fakes.CLASSES))


def test_images_and_labels_are_learned_like_a_folder(data: Path) -> None:
    files = sorted((data / "red").glob("*/*.png"))
    by_folder, by_images = new_ear(), new_ear()
    by_folder.learn(data / "red")
    by_images.learn([Image.open(f) for f in files], [f.parent.name for f in files], name="red")
    frame = shown(0, 1)[0][0]
    assert by_images.predict(frame).scores.tobytes() == by_folder.predict(frame).scores.tobytes()


def test_a_known_domain_is_never_replaced_in_silence(data: Path, trained: Ear) -> None:
    ear, before = copy_of(trained), trained.system
    with pytest.raises(KnownDomain, match=r"'red' is known: call update\('red', ...\).*forget\('red'\).*another name"):
        ear.learn(data / "blue", name="red")
    assert ear.system is before


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"images": [np.zeros((8, 8), np.uint8)] * 6, "labels": ["a"] * 6}, "give name="),
        ({"images": [np.zeros((8, 8), np.uint8)], "labels": ["a", "b"], "name": "x"}, "1 image and 2 labels"),
        ({"images": [], "labels": [], "name": "x"}, "0 images and 0 labels"),
        ({"images": [np.zeros((8, 8), np.uint8)], "labels": [1], "name": "x"}, "labels of type int"),
        ({"images": [np.zeros((8, 8), np.uint8)] * 6, "labels": "abcdef", "name": "x"}, "'abcdef' are one text"),
        ({"images": [np.zeros((8, 8), np.uint8)] * 6, "labels": b"abcdef", "name": "x"}, "are one text"),
        ({"images": [np.zeros((8, 8), np.uint8)], "labels": 5, "name": "x"}, "as lists"),
        ({"images": Image.new("L", (8, 8)), "labels": ["a"], "name": "x"}, "as lists"),
        ({"images": "folder", "labels": ["a"]}, "a folder and labels"),
        ({"images": "nowhere"}, "nowhere"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_unfit_lessons_are_refused(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises((DataError, UsageError), match=complaint):
        new_ear().learn(**arguments)


BAD_NAMES = (5, b"x", ["x"], "\ud800", "\0", "x\ny", " ", "x" * 129, "x" * 3000)


@pytest.mark.parametrize("bad", BAD_NAMES, ids=lambda bad: ascii(bad)[:20])
def test_names_are_checked_before_anything_is_encoded(bad: Any, trained: Ear, monkeypatch: pytest.MonkeyPatch) -> None:
    ear, (frames, labels) = copy_of(trained), shown(2, 30)
    monkeypatch.setattr(ear.encoder, "encode", lambda *_: pytest.fail("was encoded"))
    complaint = "name .*: give 1 to 128 printable characters|labels of type"
    for change in (
        lambda: ear.learn(frames, labels, name=bad),
        lambda: ear.learn(frames, [bad] * 30, name="blue"),
        lambda: ear.learn(frames, [*labels[1:], ""], name="blue"),
        lambda: ear.update("red", frames, [*labels[1:], bad]),
        lambda: ear.merge("red", "green", bad),
    ):
        with pytest.raises(UsageError, match=complaint) as caught:
            change()
        assert len(str(caught.value)) < 200
    assert ear.system is trained.system


def test_any_iterable_of_images_and_labels_is_learned_and_measured(trained: Ear) -> None:
    frames, labels = shown(2, 30)
    for images, said in (
        (np.stack(frames), np.array(labels)),
        ((frame for frame in frames), (label for label in labels)),
        (tuple(frames), dict(enumerate(labels)).values()),
    ):
        learned = copy_of(trained).learn(images, said, name="blue")
        assert isinstance(learned, Learned) and learned.images == 30
        assert {type(label) for label in learned.classes} == {str}
    assert trained.evaluate(np.stack(frames), np.array(labels)).total.images == 30


def test_why_too_few_images_are_left_is_told() -> None:
    with pytest.raises(DataError, match=r"1 labelled samples.*9 images left out: copies of others"):
        new_ear().learn([shown(0, 1)[0][0]] * 10, ["a"] * 10, name="red")


def test_a_folder_of_domains_is_learned_one_by_one(data: Path) -> None:
    with pytest.raises(UsageError, match=r"holds domains \(blue, green, red\): learn each folder by itself"):
        new_ear().learn(data)


def test_copies_are_not_counted_and_are_told(data: Path) -> None:
    frames, labels = shown(0, 30)
    learned = new_ear().learn([*frames, *frames[:4]], [*labels, *labels[:4]], name="red")
    assert isinstance(learned, Learned) and learned.images == 30
    assert any("4 images left out: copies" in w for w in learned.warnings)
    torn = new_ear().learn([*frames, frames[0]], [*labels, "other"], name="red")
    assert isinstance(torn, Learned) and any("under different labels: 1" in w for w in torn.warnings)


def test_one_class_is_learned_with_a_warning_and_one_image_is_refused() -> None:
    frames, _ = shown(0, 12)
    ear = new_ear()
    learned = ear.learn(frames, ["only"] * 12, name="red")
    assert isinstance(learned, Learned) and any("one class only" in w for w in learned.warnings)
    assert ear.predict(frames[0]).probabilities == {"only": 1.0}
    with pytest.raises(DataError, match="at least 5 are needed"):
        new_ear().learn([frames[0]] * 9, ["only"] * 9, name="red")


def test_bad_images_are_left_out_on_request(tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    frames, labels = shown(0, 30)
    with pytest.raises(DataError, match=r"bad.jpg: broken content"):
        new_ear().learn([*frames, tmp_path / "bad.jpg"], [*labels, labels[0]], name="red")
    ear = new_ear()
    learned = ear.learn([tmp_path / "bad.jpg", *frames], [labels[0], *labels], name="red", skip_bad=True)
    assert isinstance(learned, Learned) and learned.images == 30
    assert any(w.startswith("1 image left out: ") and "bad.jpg: broken content" in w for w in learned.warnings)
    assert [a.label for a in ear.predict(frames)] == labels, "labels moved to other images"


def test_below_19_images_nothing_is_out_of_distribution_and_this_is_said() -> None:
    said = "below 19 no image can be called out of distribution"
    for n, warned in ((18, True), (19, False)):
        ear = new_ear()
        learned = ear.learn(*shown(0, n), name="red")
        assert isinstance(learned, Learned) and any(said in w for w in learned.warnings) is warned
        assert ear.predict(shown(2, 1)[0][0]).ood is not warned


def test_small_validation_sets_are_called_so() -> None:
    frames, labels = shown(0, 12)
    learned = new_ear().learn(frames, labels, name="red")
    assert isinstance(learned, Learned) and learned.validated < 30
    assert any("fewer than 30: the accuracy is a rough figure" in w for w in learned.warnings)


def test_progress_is_reported_to_a_function_and_silent_in_a_pipe(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[str, int, int]] = []
    new_ear().learn(data / "red", progress=lambda *step: seen.append(step))
    assert {"encode", "search", "train", "memory"} <= {phase for phase, _, _ in seen}
    assert ("encode", 60, 60) in seen
    assert capsys.readouterr() == ("", "")
    new_ear().learn(data / "red")
    assert capsys.readouterr() == ("", "")
    new_ear().learn(data / "red", progress=True)
    out, error = capsys.readouterr()
    assert out == "" and "encode: 0 of 60" in error and len(error.splitlines()) < 20


# ------------------------------------------------------------------------------------------------------- changes


def test_update_adds_exact_sums_and_keeps_old_answers(trained: Ear) -> None:
    ear = copy_of(trained)
    old = ear.system.domain("red").memory
    frames, labels = shown(0, 24, seed=11)
    updated = ear.update("red", frames, labels)
    assert isinstance(updated, Learned) and (updated.images, updated.total) == (24, 84)
    assert str(updated).startswith("red: 24 new images, now 84 images of 3 classes")
    memory = ear.system.domain("red").memory
    assert memory.n == old.n + 24
    everything = np.stack(
        [ear.system.space.encode(ear.encoder.encode(f[None], ear.system.wanted_taps))[0] for f in frames]
    )
    gained = memory.class_sums.sum(axis=0) - old.class_sums.sum(axis=0)
    assert np.allclose(gained, everything.sum(axis=0), atol=1e-2)
    assert ear.system.domain("green") is trained.system.domain("green")
    test, truth = shown(0, 30, seed=12)
    assert [a.label for a in ear.predict(test)] == truth


def test_update_learns_a_new_class_of_a_known_domain(trained: Ear) -> None:
    ear = copy_of(trained)
    labels = np.zeros(24, np.int64)
    frames = list(fakes.frames(0, ("checks",), labels, seed=4))
    updated = ear.update("red", frames, ["checks"] * 24)
    assert isinstance(updated, Learned) and "checks" in updated.classes and len(updated.classes) == 4
    fresh = list(fakes.frames(0, ("checks",), labels, seed=5))
    assert {a.label for a in ear.predict(fresh)} == {"checks"}
    assert [a.label for a in ear.predict(shown(0, 12, seed=6)[0])] == shown(0, 12, seed=6)[1]
    assert [a.route for a in ear.predict(fresh)] == ["red"] * 24


def test_update_takes_a_single_image(trained: Ear) -> None:
    ear = copy_of(trained)
    frames, labels = shown(0, 1, seed=21)
    assert isinstance(ear.update("red", frames, labels), Learned)
    assert ear.system.domain("red").memory.n == 61


def test_known_images_are_left_out_of_an_update(trained: Ear, data: Path) -> None:
    ear, before = copy_of(trained), trained.system
    again = ear.update("red", data / "red")
    assert isinstance(again, Learned) and ear.system is before
    assert (again.images, again.validation_accuracy, again.validated) == (0, None, 0)
    assert again.warnings == ("60 images left out: already learned",) and "no image is new" in str(again)
    files, (frames, labels) = sorted((data / "red").glob("*/*.png")), shown(0, 24, seed=11)
    mixed = ear.update("red", [*files, *frames], [*(f.parent.name for f in files), *labels])
    assert isinstance(mixed, Learned) and (mixed.images, mixed.validated) == (24, 24)
    assert ear.system.domain("red").memory.n == 84
    assert isinstance(ear.update("red", frames, labels), Learned) and ear.system.domain("red").memory.n == 84


def test_random_labels_are_not_measured_on_the_images_that_were_fitted_to_them() -> None:
    ear, frames = new_ear(), shown(0, 60)[0]
    labels = [fakes.CLASSES[k] for k in np.random.default_rng(0).integers(len(fakes.CLASSES), size=60)]
    first = ear.learn(frames, labels, name="red")
    assert isinstance(first, Learned) and first.validation_accuracy is not None and first.validation_accuracy < 0.7
    again = ear.update("red", frames, labels)
    assert isinstance(again, Learned) and again.validation_accuracy is None


def test_known_images_stay_known_through_merging_saving_and_forgetting(data: Path, tmp_path: Path) -> None:
    ear = new_ear()
    day, night = shown(0, 40, seed=1), shown(1, 40, seed=2)
    ear.learn(*day, name="day")
    ear.learn(*night, name="night")
    ear.merge("day", "night")
    ear.save(tmp_path / "s")
    ear = Ear.load(tmp_path / "s", encoder=fakes.FakeEncoder(), policy=fakes.QUICK)
    for images, labels in (day, night):
        found = ear.update("day", images, labels)
        assert isinstance(found, Learned) and found.images == 0
    ear.forget("day", FIRST)
    assert FIRST not in ear.system.domain("day").seen
    found = ear.update("day", *day)
    assert isinstance(found, Learned) and found.images == day[1].count(FIRST)
    assert found.validation_accuracy is not None


def test_a_domain_without_a_record_of_its_images_is_not_measured(trained: Ear, data: Path) -> None:
    ear, domain = copy_of(trained), trained.system.domain("red")
    old = replace(domain, growth={k: v for k, v in domain.growth.items() if k != "seen"})
    system = replace(trained.system, domains=(old, *trained.system.domains[1:]))
    ear._live = replace(ear._live, serving=system, confirmed=system)
    found = ear.update("red", data / "red")
    assert isinstance(found, Learned) and found.validation_accuracy is None
    assert any("not all images of red were recorded" in w for w in found.warnings)
    assert ear.system.domain("red").growth["validation_accuracy"] is None


def test_update_of_an_unknown_domain_is_refused(trained: Ear) -> None:
    with pytest.raises(UsageError, match="no domain 'winter'; learned so far: red, green"):
        copy_of(trained).update("winter", *shown(0, 6))


def test_undo_takes_back_the_last_change_only(data: Path, trained: Ear) -> None:
    ear = copy_of(trained)
    assert isinstance(ear.learn(data / "blue"), Learned)
    assert ear.undo() and ear.domains == ("red", "green")
    assert not ear.undo() and ear.domains == ("red", "green")
    forgot = ear.forget("green")
    assert isinstance(forgot, Changed) and forgot.domains == ("red",)
    assert ear.undo() and ear.domains == ("red", "green")


def test_forget_a_domain_and_a_class(data: Path, trained: Ear) -> None:
    ear = copy_of(trained)
    changed = ear.forget("green")
    assert isinstance(changed, Changed) and changed.domains == ("red",) and changed.what == "forgot green"
    exact = ear.forget("red", FIRST, data / "red" / FIRST)
    assert isinstance(exact, Changed) and "exactly" in exact.what
    assert FIRST not in ear.classes
    inexact = copy_of(trained).forget("red", FIRST)
    assert isinstance(inexact, Changed) and "sums alone" in inexact.what
    with pytest.raises(UsageError, match="no domain 'winter'"):
        ear.forget("winter")
    with pytest.raises(UsageError, match=f"no class '{FIRST}'"):
        ear.forget("red", FIRST)


def test_what_was_forgotten_is_gone_from_the_store_too(trained: Ear, tmp_path: Path) -> None:
    ear = copy_of(trained)
    ear.save(tmp_path / "board")
    ear.forget("green")
    ear.save(tmp_path / "board")
    assert set(kept_by(tmp_path / "board")) == {("red",)}


def kept_by(store: Path) -> list[tuple[str, ...]]:
    from device.state.codec import from_files
    from device.state.store import Store

    with Store.open(store) as opened:
        return [from_files(opened.read(m.number)).names for m in opened.generations()]


def test_forgetting_that_is_undone_removes_no_history(trained: Ear, tmp_path: Path) -> None:
    ear = copy_of(trained)
    ear.save(tmp_path / "s")
    ear.forget("green")
    ear.undo()
    ear.save(tmp_path / "s")
    assert kept_by(tmp_path / "s") == [("red", "green")] * 2
    ear.forget("green")
    ear.forget("red")
    ear.undo()
    ear.save(tmp_path / "s")
    assert set(kept_by(tmp_path / "s")) == {("red",)}, "only the last change was undone"


def test_what_was_forgotten_is_gone_from_every_store_that_it_is_saved_to(trained: Ear, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    copy_of(trained).save(a)
    ear = Ear.load(a, encoder=fakes.FakeEncoder(), policy=fakes.QUICK)
    ear.forget("green")
    ear.save(b)
    ear.save(a)
    assert set(kept_by(a)) == set(kept_by(b)) == {("red",)}


def test_what_another_keeps_is_replaced_only_on_request(trained: Ear, tmp_path: Path) -> None:
    store, other, empty = tmp_path / "s", copy_of(trained), new_ear()
    other.save(store)
    stale = Ear.load(store, encoder=fakes.FakeEncoder(), policy=fakes.QUICK)
    other.forget("red")
    other.save(store)
    before = sorted(p for p in store.rglob("*"))
    for ear in (empty, stale, copy_of(trained)):
        with pytest.raises(UsageError, match=r"keeps green, which this Ear.*Ear.load\(.*overwrite=True"):
            ear.save(store)
    assert sorted(p for p in store.rglob("*")) == before
    foreign = copy_of(trained)
    foreign.forget("green")
    foreign.save(store, overwrite=True)
    assert kept_by(store)[-2:] == [("green",), ("red",)], "the history of another was removed"
    assert foreign.save(store) == foreign.save(store) - 1


def test_loading_makes_no_store_of_a_folder(tmp_path: Path, data: Path) -> None:
    for folder in (tmp_path, data):
        before = sorted(folder.rglob("*"))
        with pytest.raises(UsageError, match="holds nothing learned"):
            Ear.load(folder, encoder=fakes.FakeEncoder())
        assert sorted(folder.rglob("*")) == before


def test_threads_that_learn_at_once_both_succeed(data: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    ear = new_ear()
    with ThreadPoolExecutor(3) as pool:
        learned = list(pool.map(lambda name: ear.learn(data / name), ("red", "green", "blue")))
    assert all(isinstance(one, Learned) for one in learned)
    assert set(ear.domains) == {"red", "green", "blue"}


def test_merge_makes_one_domain_of_two(tmp_path: Path) -> None:
    ear = new_ear()
    ear.learn(*shown(0, 40, seed=1), name="morning")
    ear.learn(*shown(1, 40, seed=2), name="evening")
    ear.learn(*shown(2, 40, seed=2), name="night")
    with pytest.raises(KnownDomain, match="'night' is known"):
        ear.merge("morning", "evening", "night")
    changed = ear.merge("morning", "evening", "day")
    assert isinstance(changed, Changed) and ear.domains == ("day", "night") and set(changed.replay) == {"day", "night"}
    assert ear.system.domain("day").memory.n == 80
    frames, labels = shown(1, 12, seed=7)
    assert [(a.label, a.route) for a in ear.predict(frames)] == [(label, "day") for label in labels]


def test_a_rejection_changes_nothing_and_says_why(trained: Ear) -> None:
    ear = copy_of(trained)
    frames, labels = shown(0, 60, seed=5)  # red again, under another name
    outcome = ear.learn(frames, labels, name="twin")
    assert isinstance(outcome, Rejected) and ear.system is trained.system
    assert str(outcome).startswith("'twin' was rejected, nothing was changed: ")


def test_images_to_forget_without_a_class_and_a_class_without_images_are_refused(trained: Ear) -> None:
    ear, frames = copy_of(trained), shown(0, 3)[0]
    for label, images, complaint in (
        (None, frames, "without the label"),
        (None, [], "without the label"),
        (FIRST, [], "no images"),
        (FIRST, (), "no images"),
    ):
        with pytest.raises(UsageError, match=complaint):
            ear.forget("red", label, images)
    assert ear.system is trained.system


# ------------------------------------------------------------------------------------------------------ measuring


def test_evaluate_counts_by_domain_and_class(data: Path, trained: Ear) -> None:
    found = trained.evaluate(data)
    assert set(found.domains) == {"red", "green", "blue"} and set(found.classes) == set(fakes.CLASSES)
    assert found.total.images == 180 and found.domains["red"].images == 60
    assert found.domains["red"].accuracy > 0.9 and found.domains["red"].routed == 60
    assert found.domains["blue"].routed is None
    assert found.total.right == sum(score.right for score in found.classes.values())
    assert f"accuracy {found.accuracy:.1%} of 180" in str(found)


def test_evaluate_of_one_domain_and_of_images_warns_of_few(data: Path, trained: Ear) -> None:
    assert set(trained.evaluate(data / "red").domains) == {"red"}
    frames, labels = shown(0, 9)
    found = trained.evaluate(frames, [*labels[:-1], "elsewhere"])
    assert found.total.images == 9 and found.total.right == 8 and found.domains == {}
    assert any("fewer than 30" in w for w in found.warnings) and any("elsewhere" in w for w in found.warnings)


# -------------------------------------------------------------------------------------------------------- keeping


def test_saved_and_loaded_it_answers_the_same(trained: Ear, tmp_path: Path) -> None:
    ear = copy_of(trained)
    assert ear.save(tmp_path / "board") == 1
    again = Ear.load(tmp_path / "board", encoder=fakes.FakeEncoder(), policy=fakes.QUICK)
    assert again.domains == ear.domains and repr(again) == repr(ear)
    for frame in shown(1, 6)[0]:
        mine, theirs = ear.predict(frame), again.predict(frame)
        assert mine.scores.tobytes() == theirs.scores.tobytes() and mine.probabilities == theirs.probabilities
    assert isinstance(again.learn(*shown(2, 40), name="blue"), Learned)
    assert again.save(tmp_path / "board") == 2


def test_only_what_was_saved_on_this_encoder_is_loaded(trained: Ear, tmp_path: Path) -> None:
    copy_of(trained).save(tmp_path / "board")
    with pytest.raises(FormatError, match="learned on encoder"):
        Ear.load(tmp_path / "board", encoder=saved(tmp_path, sound()))
    with pytest.raises(UsageError, match="not a folder"):
        Ear.load(tmp_path / "nowhere", encoder=fakes.FakeEncoder())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds nothing learned"):
        Ear.load(tmp_path / "empty", encoder=fakes.FakeEncoder())


def test_its_repr_says_what_it_knows(trained: Ear) -> None:
    text = repr(trained)
    assert text.startswith("Ear(red: 60 images of columns, half, rows, ") and "green: 60 images" in text
    assert f"encoder {fakes.ENCODER[:12]}" in text
    assert repr(new_ear()).startswith("Ear(nothing learned yet; ")
