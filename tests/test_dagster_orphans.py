"""What `up` left in progress when all of it was killed: the next one ends it, so that it is asked for again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import dagster as dg
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin
from dagster._core.storage.tags import WILL_RETRY_TAG

from assets.jobs import SEQUENCER
from definitions import defs
from render_platform import up
from render_platform.config import load_settings
from resources.local import LocalDagster
from tests.commands import restored_process
from tests.homes import give_home, open_instance

ORIGIN = RemoteJobOrigin(
    RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("definitions.py"), "__repository__"), "flush"
)
"""Of what a daemon or the UI launched."""
LEFT = [
    ("STARTING", ORIGIN, "FAILURE"),
    ("STARTED", ORIGIN, "FAILURE"),
    ("CANCELING", ORIGIN, "CANCELED"),
    ("QUEUED", ORIGIN, "QUEUED"),
    ("STARTED", None, "STARTED"),
]
"""Runs, and what becomes of them. The last one is a shell's own, which may be at work."""


def statuses(instance: dg.DagsterInstance, runs: Iterable[dg.DagsterRun]) -> list[str]:
    found = (instance.get_run_by_id(run.run_id) for run in runs)
    return [run.status.value for run in found if run]


def test_runs_of_an_up_that_was_killed_are_ended_by_the_next(tmp_path: Path) -> None:
    """Its daemon knows nothing of their processes: nobody else would ever end them, or free their slots."""
    settings = load_settings(environ={}, state_dir=tmp_path)
    give_home(settings.dagster_home)
    job = defs.resolve_job_def("flush")
    with open_instance(settings.dagster_home) as instance, restored_process():
        log = instance.event_log_storage
        log.set_concurrency_slots(SEQUENCER, 2)
        starting, started, _, _, own = runs = [
            instance.create_run_for_job(job, status=dg.DagsterRunStatus(status), remote_job_origin=origin)
            for status, origin, _ in LEFT
        ]
        for run in (started, own):
            assert log.claim_concurrency_slot(SEQUENCER, run.run_id, "audit_log").is_claimed
        with up.only_one(settings.dagster_home / "up.lock"):
            LocalDagster(settings).close()
        assert statuses(instance, runs) == [before for before, _, _ in LEFT], "an `up` is at work"
        LocalDagster(settings).close()
        assert statuses(instance, runs) == [after for _, _, after in LEFT]
        assert log.get_concurrency_info(SEQUENCER).active_run_ids == {own.run_id}
        retried = instance.get_runs(dg.RunsFilter(tags={WILL_RETRY_TAG: "true"}))
        assert {run.run_id for run in retried} == {starting.run_id, started.run_id}
