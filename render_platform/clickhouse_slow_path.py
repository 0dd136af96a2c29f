"""The slow path through ClickHouse: `s3()`, or `s3Cluster()`, over the objects in the bucket that the log names.

ClickHouse reads the bucket by itself, so nothing goes through this process but sums. What holds all the same:

- Every object is named, none is looked for: what is missing is an error. What ClickHouse answers is counted.
- ClickHouse hashes each object before it is read, and that must be the digest in its name; it reads only what has the
  ETag that the hashed bytes had. It refuses footers that do not promise events, as many as the entry.
- Where ClickHouse fails, this process looks at the objects itself, and says what is wrong with them as DuckDB would.
- No credentials are in any statement: ClickHouse has its own for the bucket, or a named collection that holds some.

It trusts ClickHouse to tell what it read. Who does not: `verify --deep` hashes all and rates all charges again, here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from render_platform import batches
from render_platform.cas import Cas, path_of
from render_platform.clickhouse import ClickHouse
from render_platform.clickhouse_connection import typed
from render_platform.clickhouse_schema import LOW, column_of
from render_platform.config import Settings
from render_platform.entries import AuditEntry
from render_platform.errors import Unavailable, UsageError
from render_platform.events import EVENT_SCHEMA
from render_platform.slow_path import LOOK, WINDOW_SUMS, BatchReader, DuckDBReader, Halves, Statement, checked

CHUNK_BYTES = 1 << 30
"""Of batches that one statement reads; one batch may be larger."""
MAX_OBJECTS = 4_000
"""That one statement names, in about 180 bytes each: with them it stays below MAX_STATEMENT_BYTES."""
MAX_STATEMENT_BYTES = 1 << 20
IDS_AT_ONCE = 16_000_000
"""Ids that one statement groups."""
READ_SETTINGS = {
    "s3_ignore_file_doesnt_exist": 0,
    "s3_skip_empty_files": 0,
    "s3_throw_on_zero_files_match": 1,
    "s3_retry_attempts": 3,
    "s3_connect_timeout_ms": 5_000,
    "s3_request_timeout_ms": 30_000,
    "glob_expansion_max_elements": MAX_OBJECTS,
    "input_format_null_as_default": 0,
    "use_hive_partitioning": 0,
    "group_by_use_nulls": 1,
    "max_query_size": MAX_STATEMENT_BYTES,
}
"""What is missing or empty is an error; a store that is down is given up before the client gives ClickHouse up."""

_COLLECTION = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_CLUSTER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_BYTES_SCHEMA = pa.schema([("path", pa.string()), ("etag", pa.string()), ("digest", pa.string())])
_BYTES = "SELECT _path AS path, _etag AS etag, lower(hex(SHA256(raw_blob))) AS digest FROM $batches"
_FOOTERS_SCHEMA = pa.schema([("path", pa.string()), ("records", pa.int64()), ("columns", pa.string())])
_FOOTERS = """SELECT _path AS path, num_rows AS records, arrayStringConcat(arrayMap(
    one -> concat(one.name, ' ', one.physical_type, ' ', toString(one.max_definition_level)), columns), ',') AS columns
FROM $batches"""
_HALVES_SCHEMA = pa.schema([("half", pa.uint64())])
_STRUCTURE = ", ".join(column_of(field) for field in EVENT_SCHEMA)

Pins = Mapping[str, str]
"""The ETag that each object had, by its digest, when its bytes were hashed."""


class Bucket(NamedTuple):
    """The blobs as ClickHouse reaches them. `url` ends where an object's name begins."""

    url: str
    cluster: str = ""
    collection: str = ""

    def table(self, digests: Sequence[str], kind: str, structure: str = "") -> str:
        """The table function over exactly these objects. `{a,b}` is a list of names, and no search."""
        names = ",".join(path_of(digest) for digest in digests)
        options = {"url": self.url + (f"{{{names}}}" if len(digests) > 1 else names), "format": kind}
        options |= {"structure": structure} if structure else {}
        if self.collection:
            given = [self.collection, *(f"{name} = {_quoted(text)}" for name, text in options.items())]
        else:
            given = [_quoted(text) for text in options.values()]
        if self.cluster:
            return f"s3Cluster({', '.join([_quoted(self.cluster), *given])})"
        return f"s3({', '.join(given)})"


