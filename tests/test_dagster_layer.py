"""The code location: what it declares, and its jobs, checks, sensor and schedule on real instances and real states."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa
from dagster_duckdb import DuckDBResource

from assets import ASSETS
from assets.jobs import HOURS, hour_key
from definitions import defs
from render_platform.clock import HOUR_US, US_PER_SECOND, SystemClock
from render_platform.database import log_entries
from render_platform.events import UsageEvent
from render_platform.pipeline import Platform
from resources.local import LocalDagster
from resources.platform import PlatformResource
from sensors.outbox import outbox_backlog
from tests.commands import CHECKOUT, clean_environment, own_clickhouse, restored_process
from tests.factories import START_US, make_event
from tests.homes import give_home
from tests.platforms import LIVE, make_platform, record

NOWHERE = "http://127.0.0.1:9"
QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
LANE = "trace/test"
GROUPS = {"serving", "billing", "storage", "compliance", "fast_path", "operations"}
LINEAGE = {
    "gpu_jobs": set(),
    "inference_events": {"gpu_jobs"},
    "sealed_batches": {"gpu_jobs"},
    "cas_batches": {"sealed_batches"},
    "audit_log": {"cas_batches"},
    "audit_verification": {"audit_log"},
    "reconciliation": {"audit_log", "inference_events"},
    "fast_path_repair": {"reconciliation"},
    "daily_report": {"inference_events", "reconciliation"},
}
BLOCKING = {"digests", "conservation", "chain_and_signature"}
"""Of the job flush."""
OFFLINE = """
import socket, sys
def refuse(*_args, **_kwargs):
    raise RuntimeError("the network was used while loading")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
