"""What lies about a repair without being in its hour: rows under another hour, the rollup by hour, and how long rows
are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from render_platform.clickhouse import open_clickhouse
from render_platform.clock import DAY_US, HOUR_US
from render_platform.errors import Unavailable
from render_platform.events import Totals, UsageEvent, total_gpu_time_ns
from render_platform.pipeline import Platform
from tests import chdb_server
from tests.factories import make_events
from tests.stories import HOUR, deliver, fast_ids, open_story, record, run_in_clickhouse
from tests.test_clickhouse import engine  # noqa: F401  fixture
from tests.test_repair_rebuild import CLOSED

NEXT = HOUR + HOUR_US


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    with closing(open_story(tmp_path / "state", chdb_server.fresh_database(), now_us=CLOSED)) as opened:
        yield opened


def two_hours(platform: Platform) -> tuple[list[UsageEvent], list[UsageEvent]]:
    """Events of two hours, flushed; nothing is delivered yet."""
    found = [record(platform, make_events(n, n, start)) for n, start in ((20, HOUR), (15, NEXT))]
    platform.flush()
    return found[0], found[1]


def verdicts(platform: Platform) -> list[str]:
    return [platform.reconcile(hour).status for hour in (HOUR, NEXT)]


def moved_back(platform: Platform) -> None:
    """One event of the second hour stands in the first, which was reported before it came there."""
    first, second = two_hours(platform)
    deliver(platform, first)
    assert platform.reconcile(HOUR).status == "reconciled"
    strayed = replace(second[0], recorded_at=second[0].recorded_at - HOUR_US)
    deliver(platform, [strayed, *second[1:]], "strayed")


def test_an_event_that_stands_in_another_hour_is_not_inserted_a_second_time(platform: Platform) -> None:
    moved_back(platform)
    outcome = platform.repair(NEXT)
    assert outcome.after.status == "reconciled"
    assert (platform.clickhouse.totals().events, platform.clickhouse.duplicates()) == (35, 0)
    assert verdicts(platform) == ["reconciled", "reconciled"]
    assert platform.verify(deep=True).verified


def test_until_its_day_can_be_rebuilt_it_is_refused_and_the_other_hour_is_due(tmp_path: Path) -> None:
    with closing(open_story(tmp_path, chdb_server.fresh_database(), now_us=CLOSED - 1)) as platform:
        moved_back(platform)
        with pytest.raises(Unavailable, match="cannot be rebuilt before"):
            platform.repair(NEXT)
        assert HOUR in platform.hours.due()
        assert platform.clickhouse.duplicates() == 0
        assert verdicts(platform) == ["discrepant", "discrepant"]


@pytest.mark.parametrize("harm", ["TRUNCATE TABLE usage_hour", "ALTER TABLE usage_hour DELETE WHERE 1"])
def test_a_rollup_by_hour_that_lost_its_rows_is_seen_and_made_again(platform: Platform, harm: str) -> None:
    first, second = two_hours(platform)
    deliver(platform, first + second)
    assert verdicts(platform) == ["reconciled", "reconciled"]
    run_in_clickhouse(platform, f"{harm} SETTINGS mutations_sync = 2" if "ALTER" in harm else harm)
    report = platform.reconcile(HOUR)
    assert (report.status, report.rollup_equal) == ("discrepant", False)
    assert platform.reconciler.plan(HOUR).way == "rollup"
    assert platform.repair(HOUR).after.status == "reconciled"
    assert platform.clickhouse.hourly_totals(HOUR) == Totals(20, sum(event.gpu_time_ns for event in first))


def test_who_only_reads_takes_no_row_away(tmp_path: Path) -> None:
    """Not by a setting of its own: how long rows are kept is said by who writes them."""
    name = chdb_server.fresh_database()
    with closing(open_story(tmp_path, name, now_us=CLOSED)) as platform:
        first, _ = two_hours(platform)
        deliver(platform, first)
    with closing(open_story(tmp_path, name, now_us=CLOSED, retention_days=90, seed=9)) as reader:
        reader.reconciler.plan(HOUR)
        run_in_clickhouse(reader, "OPTIMIZE TABLE usage_events FINAL")
        assert len(fast_ids(reader)) == 20
    with closing(open_clickhouse(chdb_server.shared_dsn(), name, retention_days=90)):
        pass
    with closing(open_story(tmp_path, name, now_us=CLOSED, seed=10)) as reader:
        run_in_clickhouse(reader, "OPTIMIZE TABLE usage_events FINAL")
        assert fast_ids(reader) == []


def test_a_batch_with_a_row_of_another_hour_is_never_reconciled(platform: Platform) -> None:
    first, second = two_hours(platform)
    deliver(platform, first + second)
    entries = platform.slow.hour(HOUR)
    strange = [replace(entry, recorded_hour=NEXT) for entry in entries]
    platform.slow.hour = lambda _: strange  # type: ignore[method-assign, assignment]
    report = platform.reconcile(NEXT)
    assert report.status == "unavailable"
    assert "rows of another hour" in report.error
    assert sum(total_gpu_time_ns(table) for table in platform.slow.tables([NEXT])) > 0


def test_hours_that_are_no_longer_kept_are_not_called_unreconciled(platform: Platform) -> None:
    two_hours(platform)
    names = {name for name, _ in platform.hours.unreconciled()}
    assert "2023-11-16T18:00:00Z" in names
    assert platform.hours.unreconciled(CLOSED + DAY_US) == []
