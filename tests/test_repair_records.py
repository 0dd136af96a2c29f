"""Records of repairs, of both versions: what they say, who reads them, and reports that dashboards read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import structlog

from render_platform.canonical import digest_of, encode
from render_platform.clock import HOUR_US
from render_platform.errors import Unavailable
from render_platform.events import UsageEvent
from render_platform.pipeline import Platform
from render_platform.repair import repairs
from tests import chdb_server
from tests.commands import run_inside
from tests.factories import make_events
from tests.stories import HOUR, HandMade, deliver, finish_lane, logged, open_story, record, said
from tests.test_clickhouse import engine  # noqa: F401  fixture
from tests.test_recovery import backup, restore
from tests.test_repair import again
from tests.test_repair_rebuild import CLOSED, DAY


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    with closing(open_story(tmp_path / "state", chdb_server.fresh_database(), now_us=CLOSED)) as opened:
        yield opened


def repaired_twice(platform: Platform) -> list[UsageEvent]:
    """An insert of the first hour, and a rebuild of its day."""
    made = record(platform, make_events(20, 1))
    platform.flush()
    deliver(platform, made[4:])
    assert platform.repair(HOUR).way == "insert"
    deliver(platform, made[-1:], "again")
    assert platform.repair(HOUR).way == "rebuild"
    return made


def rows(platform: Platform) -> list[tuple[Any, ...]]:
    with platform.database.read() as connection:
        return [tuple(row) for row in connection.execute(sa.select(repairs).order_by(repairs.c.repair_id))]


def test_a_database_that_is_older_than_its_repairs_gets_them_back_from_the_log(platform: Platform) -> None:
    folder = platform.settings.state_dir
    record(platform, make_events(3, 8), "trace/1")
    finish_lane(platform, "trace/1", CLOSED)
    platform.flush()
    backup(folder)
    repaired_twice(platform)
    before = rows(platform)
    last = platform.hours.last_report(HOUR)
    assert [row[2] for row in before] == ["logged", "rebuilt"]
    platform.close()
    restore(folder)
    assert run_inside("recover", "--state", folder).code == 0
    with closing(again(platform)) as restored:
        assert rows(restored) == before
        assert restored.hours.last_report(HOUR) == last
        assert restored.verify(deep=True).verified


def test_an_abandoned_insert_of_an_old_database_is_not_taken_up_again(platform: Platform) -> None:
    """The backup holds a plan; the log says that the day was rebuilt after it."""
    folder = platform.settings.state_dir
    made = record(platform, make_events(20, 1))
    platform.flush()
    deliver(platform, [*made[4:]])
    plan = platform.repairs.plan(HOUR, [str(event.event_id) for event in made[:4]])
    backup(folder)
    deliver(platform, made[-1:], "again")
    assert platform.repair(HOUR).way == "rebuild"
    platform.close()
    restore(folder)
    assert run_inside("recover", "--state", folder).code == 0
    with closing(again(platform)) as restored:
        assert plan is not None
        assert {row[0]: row[2] for row in rows(restored)}[plan.repair_id] == "abandoned"
        assert restored.reconciler.plan(HOUR).way == "nothing"


@pytest.mark.parametrize(
    ("name", "wrong"), [("day", DAY + HOUR_US), ("records", 6), ("gpu_time_ns", 1), ("kind", "other")]
)
def test_a_rebuilds_record_that_says_other_than_its_entry_is_found(tmp_path: Path, name: str, wrong: Any) -> None:
    record = {"version": 2, "repair_id": "x", "kind": "rebuild", "day": DAY, "records": 5, "gpu_time_ns": 7}
    with closing(HandMade(tmp_path)) as made:
        for values in (record, {**record, name: wrong}):
            data = encode(values)
            made.entry(
                "repair",
                recorded_hour=DAY,
                subject_digest=made.cas.put(data),
                subject_size=len(data),
                records=5,
                gpu_time_ns=7,
            )
        outcome = made.verify()
        assert len(outcome.problems) == 1, said(outcome)
        assert digest_of(encode({**record, name: wrong}))[2:] in outcome.problems[0].where


# What dashboards read.


def test_each_verdict_is_told_to_clickhouse(platform: Platform) -> None:
    made = record(platform, make_events(20, 1))
    platform.flush()
    deliver(platform, made[4:])
    first = platform.reconcile(HOUR)
    platform.repair(HOUR)
    told = platform.clickhouse.reports(HOUR, HOUR + HOUR_US)
    assert [(row.revision, row.status, row.final, row.missing) for row in told] == [
        (1, "discrepant", True, 4),
        (2, "reconciled", True, 0),
    ]
    assert (told[0].events, told[0].fast_events, told[0].windows_pending, told[0].error) == (20, 16, 0, "")
    assert told[0].digest == digest_of(first.to_bytes()) == logged(platform, "reconciliation")[0].subject_digest
    assert {row.reported_at_us for row in told} == {CLOSED}
    assert "reported_at" not in json.loads(first.to_bytes())


def test_a_provisional_verdict_is_told_too(platform: Platform) -> None:
    record(platform, make_events(20, 1))
    assert platform.reconcile(HOUR).status == "pending"
    [row] = platform.clickhouse.reports(HOUR, HOUR + HOUR_US)
    assert (row.status, row.final, row.windows_pending > 0) == ("pending", False, True)


class Deaf:
    """ClickHouse that takes no reports."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def record_report(self, _row: object) -> None:
        raise Unavailable("no room for reports")

    def close(self) -> None:
        """It is the other platform's."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def test_a_verdict_that_cannot_be_told_is_logged_and_stands(platform: Platform) -> None:
    deliver(platform, record(platform, make_events(20, 1)))
    platform.flush()
    with closing(again(platform)) as other, structlog.testing.capture_logs() as logs:
        other.__dict__["clickhouse"] = Deaf(platform.clickhouse)
        assert other.reconcile(HOUR).status == "reconciled"
    [line] = [line for line in logs if line["event"] == "report_not_in_clickhouse"]
    assert (line["hour"], "no room" in line["error"]) == ("2023-11-16T18:00:00Z", True)
    assert platform.clickhouse.reports(HOUR, HOUR + HOUR_US) == []
