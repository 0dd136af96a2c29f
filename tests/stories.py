"""Helpers for tests of reconciliation, repair and verification: stores in memory, platforms, and logs made by hand."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import clickhouse_connect
import pyarrow as pa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from render_platform import batches, events, tiles
from render_platform.audit_log import AuditLog, create_head
from render_platform.cas import Cas
from render_platform.clock import HOUR_US, US_PER_SECOND, WINDOW_US, ManualClock, uuid7_from_random
from render_platform.config import load_settings
from render_platform.database import open_sqlite
from render_platform.entries import FIRST_PREVIOUS, AuditEntry, parse
from render_platform.errors import Missing, SequencerStopped
from render_platform.events import UsageEvent
from render_platform.evidence import Evidence, Problem, Verification
from render_platform.fast_path import batch_token
from render_platform.note import Checkpoint, FileSigner
from render_platform.objects import FileStat, Stat
from render_platform.pipeline import Platform
from render_platform.verification import verify
from tests import chdb_server, factories
from tests.factories import START_US
from tests.platforms import SeededIds

HOUR = START_US
DEADLINE_US = 60 * US_PER_SECOND
AFTER_HOUR = HOUR + HOUR_US + DEADLINE_US
"""The first instant at which every window of the first hour is closed."""
NOWHERE = "http://127.0.0.1:9"
Key = tuple[int, str, str]


class MemoryObjects:
    """An ObjectStore whose objects are in `files`."""

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        self.files = {} if files is None else files

    def create(self, path: str, data: bytes) -> bool:
        if path in self.files:
            return False
        self.files[path] = data
        return True

    def read(self, path: str) -> bytes:
        if path not in self.files:
            raise Missing(path)
        return self.files[path]

    def replace(self, path: str, data: bytes, expected: bytes | None) -> None:
        if self.files.get(path) != expected:
            raise SequencerStopped(f"{path} was changed by another writer")
        self.files[path] = data

    def names(self, prefix: str = "") -> Iterator[str]:
        yield from sorted(path for path in self.files if path.startswith(prefix))

    def stats(self, prefix: str = "") -> Iterator[tuple[str, FileStat]]:
        yield from ((name, self.stat(name)) for name in self.names(prefix))

    def stat(self, path: str) -> FileStat:
        return FileStat(len(self.read(path)), 0, "")

    def delete(self, path: str, seen: Stat) -> bool:
        return self.files.pop(path, None) is not None


# Platforms.


def open_story(
    state_dir: Path, database: str, *, dsn: str | None = None, now_us: int = AFTER_HOUR, seed: int = 0, **options: Any
) -> Platform:
    """A platform on the shared embedded ClickHouse (or on `dsn`), its clock standing at `now_us`."""
    options = {"clickhouse_dsn": dsn or chdb_server.shared_dsn(), "clickhouse_database": database, **options}
    settings = load_settings(environ={}, state_dir=state_dir, **options)
    return Platform(settings, ManualClock(now_us), SeededIds(seed))


def move_to(platform: Platform, us: int) -> None:
    if not isinstance(platform.clock, ManualClock):
        raise TypeError("the platform has no manual clock")
    platform.clock.move_to(us)


def record(platform: Platform, made: Sequence[UsageEvent], lane: str = "live") -> list[UsageEvent]:
    with platform.database.write() as connection:
        return platform.outbox.record(connection, lane, sorted(made, key=lambda event: event.recorded_at))


def wanting(platform: Platform) -> list[int]:
    """Known hours that are not settled: no report, one that is out of date, or one that is not `reconciled`."""
    reports = {hour: platform.hours.last_report(hour) for hour in platform.hours.known()}
    return [hour for hour, last in reports.items() if last is None or last.dirty or last.status != "reconciled"]


def finish_lane(platform: Platform, lane: str, until_us: int) -> None:
    with platform.database.write() as connection:
        platform.outbox.finish_lane(connection, lane, until_us)


def deliver(platform: Platform, made: Sequence[UsageEvent], token: str = "") -> None:
    """Insert events into ClickHouse as the fast path does; another token inserts them again."""
    if made:
        table = events.table_from_events(sorted(made, key=lambda event: event.event_id))
        platform.clickhouse.insert_events(table, token or batch_token(table))


def run_in_clickhouse(platform: Platform, statement: str) -> None:
    """One statement by a client of the driver's own: what an operator could do behind the platform's back."""
    path, database = str(chdb_server.shared_clickhouse_path()), platform.settings.clickhouse_database
    with closing(clickhouse_connect.get_client(interface="chdb", path=path, database=database)) as client:
        client.command(statement)


def logged(platform: Platform, kind: str) -> list[AuditEntry]:
    """The entries of one type that the log holds, read from the bundles of the published log."""
    checkpoint = platform.log.published()
    found: list[AuditEntry] = []
    for start in range(0, checkpoint.size if checkpoint else 0, 256):
        width = min(256, (checkpoint.size if checkpoint else 0) - start)
        data = platform.log_objects.read(tiles.entries_path(start // 256, width))
        found += [parse(entry) for entry in tiles.decode_bundle(data)]
    return [entry for entry in found if entry.type == kind]


def fast_ids(platform: Platform) -> list[str]:
    """The event ids of all fast rows of the first hour, duplicates kept."""
    return events.uuid_texts(platform.clickhouse.rows(HOUR, HOUR + HOUR_US), "event_id")


def rollup_total(platform: Platform) -> tuple[int, int]:
    """Events and GPU ns of the first hour, as the rollup has them."""
    table = platform.clickhouse.rollup_aggregates(HOUR, HOUR + HOUR_US)
    return sum(table.column("events").to_pylist()), int(sum(table.column("gpu_time_ns").to_pylist()))


# Events under a few keys, and what they add up to.


def keyed_event(
    rng: random.Random, window: int = 0, customer: int = 0, model: int = 0, hour_us: int = HOUR, **overrides: Any
) -> UsageEvent:
    """A valid event whose window, customer and model are given; its ids are random in every bit that they may be."""
    family, name, kind, modality = factories.MODELS[model]
    given = {
        "recorded_at": hour_us + window * WINDOW_US + rng.randrange(WINDOW_US),
        "customer_ref": factories.CUSTOMERS[customer],
        "model_family": family,
        "model_name": name,
        "model_type": kind,
        "modality": modality,
    }
    made = factories.make_event(rng, **(given | overrides))
    if "event_id" in overrides:
        return made
    return replace(made, event_id=uuid7_from_random(made.event_time, rng.randbytes(10)))


def key_of(event: UsageEvent) -> Key:
    return event.recorded_at // WINDOW_US, event.customer_ref, event.model_name


# A log and its blobs, made entry by entry, so that any of them can be wrong and still be signed.


def signer(name: str, seed: int) -> FileSigner:
    return FileSigner(name, Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32))


@dataclass
class HandMade:
    """A signed log in memory. Each method appends one entry; `overrides` say what it says wrongly."""

    state_dir: Path
    log_seed: int = 1
    log: MemoryObjects = field(default_factory=MemoryObjects)
    blobs: MemoryObjects = field(default_factory=MemoryObjects)
    history: list[Checkpoint] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.database = open_sqlite(self.state_dir / f"handmade-{self.log_seed}.db")
        create_head(self.database)
        self.cas = Cas(self.blobs)
        self.log_signer = signer("example.com/log", self.log_seed)
        self.attestation_signer = signer("example.com/log/attestation", 2)
        self.audit_log = AuditLog(self.database, self.cas, self.log, self.log_signer)
        self._count = 0

    def close(self) -> None:
        self.database.close()

    def entry(self, kind: str, **values: Any) -> AuditEntry:
        self._count += 1
        draft = AuditEntry(**({"type": kind, "batch_id": f"{kind}/{self._count}", "previous": FIRST_PREVIOUS} | values))
        self.audit_log.append(draft, lambda _connection, _index: None)
        return draft

    def batch(self, hour_us: int, seq: int, rows: pa.Table, lane: str = "live", **overrides: Any) -> AuditEntry:
        data = batches.encode(rows)
        digest = self.cas.put(data)
        envelope = batches.attest("batch", digest, rows, self.attestation_signer, "tests")
        times = rows.column("recorded_at").cast(pa.int64()).to_pylist()
        values = {
            "lane": lane,
            "recorded_hour": hour_us,
            "batch_seq": seq,
            "first_recorded_at": min(times),
            "last_recorded_at": max(times),
            "complete_until": max(times),
            "subject_digest": digest,
            "subject_size": len(data),
            "records": rows.num_rows,
            "gpu_time_ns": events.total_gpu_time_ns(rows),
            "merkle_root": events.merkle_root(rows).hex(),
            "attestation": self.cas.put(envelope),
        }
        return self.entry("usage_batch", **(values | overrides))

    def watermark(self, hour_us: int, *batches_of_hour: AuditEntry, lane: str = "live", **overrides: Any) -> AuditEntry:
        values = {
            "lane": lane,
            "recorded_hour": hour_us,
            "complete_until": hour_us + HOUR_US,
            "records": sum(entry.records for entry in batches_of_hour),
            "gpu_time_ns": sum(entry.gpu_time_ns for entry in batches_of_hour),
        }
        return self.entry("watermark", **(values | overrides))

    def publish(self) -> Checkpoint:
        checkpoint = self.audit_log.publish()
        if checkpoint is None:
            raise ValueError("nothing was appended")
        if checkpoint not in self.history:
            self.history.append(checkpoint)
        return checkpoint

    def evidence(self) -> Evidence:
        return Evidence(
            log=self.log,
            blobs=self.blobs,
            log_keys=[self.log_signer.verifier],
            attestation_keys=[self.attestation_signer.verifier],
            history=self.history,
        )

    def verify(self, *, deep: bool = False) -> Verification:
        self.publish()
        return verify(self.evidence(), deep=deep)


def rows_of_hour(n: int, seed: int, hour_us: int = HOUR) -> pa.Table:
    return factories.make_table(n, seed, hour_us)


def named(outcome: Verification) -> set[str]:
    """Where the problems are."""
    return {problem.where for problem in outcome.problems}


def said(outcome: Verification) -> str:
    """All problems as one text."""
    return "\n".join(f"{problem.where}: {problem.what}" for problem in outcome.problems)


def about(outcome: Verification, where: str) -> list[Problem]:
    return [problem for problem in outcome.problems if problem.where == where]
