"""The slow path: the rows of the batches that the log names, each blob checked against its digest.

A `BatchReader` asks an engine about whole batches: DuckDB, here, or ClickHouse (clickhouse_slow_path). Both give equal
values. Whole rows, which are few, come through the CAS, whatever the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import NamedTuple, Protocol
from uuid import UUID

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from render_platform import batches
from render_platform.cas import Cas
from render_platform.clickhouse_schema import HIGH, LOW, NO_NUMBER, ROW_VALUE, ROW_VALUES_SCHEMA, SLOW_SCHEMA, weight
from render_platform.clock import HOUR_US, WINDOW_US, iso
from render_platform.entries import AuditEntry, parse
from render_platform.errors import Finding, PlatformError, Unavailable, UsageError
from render_platform.events import EVENT_SCHEMA, Totals, event_ids, require_schema, total_gpu_time_ns

CHUNK_BYTES = 64 * 1024 * 1024
"""Of batches that are read at once; one batch may be larger."""
IDS_AT_ONCE = 16_000_000
"""Ids that are sorted at once, 8 bytes each."""
COPIES_AT_ONCE = 2
_BLOCK_BYTES = 8 * 1024 * 1024
Halves = npt.NDArray[np.uint64]
LOOK = "run `render-platform verify --deep`"
_MASK = "18446744073709551615"
_MODULUS = "18446744073709551616::HUGEINT"
_LOW, _HIGH = f"(event_id::UHUGEINT & {_MASK}::UHUGEINT)::UBIGINT", "(event_id::UHUGEINT >> 64)::UBIGINT"


class Words(NamedTuple):
    """What engines say differently: µs of a time, an exact sum as DECIMAL(38, 0), and where batches are read from."""

    micros: str
    total: str
    batches: str


DUCKDB = Words("epoch_us({})", "sum({})::DECIMAL(38, 0)", "read_parquet($files)")
CLICKHOUSE = Words("toUnixTimestamp64Micro({})", "toDecimal128(toString(sum(toInt128({}))), 0)", "$batches")
"""`$batches` becomes a table function, its alias `e` and a WHERE: a statement goes on after that, at its GROUP BY."""


class Statement(NamedTuple):
    """One question about the rows of batches, as each engine is asked. Both give `schema`, in no order."""

    duckdb: str
    clickhouse: str
    schema: pa.Schema


def _numbers(field: pa.Field) -> str:
    """The weighted numbers of a column, as clickhouse_schema defines and computes them; here in 128 bits."""
    name = field.name
    if pa.types.is_string(field.type):
        number = f"(md5_number({name}) & {_MASK}::UHUGEINT)::HUGEINT * {weight(name)}"
        return f"coalesce({number}, 0)" if field.nullable else number
    if field.type in (pa.uuid(), pa.binary(16)):
        data = f"{name}::UUID::UHUGEINT"
        high, low = f"({data} >> 64)::HUGEINT", f"({data} & {_MASK}::UHUGEINT)::HUGEINT"
        return f"{high} * {weight(f'{name}/high')} + {low} * {weight(f'{name}/low')}"
    number = f"epoch_us({name})" if pa.types.is_timestamp(field.type) else name
    return f"{f'coalesce({number}, {NO_NUMBER})' if field.nullable else number}::HUGEINT * {weight(name)}"


_ROW_VALUE = " + ".join(_numbers(field) for field in EVENT_SCHEMA if field.name != "event_id")
_ROW_VALUE = f"(({_ROW_VALUE}) & {_MASK}::HUGEINT)"  # 64 bits; times an id's 32, and a thousand million rows: below 127
_WINDOW = f'epoch_us(recorded_at) // {WINDOW_US} AS "window"'
AGGREGATES = f"""
    SELECT {_WINDOW}, customer_ref, model_name,
           count(*) AS events,
           sum(gpu_time_ns)::DECIMAL(38, 0) AS gpu_time_ns,
           (sum({_LOW}) % {_MODULUS})::UBIGINT AS id_sum,
           (sum({_HIGH}) % {_MODULUS})::UBIGINT AS id_high_sum,
           (sum((({_LOW} & 4294967295) | 1)::HUGEINT * {_ROW_VALUE}) % {_MODULUS})::UBIGINT AS row_sum
    FROM read_parquet($files) GROUP BY ALL
"""  # noqa: S608  constants only; equal to the fast path's expressions, value for value
_OF_CHUNKS = f"""
    SELECT "window", customer_ref, model_name, sum(events)::BIGINT AS events,
           sum(gpu_time_ns)::DECIMAL(38, 0) AS gpu_time_ns,
           (sum(id_sum) % {_MODULUS})::UBIGINT AS id_sum,
           (sum(id_high_sum) % {_MODULUS})::UBIGINT AS id_high_sum,
           (sum(row_sum) % {_MODULUS})::UBIGINT AS row_sum
    FROM chunks GROUP BY ALL
