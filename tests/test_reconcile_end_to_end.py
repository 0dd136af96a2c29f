"""Reconciliation on a whole platform: outbox, CAS, log and the embedded ClickHouse."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from render_platform.cas import path_of
from render_platform.clock import HOUR_US, WINDOW_US
from render_platform.events import UsageEvent
from render_platform.pipeline import Platform
from tests import chdb_server
from tests.factories import make_events
from tests.stories import (
    AFTER_HOUR,
    DEADLINE_US,
    HOUR,
    NOWHERE,
    deliver,
    fast_ids,
    finish_lane,
    keyed_event,
    logged,
    move_to,
    open_story,
    record,
    run_in_clickhouse,
    wanting,
)
from tests.test_clickhouse import engine  # noqa: F401  fixture

LATE = "trace/late"


@pytest.fixture
def name() -> str:
    return chdb_server.fresh_database()


@pytest.fixture
def platform(tmp_path: Path, name: str) -> Iterator[Platform]:
    with closing(open_story(tmp_path / "state", name)) as opened:
        yield opened


def recorded(platform: Platform, n: int = 60, seed: int = 1) -> list[UsageEvent]:
    """Events of the first hour, flushed."""
    made = record(platform, make_events(n, seed))
    platform.flush()
    return made


def again(platform: Platform, name: str, *, dsn: str | None = None) -> Platform:
    """The same state opened by a fresh Platform."""
    return open_story(platform.settings.state_dir, name, dsn=dsn, now_us=platform.clock.now_us(), seed=99)


def late_rows(platform: Platform, n: int = 3, seed: int = 7) -> list[UsageEvent]:
    """A second lane records into the first hour after it was reported."""
    made = record(platform, make_events(n, seed), LATE)
    finish_lane(platform, LATE, HOUR + HOUR_US)
    platform.flush()
    return made


def report_blob(platform: Platform, at: int = -1) -> bytes:
    return platform.cas.get(str(logged(platform, "reconciliation")[at].subject_digest))


# Both sides equal.


def test_a_complete_hour_reconciles_and_its_report_is_in_the_log(platform: Platform) -> None:
    made = recorded(platform)
    deliver(platform, made)
    report = platform.reconcile(HOUR)
    assert (report.status, report.revision, report.final) == ("reconciled", 1, True)
    assert (report.total("events"), report.total("fast_events")) == (60, 60)
    assert report.total("gpu_time_ns") == report.total("fast_gpu_time_ns") == sum(e.gpu_time_ns for e in made)
    [entry] = logged(platform, "reconciliation")
    assert (entry.recorded_hour, entry.records, entry.gpu_time_ns) == (HOUR, 60, report.total("gpu_time_ns"))
    assert report_blob(platform) == report.to_bytes()
    assert wanting(platform) == []
    assert platform.verify(deep=True).verified


def test_reconciling_again_gives_the_same_bytes_and_logs_nothing(platform: Platform) -> None:
    deliver(platform, recorded(platform))
    first = platform.reconcile(HOUR)
    before = platform.log.published()
    for _ in range(3):
        assert platform.reconcile(HOUR).to_bytes() == first.to_bytes()
    assert platform.log.published() == before
    assert len(logged(platform, "reconciliation")) == 1


def test_a_backfill_by_a_fresh_platform_gives_equal_bytes(platform: Platform, name: str) -> None:
    made = recorded(platform)
    deliver(platform, made[:-2])
    first = platform.reconcile(HOUR)
    assert first.status == "discrepant"
    with closing(again(platform, name)) as later:
        move_to(later, HOUR + 50 * HOUR_US)
        assert later.reconcile(HOUR).to_bytes() == first.to_bytes()
        assert len(logged(later, "reconciliation")) == 1


def test_a_platform_that_never_reported_gives_the_bytes_that_the_live_one_gave(
    platform: Platform, tmp_path: Path, name: str
) -> None:
    made = recorded(platform)
    deliver(platform, made[:-2])
    platform.database.close()
    shutil.copytree(platform.settings.state_dir, tmp_path / "copy")
    live = platform.reconcile(HOUR)
    with closing(open_story(tmp_path / "copy", name, now_us=HOUR + 50 * HOUR_US, seed=5)) as copy:
        assert copy.reconcile(HOUR).to_bytes() == live.to_bytes()


def test_many_batches_of_two_lanes_in_one_hour_are_one_report(tmp_path: Path, name: str) -> None:
    with closing(open_story(tmp_path, name, batch_rows=7, seal_rows_a_transaction=3)) as platform:
        made = recorded(platform, 40)
        made += late_rows(platform, 10)
        deliver(platform, made)
        report = platform.reconcile(HOUR)
        assert report.status == "reconciled"
        assert report.total("events") == 50
        assert len(report.batches) == len(logged(platform, "usage_batch")) == 6 + 2


def test_an_hour_without_events_reconciles_as_empty(platform: Platform) -> None:
    record(platform, make_events(3, 1))
    move_to(platform, AFTER_HOUR + HOUR_US)
    platform.flush()
    report = platform.reconcile(HOUR + HOUR_US)
    assert (report.status, report.total("events"), report.batches) == ("reconciled", 0, ())


def test_fast_rows_of_an_hour_that_is_empty_on_the_slow_path_are_unexpected(platform: Platform) -> None:
    record(platform, make_events(3, 1))
    move_to(platform, AFTER_HOUR + HOUR_US)
    platform.flush()
    strangers = make_events(4, 2, HOUR + HOUR_US)
    deliver(platform, strangers)
    report = platform.reconcile(HOUR + HOUR_US)
    assert report.status == "discrepant"
    found = sorted(event_id for verdict in report.findings for event_id in verdict.diff.unexpected)
    assert found == sorted(str(event.event_id) for event in strangers)


# Differences.


def test_each_kind_of_difference_is_named(platform: Platform) -> None:
    made = recorded(platform)
    dropped, doubled, altered, moved, *rest = made
    fast = [*rest, doubled, replace(altered, gpu_time_ns=0), replace(moved, customer_ref="ab" * 32)]
    deliver(platform, fast)
    deliver(platform, [doubled], "again")
    [stranger] = make_events(1, 77)
    deliver(platform, [stranger], "stranger")
    report = platform.reconcile(HOUR)
    assert report.status == "discrepant"
    assert report.missing == (str(dropped.event_id),)
    found = {
        cause: {event_id for verdict in report.findings for event_id in getattr(verdict.diff, cause)}
        for cause in ("duplicated", "altered", "unexpected")
    }
    assert found == {
        "duplicated": {str(doubled.event_id)},
        "altered": {str(altered.event_id), str(moved.event_id)},
        "unexpected": {str(moved.event_id), str(stranger.event_id)},
    }
    assert all(verdict.figures.rollup_equal for verdict in report.findings)
    assert wanting(platform) == [HOUR]


def test_a_rollup_that_lost_its_rows_is_discrepant_although_raw_rows_agree(platform: Platform) -> None:
    deliver(platform, recorded(platform))
    run_in_clickhouse(platform, "TRUNCATE TABLE usage_minute")
    report = platform.reconcile(HOUR)
    assert report.status == "discrepant"
    assert report.findings
    assert not any(verdict.figures.rollup_equal for verdict in report.findings)
    assert all(verdict.figures.rows_equal for verdict in report.findings)


def test_one_of_a_thousand_missing_reconciles_and_is_still_listed(platform: Platform) -> None:
    rng = random.Random(4)
    made = record(platform, [keyed_event(rng, window=3) for _ in range(1_000)])
    platform.flush()
    deliver(platform, made[1:])
    report = platform.reconcile(HOUR)
    assert report.status == "reconciled"
    assert report.missing == (str(made[0].event_id),)


def test_after_the_rows_arrive_late_on_the_fast_path_a_new_revision_says_so(platform: Platform) -> None:
    made = recorded(platform)
    deliver(platform, made[:-3])
    assert platform.reconcile(HOUR).status == "discrepant"
    deliver(platform, made[-3:])
    second = platform.reconcile(HOUR)
    assert (second.status, second.revision) == ("reconciled", 2)
    assert [entry.batch_id for entry in logged(platform, "reconciliation")] == ["2023-11-16T18/r1", "2023-11-16T18/r2"]


def test_late_rows_on_the_slow_path_make_the_report_dirty_and_give_the_next_revision(platform: Platform) -> None:
    made = recorded(platform)
    deliver(platform, made)
    first = platform.reconcile(HOUR)
    late = late_rows(platform)
    last = platform.hours.last_report(HOUR)
    assert last is not None
    assert (last.revision, last.dirty) == (1, True)
    assert wanting(platform) == [HOUR]
    second = platform.reconcile(HOUR)
    assert (second.status, second.revision) == ("discrepant", 2)
    assert set(second.missing) == {str(event.event_id) for event in late}
    assert set(second.batches) > set(first.batches)
    deliver(platform, late)
    third = platform.reconcile(HOUR)
    assert (third.status, third.revision) == ("reconciled", 3)
    last = platform.hours.last_report(HOUR)
    assert last is not None
    assert (last.revision, last.dirty) == (3, False)
    assert len(logged(platform, "reconciliation")) == 3
    assert platform.verify(deep=True).verified


# Pending.


def test_an_hour_that_is_not_over_is_pending_and_not_logged(tmp_path: Path, name: str) -> None:
    now = HOUR + 4 * WINDOW_US + DEADLINE_US
    with closing(open_story(tmp_path, name, now_us=now)) as platform:
        made = record(platform, make_events(40, 1, HOUR, 4 * WINDOW_US))
        platform.flush()
        deliver(platform, made)
        report = platform.reconcile(HOUR)
        assert [window.status for window in report.windows] == ["reconciled"] * 4 + ["pending"] * 8
        assert (report.status, report.final) == ("pending", False)
        assert logged(platform, "reconciliation") == []
        move_to(platform, AFTER_HOUR)
        platform.flush()
        assert platform.reconcile(HOUR).status == "reconciled"
        assert len(logged(platform, "reconciliation")) == 1


def test_fast_rows_ahead_of_what_is_closed_are_not_unexpected(tmp_path: Path, name: str) -> None:
    now = HOUR + 4 * WINDOW_US + DEADLINE_US
    with closing(open_story(tmp_path, name, now_us=now)) as platform:
        made = record(platform, make_events(40, 1, HOUR, 5 * WINDOW_US))
        deliver(platform, made)
        report = platform.reconcile(HOUR)
        assert report.status == "pending"
        assert report.findings == ()


@pytest.mark.parametrize("stage", ["nothing", "seal", "store"])
def test_a_log_that_is_behind_is_pending(platform: Platform, stage: str) -> None:
    made = record(platform, make_events(60, 1))
    deliver(platform, made)
    if stage != "nothing":
        platform.seal()
    if stage == "store":
        platform.store()
    report = platform.reconcile(HOUR)
    assert report.status == "pending"
    assert platform.hours.last_report(HOUR) is None
    platform.flush()
    assert platform.reconcile(HOUR).status == "reconciled"


def test_an_hour_that_nobody_covers_is_pending_for_ever(platform: Platform) -> None:
    move_to(platform, HOUR + 50 * HOUR_US)
    platform.flush()
    report = platform.reconcile(HOUR)
    assert report.status == "pending"
    assert logged(platform, "reconciliation") == []


# Unavailable: unknown is not zero.


def clickhouse_unreachable(platform: Platform) -> Platform:
    return again(platform, "any", dsn=NOWHERE)


def clickhouse_of_another_folder(platform: Platform) -> Platform:
    """A process has one embedded ClickHouse: a second folder is refused."""
    return again(platform, "any", dsn=f"chdb://{platform.settings.state_dir}/other")


@pytest.mark.parametrize("down", [clickhouse_unreachable, clickhouse_of_another_folder])
@pytest.mark.parametrize("events", [0, 60])
def test_without_clickhouse_an_hour_is_unavailable(
    platform: Platform, down: Callable[[Platform], Platform], events: int
) -> None:
    deliver(platform, recorded(platform))
    hour = HOUR
    if not events:
        move_to(platform, AFTER_HOUR + HOUR_US)
        platform.flush()
        hour = HOUR + HOUR_US
    before = platform.log.published()
    with closing(down(platform)) as broken:
        report = broken.reconcile(hour)
        assert report.status == "unavailable"
        assert report.error
        assert {window.status for window in report.windows} == {"unavailable"}
        assert broken.hours.last_report(hour) is None
        assert broken.log.published() == before
    assert platform.reconcile(hour).status == "reconciled"


def test_a_closed_clickhouse_client_is_unavailable(platform: Platform) -> None:
    deliver(platform, recorded(platform))
    platform.clickhouse.close()
    assert platform.reconcile(HOUR).status == "unavailable"
    assert logged(platform, "reconciliation") == []


def delete_blob(path: Path) -> None:
    path.unlink()


def alter_blob(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty_blob(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [delete_blob, alter_blob, empty_blob])
@pytest.mark.parametrize("fast_is_empty", [False, True])
def test_an_object_that_cannot_be_trusted_makes_the_hour_unavailable(
    platform: Platform, harm: Callable[[Path], None], fast_is_empty: bool
) -> None:
    made = recorded(platform)
    deliver(platform, [] if fast_is_empty else made)
    name = path_of(str(logged(platform, "usage_batch")[0].subject_digest))
    path = platform.settings.blobs_dir / name
    kept = path.read_bytes()
    harm(path)
    report = platform.reconcile(HOUR)
    assert report.status == "unavailable"
    assert name in report.error
    assert logged(platform, "reconciliation") == []
    path.write_bytes(kept)
    assert platform.reconcile(HOUR).status == ("discrepant" if fast_is_empty else "reconciled")


def test_what_a_person_reads_of_a_bad_object_is_one_line(platform: Platform) -> None:
    deliver(platform, recorded(platform))
    name = path_of(str(logged(platform, "usage_batch")[0].subject_digest))
    (platform.settings.blobs_dir / name).unlink()
    report = platform.reconcile(HOUR)
    assert "Traceback" not in report.error
    assert "\n" not in report.summary()


def test_two_outages_do_not_reconcile(platform: Platform) -> None:
    recorded(platform)
    name = path_of(str(logged(platform, "usage_batch")[0].subject_digest))
    (platform.settings.blobs_dir / name).unlink()
    with closing(again(platform, "any", dsn=NOWHERE)) as broken:
        report = broken.reconcile(HOUR)
        assert report.status == "unavailable"
        assert logged(broken, "reconciliation") == []


def test_an_outage_after_a_report_leaves_the_report(platform: Platform) -> None:
    deliver(platform, recorded(platform))
    first = platform.reconcile(HOUR)
    with closing(again(platform, "any", dsn=NOWHERE)) as broken:
        assert broken.reconcile(HOUR).status == "unavailable"
        last = broken.hours.last_report(HOUR)
        assert last is not None
        assert (last.revision, last.status, last.dirty) == (1, "reconciled", False)
    assert report_blob(platform) == first.to_bytes()
    assert len(fast_ids(platform)) == 60
