"""An event that stands twice in an hour's batches would be billed twice: no hour that holds one is `reconciled`."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from render_platform import batches, clickhouse_slow_path, slow_path
from render_platform.clock import WINDOW_US, iso
from render_platform.entries import FIRST_PREVIOUS, AuditEntry
from render_platform.errors import Finding, Unavailable
from render_platform.events import UsageEvent, table_from_events, total_gpu_time_ns
from render_platform.pipeline import Platform
from tests import chdb_server, checksums, factories
from tests.factories import make_events
from tests.slow_paths import Stored, slow_engine  # noqa: F401  fixture
from tests.stories import HOUR, deliver, open_story, record
from tests.test_clickhouse import engine  # noqa: F401  fixture
from tests.test_slow_path import by_key

MADE = make_events(60, 3)


def like(event: UsageEvent, seed: int, **values: object) -> UsageEvent:
    """Another event under the same id."""
    return factories.make_event(random.Random(seed), event_id=event.event_id, **values)


SAME = MADE[7]
TWICE: dict[str, list[list[UsageEvent]]] = {
    "in one batch": [[*MADE, SAME]],
    "in two batches": [MADE, [SAME]],
    "far apart": [MADE[:20], MADE[20:40], [*MADE[40:], SAME]],
    "with another content": [MADE, [like(SAME, 1, recorded_at=SAME.recorded_at)]],
    "in another window": [
        MADE,
        [like(SAME, 2, recorded_at=HOUR + (SAME.recorded_at - HOUR + WINDOW_US) % (12 * WINDOW_US))],
    ],
    "three times": [MADE, [SAME], [SAME]],
    "in one blob of two batches": [MADE[:7], MADE[8:], [SAME], [SAME]],
}


@pytest.mark.parametrize("case", TWICE)
@pytest.mark.parametrize("at_once", [1_000_000, 61, 8])
def test_an_id_that_stands_twice_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, slow_engine: str, case: str, at_once: int
) -> None:
    for module in (slow_path, clickhouse_slow_path):
        monkeypatch.setattr(module, "IDS_AT_ONCE", at_once)
    with pytest.raises(Finding, match=f"the batches of {iso(HOUR)} hold event {SAME.event_id} twice"):
        Stored(*map(table_from_events, TWICE[case]), engine=slow_engine).aggregates()


def with_ids(made: list[UsageEvent], ids: list[int]) -> pa.Table:
    table = table_from_events(made)
    column = pa.array([uuid.UUID(int=one).bytes for one in ids], pa.binary(16))
    return table.set_column(0, table.schema.field(0), pa.ExtensionArray.from_storage(pa.uuid(), column))


@pytest.mark.parametrize("at_once", [1_000_000, 8])
def test_ids_that_are_alike_in_half_are_two(monkeypatch: pytest.MonkeyPatch, slow_engine: str, at_once: int) -> None:
    for module in (slow_path, clickhouse_slow_path):
        monkeypatch.setattr(module, "IDS_AT_ONCE", at_once)
    low = [event.event_id.int % 2**64 for event in MADE]
    other = [(event.event_id.int + 2**64) for event in MADE]
    assert [one % 2**64 for one in other] == low
    table = with_ids(MADE, sorted(other))
    stored = Stored(table_from_events(MADE), table, engine=slow_engine)
    both = pa.concat_tables([table_from_events(MADE), table])
    assert by_key(stored.aggregates()) == checksums.sums_of_table(both)
    same_high = with_ids(MADE, [MADE[0].event_id.int ^ number for number in range(len(MADE))])
    assert by_key(Stored(same_high, engine=slow_engine).aggregates()) == checksums.sums_of_table(same_high)


def test_a_batch_of_which_only_the_footer_can_be_read_is_a_finding(slow_engine: str) -> None:
    stored = Stored(table_from_events(MADE), engine=slow_engine)
    whole = stored.objects.read(stored.path(0))
    digest = stored.cas.put(whole[:4] + bytes(196) + whole[200:])
    stored.entries[0] = replace(stored.entries[0], subject_digest=digest)
    with pytest.raises(Finding, match="not readable as Parquet"):
        stored.aggregates()


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    with closing(open_story(tmp_path / "state", chdb_server.fresh_database())) as opened:
        yield opened


def log_again(platform: Platform, made: list[UsageEvent]) -> None:
    """A batch that the log took although its events stand in another one."""
    table = table_from_events(sorted(made, key=lambda event: event.event_id))
    data = batches.encode(table)
    entry = AuditEntry(
        type="usage_batch",
        batch_id=f"{iso(HOUR)[:13]}-00099",
        previous=FIRST_PREVIOUS,
        lane="live",
        recorded_hour=HOUR,
        batch_seq=99,
        subject_digest=platform.cas.put(data),
        subject_size=len(data),
        records=table.num_rows,
        gpu_time_ns=total_gpu_time_ns(table),
    )
    platform.log.append(entry, lambda _connection, _index: None)
    platform.log.publish()


def test_a_double_bill_on_both_paths_is_never_reconciled(platform: Platform) -> None:
    made = record(platform, make_events(30, 1))
    platform.flush()
    deliver(platform, made)
    assert platform.reconcile(HOUR).status == "reconciled"
    log_again(platform, made[:2])
    deliver(platform, made[:2], "again")
    report = platform.reconcile(HOUR)
    assert report.status == "unavailable"
    assert "twice (run `render-platform verify --deep`)" in report.error
    assert platform.reconciler.plan(HOUR).refused == report.error
    with pytest.raises(Unavailable, match="twice"):
        platform.repair(HOUR)
    assert platform.clickhouse.totals().events == 32, "nothing was taken away"
