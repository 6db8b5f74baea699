"""docs/daemon.md tells the truth: its tables are those of the code, its examples are commands that a board takes."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
from PIL import Image

from device.daemon.commands import TABLE
from device.daemon.config.settings import sections
from device.daemon.metrics import Metrics
from device.mqtt import messages, topics
from device.mqtt.items import CLASSES
from device.operator.watching import command_of
from tests.device.operator.test_client import board, echo
from tests.support.broker import mosquitto
from tests.test_readme import Block, Reader, blocks, commands, problem_of_options

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "daemon.md"
TEXT = GUIDE.read_text(encoding="utf-8") if GUIDE.is_file() else ""
BLOCKS = [block for block in blocks(TEXT) if block.language == "sh"]
SHELL, FRESH = "$(base64 -w0 photo.jpg)", "$(uuidgen)"
"""What the shell fills in: the picture, and an id that no command had before."""


@pytest.fixture
def photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with photo.jpg in it, and that in base64."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("photo.jpg")
    return base64.b64encode(Path("photo.jpg").read_bytes()).decode()


def examples(tool: str, photo: str = "") -> list[list[str]]:
    """Every command line of `tool`, as words."""
    filled = [Block("sh", block.line, block.source.replace(SHELL, photo).replace(FRESH, "new")) for block in BLOCKS]
    return [words for block in filled for words in commands(block) if words[0] == tool]


def published(words: Sequence[str]) -> tuple[str, bytes]:
    """Topic and payload of a mosquitto command line."""
    return words[words.index("-t") + 1], words[words.index("-m") + 1].encode()


def cells(header: str) -> list[list[str]]:
    """The rows of the table that begins with `header`."""
    table = TEXT.partition(f"\n| {header} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_the_table_of_topics_is_the_codes() -> None:
    def expiry(row: topics.Topic) -> str:
        if row is topics.COMMAND:
            return "as the sender says"
        return "never" if row.expiry_s is None else f"{row.expiry_s} s"

    def line(row: topics.Topic) -> list[str]:
        retained = "yes" if row.retain else "no"
        return [f"`{row.name}`", row.direction, str(row.qos), retained, expiry(row), row.cls or "", row.about]

    assert cells("topic") == [line(row) for row in topics.TOPICS]


def test_the_table_of_commands_is_the_codes() -> None:
    assert cells("command") == [[f"`{name}`", row.usage(), row.help()] for name, row in messages.COMMANDS.items()]
    assert {row.name for row in TABLE} == set(messages.COMMANDS) and all(row[2] for row in cells("command"))


def test_the_help_of_send_lists_every_command() -> None:
    shown = subprocess.run(
        [sys.executable, "-c", "from device.cli.app import main; main(['send', '--help'])"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", "TERM": "dumb"},
    )
    told = " ".join(shown.stdout.replace("`", "").split())
    for name, row in messages.COMMANDS.items():
        assert f"{name} {row.usage()}".strip() + f": {row.help()}".replace("`", "") in told


def test_every_event_has_a_meaning() -> None:
    told = [name for row in cells("event") for name in re.findall(r"`([a-z-]+)`", row[0])]
    assert told == list(get_args(messages.EventKind)) and all(row[1] for row in cells("event"))


def test_the_order_of_dropping_is_the_outboxes() -> None:
    assert f"in this order: {', '.join(CLASSES)}." in TEXT


def test_every_setting_that_is_named_exists() -> None:
    known = {f"{section}.{key}" for section, model in sections().items() for key in model.model_fields}
    named = set(re.findall(rf"`((?:{'|'.join(sections())})\.[a-z_]+)", TEXT))
    assert named <= known and {"learning.label_wait_s", "source.max_age_s", "mqtt.discovery"} <= named


def test_every_metric_is_named_and_exists() -> None:
    metrics = Metrics("1")
    families = {family.name: family.type for family in metrics.registry.collect()}
    suffix = {"counter": "_total", "info": "_info"}
    known = {name + suffix.get(kind, "") for name, kind in families.items()} - {"edgeear_build_info"}
    assert set(re.findall(r"`(edgeear_[a-z_]+)`", TEXT)) == known


def test_every_command_has_an_example_that_a_board_takes_by_any_tool(photo: str) -> None:
    sent, typed = dict[str, Any](), dict[str, Any]()
    for words in (*examples("mosquitto_pub", photo), *examples("mosquitto_rr", photo)):
        if "-f" in words:
            continue
        topic, payload = published(words)
        address = topics.match(topic)
        assert address is not None and address.command is not None and words[words.index("-q") + 1] == "1"
        command = messages.parse_command(address.command, payload)
        assert not isinstance(command, messages.Refusal), command
        sent[address.command] = command.model_dump(exclude={"id"})
    for words in examples("edgeear"):
        if words[1] == "send":
            typed[words[3]] = command_of(words[3], words[4:], None).model_dump(exclude={"id"})
    assert sent == typed and set(sent) == set(messages.COMMANDS)


def test_no_example_gives_an_id_that_was_used_before() -> None:
    given = re.findall(r'\\?"id\\?": (\S+)', "".join(block.source for block in BLOCKS))
    assert len(given) == len(messages.COMMANDS) and all(FRESH in identity for identity in given)


def test_what_is_no_command_is_a_topic_that_goes_down() -> None:
    (words,) = [words for words in examples("mosquitto_pub", "x") if "-f" in words]
    address = topics.match(words[words.index("-t") + 1])
    assert address is not None and address.topic is topics.FRAME


def test_the_examples_with_mosquittos_tools_run(photo: str, tmp_path: Path) -> None:
    asked = dict[str, Mapping[str, Any]]()

    def answer(name: str, facts: dict[str, Any]) -> dict[str, Any] | None:
        asked[name] = facts
        return echo(name, facts) if name == "report" else None

    with mosquitto(tmp_path / "broker") as broker, board(broker.port, "cam-1", answer):
        where = ["-h", "127.0.0.1", "-p", str(broker.port)]
        for words in (*examples("mosquitto_pub", photo), *examples("mosquitto_rr", photo)):
            done = subprocess.run([*words, *where], capture_output=True, text=True, timeout=30)
            assert done.returncode == 0, (words, done.stderr)
        # mosquitto_rr comes last and waits for its answer, so by then the board has seen what came before.
        assert json.loads(done.stdout)["result"] == {"id": "new"}
    assert set(asked) == set(messages.COMMANDS) and asked["infer"]["image"] == photo


def test_the_programs_own_examples_have_the_options_that_they_name(tmp_path: Path) -> None:
    reader = Reader(tmp_path, tmp_path)
    lines = [words for words in examples("edgeear") if any(word.startswith("--") for word in words)]
    assert {words[1] for words in lines} == {"watch", "requests", "label"}
    assert [problem for words in lines if (problem := problem_of_options(reader, words))] == []
    helped = subprocess.run(
        [sys.executable, "-c", "from device.cli.app import main; main(['--help'])"], capture_output=True, text=True
    )
    assert all(words[1] in helped.stdout for words in examples("edgeear"))


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert links and [link for link in links if not (GUIDE.parent / link).exists()] == []
