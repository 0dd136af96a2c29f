"""SIGKILL of a run's process inside each asset, under a real daemon: the run ends, its slot is freed, the work is done.

This module is the daemon's code location as well: `stopping` is the real definitions with a platform that, where a file
says so, stops inside the body of an asset and says its process's id. Each asset has a state folder of its own, and a
twin that nothing disturbs; all runs are asked for together, and each is killed once: in the middle of a transaction, or
when its work is done and not yet said. The next tick asks again, and that run finds what was left.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import dagster as dg
import pytest
import sqlalchemy as sa
from dagster._core.execution.context.compute import current_execution_context
from dagster_duckdb import DuckDBResource

from assets.jobs import JOBS, SEQUENCER
from definitions import defs
from render_platform.clock import HOUR_US, US_PER_SECOND
from render_platform.config import Settings, load_settings
from render_platform.database import log_entries
from render_platform.events import Totals, table_from_events
from render_platform.pipeline import Platform, open_platform
from resources.local import DAGSTER_YAML
from resources.platform import PlatformResource
from tests.chdb_server import bridge_over, fresh_database
from tests.commands import CHECKOUT, clean_environment
from tests.conftest import SEED
from tests.factories import START_US
from tests.homes import open_instance
from tests.platforms import record
from tests.test_dagster_layer import LANE, QUIET, sound_events

FOLDER = "KILLS_FOLDER"
STATE_TAG = "tests/state"
LIMIT_S = 600
HOURS_RECORDED, LOST = 2, 2
BEFORE = {"invoicing": ["charges"]}
"""Jobs whose results another job begins with, beside those of the slow path."""


# The code location, in the daemon's process and in those of the runs.


class Stopping(PlatformResource):
    """Opens the state folder that the run's tag names; in a step of an asset it stops where a file says."""

    folder: str

    def settings(self) -> Settings:
        _, folder = self._asked()
        options = json.loads((folder / "settings.json").read_text())
        return load_settings(environ={}, state_dir=folder / "state", **options)

    def _asked(self) -> tuple[str, Path]:
        """The asset of this step, none for a check that stands alone, and the folder that its run is over."""
        context = current_execution_context.get()
        assert context is not None
        asset = context.asset_key.to_user_string() if isinstance(context, dg.AssetExecutionContext) else ""
        return asset, Path(self.folder) / context.run.tags[STATE_TAG]

    @contextmanager
    def open(self) -> Iterator[Platform]:
        asset, folder = self._asked()
        mine = asset == (folder / "asset").read_text()
        with super().open() as platform:
            counter = Transactions(folder) if mine else None
            if counter:
                for name in ("read", "write"):
                    vars(platform.database)[name] = counter.counted(getattr(platform.database, name))
            yield platform
            if counter:
                counter.leave()


