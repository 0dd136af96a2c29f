"""The gateway's fast path: within a second, best effort, bounded, and counted whatever happens."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import pyarrow as pa
import pytest

from render_platform.clickhouse import ClickHouse
from render_platform.clock import ManualClock
from render_platform.errors import Unavailable
from render_platform.events import UsageEvent, uuid_texts
from render_platform.gateway import publisher as module
from render_platform.gateway.publisher import MAX_WAITING, Publisher
from tests.factories import START_US, make_event

SOON_S = 20.0


class FakeClickHouse:
    """Takes rows, or fails as often as `failures` says; remembers whether it was closed."""

    def __init__(self) -> None:
        self.rows: list[str] = []
        self.failures = 0
        self.opened = 0
        self.closed = 0
        self.hold = threading.Event()
        self.hold.set()

    def open(self) -> ClickHouse:
        self.opened += 1
        return cast(ClickHouse, self)

    def insert_events(self, table: pa.Table, token: str) -> None:
        if not self.hold.wait(SOON_S):
            raise Unavailable("held for too long")
        if self.failures:
            self.failures -= 1
            raise Unavailable("ClickHouse is down", "start it")
        assert token
        self.rows += uuid_texts(table, "event_id")

    def close(self) -> None:
        self.closed += 1


def made(count: int, recorded_at: int = START_US) -> list[UsageEvent]:
    rng = random.Random(count)
    return [replace(make_event(rng, recorded_at=START_US), recorded_at=recorded_at) for _ in range(count)]


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON_S
    while not holds():
        assert time.monotonic() < end, "it did not come to hold"
        time.sleep(0.01)


@pytest.fixture
def clickhouse() -> FakeClickHouse:
    return FakeClickHouse()


@pytest.fixture
def publisher(clickhouse: FakeClickHouse, monkeypatch: pytest.MonkeyPatch) -> Publisher:
    monkeypatch.setattr(module, "RECONNECT_S", 0.05)  # a pause of five seconds would only make the tests slow
    return Publisher(clickhouse.open, ManualClock(START_US), deadline_s=60)


def test_every_event_arrives_once(publisher: Publisher, clickhouse: FakeClickHouse) -> None:
    events = made(25)
    publisher.start()
    for event in events:
        publisher.offer(event)
    until(lambda: publisher.delivered == 25)
    publisher.stop(SOON_S)
    assert sorted(clickhouse.rows) == sorted(str(event.event_id) for event in events)
    assert (publisher.dropped, publisher.waiting, clickhouse.opened, clickhouse.closed) == (0, 0, 1, 1)


def test_what_waits_at_the_end_is_still_sent(publisher: Publisher, clickhouse: FakeClickHouse) -> None:
    publisher.start()
    for event in made(3):
        publisher.offer(event)
    publisher.stop(SOON_S)
    assert (publisher.delivered, publisher.dropped, len(clickhouse.rows)) == (3, 0, 3)


def test_a_failed_insert_is_counted_and_the_connection_is_made_anew(
    publisher: Publisher, clickhouse: FakeClickHouse
) -> None:
    """As after a restart of what answers: the old connection may never work again."""
    clickhouse.failures = 1
    publisher.start()
    first, *rest = made(4)
    publisher.offer(first)
    until(lambda: publisher.dropped == 1)
    assert "ClickHouse is down" in publisher.last_error
    for event in rest:
        publisher.offer(event)
    until(lambda: publisher.delivered == 3)
    publisher.stop(SOON_S)
    assert clickhouse.opened == clickhouse.closed == 2
    assert str(first.event_id) not in clickhouse.rows


def test_while_clickhouse_cannot_be_opened_events_wait_and_then_arrive(
    clickhouse: FakeClickHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RECONNECT_S", 0.05)
    attempts = iter([Unavailable("no server"), Unavailable("no server")])

    def opened() -> ClickHouse:
        for error in attempts:
            raise error
        return clickhouse.open()

    publisher = Publisher(opened, ManualClock(START_US), deadline_s=60)
    for event in made(5):
        publisher.offer(event)
    publisher.start()
    until(lambda: publisher.delivered == 5)
    publisher.stop(SOON_S)
    assert publisher.dropped == 0


def test_what_is_older_than_the_deadline_is_dropped_and_counted(clickhouse: FakeClickHouse) -> None:
    now_us = START_US + 30_000_001  # half of it is for the insert: it has come to its end before the deadline
    publisher = Publisher(clickhouse.open, ManualClock(now_us), deadline_s=60)
    for event in [*made(2, START_US), *made(3, START_US + 1)]:
        publisher.offer(event)
    publisher.start()
    publisher.stop(SOON_S)
    assert (publisher.delivered, publisher.dropped) == (3, 2)


def test_a_clickhouse_that_hangs_holds_up_nobody_and_what_waits_is_bounded(
    publisher: Publisher, clickhouse: FakeClickHouse
) -> None:
    clickhouse.hold.clear()
    publisher.start()
    event = made(1)[0]
    publisher.offer(event)
    until(lambda: publisher.waiting == 0)
    for _ in range(MAX_WAITING + 7):
        publisher.offer(event)
    assert (publisher.waiting, publisher.dropped) == (MAX_WAITING, 7)
    clickhouse.failures = 1_000
    clickhouse.hold.set()
    publisher.stop(SOON_S)
    assert publisher.delivered + publisher.dropped == MAX_WAITING + 8
