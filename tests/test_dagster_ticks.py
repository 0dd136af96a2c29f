"""Each sensor and schedule, ticked on a real instance over a real state, and all together by a running daemon."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.scheduler.instigation import (
    InstigatorState,
    InstigatorStatus,
    InstigatorType,
    ScheduleInstigatorData,
    TickStatus,
)
from dagster._utils.schedules import reverse_cron_string_iterator
from dagster_duckdb import DuckDBResource

from definitions import defs
from render_platform.clock import HOUR_US, US_PER_SECOND, SystemClock, hour_of
from render_platform.config import load_settings
from render_platform.events import UsageEvent, table_from_events
from render_platform.pipeline import Platform, open_platform
from resources.local import DAGSTER_YAML
from resources.platform import PlatformResource
from sensors.housekeeping import prune_ticks
from tests import postgres
from tests.chdb_server import bridge_over, fresh_database
from tests.commands import CHECKOUT
from tests.conftest import SEED
from tests.homes import open_instance
from tests.platforms import LIVE, record
from tests.test_dagster_kills import running_daemon
from tests.test_dagster_layer import (
    Location,
    location,  # noqa: F401  fixtures
    open_location,
    sound_events,
)

ASKS_FOR: Mapping[str, str | None] = {
    "outbox_backlog": "flush",
    "gpu_jobs_backstop": None,
    "discrepancies": None,
    "checks": None,
    "failures": None,
    "budgets": None,
    "reconciliation_every_five_minutes": "reconcile",
    "health_every_five_minutes": "health",
    "daily_at_twenty_past_midnight": "daily",
    "housekeeping_daily": "housekeeping",
    "capacity_hourly": "capacity",
    "charges_daily": "charges",
    "invoices_monthly": None,
}
"""What a tick asks for where an hour and a day have passed in which all went well, and events wait."""
REPOSITORY = defs.get_repository_def()
SENSORS = {sensor.name: sensor for sensor in REPOSITORY.sensor_defs}
SCHEDULES = {schedule.name: schedule for schedule in REPOSITORY.schedule_defs}
LIMIT_S = 400


def test_each_of_them_is_known_here_and_on() -> None:
    assert set(SENSORS) | set(SCHEDULES) == set(ASKS_FOR), "say in ASKS_FOR what a new one asks for"
    for sensor in SENSORS.values():
        assert (sensor.default_status, len(sensor.description or "") > 30) == (dg.DefaultSensorStatus.RUNNING, True)
    for schedule in SCHEDULES.values():
        assert (schedule.default_status, len(schedule.description or "") > 30) == (
            dg.DefaultScheduleStatus.RUNNING,
            True,
        )


# One tick each.


def make_busy(platform: Platform, rng: random.Random, hours: int = 50) -> list[UsageEvent]:
    """Live events of each hour from two days ago to three minutes ago; those of the last hour wait in the outbox."""
    now_us = SystemClock().now_us() - 180 * US_PER_SECOND
    begin_us = hour_of(now_us)
    older = [e for n in range(hours, 0, -1) for e in sound_events(rng, 2, begin_us - n * HOUR_US)]
    recorded = record(platform, LIVE, older)
    platform.flush()
    waiting = record(platform, LIVE, sound_events(rng, 3, begin_us, max(now_us - begin_us, US_PER_SECOND)))
    platform.clickhouse.insert_events(table_from_events([*recorded, *waiting]), "first")
    return [*recorded, *waiting]


def evaluate(instance: dg.DagsterInstance, resource: PlatformResource, name: str) -> list[dg.RunRequest]:
    """What one tick asks for, as the daemon asks it."""
    resources = {"platform": resource}
    if name in SENSORS:
        with dg.build_sensor_context(
            instance=instance, resources=resources, repository_def=REPOSITORY, sensor_name=name
        ) as context:
            return list(SENSORS[name].evaluate_tick(context).run_requests or [])
    with dg.build_schedule_context(
        instance=instance, resources=resources, repository_def=REPOSITORY, scheduled_execution_time=now()
    ) as context:
        return list(SCHEDULES[name].evaluate_tick(context).run_requests or [])


def now() -> datetime:
    return datetime.now(UTC)


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Location]:
    """A busy state: ticks only read the platform, and what one leaves in the instance is under its own name."""
    with open_location(tmp_path_factory.mktemp("busy") / "state", RENDER_PLATFORM_BACKLOG_ROWS="3") as made:
        make_busy(made.platform, random.Random(f"{SEED}/busy"))
        yield made


@pytest.mark.parametrize("name", sorted(ASKS_FOR))
def test_a_tick_on_a_busy_platform_asks_for_what_can_run(busy: Location, name: str) -> None:
    requests = evaluate(busy.instance, busy.resource, name)
    assert bool(requests) == (ASKS_FOR[name] is not None)
    for request in requests:
        job = defs.resolve_job_def(ASKS_FOR[name] or "")
        assert request.job_name in (None, job.name)
        if request.partition_key is not None:
            assert job.partitions_def is not None
            assert job.partitions_def.has_partition_key(request.partition_key)


@pytest.mark.skipif(postgres.CHOSEN, reason="a server's database is a state")
@pytest.mark.parametrize("name", sorted(ASKS_FOR))
def test_a_tick_where_there_is_no_state_skips(location: Location, tmp_path: Path, name: str) -> None:
    nowhere = PlatformResource(state_dir=str(tmp_path / "none"), duckdb=DuckDBResource(database=":memory:"))
    requests = evaluate(location.instance, nowhere, name)
    assert [request.job_name for request in requests] in ([], ["housekeeping"], [None])
    assert requests == [] or name == "housekeeping_daily", "which needs no platform"
    assert not (tmp_path / "none").exists(), "looking makes nothing"


# All of them, in a running daemon.


@contextmanager
def busy_state(folder: Path, rng: random.Random) -> Iterator[dict[str, str]]:
    """A busy state folder, its ClickHouse behind a bridge; gives the environment of its daemon."""
    with bridge_over(folder / "clickhouse") as bridge:
        environment = {
            "RENDER_PLATFORM_STATE_DIR": str(folder / "state"),
            "RENDER_PLATFORM_CLICKHOUSE_DSN": bridge.dsn,
            "RENDER_PLATFORM_CLICKHOUSE_DATABASE": fresh_database(),
            **({"RENDER_PLATFORM_DATABASE_URL": postgres.url_of(folder / "state")} if postgres.CHOSEN else {}),
        }
        with open_platform(load_settings(environ=environment), create=True) as platform:
            make_busy(platform, rng)
        yield environment


def states(instance: dg.DagsterInstance, kind: InstigatorType) -> dict[str, InstigatorState]:
    return {state.name: state for state in instance.all_instigator_state(instigator_type=kind)}


def ticks_of(instance: dg.DagsterInstance, state: InstigatorState) -> list[TickStatus]:
    return [tick.status for tick in instance.get_ticks(state.instigator_origin_id, state.selector_id)]


def begin_before_the_last_tick(instance: dg.DagsterInstance) -> None:
    """Each schedule is on since a second before its last time: the daemon makes up for the one tick that it missed."""
    for name, state in states(instance, InstigatorType.SCHEDULE).items():
        cron = SCHEDULES[name].cron_schedule
        assert isinstance(cron, str)
        last = next(reverse_cron_string_iterator(now().timestamp(), cron, "UTC"))
        begun = ScheduleInstigatorData(cron, start_timestamp=last.timestamp() - 1)
        instance.update_instigator_state(state.with_status(InstigatorStatus.DECLARED_IN_CODE).with_data(begun))


def wait_until(what: str, true: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < deadline, f"{what}: {log.read_text()[-4_000:]}"
        time.sleep(0.5)


def test_a_running_daemon_ticks_them_all_and_their_runs_succeed(tmp_path: Path, rng: random.Random) -> None:
    home, log = tmp_path / "dagster", tmp_path / "daemon.log"
    home.mkdir()
    (home / "dagster.yaml").write_text(DAGSTER_YAML)
    location_of = ("-w", str(CHECKOUT / "workspace.yaml"))
    with busy_state(tmp_path, rng) as given, open_instance(home, **given) as instance:
        environment = {**given, "DAGSTER_HOME": str(home)}
        with running_daemon(log, environment, *location_of):
            wait_until("schedules", lambda: set(states(instance, InstigatorType.SCHEDULE)) == set(SCHEDULES), log)
        begin_before_the_last_tick(instance)
        with running_daemon(log, environment, *location_of):
            wait_until("ticks", lambda: all_ticked(instance), log)
            asked = {job for job in ASKS_FOR.values() if job}
            wait_until("runs", lambda: asked <= {run.job_name for run in instance.get_runs()} and idle(instance), log)
        found = {(run.job_name, run.status.value) for run in instance.get_runs()}
        assert {status for _, status in found} == {"SUCCESS"}, found
        prune_ticks(instance, now() + timedelta(days=1), now())
        assert not any(ticks_of(instance, state) for state in instance.all_instigator_state())


def all_ticked(instance: dg.DagsterInstance) -> bool:
    """Each has ticked, to its end; none has failed."""
    found = {state.name: ticks_of(instance, state) for state in instance.all_instigator_state()}
    assert not any(TickStatus.FAILURE in ticks for ticks in found.values()), found
    done = {TickStatus.SUCCESS, TickStatus.SKIPPED}
    return all(done & set(found.get(name, [])) for name in (*SENSORS, *SCHEDULES))


def idle(instance: dg.DagsterInstance) -> bool:
    return all(run.is_finished for run in instance.get_runs())
