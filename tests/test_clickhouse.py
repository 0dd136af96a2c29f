"""The ClickHouse adapter: the same tests on the embedded engine, on its bridge and on a server.

CLICKHOUSE_TEST_URL=http://user:password@host:port names the server; its databases `t_…` are made and dropped.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from render_platform import events
from render_platform.clickhouse import ClickHouse, open_clickhouse
from render_platform.clickhouse_schema import ROLLUP_SCHEMA, WINDOW_SCHEMA
from render_platform.clock import DAY_US, HOUR_US, WINDOW_US
from render_platform.errors import Finding, Unavailable, UsageError
from render_platform.events import EVENT_SCHEMA, total_gpu_time_ns
from tests import chdb_server, factories
from tests.factories import START_US

END_US = START_US + HOUR_US


@pytest.fixture(scope="module", autouse=True)
def engine() -> Iterator[None]:
    """The embedded engine runs on between a module's tests: with its last user it ends, and a new one takes longer the
    more databases there are."""
    with closing(chdb_server.open_raw(chdb_server.shared_dsn())):
        yield


@pytest.fixture(params=chdb_server.IMPLEMENTATIONS)
def dsn(request: pytest.FixtureRequest) -> str:
    """Of the engine in this process, of its bridge, of a server: what the tests say holds for each."""
    return chdb_server.dsn_of(request.param)


@pytest.fixture
def name(dsn: str) -> Iterator[str]:
    made = chdb_server.fresh_database()
    yield made
    if not dsn.startswith("chdb:"):
        with closing(chdb_server.open_raw(dsn)) as client:
            client.command(f"DROP DATABASE IF EXISTS {made}")


@pytest.fixture
def clickhouse(dsn: str, name: str) -> Iterator[ClickHouse]:
    with closing(open_clickhouse(dsn, name, retention_days=0)) as opened:
        yield opened


@pytest.fixture
def raw(clickhouse: ClickHouse, dsn: str, name: str) -> Iterator[Any]:
    """A client of the driver's own, on the same database."""
    with closing(chdb_server.open_raw(dsn, name)) as client:
        yield client