"""  # noqa: S608
_ROW_VALUES = f"""
    SELECT event_id::BLOB AS event_id, {_WINDOW}, customer_ref, model_name, {_ROW_VALUE}::UBIGINT AS row_value
    FROM read_parquet($files)
"""  # noqa: S608

# The fast path's expressions, over the bytes of the slow one.
_CLICKHOUSE_KEY = f"""intDiv(toUnixTimestamp64Micro(e.recorded_at), {WINDOW_US}) AS `window`,
    e.customer_ref AS customer_ref, e.model_name AS model_name"""
_CLICKHOUSE_AGGREGATES = f"""SELECT {_CLICKHOUSE_KEY}, count() AS events,
    {CLICKHOUSE.total.format("e.gpu_time_ns")} AS gpu_time_ns, sum({LOW}) AS id_sum, sum({HIGH}) AS id_high_sum,
    sum(bitOr(bitAnd({LOW}, 4294967295), 1) * ({ROW_VALUE})) AS row_sum
FROM $batches GROUP BY `window`, customer_ref, model_name"""  # noqa: S608
_CLICKHOUSE_ROW_VALUES = f"""SELECT UUIDToNum(e.event_id) AS event_id, {_CLICKHOUSE_KEY}, {ROW_VALUE} AS row_value
FROM $batches"""  # noqa: S608
WINDOW_SUMS = Statement(AGGREGATES, _CLICKHOUSE_AGGREGATES, SLOW_SCHEMA)
ROW_VALUES = Statement(_ROW_VALUES, _CLICKHOUSE_ROW_VALUES, ROW_VALUES_SCHEMA)


class BatchReader(Protocol):
    """Asks an engine about the rows of batches that the log names: all of them, or it raises.

    No bytes are read but those whose digest the entry names: Missing, DigestMismatch or Unavailable where an object is
    not that; Finding where it does not hold events, or not as many as its entry says. `connection` is for whoever reads
    with DuckDB, or has to add something up.
    """

    def read(
        self, entries: Sequence[AuditEntry], statement: Statement, connection: duckdb.DuckDBPyConnection
    ) -> Iterator[pa.Table]:
        """What the statement gives over each chunk of batches: a table of its schema a chunk."""

    def window_sums(
        self, entries: Sequence[AuditEntry], connection: duckdb.DuckDBPyConnection
    ) -> tuple[list[pa.Table], Halves]:
        """SLOW_SCHEMA a chunk; and the lower halves of event ids that stand more than once in all the batches."""


class SlowPath:
    """`read_entries(hour_us)` gives the published entries of an hour's batches, as logged.

    Errors are those of BatchReader; without a `reader` DuckDB reads.
    """

    def __init__(self, cas: Cas, read_entries: Callable[[int], list[bytes]], reader: BatchReader | None = None) -> None:
        self._cas = cas
        self._read_entries = read_entries
        self._reader = reader or DuckDBReader(cas)

    def hour(self, hour_us: int) -> list[AuditEntry]:
        """The entries of an hour's batches, in the order of the log."""
        return [parse(data) for data in self._read_entries(hour_us)]

    def window_aggregates(self, hour: Sequence[AuditEntry], connection: duckdb.DuckDBPyConnection) -> pa.Table:
        """SLOW_SCHEMA: one row a window, customer and model, with order-free sums of its ids and of its whole rows.

        Finding where an event stands twice in the hour: it would be billed twice, and sums would not tell.
        """
        sums, repeated = self._reader.window_sums(hour, connection)
        chunks = [SLOW_SCHEMA.empty_table(), *sums]
        self._require_once(hour, repeated)
        for window in {window for chunk in chunks for window in chunk.column("window").to_pylist()}:
            if hour and window * WINDOW_US // HOUR_US * HOUR_US != hour[0].recorded_hour:
                raise Finding(f"the batches of {iso(hour[0].recorded_hour or 0)} hold rows of another hour", LOOK)
        require_count(sum(pc.sum(chunk.column("events")).as_py() or 0 for chunk in chunks), hour)
        if len(chunks) <= 2:  # most hours: nothing to add up
            return chunks[-1]
        connection.register("chunks", pa.concat_tables(chunks))
        try:
            return connection.sql(_OF_CHUNKS).to_arrow_table().cast(SLOW_SCHEMA)
        except duckdb.Error as error:
            raise Unavailable(f"DuckDB could not add up the batches: {error}", "see the message") from error
        finally:
            connection.unregister("chunks")

    def row_values(self, hour: Sequence[AuditEntry], connection: duckdb.DuckDBPyConnection) -> Iterator[pa.Table]:
        """ROW_VALUES_SCHEMA of every row, a chunk of batches at a time; Finding at the end where some lacked."""
        read = 0
        for table in self.read(hour, ROW_VALUES, connection):
            read += table.num_rows
            yield table
        require_count(read, hour)

    def read(
        self, entries: Sequence[AuditEntry], statement: Statement, connection: duckdb.DuckDBPyConnection
    ) -> Iterator[pa.Table]:
        """What a statement gives over batches, by the configured engine: a table of its schema a chunk of batches."""
        return self._reader.read(entries, statement, connection)

    def _require_once(self, hour: Sequence[AuditEntry], halves: Halves) -> None:
        """Finding where an id with one of these lower halves stands in two rows; two ids may share a half."""
        seen: set[bytes] = set()
        for entry in hour if halves.size else ():
            ids = event_ids(self._table(entry))
            for event_id in ids.filter(pa.array(np.isin(_lower_halves(ids), halves))).to_pylist():
                if event_id in seen:
                    name = iso(entry.recorded_hour or 0)
                    raise Finding(f"the batches of {name} hold event {UUID(bytes=event_id)} twice", LOOK)
                seen.add(event_id)

    def rows_by_id(self, hour: Sequence[AuditEntry], wanted_ids: Collection[bytes]) -> pa.Table:
        """The rows of some events, as recorded, sorted by `event_id`."""
        wanted = pa.array(list(wanted_ids), pa.binary(16))
        parts = [_with_ids(self._table(entry), wanted) for entry in hour]
        table = pa.concat_tables([EVENT_SCHEMA.empty_table(), *parts])
        return table.take(pc.sort_indices(event_ids(table)))

    def tables(self, hours_us: Iterable[int]) -> Iterator[pa.Table]:
        """The rows of whole hours, a batch at a time."""
        for hour_us in hours_us:
            for entry in self.hour(hour_us):
                yield self._table(entry)

    def totals(self, hours_us: Iterable[int], source: str) -> Totals:
        """Events and exact GPU ns of one source, read from the batches."""
        events = gpu_time_ns = 0
        for table in self.tables(hours_us):
            of_source = table.filter(pc.equal(table.column("source"), source))
            events += of_source.num_rows
            gpu_time_ns += total_gpu_time_ns(of_source)
        return Totals(events, gpu_time_ns)

    def _table(self, entry: AuditEntry) -> pa.Table:
        table = batches.decode(self._cas.get(str(entry.subject_digest)))
        _check_count(entry, table.num_rows)
        return table


