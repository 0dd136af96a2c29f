"""The fast path delivers what it can, and counts what it cannot."""

from __future__ import annotations

import hashlib
from contextlib import closing

import pyarrow as pa
import pytest
from structlog.testing import capture_logs

from render_platform import fast_path
from render_platform.clock import HOUR_US, ManualClock
from render_platform.errors import Finding, Unavailable
from render_platform.fast_path import CHUNK_ROWS, FastPath, batch_token
from tests import chdb_server, factories
from tests.factories import START_US

CLOCK = ManualClock(START_US)


class Sink:
    """Takes inserts in memory; fails after `fails_from` of them; each takes `seconds`."""

    def __init__(self, fails_from: int = 1_000, clock: ManualClock = CLOCK, seconds: int = 0) -> None:
        self.inserts: list[tuple[pa.Table, str]] = []
        self.tries = 0
        self._fails_from = fails_from
        self._clock = clock
        self._seconds = seconds

    def insert_events(self, table: pa.Table, token: str) -> None:
        self.tries += 1
        self._clock.move_to(self._clock.now_us() + self._seconds * 1_000_000)
        if len(self.inserts) >= self._fails_from:
            raise Unavailable("ClickHouse is down", "start it")
        self.inserts.append((table, token))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_path, "CHUNK_ROWS", 40)


def test_rows_arrive_in_clickhouse_once() -> None:
    table = factories.make_table(300)
    with closing(chdb_server.open_fresh()) as clickhouse:
        path = FastPath(clickhouse, CLOCK)
        assert path.publish(table) == 300
        assert path.publish(table.take(list(reversed(range(300))))) == 300
        assert clickhouse.rows(START_US, START_US + HOUR_US).equals(table)
    assert (path.delivered, path.dropped, path.last_error) == (600, 0, "")


def test_clickhouse_down_drops_and_counts_and_warns_once() -> None:
    clickhouse = chdb_server.open_fresh()
    clickhouse.close()
    path = FastPath(clickhouse, CLOCK)
    with capture_logs() as logs:
        assert path.publish(factories.make_table(25)) == 0
    assert (path.delivered, path.dropped) == (0, 25)
    assert "ClickHouse" in path.last_error
    assert [(log["event"], log["log_level"], log["rows"]) for log in logs] == [("fast_path_dropped", "warning", 25)]


def test_the_rest_is_dropped_after_a_failure_and_never_sent_later(small_chunks: None) -> None:
    sink = Sink(fails_from=2)
    path = FastPath(sink, CLOCK)
    assert path.publish(factories.make_table(200)) == 80
    assert (path.delivered, path.dropped, sink.tries) == (80, 120, 3)
    assert path.last_error == "ClickHouse is down (start it)"
    sink._fails_from = 1_000
    assert path.publish(factories.make_table(10, seed=1)) == 10
    assert sum(table.num_rows for table, _ in sink.inserts) == 90


def test_a_slow_clickhouse_does_not_hold_the_rest_beyond_the_deadline(small_chunks: None) -> None:
    clock = ManualClock(START_US)
    path = FastPath(Sink(clock=clock, seconds=40), clock, deadline_s=60)
    assert path.publish(factories.make_table(200)) == 80
    assert (path.dropped, "deadline" in path.last_error) == (120, True)


def test_chunks_are_bounded_ordered_and_named_by_their_ids(small_chunks: None) -> None:
    table = factories.make_table(100)
    sink = Sink()
    FastPath(sink, CLOCK).publish(table.take(list(reversed(range(100)))))
    assert [part.num_rows for part, _ in sink.inserts] == [40, 40, 20]
    assert pa.concat_tables([part for part, _ in sink.inserts]).equals(table)
    for part, token in sink.inserts:
        ids = sorted(event_id.bytes for event_id in part.column("event_id").to_pylist())
        assert token == hashlib.sha256(b"".join(ids)).hexdigest()


def test_the_token_names_a_set_of_rows() -> None:
    table = factories.make_table(20)
    assert batch_token(table) == batch_token(table.take(list(reversed(range(20)))))
    assert batch_token(table) != batch_token(table.slice(1))
    assert CHUNK_ROWS <= 10_000


def test_nothing_to_publish_is_no_insert() -> None:
    sink = Sink()
    assert FastPath(sink, CLOCK).publish(factories.make_table(0)) == 0
    assert sink.tries == 0


def test_rows_of_another_schema_are_a_finding_and_not_a_drop() -> None:
    with closing(chdb_server.open_fresh()) as clickhouse, pytest.raises(Finding):
        FastPath(clickhouse, CLOCK).publish(factories.make_table(1).drop_columns(["nonce"]))
