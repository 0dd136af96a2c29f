"""The outbox: times that never go back, all or nothing, one salt a customer, exact totals, two writers at once."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from render_platform.clock import HOUR_US
from render_platform.database import metadata, usage_events
from render_platform.errors import RecordError, UsageError
from render_platform.events import MAX_GPU_TIME_NS, Totals, UsageEvent
from render_platform.outbox import customer_ref, rows_of_batch
from render_platform.pipeline import Platform
from tests import postgres
from tests.factories import START_US, make_events
from tests.platforms import LIVE, connect, make_platform, record, record_random, run_together


def query(state: Path, sql: str, *values: Any) -> list[Any]:
    with closing(connect(state)) as connection:
        found: list[Any] = connection.execute(sql, values).fetchall()
        connection.commit()
        return found


def dump(state: Path) -> dict[str, list[Any]]:
    return {table: query(state, f"SELECT * FROM {table} ORDER BY 1") for table in metadata.tables}


def record_as_given(platform: Platform, lane: str, events: list[UsageEvent]) -> list[UsageEvent]:
    with platform.database.write() as connection:
        return platform.outbox.record(connection, lane, events)


@settings(max_examples=30)
@given(
    offsets=st.lists(st.lists(st.integers(0, 2 * HOUR_US), min_size=1, max_size=5), min_size=1, max_size=5),
    seed=st.integers(0, 2**32),
)
def test_recorded_at_never_goes_back_and_is_raised_no_further_than_needed(
    tmp_path_factory: pytest.TempPathFactory, offsets: list[list[int]], seed: int
) -> None:
    platform = make_platform(tmp_path_factory.mktemp("state"))
    frontier = 0
    for number, group in enumerate(offsets):
        events = make_events(len(group), seed + number)
        asked = [replace(e, recorded_at=START_US + at) for e, at in zip(events, group, strict=True)]
        given_back = record_as_given(platform, LIVE, asked)
        for one, two in zip(asked, given_back, strict=True):
            frontier = max(frontier, one.recorded_at)
            assert two == replace(one, recorded_at=frontier)
        with platform.database.read() as connection:
            assert platform.outbox.frontier(connection, LIVE) == frontier
    stored = query(platform.settings.state_dir, "SELECT recorded_at FROM usage_events ORDER BY rowid")
    platform.close()
    assert stored == sorted(stored)


def test_lanes_have_clocks_of_their_own(platform: Platform) -> None:
    record_random(platform, 3, 1, start_us=START_US + 5 * HOUR_US)
    early = make_events(3, 2)
    assert sorted(record(platform, "trace-1", early), key=lambda e: e.event_id) == early


def test_what_is_recorded_is_what_was_given(platform: Platform) -> None:
    events = make_events(6, 1)
    record(platform, LIVE, events)
    platform.seal()
    with platform.database.read() as connection:
        tables = [rows_of_batch(connection, f"2023-11-16T18-0000{n}") for n in range(2)]
    found = [row for table in tables for row in table.to_pylist()]
    assert {row["event_id"]: row["gpu_time_ns"] for row in found} == {e.event_id: e.gpu_time_ns for e in events}
    assert {row["nonce"] for row in found} == {event.nonce for event in events}


@pytest.mark.parametrize("field", ["event_id", "job_id"])
@pytest.mark.parametrize("where", ["same call", "earlier call", "sealed", "other lane"])
def test_a_duplicate_is_refused_and_the_whole_transaction_leaves_nothing(
    platform: Platform, field: str, where: str
) -> None:
    first, *others = make_events(4, 1)
    twin = replace(make_events(1, 2)[0], **{field: getattr(first, field)})
    if where != "same call":
        record(platform, "trace-1" if where == "other lane" else LIVE, [first])
        if where == "sealed":
            platform.flush()
    else:
        others.append(first)
    before = dump(platform.settings.state_dir)

    def accept() -> None:
        with platform.database.write() as connection:
            platform.outbox.customer_ref(connection, "issuer", "someone new")
            platform.outbox.record(connection, LIVE, [*others, twin])

    with pytest.raises(RecordError, match="event_id or job_id"):
        accept()
    assert dump(platform.settings.state_dir) == before


def test_a_finished_lane_refuses(platform: Platform) -> None:
    record_random(platform, 2, 1, "trace-1")
    with platform.database.write() as connection:
        platform.outbox.finish_lane(connection, "trace-1", START_US + 2 * HOUR_US)
    before = dump(platform.settings.state_dir)
    with pytest.raises(UsageError, match="trace-1 is finished"):
        record_random(platform, 1, 2, "trace-1")
    assert dump(platform.settings.state_dir) == before
    record_random(platform, 1, 2)


def test_finishing_never_moves_the_frontier_back(platform: Platform) -> None:
    recorded = record_random(platform, 2, 1, "trace-1")
    with platform.database.write() as connection:
        platform.outbox.finish_lane(connection, "trace-1", START_US - HOUR_US)
        assert platform.outbox.frontier(connection, "trace-1") == recorded[-1].recorded_at


def test_a_customer_has_one_salt_whatever_is_asked(platform: Platform) -> None:
    refs = set()
    for _ in range(3):
        with platform.database.write() as connection:
            refs.add(platform.outbox.customer_ref(connection, "issuer", "Zoë"))
    assert len(refs) == 1
    ((salt, stored),) = query(platform.settings.state_dir, "SELECT salt, customer_ref FROM customers")
    assert len(salt) == 32
    expected = hashlib.sha256(b"render-platform/customer/v1\n" + salt + "Zoë".encode()).hexdigest()
    assert refs == {stored} == {expected} == {customer_ref(salt, "Zoë")}
    with platform.database.write() as connection:
        other = platform.outbox.customer_ref(connection, "other issuer", "Zoë")
    assert other not in refs
    assert platform.outbox.names() == {expected: "issuer/Zoë", other: "other issuer/Zoë"}


def test_a_customer_of_a_transaction_that_fails_leaves_no_salt(platform: Platform) -> None:
    def fail() -> None:
        with platform.database.write() as connection:
            platform.outbox.customer_ref(connection, "issuer", "someone")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert platform.outbox.names() == {}


def test_totals_are_exact_by_source_and_in_all(platform: Platform) -> None:
    assert platform.outbox.totals() == Totals(0, 0)
    events = make_events(40, 1, span_us=5 * HOUR_US)
    events = [replace(event, source=f"gateway:{n % 3}") for n, event in enumerate(events)]
    record(platform, LIVE, events)
    assert platform.outbox.totals() == Totals(40, sum(event.gpu_time_ns for event in events))
    for n in range(3):
        mine = [event.gpu_time_ns for event in events[n::3]]
        assert platform.outbox.totals(f"gateway:{n}") == Totals(len(mine), sum(mine))
    assert platform.outbox.totals("nobody") == Totals(0, 0)


def test_totals_pass_63_bits(platform: Platform) -> None:
    """52,000 of the largest events in one hour add up to more than SQL's integers hold."""
    started = START_US - MAX_GPU_TIME_NS // 1_000
    event = replace(
        make_events(1, 1)[0], gpu_time_ns=MAX_GPU_TIME_NS, gpu_started_at=started, event_time=START_US, gpu_count=1
    )
    record(platform, LIVE, [event])
    state = platform.settings.state_dir
    names = usage_events.c.keys()
    random_bytes = "uuid_send(gen_random_uuid())" if postgres.CHOSEN else "randomblob(16)"
    values = [random_bytes if name in ("event_id", "job_id") else name for name in names]
    counting = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 51999)"
    query(
        state,
        f"{counting} INSERT INTO usage_events ({', '.join(names)}) SELECT {', '.join(values)} FROM n, usage_events",
    )
    assert platform.outbox.totals() == Totals(52_000, 52_000 * MAX_GPU_TIME_NS)


