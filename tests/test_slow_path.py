"""The slow path's reader: rows and sums of the batches that the log names, by each engine."""

from __future__ import annotations

import itertools
import random
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from render_platform import clickhouse as clickhouse_module
from render_platform import clickhouse_slow_path, slow_path
from render_platform.clickhouse import ClickHouse, open_clickhouse
from render_platform.clickhouse_schema import ROLLUP_SCHEMA, SLOW_SCHEMA
from render_platform.clock import HOUR_US, WINDOW_US
from render_platform.errors import DigestMismatch, Finding, Missing, PlatformError, Unavailable
from render_platform.events import EVENT_SCHEMA, table_from_events, table_from_rows
from tests import chdb_server, checksums, factories
from tests.slow_paths import Stored, slow_engine  # noqa: F401  fixture
from tests.stories import HOUR, Key
from tests.test_clickhouse import engine  # noqa: F401  fixture

MAX_INT64 = 2**63 - 1


def by_key(table: pa.Table) -> dict[Key, tuple[int, ...]]:
    rows = [list(row.values()) for row in table.to_pylist()]
    return {(row[0], row[1], row[2]): tuple(int(value) for value in row[3:]) for row in rows}


@pytest.fixture(scope="module")
def clickhouse() -> Iterator[ClickHouse]:
    with closing(chdb_server.open_fresh()) as opened:
        yield opened


_hours = itertools.count()  # an hour of its own for each example, in the one database
numbers = st.one_of(st.sampled_from([0, 1, 2**32 - 1, 2**32, 2**53 + 1, MAX_INT64]), st.integers(0, MAX_INT64))
texts = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)
KEY = ("customer_ref", "model_name", "recorded_at")
MAX_US = 4_000_000_000_000_000


def cells(field: pa.Field) -> st.SearchStrategy[Any]:
    """Any value that a column of both engines can hold."""
    if pa.types.is_timestamp(field.type):
        return st.integers(0, MAX_US)
    if pa.types.is_string(field.type):
        return st.none() | texts if field.nullable else texts
    if pa.types.is_integer(field.type):
        return st.none() | numbers if field.nullable else numbers
    return st.binary(min_size=16, max_size=16)


@st.composite
def stored_rows(draw: st.DrawFn) -> list[tuple[Any, ...]]:
    """Rows of EVENT_SCHEMA as SQL stores them, of three customers, with anything in their other columns."""
    key = {
        "customer_ref": st.sampled_from(factories.CUSTOMERS[:3]),
        "model_name": st.sampled_from(["a", "b"]),
        "recorded_at": st.integers(HOUR, HOUR + HOUR_US - 1),
    }
    row = st.tuples(*(key[field.name] if field.name in key else cells(field) for field in EVENT_SCHEMA))
    return draw(st.lists(row, min_size=1, max_size=12, unique_by=lambda one: one[0]))


