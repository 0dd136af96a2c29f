"""docs/upgrade.md, store by store: what another version finds, and the way back. The parts' stop and start again:
tests/test_deploy_commands.py."""

from __future__ import annotations

import json
import random
from contextlib import closing
from pathlib import Path

import pytest

from render_platform.canonical import encode
from render_platform.clickhouse import open_clickhouse
from render_platform.clock import HOUR_US, US_PER_SECOND, ManualClock
from render_platform.database import metadata
from render_platform.entries import parse
from render_platform.errors import Finding
from render_platform.events import table_from_events
from tests import chdb_server
from tests.commands import CHECKOUT, run_inside
from tests.factories import START_US
from tests.platforms import connect, make_platform, record
from tests.test_dagster_layer import LANE, sound_events

EVENTS = 20
NEWEST = ("alerts_sent", "pruned_events", "budgets")
"""Tables that came late: an older version's database lacks them."""


@pytest.fixture
def env(tmp_path: Path, rng: random.Random) -> dict[str, str]:
    """The variables of a state with an hour that is flushed, delivered and reconciled."""
    dsn, database = chdb_server.shared_dsn(), chdb_server.fresh_database()
    options = {"clickhouse_dsn": dsn, "clickhouse_database": database}
    with closing(make_platform(tmp_path / "state", ManualClock(START_US + 2 * HOUR_US), **options)) as platform:
        recorded = record(platform, LANE, sound_events(rng, EVENTS))
        platform.clickhouse.insert_events(table_from_events(recorded), "first")
        with platform.database.write() as connection:
            platform.outbox.finish_lane(connection, LANE, START_US + HOUR_US + 60 * US_PER_SECOND)
        platform.flush()
        assert platform.reconcile(START_US).status == "reconciled"
    return {
        "RENDER_PLATFORM_STATE_DIR": str(tmp_path / "state"),
        "RENDER_PLATFORM_CLICKHOUSE_DSN": dsn,
        "RENDER_PLATFORM_CLICKHOUSE_DATABASE": database,
    }


def tables(state: Path) -> set[str]:
    with closing(connect(state)) as connection:
        return {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def test_a_database_gets_the_tables_that_it_lacks_and_keeps_those_of_a_later_version(
    env: dict[str, str], tmp_path: Path
) -> None:
    with closing(connect(tmp_path / "state")) as connection:
        for name in NEWEST:
            connection.execute(f"DROP TABLE {name}")
        connection.execute("CREATE TABLE of_a_later_version (x)")
        connection.execute("INSERT INTO of_a_later_version VALUES (7)")
        connection.commit()
    for command in ("flush", "verify"):
        outcome = run_inside(command, env=env)
        assert outcome.code == 0, outcome.said
    assert tables(tmp_path / "state") >= {*metadata.tables, "of_a_later_version"}
    with closing(connect(tmp_path / "state")) as connection:
        assert connection.execute("SELECT x FROM of_a_later_version").fetchall() == [(7,)]


def test_an_older_version_goes_on_with_another_clickhouse_database(env: dict[str, str]) -> None:
    """Where a later version has migrated: it is refused, and what the page says fills another one."""
    dsn, database = env["RENDER_PLATFORM_CLICKHOUSE_DSN"], env["RENDER_PLATFORM_CLICKHOUSE_DATABASE"]
    with closing(chdb_server.open_raw(dsn, database)) as client:
        client.command("INSERT INTO schema_migrations VALUES (99, 'later')")
    page = (CHECKOUT / "docs/upgrade.md").read_text()
    assert "migration … is not known here" in page
    assert "RENDER_PLATFORM_CLICKHOUSE_DATABASE" in page
    for command in ("migrate", "repair"):
        outcome = run_inside(command, env=env)
        assert outcome.code == 3
        assert "migration 99 is not known here" in outcome.said
    back = {**env, "RENDER_PLATFORM_CLICKHOUSE_DATABASE": chdb_server.fresh_database()}
    for command in ("migrate", "repair"):
        outcome = run_inside(command, env=back)
        assert outcome.code == 0, outcome.said
    with closing(open_clickhouse(dsn, back["RENDER_PLATFORM_CLICKHOUSE_DATABASE"], 0)) as fast:
        assert fast.totals()[0] == EVENTS
        assert fast.duplicates() == 0


def test_an_entry_of_a_later_format_asks_for_a_newer_release(env: dict[str, str], tmp_path: Path) -> None:
    with closing(connect(tmp_path / "state")) as connection:
        [(data,)] = connection.execute("SELECT entry FROM log_entries WHERE log_index = 0").fetchall()
    fields = json.loads(bytes(data))
    assert parse(bytes(data)).version == fields["version"]
    page = (CHECKOUT / "docs/upgrade.md").read_text()
    with pytest.raises(Finding, match="use a newer release to read this log"):
        parse(encode({**fields, "version": fields["version"] + 1}))
    assert "use a newer release to read this log" in page
