"""Rows of ClickHouse whose texts no event can hold: no UTF-8, or NUL. Told for what they are, and gone by a repair."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from render_platform.clock import HOUR_US
from render_platform.errors import Unavailable
from render_platform.events import UsageEvent
from render_platform.pipeline import Platform
from render_platform.reconciliation import HourReport
from tests import chdb_server
from tests.chdb_server import open_raw
from tests.factories import make_events
from tests.stories import HOUR, deliver, open_story, record, rollup_total
from tests.test_clickhouse import engine  # noqa: F401  fixture
from tests.test_repair_rebuild import CLOSED

STRANGE = {"ff41": "invalid FF41", "c3": "invalid C3", "610062": "invalid 610062", "eda080": "invalid EDA080"}
"""Bytes, and how they are told: no UTF-8, a character cut off, NUL, a lone surrogate."""
STRANGER = uuid.UUID("01890000-0000-7000-8000-000000000001")


@pytest.fixture(params=chdb_server.IMPLEMENTATIONS)
def platform(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Platform]:
    dsn, name = chdb_server.dsn_of(request.param), chdb_server.fresh_database()
    with closing(open_story(tmp_path / "state", name, dsn=dsn, now_us=CLOSED)) as opened:
        yield opened


def recorded(platform: Platform) -> list[UsageEvent]:
    made = record(platform, make_events(20, 1))
    platform.flush()
    deliver(platform, made)
    return made


def run(platform: Platform, statement: str) -> None:
    settings = platform.settings
    with closing(open_raw(settings.clickhouse_url, settings.clickhouse_database)) as client:
        client.command(statement)


def add(platform: Platform, made: list[UsageEvent], column: str, data: str, event_id: uuid.UUID = STRANGER) -> None:
    """A row like the first event's, under another id, with these bytes in one column."""
    row = f"(SELECT * FROM usage_events WHERE event_id = toUUID('{made[0].event_id}') LIMIT 1)"
    other = f"toUUID('{event_id}') AS event_id, unhex('{data}') AS {column}"
    run(platform, f"INSERT INTO usage_events SELECT * REPLACE ({other}) FROM {row}")


def told(report: HourReport) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(one.figures.key[1], one.figures.key[2], one.diff.unexpected) for one in report.findings]


@pytest.mark.parametrize("column", ["customer_ref", "model_name"])
@pytest.mark.parametrize("data", STRANGE)
def test_a_row_with_such_a_key_is_unexpected_and_a_rebuild_takes_it_away(
    platform: Platform, column: str, data: str
) -> None:
    made = recorded(platform)
    before = rollup_total(platform)
    add(platform, made, column, data)
    report = platform.reconcile(HOUR)
    assert (report.status, report.error) == ("discrepant", "")
    key = {"customer_ref": made[0].customer_ref, "model_name": made[0].model_name, column: STRANGE[data]}
    assert told(report) == [(key["customer_ref"], key["model_name"], (str(STRANGER),))]
    assert platform.reconciler.plan(HOUR).way == "rebuild"
    assert platform.repair(HOUR).after.status == "reconciled"
    assert (platform.clickhouse.totals().events, rollup_total(platform)) == (len(made), before)


def test_two_such_keys_are_two(platform: Platform) -> None:
    made = recorded(platform)
    for number, data in enumerate(("fe", "ff")):
        add(platform, made, "model_name", data, uuid.UUID(int=STRANGER.int + number))
    assert [name for _, name, _ in told(platform.reconcile(HOUR))] == ["invalid FE", "invalid FF"]


def test_such_a_text_in_another_column_is_an_altered_row(platform: Platform) -> None:
    made = recorded(platform)
    bad = f"device_uuid = unhex('ff') WHERE event_id = toUUID('{made[3].event_id}') SETTINGS mutations_sync = 2"
    run(platform, f"ALTER TABLE usage_events UPDATE {bad}")
    report = platform.reconcile(HOUR)
    assert (report.status, report.count("altered")) == ("discrepant", 1)
    assert platform.repair(HOUR).after.status == "reconciled"


def test_figures_for_people_stay_readable(platform: Platform) -> None:
    made = recorded(platform)
    add(platform, made, "device_uuid", "ff")
    add(platform, made, "model_name", "ff")
    fast = platform.clickhouse
    assert "invalid FF" in {row.device_uuid for row in fast.device_hours(HOUR, HOUR + HOUR_US)}
    for rows in (fast.latency_quantiles, fast.customer_usage, fast.queue_health):
        assert "invalid FF" in {row.model_name for row in rows(HOUR, HOUR + HOUR_US)}
    assert "invalid FF" in fast.rows(HOUR, HOUR + HOUR_US).column("model_name").to_pylist()


def test_an_engine_that_fails_is_still_unavailable(platform: Platform) -> None:
    recorded(platform)
    run(platform, "DROP TABLE usage_events")
    with pytest.raises(Unavailable):
        platform.clickhouse.rows(HOUR, HOUR + HOUR_US)
