"""Batches in a store, and the slow path over them by each engine: DuckDB, and ClickHouse over a real bucket."""

from __future__ import annotations

import atexit
import functools
import itertools
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from render_platform import batches
from render_platform.cas import Cas, path_of
from render_platform.clickhouse import ClickHouse, open_clickhouse
from render_platform.clickhouse_slow_path import open_reader
from render_platform.clock import hour_of
from render_platform.config import load_settings
from render_platform.entries import FIRST_PREVIOUS, AuditEntry
from render_platform.events import total_gpu_time_ns
from render_platform.objects import ObjectStore
from render_platform.slow_path import SlowPath
from tests import chdb_server
from tests.conformance import s3_server
from tests.stories import HOUR, MemoryObjects

ENGINES = ("duckdb", "clickhouse")
_run = secrets.token_hex(4)
_numbers = itertools.count(1)


@functools.cache
def connection() -> duckdb.DuckDBPyConnection:
    """To open one takes as long as what it is asked."""
    return duckdb.connect()


@functools.cache
def bucket_bridge() -> chdb_server.BridgeProcess:
    """One whose process has the credentials of the bucket: call `s3_server.use_credentials` first."""
    folder = Path(tempfile.mkdtemp(prefix="render-platform-chdb-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    bridge = chdb_server.BridgeProcess(folder / "clickhouse")
    atexit.register(bridge.end, signal.SIGKILL)
    return bridge


@functools.cache
def bridge_client() -> ClickHouse:
    return open_clickhouse(bucket_bridge().dsn, chdb_server.fresh_database())


def bucket_options(**more: Any) -> dict[str, Any]:
    """Settings of a platform whose evidence is in a bucket, under a prefix of its own."""
    url = f"s3://plain/slow-{_run}-{next(_numbers)}"
    return {"objects_url": url, "objects_endpoint": s3_server.seaweed().endpoint, **more}


class BucketObjects:
    """The blobs of a bucket, and what somebody could do to them behind the platform's back."""

    def __init__(self, objects: ObjectStore, prefix: str) -> None:
        self._objects, self._prefix = objects, prefix
        self._client = s3_server.client(s3_server.seaweed().endpoint)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objects, name)

    def put(self, path: str, data: bytes) -> None:
        self._client.put_object(Bucket="plain", Key=self._prefix + path, Body=data)

    def remove(self, path: str) -> None:
        self._client.delete_object(Bucket="plain", Key=self._prefix + path)


class Stored:
    """Batches in a CAS, in memory or in a bucket, and the entries that name them."""

    def __init__(self, *tables: pa.Table, engine: str = "duckdb", **options: Any) -> None:
        self.objects: Any = MemoryObjects()
        self.clickhouse = bridge_client() if engine == "clickhouse" else None
        settings = load_settings({})
        if engine == "clickhouse":
            settings = load_settings({}, slow_path_engine=engine, **bucket_options(**options))
            prefix = settings.objects_url.removeprefix("s3://plain/") + "/blobs/"
            store = s3_server.open_s3(f"{settings.objects_url}/blobs", settings.objects_endpoint)
            self.objects = BucketObjects(store, prefix)
        self.cas = Cas(self.objects)
        self.reader = open_reader(settings, self.cas, bridge_client)
        self.entries: list[AuditEntry] = []
        self.hour = hour_of(tables[0].column("recorded_at")[0].value) if tables and tables[0].num_rows else HOUR
        for seq, table in enumerate(tables):
            data = batches.encode(table)
            entry = AuditEntry(
                type="usage_batch",
                batch_id=f"batch-{seq}",
                previous=FIRST_PREVIOUS,
                recorded_hour=self.hour,
                batch_seq=seq,
                subject_digest=self.cas.put(data),
                subject_size=len(data),
                records=table.num_rows,
                gpu_time_ns=total_gpu_time_ns(table),
            )
            self.entries.append(entry)
        self.slow = SlowPath(self.cas, self.read_entries, self.reader)

    def read_entries(self, hour: int) -> list[bytes]:
        return [entry.to_bytes() for entry in self.entries if entry.recorded_hour == hour]

    def aggregates(self) -> pa.Table:
        return self.slow.window_aggregates(self.slow.hour(self.hour), connection())

    def row_values(self) -> Iterator[pa.Table]:
        return self.slow.row_values(self.slow.hour(self.hour), connection())

    def path(self, seq: int) -> str:
        return path_of(str(self.entries[seq].subject_digest))

    def remove(self, seq: int) -> None:
        if isinstance(self.objects, BucketObjects):
            self.objects.remove(self.path(seq))
        else:
            del self.objects.files[self.path(seq)]

    def overwrite(self, seq: int, data: bytes) -> None:
        if isinstance(self.objects, BucketObjects):
            self.objects.put(self.path(seq), data)
        else:
            self.objects.files[self.path(seq)] = data

    def alter(self, seq: int) -> None:
        """One bit of it."""
        data = self.objects.read(self.path(seq))
        self.overwrite(seq, data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])


@pytest.fixture(params=ENGINES)
def slow_engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What holds for the slow path holds for both."""
    if request.param == "clickhouse":
        s3_server.use_credentials(monkeypatch)
        bucket_bridge()
    return str(request.param)
