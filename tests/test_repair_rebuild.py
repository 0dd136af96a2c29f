"""Repair by rebuilding a day: what is duplicated, altered or unexpected goes; nothing that is right is lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from render_platform.cas import path_of
from render_platform.clock import DAY_US, HOUR_US
from render_platform.errors import PlatformError, Unavailable
from render_platform.events import Totals, UsageEvent
from render_platform.pipeline import Platform
from tests import chdb_server
from tests.factories import make_events
from tests.stories import (
    AFTER_HOUR,
    DEADLINE_US,
    HOUR,
    deliver,
    fast_ids,
    finish_lane,
    logged,
    move_to,
    open_story,
    record,
    rollup_total,
    run_in_clickhouse,
)
from tests.test_clickhouse import engine  # noqa: F401  fixture
from tests.test_repair import again, assert_exact, states

DAY = HOUR - HOUR % DAY_US
CLOSED = DAY + DAY_US + DEADLINE_US
"""The first instant at which the first hour's day can be rebuilt."""
LAST_HOUR = DAY + DAY_US - HOUR_US
KEPT_DAYS = 20_000
"""ClickHouse itself goes by the machine's clock: with fewer days it would drop the rows."""


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    with closing(open_story(tmp_path / "state", chdb_server.fresh_database(), now_us=CLOSED)) as opened:
        yield opened


def recorded(platform: Platform, n: int = 40, seed: int = 1) -> list[UsageEvent]:
    """Events of the first hour, flushed, with every hour of the day declared."""
    made = record(platform, make_events(n, seed))
    platform.flush()
    return made


def duplicate(made: list[UsageEvent]) -> list[UsageEvent]:
    return [made[3]]


def alter(made: list[UsageEvent]) -> list[UsageEvent]:
    wrong = replace(made[3], gpu_time_ns=made[3].gpu_time_ns + 1)
    made[3] = wrong
    return []


def move(made: list[UsageEvent]) -> list[UsageEvent]:
    made[3] = replace(made[3], customer_ref="ab" * 32)
    return []


def add(_made: list[UsageEvent]) -> list[UsageEvent]:
    return make_events(2, 77)


def everything(made: list[UsageEvent]) -> list[UsageEvent]:
    del made[10:15]
    return [*duplicate(made), *add(made), *move(made)]


Harm = Callable[[list[UsageEvent]], list[UsageEvent]]


@pytest.mark.parametrize("harm", [duplicate, alter, move, add, everything])
def test_a_closed_day_is_made_again_whatever_is_wrong_in_it(platform: Platform, harm: Harm) -> None:
    made = recorded(platform)
    fast = list(made)
    more = harm(fast)
    deliver(platform, fast)
    deliver(platform, more, "more")
    assert platform.reconciler.plan(HOUR).way == "rebuild"
    outcome = platform.repair(HOUR)
    assert (outcome.way, outcome.inserted, outcome.refused) == ("rebuild", 0, "")
    assert (outcome.before.status, outcome.after.status) == ("discrepant", "reconciled")
    assert outcome.after.revision == 2
    assert outcome.after.findings == ()
    assert_exact(platform, made)
    assert states(platform) == ["rebuilt"]
    before = platform.log.published()
    assert platform.repair(HOUR).way == "nothing"
    assert platform.log.published() == before, "a second repair logs nothing"
    assert platform.verify(deep=True).verified


def test_every_hour_of_the_day_is_made_again_and_reconciled_again(platform: Platform) -> None:
    made = record(platform, [*make_events(20, 1), *make_events(10, 2, LAST_HOUR)])
    platform.flush()
    deliver(platform, made)
    deliver(platform, [made[0], made[-1]], "again")
    assert [platform.reconcile(hour).status for hour in (HOUR, LAST_HOUR)] == ["discrepant"] * 2
    platform.repair(HOUR)
    reports = {hour: platform.hours.last_report(hour) for hour in range(HOUR, DAY + DAY_US, HOUR_US)}
    assert {report.status for report in reports.values() if report} == {"reconciled"}
    last = reports[LAST_HOUR]
    assert last is not None
    assert (last.revision, last.dirty) == (2, False)
    assert platform.hours.due() == []
    assert platform.clickhouse.totals() == (30, sum(event.gpu_time_ns for event in made))


