"""The Dagster instance inside a state folder, and running jobs on it in this process."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import dagster as dg

from assets.jobs import HOURS, IN_PROGRESS, START, hour_key, ranges, tags_of
from render_platform.clock import iso
from render_platform.config import Settings
from render_platform.errors import Unavailable, UsageError
from render_platform.up import only_one

DAGSTER_YAML = """\
telemetry: {enabled: false}
nux: {enabled: false}
storage: {custom: {module: render_platform_dagster, class: PlatformStorage}}
concurrency:
  pools: {default_limit: 1, granularity: op}
  runs:
    max_concurrent_runs: 3
    tag_concurrency_limits:
      - {key: dagster/backfill, limit: 1}
      - {key: render_platform/reconciles, limit: 1}
run_queue: {dequeue_interval_seconds: 1}
run_retries: {enabled: true, max_retries: 2, retry_on_asset_or_op_failure: false}
run_monitoring: {enabled: true, poll_interval_seconds: 10, free_slots_after_run_end_seconds: 20}
"""
LOCAL_TAG = "render_platform/local"
UP = "render_platform/up"
"""Whose the newest `up` over this storage is."""
LAUNCHED = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]
ENDED = "the process that ran it ended"
_QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


def _prepare_home(settings: Settings) -> Path:
    """The DAGSTER_HOME of a state folder, with its dagster.yaml; a file that stands already is left as it is."""
    home = settings.dagster_home
    home.mkdir(parents=True, exist_ok=True)
    config = home / "dagster.yaml"
    if not config.exists():
        config.write_text(DAGSTER_YAML)
    return home


class LocalDagster:
    """Runs the code location's jobs in this process, recorded in the state folder's instance.

    One process a state folder: the lock is the kernel's, so that it ends with its process, however that ends. Other
    folders may share the storage, where it is PostgreSQL: their runs are theirs.
    """

    def __init__(self, settings: Settings) -> None:
        home = _prepare_home(settings)
        os.environ["RENDER_PLATFORM_STATE_DIR"] = str(settings.state_dir)
        os.environ["RENDER_PLATFORM_DATABASE_URL"] = settings.database_url  # runs and storage read their own settings
        os.environ["DAGSTER_HOME"] = str(home)
        self._here, self._shared = f"{socket.gethostname()}:{settings.state_dir}", bool(settings.database_url)
        self._lock = (home / "local.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise Unavailable(f"another process works in {settings.state_dir}", "let it finish, or end it") from None
        self._instance = dg.DagsterInstance.from_config(str(home))
        self._end_orphans(home / "up.lock")

    def _end_orphans(self, up_lock: Path) -> None:
        """Runs of a process that was killed would stay in progress, and keep their pool's slot, for ever.

        Those of this process's forerunners; and, where no `up` holds its lock, those that an `up` launched: nothing
        that it started outlives it. What is queued stays queued, and what somebody runs in a shell is theirs.
        """
        self._end(self._instance.get_runs(dg.RunsFilter(statuses=IN_PROGRESS, tags={LOCAL_TAG: self._here})))
        if self._shared and self._instance.run_storage.get_cursor_values({UP}).get(UP) != self._here:
            return  # what another folder's daemon launched
        with suppress(Unavailable), only_one(up_lock):
            launched = self._instance.get_runs(dg.RunsFilter(statuses=LAUNCHED))
            self._end(run for run in launched if run.remote_job_origin)  # a shell's run has none

    def _end(self, runs: Iterable[dg.DagsterRun]) -> None:
        for run in runs:
            if run.status == dg.DagsterRunStatus.CANCELING:  # somebody wanted its end: no retry
                self._instance.report_run_canceled(run, ENDED)
            else:
                self._instance.report_run_failed(run, ENDED)
            self._instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)

    def check_hours(self, hours_us: Sequence[int]) -> None:
        """UsageError where an hour is not one of the code location's partitions."""
        for hour in hours_us:
            if not HOURS.has_partition_key(hour_key(hour)):
                raise UsageError(
                    f"{iso(hour)} is not a partition", f"partitions begin at {START} and end with the current hour"
                )

    def flush(self) -> None:
        self._run("flush", {})

    def reconcile(self, hours_us: Sequence[int]) -> None:
        self._run_hours("reconcile", hours_us)

    def repair(self, hours_us: Sequence[int]) -> None:
        self._run_hours("repair", hours_us)

    def begin_up(self) -> None:
        """What is launched from now on is this folder's `up`'s."""
        self._instance.run_storage.set_cursor_values({UP: self._here})

    def close(self) -> None:
        self._instance.dispose()
        self._lock.close()

    def _run_hours(self, job: str, hours_us: Sequence[int]) -> None:
        for first, last in ranges(hours_us):
            self._run(job, tags_of(first, last))

    def _run(self, job: str, tags: dict[str, str]) -> None:
        from definitions import defs  # here: `up` ends orphans without loading the code location

        result = defs.resolve_job_def(job).execute_in_process(
            instance=self._instance, tags={**tags, LOCAL_TAG: self._here}, run_config=_QUIET, raise_on_error=False
        )
        if not result.success:
            failures = [e.step_failure_data.error for e in result.all_events if e.is_step_failure]
            said = "; ".join(str(f.cause.message if f and f.cause else f and f.message).strip() for f in failures)
            raise Unavailable(f"the Dagster run {result.run_id} of {job} failed: {said}", "see it in the Dagster UI")
