"""`render-platform repair` and `reconcile`, as their users run them: tables, JSON and exit codes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from render_platform.cas import path_of
from render_platform.clock import DAY_US, HOUR_US, iso
from render_platform.events import UsageEvent
from render_platform.pipeline import Platform
from tests import chdb_server
from tests.commands import Outcome, run_inside
from tests.factories import make_events
from tests.stories import DEADLINE_US, HOUR, deliver, finish_lane, logged, open_story, record
from tests.test_clickhouse import engine  # noqa: F401  fixture

DAY = HOUR - HOUR % DAY_US
CLOSED = DAY + DAY_US + DEADLINE_US
NOWHERE = {"RENDER_PLATFORM_CLICKHOUSE_DSN": "http://reader:hunter2secret@127.0.0.1:9"}


@dataclass(frozen=True)
class State:
    """A state folder whose two hours are a trace's: closed by any clock."""

    folder: Path
    env: Mapping[str, str]
    made: list[UsageEvent]

    def run(self, *words: str, env: Mapping[str, str] | None = None) -> Outcome:
        return run_inside(*words, "--state", self.folder, env={**self.env, **(env or {})})

    def open(self) -> Platform:
        return open_story(self.folder, self.env["RENDER_PLATFORM_CLICKHOUSE_DATABASE"], now_us=CLOSED, seed=9)


@pytest.fixture
def state(tmp_path: Path) -> State:
    name = chdb_server.fresh_database()
    with closing(open_story(tmp_path / "state", name, now_us=CLOSED)) as platform:
        made = record(platform, make_events(40, 1, HOUR, 2 * HOUR_US), "trace/1")
        finish_lane(platform, "trace/1", HOUR + 2 * HOUR_US)
        platform.flush()
    env = {"RENDER_PLATFORM_CLICKHOUSE_DSN": chdb_server.shared_dsn(), "RENDER_PLATFORM_CLICKHOUSE_DATABASE": name}
    return State(tmp_path / "state", env, made)


def give(state: State, *, lost: int = 0, twice: int = 0, elsewhere: int = 0) -> None:
    """What ClickHouse holds: all but the first `lost`, the last `twice` again, rows of an hour that nobody covers."""
    with closing(state.open()) as platform:
        made = sorted(state.made, key=lambda event: event.recorded_at)
        deliver(platform, made[lost:])
        deliver(platform, made[len(made) - twice :] if twice else [], "again")
        deliver(platform, make_events(elsewhere, 5, DAY + 2 * DAY_US), "elsewhere")


def test_what_is_missing_is_planned_inserted_and_then_gone(state: State) -> None:
    give(state, lost=3)
    planned = state.run("repair", "--plan", "--json")
    assert planned.code == 1
    [row] = planned.json
    assert row == {
        "hour": iso(HOUR),
        "way": "insert",
        "events": 3,
        "before": "discrepant",
        "unfinished": "",
        "why": "",
    }
    told = state.run("repair", "--plan")
    assert (told.code, "insert" in told.stdout, "2 hours looked at, 1 to repair" in told.stdout) == (1, True, True)
    done = state.run("repair", "--json")
    assert done.code == 0, done.said
    [row] = done.json
    assert (row["way"], row["events"], row["before"], row["after"]) == ("insert", 3, "discrepant", "reconciled")
    again = state.run("repair", "--plan", "--json")
    assert (again.code, again.json) == (0, [])
    nothing = state.run("repair")
    assert (nothing.code, nothing.stdout.strip()) == (0, "2 hours looked at, 0 repaired")
    assert state.run("reconcile").code == 0


def test_a_plan_leaves_everything_as_it_is(state: State) -> None:
    give(state, lost=3, twice=2)
    for _ in range(2):
        planned = state.run("repair", "--plan", "--json")
        assert (planned.code, [row["way"] for row in planned.json]) == (1, ["insert", "rebuild"])
    with closing(state.open()) as platform:
        assert (logged(platform, "repair"), logged(platform, "reconciliation")) == ([], [])
        assert platform.clickhouse.totals().events == 39


