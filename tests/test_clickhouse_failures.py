"""More of test_clickhouse.py: clickhouse failures."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from render_platform import events
from render_platform.clickhouse import ClickHouse, open_clickhouse
from render_platform.clickhouse_schema import MIGRATIONS
from render_platform.clock import DAY_US
from render_platform.errors import Unavailable, UsageError
from render_platform.events import total_gpu_time_ns
from tests import chdb_server, factories
from tests.factories import START_US
from tests.test_clickhouse import END_US, clickhouse, dsn, engine, name, raw, rollup_events  # noqa: F401  fixtures


def test_unknown_tokens_are_counted_apart_from_zero(clickhouse: ClickHouse, raw: Any) -> None:
    table = factories.make_table(3, seed=14)
    clickhouse.insert_events(factories.replace_column(table, "input_tokens", [None, 0, 5]), "a")
    row = raw.query("SELECT sum(input_tokens_known), sum(input_tokens_sum), max(gpu_time_ns_max) FROM usage_minute")
    assert row.first_row == (2, 5, max(table.column("gpu_time_ns").to_pylist()))


def test_the_rollup_is_by_minute(clickhouse: ClickHouse) -> None:
    with pytest.raises(UsageError):
        clickhouse.rollup_aggregates(START_US + 1, END_US)
    with pytest.raises(UsageError):
        clickhouse.latency_quantiles(START_US, END_US + 1)


def test_rows_are_partitioned_by_day_in_utc(clickhouse: ClickHouse, raw: Any) -> None:
    midnight = START_US - START_US % DAY_US
    rng = random.Random(15)
    made = [factories.make_event(rng, recorded_at=us) for us in (midnight - 1, midnight)]
    clickhouse.insert_events(events.table_from_events(made), "a")
    query = "SELECT table, partition FROM system.parts WHERE database = currentDatabase() AND active AND rows > 0"
    found = {tuple(row) for row in raw.query(query).result_rows}
    days = ("2023-11-15", "2023-11-16")
    assert {(table, day) for table in ("usage_events", "usage_minute") for day in days} <= found


def test_migrating_again_changes_nothing(clickhouse: ClickHouse, raw: Any) -> None:
    clickhouse.insert_events(factories.make_table(5), "a")
    clickhouse.migrate()
    assert clickhouse.totals()[0] == 5
    numbers = [row[0] for row in raw.query("SELECT number FROM schema_migrations ORDER BY number").result_rows]
    assert numbers == [migration.number for migration in MIGRATIONS]


def test_a_migration_that_crashed_between_statements_goes_on(clickhouse: ClickHouse, raw: Any) -> None:
    clickhouse.insert_events(factories.make_table(5), "a")
    raw.command("TRUNCATE TABLE schema_migrations")
    raw.command("DROP TABLE usage_minute_view")
    clickhouse.migrate()
    clickhouse.insert_events(factories.make_table(5, seed=1), "b")
    assert (clickhouse.totals()[0], rollup_events(clickhouse)) == (10, 10)


def test_a_newer_database_is_refused(clickhouse: ClickHouse, raw: Any) -> None:
    raw.command("INSERT INTO schema_migrations VALUES (99, 'later')")
    with pytest.raises(Unavailable, match="99"):
        clickhouse.migrate()


def ttl_tables(client: Any, name: str) -> dict[str, int]:
    query = "SELECT name, countSubstrings(engine_full, ' TTL ') FROM system.tables WHERE database = {db:String}"
    found = dict(client.query(query, parameters={"db": name}).result_rows)
    return {table: found[table] for table in ("usage_events", "usage_minute")}


def test_rows_expire_only_when_asked(clickhouse: ClickHouse, raw: Any, dsn: str, name: str) -> None:
    clickhouse.insert_events(factories.make_table(20), "old rows")
    raw.command("OPTIMIZE TABLE usage_events FINAL")
    assert ttl_tables(raw, name) == {"usage_events": 0, "usage_minute": 0}
    assert clickhouse.totals()[0] == 20
    with closing(open_clickhouse(dsn, name, retention_days=90)) as limited:
        assert ttl_tables(raw, name) == {"usage_events": 1, "usage_minute": 1}
        for table in ("usage_events", "usage_minute"):
            raw.command(f"OPTIMIZE TABLE {table} FINAL")
        assert (limited.totals()[0], rollup_events(limited)) == (0, 0)
    with closing(open_clickhouse(dsn, name, retention_days=0)):
        assert ttl_tables(raw, name) == {"usage_events": 0, "usage_minute": 0}


def test_health_is_the_version(clickhouse: ClickHouse) -> None:
    assert int(clickhouse.health().split(".")[0]) >= 24


def test_a_failed_read_is_not_an_empty_result(clickhouse: ClickHouse, raw: Any) -> None:
    raw.command("DROP TABLE usage_events")
    raw.command("DROP TABLE usage_minute")
    for read in (clickhouse.rows, clickhouse.window_aggregates, clickhouse.rollup_aggregates):
        with pytest.raises(Unavailable):
            read(START_US, END_US)
    with pytest.raises(Unavailable):
        clickhouse.totals()


def test_a_read_that_failed_midway_leaves_nothing_to_the_next(clickhouse: ClickHouse) -> None:
    failing = "SELECT number, throwIf(number = 90000) FROM numbers(100000) SETTINGS max_block_size = 1000"
    for _ in range(2):
        with pytest.raises(Unavailable):
            clickhouse.query(failing)
        assert clickhouse.query("SELECT 1 AS x").to_pylist() == [{"x": 1}]


def test_no_limit_of_a_profile_cuts_an_answer_short(clickhouse: ClickHouse) -> None:
    """A server's user may have limits, and be told to get what there is up to them: each request says otherwise."""
    ours = "name LIKE '%overflow_mode' AND name != 'transfer_overflow_mode'"  # that one is of other servers' tables
    modes = clickhouse.query(f"SELECT name, value, changed FROM system.settings WHERE {ours}").to_pylist()
    assert {"distinct_overflow_mode", "set_overflow_mode", "group_by_overflow_mode"} <= {one["name"] for one in modes}
    assert {(one["value"], one["changed"]) for one in modes} == {("throw", 1)}


