"""The main job on PostgreSQL, by one setting: demo, gateway, flush, proofs, erasure; and what the doctor says of it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from render_platform.clock import HOUR_US, SystemClock
from render_platform.config import load_settings
from render_platform.database import Database, customers, jobs, open_database, usage_events
from render_platform.errors import RecordError, Unavailable, UsageError
from render_platform.gateway.writer import Transactions
from render_platform.operations.doctor import Diagnosis, Doctor
from render_platform.outbox import Outbox
from render_platform.pipeline import open_platform
from render_platform.receipt_verifier import verify_receipt
from render_platform.receipts import Erasure, Receipts, wipe
from tests import postgres
from tests.commands import Outcome, own_clickhouse, run_inside
from tests.gateway.http import CHAT, WAIT_S, Client, running
from tests.platforms import SeededIds

PASSWORD = "not-to-be-shown"
NAME = "Zoë of the Atelier"


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.Server]:
    """A server whose files a test may read."""
    made = postgres.Server()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(postgres.URL, made.url)
        postgres.shared_url.cache_clear()
        yield made
    postgres.shared_url.cache_clear()
    made.stop()


@pytest.fixture
def url(server: postgres.Server) -> str:
    """A new database. The server asks for no password: the one in the URL is there to be looked for."""
    made = postgres.make_database(f"t_{uuid.uuid4().hex}")
    return made.replace("//ci@", f"//ci:{PASSWORD}@")


def command(url: str, env: dict[str, str], *arguments: object) -> Outcome:
    done = run_inside(*arguments, env={"RENDER_PLATFORM_DATABASE_URL": url, **env})
    assert done.code == 0, done.said
    assert PASSWORD not in done.said
    return done


def test_the_main_job(url: str, tmp_path: Path) -> None:
    state, env = tmp_path / "state", own_clickhouse()
    story = command(url, env, "demo", "--state", state, "--json").json
    assert not list(state.glob("platform.db*"))
    verified = command(url, env, "verify", "--deep", "--state", state, "--json").json
    assert (verified["events"], verified["size"]) == (events := story["events"]["outbox"], story["log_size"])

    with running(state, database_url=url, clickhouse_dsn="http://127.0.0.1:9") as at:
        client = at.client()
        ended = [client.ended(client.queue(input=CHAT)["id"]) for _ in range(3)]
    assert {one["state"] for one in ended} == {"success"}
    with running(state, database_url=url, clickhouse_dsn="http://127.0.0.1:9") as at:  # its jobs stand
        assert [at.client().get(f"/jobs/{one['id']}").json["state"] for one in ended] == ["success"] * 3
        assert at.gateway.epoch == 2

    command(url, env, "flush", "--state", state)
    counts = command(url, env, "status", "--state", state, "--json").json
    assert (counts["accepted"], counts["finished"], counts["published"]) == (3, 3, events + 3)
    assert command(url, env, "verify", "--deep", "--state", state, "--json").json["events"] == events + 3
    settings = load_settings({}, state_dir=state, database_url=url)
    with open_platform(settings) as platform:
        receipts = Receipts(platform.database, platform.cas, platform.log_objects)
        for one in ended:
            assert verify_receipt(receipts.of_job(uuid.UUID(one["id"])), [platform.log_signer.verifier.vkey])
    assert PASSWORD not in repr(settings)


def test_the_journals_process_opens_it_too_and_shows_no_password(url: str, tmp_path: Path) -> None:
    """A gateway as people start it: jobs are written by a process of their own."""
    from tests.gateway.processes import running_gateway

    catalogue = '[backends.sim]\nkind = "simulated"\n[models.m]\nfamily = "f"\nmodality = "text"\ntype = "llm"\n'
    catalogue += 'tasks = ["chat"]\nbackends = { sim = "served" }\n'
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RENDER_PLATFORM_DATABASE_URL", url)
        with running_gateway(tmp_path, catalogue) as (process, address):
            client = Client(int(address.rpartition(":")[2]))
            assert client.ended(client.queue(model="m", input=CHAT)["id"])["state"] == "success"
            shown = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
            assert "render_platform.gateway.journal" in shown
            assert PASSWORD not in shown
            process.terminate()
            assert process.wait(WAIT_S) == 0
    assert PASSWORD not in (tmp_path / "errors.log").read_text()
    with closing(open_database(url)) as database, database.read() as connection:
        assert connection.execute(sa.select(jobs.c.state)).scalars().all() == ["success"]
        assert connection.execute(sa.select(sa.func.count()).select_from(usage_events)).scalar() == 1


def files_with(url: str, text: bytes) -> list[str]:
    return [path.name for path in postgres.files_of(url) if text in path.read_bytes()]


def test_who_is_erased_is_in_no_table_any_more(url: str, tmp_path: Path) -> None:
    settings = load_settings({}, state_dir=tmp_path / "state", database_url=url)
    with open_platform(settings) as platform:
        for number in range(50):  # the planner keeps samples of columns: they hold names too
            with platform.database.write() as connection:
                platform.outbox.customer_ref(connection, "key", f"{NAME} {number}")
        with platform.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("ANALYZE")
        with platform.database.read() as connection:
            salt = connection.execute(sa.select(customers.c.salt).filter_by(customer_id=f"{NAME} 7")).scalar_one()
        assert files_with(url, salt)
        assert len(files_with(url, f"{NAME} 7".encode())) > 1
        erasure = Erasure(platform.database, platform.log.append, platform.log.publish)
        assert erasure.erase("key", f"{NAME} 7").customer_ref
        assert files_with(url, salt) == []
        assert files_with(url, f"{NAME} 7".encode()) == []
        assert files_with(url, f"{NAME} 8".encode())


def test_who_still_reads_what_was_erased_is_waited_for_and_named(url: str) -> None:
    with closing(open_database(url)) as database, closing(open_database(url)) as other:
        with other.read() as reading:
            reading.execute(sa.select(sa.func.count()).select_from(usage_events))  # not the table that is wiped
            with pytest.raises(Unavailable, match="1 older transactions"):
                wipe(database, patience_s=0)
        wipe(database, patience_s=0)


def test_a_value_that_it_cannot_hold_is_refused_without_being_shown(url: str) -> None:
    with closing(open_database(url)) as database:
        with pytest.raises(RecordError) as raised, database.write() as connection:
            Outbox(database, SeededIds()).customer_ref(connection, "key", "secret\0name")
        assert "secret" not in str(raised.value)
        with database.read() as connection:
            assert connection.execute(sa.select(sa.func.count()).select_from(customers)).scalar() == 0


def test_a_connection_that_was_cut_is_made_again(url: str) -> None:
    with closing(open_database(url)) as database:
        postgres.end_sessions(url.rpartition("/")[2])
        with database.write() as connection:
            assert connection.execute(sa.select(1)).scalar() == 1


@pytest.mark.parametrize("text", ["mysql://u:secret@h/x", "secret", "postgresql+asyncpg://u:secret@h/x"])
def test_another_kind_of_url_is_refused_and_not_shown(text: str) -> None:
    with pytest.raises(UsageError, match="database_url") as raised:
        load_settings({}, database_url=text)
    assert "secret" not in str(raised.value)


# The doctor.


def examine(url: str, state: Path, clock: Any = None) -> dict[str, Diagnosis]:
    settings = load_settings({}, state_dir=state, database_url=url, clickhouse_dsn="http://127.0.0.1:9")
    return {one.part: one for one in Doctor(settings, clock or SystemClock(), SeededIds(uuid.uuid4().hex)).examine()}


class Ahead(SystemClock):
    def now_us(self) -> int:
        return super().now_us() + HOUR_US


def test_the_doctor_speaks_of_the_database_in_use(url: str, tmp_path: Path) -> None:
    with open_platform(load_settings({}, state_dir=tmp_path / "state", database_url=url)) as platform:
        platform.flush()
    found = examine(url, tmp_path / "state")
    assert (found["database"].status, found["state folder"].status) == ("good", "good"), found
    assert "PostgreSQL" in found["database"].says
    ahead = examine(url, tmp_path / "state", Ahead())["database"]
    assert (ahead.status, ahead.remedy[:13]) == ("bad", "set both by N")
    gone = examine("postgresql://ci:secret@127.0.0.1:9/x", tmp_path / "state")
    assert gone["database"].status == "unavailable"
    assert "secret" not in repr(gone)


def test_the_doctor_finds_a_server_that_does_not_sync(tmp_path: Path) -> None:
    made = postgres.Server("fsync=off")
    try:
        url = f"{made.url}postgres"
        with open_platform(load_settings({}, state_dir=tmp_path / "state", database_url=url)):
            pass
        found = examine(url, tmp_path / "state")["database"]
        assert (found.status, "fsync=off" in found.says) == ("bad", True)
    finally:
        made.stop()


def test_it_is_the_same_database_for_all_who_open_it_at_once(url: str) -> None:
    """Tables are made once, whoever comes first."""

    def open_one(_: int) -> Database:
        return open_database(url)

    with ThreadPoolExecutor(4) as pool:
        for database in pool.map(open_one, range(4)):
            database.close()


HOLDER = """
import sys, sqlalchemy as sa
from render_platform.database import customers, open_database
from render_platform.gateway.writer import Transactions

