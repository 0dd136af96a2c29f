"""Dagster's own storage on PostgreSQL, by `database_url` alone: what is kept where, by whom, and what stays bounded.

The suites of the Dagster layer run on it too: `make test-postgres`.
"""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import dagster as dg
import pytest
import sqlalchemy as sa
from alembic.script import ScriptDirectory
from dagster._core.storage.runs import SqliteRunStorage
from dagster_postgres import PostgresRunStorage
from dagster_postgres.run_storage import run_storage
from dagster_postgres.utils import pg_alembic_config

import render_platform_dagster
from definitions import defs
from render_platform.clock import US_PER_SECOND, SystemClock
from render_platform.config import load_settings
from render_platform.database import open_database
from render_platform.errors import Unavailable, UsageError
from render_platform.operations.doctor import Diagnosis, Doctor
from render_platform.pipeline import open_platform
from resources.local import DAGSTER_YAML, LOCAL_TAG, UP, LocalDagster
from tests import postgres
from tests.commands import CHECKOUT, clean_environment, own_clickhouse, restored_process, run_inside
from tests.homes import open_instance
from tests.platforms import LIVE, SeededIds, record
from tests.test_dagster_kills import running_daemon
from tests.test_dagster_layer import sound_events
from tests.test_dagster_orphans import ORIGIN, statuses
from tests.test_dagster_ticks import wait_until

PASSWORD = "not-to-be-shown"
DATABASE = "RENDER_PLATFORM_DATABASE_URL"


@pytest.fixture
def url() -> str:
    """A new database. The server asks for no password: the one in the URL is there to be looked for."""
    postgres.programs()
    return postgres.make_database(f"t_{uuid.uuid4().hex}").replace("//ci@", f"//ci:{PASSWORD}@")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    made = tmp_path / "state/dagster"
    made.mkdir(parents=True)
    (made / "dagster.yaml").write_text(DAGSTER_YAML)
    return made


@pytest.fixture
def instance(url: str, home: Path) -> Iterator[dg.DagsterInstance]:
    with open_instance(home, **{DATABASE: url}) as opened:
        yield opened


def tables(url: str) -> dict[str, set[str]]:
    """By schema."""
    with closing(open_database(url)) as database, database.read() as connection:
        found = sa.inspect(connection)
        return {schema: set(found.get_table_names(schema)) for schema in found.get_schema_names()}


def ask(url: str, statement: str) -> list[tuple[object, ...]]:
    with closing(open_database(url)) as database, database.read() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(statement)]


def change(url: str, statement: str) -> None:
    with closing(open_database(url)) as database, database.write() as connection:
        connection.exec_driver_sql(statement)


def told(url: str, home: Path) -> dict[str, str]:
    """The environment of Dagster's programs."""
    return clean_environment(
        {"DAGSTER_HOME": str(home), "RENDER_PLATFORM_STATE_DIR": str(home.parent), DATABASE: url, **own_clickhouse()}
    )


# What is kept where.


def test_the_main_job_leaves_nothing_in_sqlite_and_the_password_nowhere(url: str, tmp_path: Path) -> None:
    state = tmp_path / "state"
    done = run_inside("demo", "--state", state, env={DATABASE: url, **own_clickhouse()})
    assert done.code == 0, done.said
    assert not list(state.rglob("*.db*"))
    with open_instance(state / "dagster", **{DATABASE: url}) as instance:
        runs = instance.get_runs()
        assert {run.status for run in runs} == {dg.DagsterRunStatus.SUCCESS}
        assert {"flush", "reconcile", "repair"} <= {run.job_name for run in runs}
        assert instance.get_latest_materialization_event(dg.AssetKey("audit_log")) is not None
        assert PASSWORD not in repr(instance.get_ref().to_dict()) + instance.info_str()
        events = [str(entry) for run in runs for entry in instance.all_logs(run.run_id)]
    assert PASSWORD not in done.said + "".join(events)
    assert [path for path in state.rglob("*") if path.is_file() and PASSWORD.encode() in path.read_bytes()] == []