class DuckDBReader:
    """DuckDB over private copies of the bytes that were checked: what happens to a store's files after that cannot come
    between. A killed process leaves one chunk of them in the temporary folder."""

    def __init__(self, cas: Cas) -> None:
        self._cas = cas

    def read(
        self, entries: Sequence[AuditEntry], statement: Statement, connection: duckdb.DuckDBPyConnection
    ) -> Iterator[pa.Table]:
        return self._read(entries, statement, connection, lambda _batch: None)

    def window_sums(
        self, entries: Sequence[AuditEntry], connection: duckdb.DuckDBPyConnection
    ) -> tuple[list[pa.Table], Halves]:
        with _HalfIds() as ids:
            return list(self._read(entries, WINDOW_SUMS, connection, ids.add)), ids.repeated()

    def _read(
        self,
        entries: Sequence[AuditEntry],
        statement: Statement,
        connection: duckdb.DuckDBPyConnection,
        look: Callable[[pq.ParquetFile], None],
    ) -> Iterator[pa.Table]:
        """`look` is given each batch, in some thread."""
        connection.execute("SET enable_progress_bar = false")  # it would be drawn over what a command prints
        with TemporaryDirectory(prefix="render-platform-") as folder:
            for chunk in _chunks(entries):
                files = [Path(folder, f"{number}") for number in range(len(chunk))]  # two may name one blob
                self._copy(chunk, files, look)
                try:
                    named = {"files": [str(file) for file in files]}
                    table = connection.sql(statement.duckdb, params=named).to_arrow_table()
                except duckdb.Error as error:
                    raise Unavailable(f"DuckDB could not read the batches: {error}", "see the message") from error
                for file in files:
                    file.unlink()
                yield table.cast(statement.schema)

    def _copy(self, chunk: Sequence[AuditEntry], files: Sequence[Path], look: Callable[[pq.ParquetFile], None]) -> None:
        blobs = self._cas.get_many(str(entry.subject_digest) for entry in chunk)

        def copy(entry: AuditEntry, file: Path, data: bytes) -> None:
            look(checked(entry, data))
            file.write_bytes(data)

        with ThreadPoolExecutor(COPIES_AT_ONCE, "copy") as pool:
            for _ in pool.map(copy, chunk, files, blobs):
                pass


