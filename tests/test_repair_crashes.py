"""More of test_repair.py: repair crashes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import pyarrow as pa
import pytest

from render_platform import repair as repair_module
from render_platform.clickhouse import ClickHouse, ReportRow
from render_platform.errors import Unavailable
from render_platform.events import table_from_events
from render_platform.pipeline import Platform
from render_platform.reconciler import RepairOutcome
from tests.factories import make_events
from tests.stories import (
    HOUR,
    deliver,
    finish_lane,
    logged,
    record,
)
from tests.test_repair import (  # noqa: F401  fixtures
    DyingCas,
    DyingClickHouse,
    DyingLog,
    Kill,
    Killed,
    again,
    assert_exact,
    lose_everything,
    name,
    platform,
    recorded,
    states,
)


def insert(at: int, *, arrived: bool) -> Kill:
    def arrange(platform: Platform) -> None:
        platform.__dict__["clickhouse"] = DyingClickHouse(platform.clickhouse, at, arrived=arrived)

    return arrange


def store(*, stored: bool) -> Kill:
    def arrange(platform: Platform) -> None:
        platform.reconciler.cas = DyingCas(platform.cas, stored=stored)  # type: ignore[assignment]

    return arrange


def log(*, committed: bool) -> Kill:
    def arrange(platform: Platform) -> None:
        platform.reconciler.log = DyingLog(platform.log, committed=committed)  # type: ignore[assignment]

    return arrange


KILLS = {
    "after the plan": insert(0, arrived=False),
    "after the first chunk arrived": insert(0, arrived=True),
    "before the second chunk": insert(1, arrived=False),
    "after the last chunk arrived": insert(2, arrived=True),
    "before the record": store(stored=False),
    "after the record": store(stored=True),
    "before the entry": log(committed=False),
    "after the entry, before it is published": log(committed=True),
}


# Chunks that arrived are not sent again: the first insert of a later attempt is that of the first chunk still missing.
ALL_IN_A_ROW = tuple(
    "after the first chunk arrived" if where.startswith("after the last") else where for where in KILLS
)


@pytest.mark.parametrize("wheres", [*((where,) for where in KILLS), ALL_IN_A_ROW], ids=lambda wheres: wheres[-1])
def test_a_repair_that_was_killed_is_finished_exactly_once(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, wheres: tuple[str, ...]
) -> None:
    monkeypatch.setattr(repair_module, "CHUNK_ROWS", 7)  # 20 rows are three chunks
    made = recorded(platform)
    deliver(platform, made[20:])
    for seed, where in enumerate(wheres):
        with closing(again(platform, seed=100 + seed)) as dying:
            KILLS[where](dying)
            with pytest.raises(Killed):
                dying.repair(HOUR)
    outcome = platform.repair(HOUR)
    assert outcome.after.status == "reconciled"
    assert_exact(platform, made)
    platform.flush()  # publishes an entry that was committed before the kill
    [entry] = logged(platform, "repair")
    assert (entry.records, entry.gpu_time_ns) == (20, sum(event.gpu_time_ns for event in made[:20]))
    assert states(platform) == ["logged"]
    assert platform.repair(HOUR).inserted == 0
    assert len(logged(platform, "repair")) == 1
    assert platform.verify(deep=True).verified
    last = platform.hours.last_report(HOUR)
    assert last is not None
    assert (last.status, last.dirty) == ("reconciled", False)


def test_rows_that_arrived_otherwise_after_the_plan_are_not_inserted_again(platform: Platform) -> None:
    made = recorded(platform)
    deliver(platform, made[20:])
    with closing(again(platform)) as dying:
        insert(0, arrived=False)(dying)
        with pytest.raises(Killed):
            dying.repair(HOUR)
    deliver(platform, made[:20])
    outcome = platform.repair(HOUR)
    assert outcome.after.status == "reconciled"
    assert_exact(platform, made)


def test_what_went_missing_after_the_plan_of_a_killed_repair_is_inserted_too(platform: Platform) -> None:
    """One repair is enough: it finishes what the killed one began, and goes on with the rest."""
    made = recorded(platform)
    deliver(platform, made[20:])
    with closing(again(platform)) as dying:
        insert(0, arrived=True)(dying)
        with pytest.raises(Killed):
            dying.repair(HOUR)
    later = record(platform, make_events(15, 9), "trace/2")
    finish_lane(platform, "trace/2", HOUR + 2 * 3_600_000_000)
    platform.flush()
    outcome = platform.repair(HOUR)
    assert (outcome.inserted, outcome.after.status) == (15, "reconciled")
    assert_exact(platform, [*made, *later])
    assert states(platform) == ["logged", "logged"]


def test_a_repair_that_failed_for_want_of_clickhouse_is_finished_later(platform: Platform) -> None:
    made = recorded(platform)
    deliver(platform, made[20:])

    class Refusing(DyingClickHouse):
        def insert_events(self, table: pa.Table, token: str) -> None:
            raise Unavailable("ClickHouse went away")

    with closing(again(platform)) as broken:
        broken.__dict__["clickhouse"] = Refusing(broken.clickhouse, 0, arrived=False)
        with pytest.raises(Unavailable, match="went away"):
            broken.repair(HOUR)
    assert states(platform) == ["planned"]
    assert platform.repair(HOUR).inserted == 20
    assert_exact(platform, made)


def test_more_rows_lost_while_a_plan_was_unfinished_are_repaired_after_it(platform: Platform) -> None:
    made = recorded(platform)
    deliver(platform, made[20:40])
    with closing(again(platform)) as dying:
        insert(0, arrived=False)(dying)
        with pytest.raises(Killed):
            dying.repair(HOUR)
    lose_everything(platform)  # the fast path loses the rest as well
    outcomes: list[RepairOutcome] = [platform.repair(HOUR)]
    while outcomes[-1].inserted:
        outcomes.append(platform.repair(HOUR))
        assert len(outcomes) < 5
    assert_exact(platform, made)


class Overtaken(DyingClickHouse):
    """ClickHouse for a process that another one overtakes between its first look at the hour and its plan's."""

    def __init__(self, real: ClickHouse, meanwhile: Callable[[], object]) -> None:
        super().__init__(real, 10**9, arrived=True)
        self._meanwhile: Callable[[], object] | None = meanwhile

    def record_report(self, row: ReportRow) -> None:
        """The last thing that is done before the plan."""
        if self._meanwhile is not None:
            meanwhile, self._meanwhile = self._meanwhile, None
            meanwhile()

    def close(self) -> None:
        """It is the other platform's."""


