"""Where ClickHouse is: a server, or a chdb folder with the one process that may open it, which serves it to others.

`open_client` gives a client of the driver for a DSN; `translated` says what the driver's errors mean, without secrets.
"""

from __future__ import annotations

import fcntl
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import clickhouse_connect
import pyarrow as pa
import pyarrow.compute as pc
from clickhouse_connect.driver.exceptions import ClickHouseError
from clickhouse_connect.driver.httputil import default_pool_manager
from urllib3.exceptions import HTTPError

from render_platform.clickhouse_schema import MIGRATIONS, Migration
from render_platform.errors import Unavailable, UsageError

OLDEST_SERVER = [24, 8]
_NO_DSN = "this is no ClickHouse DSN", "give chdb:///folder or http(s)://user:password@host:port"
_TOO_OLD = "ClickHouse is too old or unsupported", "24.8 or newer is needed"

DRIVER_ERRORS = (ClickHouseError, HTTPError, OSError, pa.ArrowException, ImportError)
_BOUNDED = ("result", "read", "group_by", "sort", "distinct", "set", "join", "timeout")
_NO_PARTIAL_RESULTS = {f"{what}_overflow_mode": "throw" for what in _BOUNDED}
CONNECT_S, ANSWER_S = 5, 60
INSERT_S = 30
"""How long an insert may work before ClickHouse gives it up by itself, whether or not its client still waits."""
_INSERT_SETTINGS = {
    "async_insert": 0,
    "insert_deduplicate": 1,
    "deduplicate_blocks_in_dependent_materialized_views": 1,
    "max_partitions_per_insert_block": 1_000,
    "max_execution_time": INSERT_S,
}

BRIDGE_USER = "bridge"
"""The user in the URL of a bridge."""
OWNED = (
    "another process owns the embedded database",
    "stop the other process or point RENDER_PLATFORM_CLICKHOUSE_DSN at a server",
)
"""What Unavailable says, and its remedy."""