def test_both_have_tables_of_the_same_names_each_its_own(url: str, instance: dg.DagsterInstance) -> None:
    found = tables(url)
    assert {"runs", "jobs"} <= found["public"] & found["dagster"], "else one schema would do"
    assert {"event_logs", "instigators", "alembic_version"} <= found["dagster"] - found["public"]
    assert ask(url, "SELECT count(*) FROM public.runs") == [(0,)]
    instance.create_run_for_job(defs.resolve_job_def("flush"))
    assert ask(url, "SELECT count(*) FROM dagster.runs") == [(1,)]
    assert ask(url, "SELECT count(*) FROM public.runs") == [(0,)]


def test_one_file_fits_both_and_the_setting_chooses(url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_instance(home) as kept_here:
        assert isinstance(kept_here.run_storage, SqliteRunStorage)
    assert (home / "history/runs.db").exists()
    config = home.parent / "render-platform.toml"
    config.write_text(f'database_url = "{url}"\n')
    with open_instance(home, RENDER_PLATFORM_CONFIG=str(config)) as kept_there:
        assert isinstance(kept_there.run_storage, PostgresRunStorage)
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    with pytest.raises(UsageError, match="DAGSTER_HOME is not set"):
        dg.DagsterInstance.from_config(str(home))


def test_times_are_those_of_utc_whatever_the_servers_zone_is(url: str, home: Path) -> None:
    change(url, f"ALTER DATABASE {sa.make_url(url).database} SET timezone = 'Asia/Tokyo'")
    with open_instance(home, **{DATABASE: url}) as instance:
        run = instance.create_run_for_job(defs.resolve_job_def("flush"))
        [kept] = instance.get_run_records(dg.RunsFilter(run_ids=[run.run_id]))
    assert abs(kept.create_timestamp.timestamp() - SystemClock().now_us() / US_PER_SECOND) < 600
    assert abs(kept.update_timestamp.timestamp() - SystemClock().now_us() / US_PER_SECOND) < 600


@pytest.mark.parametrize(
    "given",
    ["postgresql://u:p%40ss@h:7/n", "postgresql://u:p%40ss@h:7/n?sslmode=require&options=-c%20statement_timeout%3D9s"],
)
def test_the_url_stays_as_it_is_but_for_the_schema(given: str) -> None:
    made, before = sa.make_url(render_platform_dagster.own_url(given)), sa.make_url(given)
    assert made.set(query={}, drivername="postgresql") == before.set(query={})
    assert made.password == "p@ss"
    assert str(made.query["options"]).endswith("-c search_path=dagster -c timezone=UTC")
    assert str(made.query["options"]).startswith(str(before.query.get("options", "")))
    assert made.query.get("sslmode") == before.query.get("sslmode")


def test_a_server_that_is_gone_is_named_and_the_password_is_not() -> None:
    with pytest.raises(Unavailable, match=r"Dagster's storage cannot be used.*refused") as raised:
        render_platform_dagster.open_postgres(f"postgresql://ci:{PASSWORD}@127.0.0.1:9/x")
    with pytest.raises(UsageError, match="database_url is malformed") as malformed:
        render_platform_dagster.open_postgres(f"postgresql://ci:{PASSWORD}@h:port/x")
    assert PASSWORD not in f"{raised.value} {malformed.value}"


def test_who_may_not_make_schemas_is_told_which_one_and_uses_one_that_is_there(url: str) -> None:
    role = f"r_{uuid.uuid4().hex}"
    change(url, f"CREATE ROLE {role} LOGIN")
    theirs = url.replace("//ci:", f"//{role}:")
    with pytest.raises(Unavailable, match="permission denied") as raised:
        render_platform_dagster.open_postgres(theirs)
    assert "CREATE SCHEMA dagster AUTHORIZATION" in raised.value.remedy
    change(url, f"CREATE SCHEMA dagster AUTHORIZATION {role}")
    render_platform_dagster.open_postgres(theirs)
    assert ask(url, "SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'dagster'") == [(role,)]


# Several programs.


def test_programs_that_start_at_once_find_the_tables_made_once(url: str, home: Path) -> None:
    call = [sys.executable, "-m", "dagster", "instance", "info"]
    started = [
        subprocess.Popen(call, cwd=CHECKOUT, env=told(url, home), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(3)
    ]
    said = [one.communicate(timeout=120)[0].decode() for one in started]
    assert [one.returncode for one in started] == [0] * 3, said
    assert not any("Retrying" in text or PASSWORD in text for text in said), said
    assert ask(url, "SELECT count(*) FROM dagster.alembic_version") == [(1,)]


def test_of_those_who_open_it_at_the_same_moment_one_makes_it(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Without the lock they would meet in making the schema, or a table."""
    for _ in range(5):
        at_once = threading.Barrier(4)

        def open_one(_: int, at_once: threading.Barrier = at_once) -> object:
            at_once.wait(30)
            return render_platform_dagster.open_postgres(url)

        with ThreadPoolExecutor(4) as pool:
            assert len(list(pool.map(open_one, range(4)))) == 4
        change(url, "DROP SCHEMA dagster CASCADE")
    assert "Retrying" not in caplog.text


def test_two_processes_share_it_and_no_connection_is_held_between_statements(
    url: str, home: Path, instance: dg.DagsterInstance
) -> None:
    run = instance.create_run_for_job(defs.resolve_job_def("flush"))
    instance.event_log_storage.set_concurrency_slots("sequencer", 1)
    assert instance.event_log_storage.claim_concurrency_slot("sequencer", run.run_id, "audit_log").is_claimed
    other = (
        "import sys, dagster as dg\n"
        "with dg.DagsterInstance.get() as it:\n"
        "    [run] = it.get_runs()\n"
        "    claimed = it.event_log_storage.claim_concurrency_slot('sequencer', 'another', 'audit_log').is_claimed\n"
        "    it.report_run_canceled(run)\n"
        "    print(run.run_id, claimed)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", other], cwd=CHECKOUT, env=told(url, home), capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == [run.run_id, "False"], done.stderr
    assert statuses(instance, [run]) == ["CANCELED"]
    held = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    assert ask(url, held) == [(0,)]


def test_what_another_folders_process_runs_is_left_alone(url: str, home: Path, tmp_path: Path) -> None:
    """Its lock is on another machine, perhaps: nobody here can say that it has ended."""
    settings = load_settings({}, state_dir=home.parent, database_url=url)
    with restored_process(), open_instance(home, **{DATABASE: url}) as instance:
        first = LocalDagster(settings)
        first.begin_up()
        [here] = instance.run_storage.get_cursor_values({UP}).values()
        flush, started = defs.resolve_job_def("flush"), dg.DagsterRunStatus.STARTED
        runs = [
            instance.create_run_for_job(flush, status=started, remote_job_origin=ORIGIN),
            instance.create_run_for_job(flush, status=started, tags={LOCAL_TAG: here}),
        ]
        LocalDagster(load_settings({}, state_dir=tmp_path / "other", database_url=url)).close()
        assert statuses(instance, runs) == ["STARTED"] * 2
        first.close()
        LocalDagster(settings).close()
        assert statuses(instance, runs) == ["FAILURE"] * 2


def test_a_daemon_keeps_the_limits_of_queue_and_pool(url: str, home: Path, rng: random.Random) -> None:
    """Four flushes are asked for, two of them of backfills: of those one at a time; and of all of them one step."""
    environment = told(url, home)
    with open_platform(load_settings({}, state_dir=home.parent, database_url=url), create=True) as platform:
        begun = platform.clock.now_us() - 60 * US_PER_SECOND
        record(platform, LIVE, sound_events(rng, 200, begun, 30 * US_PER_SECOND))
    launch = [sys.executable, "-m", "dagster", "job", "launch", "-w", "workspace.yaml", "-j", "flush", "--tags"]
    with open_instance(home, **{DATABASE: url}) as instance:
        asked = [
            subprocess.Popen(
                [*launch, f'{{"dagster/backfill": "b{n}"}}' if n < 2 else '{"n": "1"}'], cwd=CHECKOUT, env=environment
            )
            for n in range(4)
        ]
        assert [one.wait(180) for one in asked] == [0] * 4
        log = home / "daemon.log"
        wanted = {run.run_id for run in instance.get_runs()}

        def ended() -> bool:
            found = [instance.get_run_by_id(run_id) for run_id in wanted]
            return all(run is not None and run.is_finished for run in found)

        with running_daemon(log, environment, "-w", "workspace.yaml"):
            wait_until("flushes", ended, log)
        records = [one for one in instance.get_run_records() if one.dagster_run.run_id in wanted]
        assert {one.dagster_run.status for one in records} == {dg.DagsterRunStatus.SUCCESS}, log.read_text()[-2000:]
        backfills = sorted(
            (one.start_time or 0, one.end_time or 0) for one in records if "dagster/backfill" in one.dagster_run.tags
        )
        assert len(backfills) == 2
        assert all(end <= later for (_, end), (later, _) in pairwise(backfills))
        steps = sorted(
            (stats.start_time or 0, stats.end_time or 0)
            for run_id in wanted
            for stats in instance.get_run_step_stats(run_id)
            if stats.step_key == "audit_log"
        )
        assert len(steps) == 4
        assert all(end <= later for (_, end), (later, _) in pairwise(steps))
    assert PASSWORD not in log.read_text()
    assert run_inside("verify", "--state", home.parent, env={DATABASE: url, **own_clickhouse()}).code == 0


# Upgrades, and the doctor.


def test_tables_of_an_older_version_are_migrated(url: str, home: Path, instance: dg.DagsterInstance) -> None:
    [(head,)] = ask(url, "SELECT version_num FROM dagster.alembic_version")
    scripts = ScriptDirectory.from_config(pg_alembic_config(run_storage.__file__))
    assert scripts.get_current_head() == head
    before = scripts.get_revision(str(head)).down_revision
    change(url, f"UPDATE dagster.alembic_version SET version_num = '{before}'")
    call = [sys.executable, "-m", "dagster", "instance", "migrate"]
    done = subprocess.run(call, cwd=CHECKOUT, env=told(url, home), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ask(url, "SELECT version_num FROM dagster.alembic_version") == [(head,)]
    assert PASSWORD not in done.stdout + done.stderr
    assert "alembic_version" not in tables(url)["public"]


def examine(url: str, state: Path) -> Diagnosis:
    settings = load_settings({}, state_dir=state, database_url=url, clickhouse_dsn="http://127.0.0.1:9")
    found = Doctor(settings, SystemClock(), SeededIds(uuid.uuid4().hex)).examine()
    return next(one for one in found if one.part == "Dagster store")


def test_the_doctor_says_where_it_is_and_whether_it_answers(url: str, home: Path) -> None:
    assert (examine(url, home.parent).status, examine("", home.parent).status) == ("off", "off")
    with open_instance(home, **{DATABASE: url}) as instance:
        instance.create_run_for_job(defs.resolve_job_def("flush"))
    found = examine(url, home.parent)
    assert (found.status, "PostgreSQL" in found.says, "1 runs" in found.says) == ("good", True, True), found
    with open_instance(home):
        pass
    assert (examine("", home.parent).status, str(home) in examine("", home.parent).says) == ("good", True)
    gone = examine("postgresql://ci:secret@127.0.0.1:9/x", home.parent)
    assert (gone.status, "secret" in repr(gone)) == ("unavailable", False)
    change(url, "ALTER TABLE dagster.runs RENAME TO lost")
    assert examine(url, home.parent).status == "unavailable"
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")  # of a version before
    old = examine(url, home.parent)
    assert (old.status, "SQLite" in old.says, "storage:" in old.remedy) == ("warning", True, True), old
