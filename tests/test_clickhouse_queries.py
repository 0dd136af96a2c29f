"""What operators and dashboards ask of ClickHouse: rollups, verdicts and hours, each against plain Python."""

from __future__ import annotations

import random
from contextlib import closing
from dataclasses import replace
from itertools import groupby
from typing import Any

import pytest

from render_platform import events
from render_platform.clickhouse import ClickHouse, ReportRow, open_clickhouse
from render_platform.clickhouse_schema import KEPT, CustomerUsage
from render_platform.clock import DAY_US, HOUR_US
from render_platform.errors import Unavailable, UsageError
from render_platform.events import UsageEvent, total_gpu_time_ns
from tests import factories
from tests.factories import START_US
from tests.test_clickhouse import END_US, clickhouse, dsn, engine, name, raw  # noqa: F401  fixtures

MADE = factories.make_events(600, seed=21, start_us=START_US, span_us=3 * HOUR_US)
AFTER_US = START_US + 3 * HOUR_US

REPORT = ReportRow(
    hour_us=START_US,
    revision=1,
    status="pending",
    final=False,
    windows_pending=3,
    events=10,
    fast_events=9,
    gpu_time_ns=2**70,
    fast_gpu_time_ns=2**70 - 1,
    missing=1,
    duplicated=0,
    altered=0,
    unexpected=0,
    digest="",
    error="it's \n unreadable",
    reported_at_us=END_US + 1,
)


@pytest.fixture
def filled(clickhouse: ClickHouse) -> ClickHouse:
    """MADE in three inserts, one of them repeated."""
    for part in (0, 1, 2, 1):
        clickhouse.insert_events(events.table_from_events(MADE[part::3]), f"{part}")
    return clickhouse


def hour_events(opened: ClickHouse) -> int:
    """What the rollup by hour holds of the days around START_US."""
    return sum(row.events for row in opened.device_hours(START_US - 9 * DAY_US, START_US + 9 * DAY_US))


def grouped(key: Any) -> list[tuple[Any, list[UsageEvent]]]:
    return [(found, list(rows)) for found, rows in groupby(sorted(MADE, key=key), key)]


def known(values: list[int | None]) -> tuple[int, int]:
    numbers = [value for value in values if value is not None]
    return len(numbers), sum(numbers)


