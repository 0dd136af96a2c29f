"""Repair: what is missing comes back exactly once, whatever crashes; what is wrong otherwise is left alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import sqlalchemy as sa

from render_platform.cas import path_of
from render_platform.clickhouse import ClickHouse
from render_platform.clock import WINDOW_US
from render_platform.database import log_entries
from render_platform.errors import Unavailable
from render_platform.events import UsageEvent
from render_platform.pipeline import Platform
from render_platform.repair import repairs
from tests import chdb_server
from tests.factories import make_events
from tests.stories import (
    DEADLINE_US,
    HOUR,
    NOWHERE,
    deliver,
    fast_ids,
    logged,
    open_story,
    record,
    rollup_total,
    run_in_clickhouse,
    wanting,
)
from tests.test_clickhouse import engine  # noqa: F401  fixture


class Killed(BaseException):
    """The process ends here: nothing catches it, and nothing after it runs."""


@pytest.fixture
def name() -> str:
    return chdb_server.fresh_database()


@pytest.fixture
def platform(tmp_path: Path, name: str) -> Iterator[Platform]:
    with closing(open_story(tmp_path / "state", name)) as opened:
        yield opened


def again(platform: Platform, *, dsn: str | None = None, seed: int = 99) -> Platform:
    """The same state opened by another process."""
    settings = platform.settings
    return open_story(
        settings.state_dir, settings.clickhouse_database, dsn=dsn, now_us=platform.clock.now_us(), seed=seed
    )


def recorded(platform: Platform, n: int = 60, seed: int = 1) -> list[UsageEvent]:
    made = record(platform, make_events(n, seed))
    platform.flush()
    return made


def states(platform: Platform) -> list[str]:
    with platform.database.read() as connection:
        return sorted(connection.execute(sa.select(repairs.c.state)).scalars())


def assert_exact(platform: Platform, made: Sequence[UsageEvent]) -> None:
    """Raw rows and rollup hold each event exactly once."""
    assert sorted(fast_ids(platform)) == sorted(str(event.event_id) for event in made)
    assert rollup_total(platform) == (len(made), sum(event.gpu_time_ns for event in made))
    assert platform.clickhouse.totals() == rollup_total(platform)


def lose_everything(platform: Platform) -> None:
    for table in ("usage_events", "usage_minute"):
        run_in_clickhouse(platform, f"ALTER TABLE {table} DELETE WHERE 1 SETTINGS mutations_sync = 2")


# What it does.


@pytest.mark.parametrize("lost", [1, 20, 60])
def test_missing_rows_come_back_in_raw_rows_and_rollup(platform: Platform, lost: int) -> None:
    made = recorded(platform)
    deliver(platform, made[lost:])
    outcome = platform.repair(HOUR)
    assert outcome.inserted == lost
    assert (outcome.before.status, outcome.after.status) == ("discrepant", "reconciled")
    assert (outcome.before.revision, outcome.after.revision) == (1, 2)
    assert outcome.after.findings == ()
    assert_exact(platform, made)
    assert wanting(platform) == []


def test_the_repair_is_logged_with_its_record_before_the_report_that_follows(platform: Platform) -> None:
    made = recorded(platform)
    lost = made[:5]
    deliver(platform, made[5:])
    platform.repair(HOUR)
    [entry] = logged(platform, "repair")
    assert (entry.recorded_hour, entry.records) == (HOUR, 5)
    assert entry.gpu_time_ns == sum(event.gpu_time_ns for event in lost)
    found = json.loads(platform.cas.get(str(entry.subject_digest)))
    assert found["event_ids"] == sorted(str(event.event_id) for event in lost)
    assert (found["records"], found["gpu_time_ns"], found["hour"]) == (5, entry.gpu_time_ns, HOUR)
    assert entry.batch_id == f"2023-11-16T18/{found['repair_id']}"
    with platform.database.read() as connection:
        kinds = connection.execute(sa.select(log_entries.c.type).order_by(log_entries.c.log_index)).scalars().all()
    assert kinds[-3:] == ["reconciliation", "repair", "reconciliation"]
    assert platform.verify(deep=True).verified


def test_a_second_repair_inserts_nothing_and_logs_nothing(platform: Platform) -> None:
    made = recorded(platform)
    deliver(platform, made[5:])
    platform.repair(HOUR)
    before = platform.log.published()
    outcome = platform.repair(HOUR)
    assert outcome.inserted == 0
    assert outcome.after.status == "reconciled"
    assert platform.log.published() == before
    assert_exact(platform, made)


def test_an_hour_with_nothing_missing_is_left_alone(platform: Platform) -> None:
    made = recorded(platform)
    deliver(platform, made)
    outcome = platform.repair(HOUR)
    assert (outcome.inserted, outcome.before, states(platform)) == (0, outcome.after, [])
    assert logged(platform, "repair") == []


def test_rows_forgiven_by_the_threshold_are_repaired_too(tmp_path: Path, name: str) -> None:
    with closing(open_story(tmp_path, name, threshold_ppm=1_000_000)) as platform:
        made = recorded(platform)
        deliver(platform, made[3:])
        outcome = platform.repair(HOUR)
        assert (outcome.before.status, outcome.inserted, outcome.after.missing) == ("reconciled", 3, ())
        assert_exact(platform, made)


def test_rows_lost_again_are_repaired_again_under_another_id(platform: Platform) -> None:
    made = recorded(platform)
    deliver(platform, made[5:])
    platform.repair(HOUR)
    lose_everything(platform)
    assert platform.clickhouse.totals() == (0, 0)
    outcome = platform.repair(HOUR)
    assert (outcome.inserted, outcome.after.status) == (60, "reconciled")
    assert_exact(platform, made)
    assert len({entry.batch_id for entry in logged(platform, "repair")}) == 2


def test_only_the_windows_that_are_closed_are_repaired(tmp_path: Path, name: str) -> None:
    with closing(open_story(tmp_path, name, now_us=HOUR + 2 * WINDOW_US + DEADLINE_US)) as platform:
        made = record(platform, make_events(40, 1, HOUR, 3 * WINDOW_US - DEADLINE_US))
        platform.flush()
        closed = [event for event in made if event.recorded_at < HOUR + 2 * WINDOW_US]
        outcome = platform.repair(HOUR)
        assert outcome.inserted == len(closed) < len(made)
        assert_exact(platform, closed)


# What it leaves alone.


def test_duplicates_are_not_touched_and_stay_discrepant(platform: Platform) -> None:
    made = recorded(platform)
    deliver(platform, made[1:])
    deliver(platform, [made[7]], "again")
    outcome = platform.repair(HOUR)
    assert outcome.inserted == 1
    assert outcome.after.status == "discrepant"
    [verdict] = outcome.after.findings
    assert verdict.diff.duplicated == (str(made[7].event_id),)
    assert sorted(fast_ids(platform)) == sorted(str(event.event_id) for event in [*made, made[7]])


def test_altered_and_unexpected_rows_are_not_touched(platform: Platform) -> None:
    made = recorded(platform)
    [stranger] = make_events(1, 77)
    deliver(platform, [replace(made[0], customer_ref="ab" * 32), *made[1:], stranger])
    outcome = platform.repair(HOUR)
    assert (outcome.inserted, outcome.after.status, outcome.after.missing) == (0, "discrepant", ())
    assert len(fast_ids(platform)) == 61
    assert logged(platform, "repair") == []


def test_without_clickhouse_there_is_no_repair(platform: Platform) -> None:
    made = recorded(platform)
    deliver(platform, made[5:])
    with closing(again(platform, dsn=NOWHERE)) as broken:
        with pytest.raises(Unavailable, match="cannot be repaired"):
            broken.repair(HOUR)
        assert states(broken) == []
        assert logged(broken, "repair") == []


def test_without_the_authoritative_rows_there_is_no_repair(platform: Platform) -> None:
    deliver(platform, recorded(platform)[5:])
    [entry] = logged(platform, "usage_batch")
    (platform.settings.blobs_dir / path_of(str(entry.subject_digest))).unlink()
    with pytest.raises(Unavailable, match="cannot be repaired"):
        platform.repair(HOUR)
    assert states(platform) == []


# Crashes. Each leaves the state folder and ClickHouse as a killed process would; another process goes on.


class DyingClickHouse:
    """ClickHouse for a process that is killed at its insert number `at`, before or after the rows arrive."""

    def __init__(self, real: ClickHouse, at: int, *, arrived: bool) -> None:
        self._real, self._left, self._arrived = real, at, arrived

    def insert_events(self, table: pa.Table, token: str) -> None:
        self._left -= 1
        if self._left >= 0:
            return self._real.insert_events(table, token)
        if self._arrived:
            self._real.insert_events(table, token)
        raise Killed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class DyingCas:
    """A CAS for a process that is killed when it stores the repair's record, before or after it stands."""

    def __init__(self, real: Any, *, stored: bool) -> None:
        self._real, self._stored = real, stored

    def put(self, data: bytes) -> str:
        if b'"repair_id"' not in data:
            return str(self._real.put(data))
        if self._stored:
            self._real.put(data)
        raise Killed


class DyingLog:
    """A log for a process that is killed while it logs the repair."""

    def __init__(self, real: Any, *, committed: bool) -> None:
        self._real, self._committed = real, committed

    def append(self, draft: Any, mark: Any) -> int:
        if draft.type != "repair":
            return int(self._real.append(draft, mark))
        if self._committed:
            self._real.append(draft, mark)
        raise Killed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


Kill = Callable[[Platform], None]