class Transactions:
    """Counts the SQL transactions of one body, and stops the process in one of them, or when the body has done all."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count, self._at = folder, 0, None
        if (folder / "stop").exists():
            self._at = json.loads((folder / "stop").rename(folder / "claimed").read_text())

    def counted(self, transaction: Any) -> Any:
        @contextmanager
        def stopping() -> Iterator[Any]:
            with transaction() as connection:
                yield connection
                if self._count == self._at:
                    self._stop()  # before the commit
                self._count += 1

        return stopping

    def leave(self) -> None:
        (self._folder / "count").write_text(str(self._count))
        if self._at == "done":
            self._stop()

    def _stop(self) -> None:
        (self._folder / "claimed").write_text(str(os.getpid()))
        (self._folder / "claimed").rename(self._folder / "stopped")
        threading.Event().wait()


def asking(folder: Path) -> dg.SensorDefinition:
    """Asks for what the test has written down while it is not done, as a sensor on the backlog does."""

    @dg.sensor(jobs=JOBS, minimum_interval_seconds=1, default_status=dg.DefaultSensorStatus.RUNNING)
    def asked(context: dg.SensorEvaluationContext) -> Iterator[dg.RunRequest]:
        for path in sorted(folder.glob("*/ask.json")):
            name = path.parent.name
            runs = context.instance.get_runs(dg.RunsFilter(tags={STATE_TAG: name}))
            if all(run.status == dg.DagsterRunStatus.FAILURE for run in runs):
                yield dg.RunRequest(run_key=f"{name}/{len(runs)}", **json.loads(path.read_text()))

    return asked


def location_over(folder: Path) -> dg.Definitions:
    platform = Stopping(folder=str(folder), duckdb=DuckDBResource(database=":memory:"))
    return dg.Definitions(
        assets=defs.assets,
        asset_checks=defs.asset_checks,
        jobs=JOBS,
        sensors=[asking(folder)],
        resources={**(defs.resources or {}), "platform": platform},
        executor=dg.in_process_executor,
    )


if FOLDER in os.environ:
    stopping = location_over(Path(os.environ[FOLDER]))


# What the test does to it.


class Case(NamedTuple):
    """An asset, the job that makes it, and the partition that is asked for."""

    asset: str
    job: str
    partition: str | None


def cases() -> list[Case]:
    """Every asset that Dagster computes, with the smallest job that makes it."""
    graph = defs.resolve_asset_graph()
    selected = {job.name: defs.resolve_job_def(job.name).asset_layer.selected_asset_keys for job in JOBS}
    found = []
    for key in sorted(graph.materializable_asset_keys):
        job = min((name for name in selected if key in selected[name]), key=lambda name: (len(selected[name]), name))
        found.append(Case(key.to_user_string(), job, partition_of(job)))
    return found


def partition_of(job: str) -> str | None:
    """The one that holds the first hour."""
    partitions = defs.resolve_job_def(job).partitions_def
    if partitions is None:
        return None
    assert isinstance(partitions, dg.TimeWindowPartitionsDefinition)
    return partitions.get_partition_key_for_timestamp(START_US / US_PER_SECOND)


CASES = cases()


class Summary(NamedTuple):
    """What must not depend on who was killed when."""

    recorded: Totals
    published: list[dict[str, Any]]
    fast: tuple[int, int, int]
    entries: dict[str, int]
    reports: dict[int, str]
    verified: bool


def make_state(folder: Path, case: Case, dsn: str) -> None:
    """Two hours, recorded and delivered but for two events; what comes before the asset is done already."""
    options = {"clickhouse_dsn": dsn, "clickhouse_database": fresh_database()}
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps(options))
    (folder / "asset").write_text(case.asset)
    rng = random.Random(f"{SEED}/{case.asset}")
    with opened(folder, create=True) as platform:
        made = [e for hour in range(HOURS_RECORDED) for e in sound_events(rng, 10, START_US + hour * HOUR_US)]
        recorded = record(platform, LANE, made)
        platform.clickhouse.insert_events(table_from_events(recorded[LOST:]), "first")
        with platform.database.write() as connection:
            until = START_US + HOURS_RECORDED * HOUR_US + 60 * US_PER_SECOND
            platform.outbox.finish_lane(connection, LANE, until)
        if case.job != "flush":
            platform.flush()
        if case.job not in ("flush", "reconcile"):
            for hour in range(HOURS_RECORDED):
                platform.reconcile(START_US + hour * HOUR_US)
    for job in BEFORE.get(case.job, ()):
        run_here(folder.parent, folder.name, job)


@contextmanager
def opened(folder: Path, create: bool = False) -> Iterator[Platform]:
    options = json.loads((folder / "settings.json").read_text())
    settings = load_settings(environ={}, state_dir=folder / "state", **options)
    with open_platform(settings, create=create) as platform:
        yield platform


def summary(folder: Path) -> Summary:
    with opened(folder) as platform:
        totals = "SELECT count(*) AS n, count(DISTINCT event_id) AS ids, sum(gpu_time_ns) AS ns FROM usage_events"
        with platform.database.read() as connection:
            kinds = list(connection.execute(sa.select(log_entries.c.type)).scalars())
        last = {hour: platform.hours.last_report(hour) for hour in platform.hours.known()}
        return Summary(
            platform.outbox.totals(),
            platform.query(totals).to_pylist(),
            (*platform.clickhouse.totals(), platform.clickhouse.duplicates()),
            dict(Counter(kinds)),
            {hour: f"{one.status} {one.dirty}" for hour, one in last.items() if one is not None},
            platform.verify(deep=True).verified,
        )


def run_here(folder: Path, name: str, job: str) -> None:
    """A job over the state folder of that name, in this process."""
    with dg.DagsterInstance.ephemeral() as instance:
        made = location_over(folder).resolve_job_def(job)
        tags = {STATE_TAG: name}
        partition = partition_of(job)
        assert made.execute_in_process(instance=instance, partition_key=partition, tags=tags, run_config=QUIET).success


def undisturbed(folder: Path, case: Case, dsn: str) -> tuple[Summary, int]:
    """The twin's end, and how many transactions the asset's body makes."""
    name = f"{case.asset}-twin"
    make_state(folder / name, case, dsn)
    run_here(folder, name, case.job)
    return summary(folder / name), int((folder / name / "count").read_text())


@contextmanager
def running_daemon(log: Path, environment: Mapping[str, str], *location: str) -> Iterator[None]:
    """Dagster's daemon over a code location, killed at the end with all that it started: they are one process group."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "dagster._daemon", "run", *location],
            cwd=CHECKOUT,
            env=clean_environment({"PYTHONWARNINGS": "ignore", **environment}),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


