"""A PostgreSQL server for tests, one a process and its children; and, where it is chosen, a database a state folder.

RENDER_TEST_DATABASE=postgres runs a suite on PostgreSQL: `tests.platforms` then gives each state folder a database of
its own. The file NOTE names it: a copy of the folder gets a copy of the database, as it would of SQLite's file.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from render_platform import database

DEBIAN = Path("/usr/lib/postgresql")
URL = "RENDER_TEST_POSTGRES_URL"
"""Set where a server runs: the processes that a test starts use it too."""
NOTE = ".database"
CHOSEN = os.environ.get("RENDER_TEST_DATABASE") == "postgres"
sqlite_only = pytest.mark.skipif(CHOSEN, reason="NOT ON POSTGRESQL: it looks at SQLite's file, or its locks")


def programs() -> Path:
    pytest.importorskip(
        "psycopg", reason="POSTGRESQL NOT TESTED: psycopg is not installed: pip install 'psycopg[binary]'"
    )
    found = sorted(DEBIAN.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not found:
        pytest.skip(f"POSTGRESQL NOT TESTED: no initdb under {DEBIAN} (apt-get install postgresql)")
    return found[-1].parent


class Server:
    """A server of its own on a free loopback port; durable as in production: fsync is on."""

    def __init__(self, *options: str) -> None:
        bin_ = programs()
        self._folder = Path(tempfile.mkdtemp(prefix="render-platform-pg-"))
        self._folder.chmod(0o755)
        self.data = self._folder / "data"
        self.data.mkdir(0o700)
        become: list[str] = []
        if os.geteuid() == 0:  # the server refuses to run as root
            become = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
            shutil.chown(self.data, "postgres", "postgres")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        made = [bin_ / "initdb", "-D", self.data, "-U", "ci", "-A", "trust", "-N", "--no-locale", "-E", "UTF8"]
        subprocess.run([*become, *map(str, made)], check=True, capture_output=True, cwd=self._folder)
        settings = ["max_connections=200", "shared_buffers=64MB", *options]
        start = [bin_ / "postgres", "-D", self.data, "-h", "127.0.0.1", "-p", port, "-k", ""]
        start += [part for one in settings for part in ("-c", one)]
        with (self._folder / "server.log").open("wb") as output:
            self.process = subprocess.Popen([*become, *map(str, start)], stdout=output, stderr=output, cwd=self._folder)
        self.url = f"postgresql://ci@127.0.0.1:{port}/"
        ready = [str(bin_ / "pg_isready"), "-h", "127.0.0.1", "-p", str(port), "-t", "30", "-q"]
        deadline = time.monotonic() + 60
        while subprocess.run(ready, check=False).returncode and time.monotonic() < deadline:
            assert self.process.poll() is None, (self._folder / "server.log").read_text()
            threading.Event().wait(0.1)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)  # fast shutdown
        self.process.wait(timeout=60)
        shutil.rmtree(self._folder, ignore_errors=True)


@functools.cache
def shared_url() -> str:
    """Where this process's server is, or its parent's; it ends with the process that started it."""
    if URL not in os.environ:
        server = Server()
        atexit.register(server.stop)
        os.environ[URL] = server.url
    return os.environ[URL]


def _admin(statement: str) -> list[Any]:
    import psycopg

    with psycopg.connect(f"{shared_url()}postgres", autocommit=True) as connection:
        done = connection.execute(statement.encode())
        return done.fetchall() if done.description else []


def make_database(name: str, template: str = "template1") -> str:
    """The URL of the database of that name; made, as a copy of `template`, where there is none."""
    import psycopg

    if not _admin(f"SELECT 1 FROM pg_database WHERE datname = '{name}'"):
        if template != "template1":
            end_sessions(template)
        try:
            _admin(f"CREATE DATABASE {name} TEMPLATE {template}")
        except psycopg.errors.UniqueViolation:  # another process made it at the same moment
            pass
        except psycopg.errors.DuplicateDatabase:
            pass
    return shared_url() + name


def end_sessions(name: str) -> None:
    _admin(f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '{name}'")


def _name(state: Path, copy: str = "") -> str:
    return "s_" + hashlib.sha256(f"{state.resolve()}|{copy}".encode()).hexdigest()[:24]


@functools.cache
def url_of(state: Path) -> str:
    """The URL of a state folder's database, which is made on first use."""
    name, note = _name(state), state / NOTE
    template = note.read_text() if note.exists() else name
    url = make_database(name, template if template != name else "template1")
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    note.write_text(name)
    return url


def lose(state: Path) -> None:
    """The state folder's database is gone; the next use makes an empty one."""
    _admin(f"DROP DATABASE IF EXISTS {_name(state)} WITH (FORCE)")
    (state / NOTE).unlink(missing_ok=True)
    url_of.cache_clear()


def make_copy(state: Path, copy: str, template: str = "template1") -> str:
    """The URL of a new database that the file `copy` of the state folder names: it goes where the folder is copied."""
    name = _name(state, copy)
    _admin(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
    (state / copy).write_text(name)
    return make_database(name, template)


def back_up(state: Path, copy: str) -> None:
    url_of(state)
    make_copy(state, copy, _name(state))


def restore(state: Path, copy: str) -> None:
    lose(state)
    make_database(_name(state), (state / copy).read_text())
    (state / NOTE).write_text(_name(state))


def files_of(url: str) -> list[Path]:
    """The files of a database's tables and indexes, as they are on the disk now; not the server's log of writes."""
    _admin("CHECKPOINT")
    ((folder,),) = _admin("SHOW data_directory")
    ((oid,),) = _admin(f"SELECT oid FROM pg_database WHERE datname = '{url.rpartition('/')[2]}'")
    return [path for path in Path(folder, "base", str(oid)).iterdir() if path.is_file()]


def drop_all() -> None:
    """What tests have left: a database takes 8 MB."""
    if URL in os.environ:
        for (name,) in _admin("SELECT datname FROM pg_database WHERE datname LIKE 's!_%' ESCAPE '!'"):
            _admin(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        url_of.cache_clear()


class Done(NamedTuple):
    """What sqlite3 gives for a statement that finds no rows."""

    rowcount: int

    def fetchall(self) -> list[Any]:
        return []


class Plain:
    """Plain SQL as sqlite3 gives it: `?` stands for a value, rows are tuples, and `rowid` for the order of inserts of
    one connection: several fill pages of their own.
    """

    def __init__(self, url: str) -> None:
        import psycopg

        self._connection = psycopg.connect(url)

    def execute(self, sql: str, values: Sequence[Any] = ()) -> Any:
        if sql == "BEGIN IMMEDIATE":
            sql = f"SELECT pg_advisory_xact_lock({vars(database)['_WRITER_LOCK']})"
        text = sql.replace("rowid", "ctid")
        if values:
            text = text.replace("%", "%%").replace("?", "%s")
        cursor = self._connection.execute(text.encode(), values or None)
        return cursor if cursor.description else Done(cursor.rowcount)

    def executemany(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        for row in rows:
            self.execute(sql, row)

    def commit(self) -> None:
        self._connection.commit()

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._connection.rollback() if kind else self._connection.commit()
