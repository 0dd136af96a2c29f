"""The main job: a trace replayed through both paths, a loss found, repaired, and all of it verified.

The order is a production day's: events are recorded and sent to ClickHouse as they come, flushed in Dagster meanwhile,
and reconciled when their hours are closed. What is special here: one customer loses some fast-path events on purpose.

A replay turns each simulated job of a trace into a usage event in the outbox, in a lane of its own. A run's `next_row`
advances in the transaction that inserts its rows: a run that was stopped goes on where it was, and no row is recorded
twice. The schedule is a pure function of the trace, so that GPU times do not depend on the stops.

    replaying ──▶ replayed ──▶ finished
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import sqlalchemy as sa

from render_platform import canonical
from render_platform.clock import HOUR_US, US_PER_SECOND, Clock, Ids, hour_of, iso, uuid7
from render_platform.database import Database, batches, runs
from render_platform.errors import UsageError
from render_platform.events import UsageEvent, table_from_events
from render_platform.evidence import Progress, Verification
from render_platform.fast_path import FastPath
from render_platform.outbox import Outbox
from render_platform.pipeline import Platform
from render_platform.simulated import SimulatedRun, simulate
from render_platform.trace_formats import TraceFormat
from render_platform.traces import Trace

ISSUER = "trace"
LOSE_ONE_IN = 10
"""Of the events of the customer with the most jobs: far above the threshold of one in a thousand."""


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


class Stages(Protocol):
    """Runs the code location's jobs; each returns when its run has succeeded, and raises where it failed."""

    def check_hours(self, hours_us: Sequence[int]) -> None: ...
    def flush(self) -> None: ...
    def reconcile(self, hours_us: Sequence[int]) -> None: ...
    def repair(self, hours_us: Sequence[int]) -> None: ...


class Counted(NamedTuple):
    """One figure, read independently in three places."""

    outbox: int
    cas: int
    clickhouse: int

    @property
    def equal(self) -> bool:
        return self.outbox == self.cas == self.clickhouse


@dataclass(frozen=True, slots=True)
class HourStory:
    """An hour's statuses before and after the repair, and what was missing, by customer."""

    hour_us: int
    before: str
    after: str
    events: int
    missing: dict[str, int]


@dataclass(frozen=True, slots=True)
class Story:
    run: Run
    trace: Trace
    lost_on_purpose: int
    lossy_customer: str
    events: Counted
    gpu_time_ns: Counted
    batches: int
    hours: tuple[HourStory, ...]
    verification: Verification
    unfinished: tuple[str, ...] = ()
    """Traces of other runs that were stopped: their hours stay pending until they are run again."""

    @property
    def pending(self) -> bool:
        return any(hour.after == "pending" for hour in self.hours)

    @property
    def good(self) -> bool:
        reconciled = all(hour.after == "reconciled" for hour in self.hours)
        return reconciled and self.verification.verified and self.events.equal and self.gpu_time_ns.equal

    def as_json(self) -> dict[str, Any]:
        checkpoint = self.verification.checkpoint
        return {
            "events": self.events._asdict(),
            "gpu_time_ns": self.gpu_time_ns._asdict(),
            "batches": self.batches,
            "log_size": checkpoint.size if checkpoint else 0,
            "root": checkpoint.root.hex() if checkpoint else None,
            "hours": [{"hour": iso(h.hour_us), "before": h.before, "after": h.after} for h in self.hours],
            "verified": self.verification.verified,
            "run_id": self.run.run_id,
            "resumed": self.run.resumed,
            "unfinished_traces": list(self.unfinished),
            "lost_on_purpose": self.lost_on_purpose,
            "trace": {"path": self.trace.path, "sha256": self.trace.digest, "rows": len(self.trace.jobs)},
            "bad_rows": [{"line": bad.line, "reason": bad.reason} for bad in self.trace.bad_rows],
        }


