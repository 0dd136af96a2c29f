"""The slow path's reader: DuckDB over the batches that the log names, each blob checked against its digest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from render_platform import batches
from render_platform.cas import Cas
from render_platform.clock import WINDOW_US
from render_platform.entries import AuditEntry, parse
from render_platform.errors import Finding, PlatformError, Unavailable, UsageError
from render_platform.events import EVENT_SCHEMA, Key, Totals, event_ids, total_gpu_time_ns

_LOW = "(event_id::UHUGEINT & 18446744073709551615::UHUGEINT)::UBIGINT"
_HIGH = "(event_id::UHUGEINT >> 64)::UBIGINT"
_MODULUS = "18446744073709551616::HUGEINT"
AGGREGATES = f"""
    SELECT epoch_us(recorded_at) // {WINDOW_US} AS "window", customer_ref, model_name,
           count(*) AS events,
           sum(gpu_time_ns)::DECIMAL(38, 0) AS gpu_time_ns,
           (sum({_LOW}) % {_MODULUS})::UBIGINT AS id_sum,
           (sum({_HIGH}) % {_MODULUS})::UBIGINT AS id_high_sum,
           (sum(({_LOW} & 4294967295)::HUGEINT * gpu_time_ns) % {_MODULUS})::UBIGINT AS bound_sum
    FROM incoming GROUP BY ALL ORDER BY ALL
"""  # noqa: S608  constants only; equal to the fast path's expressions, value for value


class SlowPath:
    """`read_entries(hour_us)` gives the published entries of an hour's batches, as logged."""

    def __init__(self, cas: Cas, read_entries: Callable[[int], list[bytes]]) -> None:
        self._cas = cas
        self._read_entries = read_entries

    def hour(self, hour_us: int) -> list[AuditEntry]:
        """The entries of an hour's batches, in the order of the log."""
        return [parse(data) for data in self._read_entries(hour_us)]

    def window_aggregates(self, hour: Sequence[AuditEntry], connection: duckdb.DuckDBPyConnection) -> pa.Table:
        """One row a window, customer and model: events, exact GPU ns, and two order-free sums of the ids.

        One batch is in memory at a time. Raises Missing or DigestMismatch where a blob is not what the log names.
        """
        tables = (self._table(entry) for entry in hour)
        try:
            with _incoming(connection, tables):
                return connection.sql(AGGREGATES).to_arrow_table()
        except duckdb.Error as error:
            raise Unavailable(f"DuckDB could not read the batches: {error}", "see the message") from error

    def rows(self, hour: Sequence[AuditEntry], keys: Collection[Key]) -> pa.Table:
        """The rows of some keys, as recorded, sorted by `event_id`."""
        return self._select(hour, lambda table: of_keys(table, keys))

    def rows_by_id(self, hour: Sequence[AuditEntry], wanted_ids: Collection[bytes]) -> pa.Table:
        """The rows of some events, as recorded, sorted by `event_id`."""
        wanted = pa.array(list(wanted_ids), pa.binary(16))
        return self._select(hour, lambda table: table.filter(pc.is_in(event_ids(table), value_set=wanted)))

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

    def _select(self, hour: Sequence[AuditEntry], keep: Callable[[pa.Table], pa.Table]) -> pa.Table:
        parts = [keep(self._table(entry)) for entry in hour]
        table = pa.concat_tables([EVENT_SCHEMA.empty_table(), *parts])
        return table.take(pc.sort_indices(event_ids(table)))

    def _table(self, entry: AuditEntry) -> pa.Table:
        table = batches.decode(self._cas.get(str(entry.subject_digest)))
        if table.num_rows != entry.records:
            raise Finding(
                f"the batch {entry.batch_id} has {table.num_rows} rows, its entry says {entry.records}",
                "run `render-platform verify --deep`",
            )
        return table


def of_keys(table: pa.Table, keys: Collection[Key]) -> pa.Table:
    """Those rows of a table whose window, customer and model are among `keys`."""
    windows = pc.divide(table.column("recorded_at").cast(pa.int64()), WINDOW_US)
    names = pc.binary_join_element_wise(
        windows.cast(pa.string()), table.column("customer_ref"), table.column("model_name"), "\n"
    )
    wanted = pa.array([f"{window}\n{customer}\n{model}" for window, customer, model in keys], pa.string())
    return table.filter(pc.is_in(names, value_set=wanted))


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
