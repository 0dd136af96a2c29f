"""A DAGSTER_HOME made once: Dagster takes longer to make its tables than most tests take."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.storage.runs.schema import RunsTable
from dagster._core.storage.runs.sql_run_storage import SqlRunStorage

from render_platform.config import Settings, load_settings
from resources.local import LocalDagster
from tests.commands import restored_process


@functools.cache
def _empty_home() -> Path:
    """What the product makes where nothing has run."""
    state = Path(tempfile.mkdtemp(prefix="render-platform-home-"))
    atexit.register(shutil.rmtree, state, ignore_errors=True)
    with restored_process():
        settings = load_settings(environ={}, state_dir=state)
        LocalDagster(settings).close()
    return settings.dagster_home


def give_home(path: Path) -> None:
    """A copy of it at `path`, where there is none yet."""
    if not path.exists():
        shutil.copytree(_empty_home(), path)


def open_instance(home: Path, **variables: str) -> dg.DagsterInstance:
    """As Dagster's programs open it: its storage is where their variables say."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RENDER_PLATFORM_")]:
            patch.delenv(name)  # of what this process has opened meanwhile
        for name, value in {"DAGSTER_HOME": str(home), **variables}.items():
            patch.setenv(name, value)
        return dg.DagsterInstance.from_config(str(home))


def database_of(settings: Settings) -> dict[str, str]:
    return {"RENDER_PLATFORM_DATABASE_URL": settings.database_url}


def age_runs(instance: dg.DagsterInstance, by: timedelta) -> None:
    """As if nothing had been heard of them for so long."""
    storage = instance.run_storage
    assert isinstance(storage, SqlRunStorage)
    with storage.connect() as connection:
        before = (datetime.now(UTC) - by).replace(tzinfo=None)
        connection.execute(RunsTable.update().values(update_timestamp=before))