def test_a_closed_database_is_unavailable() -> None:
    closed = chdb_server.open_fresh()
    closed.close()
    closed.close()
    with pytest.raises(Unavailable):
        closed.totals()
    with pytest.raises(Unavailable):
        closed.insert_events(factories.make_table(1), "a")


def test_threads_share_one_clickhouse(clickhouse: ClickHouse) -> None:
    parts = [factories.make_table(50, seed) for seed in range(6)]
    threads = [
        threading.Thread(target=clickhouse.insert_events, args=(part, f"{number}")) for number, part in enumerate(parts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clickhouse.totals() == (300, sum(map(total_gpu_time_ns, parts)))


def test_a_file_in_place_of_the_folder_is_unavailable(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    with pytest.raises(Unavailable, match="RENDER_PLATFORM_CLICKHOUSE_DSN"):
        open_clickhouse(f"chdb://{file}", "t")


def test_a_second_folder_in_one_process_is_unavailable(tmp_path: Path) -> None:
    with closing(chdb_server.open_fresh()), pytest.raises(Unavailable, match="one folder"):
        open_clickhouse(f"chdb://{tmp_path / 'other'}", "t")


def test_a_second_process_is_told_who_owns_the_folder() -> None:
    code = "import sys; from render_platform import clickhouse; clickhouse.open_clickhouse(sys.argv[1], 't')"
    command = [sys.executable, "-c", code, chdb_server.shared_dsn()]
    with closing(chdb_server.open_fresh()):
        found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode
    assert "another process owns the embedded database" in found.stderr
    assert "stop the other process or point RENDER_PLATFORM_CLICKHOUSE_DSN at a server" in found.stderr


def test_a_server_that_is_down_is_unavailable_and_the_password_stays_secret() -> None:
    with pytest.raises(Unavailable, match="port=1") as caught:
        open_clickhouse("http://someone:hunter%402@127.0.0.1:1", "t")
    assert "hunter" not in f"{caught.value} {caught.value.__cause__}"
    assert caught.value.__suppress_context__


@contextmanager
def server_that_answers(body: str) -> Iterator[str]:
    """The host and port of a server that fails every request with `body`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(500)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_POST

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("spelled", ["hunter@2", "hunter%402"])
def test_a_server_that_repeats_the_password_does_not_make_us_repeat_it(spelled: str) -> None:
    with (
        server_that_answers(f"Code: 516. no entry for {spelled}\nmore") as address,
        pytest.raises(Unavailable, match=r"no entry for \*\*\*") as caught,
    ):
        open_clickhouse(f"http://someone:hunter%402@{address}", "t")
    assert "hunter" not in str(caught.value)


def test_https_is_never_spoken_as_http() -> None:
    with server_that_answers("plain text was understood") as address, pytest.raises(Unavailable) as caught:
        open_clickhouse(f"https://{address}", "t")
    assert "plain text" not in str(caught.value)


def test_an_old_server_is_refused_in_one_sentence() -> None:
    with (
        server_that_answers("Code: 47. DB::Exception: Unknown identifier: readonly") as address,
        pytest.raises(Unavailable) as caught,
    ):
        open_clickhouse(f"http://{address}", "t")
    assert str(caught.value) == "ClickHouse is too old or unsupported (24.8 or newer is needed)"


@pytest.mark.parametrize(("version", "good"), [("24.8.1.1", True), ("26.9", True), ("24.7.9", False), ("x", False)])
def test_the_oldest_version(clickhouse: ClickHouse, name: str, version: str, good: bool) -> None:
    clickhouse._client.server_version = version
    if good:
        clickhouse.prepare(0)
    else:
        with pytest.raises(Unavailable, match="too old"):
            clickhouse.prepare(0)


@pytest.mark.parametrize(
    "dsn", ["", "chdb://", "chdb:///a?b", "mysql://h", "http://u:hunter/2@h:8123", "http://u:1/hunter@h:8123"]
)
def test_a_dsn_that_cannot_be_used(dsn: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_clickhouse(dsn, "t")
    assert "hunter" not in str(caught.value)


@pytest.mark.parametrize("bad", ["", "a`b", "a b", "1a", "a" * 65])
def test_a_database_name_that_cannot_be_used(bad: str) -> None:
    with pytest.raises(UsageError):
        open_clickhouse(chdb_server.shared_dsn(), bad)
