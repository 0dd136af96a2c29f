"""Backfills of `reconciliation`: over ranges, from the command line and the daemon, cut off, repeated, and measured."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import dagster as dg
import pytest
import sqlalchemy as sa
from dagster import DagsterEventType

from assets.jobs import RANGE, hour_key, hours_of
from definitions import defs
from render_platform.clock import HOUR_US
from render_platform.database import log_entries
from render_platform.errors import Unavailable
from render_platform.events import table_from_events
from render_platform.hours import LastReport
from tests.chdb_server import dsn_of
from tests.commands import CHECKOUT, clean_environment
from tests.conftest import SEED
from tests.factories import START_US
from tests.platforms import record
from tests.test_dagster_layer import (
    LANE,
    Location,
    location,  # noqa: F401  fixtures
    open_location,
    sound_events,
)
from tests.test_dagster_runs import of_partition

KEY = dg.AssetKey("reconciliation")
RANGE_BYTES, SINGLE_BYTES = 24_000, 400_000
"""Bounds of what Dagster writes for one partition: in a run over a range, and in a run of its own, with its plot."""
LAUNCH = """
mutation($names: [String!]!) {
  launchPartitionBackfill(backfillParams: {assetSelection: [{path: ["reconciliation"]}], partitionNames: $names}) {
    __typename ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message }
  }
}"""
STATUS = "query($id: String!) { partitionBackfillOrError(backfillId: $id) { ... on PartitionBackfill { status } } }"


def hours(count: int) -> list[int]:
    return [START_US + number * HOUR_US for number in range(count)]


def record_hours(location: Location, rng: random.Random, count: int, lose: int = 0) -> None:
    """Three events in each of `count` closed hours, flushed; the first `lose` never reached ClickHouse."""
    made = [event for hour in hours(count) for event in sound_events(rng, 3, hour)]
    recorded = record(location.platform, LANE, made)
    location.platform.clickhouse.insert_events(table_from_events(recorded[lose:]), "first")
    location.finish_lane(count)
    location.dagster.flush()


def record_late(location: Location, rng: random.Random, hour_us: int, count: int) -> None:
    """A lane of its own brings more events into an hour; they reach ClickHouse as well."""
    late = record(location.platform, "trace/late", sound_events(rng, count, hour_us))
    location.platform.clickhouse.insert_events(table_from_events(late), "late")
    with location.platform.database.write() as connection:
        location.platform.outbox.finish_lane(connection, "trace/late", hour_us + 2 * HOUR_US)
    location.dagster.flush()


def reports(location: Location, count: int) -> list[LastReport | None]:
    return [location.platform.hours.last_report(hour) for hour in hours(count)]


def logged(location: Location) -> list[str]:
    """The reports that the log holds, by hour and revision, in its order."""
    query = sa.select(log_entries.c.batch_id).where(log_entries.c.type == "reconciliation")
    with location.platform.database.read() as connection:
        return [str(name) for name in connection.execute(query.order_by(log_entries.c.log_index)).scalars()]


def names_of(count: int) -> list[str]:
    """What the log calls the first report of each hour."""
    return [f"{hour_key(hour)[:10]}T{hour_key(hour)[11:13]}/r1" for hour in hours(count)]


def said(location: Location) -> dict[str | None, dict[str, Any]]:
    """The newest metadata of each hour."""
    return of_partition(list(reversed(location.materializations("reconciliation"))))


@contextmanager
def shared_location(state: Path, **more: str) -> Iterator[Location]:
    """A state whose ClickHouse other processes can reach too."""
    with open_location(state, RENDER_PLATFORM_CLICKHOUSE_DSN=dsn_of("bridge"), **more) as opened:
        yield opened


def environment(location: Location) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name.startswith("RENDER_PLATFORM_")}
    return clean_environment({**kept, "DAGSTER_HOME": str(location.state / "dagster")})


def until(reached: Callable[[], bool], within_s: float = 120, every_s: float = 0.05) -> None:
    deadline = time.monotonic() + within_s
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(every_s)


# From the UI, by the daemon. It looks every half a minute: the other tests run meanwhile.


class Launched(NamedTuple):
    """A state over which Dagster runs with its UI, and the backfill that was launched there."""

    state: Path
    database: str
    url: str
    begun: dict[str, Any]


@pytest.fixture(scope="module")
def from_ui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    state = tmp_path_factory.mktemp("ui") / "state"
    with shared_location(state) as location:
        record_hours(location, random.Random(f"{SEED}/ui"), 5)
        given, database = environment(location), os.environ["RENDER_PLATFORM_CLICKHOUSE_DATABASE"]
    with dagster_dev(state / "dev.log", given) as url:
        begun = graphql(url, LAUNCH, names=[hour_key(hour) for hour in hours(5)])["launchPartitionBackfill"]
        yield Launched(state, database, url, begun)


@contextmanager
def dagster_dev(log: Path, given: Mapping[str, str]) -> Iterator[str]:
    """The URL of a webserver and daemon over the code location; they are one process group, killed at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("w") as output:
        dev = subprocess.Popen(
            [sys.executable, "-m", "dagster", "dev", "-w", "workspace.yaml", "-h", "127.0.0.1", "-p", str(port)],
            cwd=CHECKOUT,
            env=given,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: answers(url) or dev.poll() is not None)
        assert dev.poll() is None, log.read_text()
        yield url
    finally:
        os.killpg(dev.pid, signal.SIGKILL)
        dev.wait(30)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/server_info", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def graphql(url: str, query: str, **variables: Any) -> Any:
    data = json.dumps({"query": query, "variables": variables}).encode()
    request = urllib.request.Request(f"{url}/graphql", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["data"]


def status(launched: Launched) -> str:
    found = graphql(launched.url, STATUS, id=launched.begun["backfillId"])
    return str(found["partitionBackfillOrError"]["status"])


def test_a_backfill_is_launched_from_the_ui(from_ui: Launched) -> None:
    assert from_ui.begun["__typename"] == "LaunchBackfillSuccess", from_ui.begun


# A backfill says what the live run said, or what has changed since.


def test_a_backfill_gives_the_live_runs_reports_byte_for_byte(location: Location, rng: random.Random) -> None:
    record_hours(location, rng, 4, lose=2)
    for hour in hours(4):  # live: one run an hour
        assert location.run("reconcile", hour_key(hour)).success
    live, entries = reports(location, 4), location.logged()
    assert {one["changed"] for one in said(location).values()} == {"first report"}

    location.dagster.reconcile(hours(4))
    assert reports(location, 4) == live, "same digests, same revisions"
    assert location.logged() == entries, "and nothing was logged again"
    found = said(location)
    assert {one["changed"] for one in found.values()} == {"unchanged since revision 1"}
    assert found[hour_key(START_US)]["status"] == "discrepant"
    for last in live:
        assert last is not None
        assert json.loads(location.platform.cas.get(last.digest))["revision"] == 1


def test_a_backfill_names_what_has_changed_since(location: Location, rng: random.Random) -> None:
    record_hours(location, rng, 3)
    location.dagster.reconcile(hours(3))
    before = reports(location, 3)
    record_late(location, rng, START_US + HOUR_US, 2)
    location.dagster.reconcile(hours(3))
    first, second, third = (said(location)[hour_key(hour)] for hour in hours(3))
    assert first["changed"] == third["changed"] == "unchanged since revision 1"
    assert second["revision"] == 2
    assert second["changed"] == (
        "revision 1 → 2: batches 1 → 2, events 3 → 5, fast events 3 → 5, "
        "GPU ns 3000000 → 5000000, fast GPU ns 3000000 → 5000000"
    )
    assert [reports(location, 3)[n] for n in (0, 2)] == [before[n] for n in (0, 2)]
    entries = location.logged()
    location.dagster.reconcile(hours(3))
    assert said(location)[hour_key(START_US + HOUR_US)]["changed"] == "unchanged since revision 2"
    assert location.logged() == entries


def test_an_hour_that_cannot_be_read_spoils_no_other(location: Location, rng: random.Random) -> None:
    record_hours(location, rng, 3)
    (entry,) = location.platform.slow.hour(START_US + HOUR_US)
    digest = str(entry.subject_digest)
    blob = location.state / "blobs" / "sha256" / digest[:2] / digest[2:]
    kept = blob.rename(location.state / "kept")
    with pytest.raises(Unavailable, match="1 of 3 hours could not be read: 2023-11-16T19h unavailable"):
        location.dagster.reconcile(hours(3))
    assert set(said(location)) == {hour_key(START_US), hour_key(START_US + 2 * HOUR_US)}
    assert location.platform.hours.last_report(START_US + HOUR_US) is None
    kept.rename(blob)
    location.dagster.reconcile(hours(3))
    assert {one["status"] for one in said(location).values()} == {"reconciled"}
    assert sorted(logged(location)) == names_of(3)


# From the command line, cut off and launched again.


def launch_range(location: Location, count: int) -> subprocess.Popen[str]:
    """What `dg launch --assets reconciliation --partition-range` calls, under its older name."""
    command = [sys.executable, "-m", "dagster", "asset", "materialize", "-m", "definitions", "-a", "ranges"]
    keys = f"{hour_key(hours(count)[0])}...{hour_key(hours(count)[-1])}"
    return subprocess.Popen(
        [*command, "--select", "reconciliation", "--partition-range", keys],
        cwd=CHECKOUT,
        env=environment(location),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_a_range_that_is_killed_keeps_what_is_done_and_goes_on_when_launched_again(
    tmp_path: Path, rng: random.Random
) -> None:
    count = 40
    with shared_location(tmp_path / "state") as location:
        record_hours(location, rng, count)
        running = launch_range(location, count)
        until(lambda: len(logged(location)) >= 3 or running.poll() is not None)
        running.send_signal(signal.SIGKILL)
        output = running.communicate(timeout=60)[0]
        done, shown = logged(location), set(said(location))
        assert 3 <= len(done) < count, output
        assert done == names_of(len(done))
        assert {hour_key(hour) for hour in hours(len(done) - 1)} <= shown, "done hours stand in Dagster too"
        assert len(shown) <= len(done)

        again = launch_range(location, count)
        output = again.communicate(timeout=120)[0]
        assert again.returncode == 0, output
        assert logged(location) == names_of(count), "only what was missing is logged, nothing twice"
        found = said(location)
        assert set(found) == {hour_key(hour) for hour in hours(count)}
        assert found[hour_key(START_US)]["changed"] == "unchanged since revision 1"
        assert found[hour_key(hours(count)[-1])]["changed"] == "first report"


def test_backfills_are_runs_of_a_month_one_at_a_time(location: Location) -> None:
    policy = defs.resolve_asset_graph().get(KEY).backfill_policy
    assert policy is not None
    assert policy.max_partitions_per_run == RANGE == 744
    queue = location.instance.get_concurrency_config().run_queue_config
    assert queue is not None
    limited = {limit["key"]: limit["limit"] for limit in queue.tag_concurrency_limits}
    assert limited == {"dagster/backfill": 1, "render_platform/reconciles": 1}
    assert queue.max_concurrent_runs > sum(limited.values()), "a flush always finds a place"
    assert "render_platform/reconciles" in defs.resolve_job_def("reconcile").run_tags


# What a partition costs.


def written(location: Location, partitions: int, launch: Callable[[], object]) -> int:
    """The bytes that Dagster's instance grows by for a partition."""
    before = size_of(location.state / "dagster")
    launch()
    return (size_of(location.state / "dagster") - before) // partitions


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_event_log_grows_by_little_for_a_partition(
    location: Location, rng: random.Random, capsys: pytest.CaptureFixture[str]
) -> None:
    record_hours(location, rng, 100, lose=6)
    over_range = written(location, 100, lambda: location.dagster.reconcile(hours(100)))
    alone = written(location, 1, lambda: location.dagster.reconcile([START_US]))
    with capsys.disabled():
        print(f"\n  bytes of event log a partition: {over_range:,} in a run of 100, {alone:,} in a run of its own")
    assert over_range < RANGE_BYTES
    assert alone < SINGLE_BYTES
    sizes = events_of(location, DagsterEventType.ASSET_MATERIALIZATION)
    assert max(sizes) - min(sizes) < 1_000, "of a range, no event holds more than a few figures"


def events_of(location: Location, kind: DagsterEventType) -> Sequence[int]:
    """The length of each event of the first reconcile run."""
    run = location.instance.get_runs(dg.RunsFilter(job_name="reconcile"))[-1]
    records = location.instance.get_records_for_run(run.run_id, of_type=kind, limit=200).records
    return [len(dg.serialize_value(record.event_log_entry)) for record in records]


# The backfill from the UI, once more.


def test_a_backfill_from_the_ui_is_one_run_of_the_daemon_s(from_ui: Launched) -> None:
    until(lambda: status(from_ui) != "REQUESTED", within_s=240, every_s=0.5)
    assert status(from_ui) == "COMPLETED_SUCCESS"
    with shared_location(from_ui.state, RENDER_PLATFORM_CLICKHOUSE_DATABASE=from_ui.database) as location:
        runs = location.instance.get_runs(dg.RunsFilter(tags={"dagster/backfill": from_ui.begun["backfillId"]}))
        assert [list(hours_of(run)) for run in runs] == [hours(5)]
        assert logged(location) == names_of(5)
        assert set(said(location)) == {hour_key(hour) for hour in hours(5)}
