"""A day of ClickHouse made again from the evidence: whole or not at all, whatever stops it, beside live traffic."""

from __future__ import annotations

import random
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pytest

from render_platform import clickhouse as clickhouse_module
from render_platform import events
from render_platform.clickhouse import ClickHouse
from render_platform.clock import DAY_US, HOUR_US
from render_platform.errors import Finding, Unavailable, UsageError
from render_platform.events import EVENT_SCHEMA, Totals, total_gpu_time_ns
from tests import chdb_server, factories
from tests.chdb_server import DyingClient
from tests.factories import START_US
from tests.test_clickhouse import clickhouse, dsn, engine, name, raw  # noqa: F401  fixtures

DAY = START_US - START_US % DAY_US
FIRST = DAY + 11 * HOUR_US
TRUE = factories.make_table(300, seed=41, start_us=FIRST, span_us=2 * HOUR_US)
"""In two hours: a rollup is staged an hour at a time."""
NEXT = factories.make_table(40, seed=42, start_us=DAY + DAY_US, span_us=DAY_US)
EXPECTED = Totals(TRUE.num_rows, total_gpu_time_ns(TRUE))

OF_DAY = "toDate(recorded_at) = '2023-11-16'"

Spoil = Callable[[ClickHouse, Any], None]


def parts(table: pa.Table = TRUE) -> list[pa.Table]:
    return [table.slice(at, 100) for at in range(0, table.num_rows, 100)]


def lose(opened: ClickHouse, raw: Any) -> None:
    raw.command(f"DELETE FROM usage_events WHERE gpu_time_ns % 2 = 1 AND {OF_DAY}")


def double(opened: ClickHouse, raw: Any) -> None:
    opened.insert_events(TRUE.slice(0, 120), secrets.token_hex(8))


def alter(opened: ClickHouse, raw: Any) -> None:
    raw.command(
        f"ALTER TABLE usage_events UPDATE gpu_time_ns = gpu_time_ns + 1, status = 'error' "
        f"WHERE gpu_time_ns % 3 = 0 AND {OF_DAY} SETTINGS mutations_sync = 2"
    )


def invent(opened: ClickHouse, raw: Any) -> None:
    opened.insert_events(factories.make_table(50, seed=43, start_us=DAY, span_us=DAY_US), "foreign")


def spoil_rollups(opened: ClickHouse, raw: Any) -> None:
    raw.command("ALTER TABLE usage_hour DROP PARTITION '2023-11-16'")
    raw.command("INSERT INTO usage_minute SELECT * FROM usage_minute WHERE toDate(minute) = '2023-11-16'")


def all_of_it(opened: ClickHouse, raw: Any) -> None:
    for spoil in (double, invent, alter, lose, spoil_rollups):
        spoil(opened, raw)


SPOILS: tuple[Spoil, ...] = (lose, double, alter, invent, spoil_rollups, all_of_it)


@pytest.fixture
def filled(clickhouse: ClickHouse) -> ClickHouse:
    for number, part in enumerate(parts()):
        clickhouse.insert_events(part, f"{number}")
    clickhouse.insert_events(NEXT, "next")
    return clickhouse


def rollups(opened: ClickHouse, start_us: int = DAY, end_us: int = DAY + DAY_US) -> tuple[Totals, Totals]:
    """What the rollups add up to, by minute and by hour."""
    minutes, hours = opened.customer_usage(start_us, end_us), opened.device_hours(start_us, end_us)
    return (
        Totals(sum(row.events for row in minutes), sum(row.gpu_time_ns for row in minutes)),
        Totals(sum(row.events for row in hours), sum(row.gpu_time_ns for row in hours)),
    )


def staged(raw: Any) -> list[str]:
    query = "SELECT name FROM system.tables WHERE database = currentDatabase() AND name LIKE 'staging%'"
    return [row[0] for row in raw.query(query).result_rows]


def require_true(opened: ClickHouse) -> None:
    assert opened.rows(DAY, DAY + DAY_US).equals(TRUE)
    assert rollups(opened) == (EXPECTED, EXPECTED)
    assert opened.rows(DAY + DAY_US, DAY + 2 * DAY_US).equals(NEXT)
    assert rollups(opened, DAY + DAY_US, DAY + 2 * DAY_US)[0].events == NEXT.num_rows


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_day_is_as_the_evidence_has_it(filled: ClickHouse, raw: Any, spoil: Spoil) -> None:
    spoil(filled, raw)
    for _ in range(2):
        filled.rebuild_day(DAY, iter(parts()), EXPECTED)
        require_true(filled)
    assert staged(raw) == []


