"""`capacity_plan` on a real ClickHouse: what it reads, what it shows, its check, its schedule, and what it refuses."""

from __future__ import annotations

import base64
import os
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import dagster as dg
import pytest
from dagster_duckdb import DuckDBResource

from assets.capacity import COLUMNS
from assets.jobs import hour_key, tags_of
from definitions import defs
from render_platform.clickhouse import ClickHouse, open_clickhouse
from render_platform.clock import HOUR_US, ManualClock
from render_platform.errors import Unavailable, UsageError
from render_platform.events import MAX_GPU_TIME_NS, UsageEvent, table_from_events
from render_platform.operations.capacity import Cell, Figures, plan_hour, read_cells
from resources.platform import PlatformResource
from sensors.operations import capacity_hourly
from tests import factories
from tests.chdb_server import fresh_database, open_fresh, open_raw, shared_dsn
from tests.factories import START_US, make_event
from tests.platforms import make_platform, record
from tests.test_dagster_layer import (
    LANE,
    NOWHERE,
    QUIET,
    Location,
    location,  # noqa: F401  fixtures
    table_of,
)

SECOND = 1_000_000
KEY = hour_key(START_US)
NEXT = hour_key(START_US + HOUR_US)
MOST_BYTES = 60_000


@pytest.fixture
def clickhouse() -> Iterator[ClickHouse]:
    with closing(open_fresh()) as opened:
        yield opened


def ran(
    rng: random.Random, end_s: float, run_s: int, *, wait_s: int = 0, hour_us: int = START_US, **fields: Any
) -> UsageEvent:
    """A job that ended `end_s` into the hour, after `run_s` alone on its device and `wait_s` before that."""
    ended = hour_us + round(end_s * SECOND)
    values = {
        "gpu_started_at": ended - run_s * SECOND,
        "event_time": ended,
        "recorded_at": ended,
        "gpu_count": 1,
        "gpu_time_ns": run_s * 1_000 * SECOND,
        "queue_time_us": wait_s * SECOND,
        "inference_time_us": run_s * SECOND,
        "total_time_us": (wait_s + run_s) * SECOND,
    }
    return make_event(rng, **(values | fields))


def busy_hour(rng: random.Random, hour_us: int = START_US) -> list[UsageEvent]:
    """Images: 63 jobs of 50 s, one after the other on GPU-0, each after 5 s: 3,150 s, 87.5 %. Text: 8 jobs of 300 s on
    GPU-1 and GPU-2: 2,400 of 7,200 s, one third. One was cancelled while it waited."""
    image: dict[str, Any] = {"model_type": "rectified_flow", "device_uuid": "GPU-0", "hour_us": hour_us}
    text: dict[str, Any] = {"model_type": "llm", "hour_us": hour_us}
    images = [ran(rng, 56 * number + 55, 50, wait_s=5, **image) for number in range(63)]
    texts = [ran(rng, 400 * number + 301, 300, device_uuid=f"GPU-{1 + number % 2}", **text) for number in range(8)]
    waiting = ran(rng, 10, 0, wait_s=9, device_uuid=None, status="cancelled", error_code="client_gone", **text)
    return [*images, *texts, replace(waiting, gpu_count=0)]


def deliver(location: Location, events: Sequence[UsageEvent], token: str = "first") -> None:
    location.platform.clickhouse.insert_events(table_from_events(sorted(events, key=lambda e: e.event_id)), token)


# What is read.


