"""`query`: one SELECT over the rows of the batches, which reaches nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest

from render_platform.errors import Missing, PlatformError, UsageError
from render_platform.events import total_gpu_time_ns
from render_platform.slow_path import run_query
from tests import factories


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
