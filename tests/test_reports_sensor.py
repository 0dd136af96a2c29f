"""The sensor behind the gateway's reports: what nobody reported is filled in, once, and from SQL."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.events import StepMaterializationData
from dagster._core.instance.utils import RUNLESS_JOB_NAME, RUNLESS_RUN_ID
from dagster_duckdb import DuckDBResource
from hypothesis import given, settings
from hypothesis import strategies as st

from definitions import defs
from render_platform.clock import HOUR_US, US_PER_SECOND, SystemClock
from render_platform.events import Totals, UsageEvent
from render_platform.gateway.reporter import Reporter, report_metadata
from resources.platform import PlatformResource
from sensors import reports
from sensors.reports import Hole, Range, Report, bounded, gpu_jobs_backstop, holes, settled_until
from tests.commands import CHECKOUT, clean_environment
from tests.factories import START_US, make_event
from tests.platforms import LIVE, make_platform, record, record_random
from tests.test_dagster_layer import LANE, Location, location  # noqa: F401  fixtures

KEY = dg.AssetKey("gpu_jobs")


def make_jobs(
    location: Location,
    rng: random.Random,
    count: int,
    age_s: int,
    gateway: str = "gw-1",
    lane: str = LIVE,
) -> list[UsageEvent]:
    """Jobs of one gateway, 100 ms apart, the first of which ended `age_s` ago, as they were recorded."""
    start_us = SystemClock().now_us() - age_s * US_PER_SECOND
    times = [start_us + number * 100_000 for number in range(count)]
    return record(location.platform, lane, [make_event(rng, recorded_at=at, gateway_id=gateway) for at in times])


def report(location: Location, events: Sequence[UsageEvent], gateway: str = "gw-1", more_us: int = 1) -> None:
    """What the gateway's reporter did then, without a webserver."""
    start, through = events[0].recorded_at, events[-1].recorded_at + more_us
    figures = {("some", "success"): Totals(len(events), sum(event.gpu_time_ns for event in events))}
    metadata = report_metadata(gateway, start, through, figures, f"{gateway}/1/{start}")
    made = StepMaterializationData(dg.AssetMaterialization(KEY, metadata=metadata))
    event = dg.DagsterEvent("ASSET_MATERIALIZATION", RUNLESS_JOB_NAME, event_specific_data=made)
    location.instance.report_dagster_event(event, RUNLESS_RUN_ID, timestamp=through / US_PER_SECOND + 1)


def tick(location: Location, cursor: str | None = None, keep: bool = True) -> str | None:
    """One evaluation, its events recorded as the daemon does; gives the new cursor."""
    resources = {"platform": location.resource}
    with dg.build_sensor_context(instance=location.instance, resources=resources, cursor=cursor) as context:
        data = gpu_jobs_backstop.evaluate_tick(context)
    if keep:
        for event in data.asset_events:
            location.instance.report_runless_asset_event(event)
    return data.cursor


def jobs_said(location: Location) -> list[int]:
    """Jobs of each materialization, the oldest first."""
    found = [made.metadata.get("jobs") for made in reversed(location.materializations("gpu_jobs"))]
    return [int(str(value.value)) for value in found if value is not None]


def test_what_nobody_reported_is_filled_in_exactly_once(location: Location, rng: random.Random) -> None:
    events = make_jobs(location, rng, 7, age_s=600)
    cursor = tick(location)
    (made,) = location.materializations("gpu_jobs")
    assert made.metadata["jobs"].value == 7
    seconds = Decimal(str(made.metadata["GPU seconds"].value))
    assert seconds.scaleb(9) == sum(event.gpu_time_ns for event in events)
    rows = made.metadata["models"].value
    assert isinstance(rows, list)
    assert {(row["model"], row["status"]) for row in rows} == {(event.model_name, event.status) for event in events}
    assert "did not report" in (made.description or "")
    for _ in range(2):
        cursor = tick(location, cursor)
    assert jobs_said(location) == [7]


def test_sealed_events_are_found_too(location: Location, rng: random.Random) -> None:
    make_jobs(location, rng, 6, age_s=600)
    location.platform.seal()
    tick(location)
    assert jobs_said(location) == [6]


def test_only_the_hole_between_reports_is_filled(location: Location, rng: random.Random) -> None:
    events = make_jobs(location, rng, 9, age_s=600)
    report(location, events[:3])
    report(location, events[6:])
    cursor = tick(location)
    assert jobs_said(location) == [3, 3, 3]
    filled = location.materializations("gpu_jobs")[0]
    assert filled.metadata["from_us"].value == events[2].recorded_at + 1
    assert filled.metadata["through_us"].value == events[6].recorded_at
    later = make_jobs(location, rng, 4, age_s=300)
    report(location, later)
    tick(location, cursor)
    assert jobs_said(location) == [3, 3, 3, 4], "nothing is missing"


