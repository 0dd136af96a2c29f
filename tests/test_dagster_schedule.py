"""The schedule: the current hour every five minutes, every closed hour once, and nothing that is due forgotten."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest
from dagster_duckdb import DuckDBResource
from hypothesis import given
from hypothesis import strategies as st

from assets.jobs import HOURS, RANGE, hour_key, hours_of, ranges, tags_of
from definitions import defs
from render_platform.clock import DAY_US, HOUR_US, hour_of
from render_platform.events import table_from_events
from resources.platform import PlatformResource
from sensors.schedules import MAX_FAILURES, MAX_RUNS, _in_turn, reconciliation_every_five_minutes
from tests.factories import START_US
from tests.platforms import LIVE, record
from tests.postgres import CHOSEN
from tests.test_dagster_layer import (
    LANE,
    NOWHERE,
    Location,
    location,  # noqa: F401  fixtures
    sound_events,
)
from tests.test_dagster_runs import an_hour_passes

LATER = datetime(2023, 12, 1, 3, 5, tzinfo=UTC)
"""A tick whose own hour nothing covers."""


def tick(location: Location, at: datetime = LATER, resource: PlatformResource | None = None) -> list[dg.RunRequest]:
    """What one tick asks for; nothing where it skips."""
    result = evaluate(location.instance, at, resource or location.resource)
    return [] if isinstance(result, dg.SkipReason) else result


def skipped(location: Location, at: datetime = LATER) -> str:
    result = evaluate(location.instance, at, location.resource)
    assert isinstance(result, dg.SkipReason), result
    return str(result.skip_message)


def evaluate(
    instance: dg.DagsterInstance, at: datetime, resource: PlatformResource
) -> list[dg.RunRequest] | dg.SkipReason:
    with dg.build_schedule_context(
        instance=instance, scheduled_execution_time=at, resources={"platform": resource}
    ) as context:
        result = reconciliation_every_five_minutes(context)
    assert isinstance(result, list | dg.SkipReason)
    return result


def asked(requests: Iterable[dg.RunRequest]) -> list[list[str]]:
    """The hours of each request, by their place after START_US's."""
    found = []
    for request in requests:
        run = dg.DagsterRun(job_name="reconcile", tags=all_tags(request))
        found.append([str((hour - START_US) // HOUR_US) for hour in hours_of(run)])
    return found


def all_tags(request: dg.RunRequest) -> dict[str, str]:
    tags = {name: str(value) for name, value in request.tags.items()}
    return {**tags, "dagster/partition": request.partition_key} if request.partition_key else tags


def record_hours(location: Location, rng: random.Random, hours: Sequence[int]) -> None:
    """Three events in each of some closed hours, after START_US's, flushed and delivered."""
    last = max(hours)
    made = [event for hour in hours for event in sound_events(rng, 3, START_US + hour * HOUR_US)]
    recorded = record(location.platform, LANE, made)
    location.platform.clickhouse.insert_events(table_from_events(recorded), "first")
    location.finish_lane(last + 1)
    location.dagster.flush()


def launch(location: Location, request: dg.RunRequest, status: dg.DagsterRunStatus) -> dg.DagsterRun:
    """A run of the request that stands in the instance with a status, as the daemon would have made it."""
    job = defs.resolve_job_def("reconcile")
    run = location.instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED, tags=all_tags(request))
    if status == dg.DagsterRunStatus.FAILURE:
        location.instance.report_run_failed(run)
    return run


def test_it_is_every_five_minutes_utc() -> None:
    schedule = defs.resolve_schedule_def("reconciliation_every_five_minutes")
    assert (schedule.cron_schedule, schedule.execution_timezone) == ("*/5 * * * *", "UTC")
    assert schedule.job_name == "reconcile"
    assert schedule.default_status == dg.DefaultScheduleStatus.RUNNING


def test_it_picks_the_hour_of_the_time_less_a_second(location: Location, rng: random.Random) -> None:
    record(location.platform, LANE, sound_events(rng, 3))
    location.finish_lane(2)
    keys = {}
    for hour, minute in ((18, 5), (18, 55), (19, 0), (19, 5)):
        (request,) = tick(location, datetime(2023, 11, 16, hour, minute, tzinfo=UTC))
        keys[hour, minute] = str(request.partition_key)
        assert HOURS.has_partition_key(keys[hour, minute])
        assert request.run_key == f"2023-11-16T{hour:02d}:{minute:02d}:00+00:00/{keys[hour, minute]}"
    assert keys == {
        (18, 5): "2023-11-16-18:00",
        (18, 55): "2023-11-16-18:00",
        (19, 0): "2023-11-16-18:00",
        (19, 5): "2023-11-16-19:00",
    }


@pytest.mark.parametrize("hour", [17, 22])
def test_it_skips_an_hour_that_nothing_covers(location: Location, rng: random.Random, hour: int) -> None:
    record(location.platform, LANE, sound_events(rng, 3))
    location.finish_lane(1)
    assert f"2023-11-16-{hour}:00" in skipped(location, datetime(2023, 11, 16, hour, 30, tzinfo=UTC))


@pytest.mark.skipif(CHOSEN, reason="a server's database is a state")
def test_it_skips_where_there_is_no_state(location: Location, tmp_path: Path) -> None:
    resource = PlatformResource(state_dir=str(tmp_path / "none"), duckdb=DuckDBResource(database=":memory:"))
    result = evaluate(location.instance, LATER, resource)
    assert isinstance(result, dg.SkipReason)
    assert "no platform state" in str(result.skip_message)


def test_a_closed_hour_is_asked_for_until_it_is_reported_and_then_no_more(
    location: Location, rng: random.Random
) -> None:
    record_hours(location, rng, [0])
    for _ in range(2):
        assert asked(tick(location)) == [["0"]], "nobody has reconciled it yet"
    location.dagster.reconcile([START_US])
    for minutes in (0, 5, 60):
        assert "every closed hour is reported" in skipped(location, LATER + timedelta(minutes=minutes))


def test_hours_of_a_day_on_which_the_daemon_was_down_are_one_run(location: Location, rng: random.Random) -> None:
    record_hours(location, rng, range(26))
    (request,) = tick(location)
    assert asked([request]) == [[str(hour) for hour in range(26)]]
    assert request.partition_key is None
    done = defs.resolve_job_def("reconcile").execute_in_process(
        instance=location.instance, tags=dict(request.tags), raise_on_error=False
    )
    assert done.success
    assert {report.partition for report in location.materializations("reconciliation")} == {
        hour_key(START_US + hour * HOUR_US) for hour in range(26)
    }
    assert "every closed hour is reported" in skipped(location)


def test_an_hour_that_a_late_batch_re_opened_is_asked_for_once_more(location: Location, rng: random.Random) -> None:
    record_hours(location, rng, range(3))
    location.dagster.reconcile([START_US + hour * HOUR_US for hour in range(3)])
    late = record(location.platform, "trace/late", sound_events(rng, 2, START_US + HOUR_US))
    location.platform.clickhouse.insert_events(table_from_events(late), "late")
    with location.platform.database.write() as connection:
        location.platform.outbox.finish_lane(connection, "trace/late", START_US + 3 * HOUR_US)
    location.dagster.flush()
    assert asked(tick(location)) == [["1"]]
    location.dagster.reconcile([START_US + HOUR_US])
    assert tick(location) == []


def test_a_discrepant_hour_is_not_asked_for_again(location: Location, rng: random.Random) -> None:
    made = record(location.platform, LANE, sound_events(rng, 5))
    location.platform.clickhouse.insert_events(table_from_events(made[:3]), "first")
    location.finish_lane(1)
    location.dagster.flush()
    location.dagster.reconcile([START_US])
    assert location.platform.hours.unreconciled() == [("2023-11-16T18:00:00Z", "discrepant")]
    assert tick(location) == []


def test_an_hour_that_could_not_be_read_is_asked_for_again(location: Location, rng: random.Random) -> None:
    record_hours(location, rng, [0])
    location.patch.setenv("RENDER_PLATFORM_CLICKHOUSE_DSN", NOWHERE)
    keys = set()
    for minutes in (0, 5):
        (request,) = tick(location, LATER + timedelta(minutes=minutes))
        keys.add(request.run_key)
        assert not location.run("reconcile", request.partition_key).success
    assert len(keys) == 2, "a key that comes again is never launched again"


def test_what_fails_again_and_again_waits_and_holds_up_nothing(location: Location, rng: random.Random) -> None:
    record_hours(location, rng, [0, 1, 2])
    broken = dg.RunRequest(partition_key=hour_key(START_US + HOUR_US))
    for failures in range(1, MAX_FAILURES):
        launch(location, broken, dg.DagsterRunStatus.FAILURE)
        assert asked(tick(location)) == [["2"], ["0"], ["1"]], f"after {failures} failures: last, and still"
    launch(location, broken, dg.DagsterRunStatus.FAILURE)
    assert asked(tick(location)) == [["2"], ["0"]]
    location.dagster.reconcile([START_US, START_US + 2 * HOUR_US])
    assert "1 due hours are in runs already, or failed 3 times" in skipped(location)
    an_hour_passes(location)
    assert asked(tick(location)) == [["1"]]


def test_hours_that_a_run_is_at_are_left_to_it_until_it_is_given_up(location: Location, rng: random.Random) -> None:
    record_hours(location, rng, range(4))
    first, last = START_US, START_US + 2 * HOUR_US
    run = launch(location, dg.RunRequest(tags=tags_of(first, last)), dg.DagsterRunStatus.STARTED)
    assert asked(tick(location)) == [["3"]]
    current = datetime(2023, 11, 16, 20, 30, tzinfo=UTC)
    assert asked(tick(location, current)) == [["3"]], "nor is the current hour queued twice"
    an_hour_passes(location)
    assert asked(tick(location)) == [["0", "1", "2", "3"]], "its process was killed, and nobody ended it"
    location.instance.report_run_canceled(run)
    assert asked(tick(location)) == [["0", "1", "2", "3"]]


def test_what_clickhouse_no_longer_keeps_is_not_asked_for(location: Location, rng: random.Random) -> None:
    record_hours(location, rng, [0])
    now = location.platform.clock.now_us()
    recent = hour_of(now - 2 * DAY_US)
    record(location.platform, LIVE, sound_events(rng, 3, recent))
    with location.platform.database.write() as connection:
        location.platform.outbox.finish_lane(connection, LIVE, recent + HOUR_US)
    location.dagster.flush()
    assert len(tick(location)) == 2
    location.patch.setenv("RENDER_PLATFORM_RETENTION_DAYS", "90")
    (request,) = tick(location)
    assert int(asked([request])[0][0]) == (recent - START_US) // HOUR_US


def test_one_tick_asks_for_a_bounded_number_of_runs_and_the_next_for_others(
    location: Location, rng: random.Random
) -> None:
    record_hours(location, rng, range(0, 40, 2))
    hours = [START_US + hour * HOUR_US for hour in range(1, 40, 2)]
    for hour in hours:  # hours without events are declared empty, and are due as well: take them out
        location.platform.reconcile(hour)
    seen = []
    while requests := tick(location):
        assert len(requests) <= MAX_RUNS
        seen += asked(requests)
        for request in requests:
            launch(location, request, dg.DagsterRunStatus.STARTED)
    assert sorted(int(one) for (one,) in seen) == list(range(0, 40, 2))


# Ranges.


@given(st.sets(st.integers(0, 2_000)))
def test_ranges_are_the_hours_without_holes_and_bounded(places: set[int]) -> None:
    found = ranges(place * HOUR_US for place in places)
    inside = [hour for first, last in found for hour in range(first, last + HOUR_US, HOUR_US)]
    assert inside == sorted(place * HOUR_US for place in places)
    assert all(last - first < RANGE * HOUR_US for first, last in found)
    assert len(found) <= 1 + len(places) // RANGE + sum(place + 1 not in places for place in places)


@given(st.sets(st.integers(0, 50)), st.dictionaries(st.integers(0, 50), st.integers(0, 2)))
def test_the_least_failed_come_first_and_every_hour_comes(places: set[int], failed: dict[int, int]) -> None:
    failures = Counter({place * HOUR_US: n for place, n in failed.items()})
    found = _in_turn([place * HOUR_US for place in sorted(places)], failures)
    hours = [hour for first, last in found for hour in range(first, last + HOUR_US, HOUR_US)]
    assert sorted(hours) == sorted(place * HOUR_US for place in places)
    counts = [failures[first] for first, _ in found]
    assert counts == sorted(counts)
    assert all(len({failures[hour] for hour in range(first, last + 1, HOUR_US)}) == 1 for first, last in found)
    assert found == sorted(found, key=lambda one: (failures[one[0]], -one[0]))
