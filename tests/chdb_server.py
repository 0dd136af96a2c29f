"""The embedded ClickHouse of a test process: one path (chdb allows no second), one database a test."""

from __future__ import annotations

import atexit
import functools
import itertools
import shutil
import tempfile
from pathlib import Path

from render_platform.clickhouse import ClickHouse, open_clickhouse

_numbers = itertools.count(1)


@functools.cache
def shared_clickhouse_path() -> Path:
    """The one chdb folder of this process, removed when the process ends."""
    path = Path(tempfile.mkdtemp(prefix="render-platform-chdb-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def shared_dsn() -> str:
    return f"chdb://{shared_clickhouse_path()}"


def fresh_database() -> str:
    """A database name that no other test of this process has."""
    return f"t_{next(_numbers)}"


def open_fresh(retention_days: int = 0) -> ClickHouse:
    return open_clickhouse(shared_dsn(), fresh_database(), retention_days)