def test_hours_of_several_lanes_and_batches_are_one_day(tmp_path: Path) -> None:
    name = chdb_server.fresh_database()
    with closing(open_story(tmp_path, name, now_us=CLOSED, batch_rows=7, seal_rows_a_transaction=3)) as platform:
        made = record(platform, make_events(20, 1))
        made += record(platform, make_events(15, 2), "trace/a")
        made += record(platform, make_events(5, 3, DAY + HOUR_US), "trace/b")
        for lane in ("trace/a", "trace/b"):
            finish_lane(platform, lane, CLOSED)
        platform.flush()
        deliver(platform, made)
        deliver(platform, make_events(3, 77), "strangers")
        assert platform.repair(HOUR).after.status == "reconciled"
        assert platform.clickhouse.totals() == (40, sum(event.gpu_time_ns for event in made))
        assert platform.reconcile(DAY + HOUR_US).status == "reconciled"
        [entry] = logged(platform, "repair")
        found = json.loads(platform.cas.get(str(entry.subject_digest)))
        assert set(found["batches"]) == {batch.subject_digest for batch in logged(platform, "usage_batch")}


def test_the_rebuild_is_logged_with_its_record_before_the_reports_that_follow(platform: Platform) -> None:
    made = recorded(platform)
    deliver(platform, made)
    deliver(platform, made[:2], "again")
    first = platform.reconcile(HOUR)
    platform.repair(HOUR)
    [entry] = logged(platform, "repair")
    gpu_time_ns = sum(event.gpu_time_ns for event in made)
    assert (entry.recorded_hour, entry.records, entry.gpu_time_ns) == (DAY, 40, gpu_time_ns)
    found = json.loads(platform.cas.get(str(entry.subject_digest)))
    assert list(found)[:4] == ["version", "repair_id", "kind", "day"]
    assert (found["version"], found["kind"], found["day"]) == (2, "rebuild", DAY)
    assert entry.batch_id == f"2023-11-16/{found['repair_id']}"
    assert (found["records"], found["gpu_time_ns"]) == (40, gpu_time_ns)
    twice = sum(event.gpu_time_ns for event in made[:2])
    assert found["before"] == {"records": 42, "gpu_time_ns": gpu_time_ns + twice}
    assert found["batches"] == [batch.subject_digest for batch in logged(platform, "usage_batch")]
    assert [one["hour"] for one in found["hours"]] == list(range(HOUR, DAY + DAY_US, HOUR_US))
    reports = [report.subject_digest for report in logged(platform, "reconciliation")]
    assert found["hours"][0]["report"] == reports[0]
    assert platform.cas.get(str(reports[0])) == first.to_bytes()


def test_a_rollup_that_alone_is_wrong_is_mended_without_a_rebuild(platform: Platform) -> None:
    made = recorded(platform)
    deliver(platform, made)
    run_in_clickhouse(platform, "TRUNCATE TABLE usage_minute")
    assert platform.reconciler.plan(HOUR).way == "rollup"
    outcome = platform.repair(HOUR)
    assert (outcome.way, outcome.after.status) == ("rollup", "reconciled")
    assert_exact(platform, made)


def test_an_hour_that_holds_nothing_but_strangers_is_emptied(platform: Platform) -> None:
    made = recorded(platform)
    deliver(platform, [*made, *make_events(4, 2, LAST_HOUR)])
    assert platform.repair(LAST_HOUR).after.status == "reconciled"
    assert_exact(platform, made)


def test_a_day_without_any_event_loses_its_strangers(platform: Platform) -> None:
    """The live lane declared every hour of the second day empty."""
    made = recorded(platform)
    move_to(platform, CLOSED + DAY_US)
    platform.flush()
    deliver(platform, [*made, *make_events(4, 2, DAY + DAY_US)])
    assert platform.repair(DAY + DAY_US).after.status == "reconciled"
    assert_exact(platform, made)


# Where it is refused.


def left_alone(platform: Platform, said: str) -> None:
    """The repair is refused for that reason; ClickHouse and the log's repairs stay as they are."""
    before = fast_ids(platform), rollup_total(platform)
    plan, outcome = platform.reconciler.plan(HOUR), platform.repair(HOUR)
    assert said in plan.refused
    assert said in outcome.refused
    assert (plan.way, outcome.way, outcome.after.status) == ("nothing", "nothing", "discrepant")
    assert (fast_ids(platform), rollup_total(platform)) == before
    assert (logged(platform, "repair"), states(platform)) == ([], [])