def test_young_events_are_left_to_their_gateway(location: Location, rng: random.Random) -> None:
    make_jobs(location, rng, 2, age_s=600)
    young = make_jobs(location, rng, 5, age_s=60)
    cursor = tick(location)
    assert jobs_said(location) == [2]
    report(location, young)
    assert tick(location, cursor) is not None
    assert jobs_said(location) == [2, 5]


def test_a_gateway_that_reports_rarely_is_waited_for(location: Location, rng: random.Random) -> None:
    make_jobs(location, rng, 2, age_s=600)
    location.patch.setenv("RENDER_PLATFORM_REPORT_EVERY_S", "310")
    tick(location)
    assert jobs_said(location) == []
    location.patch.setenv("RENDER_PLATFORM_REPORT_EVERY_S", "290")
    tick(location)
    assert jobs_said(location) == [2]


def test_a_report_that_came_before_its_time_is_read_again(location: Location, rng: random.Random) -> None:
    make_jobs(location, rng, 2, age_s=900)
    events = make_jobs(location, rng, 3, age_s=300)
    report(location, events)
    location.patch.setenv("RENDER_PLATFORM_REPORT_EVERY_S", "300")
    cursor = tick(location)
    assert jobs_said(location) == [3, 2]
    location.patch.setenv("RENDER_PLATFORM_REPORT_EVERY_S", "30")
    cursor = tick(location, cursor)
    assert jobs_said(location) == [3, 2]
    assert json.loads(cursor or "")["after_id"] > 0, "and then no more"


def test_settled_reports_are_not_read_again(location: Location, rng: random.Random) -> None:
    events = make_jobs(location, rng, 3, age_s=600)
    report(location, events)
    tick(location, json.dumps({"through_us": events[0].recorded_at, "after_id": 10**6}))
    assert jobs_said(location) == [3, 3], "for this cursor there are none"


def test_one_gateway_s_report_does_not_hide_another_s_silence(location: Location, rng: random.Random) -> None:
    events = make_jobs(location, rng, 4, age_s=600)
    make_jobs(location, rng, 3, age_s=600, gateway="gw-2")
    report(location, events, more_us=60 * US_PER_SECOND)
    tick(location)
    assert jobs_said(location) == [4, 3]
    assert location.materializations("gpu_jobs")[0].metadata["gateway"].value == "gw-2"


def test_a_tick_that_was_cut_short_repeats_nothing(location: Location, rng: random.Random) -> None:
    make_jobs(location, rng, 4, age_s=600)
    tick(location, keep=False)  # cut before its events were recorded
    assert jobs_said(location) == []
    tick(location)  # cut after that, and before its cursor was kept
    tick(location)
    assert jobs_said(location) == [4]


def test_other_lanes_and_other_people_s_materializations_mean_nothing(location: Location, rng: random.Random) -> None:
    location.instance.report_runless_asset_event(dg.AssetMaterialization(KEY))
    strange = dg.AssetMaterialization(KEY, metadata={"gateway": "gw-1", "from_us": "0", "through_us": 2.5})
    location.instance.report_runless_asset_event(strange)
    make_jobs(location, rng, 3, age_s=900, lane=LANE)
    make_jobs(location, rng, 4, age_s=600)
    tick(location, cursor="nonsense")
    assert jobs_said(location) == [4]


def test_the_sensor_skips_where_nothing_is_recorded(location: Location, tmp_path: Path) -> None:
    assert tick(location) is None
    nowhere = PlatformResource(state_dir=str(tmp_path / "none"), duckdb=DuckDBResource(database=":memory:"))
    with dg.build_sensor_context(instance=location.instance, resources={"platform": nowhere}) as context:
        result = gpu_jobs_backstop(context)
    assert isinstance(result, dg.SkipReason)
    assert "no platform state" in str(result.skip_message)


def test_reports_that_were_not_read_yet_are_not_taken_for_missing_ones() -> None:
    stored = [Report(n, START_US + n * US_PER_SECOND, "a", Range(0, 1)) for n in range(reports.MAX_REPORTS)]
    now_us = START_US + HOUR_US
    assert settled_until(now_us, stored[:-1], 30) == now_us - 120 * US_PER_SECOND
    assert settled_until(now_us, stored, 30) == stored[-1].at_us - 120 * US_PER_SECOND
    assert settled_until(stored[5].at_us, stored, 100) == stored[5].at_us - 200 * US_PER_SECOND


def test_the_sensor_is_on_and_asks_twice_a_minute() -> None:
    sensor = defs.resolve_sensor_def("gpu_jobs_backstop")
    assert sensor.minimum_interval_seconds == 30
    assert sensor.default_status == dg.DefaultSensorStatus.RUNNING


