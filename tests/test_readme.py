"""README, the quickstart and the examples tell the truth: they are run, block by block in the order in which they
stand.

Fenced blocks marked `sh` and `python` are read; mark as `text` what is only to be looked at. All blocks of a document
share one folder, one home and one Python namespace, as a reader's would. The folder holds what
`examples/make_pictures.py` makes, so a command, a block or an example may name these pictures.

- `edgeear ...` is run. The commands in `LONG` are only checked against their own `--help`.
- `make TARGET` must be a real target. `pip install` may name only extras that exist.
- `ls ... | edgeear ...` is run by a shell.
- `git clone`, `cd` and what makes a virtual environment are left alone. Any other command fails the test: add a check
for it to `CHECKS`.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.needs import need

need("edgeear as a process")
ROOT = Path(__file__).resolve().parents[1]
README, QUICKSTART = ROOT / "README.md", ROOT / "docs/quickstart.md"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LONG = ("demo", "bench", "run", "doctor", "watch", "send", "requests", "label")
SECONDS = 300
FENCE = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    language: str
    line: int
    """Line of the block's first line in the file, from 1."""
    source: str
    document: Path = README


@dataclass
class Reader:
    """Somebody who follows a document: a folder to work in, a home, and what Python remembers so far."""

    folder: Path
    home: Path
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__readme__"})

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "EDGEEAR_"))}
        path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
        plain = {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "200"}  # so that no option is cut or coloured
        environment = kept | plain | {"HOME": str(self.home), "PATH": path}
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=SECONDS
        )


def blocks(text: str, document: Path = README) -> list[Block]:
    return [
        Block(match[1], text.count("\n", 0, match.start(2)) + 1, match[2], document) for match in FENCE.finditer(text)
    ]


def commands(block: Block) -> Iterator[list[str]]:
    """The block's commands as words: prompts and comments dropped, continued lines joined."""
    for line in block.source.replace("\\\n", " ").splitlines():
        if words := shlex.split(line.removeprefix("$ "), comments=True):
            yield words


def problem_of_edgeear(reader: Reader, words: list[str]) -> str:
    if words[1:] and words[1] in LONG:
        return problem_of_options(reader, words)
    done = reader.run(*words)
    return done.stdout + done.stderr if done.returncode else ""


def problem_of_pipe(reader: Reader, words: list[str]) -> str:
    done = reader.run("sh", "-c", " ".join(words))
    return done.stdout + done.stderr if done.returncode or "| edgeear" not in " ".join(words) else ""


def problem_of_options(reader: Reader, words: list[str]) -> str:
    options = [word for word in words if word.startswith("--")]
    first = words.index(options[0]) if options else len(words)
    done = reader.run(*words[:first], "--help")
    unknown = [option for option in options if option.split("=")[0] not in done.stdout]
    return done.stderr or "".join(f"{option} is not in --help\n" for option in unknown)


def problem_of_make(reader: Reader, words: list[str]) -> str:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    unknown = [word for word in words[1:] if "=" not in word and word not in targets]
    done = reader.run("make", "--dry-run", "--directory", str(ROOT), *words[1:])
    return done.stderr if done.returncode else "".join(f"no target {word}\n" for word in unknown)


def problem_of_pip(reader: Reader, words: list[str]) -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {extra for word in words for extra in re.findall(r"(?<=[\[,])\w+", word)}
    unknown = named - project["optional-dependencies"].keys()
    return f"no such extras: {', '.join(sorted(unknown))}" if unknown else ""


def no_problem(reader: Reader, words: list[str]) -> str:
    return ""


CHECKS: dict[str, Callable[[Reader, list[str]], str]] = {
    "edgeear": problem_of_edgeear,
    "ls": problem_of_pipe,
    "make": problem_of_make,
    "pip": problem_of_pip,
    "git": no_problem,
    "cd": no_problem,
    "python3": no_problem,
    ".": no_problem,
}


