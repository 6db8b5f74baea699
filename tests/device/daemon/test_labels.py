"""The label book: what came for which frame, forgotten with the frames, and names that stay with their labels."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.daemon.labels import LIMIT, LabelBook
from edgeear.errors import UsageError

labels = st.dictionaries(st.integers(0, 60), st.sampled_from("abc"), max_size=20)


@given(st.lists(labels, max_size=5), st.lists(st.integers(0, 60), max_size=20))
def test_the_latest_label_of_each_frame_counts(given_: list[dict[int, str]], asked: list[int]) -> None:
    ours, known = LabelBook(), dict[int, str]()
    for some in given_:
        ours.add(some)
        known |= some
    assert ours.label(asked) == [known.get(number) for number in asked]
    assert ours.label(asked) == [known.get(number) for number in asked], "asking again changes nothing"


@given(labels, st.lists(st.integers(0, 60), min_size=1, max_size=20))
def test_what_is_older_than_the_frames_asked_for_is_forgotten(given_: dict[int, str], asked: list[int]) -> None:
    ours = LabelBook()
    ours.add(given_)
    ours.label(asked)
    assert len(ours) == sum(number >= min(asked) for number in given_)


def test_no_frames_forget_nothing() -> None:
    ours = LabelBook()
    ours.add({5: "a"})
    assert ours.label([]) == [] and len(ours) == 1


def test_more_labels_than_the_limit_are_refused_whole() -> None:
    ours = LabelBook()
    ours.add({number: "a" for number in range(LIMIT)})
    with pytest.raises(UsageError, match=str(LIMIT)):
        ours.add({0: "b", LIMIT: "b"}, "winter")
    assert ours.label([0]) == ["a"] and ours.domain([0]) is None
    ours.add({0: "b"})
    assert ours.label([0]) == ["b"]


def test_the_operators_name_counts_once() -> None:
    ours = LabelBook()
    ours.add({1: "a"}, "winter")
    ours.add({2: "a"})
    assert [ours.domain([1, 2]), ours.domain([1, 2])] == ["winter", None]


def test_a_name_does_not_outlive_the_frames_that_it_was_given_for() -> None:
    ours = LabelBook()
    ours.add({1: "a", 4: "b"}, "winter")
    ours.label([4, 5])
    ours.label([90, 91])
    assert ours.domain([90, 91]) is None


def test_a_name_that_came_with_no_label_that_fits_names_nothing() -> None:
    ours = LabelBook()
    ours.add({}, "winter")
    assert ours.domain([1]) is None
