"""The restore drill: SQL and ClickHouse are rebuilt from log and CAS alone, and compared with the live ones."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from render_platform.audit_log import create_head
from render_platform.charges.spend import budgets
from render_platform.clickhouse import ClickHouse, open_clickhouse
from render_platform.clock import HOUR_US, ManualClock, iso
from render_platform.database import customers, gateways, metadata, runs
from render_platform.entries import FIRST_PREVIOUS, AuditEntry
from render_platform.errors import Finding, Missing, UsageError
from render_platform.events import UsageEvent, table_from_events
from render_platform.evidence import Evidence
from render_platform.fast_path import batch_token
from render_platform.gateway import identity
from render_platform.gateway.ingest import ingested
from render_platform.gateway.leases import takeovers
from render_platform.operations.alerts import alerts_sent
from render_platform.outbox import forget_customer
from render_platform.pipeline import Platform
from render_platform.recovery import (
    LOST_EPOCHS,
    Figures,
    Recovered,
    Recovery,
    differences,
    read_figures,
    restore_drill,
)
from tests import chdb_server
from tests.factories import START_US, make_events
from tests.platforms import LIVE, connect, empty_copy, files_with, make_platform, record, record_random
from tests.test_recovery import accept, backup, dump, open_state, recover, recovery, restore, whole

DOCS = Path(__file__).parents[1] / "docs" / "restore.md"
NEXT_US = START_US + HOUR_US


def open_live(state: Path, us: int = START_US) -> Platform:
    name = state.with_suffix(".database")
    if not name.exists():
        name.write_text(chdb_server.fresh_database())
    options = {"clickhouse_dsn": chdb_server.shared_dsn(), "clickhouse_database": name.read_text()}
    return make_platform(state, ManualClock(us), f"{us}", batch_rows=5, **options)


def send(platform: Platform, events: list[UsageEvent]) -> None:
    table = table_from_events(sorted(events, key=lambda event: event.event_id))
    platform.clickhouse.insert_events(table, batch_token(table))


def evidence_of(platform: Platform) -> Evidence:
    keys = [platform.log_signer.verifier], [platform.attestation_signer.verifier]
    return Evidence(platform.log_objects, platform.blobs, *keys)


def live_figures(platform: Platform) -> Figures:
    checkpoint = platform.log.published()
    assert checkpoint is not None
    return read_figures(platform.database, platform.clickhouse, checkpoint.size, lambda *_: None, frozenset())


NOTHING = Figures(1, {}, {}, {}, {}, frozenset())


def open_empty() -> ClickHouse:
    return open_clickhouse(chdb_server.shared_dsn(), chdb_server.fresh_database())


def drill(platform: Platform, target: Path) -> tuple[Recovered, Figures, list[Any]]:
    """Closes what the live platform holds before it begins, as a process must that has one chdb folder."""
    live = live_figures(platform)
    evidence = evidence_of(platform)
    platform.close()
    seen: list[tuple[str, int, int]] = []
    done, rebuilt = restore_drill(evidence, target, open_empty, live, lambda *one: seen.append(one))
    assert {stage for stage, _, _ in seen} == {"log", "recover", "clickhouse", "compare"}
    assert all(0 <= step <= total for _, step, total in seen)
    return done, rebuilt, differences(live, rebuilt)


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    """Two hours of events, one of them lost on the fast path, reported, repaired, reported again; two events wait."""
    with closing(open_live(tmp_path / "state")) as first:
        events = record_random(first, 12, 1)
        send(first, events[1:])
    with closing(open_live(tmp_path / "state", NEXT_US + 600_000_000)) as made:
        more = record_random(made, 3, 2, start_us=NEXT_US, span_us=1_000_000)
        send(made, more)
        made.flush()
        assert made.reconcile(START_US).status == "discrepant"
        assert made.repair(START_US).inserted == 1
        send(made, record_random(made, 2, 3, start_us=NEXT_US + 600_000_000, span_us=1_000))
        yield made


def test_what_is_rebuilt_is_equal(platform: Platform, tmp_path: Path) -> None:
    done, rebuilt, found = drill(platform, tmp_path / "drill")
    assert found == []
    assert done.events_restored == 15
    assert sum(events for events, _ in rebuilt.sql.values()) == 15
    assert {at: events for at, (events, _) in rebuilt.clickhouse.items()} == {
        iso(START_US): 12,
        iso(NEXT_US): 3,
        "elsewhere": 0,
    }
    assert sorted(path.name.partition("-")[0] for path in (tmp_path / "drill").iterdir()) == ["platform.db"]
    assert dump(tmp_path / "drill", ["reports", "repairs", "log_entries", "batches"]) == dump(
        tmp_path / "state", ["reports", "repairs", "log_entries", "batches"]
    )


def test_events_that_wait_are_counted_and_are_no_difference(platform: Platform, tmp_path: Path) -> None:
    live = live_figures(platform)
    assert live.waiting == {iso(NEXT_US): 2}
    assert live.clickhouse[iso(NEXT_US)][0] == 3
    _, rebuilt, found = drill(platform, tmp_path / "drill")
    assert (rebuilt.waiting, found) == ({}, [])


def test_a_log_that_has_grown_meanwhile_is_compared_as_it_was(platform: Platform, tmp_path: Path) -> None:
    live = live_figures(platform)
    platform.flush()
    _, rebuilt = restore_drill(evidence_of(platform), tmp_path / "drill", open_empty, live, lambda *_: None)
    assert rebuilt.waiting == live.waiting
    assert differences(live, rebuilt) == []


def alter_sql(statement: str) -> Callable[[Platform], None]:
    def alter(platform: Platform) -> None:
        with closing(connect(platform.settings.state_dir)) as connection:
            assert connection.execute(statement).rowcount == 1
            connection.commit()

    return alter


def one_more_row(us: int) -> Callable[[Platform], None]:
    return lambda platform: send(platform, make_events(1, us, us, 1))


ONE_ROW = "WHERE event_id = (SELECT event_id FROM usage_events WHERE batch_id IS NOT NULL ORDER BY event_id LIMIT 1)"


def test_what_differs_is_named(platform: Platform, tmp_path: Path) -> None:
    """One alteration of the live state after the other; what was altered before stays named, and nothing else is."""
    live = live_figures(platform)
    _, rebuilt = restore_drill(evidence_of(platform), tmp_path / "drill", open_empty, live, lambda *_: None)
    named: set[tuple[str, str]] = set()
    first, second = iso(START_US), iso(NEXT_US)
    for alter, store, where in (
        (alter_sql("UPDATE batches SET state = 'logged' WHERE batch_seq = 0 AND records = 3"), "sql", second),
        (alter_sql(f"UPDATE usage_events SET gpu_time_ns = gpu_time_ns + 1 {ONE_ROW}"), "sql", first),
        (one_more_row(START_US - 50 * HOUR_US), "clickhouse", "elsewhere"),
        (one_more_row(NEXT_US), "clickhouse", second),
    ):
        alter(platform)
        named.add((store, where))
        found = differences(live_figures(platform), rebuilt)
        assert {one[:2] for one in found} == named
        assert len(found) == len(named)
        assert all(one[2] != one[3] for one in found)


@pytest.mark.parametrize("change", ["UPDATE usage_events SET batch_id = NULL", "DELETE FROM usage_events"])
def test_a_row_that_is_gone_or_waits_again_is_a_difference(platform: Platform, tmp_path: Path, change: str) -> None:
    """One that lost its mark waits as if it had never been logged: the next flush would bill it again."""
    alter_sql(f"{change} {ONE_ROW}")(platform)
    _, _, found = drill(platform, tmp_path / "drill")
    assert ("sql", iso(START_US)) in {one[:2] for one in found}


def test_a_folder_that_is_there_is_left_alone(platform: Platform, tmp_path: Path) -> None:
    state = platform.settings.state_dir
    before = dump(state)
    with pytest.raises(UsageError, match="cannot be made"):
        restore_drill(evidence_of(platform), state, open_empty, NOTHING, lambda *_: None)
    assert dump(state) == before


def test_evidence_that_does_not_hold_gives_no_state(platform: Platform, tmp_path: Path) -> None:
    evidence = evidence_of(platform)
    batch = next(entry for entry in dump(platform.settings.state_dir, ["batches"])["batches"] if entry[12])
    path = platform.settings.blobs_dir / "sha256" / batch[12][:2] / batch[12][2:]
    data = path.read_bytes()
    path.write_bytes(data[:-9] + bytes(9))
    with pytest.raises(Finding):
        restore_drill(evidence, tmp_path / "one", open_empty, NOTHING, lambda *_: None)
    path.unlink()
    with pytest.raises(Missing):
        restore_drill(evidence, tmp_path / "two", open_empty, NOTHING, lambda *_: None)
    shutil.rmtree(platform.settings.log_dir)
    with pytest.raises(Missing):
        restore_drill(evidence, tmp_path / "three", open_empty, NOTHING, lambda *_: None)


def test_the_rebuilt_database_is_a_platforms(platform: Platform, tmp_path: Path) -> None:
    """With keys, log and blobs from their copies it goes on: what the documentation tells people to do."""
    state, target = platform.settings.state_dir, tmp_path / "drill"
    platform.flush()
    drill(platform, target)
    for name in ("keys", "log", "blobs"):
        shutil.copytree(state / name, target / name)
    with closing(open_live(target, NEXT_US + 2 * HOUR_US)) as restored:
        record_random(restored, 4, 9, start_us=NEXT_US + HOUR_US)
        assert restored.flush().logged > 0
        outcome = restored.verify(deep=True)
        assert outcome.verified, outcome.problems
        assert outcome.records == 12 + 3 + 2 + 4


def test_reports_that_a_late_batch_outdated_are_due_again(platform: Platform, tmp_path: Path) -> None:
    state = platform.settings.state_dir
    record_random(platform, 1, 5, lane="trace/1", span_us=1)
    with platform.database.write() as connection:
        platform.outbox.finish_lane(connection, "trace/1", NEXT_US)
    platform.flush()
    with closing(empty_copy(state, "copy.db")) as empty:
        create_head(empty)
        Recovery(empty, platform.cas, platform.log_objects, [platform.log_signer.verifier]).run()
    due = platform.hours.due()
    platform.close()
    restore(state)
    with closing(open_live(state, NEXT_US + 600_000_000)) as restored:
        assert restored.hours.due() == due == [START_US]
        last = restored.hours.last_report(START_US)
        assert last is not None
        assert (last.revision, last.dirty) == (2, True)


def test_a_run_goes_on_after_what_the_log_has_of_it(tmp_path: Path) -> None:
    state = tmp_path / "state"
    row = {"run_id": "1", "trace_digest": "d", "trace_path": "p", "lane": "trace/1", "state": "replaying"}
    with closing(open_live(state)) as platform:
        first = record_random(platform, 2, 1, lane="trace/1")
        with platform.database.write() as connection:
            connection.execute(runs.insert().values(**row, next_row=2))
            connection.execute(runs.insert().values(**{**row, "run_id": "2", "lane": "trace/2"}, next_row=4))
        backup(state)
        record_random(platform, 5, 2, lane="trace/1", start_us=first[-1].recorded_at, span_us=1_000)
        platform.flush()
    restore(state)
    recover(state)
    with closing(connect(state)) as connection:
        assert connection.execute("SELECT next_row FROM runs ORDER BY run_id").fetchall() == [(7,), (4,)]


def test_a_customer_whom_the_log_says_erased_is_not_brought_back(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with closing(open_live(state)) as platform:
        with platform.database.write() as connection:
            kept, erased = (platform.outbox.customer_ref(connection, "key", name) for name in ("kept", "gone"))
            salt = connection.execute(sa.select(customers.c.salt).filter_by(customer_ref=erased)).scalar_one()
        record_random(platform, 3, 1)
        backup(state)
        draft = AuditEntry(type="erasure", batch_id=erased, previous=FIRST_PREVIOUS)
        platform.log.append(draft, lambda connection, _: forget_customer(connection, "key", "gone", erased))
        platform.flush()
    restore(state)
    (state / "copy.db").unlink()
    assert recover(state).customers_erased == 1
    with closing(open_live(state)) as platform:
        assert platform.outbox.names() == {kept: "key/kept"}
    assert files_with(state, salt) == []


def test_gateways_count_on_from_what_the_log_says(tmp_path: Path) -> None:
    """Two of three jobs had ended when it was published; the backup knows the first epoch only."""
    state, events = tmp_path / "state", make_events(4, 1)
    with closing(open_live(state)) as live:
        with live.database.write() as connection:
            connection.execute(gateways.insert().values(gateway_id="gw", epoch=1, lease_until_us=0))
        accept(live, events[:1], "success", 1)
        record(live, LIVE, events[:1])
        live.flush()
        backup(state)
        with live.database.write() as connection:
            connection.execute(gateways.update().values(epoch=2))
        accept(live, events[1:], "running", 1, epoch=2)
        record(live, LIVE, [replace(event, recorded_at=START_US + HOUR_US - 1) for event in events[1:3]])
        live.flush()
    said = acceptances_of(state)
    assert said == [("gw", 1, 1, 1, 0), ("gw", 2, 2, 3, 1)]
    restore(state)
    with closing(open_live(state)) as restored:
        recovery(restored).run()
    assert acceptances_of(state) == said
    with closing(connect(state)) as connection:
        assert connection.execute("SELECT epoch FROM gateways").fetchall() == [(2 + LOST_EPOCHS,)]


def acceptances_of(state: Path) -> list[tuple[object, ...]]:
    with closing(connect(state)) as connection:
        query = "SELECT gateway_id, epoch, sealed, through, open FROM acceptances ORDER BY gateway_id, epoch"
        return [tuple(row) for row in connection.execute(query).fetchall()]


def test_the_documentation_names_every_table_and_every_figure() -> None:
    text = DOCS.read_text()
    rows = re.findall(r"^\| ((?:`[a-z_]+`(?:, )?)+) \|", text, re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([a-z_]+)`", row)]
    assert {table.metadata for table in (identity.api_keys, ingested, takeovers, budgets, alerts_sent)} == {
        metadata
    }  # whatever is imported
    assert sorted(named) == sorted(metadata.tables)
    example = json.loads(text.split("```json\n", 1)[1].split("```", 1)[0])
    assert list(example) == [field.name for field in fields(Recovered)] == list(asdict(Recovered(0, 0)))


@pytest.mark.parametrize("lane", [LIVE, "trace/1"])
def test_a_lane_that_a_new_database_began_anew_declares_the_hours_of_the_log(tmp_path: Path, lane: str) -> None:
    """The log has a batch of an hour that it has not declared; the database is lost, and records before it is
    recovered. Found by the simulation: that hour was never declared."""
    state = tmp_path / "state"
    with closing(open_state(state, "first", START_US)) as platform:
        recorded = record_random(platform, 4, 1, lane, span_us=HOUR_US // 2)
        platform.flush()
    for path in state.glob("platform.db*"):
        path.unlink()
    with closing(open_state(state, "second", NEXT_US)) as platform:
        recorded += record_random(platform, 3, 2, lane, NEXT_US, HOUR_US // 2)
    recover(state)
    whole(state, recorded)