def open_reader(settings: Settings, cas: Cas, open_clickhouse: Callable[[], ClickHouse]) -> BatchReader:
    """The engine that the settings name. UsageError where ClickHouse is to read what is in no bucket."""
    if settings.slow_path_engine == "duckdb":
        return DuckDBReader(cas)
    return ClickHouseReader(cas, open_clickhouse, _bucket(settings))


def _bucket(settings: Settings) -> Bucket:
    if not settings.objects_url:
        what = "slow_path_engine is clickhouse, and the evidence is in the state folder"
        raise UsageError(what, "set objects_url to s3://bucket/prefix, or slow_path_engine to duckdb")
    endpoint = settings.objects_endpoint.rstrip("/")
    if "@" in endpoint:  # it would be in every statement, and in ClickHouse's log of them
        raise UsageError("objects_endpoint holds credentials", "put them into AWS_* variables")
    for name, known in (("slow_path_collection", _COLLECTION), ("slow_path_cluster", _CLUSTER)):
        if (value := getattr(settings, name)) and not known.fullmatch(value):
            raise UsageError(f"{name} is {value!r}", "give the name that ClickHouse knows it by")
    url = settings.objects_url.rstrip("/")
    at = f"{endpoint}/{url.removeprefix('s3://')}" if endpoint else url
    return Bucket(f"{at}/blobs/", settings.slow_path_cluster, settings.slow_path_collection)


class ClickHouseReader:
    """A BatchReader. `open_clickhouse` is called on first use, and gives the same one each time."""

    def __init__(self, cas: Cas, open_clickhouse: Callable[[], ClickHouse], bucket: Bucket) -> None:
        self._cas, self._open_clickhouse, self._bucket = cas, open_clickhouse, bucket

    def read(
        self,
        entries: Sequence[AuditEntry],
        statement: Statement,
        connection: duckdb.DuckDBPyConnection,  # noqa: ARG002  it reads with ClickHouse
    ) -> Iterator[pa.Table]:
        for chunk in _chunks(entries):
            with self._looked_at(chunk):
                table = self._ask(statement.clickhouse, statement.schema, self._rows(self._checked(chunk)))
            yield table

    def window_sums(
        self,
        entries: Sequence[AuditEntry],
        connection: duckdb.DuckDBPyConnection,  # noqa: ARG002
    ) -> tuple[list[pa.Table], Halves]:
        if len(entries) > MAX_OBJECTS:  # their ids are grouped in one statement, which has to name them all
            what = f"ClickHouse is asked for at most {MAX_OBJECTS} batches of an hour, this one has {len(entries)}"
            raise Unavailable(what, "raise batch_rows, or set slow_path_engine to duckdb")
        sums, sources = [], []
        for chunk in _chunks(entries):
            with self._looked_at(chunk):
                sources.append(self._rows(self._checked(chunk)))
                sums.append(self._ask(WINDOW_SUMS.clickhouse, WINDOW_SUMS.schema, sources[-1]))
        with self._looked_at(entries):
            return sums, self._repeated(sources, sum(entry.records for entry in entries))

    def _repeated(self, sources: Sequence[str], rows: int) -> Halves:
        """The lower halves of ids that stand more than once; of two batches in one blob, all."""
        parts = 1 + rows // IDS_AT_ONCE
        found = [np.zeros(0, np.uint64)]
        for part in range(parts) if sources else ():
            selects = (f"SELECT {LOW} AS half FROM {one} AND half % {parts} = {part}" for one in sources)  # noqa: S608
            ids = f"SELECT half FROM ({' UNION ALL '.join(selects)}) GROUP BY half HAVING count() > 1"  # noqa: S608
            numbers = self._ask(ids, _HALVES_SCHEMA, "").column("half").to_numpy()
            found.append(numbers.astype(">u8").view(np.uint64))  # the bytes of an id, in the machine's order
        halves: Halves = np.concatenate(found)
        return halves

    def _checked(self, chunk: Sequence[AuditEntry]) -> Pins:
        """The ETags of objects whose bytes have the digests in their names, and whose footers promise these events."""
        records = {str(entry.subject_digest): entry.records for entry in chunk}
        found = self._ask(_BYTES, _BYTES_SCHEMA, self._bucket.table(list(records), "RawBLOB")).to_pylist()
        hashed = sorted((_digest_of(row["path"]), row["digest"]) for row in found)
        if hashed != sorted((digest, digest) for digest in records):
            raise Unavailable("ClickHouse read other bytes than the log names", LOOK)
        pins = {row["digest"]: row["etag"] for row in found}
        source = f"{self._bucket.table(list(records), 'ParquetMetadata')} AS e WHERE {_pinned(pins)}"
        footers = self._ask(_FOOTERS, _FOOTERS_SCHEMA, source).to_pylist()
        if {row["columns"] for row in footers} != {_columns()}:
            raise Unavailable("ClickHouse read columns that are no usage event's", LOOK)
        if {_digest_of(row["path"]): row["records"] for row in footers} != records:
            raise Unavailable("ClickHouse read batches of other sizes than the log names", LOOK)
        return pins

    def _rows(self, pins: Pins) -> str:
        return f"{self._bucket.table(list(pins), 'Parquet', _STRUCTURE)} AS e WHERE {_pinned(pins)}"

    def _ask(self, sql: str, schema: pa.Schema, source: str) -> pa.Table:
        try:
            return typed(self._open_clickhouse().read(sql.replace("$batches", source), READ_SETTINGS), schema)
        except Unavailable as error:
            raise self._said(error) from None

    def _said(self, error: Unavailable) -> Unavailable:
        """What ClickHouse says of the bucket, in words that quote neither it nor the store."""
        code = re.search(r"Code: (\d+)", error.message)
        match code[1] if code else "":
            case "499":
                status = re.search(r"HTTP response code: (\d{3})\b", error.message)
                why = f"it answers {status[1]}" if status else "it does not answer"
                remedy = "see that it stands, and what rights ClickHouse itself has there: docs/configuration.md"
                return Unavailable(f"ClickHouse cannot read {self._bucket.url}: {why}", remedy)
            case "669":
                what = f"ClickHouse has no named collection {self._bucket.collection}"
                return Unavailable(what, "create it there, or correct slow_path_collection")
            case "701":
                what = f"ClickHouse knows no cluster {self._bucket.cluster}"
                return Unavailable(what, "configure it there, or correct slow_path_cluster")
            case "395":
                return Unavailable("an object was written again while ClickHouse read it", "run the command again")
        return error

    @contextmanager
    def _looked_at(self, entries: Sequence[AuditEntry]) -> Iterator[None]:
        """Where ClickHouse could not read them: what is wrong with the objects, if anything is, seen from here."""
        try:
            yield
        except Unavailable:
            for entry in entries:
                data = self._cas.get(str(entry.subject_digest))
                checked(entry, data)
                batches.decode(data)
            raise