def test_a_day_that_is_not_over_is_refused_and_says_from_when_on(tmp_path: Path) -> None:
    with closing(open_story(tmp_path, chdb_server.fresh_database(), now_us=AFTER_HOUR)) as platform:
        made = recorded(platform)
        deliver(platform, made)
        deliver(platform, made[:1], "again")
        left_alone(platform, "2023-11-16 cannot be rebuilt before 2023-11-17T00:01:00Z")
        move_to(platform, CLOSED - 1)
        left_alone(platform, "before 2023-11-17T00:01:00Z")
        move_to(platform, CLOSED)
        left_alone(platform, "is not closed (run `render-platform flush`")
        platform.flush()
        assert platform.repair(HOUR).after.status == "reconciled"


def test_while_the_day_is_not_over_what_is_missing_is_inserted_all_the_same(tmp_path: Path) -> None:
    with closing(open_story(tmp_path, chdb_server.fresh_database(), now_us=AFTER_HOUR)) as platform:
        made = recorded(platform)
        deliver(platform, made[5:])
        deliver(platform, made[-1:], "again")
        outcome = platform.repair(HOUR)
        assert (outcome.way, outcome.inserted, outcome.after.status) == ("insert", 5, "discrepant")
        assert "cannot be rebuilt before" in outcome.refused
        assert sorted(fast_ids(platform)) == sorted(str(event.event_id) for event in [*made, made[-1]])


def test_a_trace_that_may_still_record_into_the_day_keeps_it_from_a_rebuild(platform: Platform) -> None:
    made = recorded(platform)
    deliver(platform, made)
    deliver(platform, made[:1], "again")
    platform.reconcile(HOUR)
    later = record(platform, make_events(5, 9, HOUR + HOUR_US), "trace/open")
    platform.flush()
    left_alone(platform, "T19h is not closed")
    finish_lane(platform, "trace/open", CLOSED)
    platform.flush()
    assert platform.repair(HOUR).after.status == "reconciled"
    assert platform.clickhouse.totals().events == len(made) + len(later)


def test_rows_that_are_not_published_yet_keep_a_day_from_a_rebuild(platform: Platform) -> None:
    made = recorded(platform)
    deliver(platform, made)
    deliver(platform, made[:1], "again")
    record(platform, make_events(5, 9, HOUR + HOUR_US), "trace/1")
    finish_lane(platform, "trace/1", CLOSED)
    left_alone(platform, "T19h is not closed")


def test_rows_of_an_hour_that_no_lane_covers_are_not_taken_away(platform: Platform) -> None:
    """Nothing says what they are: whoever put them there has to be asked."""
    made = recorded(platform)
    deliver(platform, [*made, *make_events(2, 9, DAY)])
    deliver(platform, made[:1], "again")
    left_alone(platform, "no lane covers 2023-11-16T00h, and there are rows of it")
    unknown = platform.reconciler.plan(DAY)
    assert (unknown.way, "no lane ever recorded into 2023-11-16T00h" in unknown.refused) == ("nothing", True)
    assert platform.repair(DAY).refused == unknown.refused


def test_an_expired_day_is_refused(tmp_path: Path) -> None:
    name = chdb_server.fresh_database()
    with closing(open_story(tmp_path, name, now_us=CLOSED, retention_days=KEPT_DAYS)) as platform:
        recorded(platform)
        move_to(platform, DAY + KEPT_DAYS * DAY_US + 1)  # the hour is kept still, the day's begin is not
        [stranger] = make_events(1, 77)
        deliver(platform, [stranger])
        assert "expired" in platform.reconciler.plan(HOUR).refused
        move_to(platform, HOUR + KEPT_DAYS * DAY_US + 1)
        assert "expired" in platform.reconciler.plan(HOUR).refused
        with pytest.raises(Unavailable, match="expired"):
            platform.repair(HOUR)


# The plan is only read.


class ReadOnly:
    """ClickHouse that refuses every call that writes."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def close(self) -> None:
        """It is the other platform's."""

    def __getattr__(self, name: str) -> Any:
        if name in ("insert_events", "rebuild_day", "rebuild_rollup", "record_report"):
            raise AssertionError(f"a plan called {name}")
        return getattr(self._real, name)