def test_two_repairs_at_once_insert_every_row_once(platform: Platform) -> None:
    made = recorded(platform)
    deliver(platform, made[20:])
    others: list[RepairOutcome] = []
    with closing(again(platform)) as slow:
        slow.__dict__["clickhouse"] = Overtaken(platform.clickhouse, lambda: others.append(platform.repair(HOUR)))
        outcome = slow.repair(HOUR)
    assert [other.inserted for other in others] == [20]
    assert (outcome.before.status, outcome.inserted, outcome.after.status) == ("discrepant", 0, "reconciled")
    assert_exact(platform, made)
    assert states(platform) == ["abandoned", "logged"]


# The plan by itself.


def test_a_plan_is_durable_sorted_and_the_same_until_it_is_logged(platform: Platform) -> None:
    event_ids = [str(event.event_id) for event in make_events(5, 1)][::-1]
    plan = platform.repairs.plan(HOUR, event_ids)
    assert plan is not None
    assert list(plan.event_ids) == sorted(bytes.fromhex(event_id.replace("-", "")) for event_id in event_ids)
    with closing(again(platform)) as other:
        assert other.repairs.plan(HOUR, []) == plan
        assert other.repairs.plan(HOUR, event_ids[:1]) == plan, "the unfinished one first"
        assert other.repairs.plan(HOUR + 3_600_000_000, []) is None
        with other.database.write() as connection:
            other.repairs.mark_logged(connection, plan)
    assert platform.repairs.plan(HOUR, []) is None
    fresh = platform.repairs.plan(HOUR, event_ids)
    assert fresh is not None
    assert fresh.repair_id != plan.repair_id


def test_chunks_are_the_same_on_every_attempt(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair_module, "CHUNK_ROWS", 7)
    made = make_events(20, 1)
    plan = platform.repairs.plan(HOUR, [str(event.event_id) for event in made])
    assert plan is not None
    sent: list[list[tuple[str, int]]] = []

    class Sink:
        def insert_events(self, table: pa.Table, token: str) -> None:
            sent[-1].append((token, table.num_rows))

    for _ in range(2):
        sent.append([])
        platform.repairs.insert(plan, table_from_events(made), Sink(), [str(e.event_id) for e in made])
    assert sent[0] == sent[1] == [(f"{plan.repair_id}:{n}", rows) for n, rows in enumerate((7, 7, 6))]