def _chunks(entries: Sequence[AuditEntry]) -> Iterator[list[AuditEntry]]:
    """At most CHUNK_BYTES and MAX_OBJECTS together; each object once: a list of names is a set to ClickHouse."""
    chunk: dict[str, AuditEntry] = {}
    size = 0
    for entry in entries:
        digest, bytes_more = str(entry.subject_digest), int(entry.subject_size or 0)
        if chunk and (digest in chunk or len(chunk) == MAX_OBJECTS or size + bytes_more > CHUNK_BYTES):
            yield list(chunk.values())
            chunk, size = {}, 0
        chunk[digest] = entry
        size += bytes_more
    if chunk:
        yield list(chunk.values())


def _pinned(pins: Pins) -> str:
    """Rows of any other writing of the objects than the one that was hashed end the statement."""
    known = ", ".join(f"({_quoted(digest[2:])}, {_quoted(etag)})" for digest, etag in pins.items())
    return f"NOT throwIf((e._file, e._etag) NOT IN ({known}))"


def _columns() -> str:
    """What the footer of a batch of ours says of its columns."""
    schema = pq.ParquetFile(pa.BufferReader(batches.encode(EVENT_SCHEMA.empty_table()))).schema
    found = (schema.column(at) for at in range(len(EVENT_SCHEMA)))
    return ",".join(f"{one.name} {one.physical_type} {one.max_definition_level}" for one in found)


def _digest_of(path: str) -> str:
    return "".join(path.split("/")[-2:])


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