def oracle(table: pa.Table) -> dict[tuple[int, str, str], list[int]]:
    """Window, customer and model to events, ns and both id sums, in Python integers."""
    sums: dict[tuple[int, str, str], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for row in table.to_pylist():
        us = round(row["recorded_at"].timestamp() * 1_000_000)
        high, low = divmod(row["event_id"].int, 2**64)
        entry = sums[us // WINDOW_US, row["customer_ref"], row["model_name"]]
        entry[0] += 1
        entry[1] += row["gpu_time_ns"]
        entry[2] = (entry[2] + low) % 2**64
        entry[3] = (entry[3] + high) % 2**64
    return dict(sums)


def by_key(table: pa.Table) -> dict[tuple[int, str, str], list[int]]:
    rows = [list(row.values()) for row in table.to_pylist()]
    return {(row[0], row[1], row[2]): [int(value) for value in row[3:]] for row in rows}


def rollup_events(clickhouse: ClickHouse) -> int:
    return sum(clickhouse.rollup_aggregates(START_US - DAY_US, END_US + DAY_US).column("events").to_pylist())


def test_the_same_holds_on_a_server() -> None:
    if not chdb_server.SERVER:
        pytest.skip("NOT RUN ON A SERVER: CLICKHOUSE_TEST_URL names none, so these tests saw the embedded engine only")
    assert "server" in chdb_server.IMPLEMENTATIONS


def test_rows_come_back_exactly(clickhouse: ClickHouse) -> None:
    table = factories.make_table(500, seed=1)
    clickhouse.insert_events(table, "a")
    found = clickhouse.rows(START_US, END_US)
    found.validate(full=True)
    assert found.equals(table)
    assert found.schema.equals(EVENT_SCHEMA, check_metadata=True)
    nullable = [field.name for field in EVENT_SCHEMA if field.nullable]
    assert all(0 < table.column(column).null_count < 500 for column in nullable)


def test_extreme_values_come_back_exactly(clickhouse: ClickHouse) -> None:
    table = factories.make_table(4, seed=2)
    table = factories.replace_column(table, "gpu_time_ns", [0, 1, 2**63 - 1, 2**53 + 1])
    table = factories.replace_column(table, "nonce", [bytes(16), b"\0" * 15 + b"x", b"x" + b"\0" * 15, b"\xff" * 16])
    clickhouse.insert_events(table, "a")
    assert clickhouse.rows(START_US, END_US).equals(table)


def test_an_empty_range_is_an_empty_table_of_the_schema(clickhouse: ClickHouse) -> None:
    assert clickhouse.rows(START_US, END_US).equals(EVENT_SCHEMA.empty_table())
    assert clickhouse.window_aggregates(START_US, END_US).equals(WINDOW_SCHEMA.empty_table())
    assert clickhouse.rollup_aggregates(START_US, END_US).equals(ROLLUP_SCHEMA.empty_table())
    assert clickhouse.latency_quantiles(START_US, END_US) == []
    assert clickhouse.totals() == (0, 0)
    clickhouse.insert_events(EVENT_SCHEMA.empty_table(), "a")


def test_rows_keep_duplicates_in_the_order_of_event_id(clickhouse: ClickHouse) -> None:
    table = factories.make_table(50, seed=3)
    clickhouse.insert_events(table, "a")
    clickhouse.insert_events(table, "b")
    found = clickhouse.rows(START_US, END_US).column("event_id").to_pylist()
    assert found == sorted(found)
    assert found == sorted(table.column("event_id").to_pylist() * 2)


def test_the_range_holds_its_begin_and_not_its_end(clickhouse: ClickHouse) -> None:
    rng = random.Random(4)
    times = (START_US - 1, START_US, END_US - 1, END_US)
    made = [factories.make_event(rng, recorded_at=us) for us in times]
    clickhouse.insert_events(events.table_from_events(made), "a")
    found = clickhouse.rows(START_US, END_US).column("recorded_at").cast(pa.int64()).to_pylist()
    assert sorted(found) == [START_US, END_US - 1]
    assert sum(clickhouse.window_aggregates(START_US, END_US).column("events").to_pylist()) == 2
    assert sum(clickhouse.rollup_aggregates(START_US, END_US).column("events").to_pylist()) == 2


def test_rows_of_some_keys(clickhouse: ClickHouse) -> None:
    table = factories.make_table(300, seed=5)
    clickhouse.insert_events(table, "a")
    keys = [(factories.CUSTOMERS[0], "flux-1-dev"), (factories.CUSTOMERS[1], "llama-3-70b")]
    expected = [row for row in table.to_pylist() if (row["customer_ref"], row["model_name"]) in keys]
    assert expected
    assert clickhouse.rows(START_US, END_US, keys).to_pylist() == expected
    assert clickhouse.rows(START_US, END_US, []).num_rows == 0


def test_a_key_is_a_value_and_never_sql(clickhouse: ClickHouse) -> None:
    table = factories.make_table(2, seed=6)
    odd = "a'b\\c\"}\n-- ') OR 1=1"
    clickhouse.insert_events(factories.replace_column(table, "model_name", [odd, "plain"]), "a")
    customer = table.column("customer_ref")[0].as_py()
    assert clickhouse.rows(START_US, END_US, [(customer, odd)]).column("model_name").to_pylist() == [odd]
    assert clickhouse.rows(START_US, END_US, [("' OR '1'='1", odd)]).num_rows == 0


def test_a_token_inserts_its_rows_once_into_raw_and_rollup(clickhouse: ClickHouse) -> None:
    table = factories.make_table(100, seed=7, start_us=END_US - HOUR_US // 2 - DAY_US, span_us=2 * DAY_US)
    for _ in range(3):
        clickhouse.insert_events(table, "same")
    assert clickhouse.totals() == (100, total_gpu_time_ns(table))
    assert sum(clickhouse.rollup_aggregates(0, END_US + 9 * DAY_US).column("events").to_pylist()) == 100
    clickhouse.insert_events(table, "other")
    assert clickhouse.totals()[0] == 200


def test_a_token_that_was_used_drops_other_rows(clickhouse: ClickHouse) -> None:
    clickhouse.insert_events(factories.make_table(10, seed=8), "used")
    clickhouse.insert_events(factories.make_table(10, seed=9), "used")
    assert clickhouse.totals()[0] == 10


def test_a_retry_heals_an_insert_whose_view_failed(clickhouse: ClickHouse, raw: Any) -> None:
    table = factories.make_table(100, seed=10)
    raw.command("RENAME TABLE usage_minute TO aside")
    with pytest.raises(Unavailable):
        clickhouse.insert_events(table, "a")
    raw.command("RENAME TABLE aside TO usage_minute")
    for _ in range(2):
        clickhouse.insert_events(table, "a")
        assert (clickhouse.totals()[0], rollup_events(clickhouse)) == (100, 100)


def test_an_insert_needs_a_token_and_the_schema(clickhouse: ClickHouse) -> None:
    table = factories.make_table(1)
    with pytest.raises(UsageError):
        clickhouse.insert_events(table, "")
    with pytest.raises(Finding):
        clickhouse.insert_events(table.drop_columns(["nonce"]), "a")


@pytest.mark.parametrize("seed", range(5))
def test_aggregates_equal_python(clickhouse: ClickHouse, raw: Any, seed: int) -> None:
    table = factories.make_table(700, seed)
    rng = random.Random(seed)
    table = factories.replace_column(table, "gpu_time_ns", [rng.randrange(2**62, 2**63) for _ in range(700)])
    for part in range(7):
        clickhouse.insert_events(table.slice(part * 100, 100), f"{part}")
    if seed % 2:
        raw.command("OPTIMIZE TABLE usage_minute FINAL")
    expected = oracle(table)
    assert max(sums[1] for sums in expected.values()) > 2**63
    windows = clickhouse.window_aggregates(START_US, END_US)
    assert windows.schema.equals(WINDOW_SCHEMA)
    assert {key: sums[:4] for key, sums in by_key(windows).items()} == expected
    rollup = clickhouse.rollup_aggregates(START_US, END_US)
    assert rollup.equals(windows.select(ROLLUP_SCHEMA.names))
    assert sum(rollup.column("gpu_time_ns").to_pylist(), Decimal(0)) == total_gpu_time_ns(table)
    assert clickhouse.totals() == (700, total_gpu_time_ns(table))


def test_a_swapped_amount_changes_the_sum_of_rows_alone(clickhouse: ClickHouse, raw: Any) -> None:
    rng = random.Random(11)
    key = {"customer_ref": factories.CUSTOMERS[0], "model_name": "flux-1-dev", "recorded_at": START_US}
    pair = [factories.make_event(rng, **key, gpu_time_ns=ns, gpu_count=1) for ns in (10, 20)]
    table = events.table_from_events(pair)
    clickhouse.insert_events(table, "a")
    (true,) = clickhouse.window_aggregates(START_US, END_US).to_pylist()
    raw.command("TRUNCATE TABLE usage_events")
    clickhouse.insert_events(factories.replace_column(table, "gpu_time_ns", [20, 10]), "b")
    (found,) = clickhouse.window_aggregates(START_US, END_US).to_pylist()
    assert found["row_sum"] != true["row_sum"]
    unbound = {"row_sum", "minute_sum"}
    assert [(k, v) for k, v in found.items() if k not in unbound] == [
        (k, v) for k, v in true.items() if k not in unbound
    ]


def test_totals_of_one_source(clickhouse: ClickHouse) -> None:
    rng = random.Random(12)
    made = [factories.make_event(rng, source=source) for source in ("trace:1", "gateway:1", "trace:1")]
    clickhouse.insert_events(events.table_from_events(made), "a")
    assert clickhouse.totals("trace:1") == (2, made[0].gpu_time_ns + made[2].gpu_time_ns)
    assert clickhouse.totals("nobody") == (0, 0)


def test_latency_quantiles(clickhouse: ClickHouse) -> None:
    table = factories.make_table(1_000, seed=13)
    table = factories.replace_column(table, "model_name", ["one"] * 1_000)
    clickhouse.insert_events(factories.replace_column(table, "total_time_us", list(range(1_000))), "a")
    (latency,) = clickhouse.latency_quantiles(START_US, END_US)
    assert (latency.model_name, latency.events) == ("one", 1_000)
    assert latency.p50_us == pytest.approx(500, abs=10)
    assert latency.p90_us == pytest.approx(900, abs=10)
    assert latency.p99_us == pytest.approx(990, abs=10)
