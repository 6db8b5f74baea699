"""`edgeear learn` and `predict`: what is learned is kept, every file gets its row, mistakes end in one line."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import pytest

from edgeear import Ear
from tests.device.cli.test_cli import code
from tests.device.cli.test_cli import plain as plain
from tests.device.simulation.test_simulate import write
from tests.support import fakes

FIRST = sorted(fakes.CLASSES)[0]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny encoder in the place of any ONNX file, and a search of a few heads."""
    monkeypatch.setattr("device.api.OnnxEncoder", lambda path: fakes.FakeEncoder())
    monkeypatch.setattr("device.api.default_policy", lambda seed: fakes.QUICK)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data"), (("red", 0), ("green", 1)), 12)


@pytest.fixture
def store(data: Path, tmp_path: Path) -> Path:
    assert code("learn", data, "--store", tmp_path / "s", "--encoder", "e", "--quiet") == 0
    return tmp_path / "s"


def predicted(
    capsys: pytest.CaptureFixture[str], store: Path, *arguments: str | Path, ends: int = 0
) -> tuple[str, str]:
    capsys.readouterr()
    assert code("predict", "--store", store, "--encoder", "e", *arguments) == ends
    return capsys.readouterr()


def test_one_folder_is_one_domain_and_the_result_is_told(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "s"
    assert code("learn", data / "red", "--store", store, "--encoder", "e", "--name", "day") == 0
    out, error = capsys.readouterr()
    assert out.startswith("day: 36 images of 3 classes") and "validation accuracy" in out and "n = " in out
    assert "is taken for one domain: day" in error and "encode: 0 of 36" in error and "next: edgeear predict" in error
    assert code("learn", data / "green", "--store", store, "--encoder", "e", "--quiet") == 0
    assert Ear.load(store, "e").domains == ("day", "green")
    assert capsys.readouterr().err == ""


def test_a_folder_of_domains_is_several_domains_and_the_same_command_goes_on(
    data: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Ear.load(store, "e").domains == ("green", "red")
    assert code("store", "forget", store, "green") == 0
    capsys.readouterr()
    assert code("learn", data, "--store", store, "--encoder", "e") == 0
    out, error = capsys.readouterr()
    assert out.startswith("green: ") and "red is known and left as it is" in error
    assert Ear.load(store, "e").domains == ("red", "green")


def test_a_known_domain_is_refused_and_update_adds_to_it(
    data: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code("learn", data / "red", "--store", store, "--encoder", "e") == 2
    assert "domain 'red' is known" in capsys.readouterr().err
    more = write(tmp_path / "more", (("red", 3),), 4)
    assert code("learn", more / "red", "--store", store, "--encoder", "e", "--update") == 0
    assert Ear.load(store, "e").system.domain("red").memory.n == 48
    capsys.readouterr()
    assert code("learn", more / "red", "--store", store, "--encoder", "e", "--update") == 0
    assert "12 images left out: already learned" in capsys.readouterr().out
    assert Ear.load(store, "e").system.domain("red").memory.n == 48


def test_an_update_learns_the_new_domains_and_updates_the_known(store: Path, tmp_path: Path) -> None:
    more = write(tmp_path / "more", (("red", 3), ("blue", 2)), 12)
    assert code("learn", more, "--store", store, "--encoder", "e", "--update") == 0
    system = Ear.load(store, "e").system
    assert system.names == ("green", "red", "blue")
    assert [d.memory.n for d in system.domains] == [36, 72, 36]


def test_domains_that_are_all_known_are_refused_with_the_remedies(
    data: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, names, remedies in ((data / "red", "'red'", ("--name",)), (data, "'green', 'red'", ())):
        assert code("learn", folder, "--store", store, "--encoder", "e") == 2
        error = capsys.readouterr().err
        assert f"domain {names} is known" in error
        assert all(r in error for r in ("--update", f"edgeear store forget {store} ", *remedies)), error


def test_a_rejection_names_the_known_domain_and_the_remedy(
    data: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code("learn", data / "red", "--store", store, "--encoder", "e", "--name", "copy") == 1
    out, error = capsys.readouterr()
    assert "'copy' was rejected" in out and "update 'red'" in out
    assert "next:" not in error and "--update --name" in error


def test_bad_pictures_are_left_out_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "data", (("red", 0),), 12) / "red"
    (folder / FIRST / "bad.jpg").write_bytes(b"no picture")
    assert code("learn", folder, "--store", tmp_path / "s", "--encoder", "e") == 0
    out = capsys.readouterr().out
    assert "red: 36 images" in out and "1 image left out: " in out and "bad.jpg: broken content" in out


def test_an_interruption_says_what_is_kept(
    data: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("device.api.adapt", interrupt)
    assert code("learn", data / "red", "--store", store, "--encoder", "e", "--name", "third") == 130
    error = capsys.readouterr().err
    assert f"{store} keeps green, red" in error and "Traceback" not in error
    assert Ear.load(store, "e").domains == ("green", "red")


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        ((), "nowhere is not a folder"),
        (("nowhere/a.jpg",), "holds pictures, not CLASS/ folders: give the folder that it lies in"),
        (("nowhere/cat/a.txt",), "is empty: add CLASS/ folders"),
    ],
)
def test_folders_without_photographs_are_refused(
    make: tuple[str, ...], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in make:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"x")
    assert code("learn", tmp_path / "nowhere", "--store", tmp_path / "s", "--encoder", "e") == 2
    error = capsys.readouterr().err
    assert "error: " in error and complaint in error and "Traceback" not in error


def test_small_data_is_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "data", (("red", 0),), 4) / "red"
    (folder / "empty").mkdir()
    first = sorted((folder / FIRST).iterdir())[0]
    (folder / FIRST / "copy.png").write_bytes(first.read_bytes())
    assert code("learn", folder, "--store", tmp_path / "s", "--encoder", "e", "--quiet") == 0
    out = capsys.readouterr().out
    assert "red: 12 images of 3 classes" in out
    for warning in ("1 image left out: copies", "fewer than 30: the accuracy", "without an image): empty"):
        assert warning in out, out


def test_a_store_is_not_made_among_other_files(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code("learn", data / "red", "--store", data, "--encoder", "e") == 2
    assert "holds other files" in capsys.readouterr().err


def test_predict_prints_a_table_and_the_accuracy_by_folder(
    data: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, error = predicted(capsys, store, data / "red")
    assert "probability" in out.splitlines()[0] and len(out.splitlines()) == 1 + 36
    assert error == "accuracy by the names of the folders: 36 of 36 (100.0%)\n"
    few = sorted((data / "red" / FIRST).iterdir())[:3]
    assert "3 of 3 (100.0%); fewer than 30" in predicted(capsys, store, *few)[1]


def test_json_and_csv_hold_every_file(data: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = data / "green" / FIRST
    lines = [json.loads(line) for line in predicted(capsys, store, folder, "--json")[0].splitlines()]
    assert len(lines) == 12 and {line["label"] for line in lines} == {FIRST}
    assert all(line["probability"] == max(line["probabilities"].values()) and line["error"] is None for line in lines)
    table = list(csv.DictReader(io.StringIO(predicted(capsys, store, folder, "--csv")[0])))
    assert [row["file"] for row in table] == [line["file"] for line in lines]
    assert {row["route"] for row in table} == {"green"} and {row["ood"] for row in table} <= {"True", "False"}
    assert predicted(capsys, store, folder, "--csv", "--json", ends=2)[1].startswith("error: --json and --csv")


def test_a_bad_file_is_one_row_and_the_others_are_answered(
    data: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    good = sorted((data / "red" / FIRST).iterdir())[0]
    out, _ = predicted(capsys, store, bad, good, tmp_path / "none.png", "--json", ends=1)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["label"] for row in rows] == [None, FIRST, None]
    assert "broken content" in rows[0]["error"] and "No such file" in rows[2]["error"]
    table, error = predicted(capsys, store, bad, good, ends=1)
    assert "broken content" in error and FIRST in table and "bad.jpg" not in table
    assert error.splitlines()[0].startswith(f"{bad}: broken content") and error.count("bad.jpg") == 1
    everything, error = predicted(capsys, store, bad, ends=1)
    assert everything == "" and "broken content" in error


def test_stdin_gives_names_or_one_picture(
    data: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = sorted((data / "red" / FIRST).iterdir())[:2]
    for content, count in (("\n".join(map(str, good)).encode(), 2), (good[0].read_bytes(), 1)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        rows = [json.loads(line) for line in predicted(capsys, store, "-", "--json")[0].splitlines()]
        assert [row["label"] for row in rows] == [FIRST] * count
    for content in (b"", b"\n \n"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert "stdin is empty" in predicted(capsys, store, "-", ends=2)[1]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(good[0].read_bytes()[:90])))
    assert predicted(capsys, store, "-", ends=1)[1].startswith("-: broken content")


def test_a_table_in_a_pipe_is_not_wrapped(
    data: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    photo = tmp_path / ("long" * 40 + ".png")
    photo.write_bytes(sorted((data / "red" / FIRST).iterdir())[0].read_bytes())
    head, row = predicted(capsys, store, photo)[0].splitlines()
    assert head.split() == ["file", "label", "probability", "route", "p"]
    assert row.startswith(f"{photo} ") and float(row.split()[4]) > 0.05


def test_a_missing_accuracy_is_explained_and_quiet_is_silent(
    data: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo, known = tmp_path / "giraffe" / "a.png", sorted((data / "red" / FIRST).iterdir())[0]
    photo.parent.mkdir()
    photo.write_bytes(known.read_bytes())
    assert predicted(capsys, store, known, photo)[1] == "no accuracy: no class was learned that is called giraffe\n"
    assert predicted(capsys, store, photo)[1] == ""
    assert predicted(capsys, store, data / "red", "--quiet")[1] == ""


def test_help_shows_both_asterisks(capsys: pytest.CaptureFixture[str]) -> None:
    assert code("learn", "--help") == 0
    assert "FOLDER/CLASS/*.jpg, or FOLDER/DOMAIN/CLASS/*.jpg" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("answer", "ends", "left"), [("n\n", 1, ("green", "red")), ("y\n", 0, ("red",))])
def test_forgetting_asks_on_a_terminal(
    answer: str,
    ends: int,
    left: tuple[str, ...],
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = io.TextIOWrapper(io.BytesIO(answer.encode()))
    monkeypatch.setattr(given, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", given)
    assert code("store", "forget", store, "green") == ends
    assert "Forget green in " in capsys.readouterr().err
    assert Ear.load(store, "e").domains == left
    assert code("store", "forget", store, "red", "--yes") == 0
    assert capsys.readouterr().err == ""


def test_the_spare_copy_of_a_change_is_called_so(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code("store", "forget", store, "green") == 0
    capsys.readouterr()
    assert code("store", "list", store) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert "tap(s), " in lines[0] and "score" not in lines[0]
    notes = [line.partition(": ")[2] for line in lines if line.startswith("generation ")]
    assert notes == ["forgot green (spare copy)", "forgot green"]


def test_names_of_any_bytes_and_controls_are_printed_safely(
    data: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = sorted((data / "red" / FIRST).iterdir())[0]
    odd = tmp_path / "odd\udcff\x1b[31m\n[red].png"
    odd.write_bytes(good.read_bytes())
    for how in ([], ["--json"], ["--csv"]):
        out, _ = predicted(capsys, store, odd, *how)
        assert FIRST in out and "\x1b" not in out


def test_predict_needs_a_store_that_was_learned_to(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "run `edgeear learn FOLDER --store" in predicted(capsys, tmp_path / "none", "x.jpg", ends=2)[1]
    for name in ("red", "green"):
        assert code("store", "forget", store, name) == 0
    assert "run `edgeear learn FOLDER --store" in predicted(capsys, store, "x.jpg", ends=2)[1]


def test_a_store_that_is_a_file_is_refused_before_the_work(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = sorted((data / "red" / FIRST).iterdir())[0]
    assert code("learn", data / "red", "--store", photo, "--encoder", "e") == 2
    error = capsys.readouterr().err
    assert f"{photo} is a file: give the folder of a store" in error and "encode" not in error
    assert "is a file" in predicted(capsys, photo, photo, ends=2)[1]
