"""Sealing: which rows go into which batch, what a transaction may hold, and when an hour is declared complete."""

from __future__ import annotations

import random
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from render_platform.clock import HOUR_US, ManualClock
from render_platform.database import Database
from render_platform.events import UsageEvent
from render_platform.pipeline import Platform
from render_platform.sealing import Sealer
from tests.factories import START_US, make_event, make_events
from tests.platforms import (
    LIVE,
    connect,
    event_bytes,
    make_platform,
    open_database_of,
    record,
    record_random,
    tree_hash,
)

SECOND = 1_000_000
BATCH_ROWS = 5
TRANSACTION_ROWS = 3


def query(state: Path, sql: str) -> list[dict[str, Any]]:
    with closing(connect(state)) as connection:
        cursor = connection.execute(sql)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]


def check_batches(state: Path, recorded: Sequence[tuple[str, UsageEvent]], batch_rows: int = BATCH_ROWS) -> None:
    """Every rule of sealing, from the tables alone; for a moment at which everything recorded is sealed."""
    batches = query(state, "SELECT * FROM batches ORDER BY ordinal")
    members: dict[str, list[tuple[str, UsageEvent]]] = defaultdict(list)
    by_id = {event.event_id.bytes: (lane, event) for lane, event in recorded}
    for row in query(state, "SELECT event_id, batch_id FROM usage_events"):
        members[row["batch_id"]].append(by_id.pop(row["event_id"]))
    assert by_id == {}, "every recorded row stands"
    usage = [batch for batch in batches if batch["type"] == "usage_batch"]
    assert {batch["batch_id"] for batch in usage} == set(members), "in exactly one batch, and no batch is empty"
    for batch in usage:
        _check_batch(batch, members[batch["batch_id"]], batch_rows)
    seqs: dict[int, list[int]] = defaultdict(list)
    for batch in usage:
        seqs[batch["hour_us"]].append(batch["batch_seq"])
    assert all(found == list(range(len(found))) for found in seqs.values()), "contiguous, in their order"
    for lane in query(state, "SELECT * FROM lanes"):
        own = [event for name, event in recorded if name == lane["lane"]]
        _check_lane(lane, [batch for batch in batches if batch["lane"] == lane["lane"]], members, own)


def _check_batch(batch: dict[str, Any], members: list[tuple[str, UsageEvent]], batch_rows: int) -> None:
    events = sorted((event for _, event in members), key=lambda event: event.event_id)
    times = [event.recorded_at for event in events]
    assert batch["state"] == "sealed"
    assert 1 <= len(events) <= batch_rows
    assert {lane for lane, _ in members} == {batch["lane"]}
    assert {at - at % HOUR_US for at in times} == {batch["hour_us"]}
    assert (batch["records"], int(batch["gpu_time_ns"])) == (len(events), sum(e.gpu_time_ns for e in events))
    assert (batch["first_recorded_at"], batch["last_recorded_at"]) == (min(times), max(times))
    assert batch["merkle_root"] == tree_hash([event_bytes(event) for event in events]).hex()


def _check_lane(
    lane: dict[str, Any],
    batches: list[dict[str, Any]],
    members: dict[str, list[tuple[str, UsageEvent]]],
    events: list[UsageEvent],
) -> None:
    """`complete_until` never goes back and is true: what is before it is in this batch or an earlier one."""
    seen: set[Any] = set()
    last = 0
    declared = []
    for batch in batches:
        assert batch["state"] == "sealed"
        assert last <= (last := batch["complete_until"]) <= lane["frontier_us"]
        seen |= {event.event_id for _, event in members[batch["batch_id"]]}
        assert {event.event_id for event in events if event.recorded_at < last} <= seen
        hour = batch["hour_us"]
        if batch["type"] == "watermark":
            assert last >= hour + HOUR_US
            mine = [event for event in events if hour <= event.recorded_at < hour + HOUR_US]
            assert (batch["records"], int(batch["gpu_time_ns"])) == (len(mine), sum(e.gpu_time_ns for e in mine))
            declared.append(hour)
        else:
            assert hour not in declared
    over = lane["frontier_us"] - lane["frontier_us"] % HOUR_US
    assert declared == list(range(lane["start_us"], over, HOUR_US)), "each hour that is over, empty or not, once"


@contextmanager
def counted_moves(database: Database) -> Iterator[list[int]]:
    """How many rows each committed transaction has put into batches."""
    moved: list[int] = []
    current = [0]

    def executed(_c: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("UPDATE usage_events"):
            current[0] += cursor.rowcount

    def committed(_connection: Any) -> None:
        if current[0]:
            moved.append(current[0])
        current[0] = 0

    sa.event.listen(database.engine, "after_cursor_execute", executed)
    sa.event.listen(database.engine, "commit", committed)
    yield moved
    sa.event.remove(database.engine, "after_cursor_execute", executed)
    sa.event.remove(database.engine, "commit", committed)


def tagged(lane: str, events: Sequence[UsageEvent]) -> list[tuple[str, UsageEvent]]:
    return [(lane, event) for event in events]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 10, 11, 23])
