"""A rebuild that was killed anywhere is finished by running it again, and logged once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from render_platform.clock import DAY_US, HOUR_US
from render_platform.errors import Unavailable
from render_platform.events import Totals, UsageEvent
from render_platform.pipeline import Platform
from tests import chdb_server
from tests.factories import make_events
from tests.stories import HOUR, deliver, finish_lane, logged, open_story, record, run_in_clickhouse
from tests.test_clickhouse import engine  # noqa: F401  fixture
from tests.test_repair import DyingCas, DyingClickHouse, DyingLog, Kill, Killed, again, assert_exact, states
from tests.test_repair_rebuild import CLOSED, DAY, LAST_HOUR

HOURS = range(HOUR, DAY + DAY_US, HOUR_US)


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    with closing(open_story(tmp_path / "state", chdb_server.fresh_database(), now_us=CLOSED)) as opened:
        yield opened


Ready = Callable[[], None]


class Rebuilding:
    """ClickHouse for a process that is killed in `rebuild_day`; `then` says what had been done by that time."""

    def __init__(self, platform: Platform, then: Callable[..., None]) -> None:
        self._real, self._then = platform.clickhouse, then

    def rebuild_day(self, day_us: int, tables: Iterator[pa.Table], expected: Totals, ready: Ready) -> None:
        self._then(self._real, day_us, tables, expected, ready)
        raise Killed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def nothing(*_: object) -> None:
    """Killed before it had begun."""


def whole(real: Any, *asked: Any) -> None:
    real.rebuild_day(*asked)


def killed_in_rebuild(then: Callable[..., None]) -> Kill:
    def arrange(platform: Platform) -> None:
        platform.__dict__["clickhouse"] = Rebuilding(platform, then)

    return arrange


def killed_between_swaps(platform: Platform) -> None:
    def raw_alone(real: Any, *asked: Any) -> None:
        real.rebuild_day(*asked)
        for table in ("usage_minute", "usage_hour"):
            run_in_clickhouse(platform, f"TRUNCATE TABLE {table}")

    killed_in_rebuild(raw_alone)(platform)


def store(*, stored: bool) -> Kill:
    def arrange(platform: Platform) -> None:
        platform.reconciler.cas = DyingCas(platform.cas, stored=stored)  # type: ignore[assignment]

    return arrange


def log(*, committed: bool) -> Kill:
    def arrange(platform: Platform) -> None:
        platform.reconciler.log = DyingLog(platform.log, committed=committed)  # type: ignore[assignment]

    return arrange


KILLS: dict[str, Kill] = {
    "after the plan": killed_in_rebuild(nothing),
    "between two swaps": killed_between_swaps,
    "after the last swap": killed_in_rebuild(whole),
    "before the record": store(stored=False),
    "after the record": store(stored=True),
    "before the entry": log(committed=False),
    "after the entry, before it is published": log(committed=True),
}


def spoiled(platform: Platform) -> list[UsageEvent]:
    """Events of two hours of the day, some of them missing and one twice; both hours are reported."""
    made = record(platform, [*make_events(20, 1), *make_events(5, 2, LAST_HOUR)])
    platform.flush()
    deliver(platform, made[4:])
    deliver(platform, made[-1:], "again")
    assert [platform.reconcile(hour).status for hour in (HOUR, LAST_HOUR)] == ["discrepant"] * 2
    return made


@pytest.mark.parametrize("wheres", [*((where,) for where in KILLS), tuple(KILLS)], ids=lambda wheres: wheres[-1])
def test_a_rebuild_that_was_killed_is_finished_and_logged_once(platform: Platform, wheres: tuple[str, ...]) -> None:
    made = spoiled(platform)
    for seed, where in enumerate(wheres):
        with closing(again(platform, seed=100 + seed)) as dying:
            KILLS[where](dying)
            with pytest.raises(Killed):
                dying.repair(LAST_HOUR)
    for hour in (HOUR, LAST_HOUR):
        assert platform.repair(hour).after.status == "reconciled"
    platform.flush()  # publishes an entry that was committed before the kill
    assert platform.clickhouse.totals() == (25, sum(event.gpu_time_ns for event in made))
    assert_exact_rollups(platform, made)
    assert len(logged(platform, "repair")) == 1
    assert states(platform) == ["rebuilt"]
    assert platform.verify(deep=True).verified
    assert [platform.reconcile(hour).status for hour in HOURS] == ["reconciled"] * len(HOURS)
    assert platform.hours.due() == []


def assert_exact_rollups(platform: Platform, made: list[UsageEvent]) -> None:
    table = platform.clickhouse.rollup_aggregates(DAY, DAY + DAY_US)
    assert sum(table.column("events").to_pylist()) == len(made)
    assert sum(table.column("gpu_time_ns").to_pylist()) == sum(event.gpu_time_ns for event in made)
    assert sum(one.events for one in platform.clickhouse.device_hours(DAY, DAY + DAY_US)) == len(made)


def test_a_crash_after_the_entry_leaves_the_days_hours_due(platform: Platform) -> None:
    """Whoever looks for hours to reconcile finds them, without another repair."""
    spoiled(platform)
    for hour in HOURS:
        platform.reconcile(hour)
    assert platform.hours.due() == []
    with closing(again(platform)) as dying:
        log(committed=True)(dying)
        with pytest.raises(Killed):
            dying.repair(LAST_HOUR)
    platform.flush()
    assert platform.hours.due() == list(HOURS)
    assert {platform.reconcile(hour).status for hour in platform.hours.due()} == {"reconciled"}
    assert platform.hours.due() == []


def test_an_unfinished_insert_of_the_day_is_given_up_for_the_rebuild(platform: Platform) -> None:
    """Its tokens mean nothing after the swap, and its rows have come back with the day."""
    made = record(platform, make_events(20, 1))
    platform.flush()
    deliver(platform, made[5:])
    with closing(again(platform)) as dying:
        dying.__dict__["clickhouse"] = DyingClickHouse(dying.clickhouse, 0, arrived=True)
        with pytest.raises(Killed):
            dying.repair(HOUR)
    deliver(platform, made[-1:], "again")
    assert platform.repair(HOUR).way == "rebuild"
    assert states(platform) == ["abandoned", "rebuilt"]
    assert platform.repair(HOUR).way == "nothing"
    assert_exact(platform, made)
    assert len(logged(platform, "repair")) == 1


def test_a_plan_says_that_a_rebuild_was_cut_off(platform: Platform) -> None:
    spoiled(platform)
    with closing(again(platform)) as dying:
        KILLS["after the last swap"](dying)
        with pytest.raises(Killed):
            dying.repair(LAST_HOUR)
    plan = platform.reconciler.plan(HOUR)
    assert (plan.way, bool(plan.unfinished), plan.report.status) == ("rebuild", True, "reconciled")


def test_an_unfinished_rebuild_waits_until_the_day_is_closed_again(platform: Platform) -> None:
    spoiled(platform)
    with closing(again(platform)) as dying:
        KILLS["after the plan"](dying)
        with pytest.raises(Killed):
            dying.repair(LAST_HOUR)
    late = record(platform, make_events(3, 9, LAST_HOUR), "trace/late")
    platform.flush()
    assert "is not closed" in platform.repair(HOUR).refused
    assert states(platform) == ["logged", "rebuilding"], "what was missing came back all the same"
    finish_lane(platform, "trace/late", CLOSED)
    platform.flush()
    assert platform.repair(LAST_HOUR).after.status == "reconciled"
    assert states(platform) == ["logged", "rebuilt"]
    assert platform.clickhouse.totals().events == 25 + len(late)


def test_two_rebuilds_at_once_are_one(platform: Platform) -> None:
    made = spoiled(platform)
    others: list[str] = []

    class Overtaken(Rebuilding):
        def rebuild_day(self, day_us: int, tables: Iterator[pa.Table], expected: Totals, ready: Ready) -> None:
            others.append(platform.repair(HOUR).way)
            platform.clickhouse.rebuild_day(day_us, tables, expected, ready)

        def close(self) -> None:
            """It is the other platform's."""

    with closing(again(platform)) as slow:
        slow.__dict__["clickhouse"] = Overtaken(platform, nothing)
        assert slow.repair(LAST_HOUR).after.status == "reconciled"
    assert others == ["rebuild"]
    assert (len(logged(platform, "repair")), states(platform)) == (1, ["rebuilt"])
    assert platform.clickhouse.totals().events == len(made)


def test_a_rebuild_without_clickhouse_is_finished_later(platform: Platform) -> None:
    spoiled(platform)

    def gone(*_: object) -> None:
        raise Unavailable("ClickHouse went away")

    with closing(again(platform)) as broken:
        broken.__dict__["clickhouse"] = Rebuilding(broken, gone)
        with pytest.raises(Unavailable, match="went away"):
            broken.repair(LAST_HOUR)
    assert states(platform) == ["rebuilding"]
    assert platform.repair(LAST_HOUR).after.status == "reconciled"