def test_customers_pay_for_what_they_used(filled: ClickHouse) -> None:
    expected = [
        CustomerUsage(
            key[0],
            key[1],
            len(rows),
            sum(row.gpu_time_ns for row in rows),
            *known([row.input_tokens for row in rows]),
            *known([row.output_tokens for row in rows]),
        )
        for key, rows in grouped(lambda row: (row.customer_ref, row.model_name))
    ]
    assert any(usage.input_tokens_known for usage in expected)
    assert filled.customer_usage(START_US, AFTER_US) == expected
    of_one = [usage for usage in expected if usage.customer_ref == factories.CUSTOMERS[1]]
    assert filled.customer_usage(START_US, AFTER_US, factories.CUSTOMERS[1]) == of_one
    assert filled.customer_usage(START_US, AFTER_US, "' OR '1'='1") == []
    first = filled.customer_usage(START_US, START_US + HOUR_US // 2)
    assert sum(usage.events for usage in first) == sum(e.recorded_at < START_US + HOUR_US // 2 for e in MADE)


def test_how_jobs_waited_and_ended(filled: ClickHouse) -> None:
    found = filled.queue_health(START_US, AFTER_US)
    expected = grouped(lambda row: row.model_name)
    assert [health.model_name for health in found] == [model for model, _ in expected]
    for health, (_, rows) in zip(found, expected, strict=True):
        ends = [sum(row.status == status for row in rows) for status in events.STATUSES]
        assert [health.succeeded, health.failed, health.timed_out, health.cancelled] == ends
        assert health.events == len(rows)
        assert health.failed_ppm == (ends[1] + ends[2]) * 1_000_000 // len(rows)
        waited = [row.queue_time_us for row in rows]
        for us, share in ((health.queue_p50_us, 0.5), (health.queue_p90_us, 0.9), (health.queue_p99_us, 0.99)):
            assert sum(one <= us for one in waited) / len(waited) == pytest.approx(share, abs=0.03)
    assert sum(health.failed for health in found)


def test_an_hour_of_a_device(filled: ClickHouse) -> None:
    found = filled.device_hours(START_US, AFTER_US)
    expected = grouped(lambda row: (row.recorded_at // HOUR_US * HOUR_US, row.device_uuid or "", row.model_name))
    assert len(found) == len(expected) > 9
    for one, ((hour_us, device, model), rows) in zip(found, expected, strict=True):
        assert (one.hour_us, one.device_uuid, one.model_name) == (hour_us, device or None, model)
        amounts = [row.gpu_time_ns for row in rows]
        assert (one.events, one.gpu_time_ns) == (len(rows), sum(amounts))
        assert (one.gpu_time_ns_min, one.gpu_time_ns_max) == (min(amounts), max(amounts))
        assert (one.energy_known, one.energy_mj) == known([row.energy_mj for row in rows])
        took = [row.total_time_us for row in rows]
        assert 0.99 * min(took) <= one.p50_us <= one.p90_us <= one.p99_us <= 1.01 * max(took)
    assert {one.device_uuid for one in found} == {None, "GPU-0", "GPU-1"}
    assert filled.device_hours(START_US + HOUR_US, AFTER_US) == [one for one in found if one.hour_us > START_US]


def test_operators_ask_for_whole_hours(clickhouse: ClickHouse) -> None:
    for read in (clickhouse.queue_health, clickhouse.device_hours):
        with pytest.raises(UsageError, match="by hour"):
            read(START_US + HOUR_US // 2, AFTER_US)
    with pytest.raises(UsageError, match="by minute"):
        clickhouse.customer_usage(START_US, AFTER_US + 1)


def test_nothing_is_no_rows(clickhouse: ClickHouse) -> None:
    assert clickhouse.customer_usage(START_US, END_US) == []
    assert clickhouse.queue_health(START_US, END_US) == []
    assert clickhouse.device_hours(START_US, END_US) == []
    assert clickhouse.reports(START_US, END_US) == []
    assert clickhouse.hours_with_rows() == []


def test_what_cannot_be_read_is_not_empty(clickhouse: ClickHouse, raw: Any) -> None:
    for table in KEPT:
        raw.command(f"DROP TABLE {table}")
    for read in (clickhouse.customer_usage, clickhouse.queue_health, clickhouse.device_hours, clickhouse.reports):
        with pytest.raises(Unavailable):
            read(START_US, END_US)
    with pytest.raises(Unavailable):
        clickhouse.hours_with_rows()
    with pytest.raises(Unavailable):
        clickhouse.record_report(REPORT)


def test_a_retry_heals_the_rollup_by_hour(clickhouse: ClickHouse, raw: Any) -> None:
    table = factories.make_table(100, seed=22)
    raw.command("RENAME TABLE usage_hour TO aside")
    with pytest.raises(Unavailable):
        clickhouse.insert_events(table, "a")
    raw.command("RENAME TABLE aside TO usage_hour")
    for _ in range(2):
        clickhouse.insert_events(table, "a")
        assert (clickhouse.totals()[0], hour_events(clickhouse)) == (100, 100)


def test_every_rollup_is_made_again_from_its_rows(filled: ClickHouse, raw: Any) -> None:
    before = filled.device_hours(START_US, AFTER_US)
    minutes = filled.rollup_aggregates(START_US, AFTER_US)
    for table in ("usage_minute", "usage_hour"):
        raw.command(f"TRUNCATE TABLE {table}")
    for _ in range(2):
        filled.rebuild_rollup(START_US, AFTER_US)
        assert filled.rollup_aggregates(START_US, AFTER_US).equals(minutes)
        assert [replace(row, p50_us=0, p90_us=0, p99_us=0) for row in filled.device_hours(START_US, AFTER_US)] == [
            replace(row, p50_us=0, p90_us=0, p99_us=0) for row in before
        ]


def test_an_hour_that_is_not_over_keeps_its_rollup(filled: ClickHouse, raw: Any) -> None:
    filled.rebuild_rollup(START_US + HOUR_US // 2, AFTER_US - HOUR_US // 2)
    assert hour_events(filled) == len(MADE)
    raw.command("TRUNCATE TABLE usage_hour")
    filled.rebuild_rollup(START_US + HOUR_US // 2, AFTER_US - HOUR_US // 2)
    assert {row.hour_us for row in filled.device_hours(START_US, AFTER_US)} == {START_US + HOUR_US}


def test_the_hours_that_hold_rows(clickhouse: ClickHouse, raw: Any) -> None:
    rng = random.Random(23)
    hours = [START_US, START_US + 5 * HOUR_US, START_US + 400 * DAY_US]
    times = [hours[0], hours[0] + HOUR_US - 1, hours[1] + 7, hours[2] + HOUR_US - 1]
    made = [factories.make_event(rng, recorded_at=us) for us in times]
    clickhouse.insert_events(events.table_from_events(made), "a")
    assert clickhouse.hours_with_rows() == hours
    assert clickhouse.hours_with_rows(hours[1]) == hours[1:]
    assert clickhouse.hours_with_rows(hours[0] + HOUR_US, hours[2]) == [hours[1]]
    assert clickhouse.hours_with_rows(None, hours[1]) == hours[:1]
    raw.command(f"DELETE FROM usage_events WHERE toUnixTimestamp64Micro(recorded_at) >= {hours[2]}")
    assert clickhouse.hours_with_rows() == hours  # the rollup still says that there is something


def test_reports_come_back_and_the_last_word_counts(clickhouse: ClickHouse, raw: Any) -> None:
    final = replace(REPORT, status="reconciled", final=True, windows_pending=0, error="", reported_at_us=END_US + 2)
    later = replace(final, hour_us=END_US, revision=2, digest="ab" * 32)
    for row in (later, final, REPORT, final):  # an earlier word that arrives late changes nothing
        clickhouse.record_report(row)
    assert clickhouse.reports(START_US, END_US + HOUR_US) == [final, later]
    assert clickhouse.reports(START_US, END_US) == [final]
    columns = "toUnixTimestamp(hour) AS hour, toUnixTimestamp64Micro(reported_at) AS at"
    shown = raw.query(f"SELECT {columns} FROM reconciliation_reports FINAL ORDER BY hour").result_rows
    assert [tuple(row) for row in shown] == [(r.hour_us // 1_000_000, r.reported_at_us) for r in (final, later)]


def test_a_verdict_that_comes_back_is_told_again(clickhouse: ClickHouse) -> None:
    for after, status in enumerate(("unavailable", "pending", "unavailable")):
        clickhouse.record_report(replace(REPORT, status=status, reported_at_us=END_US + after))
    (found,) = clickhouse.reports(START_US, END_US)
    assert (found.status, found.reported_at_us) == ("unavailable", END_US + 2)


def test_old_rows_leave_every_table(clickhouse: ClickHouse, raw: Any, dsn: str, name: str) -> None:
    clickhouse.insert_events(factories.make_table(20), "old rows")
    clickhouse.record_report(REPORT)
    now_us = int(raw.command("SELECT toUnixTimestamp(now())")) * 1_000_000
    clickhouse.insert_events(factories.make_table(7, start_us=now_us - DAY_US), "new rows")
    clickhouse.record_report(replace(REPORT, hour_us=now_us - now_us % HOUR_US))
    with closing(open_clickhouse(dsn, name, retention_days=90)) as limited:
        for table in KEPT:
            raw.command(f"OPTIMIZE TABLE {table} FINAL")
        assert limited.totals() == (7, total_gpu_time_ns(factories.make_table(7, start_us=now_us - DAY_US)))
        hours = limited.hours_with_rows()
        assert hours
        assert min(hours) > now_us - 2 * DAY_US
        assert (limited.customer_usage(START_US, END_US), limited.device_hours(START_US, END_US)) == ([], [])
        assert [row.hour_us for row in limited.reports(0, now_us + DAY_US)] == [now_us - now_us % HOUR_US]