def test_batches_and_transactions_stay_within_their_bounds(platform: Platform, rows: int) -> None:
    recorded = record_random(platform, rows, rows)
    with counted_moves(platform.database) as moved:
        ids = platform.seal()
    assert sum(moved) == rows
    assert max(moved) <= TRANSACTION_ROWS
    assert ids == [f"2023-11-16T18-{n:05d}" for n in range(-(-rows // BATCH_ROWS))]
    check_batches(platform.settings.state_dir, tagged(LIVE, recorded))


def test_sealing_again_changes_nothing(platform: Platform) -> None:
    record_random(platform, 12, 1)
    platform.seal()
    before = query(platform.settings.state_dir, "SELECT * FROM batches")
    assert platform.seal() == []
    assert query(platform.settings.state_dir, "SELECT * FROM batches") == before


def test_rows_of_two_hours_never_share_a_batch(platform: Platform) -> None:
    edge = START_US + HOUR_US
    rng = random.Random(1)
    events = [make_event(rng, recorded_at=at) for at in (edge - 2, edge - 1, edge, edge + 1)]
    recorded = record(platform, LIVE, events)
    assert platform.seal() == ["2023-11-16T18-00000", "2023-11-16T19-00000"]
    check_batches(platform.settings.state_dir, tagged(LIVE, recorded))


def test_lanes_in_the_same_hour_have_batches_of_their_own(platform: Platform) -> None:
    recorded = []
    for turn in range(3):
        for number, lane in enumerate((LIVE, "trace-1", "trace-2")):
            start = START_US + turn * 600 * SECOND
            recorded += tagged(lane, record_random(platform, 4, 10 * turn + number, lane, start, 600 * SECOND))
        platform.seal()
        check_batches(platform.settings.state_dir, recorded)


def test_empty_hours_get_a_watermark_too(platform: Platform) -> None:
    recorded = record_random(platform, 7, 1)
    recorded += record_random(platform, 2, 2, start_us=START_US + 4 * HOUR_US)
    platform.seal()
    check_batches(platform.settings.state_dir, tagged(LIVE, recorded))
    watermarks = query(platform.settings.state_dir, "SELECT * FROM batches WHERE type = 'watermark' ORDER BY ordinal")
    assert [(row["batch_id"], row["records"]) for row in watermarks] == [
        ("watermark/live/2023-11-16T18", 7),
        ("watermark/live/2023-11-16T19", 0),
        ("watermark/live/2023-11-16T20", 0),
        ("watermark/live/2023-11-16T21", 0),
    ]


def test_an_idle_live_lane_follows_the_clock_and_another_lane_does_not(platform: Platform) -> None:
    assert isinstance(platform.clock, ManualClock)
    recorded = [
        *tagged(LIVE, record_random(platform, 3, 1)),
        *tagged("trace-1", record_random(platform, 3, 2, "trace-1")),
    ]
    platform.clock.move_to(START_US + 2 * HOUR_US - 1)
    platform.seal()
    check_batches(platform.settings.state_dir, recorded)
    platform.clock.move_to(START_US + 2 * HOUR_US)
    platform.seal()
    check_batches(platform.settings.state_dir, recorded)
    found = query(
        platform.settings.state_dir, "SELECT lane, count(*) AS n FROM batches WHERE type='watermark' GROUP BY 1"
    )
    assert found == [{"lane": LIVE, "n": 2}]


def test_an_event_after_an_hour_was_declared_falls_into_the_next_one(platform: Platform) -> None:
    """The clock of a gateway stood, and the sealer's did not: the frontier decides."""
    assert isinstance(platform.clock, ManualClock)
    recorded = record_random(platform, 2, 1)
    platform.clock.move_to(START_US + HOUR_US + 5)
    platform.seal()
    late = record_random(platform, 2, 2)
    assert {event.recorded_at for event in late} == {START_US + HOUR_US + 5}
    platform.seal()
    check_batches(platform.settings.state_dir, tagged(LIVE, [*recorded, *late]))


def test_a_finished_lane_is_complete_to_its_end(platform: Platform) -> None:
    recorded = record_random(platform, 3, 1, "trace-1")
    with platform.database.write() as connection:
        platform.outbox.finish_lane(connection, "trace-1", START_US + 3 * HOUR_US)
    platform.seal()
    check_batches(platform.settings.state_dir, tagged("trace-1", recorded))
    assert query(platform.settings.state_dir, "SELECT count(*) AS n FROM batches WHERE type='watermark'") == [{"n": 3}]


def test_a_batch_that_was_being_filled_stays_within_a_bound_that_was_lowered_since(tmp_path: Path) -> None:
    """A crash leaves a batch of six rows being filled; the next process allows four."""
    platform = make_platform(tmp_path, batch_rows=10, seal_rows_a_transaction=3)
    recorded = record_random(platform, 20, 1)
    sealer = Sealer(platform.database, platform.clock, batch_rows=10, rows_a_transaction=3)
    sealer._fill(LIVE)
    sealer._fill(LIVE)
    platform.close()
    platform = make_platform(tmp_path, batch_rows=4, seal_rows_a_transaction=2)
    with counted_moves(platform.database) as moved:
        platform.seal()
    platform.close()
    assert max(moved) <= 2
    records = [row["records"] for row in query(tmp_path, "SELECT records FROM batches ORDER BY ordinal")]
    assert records == [6, 4, 4, 4, 2]
    check_batches(tmp_path, tagged(LIVE, recorded), batch_rows=6)


class HookedDatabase(Database):
    """Lets something happen right before its n-th writing transaction."""

    def __init__(self, engine: sa.Engine, at: int, hook: Callable[[], None]) -> None:
        super().__init__(engine)
        self._at = at
        self._hook = hook
        self.writes = 0

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        self.writes += 1
        if self.writes == self._at:
            self._hook()
        with super().write() as connection:
            yield connection


def seal_into(platform: Platform, found: list[str]) -> None:
    found.extend(platform.seal())


def test_a_sealer_that_runs_between_any_two_steps_of_another_seals_nothing_twice(tmp_path: Path) -> None:
    at = 0
    while True:
        at += 1
        state = tmp_path / f"{at}"
        platform = make_platform(state, batch_rows=BATCH_ROWS, seal_rows_a_transaction=TRANSACTION_ROWS)
        recorded = record_random(platform, 12, 1)
        recorded += record_random(platform, 2, 2, start_us=START_US + 2 * HOUR_US)
        between: list[str] = []
        hooked = HookedDatabase(open_database_of(state).engine, at, partial(seal_into, platform, between))
        sealer = Sealer(hooked, platform.clock, batch_rows=BATCH_ROWS, rows_a_transaction=TRANSACTION_ROWS)
        ids = sealer.seal()
        hooked.close()
        platform.close()
        check_batches(state, tagged(LIVE, recorded))
        assert [name for name, n in Counter([*ids, *between]).items() if n > 1] == [], "sealed by one call alone"
        if hooked.writes < at:
            break
    assert at > 8


def test_two_sealers_at_once_seal_nothing_twice(tmp_path: Path) -> None:
    platform = make_platform(tmp_path)
    recorded = []
    for number, lane in enumerate((LIVE, "trace-1")):
        recorded += tagged(lane, record_random(platform, 60, number, lane, span_us=3 * HOUR_US))
    barrier = threading.Barrier(3)

    def work(n: int) -> None:
        own = make_platform(tmp_path, seed=n, batch_rows=BATCH_ROWS, seal_rows_a_transaction=TRANSACTION_ROWS)
        barrier.wait()
        own.seal()
        own.close()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    platform.close()
    check_batches(tmp_path, recorded)


STEPS = st.one_of(
    st.tuples(st.just("record"), st.sampled_from((LIVE, "a", "b")), st.integers(1, 8), st.integers(0, 2 * HOUR_US)),
    st.tuples(st.just("advance"), st.just(""), st.just(0), st.integers(1, 3 * HOUR_US)),
    st.tuples(st.just("fill"), st.sampled_from((LIVE, "a", "b")), st.just(0), st.just(0)),
    st.tuples(st.just("seal"), st.just(""), st.just(0), st.just(0)),
)


@settings(max_examples=40)
@given(steps=st.lists(STEPS, max_size=10), seed=st.integers(0, 2**32), finish=st.booleans())
def test_any_order_of_recording_and_sealing_keeps_every_rule(
    steps: list[tuple[str, str, int, int]], seed: int, finish: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        clock = ManualClock(START_US)
        state = Path(folder)
        platform = make_platform(state, clock, batch_rows=BATCH_ROWS, seal_rows_a_transaction=TRANSACTION_ROWS)
        sealer = Sealer(platform.database, clock, batch_rows=BATCH_ROWS, rows_a_transaction=TRANSACTION_ROWS)
        recorded: list[tuple[str, UsageEvent]] = []
        for number, (step, lane, rows, span) in enumerate(steps):
            if step == "record":
                events = make_events(rows, seed + number, clock.us, span + 1)
                recorded += tagged(lane, record(platform, lane, events))
            elif step == "advance":
                clock.move_to(clock.us + span)
            elif step == "fill" and lane in {name for name, _ in recorded}:
                sealer._fill(lane)
            elif step == "seal":
                platform.seal()
                check_batches(state, recorded)
        if finish and any(lane == "a" for lane, _ in recorded):
            with platform.database.write() as connection:
                platform.outbox.finish_lane(connection, "a", clock.us + HOUR_US)
        platform.seal()
        platform.close()
        check_batches(state, recorded)
