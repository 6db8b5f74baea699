"""The command line: it teaches, it fails in one line with the right code, and it starts without the heavy packages."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from device.cli import app as cli
from device.cli import simulate
from device.state.store import Store
from edgeear import __version__
from tests.device.simulation.test_simulate import write
from tests.support import fakes
from tests.support.tiny_models import saved, sound

COMMANDS: tuple[list[str], ...] = (
    [],
    ["learn"],
    ["predict"],
    ["demo"],
    ["profile"],
    ["simulate"],
    ["eval"],
    ["bench"],
    ["bench", "runtime"],
    ["bench", "nas"],
    ["bench", "ood"],
    ["encoder"],
    ["encoder", "export"],
    ["encoder", "check"],
    ["encoder", "prepare"],
)


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in (
        ("NO_COLOR", "1"),
        ("TERM", "dumb"),
        ("COLUMNS", "200"),
        ("EDGEEAR_CACHE", str(tmp_path / "c")),
    ):
        monkeypatch.setenv(name, value)


def code(*arguments: str | Path) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert code(*command, "--help") == 0
    text = capsys.readouterr().out
    assert f"edgeear {' '.join(command)}".strip() in text
    group = not command or command in (["bench"], ["encoder"])
    assert "Commands" in text if group else f"Example: edgeear {' '.join(command)}" in " ".join(text.split())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert code("--version") == 0
    assert capsys.readouterr().out == f"edgeear {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["simulate", "--data", "nowhere", "--encoder", "none.onnx"], "none.onnx: not a file"),
        (["eval", "--data", "nowhere", "--encoder", "none.onnx", "--json", "out.json"], "none.onnx: not a file"),
        (["eval", "--data", "x", "--json", "."], ". is a folder: name a file in it"),
        (["bench", "runtime", "--domains", "1,none", "--json", "out.json", "--encoder", "e"], "give whole numbers"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(
    arguments: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert code(*arguments) == 2
    out, error = capsys.readouterr()
    assert error.startswith("error: ") and complaint in error and error.count("\n") == 1 and out == ""


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a file"):
        cli.main(["--debug", "simulate", "--data", str(tmp_path), "--encoder", str(tmp_path / "none.onnx")])


def test_an_unknown_option_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert code("simulate", "--no-such-option") == 2
    assert "No such option" in capsys.readouterr().err


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else find(name))
    assert code("eval", "--data", "x", "--json", "y.json") == 2
    told = "error: this command needs torch: run pip install -e '.[learn]' in your clone of edgeear\n"
    assert capsys.readouterr().err == told


def test_an_interruption_has_its_own_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(simulate, "need", interrupt)
    assert code("demo") == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(simulate, "need", bug)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["demo"])


def test_a_sound_encoder_passes_its_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path, sound())
    assert code("encoder", "check", path) == 0
    assert capsys.readouterr().out.endswith(f"{path}: can serve as an encoder\n")


@pytest.mark.parametrize("content", [b"", b"no network", sound()[:100]], ids=["empty", "text", "cut"])
def test_a_broken_encoder_fails_its_check_with_a_remedy(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path, content)
    assert code("encoder", "check", path, "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert told["usable"] is False and all(problem["remedy"] for problem in told["problems"])
    assert code("encoder", "check", path) == 1
    assert "cannot serve as an encoder" in capsys.readouterr().out


@pytest.mark.parametrize("words", [(), ("simulate",), ("eval",), ("encoder", "check"), ("store", "list"), ("run",)])
def test_help_shows_flags_without_a_value(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert code(*words, "--help") == 0
    told = capsys.readouterr().out
    assert "--help" in told and "bool" not in told


def test_simulate_writes_what_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("device.encoder.session.OnnxEncoder", lambda path: fakes.FakeEncoder())
    data = write(tmp_path / "data", (("red", 0), ("green", 1)), 20)
    report, record, store = tmp_path / "r.html", tmp_path / "r.json", tmp_path / "store"
    arguments: list[str | Path] = [
        "simulate",
        "--data",
        data,
        "--order",
        "green, red",
        "--encoder",
        tmp_path / "e.onnx",
        "--quiet",
    ]
    sizes = ["--labels", "20", "--samples", "40", "--tests", "5", "--specs", "8", "--seed", "3"]
    assert code(*arguments, *sizes, "--report", report, "--json", record, "--store", store) == 0
    made = json.loads(record.read_text())
    assert (made["domains"], made["seed"]) == (["green", "red"], 3)
    assert report.read_text().startswith("<!DOCTYPE html>")
    with Store.open(store) as opened:
        assert len(opened.generations()) >= 2
    assert f"report: {report}" in capsys.readouterr().out


def test_a_budget_that_nothing_fits_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from adaptors.search_space import BUDGETS, Budget

    monkeypatch.setattr("device.encoder.session.OnnxEncoder", lambda path: fakes.FakeEncoder())
    monkeypatch.setitem(BUDGETS, "small", Budget(parameters=1))
    data = write(tmp_path / "data", (("red", 0),), 10)
    sizes = ["--labels", "10", "--samples", "12", "--budget", "small", "--report", str(tmp_path / "r.html"), "--quiet"]
    assert code("simulate", "--data", data, "--encoder", tmp_path / "e.onnx", *sizes) == 2
    assert "error: no head fits" in capsys.readouterr().err


def test_the_command_is_what_the_package_installs() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).resolve().parents[3] / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["edgeear"] == f"{cli.__name__}:{cli.main.__name__}"


def test_preprocessing_is_said_once_and_kept_in_a_prepared_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net, output = saved(tmp_path, sound()), tmp_path / "prepared.onnx"
    assert code("encoder", "check", net) == 0
    assert "warning: no preprocessing metadata" in capsys.readouterr().out
    assert code("encoder", "check", net, "--preprocessing", "imagenet") == 0
    assert "warning" not in capsys.readouterr().out
    assert code("encoder", "prepare", net, "imagenet", "--output", output) == 0
    assert code("encoder", "check", output) == 0
    assert "warning" not in capsys.readouterr().out
    assert code("encoder", "check", net, "--preprocessing", "imagnet") == 1
    assert "'imagnet' is not understood; say words such as" in capsys.readouterr().out


def test_names_that_are_not_utf8_are_printed_escaped(tmp_path: Path) -> None:
    """A pipe or a file with the usual encoding cannot take a surrogate."""
    odd = os.fsencode(tmp_path) + b"/Mu\xf1oz.onnx"
    Path(os.fsdecode(odd)).write_bytes(sound())
    command: list[str | bytes] = [
        sys.executable,
        "-c",
        "from device.cli.app import main; main()",
        "encoder",
        "check",
        odd,
    ]
    found = subprocess.run(command, capture_output=True, timeout=60)
    assert found.returncode == 0, found.stderr
    assert b"Mu\\udcf1oz.onnx: can serve as an encoder" in found.stdout
