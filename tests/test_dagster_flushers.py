"""Flushes that run at once, with no pool of Dagster's between them: by the database alone they make one log.

This module is the code location as well: the flush under the multiprocess executor, where each step is a process.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import dagster as dg
import sqlalchemy as sa
import yaml  # type: ignore[import-untyped]

from assets.jobs import FRESHNESS
from definitions import defs
from render_platform.clock import US_PER_SECOND, SystemClock
from render_platform.database import batches, log_entries
from resources.local import DAGSTER_YAML
from tests.commands import CHECKOUT, clean_environment, run_inside
from tests.homes import open_instance
from tests.platforms import LIVE, make_platform, record
from tests.test_dagster_layer import sound_events

EVENTS, BATCH_ROWS = 2_000, 50
FLUSHERS = 2

flush_apart = dg.define_asset_job(
    "flush_apart",
    selection=dg.AssetSelection.assets("sealed_batches", "cas_batches", "audit_log") - FRESHNESS,
    executor_def=dg.multiprocess_executor,
)
location = dg.Definitions(
    assets=defs.assets, asset_checks=defs.asset_checks, jobs=[flush_apart], resources=defs.resources
)


def make_state(state: Path, rng: random.Random, **options: str) -> Path:
    """Events of the last minute, which wait for a flush; and Dagster's folder, without settings yet."""
    clock = SystemClock()
    begun, span = clock.now_us() - 60 * US_PER_SECOND, 30 * US_PER_SECOND
    with closing(make_platform(state, clock, **options)) as platform:
        record(platform, LIVE, sound_events(rng, EVENTS, begun, span))
    (state / "dagster").mkdir()
    return state


def variables(options: Mapping[str, str]) -> dict[str, str]:
    return {f"RENDER_PLATFORM_{name.upper()}": value for name, value in options.items()}


def flushes_of(instance: dg.DagsterInstance) -> list[dg.RunRecord]:
    """A daemon may start other jobs meanwhile."""
    return [record for record in instance.get_run_records() if record.dagster_run.job_name.startswith("flush")]


def worked_at_once(instance: dg.DagsterInstance) -> bool:
    """Whether a run began before the one before it had ended."""
    times = sorted((record.start_time or 0, record.end_time or 0) for record in flushes_of(instance))
    return any(later < end for (_, end), (later, _) in pairwise(times))


def check_flushed(state: Path, instance: dg.DagsterInstance, **options: str) -> None:
    """Each run has succeeded; each event is in one batch, and each batch once in the log."""
    runs = [record.dagster_run for record in flushes_of(instance)]
    failed = [run.run_id for run in runs if run.is_failure_or_canceled]
    why = [
        str(entry.dagster_event and entry.dagster_event.step_failure_data.error)
        for run_id in failed
        for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_FAILURE)
    ]
    assert not failed, why
    outcome = run_inside("verify", "--deep", "--state", state, env=variables(options))
    assert outcome.code == 0, outcome.said
    with (
        closing(make_platform(state, SystemClock(), "again", **options)) as platform,
        platform.database.read() as connection,
    ):
        kinds = Counter(connection.execute(sa.select(log_entries.c.type)).scalars())
        rows = connection.execute(sa.select(batches.c.state).where(batches.c.type == "usage_batch")).scalars().all()
        assert platform.outbox.totals().events == EVENTS
    assert kinds["usage_batch"] == len(rows) >= EVENTS // BATCH_ROWS
    assert set(rows) == {"published"}


def test_flushes_of_the_multiprocess_executor_at_once_make_one_log(tmp_path: Path, rng: random.Random) -> None:
    state = make_state(tmp_path / "state", rng)
    settings = yaml.safe_load(DAGSTER_YAML)
    settings["concurrency"]["pools"]["default_limit"] = 2 * FLUSHERS
    (state / "dagster/dagster.yaml").write_text(yaml.safe_dump(settings))
    told = {
        "DAGSTER_HOME": str(state / "dagster"),
        "RENDER_PLATFORM_STATE_DIR": str(state),
        "RENDER_PLATFORM_BATCH_ROWS": str(BATCH_ROWS),
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-m", "dagster", "job", "execute", "-m", __name__, "-a", "location", "-j", "flush_apart"]
    with open_instance(state / "dagster") as instance:  # its tables are made once
        runs = [
            subprocess.Popen(command, cwd=CHECKOUT, env=clean_environment(told), stderr=subprocess.DEVNULL)
            for _ in range(FLUSHERS)
        ]
        try:
            assert [run.wait(600) for run in runs] == [0] * FLUSHERS
        finally:
            for run in runs:
                run.kill()
        check_flushed(state, instance)
        assert worked_at_once(instance)
        assert len(flushes_of(instance)) == FLUSHERS
