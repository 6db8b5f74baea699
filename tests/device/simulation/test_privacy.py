"""A whole small run opens no connection to another machine and leaves no file outside of the folders that it names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.needs import need
from tests.support.tiny_models import saved, seeing

WATCH = """
import os, sys
log = open(os.environ["WATCH_LOG"], "a", buffering=1)
def watch(event, given):
    if event in ("socket.connect", "socket.sendto", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname"):
        log.write(f"{event} {given[1:]}\\n")
    elif event == "open" and isinstance(given[0], str) and (given[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        log.write(f"write {os.path.abspath(given[0])}\\n")
    elif event in ("os.mkdir", "os.rename"):
        log.write(f"write {os.path.abspath(os.fsdecode(given[0]))}\\n")
sys.addaudithook(watch)
"""


def pictures(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for label, colour in enumerate(((200, 40, 40), (40, 200, 40))):
        folder = root / "day" / str(label)
        folder.mkdir(parents=True)
        for number in range(40):
            pixels = (rng.normal(0, 20, (8, 8, 3)) + colour).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def environment(tmp_path: Path) -> tuple[dict[str, str], Path, Path]:
    """A fresh home, and an interpreter start that logs sockets and writes of every process of the run."""
    home, site, log = tmp_path / "home", tmp_path / "site", tmp_path / "log"
    for folder in (home, site, tmp_path / "tmp"):
        folder.mkdir()
    (site / "sitecustomize.py").write_text(WATCH)
    log.touch()
    ours = (
        "ORT_DISABLE_TELEMETRY",
        "XDG_",
        "COVERAGE_",
        "MPLCONFIGDIR",
    )  # a process that is measured writes its figures
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    own = {
        "HOME": str(home),
        "TMPDIR": str(tmp_path / "tmp"),
        "EDGEEAR_CACHE": str(tmp_path / "cache"),
        "WATCH_LOG": str(log),
        "PYTHONPATH": os.pathsep.join([str(site), *filter(None, sys.path)]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return kept | own, home, log


@pytest.mark.parametrize("command", ["check", "simulate"])
def test_nothing_phones_home_or_writes_elsewhere(command: str, tmp_path: Path) -> None:
    need("edgeear as a process")
    variables, home, log = environment(tmp_path)
    encoder = str(saved(tmp_path, seeing()))
    given = ["encoder", "check", encoder]
    if command == "simulate":
        data = str(pictures(tmp_path / "data"))
        given = ["simulate", "--data", data, "--encoder", encoder, "--labels", "30", "--samples", "60", "--specs", "10"]
        given += ["--report", str(tmp_path / "report.html"), "--quiet"]
    program = "from device.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *given], env=variables, cwd=tmp_path, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    seen = log.read_text().splitlines()
    assert [line for line in seen if line.startswith("socket")] == []
    outside = [line for line in seen if line.startswith("write ") and not line[6:].startswith((str(tmp_path), "/dev/"))]
    assert outside == []
    assert [path for path in home.rglob("*") if path.is_file()] == []
    assert (command == "check") != any(line.startswith("write ") for line in seen)  # the watch itself works
