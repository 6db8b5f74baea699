"""An operator's commands on a store: every change is admitted, and what is forgotten is gone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from device.cli.app import main
from device.state.codec import from_files, to_files
from device.state.maintenance import Changed, forget, listing, merge
from device.state.store import Store, StoreBusy
from edgeear.errors import DataError, FormatError, UsageError
from edgeear.memory import learn, rounded
from edgeear.novelty import calibrate
from edgeear.system import Rejected, System
from tests.support import fakes


def twins() -> System:
    """Domains 0, 1 and a second domain 1, called "again"."""
    h, labels = fakes.space().encode(fakes.features(1, seed=9)), fakes.labels_of(60)
    memory = rounded(learn(h, labels, fakes.CLASSES, fakes.M))
    calibration = calibrate(h, labels, fakes.CLASSES, fakes.M, seed=1)
    codes = h[:40, : fakes.M].astype(np.float16)
    again = replace(fakes.domain(1), name="again", memory=memory, calibration=calibration, codes=codes)
    return fakes.grown(0, 1).grown(again)


@pytest.fixture
def board(tmp_path: Path) -> Path:
    """A store with a history: each generation knows one domain more, the last is confirmed."""
    folder, system = tmp_path / "board", fakes.empty()
    with Store.open(folder) as store:
        for domain in twins().domains:
            system = system.grown(domain)
            number = store.write(to_files(system), created=1.0, note=f"grew {domain.name}")
            store.commit(number)
            store.confirm(number)
    return folder


def serving(folder: Path) -> System:
    with Store.open(folder) as store:
        number = store.recover()
        assert number is not None
        return from_files(store.read(number))


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in arguments])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def bytes_of(folder: Path) -> bytes:
    return b"".join(p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file())


def test_a_listing_names_domains_classes_and_generations(board: Path) -> None:
    found = json.loads(json.dumps(listing(board)))
    assert (found["live"], found["confirmed"]) == (3, 3)
    assert [d["name"] for d in found["domains"]] == ["d0", "d1", "again"]
    assert found["domains"][0]["samples"] == {"rows": 20, "columns": 20, "half": 20}
    assert found["domains"][0]["bytes"] == fakes.domain(0).bytes
    assert [g["note"] for g in found["generations"]] == ["grew d0", "grew d1", "grew again"]


def test_the_command_prints_the_listing(board: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("store", "list", board, "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(listing(board)))
    assert run("store", "list", board) == 0
    assert "d1: rows 20, columns 20, half 20" in capsys.readouterr().out


def test_twins_are_merged_and_the_older_generation_is_kept(board: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("store", "merge", board, "d1", "again") == 0
    assert "generation 4 serves d0, d1" in capsys.readouterr().out
    system = serving(board)
    assert system.names == ("d0", "d1") and system.domain("d1").memory.n == 120
    found = listing(board)
    assert found["confirmed"] == 4 and [g["note"] for g in found["generations"]][-1] == "merged again into d1"  # type: ignore[attr-defined]


def test_a_rejection_changes_nothing(board: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Store.open(board) as store:
        # Domain 1 twice and domain 0 again: merged with either, "back" would take the inputs of domain 0.
        number = store.write(to_files(serving_with(store, "back", 0)), created=2.0)
        store.commit(number)
        store.confirm(number)
    before = listing(board)
    assert isinstance(merge(board, "d1", "back", "refit", 3.0), Rejected)
    assert run("store", "merge", board, "d1", "back") == 1
    assert "rejected, nothing was changed: d1: takes" in capsys.readouterr().err
    assert listing(board) == before


def serving_with(store: Store, name: str, background: int) -> System:
    assert store.live is not None
    return from_files(store.read(store.live)).grown(fakes.domain(background, name, 120))


def test_a_forgotten_domain_is_in_no_generation(board: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = to_files(fakes.grown(0))
    memory = next(data for name, data in trace.items() if name.startswith("memory"))
    assert memory in bytes_of(board)
    assert run("store", "forget", board, "d0") == 0
    told = capsys.readouterr().out
    assert "serves d1, again" in told and "removed generations 1, 2, 3" in told
    left = bytes_of(board)
    assert memory not in left and fakes.domain(0).head.onnx not in left
    assert serving(board).names == ("d1", "again")
    with Store.open(board) as store:
        for manifest in store.generations():
            assert "d0" not in from_files(store.read(manifest.number)).names


def test_the_generation_to_fall_back_to_has_forgotten_too(board: Path) -> None:
    changed = forget(board, "d0", None, 5.0)
    assert isinstance(changed, Changed)
    victim = next((board / f"{changed.generation:08d}").glob("system.json"))
    victim.chmod(0o644)
    victim.unlink()
    victim.write_bytes(b"damage")
    with Store.open(board) as store:
        assert store.recovered_from is not None and store.live is not None
        assert from_files(store.read(store.live)).names == ("d1", "again")


def test_a_class_is_forgotten_from_the_sums(board: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("store", "forget", board, "d1", "--class", "columns") == 0
    assert "forgot columns of d1, from the sums alone" in capsys.readouterr().out
    system = serving(board)
    assert system.domain("d1").head.classes == ("rows", "half")
    assert system.domain("d0").head.classes == fakes.CLASSES


def test_with_its_images_a_class_is_forgotten_exactly(board: Path, tmp_path: Path) -> None:
    labels = fakes.labels_of(60)
    shown = fakes.frames(1, fakes.CLASSES, labels, 0)
    images = tmp_path / "columns"
    images.mkdir()
    for k in np.flatnonzero(labels == 1):
        Image.fromarray(shown[k]).save(images / f"{k:03d}.png")
    outcome = forget(board, "d1", "columns", 5.0, (images, fakes.FakeEncoder()))
    assert isinstance(outcome, Changed) and outcome.what == "forgot columns of d1, with its samples, exactly"
    h = fakes.space().encode(fakes.features(1))
    never = learn(h[labels != 1], np.where(labels[labels != 1] == 2, 1, 0), ("rows", "half"), fakes.M)
    memory = serving(board).domain("d1").memory
    assert memory.counts.tolist() == never.counts.tolist()
    np.testing.assert_allclose(memory.covariance, never.covariance, atol=1e-5)


def test_images_that_were_not_learned_change_nothing(board: Path, tmp_path: Path) -> None:
    before = bytes_of(board)
    with pytest.raises(DataError, match="has no image"):
        forget(board, "d1", "rows", 5.0, (tmp_path / "none", fakes.FakeEncoder()))

    class Other(fakes.FakeEncoder):
        digest = "0" * 64

    with pytest.raises(FormatError, match="learned on encoder"):
        forget(board, "d1", "rows", 5.0, (tmp_path, Other()))
    assert bytes_of(board) == before


@pytest.mark.parametrize(
    "arguments",
    [("list",), ("merge", "d0", "d1"), ("forget", "d0"), ("forget", "d0", "--class", "rows")],
    ids=lambda a: "-".join(a).replace("--", ""),
)
def test_a_store_in_use_is_left_alone(
    arguments: Sequence[str], board: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *rest = arguments
    with Store.open(board):
        before = bytes_of(board)
        assert run("store", command, board, *rest) == 2
        assert "in use" in capsys.readouterr().err
        assert bytes_of(board) == before
        with pytest.raises(StoreBusy):
            listing(board)


def test_what_is_no_store_is_refused_and_not_made_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("store", "list", tmp_path) == 2
    assert "is not a store" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert run("store", "forget", tmp_path / "absent", "d0") == 2
    assert not (tmp_path / "absent").exists()


def test_error_messages_list_the_known_names(board: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (("forget", board, "d7"), "learned so far: d0, d1, again"),
        (("forget", board, "d1", "--class", "bird"), "it knows rows, columns, half"),
        (("merge", board, "d1", "d1"), "with itself"),
        (("forget", board, "d1", "--images", board), "name it with --class"),
    ):
        assert run("store", *arguments) == 2
        assert message in capsys.readouterr().err


def test_a_change_starts_from_the_confirmed_generation(board: Path) -> None:
    with Store.open(board) as store:
        store.commit(store.write(to_files(serving_with(store, "d3", 3)), created=2.0))
    found = listing(board)
    assert (found["live"], found["confirmed"]) == (4, 3)  # looking changes nothing
    assert isinstance(merge(board, "d1", "again", "refit", 3.0), Changed)
    assert serving(board).names == ("d0", "d1")


def test_a_store_in_which_nothing_was_confirmed_has_nothing_to_change(tmp_path: Path) -> None:
    Store.open(tmp_path / "new").close()
    assert listing(tmp_path / "new")["domains"] == []
    with pytest.raises(UsageError, match="no confirmed generation"):
        forget(tmp_path / "new", "d0", None, 1.0)
