"""SQLite with strikes at the begin and at the commit of each transaction. What is committed is in real files.

A worker process has one folder, in memory where there is room, and copies an empty platform's database into it for
each seed. Engines are kept over seeds and over the lives of processes: most of their cost is compiling statements.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event

from render_platform import database as sql
from render_platform.audit_log import create_head
from render_platform.config import Settings, load_settings
from render_platform.database import open_sqlite
from render_platform.note import _private_line
from tests.simulation.world import World
from tests.stories import signer

SLOTS = ("A", "B")
_FILE = "platform.db"
_SUFFIXES = ("", "-wal", "-shm")


class Template:
    """The folder of this worker: keys, an empty database, and two engines on its copy."""

    def __init__(self) -> None:
        memory = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(prefix="simulation-", dir=memory if memory.is_dir() else None))
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        options: dict[str, Any] = {
            "batch_rows": 3,
            "seal_rows_a_transaction": 2,
            "clickhouse_dsn": "http://127.0.0.1:9",
        }
        self.settings: Settings = load_settings(environ={}, state_dir=self.folder, **options)
        keys = self.settings.keys_dir
        keys.mkdir(mode=0o700)
        self.secrets = []
        for number, (role, name) in enumerate((("checkpoint", "log"), ("attestation", "log/attestation"))):
            key = signer(f"simulation.local/{name}", number + 1)
            line = _private_line(key)
            if role == "checkpoint":
                self.vkey = key.verifier.vkey
            (keys / f"{role}.key").write_bytes(line)
            (keys / f"{role}.key").chmod(0o600)
            self.secrets.append(line.decode().strip().rsplit("+", 1)[1])
        self._empty = self.folder / "empty.db"
        with closing(open_sqlite(self._empty)) as database:
            create_head(database)
        self.world: World | None = None
        shutil.copyfile(self._empty, self.folder / _FILE)
        self.databases = {slot: open_sqlite(self.folder / _FILE) for slot in SLOTS}
        for database in self.databases.values():
            self._listen(database.engine)

    def clear(self) -> None:
        """An empty platform."""
        self.put(self._empty)

    def put(self, copy: Path) -> None:
        """Let the database be this copy."""
        self.close()
        for suffix in _SUFFIXES:
            (self.folder / f"{_FILE}{suffix}").unlink(missing_ok=True)
        shutil.copyfile(copy, self.folder / _FILE)

    def close(self) -> None:
        for database in self.databases.values():
            database.close()

    def copy(self) -> Path:
        """A backup, as an operator makes one of a database in use."""
        target = self.folder / "copy.db"
        target.unlink(missing_ok=True)
        with closing(self.connect()) as connection:
            connection.execute("VACUUM INTO ?", [str(target)])
        return target

    def connect(self) -> Any:
        """Plain SQL, that nothing strikes."""
        return vars(sql)["sqlite_module"].connect(self.folder / _FILE)

    def _listen(self, engine: sa.Engine) -> None:
        event.listen(engine, "set_connection_execution_options", self._begin)
        event.listen(engine, "commit", self._commit)
        event.listen(engine, "rollback", self._rollback)

    def _begin(self, _connection: sa.Connection, options: Mapping[str, Any]) -> None:
        """Called when it is known whether the transaction writes, and before it begins: nothing is locked yet."""
        if (world := self.world) is None:
            return
        if options["writes"]:
            world.write("begin", lambda: None, _locked)
            world.writing = 1
        else:
            world.read("begin to read", _locked)

    def _commit(self, connection: sa.Connection) -> None:
        if (world := self.world) is None or not _writes(connection):
            return
        world.write("commit", connection.connection.dbapi_connection.commit, _failed)  # type: ignore[union-attr]
        world.writing = 0

    def _rollback(self, connection: sa.Connection) -> None:
        if self.world is not None and _writes(connection):
            self.world.writing = 0


def _writes(connection: sa.Connection) -> bool:
    return bool(connection.get_execution_options().get("writes", True))


def _locked(kind: str) -> Exception:
    return _error("database is locked", kind)


def _failed(kind: str) -> Exception:
    return _error("disk I/O error", kind)


def _error(text: str, kind: str) -> Exception:
    module = vars(sql)["sqlite_module"]
    return sa.exc.OperationalError("(simulated)", None, module.OperationalError(f"{text}: {kind}"))