class Demo:
    def __init__(self, platform: Platform, stages: Stages, progress: Progress) -> None:
        self._platform = platform
        self._stages = stages
        self._progress = progress
        self._replay = Replay(platform.database, platform.outbox, platform.clock, platform.ids)
        self._fast_path = FastPath(
            platform.clickhouse, platform.clock, deadline_s=platform.settings.fast_path_deadline_s
        )

    def run(self, trace: Trace) -> Story:
        """Run the main job over `trace`; an unfinished run of it is resumed. Stopped anywhere, it can be run again."""
        schedule = simulate(trace)
        if not schedule:
            raise UsageError(f"{trace.path}: no row can be read", "see the rows that are reported, and their reasons")
        hours = sorted({hour_of(job.finished_us) for job in schedule})
        self._stages.check_hours(hours)
        run = self._replay.open_run(trace, schedule[0].finished_us, hours[-1] + HOUR_US)
        lossy, lost = _losses(schedule)
        if run.state == "replaying":
            self._replay_rows(run, trace, schedule, lost)
            self._replay.close_lane(run, self._platform.settings.fast_path_deadline_s)
        stories = self._settle(hours)
        self._progress("verify", 0, 1)
        verification = self._platform.verify(deep=True, progress=self._progress)
        story = self._tell(run, trace, (lossy, len(lost)), stories, verification)
        # A crash before this: the next call tells the story of this run again. After it: it begins a new run.
        if not story.pending:
            self._replay.finish(run)
        return story

    def _replay_rows(self, run: Run, trace: Trace, schedule: Sequence[SimulatedRun], lost: set[int]) -> None:
        group = min(2_000, max(50, len(schedule) // 40))
        flush_every = min(self._platform.settings.batch_rows, max(500, len(schedule) // 4))
        at, unflushed = run.next_row, 0
        while at < len(schedule):
            jobs = schedule[at : at + group]
            rows = self._replay.advance(run, at, trace, jobs)
            self._fast_path.publish(rows.filter([at + n not in lost for n in range(len(jobs))]))
            at, unflushed = at + len(jobs), unflushed + len(jobs)
            self._progress("replay", at, len(schedule))
            if unflushed >= flush_every:
                self._stages.flush()
                unflushed = 0

    def _settle(self, hours: list[int]) -> tuple[HourStory, ...]:
        """Flush what is left, reconcile the closed hours, repair what is missing, and reconcile again."""
        self._progress("flush", 0, 1)
        self._stages.flush()
        self._progress("reconcile", 0, len(hours))
        self._stages.reconcile(hours)
        before = {hour: self._report(hour) for hour in hours}
        wanting = [hour for hour in hours if before[hour].get("findings")]
        self._progress("repair", 0, len(wanting))
        if wanting:
            self._stages.repair(wanting)
        names = self._platform.outbox.names()
        return tuple(self._hour(hour, names, before[hour], self._report(hour)) for hour in hours)

    def _report(self, hour_us: int) -> dict[str, Any]:
        last = self._platform.hours.last_report(hour_us)
        return canonical.decode(self._platform.cas.get(last.digest)) if last else {"status": "pending"}

    @staticmethod
    def _hour(hour_us: int, names: dict[str, str], before: dict[str, Any], after: dict[str, Any]) -> HourStory:
        missing: Counter[str] = Counter()
        for finding in before.get("findings", []):
            missing[names.get(finding["customer_ref"], finding["customer_ref"])] += finding["counts"]["missing"]
        events = sum(window["events"] for window in after.get("windows", []))
        return HourStory(hour_us, before["status"], after["status"], events, dict(missing))

    def _tell(
        self,
        run: Run,
        trace: Trace,
        lost: tuple[str, int],
        hours: tuple[HourStory, ...],
        verification: Verification,
    ) -> Story:
        outbox = self._platform.outbox.totals(run.source)
        cas = self._platform.slow.totals([hour.hour_us for hour in hours], run.source)
        clickhouse = self._platform.clickhouse.totals(run.source)
        with self._platform.database.read() as connection:
            count = sa.select(sa.func.count()).where(batches.c.lane == run.lane, batches.c.type == "usage_batch")
            batch_count = int(connection.execute(count).scalar_one())
        return Story(
            run=run,
            trace=trace,
            lossy_customer=lost[0],
            lost_on_purpose=lost[1],
            events=Counted(outbox.events, cas.events, clickhouse.events),
            gpu_time_ns=Counted(outbox.gpu_time_ns, cas.gpu_time_ns, clickhouse.gpu_time_ns),
            batches=batch_count,
            hours=hours,
            verification=verification,
            unfinished=tuple(self._replay.unfinished()),
        )


def _losses(schedule: Sequence[SimulatedRun]) -> tuple[str, set[int]]:
    """Whose fast path loses events, and which rows of the schedule: the same on every run of the trace."""
    customer = Counter(job.client for job in schedule).most_common(1)[0][0]
    theirs = [number for number, job in enumerate(schedule) if job.client == customer]
    return customer, set(theirs[::LOSE_ONE_IN])
