"""When windows are closed, which hours want a report, and what makes a report out of date."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from render_platform import database
from render_platform.audit_log import BatchLogger
from render_platform.clock import HOUR_US, WINDOW_US, iso
from render_platform.hours import mark_dirty, mark_reported, mark_unchanged
from render_platform.pipeline import Platform
from tests import factories
from tests.stories import (
    AFTER_HOUR,
    DEADLINE_US,
    HOUR,
    NOWHERE,
    finish_lane,
    keyed_event,
    move_to,
    open_story,
    record,
    wanting,
)

DIGEST = "ab" * 32
TRACE = "trace/1"


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    """No ClickHouse is needed to know what is closed."""
    with closing(open_story(tmp_path, "none", dsn=NOWHERE, now_us=HOUR)) as opened:
        yield opened


def events_at(*times_us: int, seed: int = 0) -> list[Any]:
    rng = random.Random(seed)
    return [factories.make_event(rng, recorded_at=at) for at in times_us]


def flush_at(platform: Platform, us: int) -> None:
    move_to(platform, us)
    platform.flush()


def mark(platform: Platform, hour: int, status: str, revision: int = 1, batches: int = 0) -> None:
    with platform.database.write() as connection:
        mark_reported(connection, hour, revision, DIGEST, status, batches)


# closed_until


def test_an_hour_that_no_lane_covers_is_never_closed(platform: Platform) -> None:
    move_to(platform, HOUR + 50 * HOUR_US)
    assert platform.hours.closed_until(HOUR) == HOUR
    record(platform, events_at(HOUR + HOUR_US))
    platform.flush()
    assert platform.hours.closed_until(HOUR) == HOUR, "the lane began after it"
    assert platform.hours.closed_until(HOUR + HOUR_US) == HOUR + 2 * HOUR_US


@pytest.mark.parametrize(
    ("now", "closed"),
    [
        (HOUR, HOUR),
        (HOUR + DEADLINE_US, HOUR),
        (HOUR + WINDOW_US, HOUR + WINDOW_US - DEADLINE_US),
        (HOUR + WINDOW_US + DEADLINE_US - 1, HOUR + WINDOW_US - 1),
        (HOUR + WINDOW_US + DEADLINE_US, HOUR + WINDOW_US),
        (AFTER_HOUR - 1, HOUR + HOUR_US - 1),
        (AFTER_HOUR, HOUR + HOUR_US),
        (AFTER_HOUR + 10 * HOUR_US, HOUR + HOUR_US),
    ],
)
def test_the_live_lane_closes_by_the_clock_less_the_deadline(platform: Platform, now: int, closed: int) -> None:
    record(platform, events_at(HOUR))
    flush_at(platform, now)
    assert platform.hours.closed_until(HOUR) == closed


def test_the_frontier_counts_and_not_the_clock_alone(platform: Platform) -> None:
    """Nothing was sealed since: a row may still be recorded at the old frontier."""
    record(platform, events_at(HOUR + WINDOW_US))
    flush_at(platform, HOUR + 2 * WINDOW_US)
    move_to(platform, AFTER_HOUR)
    assert platform.hours.closed_until(HOUR) == HOUR + 2 * WINDOW_US
    platform.seal()
    assert platform.hours.closed_until(HOUR) == HOUR + HOUR_US


def test_an_hour_that_is_to_come_is_not_closed(platform: Platform) -> None:
    record(platform, events_at(HOUR))
    flush_at(platform, AFTER_HOUR)
    later = HOUR + 5 * HOUR_US
    assert platform.hours.closed_until(later) == later


def test_an_open_trace_lane_closes_by_its_own_frontier(platform: Platform) -> None:
    record(platform, events_at(HOUR, HOUR + 3 * WINDOW_US), TRACE)
    flush_at(platform, HOUR + 50 * HOUR_US)
    assert platform.hours.closed_until(HOUR) == HOUR + 3 * WINDOW_US - DEADLINE_US
    assert platform.hours.closed_until(HOUR + HOUR_US) == HOUR + HOUR_US


def test_a_finished_lane_closes_the_hours_that_it_passed_whatever_the_clock(platform: Platform) -> None:
    record(platform, events_at(HOUR + WINDOW_US), TRACE)
    finish_lane(platform, TRACE, HOUR + HOUR_US + DEADLINE_US)
    platform.flush()
    assert platform.clock.now_us() == HOUR
    assert platform.hours.closed_until(HOUR) == HOUR + HOUR_US
    assert platform.hours.closed_until(HOUR + HOUR_US) == HOUR + HOUR_US, "the lane ended inside the next hour"
    assert platform.hours.closed_until(HOUR - HOUR_US) == HOUR - HOUR_US


def test_a_lane_that_finished_inside_the_hour_does_not_cover_it(platform: Platform) -> None:
    record(platform, events_at(HOUR), TRACE)
    finish_lane(platform, TRACE, HOUR + HOUR_US - 1)
    platform.flush()
    assert platform.hours.closed_until(HOUR) == HOUR


def test_the_slowest_lane_decides(platform: Platform) -> None:
    record(platform, events_at(HOUR))
    record(platform, events_at(HOUR + 4 * WINDOW_US, seed=1), TRACE)
    flush_at(platform, AFTER_HOUR)
    assert platform.hours.closed_until(HOUR) == HOUR + 4 * WINDOW_US - DEADLINE_US
    finish_lane(platform, TRACE, HOUR + 2 * HOUR_US)
    assert platform.hours.closed_until(HOUR) == HOUR + HOUR_US


def test_unsealed_rows_hold_their_windows_open(platform: Platform) -> None:
    record(platform, events_at(HOUR + 7 * WINDOW_US + 5), TRACE)
    finish_lane(platform, TRACE, HOUR + 2 * HOUR_US)
    assert platform.hours.closed_until(HOUR) == HOUR + 7 * WINDOW_US + 5
    platform.flush()
    assert platform.hours.closed_until(HOUR) == HOUR + HOUR_US


@pytest.mark.parametrize("stage", ["seal", "store", "log"])
def test_a_batch_on_its_way_holds_its_windows_open_until_it_is_published(platform: Platform, stage: str) -> None:
    record(platform, events_at(HOUR + 7 * WINDOW_US + 5), TRACE)
    finish_lane(platform, TRACE, HOUR + 2 * HOUR_US)
    platform.seal()
    if stage != "seal":
        platform.store()
    if stage == "log":
        BatchLogger(platform.database, platform.log).log_stored(mark_dirty)
    assert platform.hours.closed_until(HOUR) == HOUR + 7 * WINDOW_US + 5
    platform.flush()
    assert platform.hours.closed_until(HOUR) == HOUR + HOUR_US


def test_a_batch_that_is_still_filling_holds_the_whole_hour_open(platform: Platform) -> None:
    record(platform, events_at(HOUR + 7 * WINDOW_US), TRACE)
    finish_lane(platform, TRACE, HOUR + 2 * HOUR_US)
    with platform.database.write() as connection:
        connection.execute(
            database.batches.insert().values(
                batch_id="x", type="usage_batch", lane=TRACE, hour_us=HOUR, batch_seq=0, state="filling"
            )
        )
        connection.execute(database.usage_events.update().values(batch_id="x"))
    assert platform.hours.closed_until(HOUR) == HOUR


def test_rows_of_other_hours_hold_nothing_open(platform: Platform) -> None:
    record(platform, events_at(HOUR + 5, HOUR + HOUR_US + 5), TRACE)
    finish_lane(platform, TRACE, HOUR + 2 * HOUR_US)
    assert platform.hours.closed_until(HOUR + HOUR_US) == HOUR + HOUR_US + 5
    platform.flush()
    record(platform, events_at(HOUR + HOUR_US + 9, seed=2), "trace/2")
    finish_lane(platform, "trace/2", HOUR + 2 * HOUR_US)
    assert platform.hours.closed_until(HOUR) == HOUR + HOUR_US
    assert platform.hours.closed_until(HOUR + HOUR_US) == HOUR + HOUR_US + 9


# known, wanting


def test_known_hours_are_those_with_rows_or_a_watermark(platform: Platform) -> None:
    assert platform.hours.known() == []
    record(platform, events_at(HOUR + 5, HOUR + 3 * HOUR_US))
    assert platform.hours.known() == [HOUR, HOUR + 3 * HOUR_US]
    flush_at(platform, HOUR + 3 * HOUR_US + WINDOW_US)
    hours = [HOUR + n * HOUR_US for n in range(4)]
    assert platform.hours.known() == hours
    assert platform.hours.known(hours[1], hours[3]) == hours[1:3]
    assert platform.hours.known(hours[1] + 5) == hours[1:]
    assert platform.hours.known(end_us=hours[1] + 1) == hours[:2]


def test_wanting_is_whatever_has_no_good_report_that_is_up_to_date(platform: Platform) -> None:
    record(platform, events_at(HOUR + 5, HOUR + 2 * HOUR_US))
    flush_at(platform, HOUR + 2 * HOUR_US + WINDOW_US)
    hours = [HOUR + n * HOUR_US for n in range(3)]
    assert wanting(platform) == hours
    mark(platform, hours[0], "reconciled", batches=1)
    mark(platform, hours[1], "discrepant")
    assert wanting(platform) == hours[1:]
    mark(platform, hours[1], "reconciled", revision=2)
    assert wanting(platform) == hours[2:]
    with platform.database.write() as connection:
        mark_dirty(connection, hours[0])
    assert wanting(platform) == [hours[0], hours[2]]


def test_covered_hours_are_those_that_a_lane_records_or_recorded_into(platform: Platform) -> None:
    assert not platform.hours.covered(HOUR)
    record(platform, events_at(HOUR + HOUR_US), TRACE)
    assert [platform.hours.covered(HOUR + n * HOUR_US + 5) for n in range(4)] == [False, True, True, True]
    finish_lane(platform, TRACE, HOUR + 3 * HOUR_US)
    assert [platform.hours.covered(HOUR + n * HOUR_US + 5) for n in range(4)] == [False, True, True, False]


def test_unreconciled_names_hours_that_are_closed_or_were_reported(platform: Platform) -> None:
    record(platform, events_at(HOUR + 5, HOUR + 2 * HOUR_US))
    flush_at(platform, HOUR + 2 * HOUR_US + WINDOW_US)
    names = [iso(HOUR + n * HOUR_US) for n in range(2)]
    assert platform.hours.due() == [HOUR, HOUR + HOUR_US], "and not the hour that is still open"
    assert platform.hours.unreconciled() == [(name, "not reported") for name in names]
    mark(platform, HOUR + HOUR_US, "discrepant")
    mark(platform, HOUR, "reconciled", batches=1)
    assert platform.hours.unreconciled() == [("2023-11-16T19:00:00Z", "discrepant")]
    with platform.database.write() as connection:
        mark_dirty(connection, HOUR)
    assert platform.hours.unreconciled() == [
        ("2023-11-16T18:00:00Z", "out of date"),
        ("2023-11-16T19:00:00Z", "discrepant"),
    ]


# Reports and what comes after them.


def test_an_hour_without_a_report_has_none(platform: Platform) -> None:
    assert platform.hours.last_report(HOUR) is None
    with platform.database.write() as connection:
        mark_dirty(connection, HOUR)
    assert platform.hours.last_report(HOUR) is None


def test_a_second_lane_into_a_reported_hour_marks_it_dirty_once(platform: Platform) -> None:
    record(platform, events_at(HOUR))
    flush_at(platform, AFTER_HOUR)
    mark(platform, HOUR, "reconciled", batches=1)
    assert platform.hours.last_report(HOUR) == (1, DIGEST, "reconciled", False)

    record(platform, events_at(HOUR + 5, seed=1), TRACE)
    finish_lane(platform, TRACE, HOUR + 2 * HOUR_US)
    platform.seal()
    platform.store()
    assert platform.hours.last_report(HOUR) == (1, DIGEST, "reconciled", False), "nothing is logged yet"
    platform.log_batches()
    assert platform.hours.last_report(HOUR) == (1, DIGEST, "reconciled", True)
    assert HOUR in wanting(platform)

    mark(platform, HOUR, "reconciled", revision=2, batches=2)
    for _ in range(2):
        platform.flush()
    assert platform.hours.last_report(HOUR) == (2, DIGEST, "reconciled", False)


def test_a_batch_into_another_hour_leaves_the_report_alone(platform: Platform) -> None:
    record(platform, events_at(HOUR))
    flush_at(platform, AFTER_HOUR)
    mark(platform, HOUR, "reconciled", batches=1)
    record(platform, events_at(HOUR + HOUR_US + DEADLINE_US + 5, seed=1))
    flush_at(platform, HOUR + 3 * HOUR_US)
    assert platform.hours.last_report(HOUR) == (1, DIGEST, "reconciled", False)


@pytest.mark.parametrize("unchanged", [False, True])
def test_a_report_that_missed_a_batch_stays_dirty(platform: Platform, unchanged: bool) -> None:
    """The batch was logged after the report's reader had looked, before the report was: nobody marks it again."""
    record(platform, events_at(HOUR))
    flush_at(platform, AFTER_HOUR)
    if unchanged:
        mark(platform, HOUR, "reconciled", batches=1)
        with platform.database.write() as connection:
            mark_unchanged(connection, HOUR, 0)
    else:
        mark(platform, HOUR, "reconciled", batches=0)
    report = platform.hours.last_report(HOUR)
    assert report is not None
    assert report.dirty
    with platform.database.write() as connection:
        mark_unchanged(connection, HOUR, 1)
    assert platform.hours.last_report(HOUR) == (1, DIGEST, "reconciled", False)


def test_a_report_counts_only_logged_batches(platform: Platform) -> None:
    record(platform, [keyed_event(random.Random(3))])
    flush_at(platform, AFTER_HOUR)
    with platform.database.read() as connection:
        kinds = connection.execute(sa.select(database.log_entries.c.type)).scalars().all()
    assert sorted(kinds) == ["usage_batch", "watermark"]
    mark(platform, HOUR, "reconciled", batches=1)
    report = platform.hours.last_report(HOUR)
    assert report is not None
    assert not report.dirty
