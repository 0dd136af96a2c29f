"""The fast path against the slow one: the verdict on an hour, logged where it is final; and its repair."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import NamedTuple

import duckdb
import sqlalchemy as sa

from render_platform.audit_log import AuditLog, Mark
from render_platform.canonical import digest_of
from render_platform.cas import Cas
from render_platform.clickhouse import ClickHouse
from render_platform.clock import DAY_US, WINDOW_US, Clock, iso
from render_platform.config import Settings
from render_platform.database import Database
from render_platform.entries import FIRST_PREVIOUS, AuditEntry
from render_platform.errors import Finding, Unavailable
from render_platform.events import Key
from render_platform.hours import Hours, mark_reported, mark_unchanged
from render_platform.reconciliation import (
    HourReport,
    KeyFigures,
    RowDiff,
    build_report,
    compare,
    diff_rows,
    unavailable_report,
)
from render_platform.repair import Repairs
from render_platform.slow_path import SlowPath, of_keys

DuckDB = Callable[[], AbstractContextManager[duckdb.DuckDBPyConnection]]


@dataclass(frozen=True, slots=True)
class RepairOutcome:
    """How many rows were inserted, and the report of the hour before and after."""

    inserted: int
    before: HourReport
    after: HourReport


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
        """The verdict on one hour. Logged where it is final and says something new; harmless to repeat."""
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
            return self.reconcile(hour_us)  # another process reported the hour meanwhile, and it saw something else
        return report

    def repair(self, hour_us: int) -> RepairOutcome:
        """Insert the hour's missing rows into ClickHouse, mend its rollup, log it, and reconcile again.

        Raises Unavailable where a side cannot be read. Rows that are duplicated, altered or unexpected stay, and the
        report after the repair still says so.
        """
        before = _readable(self.reconcile(hour_us))
        plan = self.repairs.plan(hour_us, before.missing, rollup=not before.rollup_equal)
        if plan is None:
            return RepairOutcome(0, before, before)
        now = _readable(self._judge(hour_us)[0])  # after the plan is committed: what another repair inserted is seen
        rows = self.slow.rows_by_id(self.slow.hour(hour_us), plan.event_ids)
        inserted = self.repairs.insert(plan, rows, self.clickhouse, now.missing)
        if not now.rollup_equal:
            self.clickhouse.rebuild_rollup(hour_us, self._closed_end(hour_us))
        elif not inserted.num_rows and not plan.resumed:
            self.repairs.abandon(plan)
            return RepairOutcome(0, before, now)
        left = _readable(self._judge(hour_us)[0]).missing
        if refused := set(plan.event_texts) & set(left):
            self.repairs.abandon(plan)
            raise Unavailable(
                f"ClickHouse did not keep {len(refused)} of the rows of repair {plan.repair_id}",
                "run the repair again: it takes a new id, and with it new tokens",
            )
        draft = self.repairs.record(plan, rows if plan.resumed else inserted, not now.rollup_equal, self.cas.put)
        self._append(draft, lambda connection, _index: self.repairs.mark_logged(connection, plan))
        if plan.resumed:  # what an earlier repair began is done; now what has gone missing since
            rest = self.repair(hour_us)
            return RepairOutcome(inserted.num_rows + rest.inserted, before, rest.after)
        return RepairOutcome(inserted.num_rows, before, self.reconcile(hour_us))

    def _expired(self, hour_us: int) -> str:
        """Why ClickHouse no longer holds the hour; empty where it does."""
        days = self.settings.retention_days
        gone = days > 0 and hour_us < self.clock.now_us() - days * DAY_US
        return f"expired: ClickHouse keeps {days} days" if gone else ""

    def _closed_end(self, hour_us: int) -> int:
        closed = self.hours.closed_until(hour_us)
        return closed - closed % WINDOW_US

    def _judge(self, hour_us: int) -> tuple[HourReport, list[AuditEntry]]:
        """The report as it would be logged if nothing had changed since the last, and the batches that it is of."""
        closed = self.hours.closed_until(hour_us)
        last = self.hours.last_report(hour_us)
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
        with self._duckdb_connect() as connection:
            slow = self.slow.window_aggregates(found, connection)
        fast = self.clickhouse.window_aggregates(hour_us, end)
        figures = [
            one
            for one in compare(slow, fast, self.clickhouse.rollup_aggregates(hour_us, end))
            if one.key[0] * WINDOW_US < end
        ]
        differing = [one.key for one in figures if not one.rows_equal]
        if not differing:
            return figures, {}
        fast_rows = self.clickhouse.rows(hour_us, end, sorted({key[1:] for key in differing}))
        diffs = diff_rows(self.slow.rows(found, differing), of_keys(fast_rows, differing))
        if any(key not in diffs for key in differing):
            raise Unavailable("the fast path changed while it was read", "reconcile the hour again")
        return figures, diffs

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


def _readable(report: HourReport) -> HourReport:
    if report.status == "unavailable":
        raise Unavailable(f"{iso(report.hour_us)} cannot be repaired: {report.error}", "make both sides readable first")
    return report
