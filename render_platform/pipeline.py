"""The pipeline: the one module that knows the order of the stages.

A `Platform` is an open state folder. Its methods are what the commands, the Dagster assets and the tests call; each
may be run again from any point, with no duplicate and no loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import sqlalchemy as sa

from render_platform.audit_log import AuditLog, BatchLogger, create_head
from render_platform.batches import decode
from render_platform.cas import Cas, check_stores, open_objects
from render_platform.clickhouse import ClickHouse, open_clickhouse
from render_platform.clickhouse_slow_path import open_reader
from render_platform.clock import DAY_US, Clock, Ids, SystemClock, SystemIds
from render_platform.config import Settings
from render_platform.database import Database, batches, checkpoints, log_entries, open_database
from render_platform.entries import END_OF_TIME_US, parse
from render_platform.errors import Finding, Unavailable, UsageError
from render_platform.events import merkle_root
from render_platform.evidence import Evidence, Progress, Verification
from render_platform.hours import Hours, entries_of_hour, mark_dirty
from render_platform.keyring import Keyring, Pinned, open_signers, settle_key_files
from render_platform.note import Checkpoint, Signer, Verifier, load_or_create_key
from render_platform.objects import ObjectStore, make_folders, sync_folder
from render_platform.outbox import LIVE, Outbox
from render_platform.reconciler import DuckDB, Evidenced, Reconciler, RepairOutcome
from render_platform.reconciliation import HourReport
from render_platform.repair import Repairs
from render_platform.sealing import Delivery, Sealer
from render_platform.slow_path import SlowPath, run_query
from render_platform.verification import verify
from render_platform.witness import Witnesses, parse_members


@dataclass(frozen=True, slots=True)
class LogState:
    """What `log_batches` did, and where the log stands."""

    logged: int
    checkpoint: Checkpoint | None


class Platform:
    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        ids: Ids,
        duckdb_connect: DuckDB = duckdb.connect,
        *,
        database: Database | None = None,
        stores: tuple[ObjectStore, ObjectStore] | None = None,
    ) -> None:
        """`database` and `stores` (the blobs', the log's) stand in for those that the settings name."""
        self.settings = settings
        self.clock = clock
        self.ids = ids
        self._duckdb_connect = duckdb_connect
        _make_state_folder(settings.state_dir)
        self.database = database or open_database(settings.database)
        self.blobs, self.log_objects = stores or open_objects(settings, ids)
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
        reader = open_reader(settings, self.cas, lambda: self.clickhouse)
        self.slow = SlowPath(self.cas, self._published_batches, reader)
        self.repairs = Repairs(self.database, clock, ids)
        self.reconciler = Reconciler(
            settings,
            clock,
            self.database,
            Evidenced(self.cas, self.log, self.slow),
            self.hours,
            self.repairs,
            lambda: self.clickhouse,
            duckdb_connect,
        )

    @cached_property
    def clickhouse(self) -> ClickHouse:
        """Opened on first use: sealing, logging and verifying need no ClickHouse. How long rows are kept, `migrate` and
        the gateway say: whoever only reads takes nothing away, and migrates nothing."""
        settings = self.settings
        return open_clickhouse(settings.clickhouse_url, settings.clickhouse_database)

    def close(self) -> None:
        if "clickhouse" in self.__dict__:
            self.clickhouse.close()
        self.database.close()

    # The slow path, in its order.

    def seal(self) -> list[str]:
        """Unsealed rows → sealed batches; closed hours → watermarks. Gives the ids of the batches."""
        return self._sealer().seal()

    def store(self) -> list[str]:
        """Sealed batches → objects and attestations in the CAS. Gives the ids of the batches."""
        return self._delivery().store_sealed()

    def _sealer(self) -> Sealer:
        rows, at_once = self.settings.batch_rows, self.settings.seal_rows_a_transaction
        return Sealer(self.database, self.clock, batch_rows=rows, rows_a_transaction=at_once)

    def _delivery(self) -> Delivery:
        return Delivery(self.database, self.cas, self.attestation_signer)

    def log_batches(self) -> LogState:
        """Stored batches and watermarks → entries → a signed, published checkpoint."""
        self.log.publish()  # rolls forward what an earlier crash left unpublished, before anything is added
        indexes = BatchLogger(self.database, self.log).log_stored(mark_dirty)
        return LogState(len(indexes), self.log.publish())

    def flush(self) -> LogState:
        """All of the above. Each batch is stored as soon as it is sealed, so that its rows are read from SQL once."""
        self._sealer().seal(then=self._delivery().store)
        self.store()  # what an earlier crash left sealed
        return self.log_batches()

    # The fast path against the slow one.

    def reconcile(self, hour_us: int) -> HourReport:
        """The verdict on one hour; see reconciler.Reconciler.reconcile."""
        return self.reconciler.reconcile(hour_us)

    def repair(self, hour_us: int) -> RepairOutcome:
        """Repair of one hour's fast path; see reconciler.Reconciler.repair."""
        return self.reconciler.repair(hour_us)

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

    def prune(self) -> int:
        """Live events, and their jobs, that are older than `outbox_retention_days` leave SQL; see Outbox.prune."""
        return self.outbox.prune(self.cas, LIVE, self.clock.now_us() - self.settings.outbox_retention_days * DAY_US)

    def query(self, sql: str) -> pa.Table:
        """One SELECT over `usage_events`: the rows of every published batch, digests checked."""
        return run_query(sql, self.slow.tables(self.hours.known()))

    # Inside.

    def _published_batches(self, hour_us: int) -> list[bytes]:
        with self.database.read() as connection:
            return entries_of_hour(connection, hour_us, "usage_batch")


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
    if not create and not settings.has_state:
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


def _make_state_folder(folder: Path) -> None:
    """Its owner's alone: the database holds customers' ids and salts. Durable, like what is accepted into it."""
    try:
        if not folder.is_dir():
            make_folders(folder.parent)
            folder.mkdir(mode=0o700, exist_ok=True)
            sync_folder(folder.parent)
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
