"""The million broken messages of benchmarks/fuzz.py, in short: nothing that is no command changes a board."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.fuzz import Broken, Inside, Tally, fuzz_inside, fuzz_wire, inside
from benchmarks.fuzz_messages import Fuzzer, Message
from device.mqtt import messages
from tests.device.daemon.test_loop import OWN
from tests.support import fakes

EVERY = {f"command/{name}" for name in messages.COMMANDS} | {"command/(unknown)", "frame", "elsewhere"}


def test_thousands_of_broken_messages_change_nothing(tmp_path: Path) -> None:
    figures = fuzz_inside(tmp_path, 3000, seed=11, seeds=60, checks=10)
    assert figures["state_changes"] == 0 and figures["messages"] >= 3000
    assert figures["topics"].keys() == EVERY and figures["ignored"] == figures["topics"]["elsewhere"]
    assert figures["answers"]["refused at once"] > 1000 and figures["valid_not_sent"] < 300


def test_a_daemon_survives_hundreds_of_them_through_a_broker(tmp_path: Path) -> None:
    figures = fuzz_wire(tmp_path, 600, seed=11, seeds=60, checks=3)
    assert figures["state_changes"] == 0 and figures["answers"]["refused"] > 100
    assert figures["refused_messages"] > 300 and figures["undecodable_frames"] > 30


@pytest.mark.parametrize(
    ("name", "payload"),
    [
        ("set-policy", b'{"id": "a", "labels": 50}'),
        ("pause", b'{"id": "b", "paused": true}'),
        ("forget", b'{"id": "c", "domain": "day"}'),
    ],
)
def test_the_digest_shows_a_change(tmp_path: Path, name: str, payload: bytes) -> None:
    with inside(tmp_path) as board:
        before = board.digest()
        message = Message(f"{OWN}/command/{name}", payload)
        assert not tally(board).may_send(message)
        board.take(message)
        assert board.digest() != before


def test_a_daemon_that_acts_on_nonsense_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with inside(tmp_path) as board:
        monkeypatch.setattr(board.daemon, "_turn_away", lambda inbound, refusal: board.daemon.pause("nonsense came"))
        before = board.digest()
        board.take(Message(f"{OWN}/command/report", b"{"))
        assert board.digest() != before
        with pytest.raises(Broken, match="is no response"):
            board.settle()


def test_one_seed_gives_the_same_messages() -> None:
    first, second = (Fuzzer(OWN, "0" * 16, 5, 20) for _ in range(2))
    assert [first.next() for _ in range(200)] == [second.next() for _ in range(200)]


def tally(board: Inside) -> Tally:
    return Tally(board.daemon.board.system.names, board.rig.session, (fakes.SIZE, fakes.SIZE))
