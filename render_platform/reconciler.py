"""The fast path against the slow one: the verdict on an hour, logged where it is final; and its repair.

What is missing is inserted. Where anything else differs, the whole UTC day is rebuilt from its batches, once it is
closed; until then a repair says from when on it can be. Rows of the current hour's open windows are never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import NamedTuple

import duckdb
import sqlalchemy as sa
import structlog

from render_platform.audit_log import AuditLog, Mark
from render_platform.canonical import digest_of
from render_platform.cas import Cas
from render_platform.clickhouse import ClickHouse, ReportRow
from render_platform.clock import DAY_US, HOUR_US, US_PER_SECOND, WINDOW_US, Clock, iso
from render_platform.config import Settings
from render_platform.database import Database
from render_platform.entries import FIRST_PREVIOUS, AuditEntry
from render_platform.errors import Finding, Unavailable
from render_platform.events import Key, Totals
from render_platform.hours import Hours, mark_dirty, mark_reported, mark_unchanged
from render_platform.reconciliation import (
    HourReport,
    KeyFigures,
    RowDiff,
    build_report,
    compare,
    diff_rows,
    unavailable_report,
)
from render_platform.repair import PLANNED, REBUILDING, Plan, Repairs, require_closed
from render_platform.slow_path import SlowPath

DuckDB = Callable[[], AbstractContextManager[duckdb.DuckDBPyConnection]]
_log = structlog.get_logger()
_REBUILT = ("duplicated", "altered", "unexpected")
"""Causes that only a rebuild takes away."""
_UNRECORDED = "ClickHouse holds rows of this hour, and no lane recorded into it"
MAX_IDS_A_PASS = 100_000
"""Rows that one pass of an insert holds; it is repeated until nothing is missing."""


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """What a repair of an hour would do, and the report that this was decided by."""

    report: HourReport
    insert: int = 0
    """Events that are missing."""
    rebuild: bool = False
    """The hour's whole day, raw rows and rollups."""
    rollup: bool = False
    """The hour's rollup, from its raw rows."""
    unfinished: str = ""
    """The id of a repair that was cut off, which is finished first."""
    refused: str = ""
    """Why not all that differs can be repaired, and from when on it can."""

    @property
    def way(self) -> str:
        """rebuild | insert | rollup | nothing. An insert mends the rollup as well."""
        if self.rebuild:
            return "rebuild"
        if self.insert or self.unfinished:
            return "insert"
        return "rollup" if self.rollup else "nothing"


@dataclass(frozen=True, slots=True)
class RepairOutcome:
    """How many rows were inserted, the report of the hour before and after, and the plan's `way` and `refused`."""

    inserted: int
    before: HourReport
    after: HourReport
    way: str = "nothing"
    refused: str = ""


Reading = tuple[list[KeyFigures], dict[Key, RowDiff]]
"""What both sides say of each key, and the rows that differ."""


class Evidenced(NamedTuple):
    """The slow path: what is read, and where reports and repairs are kept."""

    cas: Cas
    log: AuditLog
    slow: SlowPath


