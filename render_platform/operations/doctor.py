"""`doctor`: each part that the configuration names is tried, and what is wrong is said with what to do about it.

A part is tried as its user would: the database takes a write lock, a store gets a probe key twice, the newest entries
of the log are hashed again. Nothing is left behind: no more is made than by any command that opens the state.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import duckdb
import sqlalchemy as sa

from render_platform.cas import open_objects
from render_platform.clickhouse import open_clickhouse, pending_migrations
from render_platform.clock import US_PER_SECOND, Clock, Ids, iso
from render_platform.config import Settings
from render_platform.database import lanes, open_database
from render_platform.errors import PlatformError, Unavailable, UsageError
from render_platform.objects import check_store
from render_platform.outbox import LIVE
from render_platform.pipeline import Platform, open_platform

GOOD, WARNING, BAD, UNAVAILABLE, OFF = "good", "warning", "bad", "unavailable", "off"
LEAST_FREE_BYTES, FEW_FREE_BYTES = 1024**3, 10 * 1024**3
MAX_SKEW_US = 5 * US_PER_SECOND
SAFE_SQLITE = (3, 51, 3)
"""The first in which a log of writes that is reset under several writers is whole."""
_SERVER = ("server_version", "server_encoding", "fsync", "synchronous_commit")
_SERVER_US = sa.cast(sa.extract("epoch", sa.func.clock_timestamp()) * US_PER_SECOND, sa.BigInteger)
ANSWER_S = 5
MAX_ANSWER_BYTES = 1024**2
_OUR_STORAGE = "render_platform_dagster"
_STARTED = "run `render-platform up`, or deploy/prepare.sh: Dagster's first start makes it"
_DAEMONS = "{ instance { daemonHealth { allDaemonStatuses { daemonType required healthy } } } }"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was found of one part. `off`: it does not run now, which need not be wrong."""

    part: str
    status: str
    says: str
    remedy: str = ""
    ms: int = 0


class Found(NamedTuple):
    status: str
    says: str
    remedy: str = ""


