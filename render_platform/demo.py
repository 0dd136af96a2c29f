"""The main job: a trace replayed through both paths, a loss found, repaired, and all of it verified.

The order is a production day's: events are recorded and sent to ClickHouse as they come, flushed in Dagster meanwhile,
and reconciled when their hours are closed. What is special here: one customer loses some fast-path events on purpose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import sqlalchemy as sa

from render_platform import canonical
from render_platform.clock import HOUR_US, hour_of, iso
from render_platform.database import batches
from render_platform.errors import UsageError
from render_platform.evidence import Progress, Verification
from render_platform.fast_path import FastPath
from render_platform.pipeline import Platform
from render_platform.replay import Replay, Run
from render_platform.simulated import SimulatedRun, simulate
from render_platform.traces import Trace

LOSE_ONE_IN = 10
"""Of the events of the customer with the most jobs: far above the threshold of one in a thousand."""


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
