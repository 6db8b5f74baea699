"""Progress: bars on a terminal, few lines in a pipe, silence on request, and Ctrl-C without a traceback."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import typer
from rich.console import Console

from device.cli import app as cli
from device.cli.progress import progress
from device.evaluation import protocol
from device.progress import PERIOD_S


def shown(terminal: bool, quiet: bool = False) -> str:
    """What 100 steps of a second each print, of two phases."""
    text, now = io.StringIO(), 0.0
    console = Console(file=text, force_terminal=terminal, color_system=None, width=80)
    with progress(quiet, console=console, clock=lambda: now) as show:
        for step in range(100):
            now += 1
            show("first [bold]" if step < 50 else "second\x1b[2J\udcff", step, 100)
    return text.getvalue()


def test_a_pipe_gets_a_line_every_few_seconds() -> None:
    lines = shown(terminal=False).splitlines()
    assert lines[0] == "first [bold]: 0 of 100"
    assert lines[-1].startswith("second\ufffd[2J\ufffd: ")
    assert len(lines) == pytest.approx(100 / PERIOD_S, abs=1)


def test_a_pipe_sees_the_end_of_what_it_saw_begin() -> None:
    text = io.StringIO()
    with progress(False, console=Console(file=text), clock=lambda: 0.0) as show:
        for phase, done, total in (("a", 0, 2), ("a", 1, 2), ("a", 2, 2), ("b", 0, 2), ("b", 2, 2), ("c", 1, 1)):
            show(phase, done, total)
    assert text.getvalue() == "a: 0 of 2\na: 2 of 2\n"


def test_a_phase_of_one_step_is_only_named() -> None:
    text, now = io.StringIO(), iter(range(0, 1000, 10))
    with progress(False, console=Console(file=text), clock=lambda: float(next(now))) as show:
        show("memory", 0, 1)
        show("memory", 1, 1)
    assert text.getvalue() == "memory\n"


def test_a_terminal_gets_bars() -> None:
    text = shown(terminal=True)
    assert "first [bold]" in text and "second\ufffd" in text and "━" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet_is_silent(terminal: bool) -> None:
    assert shown(terminal, quiet=True) == ""


@pytest.mark.parametrize(
    ("kept", "said"), [("", "stopped\n"), ("3 files are written", "stopped; 3 files are written\n")]
)
def test_an_interruption_says_what_is_kept(kept: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, progress(True, kept):
        raise KeyboardInterrupt
    assert caught.value.exit_code == 130
    assert capsys.readouterr().err == said


def test_an_interrupted_evaluation_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(protocol, "evaluate", interrupted)
    command = ["eval", "--data", str(tmp_path), "--json", str(tmp_path / "r.json"), "--encoder", "e.onnx"]
    with pytest.raises(SystemExit) as caught:
        cli.main(command)
    assert caught.value.code == 130
    error = capsys.readouterr().err
    assert error.startswith("stopped; the features computed so far are cached") and error.count("\n") == 1