def _chunks(hour: Sequence[AuditEntry]) -> Iterator[list[AuditEntry]]:
    """Entries whose batches have at most CHUNK_BYTES together, or one."""
    chunk: list[AuditEntry] = []
    size = 0
    for entry in hour:
        if chunk and size + int(entry.subject_size or 0) > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(entry)
        size += int(entry.subject_size or 0)
    if chunk:
        yield chunk


class _HalfIds:
    """The lower halves of event ids, in a temporary file: memory is bounded whatever the number of rows."""

    def __init__(self) -> None:
        self._file = TemporaryFile(prefix="render-platform-")  # noqa: SIM115  `__exit__` closes it

    def __enter__(self) -> _HalfIds:
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()

    def add(self, batch: pq.ParquetFile) -> None:
        try:
            ids = event_ids(batch.read(["event_id"], use_threads=False))
        except (pa.ArrowException, OSError) as error:
            raise Finding(f"the ids of a batch are not readable as Parquet: {error}", LOOK) from error
        self._file.write(_lower_halves(ids).tobytes())

    def repeated(self) -> Halves:
        """Those that stand more than once."""
        parts = 1 + self._file.tell() // 8 // IDS_AT_ONCE
        return np.concatenate([self._repeated(part, parts) for part in range(parts)])

    def _repeated(self, part: int, parts: int) -> Halves:
        self._file.seek(0)
        blocks = [np.zeros(0, np.uint64)]
        while data := self._file.read(_BLOCK_BYTES):
            block = np.frombuffer(data, np.uint64)
            blocks.append(block[block % parts == part] if parts > 1 else block)
        halves: Halves = np.concatenate(blocks)
        halves.sort()
        repeated: Halves = halves[1:][halves[1:] == halves[:-1]]
        return repeated


def _lower_halves(ids: pa.Array) -> Halves:
    """The last eight bytes of each, as numbers in the machine's order: what is the same is equal, no more."""
    words: Halves = np.frombuffer(ids.buffers()[1] or b"", np.uint64)
    return words[2 * ids.offset :][1 : 2 * len(ids) : 2]


def require_count(read: int, entries: Sequence[AuditEntry]) -> None:
    """Finding unless so many rows were read as the entries say."""
    if read != (logged := sum(entry.records for entry in entries)):
        raise Finding(f"the batches hold {read} rows, their entries say {logged}", LOOK)


def checked(entry: AuditEntry, data: bytes) -> pq.ParquetFile:
    """A batch; Finding unless its footer promises events, as many as the entry."""
    try:
        file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise Finding(f"the batch {entry.batch_id} is not readable as Parquet: {error}", LOOK) from error
    require_schema(file.schema_arrow)
    _check_count(entry, file.metadata.num_rows)
    return file


def _check_count(entry: AuditEntry, rows: int) -> None:
    if rows != entry.records:
        raise Finding(f"the batch {entry.batch_id} has {rows} rows, its entry says {entry.records}", LOOK)


def _with_ids(table: pa.Table, wanted: pa.Array) -> pa.Table:
    return table.filter(pc.is_in(event_ids(table), value_set=wanted))


def run_query(sql: str, tables: Iterable[pa.Table]) -> pa.Table:
    """What a statement gives over `usage_events`, a copy in memory of the rows of `tables`. No files, no network."""
    with duckdb.connect(config={"enable_external_access": False}) as connection:
        with _incoming(connection, tables):
            connection.execute("CREATE TABLE usage_events AS SELECT * FROM incoming")
        try:
            statements = connection.extract_statements(sql)
            if [statement.type for statement in statements] != [duckdb.StatementType.SELECT]:
                raise UsageError("the query is not one SELECT", "give one SELECT over usage_events")
            return connection.sql(sql).to_arrow_table()
        except duckdb.Error as error:
            raise UsageError(f"the query failed: {error}", "give one SELECT over the table usage_events") from error


@contextmanager
def _incoming(connection: duckdb.DuckDBPyConnection, tables: Iterable[pa.Table]) -> Iterator[None]:
    """`incoming` in DuckDB: rows that can be read once. What reading them raised is raised again as it was."""
    caught: list[PlatformError] = []

    def stream() -> Iterator[pa.RecordBatch]:
        try:
            for table in tables:
                yield from table.to_batches()
        except PlatformError as error:
            caught.append(error)
            raise

    connection.register("incoming", pa.RecordBatchReader.from_batches(EVENT_SCHEMA, stream()))
    try:
        yield
    except duckdb.Error:
        if caught:
            raise caught[0] from None
        raise
    finally:
        connection.unregister("incoming")
