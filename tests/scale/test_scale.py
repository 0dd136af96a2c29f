"""PostgreSQL, SeaweedFS, ClickHouse behind the bridge, three gateways and two flushers, under an hour's traffic in four
minutes; one of each kind is killed and started again, and one gateway is frozen for longer than its lease."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import statistics
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from render_platform.clock import HOUR_US, ManualClock, SystemClock, SystemIds
from render_platform.config import Settings, load_settings
from render_platform.database import jobs, open_database, usage_events
from render_platform.gateway.jobs import Acceptance
from render_platform.gateway.leases import takeovers
from render_platform.note import Checkpoint, load_or_create_key, open_note
from render_platform.pipeline import Platform, open_platform
from tests.conformance import s3_server
from tests.gateway.test_several_gateways import check_numbers
from tests.platforms import check_chain, read_blob, read_log, read_published, rows_of_parquet, tree_hash
from tests.scale.parts import LEASE_S, Part, make_bridge, make_flusher, make_gateway, make_postgres, make_seaweed
from tests.scale.traffic import Told, drive

pytestmark = pytest.mark.skipif(
    not os.environ.get("RENDER_TEST_SCALE"), reason="THE WHOLE AT ONCE IS NOT TESTED: run `make test-scale`"
)
JOBS, SECONDS = 7_200, float(os.environ.get("RENDER_TEST_SCALE_SECONDS", "240"))
"""Two requests a second for an hour."""
GATEWAYS, FLUSHERS = ("g0", "g1", "g2"), ("f0", "f1")


@dataclass
class Whole:
    parts: dict[str, Part]
    urls: list[str]
    settings: Settings
    seen: dict[int, bytes] = field(default_factory=dict)
    """Size → root of every checkpoint that was published while the parts were killed."""


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Whole]:
    s3_server.use_credentials(monkeypatch)
    database, url = make_postgres(tmp_path / "pg")
    store, endpoint = make_seaweed(tmp_path / "s3")
    bridge, dsn = make_bridge(tmp_path / "ch")
    parts = {part.name: part for part in (database, store, bridge)}
    names = {"DATABASE_URL": url, "OBJECTS_URL": "s3://versioned/platform", "OBJECTS_ENDPOINT": endpoint}
    env = {f"RENDER_PLATFORM_{name}": value for name, value in {**names, "CLICKHOUSE_DSN": dsn}.items()}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with ExitStack() as stack:
        for part in parts.values():
            stack.callback(part.signal, signal.SIGKILL)
            part.start()
        client = s3_server.client(endpoint)
        client.create_bucket(Bucket="versioned")
        client.put_bucket_versioning(Bucket="versioned", VersioningConfiguration={"Status": "Enabled"})
        settings = load_settings(state_dir=tmp_path / "control")
        with open_platform(settings) as platform:  # the log begins, and its keys are made
            platform.flush()
        load_or_create_key(settings.keys_dir / "gateway.key", "example.com/gateways")
        urls = []
        for name in GATEWAYS:
            shutil.copytree(settings.keys_dir, tmp_path / name / "keys")
            parts[name], at = make_gateway(name, tmp_path / name, env)
            urls.append(at)
        for name in FLUSHERS:
            shutil.copytree(settings.keys_dir, tmp_path / name / "keys")
            parts[name] = make_flusher(name, tmp_path / name, env)
        for name in (*GATEWAYS, *FLUSHERS):
            stack.callback(parts[name].signal, signal.SIGKILL)
            parts[name].start()
        yield Whole(parts, urls, settings)


def faults(whole: Whole) -> list[tuple[float, str, Callable[[], object]]]:
    """When, as a part of the time; what; and how."""
    parts = whole.parts

    def killed(name: str, away_s: float) -> Callable[[], object]:
        def act() -> None:
            parts[name].kill()
            time.sleep(away_s)
            parts[name].start()

        return act

    def frozen(name: str, for_s: float) -> Callable[[], object]:
        def act() -> None:
            parts[name].signal(signal.SIGSTOP)
            time.sleep(for_s)
            process = parts[name].process
            parts[name].signal(signal.SIGCONT)
            assert process.wait(30) == 3, "it did not notice that others work on its jobs"

        return act

    return [
        (0.05, "gateway g0 killed, back after two leases", killed("g0", 2.2 * LEASE_S)),
        (0.10, "flusher f0 killed", killed("f0", 3)),
        (0.35, "PostgreSQL killed", killed("postgresql", 2)),
        (0.50, "SeaweedFS killed", killed("seaweedfs", 3)),
        (0.60, "the bridge killed", killed("bridge", 10)),
        (0.65, "gateway g2 frozen for two leases", frozen("g2", 2.2 * LEASE_S)),
        (0.75, "flusher f1 killed", killed("f1", 1)),
    ]


def harm(whole: Whole, begun: float) -> list[threading.Thread]:
    """The faults, each in a thread: some overlap. What goes wrong in one is raised by `joined`."""
    threads = []
    for share, what, act in faults(whole):

        def run(share: float = share, what: str = what, act: Callable[[], object] = act) -> None:
            time.sleep(max(0.0, begun + share * SECONDS - time.monotonic()))
            print(f"{time.monotonic() - begun:6.1f} s  {what}", flush=True)
            act()
            print(f"{time.monotonic() - begun:6.1f} s  it is back", flush=True)

        threads.append(threading.Thread(target=run, name=what))
        threads[-1].start()
    return threads


def watch(whole: Whole, over: threading.Event) -> threading.Thread:
    """Keep every checkpoint that anybody could have seen."""
    key = load_or_create_key(whole.settings.keys_dir / "checkpoint.key", "unused").verifier

    def run() -> None:
        client = s3_server.client(str(whole.settings.objects_endpoint))
        while not over.is_set():
            with suppress(Exception):  # the store is away: there is nothing to see
                note = client.get_object(Bucket="versioned", Key="platform/log/checkpoint")["Body"].read().decode()
                checkpoint = Checkpoint.parse(open_note(note, [key])[0])
                known = whole.seen.setdefault(checkpoint.size, checkpoint.root)
                assert known == checkpoint.root, f"two checkpoints of size {checkpoint.size}"
            over.wait(0.2)

    thread = threading.Thread(target=run, name="watch")
    thread.start()
    return thread


def supervise(whole: Whole, over: threading.Event) -> threading.Thread:
    """What ends by itself is started again."""

    def run() -> None:
        while not over.wait(1):
            for name in (*GATEWAYS, *FLUSHERS):
                whole.parts[name].look_after()

    thread = threading.Thread(target=run, name="supervise")
    thread.start()
    return thread


def test_everything_at_once(whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    told, over, begun = Told(), threading.Event(), time.monotonic()
    watching, supervising, harming = watch(whole, over), supervise(whole, over), harm(whole, begun)
    asyncio.run(drive(whole.urls, JOBS, SECONDS, 1, told))
    for thread in harming:
        thread.join()
    assert not failed, failed
    wait_for_ends(whole)
    over.set()
    watching.join()
    supervising.join()
    for name in GATEWAYS:
        whole.parts[name].stop()
    for name in FLUSHERS:
        whole.parts[name].kill()
        assert whole.parts[name].starts >= 2
    took_s = time.monotonic() - begun

    check_jobs(whole, told)
    figures = check_books(whole)
    check_log(whole, tmp_path / "copy")
    spread = statistics.quantiles(told.accept_ms, n=100)
    print(
        f"\n{JOBS} requests in {SECONDS:.0f} s, {took_s:.0f} s to the last end; answers {dict(told.statuses)};"
        f" p50 {spread[49]:.0f} ms, p99 {spread[98]:.0f} ms\n{figures}; {len(whole.seen)} checkpoints seen on the way"
    )


def rows(whole: Whole, query: sa.Select[Any]) -> list[Any]:
    with closing(open_database(whole.settings.database)) as database, database.read() as connection:
        return list(connection.execute(query).all())


def wait_for_ends(whole: Whole) -> None:
    until = time.monotonic() + 120
    left = sa.select(sa.func.count()).select_from(jobs).where(jobs.c.state.in_(["queued", "running"]))
    while count := rows(whole, left)[0][0]:
        assert time.monotonic() < until, f"{count} jobs have not ended"
        time.sleep(0.5)


def check_jobs(whole: Whole, told: Told) -> None:
    """What was accepted has ended, with one event each, and as its client was told."""
    found = {str(uuid.UUID(bytes=row.job_id)): row for row in rows(whole, sa.select(jobs))}
    billed = Counter(str(uuid.UUID(bytes=row.job_id)) for row in rows(whole, sa.select(usage_events.c.job_id)))
    assert {row.state for row in found.values()} <= {"success", "error", "timeout", "cancelled"}
    assert set(billed.values()) == {1}
    assert billed.keys() == found.keys()
    assert told.accepted.keys() <= found.keys()
    assert {found[job].state for job in told.answered} == {"success"}
    assert {found[job].state for job in told.accepted} == {"success"}, "queued jobs run again wherever they were"
    assert all(len(stood_for) == 1 for stood_for in told.keys.values())
    check_numbers(whole.settings.database)
    key = load_or_create_key(whole.settings.keys_dir / "gateway.key", "unused").verifier
    for job, note in told.accepted.items():
        said = Acceptance.open(note, key)
        assert (said.job_id, said.gateway, said.epoch, said.seq) == (
            job,
            *(getattr(found[job], name) for name in ("gateway_id", "epoch", "seq")),
        )
    assert rows(whole, sa.select(sa.func.count()).select_from(takeovers))[0][0] >= 3
    check_devices(whole)


def check_devices(whole: Whole) -> None:
    """On each device, what is billed is no more than the time that it was there."""
    spans: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for row in rows(whole, sa.select(usage_events).where(usage_events.c.device_uuid.is_not(None))):
        spans[row.device_uuid].append((row.gpu_started_at, row.event_time, row.gpu_time_ns))
    assert len(spans) == len(GATEWAYS)
    for found in spans.values():
        elapsed_us = max(end for _, end, _ in found) - min(start for start, _, _ in found)
        assert sum(ns for _, _, ns in found) <= elapsed_us * 1_000


def check_books(whole: Whole, *, lossy: bool = True) -> str:
    """Both paths agree after repair, and all of it is proven; two hours later, when the hours are over."""
    clock = ManualClock(SystemClock().now_us() + 2 * HOUR_US)
    with closing(Platform(whole.settings, clock, SystemIds())) as platform:
        platform.flush()
        found = rows(whole, sa.select(usage_events.c.recorded_at, usage_events.c.gpu_time_ns))
        count, ns = len(found), sum(row.gpu_time_ns for row in found)
        hours = {at // HOUR_US * HOUR_US for (at,) in rows(whole, sa.select(usage_events.c.recorded_at))}
        missing = 0
        for hour in sorted(hours):
            first = platform.reconcile(hour)
            if first.status != "reconciled":
                missing += int(platform.repair(hour).inserted)
            assert platform.reconcile(hour).status == "reconciled"
        assert missing or not lossy, "the bridge was away: the fast path lost nothing?"
        totals = platform.clickhouse.totals()
        assert (totals.events, totals.gpu_time_ns) == (count, ns)
        verified = platform.verify(deep=True)
        assert not verified.problems, verified.problems
        size = platform.log.publish()
    return f"{count} events, {ns} ns; {missing} lost by the fast path and repaired; log of {size and size.size} entries"


def check_log(whole: Whole, copy: Path) -> None:
    """The bucket, read with hashlib and json alone: every event once, and every checkpoint that was ever seen."""
    client = s3_server.client(str(whole.settings.objects_endpoint))
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="versioned", Prefix="platform/")
    for one in (one for page in pages for one in page.get("Contents", [])):
        path = copy / one["Key"].removeprefix("platform/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(client.get_object(Bucket="versioned", Key=one["Key"])["Body"].read())
    vkey = load_or_create_key(whole.settings.keys_dir / "checkpoint.key", "unused").verifier.vkey
    published = read_published(copy, vkey)
    entries = read_log(copy, published.size)
    assert tree_hash(entries) == published.root
    check_chain(entries)
    for size, root in whole.seen.items():
        assert tree_hash(entries[:size]) == root, f"the checkpoint of size {size} is of another log"
    subjects = [json.loads(entry)["subject_digest"] for entry in entries if b'"usage_batch"' in entry]
    held = sorted(row.event_id for subject in subjects for row in rows_of_parquet(read_blob(copy, subject)))
    events = rows(whole, sa.select(usage_events.c.event_id))
    assert held == sorted(uuid.UUID(bytes=row.event_id) for row in events)