def row(name):
    return customers.insert().values(customer_ref=name, issuer="key", customer_id=name, salt=b"s")

class Rows:
    def apply(self, connection, names):
        self.last = names[-1]
        for name in names:
            connection.execute(row(name))
            if name != "after":
                print("holds", flush=True)
                sys.stdin.readline()
            if name == "reads":
                connection.execute(sa.select(1))
        return names

    def committed(self):
        pass

    def stands(self, connection):
        return connection.execute(sa.select(customers.c.salt).filter_by(customer_ref=self.last)).scalar() is not None

writer = Transactions(open_database(sys.argv[1]), Rows())
for name in (sys.argv[2], "after"):
    (result,) = writer.write([name])
    said = result if isinstance(result, str) else f"{type(result).__name__}: {result}"
    print(f"> {said!r}", flush=True)
"""


@pytest.mark.parametrize("then", ["commits", "reads"])
def test_a_writer_that_stands_still_stops_nobody_for_long_and_learns_of_it(url: str, then: str) -> None:
    with closing(open_database(url)) as database:
        call = [sys.executable, "-c", HOLDER, url, then]
        child = subprocess.Popen(call, cwd=Path(__file__).parents[1], stdin=-1, stdout=-1, stderr=-1, text=True)
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "holds\n"
            child.send_signal(signal.SIGSTOP)
            with database.write() as connection:  # before it gives up waiting
                connection.execute(customers.insert().values(customer_ref="b", issuer="k", customer_id="b", salt=b""))
            child.send_signal(signal.SIGCONT)
            said = child.communicate("go on\n", timeout=30)[0]
            refused, after = re.findall("^> '(.*)'$", said, re.MULTILINE)
        finally:
            child.kill()
            child.communicate()
        assert refused.startswith("Unavailable: the database cannot be used"), refused
        assert "no process holds a long lock" in refused, refused
        assert after == "after"
        with database.read() as connection:
            assert set(connection.execute(sa.select(customers.c.customer_ref)).scalars()) == {"after", "b"}


class CutOff(Database):
    """Its connection is lost at the commit, which the server makes a second later."""

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        late = ExitStack()
        yield late.enter_context(super().write())
        threading.Timer(1, late.close).start()
        raise Unavailable("the connection is lost", "look for it")


class OneCustomer:
    def apply(self, connection: sa.Connection, operations: Sequence[str]) -> list[Any]:
        row = {"issuer": "key", "customer_id": "alice", "salt": b"s"}
        connection.execute(customers.insert(), [{"customer_ref": ref, **row} for ref in operations])
        return list(operations)

    def committed(self) -> None: ...

    def stands(self, connection: sa.Connection) -> bool:
        return connection.execute(sa.select(customers.c.customer_ref)).scalar() is not None


def test_whether_a_commit_stands_is_asked_after_its_end(url: str) -> None:
    """A plain read would not see what the server is still at; and then it is there."""
    with closing(open_database(url)) as database:
        assert Transactions(CutOff(database.engine), OneCustomer()).write(["a"]) == ["a"]
