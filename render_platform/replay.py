"""Replaying a trace: each simulated job becomes a usage event in the outbox, in a lane of its own.

A run's `next_row` advances in the transaction that inserts its rows: a run that was stopped goes on where it was, and
no row is recorded twice. The schedule is a pure function of the trace, so that GPU times do not depend on the stops.

    replaying ──▶ replayed ──▶ finished
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import sqlalchemy as sa

from render_platform.clock import HOUR_US, US_PER_SECOND, Clock, Ids, hour_of, uuid7
from render_platform.database import Database, runs
from render_platform.errors import UsageError
from render_platform.events import UsageEvent, table_from_events
from render_platform.outbox import Outbox
from render_platform.simulated import SimulatedRun
from render_platform.trace_formats import TraceFormat
from render_platform.traces import Trace

ISSUER = "trace"


@dataclass(frozen=True, slots=True)
class Run:
    """One pass of one trace. `source` stands in each of its events."""

    run_id: str
    lane: str
    next_row: int
    state: str
    resumed: bool

    @property
    def source(self) -> str:
        return self.lane


class Replay:
    def __init__(self, database: Database, outbox: Outbox, clock: Clock, ids: Ids) -> None:
        self._database = database
        self._outbox = outbox
        self._clock = clock
        self._ids = ids

    def open_run(self, trace: Trace, start_us: int, end_us: int) -> Run:
        """The unfinished run of this very trace, or a new one, whose lane has the hours of [start, end)."""
        with self._database.write() as connection:
            row = connection.execute(
                sa.select(runs).where(runs.c.trace_digest == trace.digest, runs.c.state != "finished")
            ).one_or_none()
            if row is not None:
                return Run(row.run_id, row.lane, row.next_row, row.state, resumed=True)
            run_id = str(uuid7(self._clock.now_us(), self._ids))
            lane = f"trace/{run_id}"
            connection.execute(
                runs.insert().values(
                    run_id=run_id,
                    trace_digest=trace.digest,
                    trace_path=trace.path,
                    lane=lane,
                    next_row=0,
                    state="replaying",
                )
            )
            self._outbox.open_lane(connection, lane, start_us, end_us)
        return Run(run_id, lane, 0, "replaying", resumed=False)

    def unfinished(self) -> list[str]:
        """The traces of runs that were stopped: until they are run again, hours that they reach into stay pending."""
        with self._database.read() as connection:
            query = sa.select(runs.c.trace_path).where(runs.c.state == "replaying").order_by(runs.c.run_id)
            return [str(path) for path in connection.execute(query).scalars()]

    def advance(self, run: Run, at: int, trace: Trace, jobs: Sequence[SimulatedRun]) -> pa.Table:
        """Record the run's jobs from row `at` of its schedule on, and give their rows as committed.

        One transaction: the events and `next_row`. A crash before its commit: the same jobs come again. After it: they
        are recorded, and their fast path is lost, as it would be in production; reconciliation finds and repairs it.
        """
        with self._database.write() as connection:
            moved = connection.execute(
                runs.update().where(runs.c.run_id == run.run_id, runs.c.next_row == at).values(next_row=at + len(jobs))
            )
            if moved.rowcount != 1:
                raise UsageError("another process replays this run", "let one of them finish")
            refs = {c: self._outbox.customer_ref(connection, ISSUER, c) for c in sorted({job.client for job in jobs})}
            events = [self._event(run, trace.format_of(job.job), job, refs[job.client]) for job in jobs]
            recorded = self._outbox.record(connection, run.lane, events)
        return table_from_events(recorded)

    def close_lane(self, run: Run, deadline_s: int) -> None:
        """The trace is at its end: move its clock past the last window and the fast path's deadline."""
        with self._database.write() as connection:
            frontier = self._outbox.frontier(connection, run.lane)
            self._outbox.finish_lane(connection, run.lane, hour_of(frontier) + HOUR_US + deadline_s * US_PER_SECOND)
            self._set_state(connection, run, "replayed")

    def finish(self, run: Run) -> None:
        with self._database.write() as connection:
            self._set_state(connection, run, "finished")

    @staticmethod
    def _set_state(connection: sa.Connection, run: Run, state: str) -> None:
        connection.execute(runs.update().where(runs.c.run_id == run.run_id).values(state=state))

    def _event(self, run: Run, form: TraceFormat, done: SimulatedRun, customer_ref: str) -> UsageEvent:
        job = done.job
        return UsageEvent(
            event_id=uuid7(done.finished_us, self._ids),
            nonce=self._ids.random(16),
            source=run.source,
            gateway_id="replay",
            request_id=uuid7(job.arrival_us, self._ids),
            job_id=uuid7(job.arrival_us, self._ids),
            attempt=1,
            gpu_started_at=done.started_us,
            event_time=done.finished_us,
            recorded_at=done.finished_us,
            customer_ref=customer_ref,
            pricing_tier=done.pricing_tier,
            model_family=form.model_family,
            model_name=form.model_name,
            model_type=form.model_type,
            modality=job.modality,
            task=form.task,
            input_tokens=job.input_tokens,
            output_tokens=job.output_tokens,
            input_dims=None,
            num_steps=job.num_steps,
            image_count=job.image_count,
            queue_time_us=done.started_us - job.arrival_us,
            inference_time_us=done.finished_us - done.started_us,
            total_time_us=done.finished_us - job.arrival_us,
            gpu_time_ns=done.gpu_time_ns,
            gpu_count=1,
            device_uuid=done.device_uuid,
            batch_size=done.batch_size,
            energy_mj=None,
            meter="simulated",
            status=job.status,
            error_code=None if job.status == "success" else "trace_reported",
        )
