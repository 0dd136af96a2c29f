"""Late events: a batch that is logged into hours that were reported opens exactly these again, once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from render_platform.clock import HOUR_US
from render_platform.events import UsageEvent
from render_platform.hours import LastReport
from render_platform.pipeline import Platform
from tests import chdb_server
from tests.factories import make_events
from tests.stories import DEADLINE_US, HOUR, deliver, finish_lane, logged, open_story, record

HOURS = [HOUR, HOUR + HOUR_US, HOUR + 2 * HOUR_US]
LATE = "trace/late"


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    """Three hours of events, delivered and reported."""
    now = HOUR + 3 * HOUR_US + DEADLINE_US
    with closing(open_story(tmp_path / "state", chdb_server.fresh_database(), now_us=now)) as opened:
        made = record(opened, make_events(60, 1, HOUR, 3 * HOUR_US))
        opened.flush()
        deliver(opened, made)
        assert [opened.reconcile(hour).status for hour in HOURS] == ["reconciled"] * 3
        assert opened.hours.due() == []
        yield opened


def come_late(platform: Platform, seed: int = 7) -> list[UsageEvent]:
    """Events of the first and the third hour, recorded by another lane, published and not delivered."""
    made = [*make_events(4, seed, HOURS[0]), *make_events(3, seed + 1, HOURS[2])]
    recorded = record(platform, made, LATE)
    finish_lane(platform, LATE, HOURS[2] + HOUR_US)
    platform.flush()
    return recorded


def reports(platform: Platform) -> list[LastReport]:
    return [report for hour in HOURS if (report := platform.hours.last_report(hour)) is not None]


def test_exactly_the_hours_that_late_events_touch_are_due_again_and_once(platform: Platform) -> None:
    before = reports(platform)
    late = come_late(platform)
    assert platform.hours.due() == [HOURS[0], HOURS[2]]
    platform.flush()
    assert platform.hours.due() == [HOURS[0], HOURS[2]], "another flush opens nothing more"
    first, second, third = (platform.reconcile(hour) for hour in HOURS)
    assert (first.revision, second.revision, third.revision) == (2, 1, 2)
    assert platform.hours.due() == []
    assert reports(platform)[1] == before[1], "the hour in between keeps its report"
    assert [entry.batch_id for entry in logged(platform, "reconciliation")] == [
        *(f"2023-11-16T{hour}/r1" for hour in (18, 19, 20)),
        "2023-11-16T18/r2",
        "2023-11-16T20/r2",
    ]
    assert {*first.missing, *third.missing} == {str(event.event_id) for event in late}


def test_the_new_revision_says_what_has_changed(platform: Platform) -> None:
    old = platform.reconcile(HOURS[0])
    late = [event for event in come_late(platform) if event.recorded_at < HOURS[1]]
    new = platform.reconcile(HOURS[0])
    assert (old.status, new.status) == ("reconciled", "discrepant")
    assert set(old.batches) < set(new.batches)
    assert len(new.batches) == len(old.batches) + 1
    assert new.total("events") - old.total("events") == len(late) == new.count("missing")
    assert new.total("gpu_time_ns") - old.total("gpu_time_ns") == sum(event.gpu_time_ns for event in late)
    assert new.total("fast_events") == old.total("fast_events")


def test_a_second_look_changes_nothing(platform: Platform) -> None:
    come_late(platform)
    first = [platform.reconcile(hour).to_bytes() for hour in HOURS]
    before = platform.log.published(), reports(platform)
    assert [platform.reconcile(hour).to_bytes() for hour in HOURS] == first
    assert (platform.log.published(), reports(platform)) == before


def test_repair_of_the_hours_that_are_due_settles_them(platform: Platform) -> None:
    late = come_late(platform)
    inserted = [platform.repair(hour).inserted for hour in platform.hours.due()]
    assert inserted == [4, 3]
    assert platform.hours.due() == []
    assert [(report.status, report.revision) for report in reports(platform)] == [
        ("reconciled", 3),
        ("reconciled", 1),
        ("reconciled", 3),
    ]
    assert platform.clickhouse.totals().events == 60 + len(late)