# Totals and holes, whatever is recorded and reported.


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), cuts=st.tuples(st.integers(0, 7_300), st.integers(0, 7_300)), sealed=st.booleans())
def test_totals_of_a_range(
    tmp_path_factory: pytest.TempPathFactory, seed: int, cuts: tuple[int, int], sealed: bool
) -> None:
    platform = make_platform(tmp_path_factory.mktemp("state"), batch_rows=7)
    events = record_random(platform, 20, seed)
    if sealed:
        platform.seal()
    events += record_random(platform, 10, seed + 1, start_us=START_US + HOUR_US)
    record_random(platform, 10, seed + 2, lane=LANE)
    start, end = (START_US + cut * US_PER_SECOND for cut in sorted(cuts))
    expected: dict[tuple[str, str, str], Totals] = {}
    for event in events:
        if start <= event.recorded_at < end:
            key = event.gateway_id, event.model_name, event.status
            known = expected.get(key, Totals(0, 0))
            expected[key] = Totals(known.events + 1, known.gpu_time_ns + event.gpu_time_ns)
    found = platform.outbox.live_totals(start, end)
    platform.close()
    assert found == expected


ranges = st.builds(lambda start, size: Range(start, start + size), st.integers(0, 20), st.integers(0, 8))
reports_of = st.lists(st.builds(Report, st.just(1), st.just(0), st.sampled_from("ab"), ranges), max_size=8)


@given(made=reports_of, within=ranges)
def test_each_moment_is_covered_or_in_one_hole(made: list[Report], within: Range) -> None:
    found = holes(made, "ab", within)
    assert found == sorted(found)
    for gateway in "ab":
        for moment in range(30):
            inside = within.from_us <= moment < within.through_us
            covered = any(r.gateway == gateway and r.range.from_us <= moment < r.range.through_us for r in made)
            holding = [h for h in found if h.gateway == gateway and h.range.from_us <= moment < h.range.through_us]
            assert len(holding) == (inside and not covered)


@given(starts=st.lists(st.integers(0, 10_000), min_size=40, max_size=150), size=st.integers(1, 500))
def test_a_tick_fills_a_bounded_number_and_leaves_the_rest_to_the_next(starts: list[int], size: int) -> None:
    found = sorted(Hole(Range(start, start + size), "a") for start in starts)
    first, end = bounded(found, 20_000)
    assert len(first) <= reports.MAX_FILLED
    for hole in found:
        kept = [one for one in first if one.range.from_us == hole.range.from_us]
        assert bool(kept) == (hole.range.from_us < end)
        assert all(one.range.through_us == min(hole.range.through_us, end) for one in kept)


# With Dagster's own webserver.


@contextmanager
def dagster_webserver(home: Path, state: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = ["-m", "dagster_webserver", "-w", "workspace.yaml", "-h", "127.0.0.1", "-p", str(port)]
    environment = {"DAGSTER_HOME": str(home), "RENDER_PLATFORM_STATE_DIR": str(state), "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=CHECKOUT,
        env=clean_environment(environment),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while not answers(url) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def answers(url: str) -> bool:
    with suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{url}/server_info", timeout=5) as response:
        return bool(response.status == 200)
    return False


async def report_over_http(url: str, events: Sequence[UsageEvent]) -> Reporter:
    reporter = Reporter(url, SystemClock(), "gw-1", 1, 3_600)
    task = asyncio.create_task(reporter.run())
    await asyncio.sleep(0)
    for event in events:
        reporter.count(event)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return reporter


def test_a_report_through_the_webserver_is_seen_and_not_repeated(location: Location, rng: random.Random) -> None:
    before = make_jobs(location, rng, 2, age_s=900)
    events = make_jobs(location, rng, 5, age_s=600)
    with dagster_webserver(location.state / "dagster", location.state) as url:
        reporter = asyncio.run(report_over_http(url, events))
        assert (reporter.sent, reporter.failed, reporter.last_error) == (1, 0, "")
        (made,) = location.materializations("gpu_jobs")
        assert (made.metadata["jobs"].value, made.metadata["epoch"].value) == (5, 1)
        assert made.metadata["from_us"].value == events[0].recorded_at
        tick(location)
        assert jobs_said(location) == [5, len(before)]
        query = '{assetOrError(assetKey: {path: ["gpu_jobs"]}) {... on Asset {assetMaterializations {timestamp}}}}'
        asked = urllib.request.Request(
            f"{url}/graphql", json.dumps({"query": query}).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=20) as response:
            seen = json.load(response)["data"]["assetOrError"]["assetMaterializations"]
        assert len(seen) == 2


def test_of_a_time_that_housekeeping_prunes_nothing_is_filled_in(location: Location, rng: random.Random) -> None:
    """Rows that are left of it are not all that was recorded then: figures of them would be wrong."""
    old = make_jobs(location, rng, 3, age_s=31 * 86_400)
    make_jobs(location, rng, 2, age_s=600)
    tick(location, json.dumps({"through_us": old[0].recorded_at, "after_id": 0}))
    assert jobs_said(location) == [2]