def test_backlog_counts_what_is_not_published_and_how_old_it_is(platform: Platform) -> None:
    assert platform.outbox.backlog() == (0, 0, None)
    recorded = record_random(platform, 7, 1)
    oldest = min(event.recorded_at for event in recorded)
    assert platform.outbox.backlog() == (7, 0, oldest)
    platform.seal()
    assert platform.outbox.backlog() == (0, 2, oldest)
    platform.store()
    assert platform.outbox.backlog() == (0, 2, oldest)
    platform.log_batches()
    assert platform.outbox.backlog() == (0, 0, None)


ROUNDS, GROUP = 30, 4


def write_rounds(state: Path, number: int, begin: Callable[[], object]) -> None:
    """What one of several writers does, with a connection of its own; all of them know the same customer."""
    platform = make_platform(state, seed=number)
    begin()
    for turn in range(ROUNDS):
        with platform.database.write() as connection:
            platform.outbox.customer_ref(connection, "issuer", "shared")
            events = make_events(GROUP, number * 1_000 + turn, START_US + turn * 1_000_000, 3_000_000)
            platform.outbox.record(connection, LIVE, events)
    platform.close()


def check_writers(state: Path, writers: int) -> None:
    expected = [
        event
        for number in range(writers)
        for turn in range(ROUNDS)
        for event in make_events(GROUP, number * 1_000 + turn, START_US + turn * 1_000_000, 3_000_000)
    ]
    found = query(state, "SELECT event_id, gpu_time_ns FROM usage_events")
    assert sorted(found) == sorted((event.event_id.bytes, event.gpu_time_ns) for event in expected)
    order = "xmin::text::bigint, recorded_at" if postgres.CHOSEN else "rowid"  # transactions are numbered as they write
    times = query(state, f"SELECT recorded_at FROM usage_events ORDER BY {order}")
    assert times == sorted(times), "commits come in the order of recorded_at"
    assert query(state, "SELECT frontier_us FROM lanes") == [times[-1]]
    assert query(state, "SELECT count(*) FROM customers") == [(1,)]


def test_two_threads_lose_nothing(tmp_path: Path) -> None:
    make_platform(tmp_path).close()
    barrier = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda number: write_rounds(tmp_path, number, barrier.wait), range(2)))
    check_writers(tmp_path, 2)


CHILD = """
import sys
from pathlib import Path
from tests.test_outbox import write_rounds

def begin():
    print("ready", flush=True)
    sys.stdin.readline()

write_rounds(Path(sys.argv[1]), int(sys.argv[2]), begin)
"""


def test_two_processes_lose_nothing(tmp_path: Path) -> None:
    make_platform(tmp_path).close()
    run_together(CHILD, tmp_path, "01")
    check_writers(tmp_path, 2)
