"""The checks of what runs all the time, on real states and instances; and the schedules that launch them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster_duckdb import DuckDBResource
from hypothesis import given, settings
from hypothesis import strategies as st

from assets import CHECKS
from assets.checks import MARGIN_S, SLOW_PATH_S, newest_settled, oldest_unpublished, overbilled
from assets.compliance import billed_once
from definitions import defs
from render_platform.clock import DAY_US, HOUR_US, US_PER_SECOND, WINDOW_US, SystemClock, hour_of
from render_platform.events import UsageEvent, table_from_events
from render_platform.metering import Interval, attribute
from resources.platform import PlatformResource
from sensors.health import daily_at_twenty_past_midnight, health_every_five_minutes
from tests.factories import START_US, make_event, make_table
from tests.platforms import LIVE, record
from tests.stories import HandMade
from tests.test_dagster_layer import (
    LANE,
    NOWHERE,
    Location,
    location,  # noqa: F401  fixtures
    sound_events,
)

FRESHNESS = {"flush_freshness", "fast_path_freshness", "reconciliation_freshness"}


def now_us() -> int:
    return SystemClock().now_us()


def check(location: Location) -> dict[str, dg.AssetCheckEvaluation]:
    """What the job `health` finds; its run succeeds whatever that is."""
    result = location.run("health")
    assert result.success
    return {one.check_name: one for one in result.get_asset_check_evaluations()}


def failing(location: Location) -> set[str]:
    found = check(location)
    assert set(found) == FRESHNESS
    assert {one.severity for one in found.values()} == {dg.AssetCheckSeverity.ERROR}
    return {name for name, one in found.items() if not one.passed}


def record_at(location: Location, rng: random.Random, age_s: int, count: int = 1) -> list[UsageEvent]:
    at = now_us() - age_s * US_PER_SECOND
    return record(location.platform, LIVE, sound_events(rng, count, at - (count + 1) * 2_000, (count + 1) * 2_000))


def deliver(location: Location, events: list[UsageEvent]) -> None:
    location.platform.clickhouse.insert_events(table_from_events(events), str(events[0].event_id))


# What is declared.


def test_each_check_says_what_to_do() -> None:
    graph = defs.resolve_asset_graph()
    for key in graph.asset_check_keys:
        description = graph.get_check_spec(key).description or ""
        assert " If " in description, key
        assert len(description) > 100, key


def test_checks_of_freshness_are_looked_at_by_the_clock_alone() -> None:
    for job in ("flush", "reconcile", "verify", "repair"):
        nodes = {node.name for node in defs.resolve_job_def(job).nodes}
        assert not [name for name in nodes if "freshness" in name], job
    assert len(defs.resolve_job_def("health").nodes) == len(FRESHNESS)
    assert len(CHECKS) > len(FRESHNESS)


# Freshness.


def test_a_platform_on_which_nothing_happens_is_fresh(location: Location) -> None:
    location.platform.clickhouse.make_ready()
    assert failing(location) == set()


def test_events_that_wait_for_longer_than_promised_fail_the_flush(location: Location, rng: random.Random) -> None:
    limit_s = SLOW_PATH_S + MARGIN_S
    deliver(location, record_at(location, rng, limit_s - 20))
    assert failing(location) == set()
    location.patch.setenv("RENDER_PLATFORM_BACKLOG_AGE_S", "30")
    deliver(location, record_at(location, rng, 0))
    assert failing(location) == set(), "a shorter age trip does not shorten the promise"


@pytest.mark.parametrize("reached", ["recorded", "sealed", "stored"])
def test_the_flush_is_late_wherever_an_event_is_stuck(
    location: Location,
    rng: random.Random,
    reached: str,
) -> None:
    deliver(location, record_at(location, rng, SLOW_PATH_S + MARGIN_S + 5, count=3))
    if reached != "recorded":
        location.platform.seal()
    if reached == "stored":
        location.platform.store()
    assert failing(location) == {"flush_freshness"}
    said = check(location)["flush_freshness"]
    assert int(said.metadata["age s"].value) > int(said.metadata["limit s"].value)  # type: ignore[arg-type]
    assert location.run("flush").success
    assert failing(location) == set()


def test_a_longer_age_trip_that_is_configured_is_no_failure(location: Location, rng: random.Random) -> None:
    deliver(location, record_at(location, rng, 300))
    location.patch.setenv("RENDER_PLATFORM_BACKLOG_AGE_S", "600")
    assert failing(location) == set()


def test_a_trace_that_is_being_replayed_is_not_late(location: Location, rng: random.Random) -> None:
    location.platform.clickhouse.make_ready()
    record(location.platform, LANE, sound_events(rng, 3))
    assert failing(location) == set()


def test_events_that_clickhouse_lacks_fail_the_fast_path_once_they_had_time(
    location: Location,
    rng: random.Random,
) -> None:
    old = record_at(location, rng, 900, count=2)
    deliver(location, old)
    lost = record_at(location, rng, 300)
    assert location.run("flush").success
    assert failing(location) == {"fast_path_freshness"}
    deliver(location, lost)
    young = record_at(location, rng, 1)
    found = check(location)["fast_path_freshness"]
    assert found.passed, "an event of a second ago may still be on its way"
    assert found.metadata["rows of the last hour"].value == 3
    assert young[0].recorded_at > lost[0].recorded_at


def test_an_empty_clickhouse_beside_events_fails(location: Location, rng: random.Random) -> None:
    location.platform.clickhouse.make_ready()
    record_at(location, rng, 300)
    assert location.run("flush").success
    assert failing(location) == {"fast_path_freshness"}
    assert "holds no row" in (check(location)["fast_path_freshness"].description or "")


def test_the_external_asset_is_observed_with_its_rows(location: Location, rng: random.Random) -> None:
    events = record_at(location, rng, 90, count=4)
    deliver(location, events)
    check(location)
    (seen,) = location.instance.fetch_observations(dg.AssetKey("inference_events"), limit=5).records
    observation = seen.asset_observation
    assert observation is not None
    assert observation.metadata["dagster/row_count"].value == 4
    assert observation.metadata["rows of the last hour"].value == 4


def test_what_cannot_be_read_is_unknown_and_fails(location: Location, rng: random.Random) -> None:
    record_at(location, rng, 300)
    assert location.run("flush").success
    location.patch.setenv("RENDER_PLATFORM_CLICKHOUSE_DSN", NOWHERE)
    assert failing(location) == {"fast_path_freshness"}
    assert (check(location)["fast_path_freshness"].description or "").startswith("unknown: ")
    assert location.instance.fetch_observations(dg.AssetKey("inference_events"), limit=5).records == []


def test_a_clickhouse_that_nobody_prepared_is_unknown_and_fails(location: Location) -> None:
    assert failing(location) == {"fast_path_freshness"}
    assert "render-platform migrate" in (check(location)["fast_path_freshness"].description or "")


def test_no_state_is_unknown_and_fails(tmp_path: Path) -> None:
    resource = PlatformResource(state_dir=str(tmp_path / "none"), duckdb=DuckDBResource(database=":memory:"))
    with dg.DagsterInstance.ephemeral() as instance:
        job = defs.resolve_job_def("health")
        result = job.execute_in_process(instance=instance, resources={"platform": resource}, raise_on_error=False)
    found = result.get_asset_check_evaluations()
    assert len(found) == len(FRESHNESS)
    assert not [one for one in found if one.passed]


def test_a_live_hour_without_its_report_for_two_hours_fails_reconciliation(
    location: Location,
    rng: random.Random,
) -> None:
    hour = hour_of(now_us()) - 4 * HOUR_US
    events = record(location.platform, LIVE, sound_events(rng, 3, hour))
    deliver(location, events)
    assert location.run("flush").success
    assert failing(location) == {"reconciliation_freshness"}
    found = check(location)["reconciliation_freshness"]
    assert found.metadata["due hours"].value == 4
    location.dagster.reconcile([hour + number * HOUR_US for number in range(2)])
    assert failing(location) == set(), "the hour before this one is due, and not for long"


# What the checks read of SQL.


def test_the_oldest_event_is_found_in_each_state_and_in_its_own_lane(
    location: Location,
    rng: random.Random,
) -> None:
    platform = location.platform

    def oldest() -> int | None:
        with platform.database.read() as connection:
            return oldest_unpublished(connection)

    assert oldest() is None
    record(platform, LANE, sound_events(rng, 2))
    assert oldest() is None
    first = record_at(location, rng, 50, count=2)[0].recorded_at
    for step in (platform.seal, platform.store):
        assert oldest() == first
        step()
    assert oldest() == first
    platform.log_batches()
    assert oldest() is None


def test_the_newest_settled_event_is_one_that_stands(location: Location, rng: random.Random) -> None:
    platform = location.platform

    def newest(until_us: int) -> int | None:
        with platform.database.read() as connection:
            return newest_settled(connection, until_us)

    times = [event.recorded_at for age_s in (600, 300, 100) for event in record_at(location, rng, age_s)]
    for _ in range(2):
        assert newest(times[0] - 1) is None
        found = newest(times[1] + 1)
        assert found in times[:2], "an event, and not one that is too young"
        assert newest(now_us()) == times[2]
        platform.flush()
    assert newest(times[2] + 2 * DAY_US) is None, "of the last day alone"


# Conservation by device and window.


def billed(rng: random.Random, device: str, start_us: int, wall_us: int, gpu_time_ns: int) -> UsageEvent:
    end = start_us + wall_us
    times = {"gpu_started_at": start_us, "event_time": end, "recorded_at": end}
    return make_event(rng, **times, device_uuid=device, gpu_count=1, gpu_time_ns=gpu_time_ns, meter="nvml")


def test_what_is_billed_too_much_is_named_by_window_and_device(rng: random.Random) -> None:
    second = START_US + WINDOW_US
    events = [
        billed(rng, "GPU-0", START_US, 1_000, 1_000_000),
        *(billed(rng, "GPU-1", second, 1_000, 1_000_000) for _ in range(2)),
    ]
    assert overbilled(table_from_events(events)) == [
        "window 2023-11-16T18:05:00Z: GPU-1 was billed 2000000 ns and was busy for 1000000 ns"
    ]


def test_what_one_window_bills_too_much_is_not_hidden_by_another(rng: random.Random) -> None:
    idle = billed(rng, "GPU-0", START_US + WINDOW_US, 10_000_000, 0)
    double = [billed(rng, "GPU-0", START_US, 1_000, 1_000_000) for _ in range(2)]
    (problem,) = overbilled(table_from_events([idle, *double]))
    assert problem.startswith("window 2023-11-16T18:00:00Z: GPU-0")


def test_work_that_began_in_two_windows_is_held_together_too(rng: random.Random) -> None:
    end = START_US + 2 * WINDOW_US
    one = billed(rng, "GPU-0", START_US, 2 * WINDOW_US, 2 * WINDOW_US * 1_000)
    two = billed(rng, "GPU-0", START_US + WINDOW_US, WINDOW_US, WINDOW_US * 1_000)
    assert one.event_time == two.event_time == end
    (problem,) = overbilled(table_from_events([one, two]))
    assert problem.startswith("windows 2023-11-16T18:00:00Z to 2023-11-16T18:05:00Z: GPU-0")


def test_nothing_is_conserved() -> None:
    assert overbilled(make_table(0)) == []


Spans = st.lists(
    st.tuples(st.sampled_from(["GPU-0", "GPU-1"]), st.integers(0, 3 * WINDOW_US), st.integers(0, 2 * WINDOW_US)),
    min_size=1,
    max_size=12,
)


@given(Spans)
@settings(max_examples=60, deadline=None)
def test_what_is_attributed_is_conserved_in_every_window(spans: list[tuple[str, int, int]]) -> None:
    rng = random.Random(1)
    intervals = [
        Interval(device, at, (START_US + start) * 1_000, (START_US + start + wall) * 1_000)
        for at, (device, start, wall) in enumerate(spans)
    ]
    shares = attribute(intervals)
    events = [billed(rng, device, START_US + start, wall, shares[at]) for at, (device, start, wall) in enumerate(spans)]
    assert overbilled(table_from_events(events)) == []


# Twice on the slow path.


@pytest.fixture
def made(tmp_path: Path) -> Iterator[HandMade]:
    with closing(HandMade(tmp_path)) as opened:
        yield opened


def test_an_event_or_a_job_in_two_batches_fails_the_check(made: HandMade, rng: random.Random) -> None:
    first, second, third = sound_events(rng, 3)
    for seq, rows in enumerate(([first, second], [second, replace(third, job_id=first.job_id)])):
        made.batch(START_US, seq, table_from_events(sorted(rows, key=lambda event: event.event_id)))
    found = billed_once(made.verify(deep=True))
    assert (found.passed, found.severity) == (False, dg.AssetCheckSeverity.ERROR)
    assert f"an event stands twice: {second.event_id}" in (found.description or "")
    assert f"a job stands twice: {first.job_id}" in (found.description or "")


def test_rows_that_were_not_read_are_not_known_to_be_billed_once(made: HandMade) -> None:
    made.batch(START_US, 0, make_table(3), merkle_root="ab" * 32)
    found = billed_once(made.verify(deep=True))
    assert not found.passed
    assert (found.description or "").startswith("unknown: ")


# The schedules.


def tick(schedule: Any, location: Location, at: datetime) -> Any:
    resources = {"platform": location.resource}
    with dg.build_schedule_context(
        instance=location.instance, scheduled_execution_time=at, resources=resources
    ) as context:
        return schedule(context)


def test_health_is_looked_at_at_each_tick_and_the_day_before_once_it_holds_anything(
    location: Location,
    rng: random.Random,
) -> None:
    at = datetime(2023, 11, 17, 0, 20, tzinfo=UTC)
    request = tick(health_every_five_minutes, location, at)
    assert isinstance(request, dg.RunRequest)
    assert isinstance(tick(daily_at_twenty_past_midnight, location, at), dg.SkipReason)
    record(location.platform, LANE, sound_events(rng, 2))
    request = tick(daily_at_twenty_past_midnight, location, at)
    assert isinstance(request, dg.RunRequest)
    assert request.partition_key == "2023-11-16"


@pytest.mark.parametrize("schedule", [health_every_five_minutes, daily_at_twenty_past_midnight])
def test_without_a_state_nothing_is_launched(tmp_path: Path, schedule: Any) -> None:
    resource = PlatformResource(state_dir=str(tmp_path / "none"), duckdb=DuckDBResource(database=":memory:"))
    at = datetime(2023, 11, 17, 0, 20, tzinfo=UTC)
    with dg.build_schedule_context(scheduled_execution_time=at, resources={"platform": resource}) as context:
        result = schedule(context)
    assert isinstance(result, dg.SkipReason)
    assert "no platform state" in str(result.skip_message)