@pytest.mark.parametrize("harm", [duplicate, everything])
def test_a_plan_writes_nothing(platform: Platform, harm: Harm) -> None:
    made = recorded(platform)
    fast = list(made)
    deliver(platform, harm(fast), "more")
    deliver(platform, fast)
    before = platform.log.published(), sorted(platform.blobs.names())
    with closing(again(platform)) as reader:
        reader.__dict__["clickhouse"] = ReadOnly(platform.clickhouse)
        plan = reader.reconciler.plan(HOUR)
    assert (plan.way, plan.report.status) == ("rebuild", "discrepant")
    assert (platform.log.published(), sorted(platform.blobs.names())) == before
    assert platform.hours.last_report(HOUR) is None
    assert states(platform) == []


# A batch that is not what the log says stops it before anything is swapped.


@pytest.mark.parametrize("harm", ["remove", "flip"])
def test_a_batch_that_cannot_be_trusted_stops_the_rebuild(platform: Platform, harm: str) -> None:
    made = record(platform, [*make_events(20, 1), *make_events(10, 2, LAST_HOUR)])
    platform.flush()
    deliver(platform, made)
    deliver(platform, made[:1], "again")
    other = next(entry for entry in logged(platform, "usage_batch") if entry.recorded_hour == LAST_HOUR)
    path = platform.settings.blobs_dir / path_of(str(other.subject_digest))
    kept = path.read_bytes()
    path.unlink()
    if harm == "flip":
        path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(PlatformError, match=path.name):
        platform.repair(HOUR)
    assert len(fast_ids(platform)) == 21, "nothing was swapped"
    path.write_bytes(kept)
    assert states(platform) == ["rebuilding"]
    assert platform.repair(HOUR).after.status == "reconciled"
    assert states(platform) == ["rebuilt"]


class Overtaken:
    """ClickHouse, where a lane comes into the first hour while its day is rebuilt: staged whole, and not swapped."""

    def __init__(self, platform: Platform, *, after_the_look: bool) -> None:
        self._platform, self._after_the_look = platform, after_the_look
        self.late: list[UsageEvent] = []

    def rebuild_day(self, day_us: int, tables: Iterator[pa.Table], expected: Totals, ready: Callable[[], None]) -> None:
        def overtaken() -> None:
            if self._after_the_look:
                ready()
            self.late = record(self._platform, make_events(3, 5, HOUR), "trace/late")
            deliver(self._platform, self.late)
            if not self._after_the_look:
                ready()

        self._platform.clickhouse.rebuild_day(day_us, tables, expected, overtaken)

    def close(self) -> None:
        """It is the other platform's."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform.clickhouse, name)


def test_a_lane_that_comes_into_the_day_while_it_is_staged_stops_the_rebuild(platform: Platform) -> None:
    made = recorded(platform)
    deliver(platform, made)
    deliver(platform, made[:1], "again")
    with closing(again(platform)) as slow:
        slow.__dict__["clickhouse"] = Overtaken(platform, after_the_look=False)
        with pytest.raises(Unavailable, match="opened again"):
            slow.repair(HOUR)
    assert len(fast_ids(platform)) == 44, "nothing was swapped"


def test_what_a_lane_delivers_in_the_instant_before_the_swap_comes_back_by_an_insert(platform: Platform) -> None:
    """The slow path keeps it; the fast one loses it, which the lane's next report tells and its repair mends."""
    made = recorded(platform)
    deliver(platform, made)
    deliver(platform, made[:1], "again")
    with closing(again(platform)) as slow:
        slow.__dict__["clickhouse"] = overtaken = Overtaken(platform, after_the_look=True)
        assert slow.repair(HOUR).way == "rebuild"
    assert len(fast_ids(platform)) == len(made), "the late rows went with the swap"
    finish_lane(platform, "trace/late", CLOSED)
    platform.flush()
    assert HOUR in platform.hours.due()
    report = platform.reconcile(HOUR)
    assert (report.status, report.count("missing")) == ("discrepant", 3)
    assert report.missing == tuple(sorted(str(event.event_id) for event in overtaken.late))
    outcome = platform.repair(HOUR)
    assert (outcome.way, outcome.inserted, outcome.after.status) == ("insert", 3, "reconciled")
    assert_exact(platform, [*made, *overtaken.late])
