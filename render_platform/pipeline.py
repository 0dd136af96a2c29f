"""The pipeline: the one module that knows the order of the stages.

A `Platform` is an open state folder. Its methods are what the commands, the Dagster assets and the tests call; each
may be run again from any point, with no duplicate and no loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import sqlalchemy as sa

from render_platform.audit_log import AuditLog, BatchLogger, Mark, create_head
from render_platform.batches import decode
from render_platform.canonical import digest_of
from render_platform.cas import Cas, check_stores, open_objects
from render_platform.clickhouse import ClickHouse, open_clickhouse
from render_platform.clock import DAY_US, WINDOW_US, Clock, Ids, SystemClock, SystemIds, iso
from render_platform.config import Settings
from render_platform.database import Database, batches, checkpoints, log_entries, open_sqlite
from render_platform.delivery import Delivery
from render_platform.entries import END_OF_TIME_US, FIRST_PREVIOUS, AuditEntry, parse
from render_platform.errors import Finding, Unavailable, UsageError
from render_platform.events import Key, merkle_root
from render_platform.evidence import Evidence, Progress, Verification
from render_platform.hours import Hours, entries_of_hour, mark_dirty, mark_reported, mark_unchanged
from render_platform.keyring import Keyring, Pinned, open_signers, settle_key_files
from render_platform.note import Checkpoint, Signer, Verifier, load_or_create_key
from render_platform.outbox import Outbox
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
from render_platform.sealing import Sealer
from render_platform.slow_path import SlowPath, of_keys, run_query
from render_platform.verification import verify
from render_platform.witness import Witnesses, parse_members

DuckDB = Callable[[], AbstractContextManager[duckdb.DuckDBPyConnection]]


@dataclass(frozen=True, slots=True)
class LogState:
    """What `log_batches` did, and where the log stands."""

    logged: int
    checkpoint: Checkpoint | None


@dataclass(frozen=True, slots=True)
class RepairOutcome:
    """How many rows were inserted, and the report of the hour before and after."""

    inserted: int
    before: HourReport
    after: HourReport


Reading = tuple[list[KeyFigures], dict[Key, RowDiff]]
"""What both sides say of each key, and the rows that differ."""


class Platform:
    def __init__(self, settings: Settings, clock: Clock, ids: Ids, duckdb_connect: DuckDB = duckdb.connect) -> None:
        self.settings = settings
        self.clock = clock
        self.ids = ids
        self._duckdb_connect = duckdb_connect
        _make_state_folder(settings.state_dir)
        self.database = open_sqlite(settings.database_path)
        self.blobs, self.log_objects = open_objects(settings, ids)
        self.cas = Cas(self.blobs)
        keys = RoleKeys(settings, self.database, self.cas)
        signers = keys.signers("checkpoint", settings.checkpoint_signer, _origin(ids))
        self.log_signer = signers[0]
        name = f"{self.log_signer.name}/attestation"
        self.attestation_signer = keys.signers("attestation", settings.attestation_signer, name)[0]
        self.log = AuditLog(
            self.database, self.cas, self.log_objects, *signers, witnesses=_witnesses(settings, self.clock)
        )
        self.outbox = Outbox(self.database, ids)
        self.hours = Hours(self.database, clock, settings.fast_path_deadline_s)
        self.slow = SlowPath(self.cas, self._published_batches)
        self.repairs = Repairs(self.database, clock, ids)

    @cached_property
    def clickhouse(self) -> ClickHouse:
        """Opened on first use: sealing, logging and verifying need no ClickHouse."""
        settings = self.settings
        return open_clickhouse(settings.clickhouse_url, settings.clickhouse_database, settings.retention_days)

    def close(self) -> None:
        if "clickhouse" in self.__dict__:
            self.clickhouse.close()
        self.database.close()

    # The slow path, in its order.

    def seal(self) -> list[str]:
        """Unsealed rows → sealed batches; closed hours → watermarks. Gives the ids of the batches."""
        sealer = Sealer(
            self.database,
            self.clock,
            batch_rows=self.settings.batch_rows,
            rows_a_transaction=self.settings.seal_rows_a_transaction,
        )
        return sealer.seal()

    def store(self) -> list[str]:
        """Sealed batches → objects and attestations in the CAS. Gives the ids of the batches."""
        return Delivery(self.database, self.cas, self.attestation_signer).store_sealed()

    def log_batches(self) -> LogState:
        """Stored batches and watermarks → entries → a signed, published checkpoint."""
        self.log.publish()  # rolls forward what an earlier crash left unpublished, before anything is added
        indexes = BatchLogger(self.database, self.log).log_stored(mark_dirty)
        return LogState(len(indexes), self.log.publish())

    def flush(self) -> LogState:
        self.seal()
        self.store()
        return self.log_batches()

    # The fast path against the slow one.

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

    # Reading evidence.

    def verify(
        self,
        *,
        deep: bool = False,
        start_us: int = 0,
        end_us: int = END_OF_TIME_US,
        only_range: bool = False,
        progress: Progress = lambda *_: None,
    ) -> Verification:
        """See verification.verify; with this state's own keys, and the checkpoints that its database remembers."""
        return verify(
            self.evidence(), deep=deep, start_us=start_us, end_us=end_us, only_range=only_range, progress=progress
        )

    def evidence(self) -> Evidence:
        """What auditors verify, with every key that the log names, and the checkpoints that its database remembers."""
        keys, recovery = RoleKeys(self.settings, self.database, self.cas).keyring, self.settings.recovery_key
        return Evidence(
            log=self.log_objects,
            blobs=self.blobs,
            log_keys=[span.key for span in keys.spans.get("checkpoint", ())] or [self.log_signer.verifier],
            attestation_keys=[span.key for span in keys.spans.get("attestation", ())]
            or [self.attestation_signer.verifier],
            history=self.history(),
            recovery_key=Verifier.parse(recovery) if recovery else None,
        )

    def stored_unlogged(self) -> list[dict[str, Any]]:
        """The batches that are stored and not yet logged: what a check can still keep out of the log."""
        with self.database.read() as connection:
            rows = connection.execute(sa.select(batches).filter_by(state="stored").order_by(batches.c.ordinal))
            return [dict(row) for row in rows.mappings()]

    def read_batch(self, batch: Mapping[str, Any]) -> pa.Table:
        """A stored batch's rows, through its digest; Finding where they are not those that were sealed."""
        table = decode(self.cas.get(batch["blob_digest"]))
        if merkle_root(table).hex() != batch["merkle_root"]:
            raise Finding(f"the batch {batch['batch_id']} does not hold the rows that were sealed")
        return table

    def history(self) -> list[Checkpoint]:
        """Every checkpoint that was published, as the database remembers it."""
        with self.database.read() as connection:
            rows = connection.execute(sa.select(checkpoints).order_by(checkpoints.c.size)).all()
        return [Checkpoint(self.log_signer.name, row.size, row.root) for row in rows]

    def query(self, sql: str) -> pa.Table:
        """One SELECT over `usage_events`: the rows of every published batch, digests checked."""
        return run_query(sql, self.slow.tables(self.hours.known()))

    # Inside.

    def _published_batches(self, hour_us: int) -> list[bytes]:
        with self.database.read() as connection:
            return entries_of_hour(connection, hour_us, "usage_batch")

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