class Reconciler:
    """`open_clickhouse` is called on first use, and gives the same one each time."""

    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        database: Database,
        evidence: Evidenced,
        hours: Hours,
        repairs: Repairs,
        open_clickhouse: Callable[[], ClickHouse],
        duckdb_connect: DuckDB,
    ) -> None:
        self.settings, self.clock, self.database = settings, clock, database
        self.cas, self.log, self.slow = evidence
        self.hours, self.repairs = hours, repairs
        self._open_clickhouse, self._duckdb_connect = open_clickhouse, duckdb_connect

    @property
    def clickhouse(self) -> ClickHouse:
        return self._open_clickhouse()

    def reconcile(self, hour_us: int) -> HourReport:
        """The verdict on one hour. Logged where it is final and says something new; harmless to repeat.

        Also told to ClickHouse, for dashboards, as far as that can be reached.
        """
        with suppress(Unavailable):  # the report says so
            self.clickhouse.make_ready()  # it is going to hold the verdict
        report = self._reconcile(hour_us)
        if report.status == "pending" and not self.hours.known(hour_us, hour_us + HOUR_US):
            with suppress(Unavailable):  # it stays pending, whatever ClickHouse holds
                held = self.clickhouse.hours_with_rows(hour_us, hour_us + HOUR_US)
                report = replace(report, error=_UNRECORDED) if held else report
        try:
            self.clickhouse.record_report(ReportRow(**report.told(), reported_at_us=self.clock.now_us()))
        except Unavailable as error:
            _log.warning("report_not_in_clickhouse", hour=iso(hour_us), error=str(error))
        return report

    def unrecorded(self) -> list[int]:
        """Hours of which ClickHouse holds rows and the slow path nothing: neither events nor that there are none."""
        self.clickhouse.make_ready()
        known = set(self.hours.known())
        return [hour for hour in self.clickhouse.hours_with_rows() if hour not in known]

    def expired(self, hour_us: int) -> bool:
        """Whether ClickHouse no longer keeps the hour."""
        return hour_us < self.kept_from()

    def kept_from(self) -> int:
        """The time from which on ClickHouse keeps rows; 0: from the first."""
        days = self.settings.retention_days
        return self.clock.now_us() - days * DAY_US if days else 0

    def _reconcile(self, hour_us: int) -> HourReport:
        report, entries = self._judge(hour_us)
        if not report.final:
            return report
        last = self.hours.last_report(hour_us)
        if last is not None:
            if last.digest == digest_of(report.to_bytes()):
                with self.database.write() as connection:
                    mark_unchanged(connection, hour_us, len(entries))
                return report
            report = replace(report, revision=last.revision + 1)
        if not self._log_report(report, entries):
            return self._reconcile(hour_us)  # another process reported the hour meanwhile, and it saw something else
        return report

    def plan(self, hour_us: int) -> RepairPlan:
        """What `repair` would do now. Writes neither SQL nor ClickHouse nor the log."""
        return self._planned(self._judge(hour_us)[0])

    def _planned(self, report: HourReport) -> RepairPlan:
        hour_us = report.hour_us
        if report.status == "unavailable":
            return RepairPlan(report, refused=report.error)
        if report.status == "pending" and not self.hours.covered(hour_us):
            unknown = f"no lane ever recorded into {iso(hour_us)[:13]}h: nothing says what it holds"
            return RepairPlan(report, refused=unknown)
        day_us, refused = _day_of(hour_us), ""
        unfinished = self.repairs.unfinished(day_us, REBUILDING)
        if unfinished or any(report.count(cause) for cause in _REBUILT):
            try:
                self._rebuildable(day_us)
                return RepairPlan(report, rebuild=True, unfinished=unfinished)
            except Unavailable as error:
                refused = str(error)
        return RepairPlan(
            report,
            insert=report.count("missing"),
            rollup=not report.rollup_equal,
            unfinished=self.repairs.unfinished(hour_us, PLANNED),
            refused=refused,
        )

    def repair(self, hour_us: int) -> RepairOutcome:
        """Make ClickHouse hold the hour as the slow path has it, log that, and reconcile again.

        Raises Unavailable where a side cannot be read, or ClickHouse does not keep what it was given; Finding where a
        batch is not what the log says. What may not be repaired yet stays: `refused` says why, and the report after it
        is still discrepant.
        """
        before = _readable(self.reconcile(hour_us))
        plan = self._planned(before)
        if plan.way == "nothing":
            return RepairOutcome(0, before, before, plan.way, plan.refused)
        if plan.rebuild:
            self._rebuild(_day_of(hour_us))
            return RepairOutcome(0, before, self.reconcile(hour_us), plan.way)
        inserted, report = 0, before
        while (step := self._next_insert(report)) is not None:
            rows, then = self._insert(step)
            inserted += rows
            if not (rows or step.resumed or _left(then) < _left(report)):
                raise Unavailable(f"the repair of {iso(hour_us)} made no progress", "run it again")
            report = then
        return RepairOutcome(inserted, before, self.reconcile(hour_us), plan.way, plan.refused)

    def _next_insert(self, report: HourReport) -> Plan | None:
        return self.repairs.plan(report.hour_us, report.missing[:MAX_IDS_A_PASS], rollup=not report.rollup_equal)

    def _insert(self, plan: Plan) -> tuple[int, HourReport]:
        """Insert what a plan names, mend the rollup, log it. Gives the number of rows, and the hour as it is then."""
        hour_us = plan.hour_us
        now = _readable(self._judge(hour_us)[0])  # after the plan is committed: what another repair inserted is seen
        rows = self.slow.rows_by_id(self.slow.hour(hour_us), plan.event_ids)
        if self._clear({hour for hour in self.clickhouse.hours_of(rows) if hour != hour_us}):
            now = _readable(self._judge(hour_us)[0])
        inserted = self.repairs.insert(plan, rows, self.clickhouse, now.missing)
        if mend := not now.rollup_equal or plan.resumed:
            self.clickhouse.rebuild_rollup(hour_us, self._closed_end(hour_us))
        elif not inserted.num_rows and not plan.resumed:
            self.repairs.abandon(plan)
            return 0, now
        then = _readable(self._judge(hour_us)[0])
        self.repairs.require_kept(plan, then.missing)

        def mark(connection: sa.Connection, _index: int) -> None:
            self.repairs.mark_logged(connection, plan)
            mark_dirty(connection, hour_us)  # a crash after this commit: the hour is due, and is reconciled again

        draft = self.repairs.record(plan, rows if plan.resumed else inserted, mend, self.cas.put)
        self._append(draft, mark)
        return inserted.num_rows, then

    def _clear(self, hours_us: set[int]) -> bool:
        """Rebuild the days of hours that hold what belongs to another: inserted there too, an event would stand twice.

        False where there are none. Unavailable where such a day may not be rebuilt yet; its hours are due then.
        """
        if hours_us:
            with self.database.write() as connection:
                for hour in hours_us:
                    mark_dirty(connection, hour)
        for day_us in sorted({_day_of(hour) for hour in hours_us}):
            self._rebuild(day_us)
        return bool(hours_us)

    def _rebuildable(self, day_us: int) -> list[int]:
        """The covered hours of a day. Unavailable where the day may not be rebuilt from their batches, or not yet."""
        covered, still_open = self._coverage(day_us)
        if expired := self._expired(day_us):
            raise Unavailable(f"{iso(day_us)[:10]} cannot be rebuilt: {expired}", "nothing is left to repair")
        held = {*self.hours.known(day_us, day_us + DAY_US), *self.clickhouse.hours_with_rows(day_us, day_us + DAY_US)}
        closes_us = day_us + DAY_US + self.settings.fast_path_deadline_s * US_PER_SECOND
        require_closed(day_us, covered, still_open, held, None if self.clock.now_us() >= closes_us else closes_us)
        return covered

    def _coverage(self, day_us: int) -> tuple[list[int], list[int]]:
        """The hours of a day that a lane covers, and which of these are not closed."""
        covered = [hour for hour in range(day_us, day_us + DAY_US, HOUR_US) if self.hours.covered(hour)]
        return covered, [hour for hour in covered if self.hours.closed_until(hour) < hour + HOUR_US]

    def _rebuild(self, day_us: int) -> None:
        """Replace a day's rows in ClickHouse by those of its batches, log that, and reconcile the day's hours.

        No lock keeps a lane from opening between `ready` and the swap: what it delivers in that instant goes, from
        ClickHouse alone. Once the lane has closed, its hours are due, say what is missing, and a repair inserts that.
        """
        hours = self._rebuildable(day_us)
        last = {hour: self.hours.last_report(hour) for hour in hours}
        reports = {hour: report.digest if report else None for hour, report in last.items()}
        entries = [entry for hour in hours for entry in self.slow.hour(hour)]

        def ready() -> None:
            if self._coverage(day_us) != (hours, []):  # a lane has come into the day: what it delivers would be lost
                raise Unavailable(f"{iso(day_us)[:10]} was opened again meanwhile", "repair it when it is closed")

        done = self.repairs.rebuild(day_us, reports, entries, self.slow.tables(hours), self.clickhouse, ready)

        def mark(connection: sa.Connection, _index: int) -> None:
            self.repairs.mark_rebuilt(connection, done)
            for hour in hours:  # a crash after this commit: they are due, and are reconciled again
                mark_dirty(connection, hour)

        self._append(self.repairs.record_rebuild(done, self.cas.put), mark)
        known = self.hours.known(day_us, day_us + DAY_US)
        for hour in hours:
            if hour in known or last[hour] is not None:
                self.reconcile(hour)

    def _expired(self, hour_us: int) -> str:
        """Why ClickHouse no longer holds the hour; empty where it does."""
        return f"expired: ClickHouse keeps {self.settings.retention_days} days" if self.expired(hour_us) else ""

    def _closed_end(self, hour_us: int) -> int:
        closed = self.hours.closed_until(hour_us)
        return closed - closed % WINDOW_US

    def _judge(self, hour_us: int) -> tuple[HourReport, list[AuditEntry]]:
        """The report as it would be logged if nothing had changed since the last, and the batches that it is of."""
        closed, last = self.hours.closed_until(hour_us), self.hours.last_report(hour_us)
        revision, threshold = last.revision if last else 1, self.settings.threshold_ppm
        if expired := self._expired(hour_us):
            return unavailable_report(hour_us, revision, threshold, closed, expired), []
        try:
            entries = self.slow.hour(hour_us)
            figures, diffs = self._read(hour_us, closed, entries)
        except (Unavailable, Finding) as error:
            return unavailable_report(hour_us, revision, threshold, closed, str(error)), []
        digests = [str(entry.subject_digest) for entry in entries]
        return build_report(hour_us, revision, threshold, digests, closed, figures, diffs), entries

    def _read(self, hour_us: int, closed: int, found: list[AuditEntry]) -> Reading:
        """Both sides, as far as the hour is closed."""
        if closed < hour_us + WINDOW_US:
            return [], {}
        end = closed - closed % WINDOW_US
        fast = self.clickhouse.window_aggregates(hour_us, end)
        rollup = self.clickhouse.rollup_aggregates(hour_us, end)
        with self._connected() as connection:
            slow = self.slow.window_aggregates(found, connection)
            figures = [one for one in compare(slow, fast, rollup, connection) if one.key[0] * WINDOW_US < end]
            held = Totals(sum(one.fast_events for one in figures), sum(one.fast_gpu_time_ns for one in figures))
            if end == hour_us + HOUR_US and self.clickhouse.hourly_totals(hour_us) != held:
                figures = [replace(one, rollup_equal=False) for one in figures]
            differing = [one.key for one in figures if not one.rows_equal]
            if not differing:
                return figures, {}
            first, last = differing[0][0] * WINDOW_US, differing[-1][0] * WINDOW_US  # figures are in order of time
            fast_rows = self.clickhouse.row_values(first, last + WINDOW_US)
            diffs = diff_rows(self.slow.row_values(found, connection), fast_rows, differing)
        if any(key not in diffs for key in differing):
            raise Unavailable("the fast path changed while it was read", "reconcile the hour again")
        return figures, diffs

    @contextmanager
    def _connected(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """DuckDB, its errors translated; what it spills is nobody else's to read."""
        try:
            with TemporaryDirectory(prefix="render-platform-") as folder, self._duckdb_connect() as connection:
                connection.execute(f"SET temp_directory = '{folder}'")
                yield connection
        except (duckdb.Error, OSError) as error:
            raise Unavailable(f"DuckDB failed: {error}", "see the message") from error

    def _log_report(self, report: HourReport, found: list[AuditEntry]) -> bool:
        """False where another report of this revision is logged."""
        data = report.to_bytes()
        digest = self.cas.put(data)
        draft = AuditEntry(
            type="reconciliation",
            batch_id=f"{iso(report.hour_us)[:13]}/r{report.revision}",
            previous=FIRST_PREVIOUS,
            recorded_hour=report.hour_us,
            subject_digest=digest,
            subject_size=len(data),
            records=report.total("events"),
            gpu_time_ns=report.total("gpu_time_ns"),
        )

        def mark(connection: sa.Connection, _index: int) -> None:
            mark_reported(connection, report.hour_us, report.revision, digest, report.status, len(found))

        self._append(draft, mark)
        last = self.hours.last_report(report.hour_us)
        return last is not None and last.digest == digest

    def _append(self, draft: AuditEntry, mark: Mark) -> None:
        self.log.publish()
        self.log.append(draft, mark)
        self.log.publish()


def _day_of(hour_us: int) -> int:
    return hour_us - hour_us % DAY_US


def _left(report: HourReport) -> tuple[int, bool]:
    """What inserting and mending can make less."""
    return report.count("missing"), not report.rollup_equal


def _readable(report: HourReport) -> HourReport:
    if report.status == "unavailable":
        raise Unavailable(f"{iso(report.hour_us)} cannot be repaired: {report.error}", "make both sides readable first")
    return report
