"""Every fault × (live, backfill): the verdict that it must give, and the way back to `reconciled`.

The last three hours of a day, twelve events each, the middle one struck by the fault. *Live*: the open platform that
recorded the hour judges it as it closes. *Backfill*: one Dagster run over all three hours, later, by a platform opened
for it. More ways in which a read goes wrong are in test_verdict_table.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import dagster as dg
import pytest
from dagster._core.storage.tags import ASSET_PARTITION_RANGE_END_TAG, ASSET_PARTITION_RANGE_START_TAG

from assets import ASSETS
from assets.jobs import hour_key
from render_platform.clock import HOUR_US
from render_platform.events import UsageEvent
from render_platform.pipeline import Platform
from resources.platform import PlatformResource
from tests import chdb_server
from tests.chdb_server import open_raw
from tests.commands import restored_process
from tests.factories import CUSTOMERS, make_events
from tests.fault_cases import (
    PATIENT_S,
    RAW,
    BrokenDuckDB,
    Proxy,
    Scene,
    alter,
    hour_later,
    ids_of,
    proxy_before_bridge,
    said_of,
)
from tests.stories import DEADLINE_US, deliver, logged, move_to, record

Rows = list[UsageEvent]
Said = dict[str, list[str]]
REC, DIS, PEN, UNA = "reconciled", "discrepant", "pending", "unavailable"
HOURS = (Scene.FIRST, Scene.BAD, Scene.LAST)
AS_IT_CLOSES = Scene.BAD + HOUR_US + DEADLINE_US
LATER = Scene.LAST + HOUR_US + DEADLINE_US


def nothing(_scene: Scene, _platform: Platform) -> None:
    """No harm beyond the rows."""


def same(made: Rows) -> Rows:
    return made


@dataclass(frozen=True)
class Fault:
    name: str
    live: str
    """The verdict on the middle hour as it closes."""
    backfill: str
    """And in the later run."""
    around: str
    """What that run says of the good hours."""
    causes: Callable[[Rows], Said] = lambda _made: {}
    """Event ids by cause, of the middle hour's events."""
    way_back: str = "mend"
    """`mend` the environment and judge again, or `repair`."""
    rows: Callable[[Rows], Rows] = same
    """What the fast path holds of the middle hour."""
    stage: str = "flush"
    """How far the slow path has come with it; see Scene."""
    strike: Callable[[Scene, Platform], object] = nothing
    """What is broken after that."""
    timeout_s: int = PATIENT_S
    """How long a client waits for ClickHouse."""


def rule(text: str, fault: str) -> Callable[[Scene, Platform], None]:
    def strike(scene: Scene, _platform: Platform) -> None:
        scene.proxy.rules.append((text, fault))

    return strike


def duckdb_fault(fault: str) -> Callable[[Scene, Platform], None]:
    def strike(scene: Scene, _platform: Platform) -> None:
        scene.duckdb.fault = fault

    return strike


def stop_clickhouse(scene: Scene, _platform: Platform) -> None:
    scene.proxy.stop()


def remove_object(scene: Scene, platform: Platform) -> None:
    scene.break_blob(platform, Path.unlink)


def alter_object(scene: Scene, platform: Platform) -> None:
    scene.break_blob(platform, alter)


def break_both(scene: Scene, platform: Platform) -> None:
    remove_object(scene, platform)
    stop_clickhouse(scene, platform)


def sql(*statements: str) -> Callable[[Scene, Platform], None]:
    """What an operator does to ClickHouse behind the platform's back."""

    def strike(scene: Scene, _platform: Platform) -> None:
        with closing(open_raw(chdb_server.dsn_of("bridge"), scene.database)) as client:
            for statement in statements:
                client.command(statement)

    return strike


def missing(made: Rows) -> Said:
    return {"missing": ids_of(made)}


def duplicated(made: Rows) -> Said:
    return {"duplicated": ids_of(made)}


def altered_tier(made: Rows) -> Rows:
    return [replace(made[0], pricing_tier="other"), *made[1:]]