def problems(reader: Reader, block: Block) -> list[str]:
    """What is wrong with each command of a block; empty when all is well. Python code raises by itself."""
    if block.language == "python":
        execute(reader, block)
        return []
    found = []
    for words in commands(block):
        check = CHECKS.get(words[0])
        problem = check(reader, words) if check else f"{words[0]}: no check for this command in CHECKS"
        if problem:
            found.append(f"{block.document.name} line {block.line}, {shlex.join(words)}: {problem}")
    return found


def execute(reader: Reader, block: Block) -> None:
    """Run a Python block, with the document's own line numbers in a traceback."""
    exec(compile("\n" * (block.line - 1) + block.source, str(block.document), "exec"), reader.names)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def somebody(folder: Path, home: Path) -> Reader:
    """A reader who has made the pictures, as the documents say."""
    found = Reader(folder, home)
    made = found.run(sys.executable, str(ROOT / "examples/make_pictures.py"))
    assert made.returncode == 0, made.stderr
    return found


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Reader:
    """Somebody who reads README."""
    return somebody(tmp_path_factory.mktemp("readme"), home)


@pytest.fixture(scope="module")
def beginner(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Reader:
    """Somebody who reads the quickstart and tries the examples."""
    return somebody(tmp_path_factory.mktemp("quickstart"), home)


BLOCKS = blocks(README.read_text(encoding="utf-8"))
STEPS = blocks(QUICKSTART.read_text(encoding="utf-8"), QUICKSTART)


@pytest.mark.parametrize("found", [BLOCKS, STEPS], ids=["README", "quickstart"])
def test_documents_have_commands_and_code(found: list[Block]) -> None:
    assert {block.language for block in found} == {"sh", "python"}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.language}-line-{block.line}")
def test_readme_block_works(reader: Reader, block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(reader, block, monkeypatch)


@pytest.mark.parametrize("block", STEPS, ids=lambda block: f"{block.language}-line-{block.line}")
def test_quickstart_block_works(beginner: Reader, block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(beginner, block, monkeypatch)


def follow(reader: Reader, block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(reader.folder)
    monkeypatch.setenv("HOME", str(reader.home))
    assert problems(reader, block) == []


SAYS = {
    "evaluate_and_forget": ("accuracy 100.0% of 100", "'day' is known", "('bird', 'cat', 'dog')", "Ear(day: 50 images"),
    "keep_and_continue": ("saved as generation 1", "undone: True ('day',)", "('day', 'evening')"),
    "learn_and_predict": ("day: 50 images of 2 classes", "cat day False"),
    "make_pictures": ("photos/day is there already", "more/day is there already"),
    "own_encoder": ("validation accuracy 100.0% (n = 50)", "cat "),
    "stream_with_shifts": ("the stream left all that is known", "this is day again", "150 frames answered"),
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_works(beginner: Reader, example: Path) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 40
    done = beginner.run(sys.executable, str(example))
    assert done.returncode == 0, done.stderr
    assert [text for text in SAYS[example.stem] if text not in done.stdout] == [], done.stdout


def test_every_example_is_checked() -> None:
    assert {path.stem for path in EXAMPLES} == SAYS.keys()


def test_blocks_are_found_with_their_lines() -> None:
    text = "# t\n\n```sh\nmake a\n```\n```text\nmake b\n```\n```python\nx = 1\n```\n"
    assert blocks(text) == [Block("sh", 4, "make a\n"), Block("python", 10, "x = 1\n")]


def test_commands_are_split_like_a_shell_does() -> None:
    source = "$ edgeear eval --data 'my photos' \\\n  --seed 0  # takes a minute\n\n# only words\nmake test\n"
    expected = [["edgeear", "eval", "--data", "my photos", "--seed", "0"], ["make", "test"]]
    assert list(commands(Block("sh", 1, source))) == expected


@pytest.mark.parametrize(
    "line",
    [
        "make no-such-target",
        "make tests",
        "pip install 'edgeear[learn,wings]'",
        "edgeear no-such-command",
        "wget x",
    ],
)
def test_a_false_command_is_found(reader: Reader, line: str) -> None:
    assert len(problems(reader, Block("sh", 7, line))) == 1


def test_a_python_block_that_fails_says_where(reader: Reader) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        problems(reader, Block("python", 41, "one = 1\none / 0\n"))
    assert caught.traceback[-1].lineno == 41  # counted from 0