class FolderLock:
    """The right to open a chdb folder: an flock on `<folder>.lock`, which ends with its process at the latest.

    Its owner may leave in `<folder>.url` where it serves the folder to others. chdb opens one folder a process, so
    the lock is the process's as well: all that use the folder in it share the lock, and the last one lets go.
    """

    _owned: ClassVar[dict[Path, FolderLock]] = {}
    _guard: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, folder: Path, descriptor: int) -> None:
        self._folder, self._descriptor, self._users = folder, descriptor, 0

    @classmethod
    def take(cls, folder: Path) -> FolderLock | None:
        """Release what is returned, once. None where another process has it; OSError where the file cannot be made."""
        with cls._guard:
            lock = cls._owned.get(folder) or cls._take(folder)
            if lock is not None:
                lock._users += 1
            return lock

    @classmethod
    def _take(cls, folder: Path) -> FolderLock | None:
        descriptor = os.open(folder.with_name(f"{folder.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            cls.url_file(folder).unlink(missing_ok=True)  # of an owner that was killed: nobody may go there now
        except BlockingIOError:  # another process owns it
            os.close(descriptor)
            return None
        except BaseException:  # whatever else it was: the file is let go of, and the error goes on
            os.close(descriptor)
            raise
        lock = cls._owned[folder] = cls(folder, descriptor)
        return lock

    @staticmethod
    def url_file(folder: Path) -> Path:
        """Where the owner leaves the URL at which it serves the folder, password included."""
        return folder.with_name(f"{folder.name}.url")

    def release(self) -> None:
        with self._guard:
            self._users -= 1
            if not self._users:
                del self._owned[self._folder]
                os.close(self._descriptor)


class Connection:
    """Calls of the driver to one database: one after another where the engine is in this process, errors translated."""

    def __init__(self, client: Any, dsn: str, database: str, lock: FolderLock | None = None) -> None:
        """`lock` belongs to it where the engine is in this process, and goes with `close`."""
        self._client, self._dsn, self._database, self._lock = client, dsn, database, lock
        self._turn: AbstractContextManager[Any] = threading.Lock() if lock else nullcontext()

    def close(self) -> None:
        """Let go of the folder or the connections; harmless when repeated. Call nothing after it."""
        self._client.close()
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

    @contextmanager
    def _calling(self) -> Iterator[None]:
        """One call of the driver, with its errors translated."""
        with translated(self._dsn), self._turn:
            try:
                yield
            except DRIVER_ERRORS:
                if self._lock is not None:
                    with suppress(*DRIVER_ERRORS):  # chdb puts what a failed query had written before the next answer
                        self._client.raw_query("SELECT 1")
                raise

    def _ask(self, sql: str, **values: Any) -> pa.Table:
        with self._calling():
            return _printable(self._client.query_arrow(sql, parameters=values))

    def read(self, sql: str, settings: Mapping[str, Any]) -> pa.Table:
        """The rows of one SELECT over what is no table of this database: nothing needs to be migrated for it."""
        with self._calling():
            return _printable(self._client.query_arrow(sql, settings=dict(settings)))

    def _one(self, sql: str, **values: Any) -> Any:
        for row in self._ask(sql, **values).to_pylist():
            return next(iter(row.values()))
        raise Unavailable("a table of ClickHouse is missing", "see that nothing else changes this database")

    def _command(self, sql: str, **values: Any) -> None:
        with self._calling():
            self._client.command(sql, parameters=values)

    def _insert(self, name: str, table: pa.Table, token: str) -> None:
        if table.num_rows:
            settings = {**_INSERT_SETTINGS, "insert_deduplication_token": token}
            with self._calling():
                self._client.insert_arrow(name, table.combine_chunks(), settings=settings)


class Database(Connection):
    """A database with numbered migrations, of which a reader wants none to be pending."""

    _ready = False
    """Whether none was, when this one last looked or migrated."""

    def query(self, sql: str, **values: Any) -> pa.Table:
        """The rows of one SELECT; `values` are its parameters. What asks for figures of its own has its own SQL.

        Unavailable where migrations are pending: who reads changes nothing.
        """
        if not self._ready:
            if pending := self.pending():
                what = f"ClickHouse lacks {len(pending)} migrations, from number {pending[0].number} on"
                raise Unavailable(what, "run `render-platform migrate`")
            self._client.database, self._ready = self._database, True
        return self._ask(sql, **values)

    def pending(self) -> list[Migration]:
        """The migrations that the database does not name yet. Unavailable where it names one that is not known here."""
        require_version(self._client.server_version)
        query = "SELECT count() FROM system.tables WHERE database = {db:String} AND name = 'schema_migrations'"
        done: set[int] = set()
        if self._one(query, db=self._database):
            found = self._ask(f"SELECT number FROM `{self._database}`.schema_migrations")  # noqa: S608
            done = set(found.column("number").to_pylist())
        if unknown := done - {migration.number for migration in MIGRATIONS}:
            raise Unavailable(f"migration {max(unknown)} is not known here", "install a newer version")
        return [migration for migration in MIGRATIONS if migration.number not in done]


def open_client(dsn: str) -> tuple[Any, str, FolderLock | None]:
    """A client, the DSN that it speaks to, and the lock to release where the engine is in this process.

    A folder that another process owns is reached through that one's bridge. Raises UsageError for what is no DSN,
    Unavailable for everything else.
    """
    with translated(dsn):
        return _open_folder(dsn) if dsn.startswith("chdb://") else (_connect(dsn), dsn, None)


def _open_folder(dsn: str) -> tuple[Any, str, FolderLock | None]:
    """A client of the folder's engine, the DSN that it has become, and the lock where the engine is in this process."""
    rest = dsn.removeprefix("chdb://")
    if not rest or "?" in rest:
        raise UsageError(*_NO_DSN)
    folder = Path(rest).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock.take(folder)
    if lock is None:
        with suppress(FileNotFoundError):
            url = FolderLock.url_file(folder).read_text()
            with translated(url):
                # The default pool: a proxy that the environment names is not for loopback, nor to see the token.
                return _connect(url, pool_mgr=default_pool_manager()), url, None
        raise Unavailable(*OWNED)
    try:
        client = clickhouse_connect.get_client(interface="chdb", path=str(folder), settings=_NO_PARTIAL_RESULTS)
    except BaseException:  # whatever it was: the folder is let go of, and the error goes on
        lock.release()
        raise
    return client, dsn, lock


def _connect(dsn: str, **options: Any) -> Any:
    scheme = dsn.partition("://")[0]
    if scheme not in ("http", "https"):
        raise UsageError(*_NO_DSN)
    if "@" in urlsplit(dsn).path:  # an unencoded / in a password: what follows it would be shown as a path
        raise UsageError("the ClickHouse DSN is malformed", "percent-encode a password in it")
    options |= {"settings": _NO_PARTIAL_RESULTS, "interface": scheme, "autogenerate_session_id": False}
    options |= {"connect_timeout": CONNECT_S, "send_receive_timeout": ANSWER_S}
    try:
        return clickhouse_connect.get_client(dsn=dsn, **options)
    except ValueError:  # a port or an option; its text may quote a password
        raise UsageError("the ClickHouse DSN is malformed", "percent-encode a password in it") from None


@contextmanager
def translated(dsn: str) -> Iterator[None]:
    """Turn what the driver raises into Unavailable; the cause is left out because it may hold secrets."""
    try:
        yield
    except DRIVER_ERRORS as error:
        message, remedy = _explain(str(error), dsn)
        raise Unavailable(message, remedy) from None


def _explain(text: str, dsn: str) -> tuple[str, str]:
    if "Unknown identifier: readonly" in text:
        return _TOO_OLD
    if "Error initializing EmbeddedServer" in text:
        return f"the embedded ClickHouse did not open: most likely {OWNED[0]}", OWNED[1]
    if "EmbeddedServer already initialized" in text:
        return "this process has another embedded ClickHouse open", "close it first: a process has one folder"
    where = "the server and its address, set by RENDER_PLATFORM_CLICKHOUSE_DSN"
    if dsn.startswith("chdb:"):
        where = "that its folder can be written, set by RENDER_PLATFORM_CLICKHOUSE_DSN"
    elif urlsplit(dsn).username == BRIDGE_USER:
        where = "that the process that owns the embedded database still runs, and repeat this"
    return f"ClickHouse failed: {_scrubbed(text, dsn)}", f"check {where}"


def _scrubbed(text: str, dsn: str) -> str:
    """The first line of an error, without the DSN and what its password is, plain or encoded."""
    secret = urlsplit(dsn).password if not dsn.startswith("chdb:") else None
    for hidden in filter(None, (dsn, secret, unquote(secret or ""))):
        text = text.replace(hidden, "***")
    return " ".join(text.split("\n", 1)[0].split())[:300]


def require_version(version: str) -> None:
    if [int(number) for number in re.findall(r"\d+", version)[:2]] < OLDEST_SERVER:
        raise Unavailable(*_TOO_OLD)


def _printable(table: pa.Table) -> pa.Table:
    """ClickHouse keeps any bytes as text. Those that no event can hold, no UTF-8 or NUL, are told as `invalid` and
    their hex: that is no key of ours either, and the rows stay readable, for what they are."""
    for at, field in enumerate(table.schema):
        if pa.types.is_string(field.type) and not _is_text(table.column(at)):
            found = table.column(at).combine_chunks().view(pa.binary()).to_pylist()
            table = table.set_column(at, field, pa.array(map(_text_of, found), pa.string()))
    return table


def _is_text(column: pa.ChunkedArray) -> bool:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return not pc.any(pc.match_substring(column, "\0")).as_py()


def _text_of(data: bytes | None) -> str | None:
    if data is None:
        return None
    with suppress(UnicodeDecodeError):
        if b"\0" not in data:
            return data.decode()
    return f"invalid {data.hex().upper()}"


def typed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with exactly this schema; a column that does not fit it is a failed read."""
    try:
        return pa.table([_cast(table.column(f.name).combine_chunks(), f) for f in schema], schema=schema)
    except (KeyError, ValueError, TypeError) as error:
        raise Unavailable("ClickHouse answered with columns of another type", "check its tables") from error


def _cast(column: pa.Array, field: pa.Field) -> pa.Array:
    if column.null_count and not field.nullable:
        raise ValueError(f"{field.name} holds a null")
    if field.type == pa.uuid():
        return pa.ExtensionArray.from_storage(field.type, column.cast(pa.binary(16)))
    return column.cast(field.type)
