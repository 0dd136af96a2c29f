"""Repair under live traffic: what others write into ClickHouse meanwhile stays, exactly once. An insert in passes."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from render_platform import reconciler as reconciler_module
from render_platform.clock import DAY_US, HOUR_US
from render_platform.errors import Unavailable
from render_platform.events import UsageEvent, uuid_texts
from render_platform.pipeline import Platform
from render_platform.reconciliation import MAX_LISTED
from tests import chdb_server
from tests.factories import make_events
from tests.stories import (
    AFTER_HOUR,
    DEADLINE_US,
    HOUR,
    deliver,
    finish_lane,
    keyed_event,
    logged,
    move_to,
    open_story,
    record,
)
from tests.test_clickhouse import engine  # noqa: F401  fixture
from tests.test_repair import again, assert_exact, recorded, states

NEXT_DAY = HOUR - HOUR % DAY_US + DAY_US


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    with closing(open_story(tmp_path / "state", chdb_server.fresh_database(), now_us=AFTER_HOUR)) as opened:
        yield opened


class Traffic(threading.Thread):
    """Records events of given hours and delivers them, ten of one hour at a time, until it is stopped."""

    def __init__(self, platform: Platform, hours: list[int]) -> None:
        super().__init__()
        self._platform, self._hours = platform, hours
        self._stopped, self.running = threading.Event(), threading.Event()
        self.made: list[UsageEvent] = []

    def run(self) -> None:
        number = 0
        while not self._stopped.is_set():
            hour = self._hours[number % len(self._hours)]
            made = record(self._platform, make_events(10, 1_000 + number, hour), f"trace/{hour}")
            deliver(self._platform, made)
            self.made += made
            self.running.set()
            number += 1

    def stop(self) -> None:
        self._stopped.set()
        self.join()


@contextmanager
def traffic(platform: Platform, hours: list[int]) -> Iterator[Traffic]:
    running = Traffic(platform, hours)
    running.start()
    try:
        assert running.running.wait(60)
        before = len(running.made)
        yield running
        assert len(running.made) > before, "nothing was written meanwhile"
    finally:
        running.stop()


def held(platform: Platform) -> list[str]:
    """Every event id that ClickHouse holds, of any time, duplicates kept."""
    return sorted(uuid_texts(platform.clickhouse.rows(0, 4 * NEXT_DAY), "event_id"))


def ids(made: list[UsageEvent]) -> list[str]:
    return sorted(str(event.event_id) for event in made)


def test_an_insert_goes_on_beside_newer_events_of_the_same_day_and_of_others(platform: Platform) -> None:
    made = recorded(platform)
    deliver(platform, made[20:])
    with traffic(platform, [HOUR + HOUR_US, HOUR + 2 * HOUR_US, NEXT_DAY, NEXT_DAY + DAY_US]) as running:
        outcome = platform.repair(HOUR)
    assert (outcome.inserted, outcome.after.status) == (20, "reconciled")
    assert held(platform) == ids([*made, *running.made])
    assert platform.clickhouse.totals().gpu_time_ns == sum(event.gpu_time_ns for event in [*made, *running.made])


def test_a_rebuild_goes_on_beside_events_of_the_next_day(tmp_path: Path) -> None:
    with closing(open_story(tmp_path, chdb_server.fresh_database(), now_us=NEXT_DAY + DEADLINE_US)) as platform:
        made = recorded(platform)
        deliver(platform, made[5:])
        deliver(platform, made[-2:], "again")
        with traffic(platform, [NEXT_DAY, NEXT_DAY + HOUR_US]) as running:
            outcome = platform.repair(HOUR)
        assert (outcome.way, outcome.after.status) == ("rebuild", "reconciled")
        assert held(platform) == ids([*made, *running.made])
        for hour in (NEXT_DAY, NEXT_DAY + HOUR_US):
            finish_lane(platform, f"trace/{hour}", NEXT_DAY + 2 * HOUR_US)
        move_to(platform, NEXT_DAY + 2 * HOUR_US + DEADLINE_US)
        platform.flush()
        assert [platform.reconcile(hour).status for hour in (NEXT_DAY, NEXT_DAY + HOUR_US)] == ["reconciled"] * 2


# Passes: more is missing than one pass holds, or a report lists.


def test_an_insert_goes_on_until_nothing_is_missing(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconciler_module, "MAX_IDS_A_PASS", 8)
    made = recorded(platform)
    deliver(platform, made[20:])
    outcome = platform.repair(HOUR)
    assert (outcome.inserted, outcome.after.status, outcome.after.missing) == (20, "reconciled", ())
    assert [entry.records for entry in logged(platform, "repair")] == [8, 8, 4]
    assert_exact(platform, made)


def test_events_that_a_report_does_not_list_are_inserted_too(platform: Platform) -> None:
    """More of one window, customer and model than a report lists."""
    rng = random.Random(1)
    made = record(platform, [keyed_event(rng) for _ in range(MAX_LISTED + 20)])
    platform.flush()
    platform.clickhouse.make_ready()
    plan = platform.reconciler.plan(HOUR)
    assert (plan.insert, len(plan.report.missing)) == (MAX_LISTED + 20, MAX_LISTED)
    outcome = platform.repair(HOUR)
    assert (outcome.inserted, outcome.after.status, outcome.after.findings) == (MAX_LISTED + 20, "reconciled", ())
    assert [entry.records for entry in logged(platform, "repair")] == [MAX_LISTED, 20]
    assert platform.clickhouse.totals() == (len(made), sum(event.gpu_time_ns for event in made))


class Swallowing:
    """ClickHouse that acknowledges inserts and keeps nothing."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def insert_events(self, table: pa.Table, token: str) -> None:
        """Nothing arrives."""

    def close(self) -> None:
        """It is the other platform's."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def test_rows_that_do_not_stay_end_the_repair(platform: Platform) -> None:
    made = recorded(platform)
    deliver(platform, made[20:])
    with closing(again(platform)) as broken:
        broken.__dict__["clickhouse"] = Swallowing(platform.clickhouse)
        with pytest.raises(Unavailable, match="did not keep 20"):
            broken.repair(HOUR)
    assert (states(platform), logged(platform, "repair")) == (["abandoned"], [])
    assert platform.repair(HOUR).inserted == 20
    assert_exact(platform, made)
