"""Migrations: run once, repeatable after a crash anywhere, and existing rows counted once in a rollup that is new."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from render_platform.clickhouse import ClickHouse, open_clickhouse, pending_migrations
from render_platform.clickhouse_schema import KEPT, MIGRATIONS
from render_platform.clock import DAY_US, HOUR_US
from render_platform.errors import Unavailable
from tests import chdb_server, factories
from tests.chdb_server import DyingClient
from tests.commands import own_clickhouse, run_inside
from tests.factories import START_US
from tests.test_clickhouse import clickhouse, dsn, engine, name, raw  # noqa: F401  fixtures
from tests.test_clickhouse_queries import hour_events

NUMBERS = [migration.number for migration in MIGRATIONS]
READS: list[Callable[[ClickHouse], object]] = [
    ClickHouse.totals,
    ClickHouse.duplicates,
    ClickHouse.hours_with_rows,
    lambda opened: list(opened.row_values(START_US, START_US + DAY_US)),
    lambda opened: opened.window_aggregates(START_US, START_US + DAY_US),
    lambda opened: opened.reports(START_US, START_US + DAY_US),
]
MIDNIGHT = START_US - START_US % DAY_US
OLD = factories.make_table(400, seed=31, start_us=MIDNIGHT - HOUR_US, span_us=2 * HOUR_US)
"""An hour in each of two days: a rollup is filled an hour at a time."""


def numbers(found: list[Any]) -> list[int]:
    return [migration.number for migration in found]


def make_older(raw: Any) -> None:
    """As the version before left it: rows by minute, none by hour, no reports."""
    for table in ("usage_hour_view", "usage_hour", "reconciliation_reports"):
        raw.command(f"DROP TABLE {table} SYNC")
    raw.command("ALTER TABLE schema_migrations DELETE WHERE number > 2 SETTINGS mutations_sync = 2")


def tables(raw: Any) -> set[str]:
    return {
        row[0] for row in raw.query("SELECT name FROM system.tables WHERE database = currentDatabase()").result_rows
    }


@pytest.fixture
def older(clickhouse: ClickHouse, raw: Any) -> ClickHouse:
    make_older(raw)
    clickhouse.insert_events(OLD, "old")
    return clickhouse


def test_what_is_pending_is_told_and_nothing_changes(older: ClickHouse, raw: Any, dsn: str, name: str) -> None:
    before = tables(raw)
    assert numbers(pending_migrations(dsn, name)) == [3, 4]
    assert tables(raw) == before
    older.migrate()
    assert pending_migrations(dsn, name) == []


def test_a_database_that_is_not_there_is_not_made(dsn: str, name: str) -> None:
    assert numbers(pending_migrations(dsn, name)) == NUMBERS
    with closing(chdb_server.open_raw(dsn)) as client:
        assert name not in client.command("SHOW DATABASES")


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    assert numbers(pending_migrations(f"chdb://{tmp_path / 'clickhouse'}", "t")) == NUMBERS
    assert list(tmp_path.iterdir()) == []


def test_a_reader_changes_nothing_and_says_what_to_run(older: ClickHouse, raw: Any, dsn: str, name: str) -> None:
    before = tables(raw)
    with closing(open_clickhouse(dsn, name)) as reader:
        for read in READS:
            with pytest.raises(
                Unavailable, match=r"lacks 2 migrations, from number 3 on \(run `render-platform migrate`"
            ):
                read(reader)
        assert tables(raw) == before
        older.migrate()
        assert (reader.totals().events, hour_events(reader)) == (OLD.num_rows, OLD.num_rows)


def test_a_reader_makes_no_database(dsn: str, name: str) -> None:
    with closing(open_clickhouse(dsn, name)) as reader, pytest.raises(Unavailable, match="migrate"):
        reader.totals()
    with closing(chdb_server.open_raw(dsn)) as client:
        assert name not in client.command("SHOW DATABASES")


def test_an_insert_migrates_first(older: ClickHouse, dsn: str, name: str) -> None:
    with closing(open_clickhouse(dsn, name)) as writer:
        writer.insert_events(factories.make_table(50, seed=32), "new")
        assert (writer.totals()[0], hour_events(writer)) == (OLD.num_rows + 50, OLD.num_rows + 50)
    assert pending_migrations(dsn, name) == []


def test_a_migration_that_failed_leaves_a_reader_where_it_was(older: ClickHouse, dsn: str, name: str) -> None:
    with closing(DyingClient(chdb_server.open_raw(dsn, name), 2)) as client, pytest.raises(Unavailable):
        ClickHouse(client, dsn, name).insert_events(factories.make_table(1), "a")
    with closing(open_clickhouse(dsn, name)) as reader, pytest.raises(Unavailable, match="migrate"):
        reader.totals()


def test_existing_rows_are_counted_once(older: ClickHouse) -> None:
    for _ in range(2):
        older.migrate()
        assert hour_events(older) == OLD.num_rows
    for _ in range(2):
        older.insert_events(factories.make_table(50, seed=32), "new")
        assert (older.totals()[0], hour_events(older)) == (OLD.num_rows + 50, OLD.num_rows + 50)


def test_a_batch_sent_again_after_the_migration_is_put_right_by_a_rebuild(older: ClickHouse) -> None:
    """A rollup that is new knows no earlier token: writers finish what they send before it."""
    older.migrate()
    older.insert_events(OLD, "old")
    assert older.totals()[0] == OLD.num_rows
    older.rebuild_rollup(START_US - 3 * DAY_US, START_US + 3 * DAY_US)
    assert hour_events(older) == OLD.num_rows


@pytest.mark.parametrize("statements", range(3))
def test_a_migration_that_is_half_done_heals(older: ClickHouse, raw: Any, statements: int) -> None:
    """With 2 of them done, rows arrive before the rest."""
    for statement in MIGRATIONS[2].statements[:statements]:
        raw.command(statement)
    more = factories.make_table(60, seed=33)
    older.insert_events(more, "between")
    older.migrate()
    assert (older.totals()[0], hour_events(older)) == (OLD.num_rows + 60, OLD.num_rows + 60)


def test_a_crash_at_any_command(older: ClickHouse, raw: Any, dsn: str, name: str) -> None:
    left = 0
    while True:
        with closing(DyingClient(chdb_server.open_raw(dsn, name), left)) as client:
            try:
                ClickHouse(client, dsn, name).migrate()
                break
            except Unavailable:
                left += 1
        older.migrate()
        assert hour_events(older) == OLD.num_rows, f"after {left} commands"
        make_older(raw)
    assert left > 9
    assert {table for table in tables(raw) if not table.startswith("staging_")} >= {*KEPT, "schema_migrations"}


def test_two_that_migrate_at_once(older: ClickHouse, dsn: str, name: str) -> None:
    failed: list[Unavailable] = []

    def migrate() -> None:
        try:
            with closing(ClickHouse(chdb_server.open_raw(dsn, name), dsn, name)) as other:
                other.migrate()
        except Unavailable as error:  # told by the test
            failed.append(error)

    threads = [threading.Thread(target=migrate) for _ in range(1 if dsn.startswith("chdb:") else 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert hour_events(older) == OLD.num_rows


def test_rows_that_arrive_without_end_stop_it(older: ClickHouse, dsn: str, name: str) -> None:
    """Each time that the rollup was filled, another row has come by the time it is looked at."""

    class Busy(DyingClient):
        def command(self, sql: str, *args: Any, **options: Any) -> Any:
            done = super().command(sql, *args, **options)
            if "INSERT INTO staging_" in sql:
                number = self.calls
                older.insert_events(factories.make_table(1, seed=1_000 + number), f"busy {number}")
            return done

    with (
        closing(Busy(chdb_server.open_raw(dsn, name))) as client,
        pytest.raises(Unavailable, match="stop what writes"),
    ):
        ClickHouse(client, dsn, name).migrate()
    older.migrate()
    assert hour_events(older) == older.totals()[0] > OLD.num_rows


@contextmanager
def server_of_version(version: str) -> Iterator[str]:
    """A server that says its version to whoever asks, and knows no setting."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            asked = self.path.encode() + self.rfile.read(length)
            body = f"{version}\tUTC\n".encode() if b"version()" in asked else b""
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def prepare(dsn: str, name: str) -> None:
    open_clickhouse(dsn, name, 0).close()