class Doctor:
    def __init__(self, settings: Settings, clock: Clock, ids: Ids) -> None:
        self._settings, self._clock, self._ids = settings, clock, ids

    def examine(self) -> Iterator[Diagnosis]:
        """One part after the other; what fails in one keeps no other from being looked at."""
        yield self._of("state folder", self._folder)
        yield self._of("disk", self._disk)
        database = self._settings.database_path
        standing = bool(self._settings.database_url) or os.access(database, os.F_OK)  # no error in a closed folder
        for name in ("blobs", "log") if standing or self._settings.objects_url else ():
            yield self._of(f"store of {name}", partial(self._store, name))
        for part, look in (("database", self._database), ("clock", self._live_clock), ("log", self._log)):
            if standing:
                yield self._of(part, partial(self._opened, look))
        if standing or self._settings.clickhouse_dsn:
            yield self._of("ClickHouse", self._clickhouse)
        if standing and self._settings.slow_path_engine == "clickhouse":
            yield self._of("slow path", partial(self._opened, self._slow_path))
        yield self._of("gateway", self._gateway)
        yield self._of("Dagster", self._dagster)
        yield self._of("Dagster store", self._dagster_storage)

    def _of(self, part: str, look: Callable[[], Found]) -> Diagnosis:
        begun_ns = time.perf_counter_ns()
        try:
            found = look()
        except Unavailable as error:
            found = Found(UNAVAILABLE, error.message, error.remedy)
        except PlatformError as error:
            found = Found(BAD, error.message, error.remedy or "run `render-platform verify`")
        except OSError as error:
            found = Found(
                UNAVAILABLE, f"{error.filename or ''} {error.strerror or error}".strip(), "check path and rights"
            )
        return Diagnosis(part, *found, ms=(time.perf_counter_ns() - begun_ns) // 1_000_000)

    def _opened(self, look: Callable[[Platform], Found]) -> Found:
        with open_platform(self._settings, self._clock, self._ids) as platform:
            return look(platform)

    def _folder(self) -> Found:
        folder = self._settings.state_dir
        if not (self._settings.has_state and folder.exists()):
            return Found(
                OFF, f"{folder} holds no platform state", "run `render-platform up` or `demo`, or give --state DIR"
            )
        files = (self._settings.database_path, *sorted(self._settings.keys_dir.glob("*.key")))
        secret = [folder, *(path for path in files if path.exists())]
        if shared := [path for path in secret if stat.S_IMODE(path.stat().st_mode) & 0o077]:
            names = ", ".join(str(path) for path in shared)
            return Found(BAD, f"others may read {names}: keys, customers' ids and salts", f"chmod go-rwx {shared[0]}")
        if not os.access(folder, os.W_OK | os.X_OK):
            return Found(BAD, f"{folder} cannot be written to", "run as its owner")
        return Found(GOOD, f"{folder}, its owner's alone")

    def _disk(self) -> Found:
        folder = self._settings.state_dir
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        found = os.statvfs(folder)
        says = f"{free / 1e9:,.1f} GB free at {folder}"
        if found.f_files and found.f_favail < 100_000:
            return Found(WARNING, f"{found.f_favail:,} files more fit at {folder}: each batch takes two", "make room")
        if free < LEAST_FREE_BYTES:
            return Found(BAD, says, "make room: with a full disk nothing is accepted")
        return Found(WARNING, says, "make room soon") if free < FEW_FREE_BYTES else Found(GOOD, says)

    def _store(self, name: str) -> Found:
        objects = open_objects(self._settings, self._ids)[("blobs", "log").index(name)]
        where = f"{self._settings.objects_url or self._settings.state_dir}/{name}"
        check_store(objects, self._ids, where)
        return Found(GOOD, f"{where} keeps what was written first, and gives it back")

    def _database(self, platform: Platform) -> Found:
        with platform.database.write() as connection:  # waits for other writers, as all do
            return self._postgres(connection) if self._settings.database_url else self._sqlite(connection)

    @staticmethod
    def _sqlite(connection: sa.Connection) -> Found:
        mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar_one()
        durable = connection.exec_driver_sql("PRAGMA synchronous").scalar_one()
        version = str(connection.exec_driver_sql("SELECT sqlite_version()").scalar_one())
        if (mode, durable) != ("wal", 2):
            return Found(
                BAD, f"SQLite runs with {mode} and synchronous={durable}", "let no other program change its settings"
            )
        if tuple(map(int, version.split("."))) < SAFE_SQLITE:
            return Found(WARNING, f"SQLite {version} may lose a reset of its log of writes", "install pysqlite3-binary")
        return Found(GOOD, f"SQLite {version}, WAL, synchronous=FULL; takes writes")

    def _postgres(self, connection: sa.Connection) -> Found:
        before_us = self._clock.now_us()
        row = connection.execute(sa.select(*map(sa.func.current_setting, _SERVER), _SERVER_US)).one()
        skew_us = _apart_us(before_us, row[-1], self._clock.now_us())
        version, encoding, fsync, commit = row[:4]
        if (fsync, commit) != ("on", "on"):
            says = f"PostgreSQL {version} runs with fsync={fsync} and synchronous_commit={commit}"
            return Found(BAD, f"{says}: what was acknowledged may be lost", "set both to on in postgresql.conf")
        if encoding != "UTF8":
            return Found(BAD, f"the database's encoding is {encoding}", "make it anew with ENCODING 'UTF8'")
        if skew_us > MAX_SKEW_US:
            says = f"its clock and this one are {skew_us // US_PER_SECOND:,} s apart"
            return Found(BAD, says, "set both by NTP: its log is read beside ours")
        return Found(GOOD, f"PostgreSQL {version}, fsync and synchronous_commit on; takes writes, clocks agree")

    def _live_clock(self, platform: Platform) -> Found:
        """Against the newest event: of a clock that was set back, events are recorded at the time before."""
        with platform.database.read() as connection:
            frontier = connection.execute(sa.select(lanes.c.frontier_us).filter_by(lane=LIVE)).scalar() or 0
        ahead_us = int(frontier) - self._clock.now_us()
        if ahead_us > MAX_SKEW_US:
            says = f"this clock is {ahead_us // US_PER_SECOND:,} s behind what was recorded last, {iso(int(frontier))}"
            return Found(BAD, says, "set it by NTP; until it has caught up, events are recorded at that time")
        return Found(GOOD, f"{iso(self._clock.now_us())}, not behind what was recorded last")

    def _log(self, platform: Platform) -> Found:
        checked, published = platform.log.check_tail(), platform.log.published()
        backlog = platform.outbox.backlog()
        size = "nothing is published yet" if published is None else f"{published.size:,} entries are published"
        says = f"{size}; the newest {checked} hash to it; {backlog.rows:,} events and {backlog.batches} batches wait"
        if backlog.oldest_recorded_at is not None:
            age_s = (self._clock.now_us() - backlog.oldest_recorded_at) // US_PER_SECOND
            if age_s > 10 * self._settings.backlog_age_s:
                return Found(
                    WARNING, f"{says}, since {age_s:,} s", "start Dagster (`render-platform up`), or run `flush`"
                )
        return Found(GOOD, says)

    def _clickhouse(self) -> Found:
        settings = self._settings
        pending = pending_migrations(settings.clickhouse_url, settings.clickhouse_database)
        if pending:
            return Found(WARNING, f"{len(pending)} migrations are pending", "run `render-platform migrate`")
        with closing(open_clickhouse(settings.clickhouse_url, settings.clickhouse_database)) as clickhouse:
            before_us = self._clock.now_us()
            row = clickhouse.query(
                "SELECT version() AS version, toUnixTimestamp64Micro(now64(6)) AS now_us"
            ).to_pylist()[0]
            after_us = self._clock.now_us()
        skew_us = _apart_us(before_us, row["now_us"], after_us)
        if skew_us > MAX_SKEW_US:
            says = f"its clock and this one are {skew_us // US_PER_SECOND:,} s apart"
            return Found(BAD, says, "set both by NTP: retention and freshness are judged by them")
        return Found(GOOD, f"{row['version']}, no migration pending, clocks agree")

    def _slow_path(self, platform: Platform) -> Found:
        """ClickHouse reads the newest batch from the bucket: it needs rights of its own there."""
        hours = (platform.slow.hour(hour_us) for hour_us in reversed(platform.hours.known()))
        newest = next((entries[-1:] for entries in hours if entries), [])
        with duckdb.connect() as connection:  # which nothing is read with
            rows = sum(table.num_rows for table in platform.slow.row_values(newest, connection))
        if not newest:
            return Found(GOOD, "no batch is published yet that ClickHouse could read")
        return Found(GOOD, f"ClickHouse reads {self._settings.objects_url}: the {rows:,} events of the newest batch")

    def _gateway(self) -> Found:
        host = self._settings.gateway_host if self._settings.gateway_host != "0.0.0.0" else "127.0.0.1"  # noqa: S104
        answer = _ask(f"http://{host}:{self._settings.gateway_port}/ready")
        if answer is None:
            return Found(
                OFF, f"nothing listens on port {self._settings.gateway_port}", "run `render-platform serve` or `up`"
            )
        problems = answer.get("problems")
        if problems is None:
            return Found(
                BAD, f"port {self._settings.gateway_port} is something else's", "set gateway_port to a free one"
            )
        if problems:
            return Found(UNAVAILABLE, f"it takes no work: {'; '.join(map(str, problems))}", "see docs/runbook.md")
        return Found(
            GOOD, f"{answer.get('gateway')} takes work, epoch {answer.get('epoch')}, meter {answer.get('meter')}"
        )

    def _dagster(self) -> Found:
        base = self._settings.dagster_url.rstrip("/") or f"http://127.0.0.1:{self._settings.dagster_port}"
        answer = _ask(f"{base}/graphql", json.dumps({"query": _DAEMONS}).encode())
        if answer is None:
            return Found(
                OFF, f"nothing answers at {_shown(base)}", "run `render-platform up`: nothing is sealed without it"
            )
        try:
            found = answer["data"]["instance"]["daemonHealth"]["allDaemonStatuses"]
            ill = sorted(one["daemonType"] for one in found if one["required"] and not one["healthy"])
        except (KeyError, TypeError):
            return Found(BAD, f"{_shown(base)} is not Dagster's UI", "set dagster_url, or dagster_port to a free one")
        if ill:
            return Found(
                BAD, f"daemons are not healthy: {', '.join(ill)}", "see the UI's page Deployment, and restart it"
            )
        return Found(GOOD, f"{len(found)} daemons, all that are needed are healthy")

    def _dagster_storage(self) -> Found:
        """Its tables are Dagster's own: whether it can be read is all that is asked."""
        home, url = self._settings.dagster_home, self._settings.database_url
        file = home / "dagster.yaml"
        text = file.read_text() if file.exists() else ""
        if not text:
            return Found(OFF, f"there is no {file} yet", _STARTED)
        if "\nstorage:" in f"\n{text}" and _OUR_STORAGE not in text:
            return Found(OFF, f"{file} names another storage, which is not looked at", "see the UI's page Deployment")
        if url and _OUR_STORAGE not in text:
            says = f"runs, events and ticks are in SQLite below {home}, although database_url is set"
            return Found(WARNING, says, f"stop Dagster and copy `storage:` from deploy/dagster.yaml into {file}")
        if not url:
            standing = (home / "history" / "runs.db").exists()
            if not standing:
                return Found(OFF, f"nothing yet below {home}", _STARTED)
            return Found(GOOD, f"SQLite below {home}")
        with closing(open_database(url)) as database, database.read() as connection:
            if connection.execute(sa.select(sa.func.to_regnamespace("dagster"))).scalar() is None:
                return Found(OFF, "nothing yet in PostgreSQL", _STARTED)
            runs = connection.execute(sa.select(sa.func.count()).select_from(sa.table("runs", schema="dagster")))
            return Found(GOOD, f"PostgreSQL, schema dagster: {runs.scalar_one():,} runs")


def _apart_us(before_us: int, there_us: int, after_us: int) -> int:
    """How far another clock, that was read between two readings of ours, is at least from it."""
    return max(before_us - there_us, there_us - after_us, 0)


def exit_code(found: list[Diagnosis]) -> int:
    """0 where nothing is wrong, 1 where something is, 3 where a part cannot be used."""
    statuses = {one.status for one in found}
    return 3 if UNAVAILABLE in statuses else 1 if BAD in statuses else 0


def _shown(url: str) -> str:
    """Without what may be secret in it."""
    return f"{urlsplit(url).hostname}:{urlsplit(url).port or ''}".rstrip(":")


def _ask(url: str, body: bytes | None = None) -> Any | None:
    """The JSON that is answered, whatever the status; an empty object for anything else; None where nobody listens."""
    headers = {"content-type": "application/json"} if body is not None else {}
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # as the platform's own clients ask
    try:
        request = urllib.request.Request(url, body, headers)  # noqa: S310  of the configuration
        with direct.open(request, timeout=ANSWER_S) as answer:
            data = answer.read(MAX_ANSWER_BYTES)
    except urllib.error.HTTPError as error:
        data = error.read(MAX_ANSWER_BYTES)
    except http.client.InvalidURL:  # its text may quote a password
        raise _no_address() from None
    except http.client.HTTPException:  # it speaks another protocol
        return {}
    except urllib.error.URLError as error:
        if isinstance(error.reason, ConnectionRefusedError):
            return None
        raise Unavailable(
            f"{_shown(url)} does not answer: {error.reason}", "check that address and port are right"
        ) from None
    except ValueError:
        raise _no_address() from None
    try:
        return dict(json.loads(data))
    except (ValueError, TypeError):
        return {}


def _no_address() -> UsageError:
    return UsageError("its address is no http:// or https:// URL of host and port", "correct it in the configuration")