def altered_ns(made: Rows) -> Rows:
    return [replace(made[0], gpu_time_ns=made[0].gpu_time_ns // 2), *made[1:]]


def stranger() -> Rows:
    return make_events(1, 99, Scene.BAD)


def other_customer(made: Rows) -> Rows:
    other = CUSTOMERS[0] if made[0].customer_ref != CUSTOMERS[0] else CUSTOMERS[1]
    return [replace(made[0], customer_ref=other), *made[1:]]


TRUNCATED = ("TRUNCATE TABLE usage_events", "TRUNCATE TABLE usage_minute")
HALF_WAY = ("ALTER TABLE usage_minute DELETE WHERE toHour(minute) = 22 SETTINGS mutations_sync = 2",)
"""The rows of one hour without their rollup: ClickHouse was killed between the two parts of an insert."""

# fmt: off
MATRIX = [
    #     the fault                       live backfill around
    Fault("no fault",                      REC, REC, REC),
    Fault("ClickHouse down",               UNA, UNA, UNA, strike=stop_clickhouse),
    Fault("ClickHouse too slow",           UNA, UNA, UNA, strike=rule(RAW, "stall"), timeout_s=2),
    Fault("ClickHouse fails raw reads",    UNA, UNA, UNA, strike=rule(RAW, "fail")),
    Fault("an answer without a byte",      UNA, UNA, UNA, strike=rule(RAW, "nothing")),
    Fault("an answer without its rows",    UNA, UNA, UNA, strike=rule(RAW, "header")),
    Fault("half-inserted batch",           DIS, DIS, REC, lambda m: missing(m[6:]), "repair", lambda m: m[:6]),
    Fault("rows without their rollup",     DIS, DIS, REC, lambda _: {}, "repair", strike=sql(*HALF_WAY)),
    Fault("duplicated batch",              DIS, DIS, REC, duplicated, "repair", lambda m: m * 2),
    Fault("altered GPU time",              DIS, DIS, REC, lambda m: {"altered": ids_of(m[:1])}, "repair", altered_ns),
    Fault("altered tier",                  DIS, DIS, REC, lambda m: {"altered": ids_of(m[:1])}, "repair", altered_tier),
    Fault("extra row",                     DIS, DIS, REC, lambda _: {"unexpected": ids_of(stranger())}, "repair",
          lambda m: [*m, *stranger()]),
    Fault("wrong customer",                DIS, DIS, REC,
          lambda m: {"altered": ids_of(m[:1]), "unexpected": ids_of(m[:1])}, "repair", other_customer),
    Fault("empty tables",                  DIS, DIS, DIS, missing, "repair", strike=sql(*TRUNCATED)),
    Fault("CAS object missing",            UNA, UNA, REC, strike=remove_object),
    Fault("CAS object altered",            UNA, UNA, REC, strike=alter_object),
    Fault("sealed, not stored",            PEN, PEN, REC, stage="seal"),
    Fault("stored, not logged",            PEN, PEN, REC, stage="store"),
    # The report of the hour before is appended to the log, and that publishes what waits there.
    Fault("logged, not published",         PEN, REC, REC, stage="log"),
    Fault("DuckDB of no use",              UNA, UNA, UNA, strike=duckdb_fault("closed")),
    Fault("DuckDB does not open",          UNA, UNA, UNA, strike=duckdb_fault("refused")),
    Fault("both down",                     UNA, UNA, UNA, strike=break_both),
]
# fmt: on
CASES = [pytest.param(fault, id=fault.name) for fault in MATRIX]


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with proxy_before_bridge() as proxy:
        yield Scene(tmp_path / "state", proxy)


def play(scene: Scene, platform: Platform, fault: Fault, now_us: int) -> None:
    """All three hours are recorded, it is `now_us`, the fault has struck, and nothing is judged yet."""
    scene.stage = fault.stage
    scene.record_good_hours(platform)
    scene.record_bad_hour(platform, now_us)
    deliver(platform, fault.rows(scene.bad))
    fault.strike(scene, platform)


class Judged(NamedTuple):
    status: str
    said: Said


def judged(platform: Platform, hour: int) -> Judged:
    """By reconciling now; a verdict that is not final must not be in the log."""
    before = len(logged(platform, "reconciliation"))
    report = platform.reconcile(hour)
    assert report.final == (report.status in (REC, DIS))
    assert bool(report.error) == (report.status == UNA)
    if not report.final:
        assert len(logged(platform, "reconciliation")) == before
        assert platform.hours.last_report(hour) is None
    return Judged(report.status, said_of(report.to_bytes()))


def reported(platform: Platform, hour: int) -> Judged:
    """As the log has it; where it has nothing, by judging again."""
    last = platform.hours.last_report(hour)
    return judged(platform, hour) if last is None else Judged(last.status, said_of(platform.cas.get(last.digest)))


def come_back(scene: Scene, fault: Fault, hours: Sequence[int]) -> None:
    """Once the fault is removed, or repaired after the day, all hours are reconciled."""
    scene.mend()
    scene.stage = "flush"
    with closing(scene.open(LATER)) as later:
        later.flush()
        if fault.way_back == "repair":
            for hour in hours:
                assert later.repair(hour).after.status == REC
        assert [judged(later, hour) for hour in HOURS] == [Judged(REC, {})] * 3
        assert later.clickhouse.totals() == (36, sum(one.gpu_time_ns for one in everything(scene)))
        assert later.verify(deep=True).verified


def everything(scene: Scene) -> Rows:
    return [event for made in (*scene.good.values(), scene.bad) for event in made]


@pytest.mark.parametrize("fault", CASES)
def test_live(scene: Scene, fault: Fault) -> None:
    scene.proxy.timeout_s = fault.timeout_s
    with closing(scene.open(Scene.BAD)) as platform:
        play(scene, platform, fault, AS_IT_CLOSES)
        expected = Judged(fault.live, fault.causes(scene.bad))
        assert judged(platform, Scene.BAD) == expected
        assert judged(platform, Scene.BAD) == expected, "and again"
    come_back(scene, fault, HOURS if fault.around == DIS else [Scene.BAD])


@pytest.mark.parametrize("fault", CASES)
def test_backfill(scene: Scene, fault: Fault) -> None:
    scene.proxy.timeout_s = fault.timeout_s
    with closing(scene.open(Scene.BAD)) as platform:
        play(scene, platform, fault, LATER)
    good = run_dagster(scene)
    verdicts = [fault.around, fault.backfill, fault.around]
    assert good == (UNA not in verdicts), "a run in which something could not be read has failed"
    with closing(scene.open(LATER)) as after:
        found = [reported(after, hour) for hour in HOURS]
        assert [one.status for one in found] == verdicts
        assert found[1].said == fault.causes(scene.bad)
        assert len(logged(after, "reconciliation")) == sum(status in (REC, DIS) for status in verdicts)
    scene.mend()
    if fault.way_back == "mend":
        with closing(scene.open(LATER)) as after:
            after.flush()
        assert run_dagster(scene), "the same backfill again"
    come_back(scene, fault, HOURS if fault.around == DIS else [Scene.BAD])


def run_dagster(scene: Scene) -> bool:
    """One run of the asset over the three hours; whether it succeeded."""
    with restored_process(), dg.DagsterInstance.ephemeral() as instance:
        os.environ["RENDER_PLATFORM_CLICKHOUSE_DSN"] = scene.proxy.dsn
        os.environ["RENDER_PLATFORM_CLICKHOUSE_DATABASE"] = scene.database
        duckdb = BrokenDuckDB(database=":memory:", fault=scene.duckdb.fault)
        result = dg.materialize(
            ASSETS,
            selection="reconciliation",
            instance=instance,
            resources={"platform": PlatformResource(state_dir=str(scene.state), duckdb=duckdb)},
            tags={
                ASSET_PARTITION_RANGE_START_TAG: hour_key(HOURS[0]),
                ASSET_PARTITION_RANGE_END_TAG: hour_key(HOURS[-1]),
            },
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            raise_on_error=False,
        )
        return result.success


# Two faults that need more than a row of the table.


def test_a_server_of_the_wrong_version_is_never_asked_for_rows(scene: Scene) -> None:
    """Only who connects asks for the version: the server is replaced before the platform is opened."""
    with closing(scene.open(Scene.BAD)) as platform:
        scene.record_good_hours(platform)
        scene.record_bad_hour(platform, LATER)
        deliver(platform, scene.bad)
    scene.proxy.rules.append(("version()", "old"))
    with closing(scene.open(LATER)) as live:
        report = live.reconcile(Scene.BAD)
        assert report.status == UNA
        assert "24.8 or newer" in report.error
    assert not run_dagster(scene)
    with closing(scene.open(LATER)) as after:
        assert [judged(after, hour).status for hour in HOURS] == [UNA] * 3
    scene.mend()
    assert run_dagster(scene)
    come_back(scene, MATRIX[0], [])


@pytest.mark.parametrize("backfill", [False, True], ids=["live", "backfill"])
def test_fast_rows_stamped_an_hour_ahead(scene: Scene, backfill: bool) -> None:
    """Missing where they belong and unexpected an hour later; repairs of both hours, in any order, mend it."""
    with closing(scene.open(Scene.BAD)) as platform:
        scene.record_good_hours(platform)
        scene.record_bad_hour(platform, LATER)
        deliver(platform, [hour_later(event) for event in scene.bad])
    if backfill:
        assert run_dagster(scene)
    with closing(scene.open(LATER)) as after:
        assert [reported(after, hour) for hour in HOURS] == [
            Judged(REC, {}),
            Judged(DIS, {"missing": ids_of(scene.bad)}),
            Judged(DIS, {"unexpected": ids_of(scene.bad)}),
        ]
    come_back(
        scene, replace(MATRIX[0], way_back="repair"), [Scene.LAST, Scene.BAD] if backfill else [Scene.BAD, Scene.LAST]
    )


@pytest.mark.parametrize("backfill", [False, True], ids=["live", "backfill"])
def test_a_gateway_whose_clock_is_an_hour_ahead(scene: Scene, backfill: bool) -> None:
    """Both paths hold its rows an hour later. That hour stays open until it is over by the right clock too; what is
    recorded after the clock was set right stands where the wrong clock had come to: nothing is lost or counted twice.
    """
    with closing(scene.open(Scene.BAD)) as platform:
        scene.record_good_hours(platform)
        before = record(platform, make_events(4, 43, Scene.BAD, HOUR_US // 4))
        wrong = record(platform, [hour_later(event) for event in scene.bad])
        right = record(platform, make_events(3, 44, Scene.BAD + HOUR_US // 2, HOUR_US // 4))
        assert {event.recorded_at for event in right} == {max(event.recorded_at for event in wrong)}
        deliver(platform, [*before, *wrong, *right])
        move_to(platform, AS_IT_CLOSES)
        platform.flush()
        if not backfill:
            assert judged(platform, Scene.BAD) == Judged(REC, {})
            assert judged(platform, Scene.LAST) == Judged(PEN, {})
        move_to(platform, LATER)
        platform.flush()
    if backfill:
        assert run_dagster(scene)
    with closing(scene.open(LATER)) as after:
        found = [after.reconcile(hour) for hour in HOURS]
        assert [report.status for report in found] == [REC] * 3
        counted = [(report.total("events"), report.total("fast_events")) for report in found]
        assert counted == [(12, 12), (4, 4), (27, 27)]


def test_the_proxy_itself_changes_nothing(scene: Scene) -> None:
    assert isinstance(scene.proxy, Proxy)
    with closing(scene.open(Scene.BAD)) as platform:
        deliver(platform, scene.bad)
        assert platform.clickhouse.totals() == (12, sum(event.gpu_time_ns for event in scene.bad))