@contextmanager
def open_platform(
    settings: Settings,
    clock: Clock | None = None,
    ids: Ids | None = None,
    *,
    create: bool = False,
    duckdb_connect: DuckDB = duckdb.connect,
) -> Iterator[Platform]:
    """An open platform. Unless `create`, UsageError where the folder holds no state yet."""
    if not create and not settings.database_path.exists():
        raise UsageError(
            f"{settings.state_dir} holds no platform state", "run `render-platform demo`, or give --state DIR"
        )
    platform = Platform(settings, clock or SystemClock(), ids or SystemIds(), duckdb_connect)
    try:
        if create or settings.objects_url:  # another bucket may have been configured since
            check_stores(settings, platform.ids)
        yield platform
    finally:
        platform.close()


def _readable(report: HourReport) -> HourReport:
    if report.status == "unavailable":
        raise Unavailable(f"{iso(report.hour_us)} cannot be repaired: {report.error}", "make both sides readable first")
    return report


def _make_state_folder(folder: Path) -> None:
    """Its owner's alone: the database holds customers' ids and salts."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be a state folder: {error.strerror}", "give --state a folder") from error


class RoleKeys:
    """Whose keys a state folder signs with, as the log in SQL says of them."""

    def __init__(self, settings: Settings, database: Database, cas: Cas) -> None:
        self._folder = settings.keys_dir
        self.log_size = create_head(database)
        with database.read() as connection:
            select = sa.select(log_entries.c.log_index, log_entries.c.entry).filter_by(type="key")
            rows = connection.execute(select.order_by(log_entries.c.log_index)).all()
        entries = [(row.log_index, parse(bytes(row.entry))) for row in rows]
        self.keyring = Keyring.from_entries(entries, Pinned(), cas.get)

    def path(self, role: str) -> Path:
        return self._folder / f"{role}.key"

    def signers(self, role: str, source: str, name: str, *, old: bool = True) -> list[Signer]:
        """Who signs in that role, the key in force first. The folder's own key is made under `name` on first use;
        where the log has begun under it (`old`), it must be there."""
        path = self.path(role)
        if not source:
            settle_key_files(role, path, self.keyring, self.log_size)
            if old and self.log_size and not path.exists():
                raise Unavailable(f"{path} is missing", "restore the key from a copy: this log was begun under it")
            load_or_create_key(path, name)
        return open_signers(source, path)


def _witnesses(settings: Settings, clock: Clock) -> Witnesses | None:
    members = parse_members(settings.witnesses)
    if not members:
        return None
    return Witnesses(members, settings.witness_quorum, settings.witness_policy, settings.witness_timeout_s, clock)


def _origin(ids: Ids) -> str:
    """A log's name, unique and for good: it is made with the log's key, and kept with it."""
    return f"render-platform.local/log/{ids.random(4).hex()}"