sys.path.insert(0, ".")
import dagster as dg
from definitions import defs
dg.Definitions.validate_loadable(defs)
print(len(defs.resolve_asset_graph().get_all_asset_keys()))
"""


# What is declared.


def test_the_workspace_validates() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dagster", "definitions", "validate", "-w", "workspace.yaml"],
        cwd=CHECKOUT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "render_platform" in done.stdout + done.stderr


@pytest.mark.parametrize("environment", [{}, {"RENDER_PLATFORM_NONSENSE": "1", "RENDER_PLATFORM_BATCH_ROWS": "many"}])
def test_loading_reads_no_environment_and_no_network(tmp_path: Path, environment: dict[str, str]) -> None:
    before = sorted(path.name for path in CHECKOUT.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        cwd=CHECKOUT,
        env={"HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= len(LINEAGE)
    assert sorted(path.name for path in CHECKOUT.iterdir()) == before, "loading makes nothing"


def specs() -> dict[str, dg.AssetSpec]:
    found = [spec for asset in ASSETS for spec in ([asset] if isinstance(asset, dg.AssetSpec) else asset.specs)]
    return {spec.key.to_user_string(): spec for spec in found}


def test_each_asset_says_what_it_is() -> None:
    for name, spec in specs().items():
        assert len(spec.description or "") > 40, name
        assert spec.group_name in GROUPS, name
        assert spec.kinds, name
        assert spec.owners, name
        assert spec.owners[0].startswith("team:"), name


def test_the_lineage_is_the_designed_one() -> None:
    found = {name: {dep.asset_key.to_user_string() for dep in spec.deps} for name, spec in specs().items()}
    assert {name: found.get(name) for name in LINEAGE} == LINEAGE
    graph = defs.resolve_asset_graph()
    assert {key.to_user_string() for key in graph.get_all_asset_keys()} == set(found)


def test_partitions_and_backfills() -> None:
    found = specs()
    for name in ("sealed_batches", "cas_batches", "audit_log"):
        assert found[name].partitions_def is None
    for name in ("reconciliation", "fast_path_repair"):
        assert isinstance(found[name].partitions_def, dg.HourlyPartitionsDefinition)
    for name in ("audit_verification", "daily_report"):
        assert isinstance(found[name].partitions_def, dg.DailyPartitionsDefinition)
    now = datetime.now(UTC)
    assert HOURS.has_partition_key(hour_key(SystemClock().now_us())), "the current hour can be materialized"
    assert not HOURS.has_partition_key(f"{now + timedelta(hours=2):%Y-%m-%d-%H}:00")
    assert HOURS.get_first_partition_key() == "2023-01-01-00:00"
    graph = defs.resolve_asset_graph()
    for name in ("reconciliation", "fast_path_repair", "audit_verification", "daily_report"):
        policy = graph.get(dg.AssetKey(name)).backfill_policy
        assert policy is not None
        assert (policy.max_partitions_per_run or 0) >= 24, "a day is one run"


def test_checks_that_stop_wrong_data_block() -> None:
    graph = defs.resolve_asset_graph()
    found = {key.name: graph.get_check_spec(key) for key in graph.asset_check_keys}
    assert {*BLOCKING, "threshold", "duplicates"} <= set(found)
    assert {name for name, spec in found.items() if spec.blocking} >= {*BLOCKING, "billed_once"}
    assert all(spec.description for spec in found.values())


def test_flush_is_one_job_in_one_process() -> None:
    job = defs.resolve_job_def("flush")
    assert {key.to_user_string() for key in job.asset_layer.selected_asset_keys} == {
        *("sealed_batches", "cas_batches", "audit_log")
    }
    assert job.executor_def.name == dg.in_process_executor.name
    assert int(job.tags["dagster/priority"]) > 0


# A state folder, an instance over it, and jobs run on it.


@dataclass
class Location:
    """A new platform state, and the Dagster instance that is kept inside it."""

    state: Path
    platform: Platform
    dagster: LocalDagster
    patch: pytest.MonkeyPatch

    @property
    def instance(self) -> dg.DagsterInstance:
        return self.dagster._instance

    @property
    def resource(self) -> PlatformResource:
        return PlatformResource(state_dir=str(self.state), duckdb=DuckDBResource(database=":memory:"))

    def run(self, job: str, partition: str | None = None) -> dg.ExecuteInProcessResult:
        return defs.resolve_job_def(job).execute_in_process(
            instance=self.instance, partition_key=partition, run_config=QUIET, raise_on_error=False
        )

    def materializations(self, name: str, run_id: str | None = None) -> list[dg.AssetMaterialization]:
        found = self.instance.fetch_materializations(dg.AssetKey(name), limit=100).records
        chosen = [record for record in found if run_id is None or record.run_id == run_id]
        return [record.asset_materialization for record in chosen if record.asset_materialization]

    def logged(self) -> int:
        with self.platform.database.read() as connection:
            return int(connection.execute(sa.select(sa.func.count()).select_from(log_entries)).scalar_one())

    def finish_lane(self, hours: int) -> None:
        """The lane's clock moves past its hours and the fast path's deadline."""
        with self.platform.database.write() as connection:
            self.platform.outbox.finish_lane(connection, LANE, START_US + hours * HOUR_US + 60 * US_PER_SECOND)


@contextmanager
def open_location(state: Path, **environment: str) -> Iterator[Location]:
    with restored_process(), pytest.MonkeyPatch.context() as patch:
        given = {**own_clickhouse(), "RENDER_PLATFORM_STATE_DIR": str(state), **environment}
        for name, value in given.items():
            patch.setenv(name, value)
        options = {
            name.removeprefix("RENDER_PLATFORM_").lower(): value
            for name, value in os.environ.items()
            if name.startswith("RENDER_PLATFORM_CLICKHOUSE")
        }
        platform = make_platform(state, SystemClock(), **options)
        give_home(platform.settings.dagster_home)
        local = LocalDagster(platform.settings)
        try:
            yield Location(state, platform, local, patch)
        finally:
            local.close()
            platform.close()


@pytest.fixture
def location(tmp_path: Path) -> Iterator[Location]:
    with open_location(tmp_path / "state") as opened:
        yield opened


def sound_events(rng: random.Random, count: int, start_us: int = START_US, span_us: int = HOUR_US) -> list[UsageEvent]:
    """One after the other on one device, each billed for all of its time."""
    step = span_us // (count + 1)
    return [
        make_event(
            rng,
            device_uuid="GPU-0",
            gpu_count=1,
            gpu_started_at=start_us + number * step,
            event_time=start_us + number * step + 1_000,
            recorded_at=start_us + number * step + 1_000,
            gpu_time_ns=1_000_000,
        )
        for number in range(count)
    ]


def billed_twice(rng: random.Random) -> list[UsageEvent]:
    """Two jobs at the same time on one device, each billed for the whole of it."""
    times = {"gpu_started_at": START_US, "event_time": START_US + 1_000_000, "recorded_at": START_US + 1_000_000}
    same: dict[str, Any] = {
        **times,
        "device_uuid": "GPU-0",
        "gpu_count": 1,
        "gpu_time_ns": 1_000_000_000,
        "meter": "nvml",
    }
    return [make_event(rng, **same) for _ in range(2)]


def checks_of(result: dg.ExecuteInProcessResult) -> dict[str, bool]:
    return {found.check_name: found.passed for found in result.get_asset_check_evaluations()}


def flip_blob(location: Location) -> Path:
    digest = str(location.platform.stored_unlogged()[0]["blob_digest"])
    path = location.state / "blobs" / "sha256" / digest[:2] / digest[2:]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def restore_blob(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def table_of(materialization: dg.AssetMaterialization, name: str) -> list[dict[str, Any]]:
    """The rows of a metadata table."""
    value = materialization.metadata[name]
    assert isinstance(value, dg.TableMetadataValue)
    return [dict(found.data) for found in value.records]


# Flush, and the checks that keep wrong data out of the log.


def test_flush_materializes_with_metadata(location: Location, rng: random.Random) -> None:
    record(location.platform, LANE, sound_events(rng, 40))
    result = location.run("flush")
    assert result.success
    assert checks_of(result) == dict.fromkeys(BLOCKING, True)
    (sealed,), (stored,), (logged,) = map(location.materializations, ("sealed_batches", "cas_batches", "audit_log"))
    assert sealed.metadata["batches sealed"].value == 1
    assert sealed.metadata["events still unsealed"].value == 0
    assert stored.metadata["dagster/row_count"].value == 40
    (batch,) = table_of(stored, "batches")
    assert (batch["records"], batch["gpu_time_ns"]) == (40, str(40 * 1_000_000))
    assert logged.metadata["entries added"].value == logged.metadata["tree size"].value == location.logged() == 1
    assert "render-platform" in str(logged.metadata["checkpoint"].value)
    run = location.instance.get_run_by_id(result.run_id)
    assert run is not None
    assert (run.job_name, run.status) == ("flush", dg.DagsterRunStatus.SUCCESS)
    again = location.run("flush")
    assert again.success
    assert location.logged() == 1, "a flush with nothing to do adds nothing"


def test_a_device_billed_for_more_than_its_time_stays_out_of_the_log(location: Location, rng: random.Random) -> None:
    record(location.platform, LANE, billed_twice(rng))
    result = location.run("flush")
    assert not result.success
    assert checks_of(result) == {"digests": True, "conservation": False}
    (failed,) = [found for found in result.get_asset_check_evaluations() if not found.passed]
    assert "GPU-0 was billed 2000000000 ns and was busy for 1000000000 ns" in (failed.description or "")
    assert location.materializations("audit_log") == []
    assert location.logged() == 0
    assert not (location.state / "log" / "checkpoint").exists()
    assert [batch["records"] for batch in location.platform.stored_unlogged()] == [2], "kept, and not billed"


def test_two_jobs_that_share_a_device_s_time_pass(location: Location, rng: random.Random) -> None:
    halves = [{"gpu_time_ns": 500_000_000}, {"gpu_time_ns": 500_000_000}]
    times = {"gpu_started_at": START_US, "event_time": START_US + 1_000_000, "recorded_at": START_US + 1_000_000}
    record(
        location.platform, LANE, [make_event(rng, **times, device_uuid="GPU-0", gpu_count=1, **half) for half in halves]
    )
    assert location.run("flush").success
    assert location.logged() == 1


def test_an_object_that_is_not_what_was_stored_stays_out_of_the_log(location: Location, rng: random.Random) -> None:
    record(location.platform, LANE, sound_events(rng, 5))
    location.platform.seal()
    location.platform.store()
    path = flip_blob(location)
    result = location.run("flush")
    assert not result.success
    assert checks_of(result)["digests"] is False
    said = [found.description or "" for found in result.get_asset_check_evaluations() if found.check_name == "digests"]
    assert path.name in said[0]
    assert location.materializations("audit_log") == []
    assert location.logged() == 0

    restore_blob(path)
    assert location.run("flush").success
    assert location.logged() == 1


def test_a_tail_that_was_changed_fails_the_chain_s_check(location: Location, rng: random.Random) -> None:
    record(location.platform, LANE, sound_events(rng, 5))
    assert location.run("flush").success
    with location.platform.database.write() as connection:
        connection.execute(sa.update(log_entries).values(entry=b"{}"))
    result = location.run("flush")
    assert not result.success
    assert checks_of(result) == {**dict.fromkeys(BLOCKING, True), "chain_and_signature": False}


# The backlog's sensor.


def tick(location: Location) -> dg.RunRequest | dg.SkipReason:
    resources = {"platform": location.resource}
    with dg.build_sensor_context(instance=location.instance, resources=resources) as context:
        result = outbox_backlog(context)
    assert isinstance(result, dg.RunRequest | dg.SkipReason)
    return result


def skipped(result: dg.RunRequest | dg.SkipReason) -> str:
    assert isinstance(result, dg.SkipReason), result
    return str(result.skip_message)


def requested(result: dg.RunRequest | dg.SkipReason) -> dg.RunRequest:
    assert isinstance(result, dg.RunRequest), result
    return result


def record_live(location: Location, rng: random.Random, count: int, age_s: int = 0) -> None:
    span_us = (count + 1) * 2_000
    start_us = SystemClock().now_us() - age_s * US_PER_SECOND - span_us
    record(location.platform, LIVE, sound_events(rng, count, start_us, span_us))


def test_the_sensor_skips_where_there_is_no_state(tmp_path: Path) -> None:
    resource = PlatformResource(state_dir=str(tmp_path / "none"), duckdb=DuckDBResource(database=":memory:"))
    with dg.build_sensor_context(resources={"platform": resource}) as context:
        result = outbox_backlog(context)
    assert isinstance(result, dg.SkipReason)
    assert "no platform state" in str(result.skip_message)
    assert not (tmp_path / "none").exists()


def test_the_sensor_waits_for_rows_or_age(location: Location, rng: random.Random) -> None:
    assert "empty" in skipped(tick(location))
    record_live(location, rng, 3)
    assert "3 events wait" in skipped(tick(location))
    location.patch.setenv("RENDER_PLATFORM_BACKLOG_ROWS", "3")
    request = requested(tick(location))
    assert request.run_key is None, "a key of the high-water mark would never fire again after a failure"
    assert request.tags["render_platform/backlog_rows"] == "3"
    assert location.run("flush").success
    assert "empty" in skipped(tick(location))