@settings(max_examples=15, deadline=None)
@given(rows=stored_rows(), parts=st.integers(1, 3))
def test_both_engines_add_up_what_python_does(
    slow_engine: str, clickhouse: ClickHouse, rows: list[tuple[Any, ...]], parts: int
) -> None:
    at, hour = EVENT_SCHEMA.names.index("recorded_at"), HOUR + next(_hours) * HOUR_US
    table = table_from_rows([(*row[:at], row[at] - HOUR + hour, *row[at + 1 :]) for row in rows])
    size = -(-len(rows) // parts)
    stored = Stored(*[table.slice(at, size) for at in range(0, len(rows), size)], engine=slow_engine)
    expected = checksums.sums_of_table(table)
    slow = stored.aggregates()
    assert slow.schema.equals(SLOW_SCHEMA)
    assert by_key(slow) == expected

    clickhouse.insert_events(table, f"{hour}")
    fast = clickhouse.window_aggregates(hour, hour + HOUR_US)
    assert by_key(fast.select(slow.column_names)) == expected
    assert clickhouse.rollup_aggregates(hour, hour + HOUR_US).equals(fast.select(ROLLUP_SCHEMA.names))
    assert sorted_rows(clickhouse.row_values(hour, hour + HOUR_US)) == sorted_rows(stored.row_values())


MINUTE_COLUMNS = {"gpu_time_ns_min": -1, "gpu_time_ns_max": MAX_INT64, "input_tokens_known": 1, "input_tokens_sum": 1,
                  "output_tokens_known": 1, "output_tokens_sum": 1, "gpu_time_ns_sum": 1, "events": 1}  # fmt: skip


@pytest.mark.parametrize("column", MINUTE_COLUMNS)
def test_the_rollup_is_held_against_the_rows_in_every_column(column: str) -> None:
    name = chdb_server.fresh_database()
    rng = random.Random(7)
    key = {"customer_ref": factories.CUSTOMERS[0], "model_name": "a"}
    made = [factories.make_event(rng, **key, recorded_at=HOUR + rng.randrange(WINDOW_US)) for _ in range(60)]
    with closing(open_clickhouse(chdb_server.shared_dsn(), name)) as clickhouse:
        for at in range(0, 60, 10):  # each minute of the rollup is merged from several inserts
            clickhouse.insert_events(table_from_events(made[at : at + 10]), f"{at}")
        window = HOUR, HOUR + WINDOW_US
        rows = clickhouse.window_aggregates(*window).select(ROLLUP_SCHEMA.names)
        assert clickhouse.rollup_aggregates(*window).equals(rows)
        with closing(chdb_server.open_raw(chdb_server.shared_dsn(), name)) as client:
            values = f"toDateTime({HOUR // 1_000_000}, 'UTC'), '{key['customer_ref']}', 'a', {MINUTE_COLUMNS[column]}"
            least = ", gpu_time_ns_min" if column != "gpu_time_ns_min" else ""
            values += f", {MAX_INT64}" if least else ""
            client.command(
                f"INSERT INTO usage_minute (minute, customer_ref, model_name, {column}{least}) VALUES ({values})"
            )
        assert not clickhouse.rollup_aggregates(*window).equals(rows)


@pytest.mark.parametrize("at_once", [1_000, 40, 7])
def test_rows_read_in_parts_are_the_rows_of_the_range(
    clickhouse: ClickHouse, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    hour = HOUR + next(_hours) * HOUR_US
    table = factories.make_table(200, at_once, hour)
    clickhouse.insert_events(table, f"{hour}")
    clickhouse.insert_events(table.slice(0, 5), f"{hour} again")
    monkeypatch.setattr(clickhouse_module, "ROWS_AT_ONCE", at_once)
    parts = list(clickhouse.row_values(hour, hour + HOUR_US))
    expected = checksums.row_values_of_table(pa.concat_tables([table, table.slice(0, 5)]))
    assert sorted_rows(parts) == sorted_rows([expected])
    assert (len(parts) > 12) == (at_once == 7)
    assert sorted_rows(clickhouse.row_values(hour, hour + HOUR_US // 2)) == sorted_rows(
        [expected.filter(pc.less(expected.column("window"), (hour + HOUR_US // 2) // WINDOW_US))]
    )


def sorted_rows(tables: Iterable[pa.Table]) -> list[tuple[Any, ...]]:
    return sorted(tuple(row.values()) for table in tables for row in table.to_pylist())


@pytest.mark.parametrize("name", [name for name in EVENT_SCHEMA.names if name not in KEY])
@settings(max_examples=4, deadline=None)
@given(rows=stored_rows(), data=st.data())
def test_any_change_of_one_cell_changes_the_sums(
    slow_engine: str, rows: list[tuple[Any, ...]], data: st.DataObject, name: str
) -> None:
    at, column = data.draw(st.integers(0, len(rows) - 1)), EVENT_SCHEMA.names.index(name)
    value = data.draw(cells(EVENT_SCHEMA.field(name)).filter(lambda one: one != rows[at][column]))
    changed = list(rows)
    changed[at] = (*rows[at][:column], value, *rows[at][column + 1 :])
    before, after = (by_key(Stored(table_from_rows(some)).aggregates()) for some in (rows, changed))
    assert before.keys() == after.keys()
    assert before != after


def test_null_is_not_zero_nor_any_value_that_an_event_can_hold(slow_engine: str) -> None:
    table = factories.make_table(1, 1)
    found = set()
    for value in (None, 0, 1, MAX_INT64, -1):
        [sums] = by_key(
            Stored(factories.replace_column(table, "energy_mj", [value]), engine=slow_engine).aggregates()
        ).values()
        found.add(sums)
    assert len(found) == 5


def test_chunks_of_batches_add_up_to_the_whole(slow_engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = factories.make_table(60, 5)
    small = Stored(*[table.slice(at, 10) for at in range(0, 60, 10)], engine=slow_engine)
    whole = Stored(table, engine=slow_engine)
    expected = by_key(whole.aggregates())
    assert by_key(small.aggregates()) == expected == checksums.sums_of_table(table)
    for module in (slow_path, clickhouse_slow_path):
        monkeypatch.setattr(module, "CHUNK_BYTES", 2 * int(small.entries[0].subject_size or 0))
    assert by_key(small.aggregates()) == expected
    for module in (slow_path, clickhouse_slow_path):
        monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    assert len(list(small.row_values())) == 6
    assert sorted_rows(small.row_values()) == sorted_rows(whole.row_values())


def test_sums_pass_64_bits_exactly(slow_engine: str) -> None:
    event = factories.make_event(random.Random(1))
    made = [replace(event, event_id=factories.make_event(random.Random(n)).event_id) for n in range(4)]
    table = factories.replace_column(table_from_events(made), "gpu_time_ns", [MAX_INT64] * 4)
    [row] = Stored(table, engine=slow_engine).aggregates().to_pylist()
    assert row["gpu_time_ns"] == Decimal(4 * MAX_INT64) > 2**64


def test_no_batches_give_no_sums(slow_engine: str) -> None:
    assert Stored(engine=slow_engine).aggregates().num_rows == 0
    assert list(Stored(engine=slow_engine).row_values()) == []


def test_rows_of_ids_come_from_all_batches_in_order(slow_engine: str) -> None:
    made = factories.make_events(120, 3)
    stored = Stored(
        table_from_events(made[:50]), table_from_events(made[50:51]), table_from_events(made[51:]), engine=slow_engine
    )
    hour = stored.slow.hour(HOUR)
    assert [entry.subject_digest for entry in hour] == [entry.subject_digest for entry in stored.entries]
    wanted = [event.event_id.bytes for event in made[::7]]
    assert stored.slow.rows_by_id(hour, wanted).equals(table_from_events(made[::7]))
    assert stored.slow.rows_by_id(hour, [b"\0" * 16]).num_rows == 0
    assert pa.concat_tables(stored.slow.tables([HOUR, HOUR + HOUR_US])).equals(table_from_events(made))


def test_totals_of_one_source_come_from_the_rows(slow_engine: str) -> None:
    made = [replace(event, source=f"trace/{n % 3}") for n, event in enumerate(factories.make_events(20, 4))]
    slow = Stored(table_from_events(made[:9]), table_from_events(made[9:]), engine=slow_engine).slow
    of_one = [event for event in made if event.source == "trace/1"]
    assert slow.totals([HOUR, HOUR + HOUR_US], "trace/1") == (len(of_one), sum(e.gpu_time_ns for e in of_one))
    assert slow.totals([HOUR], "trace/9") == slow.totals([], "trace/1") == (0, 0)


@pytest.mark.parametrize(("harm", "error"), [("remove", Missing), ("alter", DigestMismatch)])
def test_a_blob_that_is_not_what_the_log_names_is_never_read(
    slow_engine: str, harm: str, error: type[PlatformError]
) -> None:
    stored = Stored(factories.make_table(10, 1), factories.make_table(10, 2), engine=slow_engine)
    getattr(stored, harm)(1)
    hour = stored.slow.hour(HOUR)
    for read in (
        lambda: stored.slow.rows_by_id(hour, [b"\0" * 16]),
        lambda: list(stored.row_values()),
        lambda: list(stored.slow.tables([HOUR])),
        stored.aggregates,
    ):
        with pytest.raises(error, match=stored.path(1)):
            read()


def test_a_batch_with_fewer_rows_than_its_entry_says_is_a_finding(slow_engine: str) -> None:
    stored = Stored(factories.make_table(10, 1), engine=slow_engine)
    stored.entries[0] = replace(stored.entries[0], records=11)
    with pytest.raises(Finding, match="10 rows, its entry says 11"):
        list(stored.slow.tables([HOUR]))
    with pytest.raises(Finding, match="10 rows, its entry says 11"):
        stored.aggregates()


def test_a_batch_that_does_not_hold_events_is_a_finding(slow_engine: str) -> None:
    stored = Stored(factories.make_table(10, 1), engine=slow_engine)
    sink = pa.BufferOutputStream()
    pq.write_table(factories.make_table(10, 1).drop_columns(["status"]), sink)
    for data, said in ((sink.getvalue().to_pybytes(), "schema"), (b"PAR1 no events PAR1", "not readable as Parquet")):
        digest = stored.cas.put(data)
        stored.entries[0] = replace(stored.entries[0], subject_digest=digest, subject_size=len(data))
        with pytest.raises(Finding, match=said):
            stored.aggregates()


class ReadsInPart:
    """A connection that loses the last key of whatever it reads."""

    def execute(self, _statement: str) -> None: ...

    def sql(self, query: str, params: dict[str, list[str]]) -> ReadsInPart:
        with duckdb.connect() as connection:
            self.table = connection.sql(query, params=params).to_arrow_table()
        return self

    def to_arrow_table(self) -> pa.Table:
        return self.table.slice(1)


def test_a_reading_in_part_is_never_a_sum() -> None:
    stored = Stored(factories.make_table(10, 1))
    connection: Any = ReadsInPart()
    with pytest.raises(Finding, match="rows, their entries say 10"):
        stored.slow.window_aggregates(stored.slow.hour(HOUR), connection)


def test_two_batches_that_are_wrong_do_not_make_up_for_each_other(slow_engine: str) -> None:
    stored = Stored(factories.make_table(10, 1), factories.make_table(20, 2), engine=slow_engine)
    stored.entries = [replace(stored.entries[0], records=20), replace(stored.entries[1], records=10)]
    with pytest.raises(Finding, match="10 rows, its entry says 20"):
        stored.aggregates()


def test_nothing_is_left_in_the_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stored = Stored(factories.make_table(10, 1), factories.make_table(10, 2))
    stored.aggregates()
    stored.alter(1)
    with pytest.raises(DigestMismatch):
        stored.aggregates()
    reading = stored.row_values()
    with pytest.raises(DigestMismatch):
        next(reading)
    assert not list(tmp_path.iterdir())


def test_a_connection_that_cannot_read_is_unavailable() -> None:
    stored = Stored(factories.make_table(10, 1))
    with duckdb.connect(config={"enable_external_access": False}) as connection, pytest.raises(Unavailable):
        stored.slow.window_aggregates(stored.slow.hour(HOUR), connection)
