"""What can happen to a board and what the wire can say are the same, and every event fits into a message."""

from __future__ import annotations

import json
from typing import get_args

import numpy as np
import pytest

from device.board import events
from device.daemon.publisher import Publisher
from device.mqtt import messages
from device.mqtt.outbox import Outbox, OutboxPolicy
from edgeear.attribution import Attribution

NAME = "n" * 255
"""The longest name that a board can have of a domain: that of a folder."""
NASTY = "\udcff\n\x00\u2028" * 1000
"""A long text with surrogates, as in a name of a file that is no UTF-8, and control characters."""
MOMENT = (7, 12.5)
MOVED = Attribution(("a", "b"), np.array([2, 1], np.float32))
EXAMPLES: list[events.BoardEvent] = [
    events.Started(*MOMENT),
    events.Shifted(*MOMENT, 3, MOVED),
    events.Recognised(*MOMENT, NAME, 40),
    events.LabelsWanted(*MOMENT, 1, 40, float("inf")),
    events.TooFewScenes(*MOMENT, 3, 800, 40),
    events.TooFewLabels(*MOMENT, 4, 40, 5),
    events.Searching(*MOMENT, NAME, 40, True),
    events.Searching(*MOMENT, NAME, 40, False),
    events.Grown(*MOMENT, NAME, NASTY, 3, 1 << 20, 2),
    events.NotAdmitted(*MOMENT, NAME, (NASTY, NASTY)),
    events.NotAdmitted(*MOMENT, NAME, (NASTY,), NAME, 140),
    events.LearningFailed(*MOMENT, NAME, NASTY),
    events.LearningFailed(*MOMENT, None, NASTY),
    events.Confirmed(*MOMENT, 2, 0.25),
    events.Confirmed(*MOMENT, 2, None),
    events.RolledBack(*MOMENT, 1, 0.75, 20),
    events.RolledBack(*MOMENT, 1, None, 4),
    events.RolledBack(*MOMENT, 1, None, 0, 2),
    events.StoreDamaged(*MOMENT, NASTY),
    events.Forgotten(*MOMENT, f"forgot {NAME} of {NAME}", 3),
    events.Paused(*MOMENT),
    events.Paused(*MOMENT, NASTY),
    events.Resumed(*MOMENT),
    events.PolicyChanged(*MOMENT, {name: 0.5 for name in messages.SetPolicy.model_fields}),
    events.SettingsIgnored(*MOMENT, ("labels = 3: too few", "haste = 1: not known")),
    events.FrameRefused(*MOMENT, NASTY, NASTY),
    events.SourceChanged(*MOMENT, NASTY),
    events.SourceChanged(*MOMENT, None),
    events.MessagesLost(*MOMENT, NASTY),
    events.MessagesLost(*MOMENT, NASTY, 2),
    events.Stopped(*MOMENT),
]


def test_a_board_and_the_wire_know_the_same_kinds() -> None:
    assert {type(event) for event in EXAMPLES} == set(get_args(events.BoardEvent))
    kinds = [event.kind for event in get_args(events.BoardEvent)]
    assert sorted(kinds) == sorted(get_args(messages.EventKind)), (
        "one kind for each class, so that programs can tell them apart"
    )
    assert set(events.ENDED) < set(get_args(events.BoardEvent))


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: type(event).__name__)
def test_every_event_is_a_valid_message(event: events.BoardEvent, tmp_path_factory: pytest.TempPathFactory) -> None:
    with Outbox.open(tmp_path_factory.mktemp("outbox") / "outbox.db", OutboxPolicy(), 1.0) as outbox:
        Publisher(outbox, ("site", "device"), messages.new_session(), lambda: 12.5).event(event, 2)
        (stored,) = outbox.pending(0, 5)
    message = messages.parse(messages.Event, stored.payload)
    assert isinstance(message, messages.Event)
    assert (message.kind, message.at, message.generation) == (event.kind, 7, 2)
    assert message.text and message.text[:20] == events.bounded(event.text, 20)
    assert message.data == event.data


def test_data_holds_the_facts_within_bounds() -> None:
    told = {type(event).__name__: json.loads(json.dumps(event.data, allow_nan=False)) for event in EXAMPLES}
    assert told["Shifted"] == {"onset": 3, "attribution": "sensor shift", "ratio": 2.0}
    assert told["LabelsWanted"] == {"first": 1, "last": 40, "wait_s": None}
    assert told["Grown"]["domain"] == NAME and len(told["Grown"]["explanation"]) == events.MAX_TEXT
    assert told["Grown"]["explanation"].startswith("\\udcff\n")
    assert told["RolledBack"] == {"generation": 1, "foreign": None, "frames": 0, "restart": 2}
    assert set(told["PolicyChanged"]) == set(messages.SetPolicy.model_fields)
