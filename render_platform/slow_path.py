"""The slow path's reader: DuckDB over the batches that the log names, each blob checked against its digest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from render_platform import batches
from render_platform.cas import Cas
from render_platform.entries import AuditEntry, parse
from render_platform.errors import Unavailable, UsageError
from render_platform.events import EVENT_SCHEMA, Key, total_gpu_time_ns

WINDOW = "epoch_us(recorded_at) // 300000000"
_LOW = "(event_id::UHUGEINT & 18446744073709551615::UHUGEINT)::UBIGINT"
_MODULUS = "18446744073709551616::HUGEINT"
AGGREGATES = f"""
    SELECT {WINDOW} AS "window", customer_ref, model_name,
           count(*) AS events,
           sum(gpu_time_ns)::DECIMAL(38, 0) AS gpu_time_ns,
           (sum({_LOW}) % {_MODULUS})::UBIGINT AS id_sum,
           (sum(({_LOW} & 4294967295)::HUGEINT * gpu_time_ns) % {_MODULUS})::UBIGINT AS bound_sum
    FROM events GROUP BY ALL ORDER BY ALL
"""  # noqa: S608  constants only; equal to the fast path's expressions, value for value


class HourOfBatches(NamedTuple):
    """The entries of an hour's batches, in the order of the log."""

    entries: list[AuditEntry]

    @property
    def digests(self) -> list[str]:
        return [entry.subject_digest for entry in self.entries if entry.subject_digest is not None]


class SlowPath:
    """`read_entries(hour_us)` gives the published entries of an hour's batches, as logged."""

    def __init__(self, cas: Cas, read_entries: Callable[[int], list[bytes]]) -> None:
        self._cas = cas
        self._read_entries = read_entries

    def hour(self, hour_us: int) -> HourOfBatches:
        return HourOfBatches([parse(data) for data in self._read_entries(hour_us)])

    def window_aggregates(self, hour: HourOfBatches, connection: duckdb.DuckDBPyConnection) -> pa.Table:
        """One row a window, customer and model: events, exact GPU ns, and two order-free sums of the ids.

        One batch is in memory at a time. Raises Missing or DigestMismatch where a blob is not what the log names.
        """
        events = pa.RecordBatchReader.from_batches(EVENT_SCHEMA, self._stream(hour))
        connection.register("events", events)
        try:
            return connection.sql(AGGREGATES).to_arrow_table()
        except duckdb.Error as error:
            raise Unavailable(f"DuckDB could not read the batches: {error}", "see the message") from error
        finally:
            connection.unregister("events")

    def rows(self, hour: HourOfBatches, keys: Collection[Key]) -> pa.Table:
        """The rows of some keys, as recorded, sorted by `event_id`."""
        return self._select(hour, lambda table: of_keys(table, keys))

    def rows_by_id(self, hour: HourOfBatches, event_ids: Collection[bytes]) -> pa.Table:
        """The rows of some events, as recorded, sorted by `event_id`."""
        wanted = pa.array(list(event_ids), pa.binary(16))
        return self._select(hour, lambda table: table.filter(pc.is_in(_storage(table), value_set=wanted)))

    def tables(self, hours_us: Iterable[int]) -> Iterator[pa.Table]:
        """The rows of whole hours, a batch at a time."""
        for hour_us in hours_us:
            for entry in self.hour(hour_us).entries:
                yield self._table(entry)

    def totals(self, hours_us: Iterable[int], source: str) -> tuple[int, int]:
        """Events and exact GPU ns of one source, read from the batches."""
        events = gpu_time_ns = 0
        for table in self.tables(hours_us):
            of_source = table.filter(pc.equal(table.column("source"), source))
            events += of_source.num_rows
            gpu_time_ns += total_gpu_time_ns(of_source)
        return events, gpu_time_ns

    def _select(self, hour: HourOfBatches, keep: Callable[[pa.Table], pa.Table]) -> pa.Table:
        parts = [keep(self._table(entry)) for entry in hour.entries]
        table = pa.concat_tables([EVENT_SCHEMA.empty_table(), *parts])
        return table.take(pc.sort_indices(_storage(table)))

    def _stream(self, hour: HourOfBatches) -> Iterator[pa.RecordBatch]:
        for entry in hour.entries:
            yield from self._table(entry).to_batches()

    def _table(self, entry: AuditEntry) -> pa.Table:
        table = batches.decode(self._cas.get(str(entry.subject_digest)))
        if table.num_rows != entry.records:
            raise Unavailable(
                f"the batch {entry.batch_id} has {table.num_rows} rows, its entry says {entry.records}",
                "run `render-platform verify --deep`",
            )
        return table


def _storage(table: pa.Table) -> pa.Array:
    return table.column("event_id").combine_chunks().storage


def of_keys(table: pa.Table, keys: Collection[Key]) -> pa.Table:
    """Those rows of a table whose window, customer and model are among `keys`."""
    windows = pc.divide(table.column("recorded_at").cast(pa.int64()), 300_000_000)
    names = pc.binary_join_element_wise(
        windows.cast(pa.string()), table.column("customer_ref"), table.column("model_name"), "\n"
    )
    wanted = pa.array([f"{window}\n{customer}\n{model}" for window, customer, model in keys], pa.string())
    return table.filter(pc.is_in(names, value_set=wanted))


def run_query(sql: str, tables: Iterator[pa.Table]) -> pa.Table:
    """One read-only statement over `usage_events`: the rows of verified batches. No files, no network."""
    with duckdb.connect(config={"enable_external_access": False}) as connection:
        rows = (batch for table in tables for batch in table.to_batches())
        connection.register("incoming", pa.RecordBatchReader.from_batches(EVENT_SCHEMA, rows))
        connection.execute("CREATE TABLE usage_events AS SELECT * FROM incoming")
        connection.unregister("incoming")
        try:
            return connection.sql(sql).to_arrow_table()
        except duckdb.Error as error:
            raise UsageError(f"the query failed: {error}", "the table is usage_events") from error
