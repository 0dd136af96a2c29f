"""The slow path's reader: rows and sums of the batches that the log names, and queries that reach nothing else."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from decimal import Decimal
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from render_platform import batches
from render_platform.cas import Cas, path_of
from render_platform.clickhouse import ClickHouse
from render_platform.clock import HOUR_US, WINDOW_US
from render_platform.entries import FIRST_PREVIOUS, AuditEntry
from render_platform.errors import DigestMismatch, Finding, Missing, PlatformError, UsageError
from render_platform.events import EVENT_SCHEMA, plain_rows, table_from_events, total_gpu_time_ns
from render_platform.slow_path import SlowPath, of_keys, run_query
from tests import chdb_server, factories
from tests.stories import HOUR, Key, MemoryObjects, key_of

MAX_INT64 = 2**63 - 1


class Stored:
    """Batches in a CAS in memory, and the entries that name them."""

    def __init__(self, *tables: pa.Table) -> None:
        self.objects = MemoryObjects()
        cas = Cas(self.objects)
        self.entries = []
        for seq, table in enumerate(tables):
            data = batches.encode(table)
            entry = AuditEntry(
                type="usage_batch",
                batch_id=f"batch-{seq}",
                previous=FIRST_PREVIOUS,
                recorded_hour=HOUR,
                batch_seq=seq,
                subject_digest=cas.put(data),
                subject_size=len(data),
                records=table.num_rows,
                gpu_time_ns=total_gpu_time_ns(table),
            )
            self.entries.append(entry)
        self.slow = SlowPath(cas, lambda hour: [e.to_bytes() for e in self.entries if e.recorded_hour == hour])

    def aggregates(self) -> pa.Table:
        with duckdb.connect() as connection:
            return self.slow.window_aggregates(self.slow.hour(HOUR), connection)

    def path(self, seq: int) -> str:
        return path_of(str(self.entries[seq].subject_digest))


def oracle(table: pa.Table) -> dict[Key, tuple[int, ...]]:
    """Events, ns, both id sums and the bound sum of each key, in Python integers."""
    sums: dict[Key, list[int]] = defaultdict(lambda: [0, 0, 0, 0, 0])
    names = EVENT_SCHEMA.names
    for row in plain_rows(table):
        value = dict(zip(names, row, strict=True))
        high, low = divmod(int.from_bytes(value["event_id"], "big"), 2**64)
        one = sums[value["recorded_at"] // WINDOW_US, value["customer_ref"], value["model_name"]]
        one[0] += 1
        one[1] += value["gpu_time_ns"]
        one[2] += low
        one[3] += high
        one[4] += low % 2**32 * value["gpu_time_ns"]
    return {key: (n, ns, *(value % 2**64 for value in rest)) for key, (n, ns, *rest) in sums.items()}


def by_key(table: pa.Table) -> dict[Key, tuple[int, ...]]:
    rows = [list(row.values()) for row in table.to_pylist()]
    return {(row[0], row[1], row[2]): tuple(int(value) for value in row[3:]) for row in rows}


@pytest.fixture(scope="module")
def clickhouse() -> Iterator[ClickHouse]:
    with closing(chdb_server.open_fresh()) as opened:
        yield opened


_hours = itertools.count()  # an hour of its own for each example, in the one database
amounts = st.one_of(st.sampled_from([0, 1, 2**32 - 1, 2**32, 2**53 + 1, MAX_INT64]), st.integers(0, MAX_INT64))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**9), ns=st.lists(amounts, min_size=1, max_size=40), parts=st.integers(1, 3))
def test_three_engines_add_up_the_same(clickhouse: ClickHouse, seed: int, ns: list[int], parts: int) -> None:
    hour = HOUR + next(_hours) * HOUR_US
    table = factories.replace_column(factories.make_table(len(ns), seed, hour), "gpu_time_ns", ns)
    size = -(-len(ns) // parts)
    stored = Stored(*[table.slice(at, size) for at in range(0, len(ns), size)])
    expected = oracle(table)
    slow = stored.aggregates()
    assert by_key(slow) == expected

    clickhouse.insert_events(table, f"{hour}")
    fast = clickhouse.window_aggregates(hour, hour + HOUR_US)
    assert by_key(fast) == expected
    assert fast.column_names == slow.column_names


def test_sums_pass_64_bits_exactly() -> None:
    event = factories.make_event(random.Random(1))
    made = [replace(event, event_id=factories.make_event(random.Random(n)).event_id) for n in range(4)]
    table = factories.replace_column(table_from_events(made), "gpu_time_ns", [MAX_INT64] * 4)
    [row] = Stored(table).aggregates().to_pylist()
    assert row["gpu_time_ns"] == Decimal(4 * MAX_INT64) > 2**64


def test_no_batches_give_no_sums() -> None:
    assert Stored().aggregates().num_rows == 0
    assert Stored().slow.rows(Stored().slow.hour(HOUR), []).equals(EVENT_SCHEMA.empty_table())


def test_rows_of_keys_and_of_ids_come_from_all_batches_in_order() -> None:
    made = factories.make_events(120, 3)
    stored = Stored(table_from_events(made[:50]), table_from_events(made[50:51]), table_from_events(made[51:]))
    hour = stored.slow.hour(HOUR)
    assert [entry.subject_digest for entry in hour] == [entry.subject_digest for entry in stored.entries]
    keys = sorted({key_of(event) for event in made})[::3]
    expected = table_from_events([event for event in made if key_of(event) in keys])
    assert stored.slow.rows(hour, keys).equals(expected)
    assert of_keys(table_from_events(made), keys).equals(expected)
    wanted = [event.event_id.bytes for event in made[::7]]
    assert stored.slow.rows_by_id(hour, wanted).equals(table_from_events(made[::7]))
    assert stored.slow.rows_by_id(hour, [b"\0" * 16]).num_rows == 0
    assert pa.concat_tables(stored.slow.tables([HOUR, HOUR + HOUR_US])).equals(table_from_events(made))


def test_totals_of_one_source_come_from_the_rows() -> None:
    made = [replace(event, source=f"trace/{n % 3}") for n, event in enumerate(factories.make_events(20, 4))]
    slow = Stored(table_from_events(made[:9]), table_from_events(made[9:])).slow
    of_one = [event for event in made if event.source == "trace/1"]
    assert slow.totals([HOUR, HOUR + HOUR_US], "trace/1") == (len(of_one), sum(e.gpu_time_ns for e in of_one))
    assert slow.totals([HOUR], "trace/9") == slow.totals([], "trace/1") == (0, 0)


def test_a_customer_that_looks_like_two_columns_matches_nothing_else() -> None:
    table = factories.make_table(5, 1)
    customer, model = table.column("customer_ref")[0].as_py(), table.column("model_name")[0].as_py()
    window = table.column("recorded_at").cast(pa.int64())[0].as_py() // WINDOW_US
    assert of_keys(table, [(window, f"{customer}\n{model}", "")]).num_rows == 0
    assert of_keys(table, [(window, customer, model)]).num_rows >= 1


def _delete(stored: Stored) -> None:
    del stored.objects.files[stored.path(1)]


def _alter(stored: Stored) -> None:
    data = stored.objects.files[stored.path(1)]
    stored.objects.files[stored.path(1)] = data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


@pytest.mark.parametrize(("harm", "error"), [(_delete, Missing), (_alter, DigestMismatch)])
def test_a_blob_that_is_not_what_the_log_names_is_never_read(harm: Any, error: type[PlatformError]) -> None:
    stored = Stored(factories.make_table(10, 1), factories.make_table(10, 2))
    harm(stored)
    hour = stored.slow.hour(HOUR)
    for read in (
        lambda: stored.slow.rows_by_id(hour, [b"\0" * 16]),
        lambda: stored.slow.rows(hour, [(0, "", "")]),
        lambda: list(stored.slow.tables([HOUR])),
    ):
        with pytest.raises(error, match=stored.path(1)):
            read()


@pytest.mark.parametrize(("harm", "error"), [(_delete, Missing), (_alter, DigestMismatch)])
def test_sums_over_a_bad_blob_raise_what_the_contract_says(harm: Any, error: type[PlatformError]) -> None:
    stored = Stored(factories.make_table(10, 1), factories.make_table(10, 2))
    harm(stored)
    with pytest.raises(error, match=stored.path(1)):
        stored.aggregates()


def test_a_batch_with_fewer_rows_than_its_entry_says_is_a_finding() -> None:
    stored = Stored(factories.make_table(10, 1))
    stored.entries[0] = replace(stored.entries[0], records=11)
    with pytest.raises(Finding, match="10 rows, its entry says 11"):
        list(stored.slow.tables([HOUR]))
    with pytest.raises(Finding, match="10 rows, its entry says 11"):
        stored.aggregates()


# run_query


def test_a_query_sees_the_rows_of_all_tables() -> None:
    tables = [factories.make_table(10, 1), factories.make_table(20, 2)]
    sql = "SELECT count(*) AS n, sum(gpu_time_ns) AS ns, count(DISTINCT event_id) AS ids FROM usage_events"
    [row] = run_query(sql, iter(tables)).to_pylist()
    assert row == {"n": 30, "ns": sum(total_gpu_time_ns(table) for table in tables), "ids": 30}
    assert run_query("SELECT * FROM usage_events", iter([])).num_rows == 0


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM read_text('/etc/hostname')",
        "SELECT * FROM read_blob('/etc/hostname')",
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM '/tmp/any.parquet'",
        "SELECT * FROM glob('/etc/*')",
        "SELECT * FROM read_parquet('https://example.com/x.parquet')",
        "COPY usage_events TO '{folder}/out.csv'",
        "EXPORT DATABASE '{folder}/out'",
        "ATTACH '{folder}/out.db'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "SELECT 1; SET enable_external_access = true",
        "SELECT getenv('HOME')",
        "SELECT * FROM tables",
        "SELECT * FROM incoming",
    ],
)
def test_a_query_reaches_no_file_and_no_network(sql: str, tmp_path: Any) -> None:
    with pytest.raises(UsageError):
        run_query(sql.replace("{folder}", str(tmp_path)), iter([factories.make_table(3, 1)]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sql", ["SELECT nope FROM usage_events", "SELEC 1", "SELECT 1/", "", ";", "-- only a remark"])
def test_a_query_that_cannot_run_is_a_usage_error(sql: str) -> None:
    with pytest.raises(UsageError):
        run_query(sql, iter([factories.make_table(3, 1)]))


def test_rows_that_cannot_be_read_are_no_answer() -> None:
    def tables() -> Iterator[pa.Table]:
        yield factories.make_table(3, 1)
        raise Missing("sha256/aa/bb")

    with pytest.raises(PlatformError, match="sha256/aa/bb"):
        run_query("SELECT count(*) FROM usage_events", tables())