def read(dsn: str, name: str) -> None:
    with closing(open_clickhouse(dsn, name)) as reader:
        reader.totals()


@pytest.mark.parametrize("version", ["23.8.16.16", "18.16.1", "24.7.6.8"])
def test_an_older_server_is_refused_in_one_sentence(version: str) -> None:
    with server_of_version(version) as url:
        for use in (read, prepare, pending_migrations):
            with pytest.raises(Unavailable) as caught:
                use(url, "t")
            assert str(caught.value) == "ClickHouse is too old or unsupported (24.8 or newer is needed)"


def test_the_command(tmp_path: Path) -> None:
    env = own_clickhouse()
    first = run_inside("migrate", "--check", "--json", "--state", tmp_path, env=env)
    assert (first.code, [one["number"] for one in first.json["migrations"]]) == (1, NUMBERS)
    assert first.json["applied"] is False
    done = run_inside("migrate", "--state", tmp_path, env=env)
    assert done.code == 0
    assert "done: 3 rollup by hour and device" in done.stdout
    for again in (("--check",), ()):
        outcome = run_inside("migrate", *again, "--json", "--state", tmp_path, env=env)
        assert (outcome.code, outcome.json["migrations"]) == (0, [])


def test_the_command_where_nothing_can_be_read(tmp_path: Path) -> None:
    env = {"RENDER_PLATFORM_CLICKHOUSE_DSN": "http://someone:hunter@127.0.0.1:1"}
    for options in (("--check",), ()):
        outcome = run_inside("migrate", *options, "--state", tmp_path, env=env)
        assert outcome.code == 3
        assert "hunter" not in outcome.said
    outcome = run_inside("migrate", "--check", "--state", tmp_path / "nowhere")
    assert (outcome.code, (tmp_path / "nowhere").exists()) == (2, False)
    newer = own_clickhouse()
    dsn, database = newer["RENDER_PLATFORM_CLICKHOUSE_DSN"], newer["RENDER_PLATFORM_CLICKHOUSE_DATABASE"]
    with closing(open_clickhouse(dsn, database, 0)), closing(chdb_server.open_raw(dsn, database)) as client:
        client.command("INSERT INTO schema_migrations VALUES (99, 'later')")
        outcome = run_inside("migrate", "--check", "--state", tmp_path, env=newer)
    assert outcome.code == 3
    assert "migration 99 is not known here" in outcome.stderr