def in_plain_python(events: Sequence[UsageEvent], start_us: int, end_us: int) -> dict[tuple[str, str | None], Cell]:
    groups: dict[tuple[str, str | None], list[UsageEvent]] = defaultdict(list)
    for event in events:
        if start_us <= event.recorded_at < end_us:
            groups[event.model_type, event.device_uuid].append(event)
    found = {}
    for key, group in groups.items():
        used = [event for event in group if event.gpu_time_ns]
        service = [event.gpu_time_ns // event.gpu_count for event in used]
        inside = [
            max(0, min(e.event_time, end_us) - max(e.event_time - e.queue_time_us - e.inference_time_us, start_us))
            for e in used
        ]
        figures = Figures(
            len(used),
            sum(service),
            sum(ns * ns for ns in service),
            sum(event.queue_time_us for event in used),
            sum(event.total_time_us for event in used),
            sum(inside),
        )
        found[key] = Cell(*key, max(event.gpu_count for event in group), len(group) - len(used), figures)
    return found


def test_the_figures_are_those_of_plain_python(clickhouse: ClickHouse) -> None:
    rng = random.Random(5)
    events = factories.make_events(500, seed=4, start_us=START_US - HOUR_US // 2, span_us=2 * HOUR_US)
    longest = {"gpu_time_ns": MAX_GPU_TIME_NS, "gpu_count": 1, "model_type": "other", "device_uuid": "GPU-long"}
    events += [make_event(rng, recorded_at=START_US + 7, **longest) for _ in range(3)]
    ahead = {"gpu_started_at": START_US + HOUR_US - 9 * SECOND, "event_time": START_US + HOUR_US + 5 * SECOND}
    events += [make_event(rng, recorded_at=START_US + HOUR_US - 1, gpu_time_ns=10**9, **ahead)]  # another clock's
    events += busy_hour(rng)
    clickhouse.insert_events(table_from_events(sorted(events, key=lambda event: event.event_id)), "all")
    expected = in_plain_python(events, START_US, START_US + HOUR_US)
    assert expected["other", "GPU-long"].figures.service_ns2 == 3 * MAX_GPU_TIME_NS**2 > 2**63
    found = read_cells(clickhouse, START_US, START_US + HOUR_US)
    assert {(cell.model_type, cell.device): cell for cell in found} == expected
    assert len(found) == len(expected)


def test_times_that_add_up_beyond_64_bits_do_not_wrap(clickhouse: ClickHouse) -> None:
    most = 2**63 - 1
    events = [ran(random.Random(n), 100, 10, queue_time_us=most, total_time_us=most) for n in range(3)]
    clickhouse.insert_events(table_from_events(sorted(events, key=lambda event: event.event_id)), "all")
    found = read_cells(clickhouse, START_US, START_US + HOUR_US)
    assert sum(cell.figures.queue_us for cell in found) == 3 * most
    assert sum(cell.figures.in_system_us for cell in found) == 300 * SECOND, "from the begin of the hour on"


# What is shown.


def run(location: Location, first_us: int = START_US, last_us: int | None = None) -> dg.ExecuteInProcessResult:
    options: dict[str, Any] = {"partition_key": hour_key(first_us)}
    if last_us is not None:
        options = {"tags": tags_of(first_us, last_us)}
    job = defs.resolve_job_def("capacity")
    return job.execute_in_process(instance=location.instance, run_config=QUIET, raise_on_error=False, **options)


def check_of(result: dg.ExecuteInProcessResult) -> dg.AssetCheckEvaluation:
    [found] = result.get_asset_check_evaluations()
    return found


def failure_of(result: dg.ExecuteInProcessResult) -> str:
    assert not result.success
    return " ".join(str(e.step_failure_data.error) for e in result.all_events if e.is_step_failure)


def test_an_hour_worked_out_by_hand(location: Location, rng: random.Random) -> None:
    deliver(location, busy_hour(rng))
    result = run(location)
    assert result.success
    [shown] = location.materializations("capacity_plan")
    llm, images = table_of(shown, "plan")
    assert set(llm) == set(COLUMNS)
    assert images == {
        "model type": "rectified_flow",
        "jobs": 63,
        "λ, jobs/s": 0.0175,
        "μ, jobs/s": 0.02,
        "GPUs": 1,
        "ρ": "87.5%",
        "target ρ": "70 %",
        "GPUs needed": 2,
        "wait": "5.00 s",
        "M/G/c": "175.00 s",
        "M/M/c": "350.00 s",
        "M/G/1": "175.00 s",
        "M/M/1": "350.00 s",
        "L": 0.963,
        "λW": 0.963,
        "L = λW": "holds",
        "no device": 0,
        "no GPU time": 0,
        "shared with": "",
    }
    assert (llm["jobs"], llm["GPUs"], llm["ρ"], llm["GPUs needed"], llm["no GPU time"]) == (8, 2, "33.3%", 2, 1)
    assert llm["target ρ"] == "50 %"
    assert shown.metadata["rectified_flow: utilisation in %"].value == 87.5
    assert shown.metadata["summary"].value == (
        "2023-11-16T18:00:00Z: llm 2 GPUs busy 33.3%, 2 GPUs needed; rectified_flow 1 GPU busy 87.5%, 2 GPUs needed"
    )
    check = check_of(result)
    assert (check.check_name, check.passed, check.severity) == ("utilisation", False, dg.AssetCheckSeverity.ERROR)
    assert check.description == (
        "2023-11-16T18:00:00Z: rectified_flow kept 1 GPU busy for 88% of the time, above 85 %: add 1 GPU for "
        "rectified_flow; 2 GPUs stay at or below 70 %"
    )
    assert not check.blocking


def test_the_plot_is_a_small_svg_with_the_hour_on_it(location: Location, rng: random.Random) -> None:
    deliver(location, busy_hour(rng))
    run(location)
    [shown] = location.materializations("capacity_plan")
    text = str(shown.metadata["wait against utilisation"].value)
    assert len(text) < MOST_BYTES
    drawn = base64.b64decode(text.partition("base64,")[2].partition(")")[0].partition('"')[0])
    words = [found.text for found in ElementTree.fromstring(drawn).iter() if (found.text or "").strip()]
    for wanted in ("llm: 2 GPUs", "rectified_flow: 1 GPU", "measured", "M/G/c", "M/M/c", "utilisation, %"):
        assert wanted in words, words


def test_a_warning_is_no_error(location: Location, rng: random.Random) -> None:
    deliver(location, [ran(rng, 60 * n + 55, 45, model_type="other", device_uuid="GPU-0") for n in range(60)])
    check = check_of(run(location))
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert "other kept 1 GPU busy for 75% of the time, above 70 %: add 1 GPU" in str(check.description)


def test_a_range_gives_each_hour_its_own_numbers_and_no_table(location: Location, rng: random.Random) -> None:
    calm = [ran(rng, 100, 36, model_type="llm", device_uuid="GPU-1", hour_us=START_US + HOUR_US)]
    deliver(location, [*busy_hour(rng), *calm])
    result = run(location, START_US, START_US + 2 * HOUR_US)
    assert result.success
    found = {
        one.partition: {k: v.value for k, v in one.metadata.items()}
        for one in location.materializations("capacity_plan")
    }
    assert set(found) == {KEY, NEXT, hour_key(START_US + 2 * HOUR_US)}
    assert found[KEY]["rectified_flow: GPUs needed"] == 2
    assert (found[NEXT]["llm: utilisation in %"], found[NEXT]["llm: mean wait in s"]) == (1.0, 0.0)
    assert "llm: jobs" not in found[hour_key(START_US + 2 * HOUR_US)]
    for metadata in found.values():
        assert not {"plan", "wait against utilisation", "what to do"} & set(metadata)
    check = check_of(result)
    assert str(check.description).startswith("2023-11-16T18:00:00Z: rectified_flow")
    assert not check.passed


def test_an_hour_in_which_nothing_ran(location: Location) -> None:
    location.platform.clickhouse.make_ready()
    result = run(location)
    [shown] = location.materializations("capacity_plan")
    assert shown.metadata["summary"].value == "2023-11-16T18:00:00Z: nothing ran"
    assert table_of(shown, "plan") == []
    assert check_of(result).passed
    assert check_of(result).description == "2023-11-16T18:00:00Z: nothing ran"


# What is refused: unknown is not zero.


def test_without_clickhouse_there_is_no_plan_and_the_hour_can_be_planned_again(
    location: Location, rng: random.Random
) -> None:
    deliver(location, busy_hour(rng))
    dsn = os.environ["RENDER_PLATFORM_CLICKHOUSE_DSN"]
    location.patch.setenv("RENDER_PLATFORM_CLICKHOUSE_DSN", NOWHERE)
    for result in (run(location), run(location, START_US, START_US + HOUR_US)):
        assert "hours could not be read: 2023-11-16-18:00: ClickHouse failed" in failure_of(result)
        assert result.get_asset_check_evaluations() == []
    assert location.materializations("capacity_plan") == []
    location.patch.setenv("RENDER_PLATFORM_CLICKHOUSE_DSN", dsn)
    assert run(location).success


def test_an_hour_that_the_log_knows_and_clickhouse_does_not_is_no_idle_hour(
    location: Location, rng: random.Random
) -> None:
    """One hour was lost on the fast path; the other one is planned all the same."""
    recorded = record(location.platform, LANE, busy_hour(rng))
    location.finish_lane(2)
    location.dagster.flush()
    deliver(location, [ran(rng, 9, 9, model_type="llm", device_uuid="GPU-0", hour_us=START_US + HOUR_US)])
    assert f"holds none of the {len(recorded)} events of 2023-11-16T18:00:00Z" in failure_of(run(location))
    both = run(location, START_US, START_US + HOUR_US)
    assert "1 of 2 hours could not be read: 2023-11-16-18:00" in failure_of(both)
    assert [one.partition for one in location.materializations("capacity_plan")] == [NEXT]


def test_an_hour_that_is_no_longer_kept_is_unavailable(location: Location) -> None:
    location.patch.setenv("RENDER_PLATFORM_RETENTION_DAYS", "90")
    assert "ClickHouse no longer keeps 2023-11-16T18:00:00Z" in failure_of(run(location))


def test_an_hour_that_has_not_begun_and_one_that_has_not_ended(tmp_path: Path, rng: random.Random) -> None:
    clock = ManualClock(START_US)
    options = {"clickhouse_dsn": shared_dsn(), "clickhouse_database": fresh_database()}
    with closing(make_platform(tmp_path / "state", clock, **options)) as platform:
        for hour in (START_US, START_US + HOUR_US, START_US - 1):
            with pytest.raises(UsageError, match="is not an hour that has begun"):
                plan_hour(platform, hour)
        clock.move_to(START_US + HOUR_US // 2)
        with pytest.raises(Unavailable, match="migrate"):
            plan_hour(platform, START_US)
        job = ran(rng, 1_000, 900, model_type="other", device_uuid="GPU-0")
        later = ran(rng, 2_000, 900, model_type="other", device_uuid="GPU-0")
        platform.clickhouse.insert_events(table_from_events([job, later]), "both")
        [plan] = plan_hour(platform, START_US).types
        assert (plan.jobs, plan.utilisation) == (1, 0.5), "of the half hour that has passed"
        clock.move_to(START_US + 2 * HOUR_US)
        [plan] = plan_hour(platform, START_US).types
        assert (plan.jobs, plan.utilisation) == (2, 0.5)


def test_a_table_that_is_gone_is_no_empty_one() -> None:
    name = fresh_database()
    with closing(open_clickhouse(shared_dsn(), name, 0)) as opened:
        assert read_cells(opened, START_US, START_US + HOUR_US) == []
        with closing(open_raw(shared_dsn(), name)) as raw:
            raw.command("DROP TABLE usage_events SYNC")
        with pytest.raises(Unavailable, match="ClickHouse failed"):
            read_cells(opened, START_US, START_US + HOUR_US)


# The schedule.


def tick(location: Location, at: datetime, resource: PlatformResource | None = None) -> dg.RunRequest | str:
    with dg.build_schedule_context(
        instance=location.instance,
        scheduled_execution_time=at,
        resources={"platform": resource or location.resource},
    ) as context:
        result = capacity_hourly(context)
    if isinstance(result, dg.SkipReason):
        return str(result.skip_message)
    assert isinstance(result, dg.RunRequest)
    return result


def test_the_schedule_asks_for_the_hour_before(location: Location, rng: random.Random) -> None:
    schedule = defs.resolve_schedule_def("capacity_hourly")
    assert (schedule.cron_schedule, schedule.execution_timezone, schedule.job_name) == ("7 * * * *", "UTC", "capacity")
    assert schedule.default_status == dg.DefaultScheduleStatus.RUNNING
    record(location.platform, LANE, busy_hour(rng))
    location.finish_lane(2)
    request = tick(location, datetime(2023, 11, 16, 19, 7, tzinfo=UTC))
    assert isinstance(request, dg.RunRequest)
    assert request.partition_key == KEY
    assert tick(location, datetime(2023, 11, 16, 18, 7, tzinfo=UTC)) == "nothing recorded into 2023-11-16-17:00"


def test_the_schedule_skips_where_there_is_no_state(location: Location, tmp_path: Path) -> None:
    nowhere = PlatformResource(state_dir=str(tmp_path / "none"), duckdb=DuckDBResource(database=":memory:"))
    assert "holds no platform state" in str(tick(location, datetime(2023, 11, 16, 19, 7, tzinfo=UTC), nowhere))


def test_every_minute_of_the_schedule_has_a_partition() -> None:
    assert defs.resolve_job_def("capacity").partitions_def is not None
    spec = defs.resolve_asset_graph().get(dg.AssetKey("capacity_plan"))
    assert (spec.group_name, spec.kinds, spec.owners) == ("operations", {"clickhouse"}, ["team:operations"])
