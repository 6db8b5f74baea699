"""Live settings: one range for the file, the wire and the store; stored text of any kind is read without an error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from device.daemon.config.settings import LearningSection, TelemetrySection
from device.mqtt.messages import Refusal, SetPolicy, parse_command
from device.mqtt.settings import MIN_LABELS, NAMES, LiveLearning, LiveSettings, read_stored
from edgeear.novelty import MINIMUM

BOUNDS: dict[str, tuple[list[Any], list[Any]]] = {
    "labels": ([5, 100_000], [4, 100_001]),
    "probation": ([1, 1_000_000], [0, 1_000_001]),
    "foreign": ([1e-9, 1.0], [0.0, 1.1, -0.1]),
    "label_free": ([True, False], ["x"]),
    "label_wait_s": ([0.0, 31_536_000.0], [-1.0, 31_536_001.0]),
    "telemetry_period_s": ([1.0, 86_400.0], [0.9, 86_401.0]),
    "predictions": ([True, False], ["x"]),
}


def in_file(name: str, value: Any) -> bool:
    """Whether the configuration file takes `value`."""
    section = LearningSection if NAMES[name] in LiveLearning.model_fields else TelemetrySection
    try:
        section.model_validate({NAMES[name]: value})
    except ValidationError:
        return False
    return True


def on_wire(name: str, value: Any) -> bool:
    return isinstance(parse_command("set-policy", json.dumps({"id": "a", name: value}).encode()), SetPolicy)


def in_store(name: str, value: Any) -> bool:
    return name in read_stored(json.dumps({name: value})).chosen


@pytest.mark.parametrize("name", NAMES)
def test_file_wire_and_store_have_one_range(name: str) -> None:
    taken, refused = BOUNDS[name]
    for place in (in_file, on_wire, in_store):
        assert all(place(name, value) for value in taken), place
        assert not any(place(name, value) for value in refused), place


def test_labels_asked_for_are_enough_to_calibrate() -> None:
    assert MIN_LABELS == MINIMUM


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*NAMES, "x", ""]), inner, max_size=4),
)


@given(json_values.map(json.dumps) | st.text(st.characters()))
def test_any_stored_text_is_read_and_nothing_of_it_is_lost(text: str) -> None:
    stored = read_stored(text)
    assert not stored.chosen.keys() & stored.aside.keys() and len(stored.faults) == len(stored.aside)
    LiveSettings().changed(stored.chosen)
    again = read_stored(stored.with_changes({}))
    assert again.chosen == stored.chosen and repr(again.aside) == repr(stored.aside)


def test_a_change_replaces_what_stood_aside_under_its_name() -> None:
    stored = read_stored('{"labels": 4, "haste": 1}')
    assert json.loads(stored.with_changes({"labels": 9})) == {"labels": 9, "haste": 1}


def test_a_refusal_of_a_value_names_the_bound() -> None:
    outcome = parse_command("set-policy", b'{"id": "a", "foreign": 0}')
    assert isinstance(outcome, Refusal) and "greater than 0" in outcome.reason