def test_a_plan_makes_no_tables_and_a_repair_does(state: State) -> None:
    """Nobody has written to ClickHouse yet: what it lacks is not known to be everything, it is not known."""
    for _ in range(2):
        planned = state.run("repair", "--plan", "--json")
        assert planned.code == 3, planned.said
        assert all("run `render-platform migrate`" in row["why"] for row in planned.json)
    with closing(chdb_server.open_raw(chdb_server.shared_dsn())) as client:
        assert state.env["RENDER_PLATFORM_CLICKHOUSE_DATABASE"] not in client.command("SHOW DATABASES")
    done = state.run("repair", "--json")
    assert (done.code, sum(row["events"] for row in done.json)) == (0, 40), done.said
    assert state.run("repair", "--plan", "--json").json == []


def test_a_day_is_rebuilt_once_for_all_its_hours(state: State) -> None:
    give(state, lost=3, twice=2)
    done = state.run("repair", "--from", iso(HOUR + HOUR_US), "--json")
    assert done.code == 0, done.said
    assert [(row["way"], row["after"]) for row in done.json] == [("rebuild", "reconciled")]
    assert state.run("repair", "--json").json == [], "the missing rows of the other hour came back with it"
    told = state.run("reconcile")
    assert (told.code, told.stdout.count("reconciled")) == (0, 2)


def test_what_is_refused_says_why_and_is_not_good(state: State) -> None:
    give(state, twice=2)
    with closing(state.open()) as platform:
        record(platform, make_events(2, 8, HOUR + 3 * HOUR_US), "trace/open")
        platform.flush()
    done = state.run("repair", "--from", iso(HOUR + HOUR_US), "--to", iso(HOUR + 2 * HOUR_US))
    assert done.code == 3, done.said
    assert "flush" in done.stdout


def test_a_batch_that_is_not_what_the_log_says_is_unavailable(state: State) -> None:
    give(state, lost=3)
    with closing(state.open()) as platform:
        name = path_of(str(logged(platform, "usage_batch")[0].subject_digest))
    (state.folder / "blobs" / name).unlink()
    for words in (("repair",), ("repair", "--plan")):
        found = state.run(*words, "--json")
        assert found.code == 3, found.said
        [row] = found.json
        assert name in row["why"]


def test_without_clickhouse_nothing_is_repaired_and_nothing_is_good(state: State) -> None:
    give(state, lost=3)
    for words in (("repair",), ("repair", "--plan")):
        found = state.run(*words, "--json", env=NOWHERE)
        assert found.code == 3
        assert [row["way"] for row in found.json] == ["nothing", "nothing"]
        assert "hunter2secret" not in found.said


def test_reconcile_names_hours_of_which_only_clickhouse_holds_rows(state: State) -> None:
    give(state, elsewhere=2)
    found = state.run("reconcile", "--json")
    assert found.code == 3
    assert [hour["status"] for hour in found.json] == ["reconciled", "reconciled", "pending"]
    stray = found.json[-1]
    assert stray["hour"] == iso(DAY + 2 * DAY_US)
    assert stray["error"] == "ClickHouse holds rows of this hour, and no lane recorded into it"
    assert "no lane recorded into it" in state.run("reconcile").stdout
    hours = "--from", iso(HOUR), "--to", iso(HOUR + 2 * HOUR_US)
    assert state.run("reconcile", *hours).code == 0, "a range is what was asked for"


def test_an_empty_platform_knows_nothing_where_clickhouse_cannot_be_read(tmp_path: Path) -> None:
    name = chdb_server.fresh_database()
    open_story(tmp_path / "state", name).close()
    empty = State(
        tmp_path / "state",
        {"RENDER_PLATFORM_CLICKHOUSE_DSN": chdb_server.shared_dsn(), "RENDER_PLATFORM_CLICKHOUSE_DATABASE": name},
        [],
    )
    assert (empty.run("reconcile").code, empty.run("repair").code) == (0, 0)
    assert empty.run("reconcile", env=NOWHERE).code == 3
    give(empty, elsewhere=2)
    assert empty.run("reconcile").code == 3


@pytest.mark.parametrize("words", [["--from", "yesterday"], ["--from", iso(HOUR), "--to", iso(HOUR)]])
def test_wrong_ranges_are_wrong_usage(state: State, words: list[str]) -> None:
    assert state.run("repair", *words).code == 2
