"""Playbooks of `Delivery`: what happens, and what it wants done about it. No broker, no thread, no clock."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.mqtt import paho
from device.mqtt.delivery import (
    BATCH,
    FETCH,
    MAX_UNSENT,
    STRIKES,
    Acknowledge,
    Action,
    Delivery,
    Disconnect,
    End,
    Fetch,
    Publish,
    Remove,
    Subscribe,
    Tell,
    Token,
)
from device.mqtt.items import Item

OK, UNSPECIFIED, NOT_AUTHORISED, BAD_TOPIC, QUOTA = 0x00, 0x80, 0x87, 0x90, 0x97
HOLD_S = 60.0


class Play:
    """A delivery and an outbox in memory. `run` does what a driver does, and returns what it was asked to do; packet
    identifiers count from 1. `now` is set by the test."""

    def __init__(self, inflight: int = 100, rate: float = 0.0) -> None:
        self.delivery = Delivery(inflight, rate, HOLD_S, "status", str.encode)
        self.items: dict[int, Item] = {}
        self.now, self.mids, self.last, self.connections = 0.0, 0, 0, 0
        self.in_flight: dict[int, Publish] = {}

    def put(self, *payloads: bytes, topic: str = "event", **properties: Any) -> None:
        for payload in payloads:
            self.last += 1
            self.items[self.last] = Item(self.last, "event", topic, payload, properties, 0.0)
        self.delivery.wake()

    def connect(self, **limits: int) -> list[Action]:
        """CONNACK, and the PUBACK of the birth; what was asked for before that."""
        self.mids, self.in_flight = 100 * self.connections, {}
        self.connections += 1
        self.delivery.accepted(self.now, **limits)
        done = self.run()
        self.puback(b"online")
        return done

    def run(self, writable: bool = True) -> list[Action]:
        done: list[Action] = []
        while (action := self.delivery.next(self.now, writable)) is not None:
            done.append(action)
            match action:
                case Publish():
                    self.mids += 1
                    self.delivery.sent(action, self.mids)
                    if action.qos:
                        self.in_flight[self.mids] = action
                case Fetch():
                    found = [self.items[number] for number in sorted(self.items) if number > action.after]
                    self.delivery.fetched(found[:FETCH])
                case Remove():
                    for number in action.items:
                        del self.items[number]  # a KeyError: it was removed before
                case End():
                    break
        return done

    def publishes(self) -> list[bytes]:
        return [action.payload for action in self.run() if isinstance(action, Publish)]

    def puback(self, *payloads: bytes, code: int = OK) -> None:
        """The broker answers the oldest message of each payload."""
        for payload in payloads:
            mid = next(mid for mid, publish in self.in_flight.items() if publish.payload == payload)
            del self.in_flight[mid]
            self.delivery.puback(mid, code, "its reason", self.now)

    def lose(self, blame: bool = True) -> list[Remove | Tell]:
        last = self.delivery.disconnected("connection lost", blame)
        for action in last:
            if isinstance(action, Remove):
                for number in action.items:
                    del self.items[number]
        return last


def test_subscriptions_and_birth_come_first_then_the_outbox_in_order() -> None:
    play = Play()
    play.put(b"a", b"b")
    assert play.run() == []  # no connection yet
    subscribe, birth, fetch, *rest = play.connect()
    assert (subscribe, fetch) == (Subscribe(), Fetch(0))
    assert isinstance(birth, Publish) and (birth.topic, birth.payload, birth.retain) == ("status", b"online", True)
    published = [action for action in rest if isinstance(action, Publish)]
    assert [(publish.payload, publish.item, publish.qos) for publish in published] == [(b"a", 1, 1), (b"b", 2, 1)]
    assert rest[-1] == Fetch(2) and published[0].content_type == "application/json"
    play.puback(b"a", b"b")
    assert play.run() == [Remove([1, 2])] and play.run() == []
    assert play.delivery.counters().sent == 2 and play.delivery.until(play.now, True) == math.inf


def test_window_full_waits_for_a_puback() -> None:
    play = Play(inflight=2)
    play.put(b"a", b"b", b"c")
    play.connect()
    assert [publish.payload for publish in play.in_flight.values()] == [b"a"]  # the birth took one place
    assert play.publishes() == [b"b"] and play.publishes() == []
    play.puback(b"b")  # in any order
    assert play.publishes() == [b"c"] and play.publishes() == []


def test_receive_maximum_of_the_broker_wins_and_holds_for_its_connection_only() -> None:
    play = Play(inflight=4)
    play.put(*(b"%d" % number for number in range(9)))
    play.connect(receive_maximum=2)
    play.run()
    assert len(play.in_flight) == 2
    play.lose(blame=False)
    play.connect()
    play.run()
    assert len(play.in_flight) == 4


def test_nothing_is_published_while_the_network_does_not_keep_up() -> None:
    play = Play()
    play.connect()
    play.put(b"item")
    assert play.delivery.publish_now("prediction", b"now", None)
    assert play.run(writable=False) == []
    assert play.publishes() == [b"now", b"item"]


def test_reconnect_sends_what_was_not_acknowledged_again_and_nothing_else() -> None:
    play = Play()
    play.put(b"a", b"b", b"c")
    play.connect()
    play.run()
    play.puback(b"b")
    assert play.lose() == [Remove([2]), Tell("connection lost")]
    done = play.connect()
    assert [action.payload for action in done if isinstance(action, Publish)] == [b"online", b"a", b"c"]
    assert play.delivery.counters().connects == 2


def test_a_repeated_puback_counts_once_and_an_unknown_one_not_at_all() -> None:
    play = Play()
    play.put(b"a")
    play.connect()
    play.run()
    (mid,) = play.in_flight
    for number in (mid, mid, 999):
        play.delivery.puback(number, OK, "", play.now)
    assert play.run() == [Remove([1])] and play.delivery.counters().sent == 1


def test_acknowledged_items_are_removed_in_batches_while_others_are_in_flight() -> None:
    play = Play(inflight=2)
    play.put(*(b"%d" % number for number in range(BATCH + 5)))
    play.connect()
    removed: list[Action] = []
    for number in range(BATCH + 5):
        removed += [action for action in play.run() if isinstance(action, Remove)]
        play.puback(b"%d" % number)
    removed += play.run()
    assert removed == [Remove(list(range(1, BATCH + 1))), Remove(list(range(BATCH + 1, BATCH + 6)))]


def test_a_command_is_acknowledged_once_and_only_by_its_connection() -> None:
    play = Play()
    play.connect()
    first, second = play.delivery.received(7), play.delivery.received(8)
    for token in (second, second, Token(1, 9)):
        play.delivery.acknowledge(token)
    assert play.run() == [Acknowledge(8)]
    play.lose()
    play.connect()
    play.delivery.acknowledge(first)
    again = play.delivery.received(7)
    assert play.run() == []
    play.delivery.acknowledge(again)
    assert play.run() == [Acknowledge(7)]


def test_a_forbidden_topic_waits_over_connections_and_holds_up_nothing() -> None:
    play = Play(inflight=1)
    play.connect()
    play.put(b"1", topic="telemetry")
    play.put(b"2")
    assert play.publishes() == [b"1"]
    play.puback(b"1", code=NOT_AUTHORISED)
    tell, event, *_ = play.run()
    assert isinstance(tell, Tell) and tell.text.startswith("the broker forbids telemetry")
    assert isinstance(event, Publish) and event.payload == b"2"
    play.puback(b"2")
    play.lose()
    play.connect()
    play.put(b"3", topic="telemetry")
    assert play.publishes() == [] and play.delivery.until(play.now, True) == HOLD_S
    play.now = HOLD_S
    assert play.publishes() == [b"1"]
    play.puback(b"1")
    assert play.publishes() == [b"3"]
    play.puback(b"3")
    play.run()
    counters = play.delivery.counters()
    assert (counters.sent, counters.held, counters.dropped) == (3, 1, 0) and not play.items


def test_what_is_in_flight_is_not_sent_twice_when_the_outbox_is_read_again() -> None:
    play = Play()
    play.put(b"1", topic="telemetry")
    play.put(b"2", b"3")
    play.connect()
    play.run()
    play.puback(b"1", code=NOT_AUTHORISED)
    play.puback(b"2")
    play.now = HOLD_S
    assert play.publishes() == [b"1"]


@pytest.mark.parametrize("code", [UNSPECIFIED, QUOTA])
def test_any_other_refusal_ends_the_connection_and_drops_nothing(code: int) -> None:
    play = Play()
    play.put(b"a")
    play.connect()
    play.puback(b"a", code=code)
    assert play.run()[-1] == End("the broker refuses item 1: its reason")
    play.lose(blame=False)
    assert b"a" in [action.payload for action in (*play.connect(), *play.run()) if isinstance(action, Publish)]
    assert play.delivery.counters().held == 1 and play.delivery.counters().dropped == 0


def test_hopeless_items_are_dropped_and_told_once_a_connection() -> None:
    play = Play()
    play.put(b"a", b"b")
    play.connect()
    play.puback(b"a", b"b", code=BAD_TOPIC)
    assert play.run() == [Tell("item 1 was dropped: the broker refuses it: its reason"), Remove([1, 2])]
    counters = play.delivery.counters()
    assert counters.dropped == 2 and counters.last_refusal.startswith("item 2 was dropped")


def test_a_packet_too_large_is_dropped_before_it_is_sent() -> None:
    play = Play()
    play.connect(maximum_packet=100)
    play.put(b"a", b"x" * 100, b"b")
    assert play.delivery.publish_now("prediction", b"x" * 100, None)
    tell = Tell("item 2 was dropped: 100 bytes are too large for the broker, it takes 100")
    done = play.run()
    assert tell in done and [a.payload for a in done if isinstance(a, Publish)] == [b"a", b"b"]


def test_what_mqtt_cannot_hold_is_dropped() -> None:
    play = Play()
    play.connect()
    play.put(b"no hexadecimal", correlation="xyz")
    play.put(b"correlated", correlation="00ff", expiry_s=5, retain=True)
    publishes = [action for action in play.run() if isinstance(action, Publish)]
    assert [(one.correlation, one.expiry_s, one.retain) for one in publishes] == [(b"\x00\xff", 5, True)]
    play.delivery.unfit(publishes[0], "a wildcard")
    counters = play.delivery.counters()
    assert counters.dropped == 2 and counters.last_refusal == "item 2 was dropped: MQTT cannot hold it: a wildcard"


def test_messages_of_qos_0_are_bounded_and_do_not_outlive_the_connection() -> None:
    play = Play()
    assert not play.delivery.publish_now("prediction", b"x", None)
    play.connect()
    taken = [play.delivery.publish_now("prediction", b"x", b"c") for _ in range(MAX_UNSENT + 1)]
    assert taken == [True] * MAX_UNSENT + [False]
    play.lose()
    assert not any(isinstance(action, Publish) and action.topic == "prediction" for action in play.connect())
    assert play.delivery.publish_now("prediction", b"y", b"c")
    (publish,) = play.run()
    assert isinstance(publish, Publish) and (publish.qos, publish.item, publish.correlation) == (0, None, b"c")


def test_an_item_on_which_the_broker_disconnects_is_found_alone_and_held_back() -> None:
    play = Play()
    play.put(b"good", b"poison", b"more")
    play.connect()
    play.puback(b"good")
    assert play.lose() == [Remove([1]), Tell("connection lost")]
    play.connect()
    assert play.lose() == [Tell("connection lost")]  # two in flight: nobody knows which
    for _ in range(STRIKES - 1):
        play.connect()
        assert play.publishes() == [b"poison"]  # one at a time
        assert play.lose() == [Tell("connection lost")]
    play.connect()
    play.run()
    held = Tell(f"item 2: {STRIKES} connections in a row ended on it, it is held back")
    assert play.lose() == [Tell("connection lost"), held]
    play.connect()
    assert play.publishes() == [b"more"]
    play.puback(b"more")
    play.run()
    assert list(play.items) == [2] and play.delivery.counters().held == 1


def test_no_item_is_blamed_where_the_broker_had_a_reason_of_its_own_or_acknowledged_something() -> None:
    play = Play(inflight=2)
    play.put(b"a", b"b")
    for blame in (False,) * STRIKES + (True,) * STRIKES:
        play.connect()
        play.run()
        if blame:
            play.delivery.puback(next(iter(play.in_flight)), OK, "", 0.0)
        play.put(b"more")
        assert not any("held back" in action.text for action in play.lose(blame) if isinstance(action, Tell))
    assert play.delivery.counters().held == 0


def test_stop_drains_then_says_offline_then_disconnects() -> None:
    play = Play(inflight=1)
    play.connect()
    play.put(b"a", b"b")
    play.delivery.stop(10.0, 20.0)
    assert play.publishes() == [b"a"]
    play.puback(b"a")
    assert play.publishes() == [b"b"]
    play.puback(b"b")
    assert play.publishes() == [b"offline"] and play.run() == []
    play.puback(b"offline")
    assert play.run() == [Disconnect(), Remove([1, 2])]


def test_stop_leaves_in_time_where_the_broker_does_not_answer() -> None:
    play = Play(inflight=1)
    play.connect()
    play.put(b"a", b"b")
    play.run()
    play.delivery.stop(10.0, 20.0)
    assert play.run() == [] and play.delivery.until(play.now, True) == 10.0
    play.now = 10.0
    assert play.publishes() == [b"offline"] and play.delivery.until(play.now, True) == 20.0
    play.now = 20.0
    assert play.run() == [End("stopped, before the broker confirmed our farewell")]
    assert play.lose(blame=False) == [Tell("connection lost")]
    assert play.run() == [End("stopped before the broker answered")]


def test_redelivery_ends_the_connection_once() -> None:
    play = Play()
    play.connect()
    play.delivery.request_redelivery()
    assert play.run() == [End("commands found no room: the broker sends them again")] and play.run() == []
    play.lose()
    play.delivery.request_redelivery()
    assert not any(isinstance(action, End) for action in play.connect())  # a new connection is enough


def test_the_rate_bounds_items_and_until_names_the_next() -> None:
    play = Play(rate=2.0)
    play.connect()
    play.put(b"a", b"b", b"c")
    assert play.publishes() == [b"a"] and play.delivery.until(0.0, True) == 0.5
    play.now = 0.5
    assert play.publishes() == [b"b"] and play.delivery.until(0.5, False) == math.inf


@given(st.lists(st.sampled_from(["put", "ack", "lose", "forbid", "later"]), max_size=60), st.integers(1, 4))
def test_every_item_arrives_at_least_once_and_in_order_of_first_sending(steps: list[str], inflight: int) -> None:
    play, arrived = Play(inflight), list[int]()
    play.connect()

    def answer(code: int) -> None:
        mid = next((mid for mid, publish in play.in_flight.items() if publish.item is not None), None)
        if mid is not None:
            publish = play.in_flight.pop(mid)
            arrived.extend([publish.item] if code == OK and publish.item is not None else [])
            play.delivery.puback(mid, code, "", play.now)

    for step in steps:
        match step:
            case "put":
                play.put(b"%d" % play.last)
            case "ack":
                answer(OK)
            case "forbid":
                answer(NOT_AUTHORISED)
            case "lose":
                play.lose(blame=False)
                play.connect()
            case "later":
                play.now += HOLD_S
        play.run()
    play.now += HOLD_S
    for _ in range(2 * play.last):
        play.run()
        answer(OK)
    play.run()
    assert set(arrived) == set(range(1, play.last + 1)) and not play.items
    if "forbid" not in steps:
        assert arrived == sorted(arrived)


@given(st.integers(0, 200), st.integers(0, 20_000), st.booleans(), st.booleans())
def test_size_is_that_of_paho_s_packet(payload: int, correlation: int, expires: bool, correlated: bool) -> None:
    given_ = b"c" * correlation if correlated else None
    expiry = 60 if expires else None
    publish = Publish("topic", b"p" * payload, 1, False, "application/json", expiry, given_)
    properties: Any = paho.publish_properties("application/json", expiry, given_)
    assert publish.size == 9 + len("topic") + payload + len(properties.pack())


def test_a_refused_status_or_subscription_is_reported_and_drops_nothing() -> None:
    play = Play()
    play.delivery.accepted(0.0)
    play.run()
    play.puback(b"online", code=NOT_AUTHORISED)
    play.delivery.subscription_refused("Not authorized")
    play.delivery.ignored()
    assert play.run() == [Tell("the broker refuses our status: its reason; check its access list")]
    counters = play.delivery.counters()
    assert (counters.held, counters.dropped, counters.ignored) == (0, 0, 1)
    assert counters.last_refusal.startswith("the broker refuses the subscription to commands: Not authorized")