def test_a_day_that_held_nothing_is_filled(clickhouse: ClickHouse) -> None:
    clickhouse.rebuild_day(DAY, parts(), EXPECTED)
    assert clickhouse.rows(DAY, DAY + DAY_US).equals(TRUE)
    assert rollups(clickhouse) == (EXPECTED, EXPECTED)


@pytest.mark.parametrize("tables", [[], [EVENT_SCHEMA.empty_table()]])
def test_a_day_of_which_the_evidence_has_nothing_is_emptied(
    filled: ClickHouse, raw: Any, tables: list[pa.Table]
) -> None:
    for _ in range(2):
        filled.rebuild_day(DAY, tables, Totals(0, 0))
        assert filled.totals() == (NEXT.num_rows, total_gpu_time_ns(NEXT))
        assert rollups(filled) == (Totals(0, 0), Totals(0, 0))
        assert rollups(filled, DAY + DAY_US, DAY + 2 * DAY_US)[1].events == NEXT.num_rows


def another(table: pa.Table, **values: Any) -> pa.Table:
    """With one row more, of a valid event."""
    more = events.table_from_events([factories.make_event(random.Random(44), **values)])
    return pa.concat_tables([table, more])


BAD: dict[str, tuple[list[pa.Table], Totals, type[Exception], str]] = {
    "a row less than expected": ([TRUE.slice(1)], EXPECTED, Unavailable, "was expected"),
    "nothing": ([], EXPECTED, Unavailable, "was expected"),
    "rows where none are expected": ([TRUE], Totals(0, 0), Unavailable, "was expected"),
    "another amount": ([TRUE], Totals(EXPECTED.events, EXPECTED.gpu_time_ns + 1), Unavailable, "was expected"),
    "an event twice": ([TRUE, TRUE.slice(7, 1)], Totals(301, EXPECTED.gpu_time_ns), Finding, "twice"),
    "a row of the day before": ([another(TRUE, recorded_at=DAY - 1)], EXPECTED, Finding, "another day"),
    "a row of the day after": ([TRUE, another(TRUE, recorded_at=DAY + DAY_US)], EXPECTED, Finding, "another day"),
    "other columns": ([TRUE.drop_columns(["nonce"])], EXPECTED, Finding, "schema"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_the_evidence_changes_nothing(filled: ClickHouse, raw: Any, case: str) -> None:
    tables, expected, error, text = BAD[case]
    with pytest.raises(error, match=text):
        filled.rebuild_day(DAY, tables, expected)
    require_true(filled)
    assert staged(raw) == []


def test_a_reader_of_the_evidence_that_fails_changes_nothing(filled: ClickHouse, raw: Any) -> None:
    def failing() -> Iterator[pa.Table]:
        yield TRUE.slice(0, 10)
        raise Unavailable("the object is missing")

    with pytest.raises(Unavailable, match="the object is missing"):
        filled.rebuild_day(DAY, failing(), EXPECTED)
    require_true(filled)
    assert staged(raw) == []


@pytest.mark.parametrize("day_us", [DAY + 1, DAY + HOUR_US, -DAY_US])
def test_a_day_begins_at_midnight(clickhouse: ClickHouse, day_us: int) -> None:
    with pytest.raises(UsageError):
        clickhouse.rebuild_day(day_us, [], Totals(0, 0))


def test_killed_after_any_change_the_repeat_makes_it_whole(filled: ClickHouse, raw: Any, dsn: str, name: str) -> None:
    left = unchanged = 0
    while True:
        double(filled, raw)
        spoiled = filled.totals()
        with closing(DyingClient(chdb_server.open_raw(dsn, name), left)) as client:
            with suppress(Unavailable):
                ClickHouse(client, dsn, name).rebuild_day(DAY, parts(), EXPECTED)
            if client.calls <= left:
                break
        unchanged += filled.totals() == spoiled
        filled.rebuild_day(DAY, parts(), EXPECTED)
        require_true(filled)
        assert staged(raw) == [], f"after {left} changes"
        left += 1
    require_true(filled)
    assert unchanged == 11  # three tables made, three parts inserted, two rollups of two hours staged: then the swaps
    assert left == 16  # three swaps, three tables dropped


def test_no_statement_adds_up_more_than_an_hour(filled: ClickHouse, dsn: str, name: str) -> None:
    """What the statements of a rebuild take does not grow with the day, but with its fullest hour."""
    held_by: dict[str, list[int]] = {}

    class Watched(DyingClient):
        def command(self, sql: str, *args: Any, **options: Any) -> Any:
            done = super().command(sql, *args, **options)
            if target := re.match(r"INSERT INTO (staging_\w+)", sql):
                [held] = self.query_arrow(f"SELECT toInt64(sum(events)) AS rows FROM {target[1]}").to_pylist()
                held_by.setdefault(target[1], [0]).append(held["rows"])
            return done

    with closing(Watched(chdb_server.open_raw(dsn, name))) as client:
        ClickHouse(client, dsn, name).rebuild_day(DAY, parts(), EXPECTED)
    hours = [filled.hourly_totals(FIRST + number * HOUR_US).events for number in range(2)]
    assert [[after - before for before, after in pairwise(held)] for held in held_by.values()] == [hours, hours]
    require_true(filled)


@pytest.mark.parametrize("at_once", [10_000, 100, 7])
def test_an_event_that_stands_twice_is_found_however_ids_are_parted(
    filled: ClickHouse, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(clickhouse_module, "IDS_AT_ONCE", at_once)
    assert filled.duplicates() == 0
    with pytest.raises(Finding, match=f"hold event {TRUE.column('event_id')[7].as_py()} twice"):
        filled.rebuild_day(DAY, [TRUE, TRUE.slice(7, 1)], Totals(301, EXPECTED.gpu_time_ns))
    filled.insert_events(TRUE.slice(0, 120), "again")
    filled.insert_events(TRUE.slice(0, 1), "and again")
    assert filled.duplicates() == 121


def test_rows_of_other_days_arrive_meanwhile(filled: ClickHouse, raw: Any, dsn: str, name: str) -> None:
    """A writer and a reader beside it: neither loses anything, and the reader sees the old rows or the new ones."""
    double(filled, raw)
    seen: set[int] = set()
    written: list[int] = []
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set() or len(written) < 3:
            table = factories.make_table(5, seed=1_000 + len(written), start_us=DAY + DAY_US, span_us=DAY_US)
            filled.insert_events(table, f"live {len(written)}")
            written.append(table.num_rows)

    def read() -> None:
        while not stop.is_set():
            seen.add(filled.rows(DAY, DAY + DAY_US).num_rows)

    threads = [threading.Thread(target=work) for work in (write, read)]
    for thread in threads:
        thread.start()
    filled.rebuild_day(DAY, parts(), EXPECTED)
    stop.set()
    for thread in threads:
        thread.join()
    assert seen <= {TRUE.num_rows + 120, TRUE.num_rows}
    assert filled.rows(DAY, DAY + DAY_US).equals(TRUE)
    live = NEXT.num_rows + sum(written)
    assert filled.totals()[0] == TRUE.num_rows + live
    assert [total.events for total in rollups(filled, DAY + DAY_US, DAY + 2 * DAY_US)] == [live, live]


def test_rows_that_arrive_in_the_day_itself_are_noticed(filled: ClickHouse, dsn: str, name: str) -> None:
    class Late(DyingClient):
        def command(self, sql: str, *args: Any, **options: Any) -> Any:
            done = super().command(sql, *args, **options)
            if "REPLACE PARTITION" in sql and "usage_events" in sql:
                filled.insert_events(factories.make_table(1, seed=45), "late")
            return done

    with (
        closing(Late(chdb_server.open_raw(dsn, name))) as client,
        pytest.raises(Unavailable, match="nothing writes to this day"),
    ):
        ClickHouse(client, dsn, name).rebuild_day(DAY, parts(), EXPECTED)
    filled.rebuild_day(DAY, parts(), EXPECTED)
    require_true(filled)


def test_a_later_insert_takes_a_new_token(filled: ClickHouse) -> None:
    """What the engine does with a token from before is its own affair; rows under a new one always arrive."""
    without = TRUE.slice(100)
    filled.rebuild_day(DAY, [without], Totals(200, total_gpu_time_ns(without)))
    filled.insert_events(TRUE.slice(0, 100), "a token of its own")
    require_true(filled)
