"""The table of phases is total, has no dead end, and is what the wire says of a board."""

from __future__ import annotations

from typing import get_args

import pytest

from device.board.phases import PHASES, REMEDY, TABLE, Signal, after
from device.mqtt import messages
from edgeear.errors import UsageError


def test_every_signal_has_an_answer_in_every_phase_and_none_is_a_dead_end() -> None:
    assert set(TABLE) == set(get_args(Signal))
    assert all(len(row) == len(PHASES) for row in TABLE.values())
    assert all(to is None or to in PHASES for row in TABLE.values() for to in row)
    ways = {(PHASES[i], to) for row in TABLE.values() for i, to in enumerate(row) if to is not None}
    for phase in PHASES:
        reached = {phase}
        while more := {to for start, to in ways if start in reached} - reached:
            reached |= more
        assert reached == set(PHASES)


def test_the_wire_knows_the_same_phases() -> None:
    assert get_args(messages.Phase) == PHASES and set(REMEDY) == set(PHASES)


def test_a_refusal_names_verb_phase_and_remedy() -> None:
    assert after("learning", "admitted") == "probation"
    with pytest.raises(UsageError, match="forget is refused while probation: confirm the generation on probation"):
        after("probation", "replace")