@contextmanager
def daemon(folder: Path) -> Iterator[dg.DagsterInstance]:
    """The daemon over this module, and over an instance in `folder` that is the product's but for shorter waits."""
    home = folder / "dagster"
    home.mkdir()
    sooner = re.sub(r"(poll_interval|free_slots_after_run_end)_seconds: \d+", r"\1_seconds: 1", DAGSTER_YAML)
    (home / "dagster.yaml").write_text(sooner)
    environment = {"DAGSTER_HOME": str(home), FOLDER: str(folder)}
    with (
        open_instance(home) as instance,
        running_daemon(folder / "daemon.log", environment, "-m", "tests.test_dagster_kills", "-a", "stopping"),
    ):
        yield instance


class Killed(NamedTuple):
    """What became of one asset's runs."""

    before: Summary
    after: Summary
    statuses: list[str]
    """Of its runs, the first one first."""
    pooled: bool
    """Whether the run that was killed held a slot of the pool."""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Killed]]:
    """Every asset's run, killed once, and left alone until a run of it has succeeded."""
    folder = tmp_path_factory.mktemp("kills")
    with bridge_over(folder / "clickhouse") as bridge:
        twins = {case.asset: undisturbed(folder, case, bridge.dsn) for case in CASES}
        for case in CASES:
            make_state(folder / case.asset, case, bridge.dsn)
            count = twins[case.asset][1]
            stops = [count // 2, "done"] if count else ["done"]
            stop = random.Random(f"{SEED}/stop/{case.asset}").choice(stops)
            (folder / case.asset / "stop").write_text(json.dumps(stop))
            asked = {"job_name": case.job, "partition_key": case.partition, "tags": {STATE_TAG: case.asset}}
            (folder / case.asset / "ask.json").write_text(json.dumps(asked))
        with daemon(folder) as instance:
            pooled = kill_all(folder, instance)
            found = {case.asset: runs_of(instance, case) for case in CASES}
            assert instance.event_log_storage.get_concurrency_info(SEQUENCER).active_slot_count == 0
        yield {
            case.asset: Killed(
                twins[case.asset][0], summary(folder / case.asset), found[case.asset], pooled[case.asset]
            )
            for case in CASES
        }


def kill_all(folder: Path, instance: dg.DagsterInstance) -> dict[str, bool]:
    """Kill each process that has stopped, until every asset has a run that succeeded. Gives who held a slot then."""
    pooled: dict[str, bool] = {}
    deadline = time.monotonic() + LIMIT_S
    while not all("SUCCESS" in runs_of(instance, case) for case in CASES):
        assert time.monotonic() < deadline, {case.asset: runs_of(instance, case) for case in CASES}
        for path in folder.glob("*/stopped"):
            holders = instance.event_log_storage.get_concurrency_info(SEQUENCER).active_run_ids
            mine = {run.run_id for run in instance.get_runs(dg.RunsFilter(tags={STATE_TAG: path.parent.name}))}
            pooled[path.parent.name] = bool(holders & mine)
            os.kill(int(path.read_text()), signal.SIGKILL)
            path.unlink()
        time.sleep(0.5)
    return pooled


def runs_of(instance: dg.DagsterInstance, case: Case) -> list[str]:
    runs = instance.get_runs(dg.RunsFilter(tags={STATE_TAG: case.asset}))
    return [run.status.value for run in reversed(runs)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.asset)
def test_a_run_that_is_killed_in_an_asset_is_made_up_for_without_a_hand(killed: dict[str, Killed], case: Case) -> None:
    found = killed[case.asset]
    ended, *others = found.statuses
    assert ended == "FAILURE", "the daemon ends the run that was killed"
    assert "SUCCESS" in others, "a retry of it, or the next one that is asked for, does its work"
    assert found.after == found.before, "as if nobody had been killed"
    assert found.after.verified
    pools = defs.resolve_asset_graph().get(dg.AssetKey(case.asset)).pools or ()
    assert found.pooled == (SEQUENCER in pools), "a killed run holds its slot: its successor could not run otherwise"
