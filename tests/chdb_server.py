"""Where tests find ClickHouse: the embedded engine in this process, its bridge in another one, or a server.

chdb allows one folder a process, so a process of tests has one, and each test a database of its own in it.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import clickhouse_connect
from clickhouse_connect.driver.exceptions import OperationalError

from render_platform.clickhouse import ClickHouse, open_clickhouse
from render_platform.clickhouse_connection import FolderLock

SERVER = os.environ.get("CLICKHOUSE_TEST_URL", "")
IMPLEMENTATIONS = ("chdb", "bridge", "server") if SERVER else ("chdb", "bridge")
_run = secrets.token_hex(4)
_numbers = itertools.count(1)


@functools.cache
def shared_clickhouse_path() -> Path:
    """The one chdb folder of this process, removed when the process ends."""
    return _temporary_folder() / "clickhouse"


def shared_dsn() -> str:
    return f"chdb://{shared_clickhouse_path()}"


def dsn_of(implementation: str) -> str:
    """Of one of IMPLEMENTATIONS."""
    if implementation == "bridge":
        return _shared_bridge().dsn
    return SERVER if implementation == "server" else shared_dsn()


def fresh_database() -> str:
    """A database name that no other test has, nor any other run on the same server."""
    return f"t_{_run}_{next(_numbers)}"


def open_fresh(retention_days: int = 0) -> ClickHouse:
    return open_clickhouse(shared_dsn(), fresh_database(), retention_days)


def open_raw(dsn: str, database: str | None = None, **options: Any) -> Any:
    """A client of the driver's own."""
    if not dsn.startswith("chdb:"):
        options["autogenerate_session_id"] = False
    return clickhouse_connect.get_client(dsn=dsn, database=database, **options)


class DyingClient:
    """A client of the driver's own, for use with ClickHouse, that makes `left` changes and then nothing any more.

    Reads are no changes, but fail after them too: what the database holds then is what a killed process leaves.
    """

    def __init__(self, client: Any, left: int = 1_000_000) -> None:
        self.calls = 0
        self._client, self._left = client, left

    def command(self, sql: str, *args: Any, **options: Any) -> Any:
        return self._change(lambda: self._client.command(sql, *args, **options))

    def insert_arrow(self, *args: Any, **options: Any) -> Any:
        return self._change(lambda: self._client.insert_arrow(*args, **options))

    def query_arrow(self, *args: Any, **options: Any) -> Any:
        if self.calls > self._left:
            raise OperationalError("it is dead")
        return self._client.query_arrow(*args, **options)

    @property
    def server_version(self) -> str:
        return str(self._client.server_version)

    def close(self) -> None:
        self._client.close()

    def _change(self, change: Callable[[], Any]) -> Any:
        self.calls += 1
        if self.calls > self._left:
            raise OperationalError("it is dead")
        return change()


class BridgeProcess:
    """A bridge in a process of its own, over `folder`. It answers when this is made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "render_platform.bridge", "--folder", str(folder)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        if not self.url:
            raise AssertionError(self._process.communicate()[1])

    @property
    def dsn(self) -> str:
        return FolderLock.url_file(self.folder).read_text()

    @property
    def pid(self) -> int:
        return self._process.pid

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """The exit status and what it said on stderr; harmless when repeated."""
        if self._process.poll() is None:
            self._process.send_signal(number)
        said = self._process.communicate(timeout=60)[1] if self._process.returncode is None else ""
        return self._process.returncode, said


@contextmanager
def bridge_over(folder: Path) -> Iterator[BridgeProcess]:
    bridge = BridgeProcess(folder)
    try:
        yield bridge
    finally:
        bridge.end(signal.SIGKILL)


@functools.cache
def _shared_bridge() -> BridgeProcess:
    bridge = BridgeProcess(_temporary_folder() / "clickhouse")
    atexit.register(bridge.end)
    return bridge


def _temporary_folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="render-platform-chdb-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path
